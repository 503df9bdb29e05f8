"""One thread and no hub for every test, and one finished smoke run that the whole suite reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from filelock import FileLock

#: Files whose tests run with every array annotation checked against the arrays that come (``make test``
#: runs them apart, with ``--jaxtyping-packages``): each piece of the two libraries, and one run from training
#: to discovery. Checking the others too would double the time of the suite.
SHAPES = [
    "adjoint",
    "agreement",
    "allocation",
    "axes",
    "bases",
    "basis",
    "blocking",
    "breakthroughs",
    "checkpoints",
    "clusters",
    "comparators",
    "controls",
    "curvature",
    "damage",
    "edit_files",
    "edits",
    "features",
    "labels",
    "localise",
    "long_vectors",
    "membership",
    "own_task",
    "parameters",
    "quadrature",
    "recording",
    "removal",
    "remove_by_undoing",
    "rotations",
    "signatures",
    "simpson",
    "spacing",
    "statistics",
    "storage",
    "store",
    "subsets",
    "text",
    "timeline",
    "tokens",
    "training",
    "undo",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests whose arrays are checked."""
    for item in items:
        if item.path.stem.removeprefix("test_") in SHAPES:
            item.add_marker(pytest.mark.shapes)


@pytest.fixture(autouse=True)
def one_thread():
    """Fixed thread count: a sum split over threads rounds differently."""
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """An explicit generator, the same for every test."""
    return torch.Generator().manual_seed(20250)


def stamps(folder: Path) -> dict[str, int]:
    """Modification time of every file, by which a run that was written into is known."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Directory of a finished run of preset ``smoke`` (all stages, summary and tokens), to read only.

    Workers share it. A test that writes takes ``smoke_copy``.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = shared / "smoke_run"
    with FileLock(shared / "smoke_run.lock"):
        if not (out / "summary.json").exists():
            from experiments.config import load_config
            from experiments.run.driver import run_stages
            from experiments.run.run import open_run
            from experiments.run.summary.write import write_summary

            torch.set_num_threads(1)
            run = open_run(load_config("smoke", {"threads": 1}), out, lambda _: None)
            run_stages(run)
            write_summary(run)
    before = stamps(out)
    yield out
    assert stamps(out) == before, "a test wrote into the shared smoke run; it must take smoke_copy"


@pytest.fixture
def smoke_copy(smoke_run: Path, tmp_path: Path) -> Path:
    """A copy of the smoke run that a test may change."""
    return Path(shutil.copytree(smoke_run, tmp_path / "smoke"))
