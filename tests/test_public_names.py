"""The public names: there, loaded only when used, and never hidden by a submodule of the same name."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import interventions
import polca_edit

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "Basis",
    "Checkpoints",
    "ClusterSettings",
    "Objective",
    "Observation",
    "ObserveSettings",
    "ParameterSpace",
    "Recorder",
    "TokenSet",
    "build_basis",
    "hessian_basis",
    "next_token_loss",
    "observe",
    "open_checkpoints",
    "trajectory_basis",
}


def fresh(code: str) -> str:
    """What a new interpreter prints, run from the root of the tree."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_importing_costs_nothing_and_loads_no_torch():
    said = fresh(
        "import sys, time; start = time.process_time(); import polca_edit, interventions; "
        "print(time.process_time() - start, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    seconds, *heavy = said.split()
    assert heavy == ["False", "False"]
    assert float(seconds) < 0.5


def test_the_public_names_are_the_promised_ones():
    assert set(polca_edit.__all__) == PUBLIC
    assert set(dir(polca_edit)) >= PUBLIC
    assert len(polca_edit.__all__) == len(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_name_is_the_object_of_its_module_and_says_what_it_is(name):
    found = getattr(polca_edit, name)
    assert getattr(importlib.import_module(found.__module__), name) is found
    assert found.__module__ == f"polca_edit.{polca_edit._HOMES[name]}"
    assert len((found.__doc__ or "").strip()) > 20


def test_type_checkers_see_the_same_names_from_the_same_modules():
    tree = ast.parse(Path(polca_edit.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {name: f"polca_edit.{home}" for name, home in polca_edit._HOMES.items()}


def test_no_submodule_hides_a_public_name():
    assert {module.name for module in pkgutil.iter_modules(polca_edit.__path__)} & PUBLIC == set()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'observer'"):
        _ = polca_edit.observer


def test_interventions_export_their_names_lazily():
    assert set(interventions.__all__) == set(interventions._HOMES)
    for name, home in interventions._HOMES.items():
        found = getattr(interventions, name)
        assert found is getattr(importlib.import_module(home), name)
        assert len((found.__doc__ or "").strip()) > 20
    with pytest.raises(AttributeError, match="no attribute 'project'"):
        _ = interventions.project
