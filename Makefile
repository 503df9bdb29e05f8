# Everything runs in a local .venv; nothing outside the package registry is reached.
SHELL := /bin/sh
PYTHON ?= python3
SEED ?= 0
OUT ?= runs/demo
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "polca-edit needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# torch first and pinned: a range would bring a build with several GB of CUDA
	@# not compiled ahead: most modules are never imported, those that are get compiled then
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/polca-edit demo --seed $(SEED) --out $(OUT)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(VENV)/.installed
	$(BIN)/ruff check .
	@# Types are checked beside the tests: mypy uses one core, and what imports is compiled once, not by every
	@# worker and every process that a test starts. The second pass has every array annotation checked, which
	@# doubles what a test takes.
	@set -e; export PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1; \
	$(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not timing and not shapes'; \
	$(BIN)/python -m pytest -n 2 --dist loadfile tests -m 'not timing and shapes' \
	  --jaxtyping-packages=polca_edit,interventions,beartype.beartype; \
	wait $$types

clean:
	rm -rf runs build *.egg-info
