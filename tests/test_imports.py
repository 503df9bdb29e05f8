"""Rules of the house that a parser can hold: arrows between packages, libraries in one place, no pickle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("polca_edit", "interventions", "experiments")
#: package -> packages it may import.
ALLOWED = {
    "polca_edit": {"polca_edit"},
    "interventions": {"polca_edit", "interventions"},
    "experiments": set(PACKAGES),
}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = {path: ast.parse(path.read_text(), str(path)) for path in FILES}
PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of everything imported anywhere in a file, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which package they reach"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith(("import_module", "__import__")):
            names = (a.value for a in node.args if isinstance(a, ast.Constant))
            found.update(name for name in names if isinstance(name, str))
    return found


def roots(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imported(tree)}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(tree: ast.AST, ending: str) -> list[ast.Call]:
    every = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [call for call in every if f".{dotted(call.func)}".endswith(f".{ending}")]


def only_in(library: str, allowed: set[str], allowed_prefix: str = "\0") -> list[str]:
    names = {name_of(path) for path, tree in TREES.items() if library in roots(tree)}
    return sorted(n for n in names if n not in allowed and not n.startswith(allowed_prefix))


def test_files_are_found():
    assert {name_of(path).split("/")[0] for path in FILES} == set(PACKAGES)
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_arrows_between_packages(path):
    own = name_of(path).split("/")[0]
    reached = roots(TREES[path]) & {*PACKAGES, "tests", "benchmarks"}
    assert reached <= ALLOWED[own], f"{own} may import {sorted(ALLOWED[own])} only"


def test_transformer_lens_is_imported_in_one_file():
    assert only_in("transformer_lens", {"polca_edit/models.py"}) == []


def test_matplotlib_is_imported_in_the_report_alone():
    assert only_in("matplotlib", set(), "experiments/report/") == []


def test_nothing_imports_a_pickler():
    assert [name_of(path) for path, tree in TREES.items() if roots(tree) & PICKLING] == []


def test_every_torch_load_reads_weights_only():
    found = 0
    for path, tree in TREES.items():
        for call in calls(tree, "torch.load"):
            found += 1
            options = {k.arg: k.value for k in call.keywords}
            assert isinstance(options.get("weights_only"), ast.Constant), name_of(path)
            assert options["weights_only"].value is True, name_of(path)
        assert "torch.load" not in imported(tree), f"{name_of(path)}: spell it torch.load"
    assert found > 0


def test_nothing_saves_or_loads_numpy_objects():
    for path, tree in TREES.items():
        for call in [*calls(tree, "np.load"), *calls(tree, "np.save"), *calls(tree, "torch.save")]:
            allowed = next((k.value for k in call.keywords if k.arg == "allow_pickle"), None)
            pickles = isinstance(allowed, ast.Constant) and bool(allowed.value)
            assert not pickles, name_of(path)
            # An edited model goes back in the format it came in; a torch state dict is one of them.
            if name_of(path) != "experiments/removal/apply.py":
                assert not dotted(call.func).endswith("torch.save"), f"{name_of(path)}: torch.save pickles"


def test_one_functional_call():
    users = {name_of(p) for p, t in TREES.items() if calls(t, "functional_call") or calls(t, "stateless")}
    assert users == {"polca_edit/parameters.py"}


def test_no_file_is_named_for_nothing():
    words = ("utils", "util", "helper", "helpers", "manager", "misc", "common")
    assert [name_of(p) for p in FILES if any(word in p.stem.split("_") for word in words)] == []


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("def f():\n    from experiments import cli\n", True),
        ("import importlib\nimportlib.import_module('interventions.edits')\n", True),
        ("from polca_edit.tokens import TokenSet\n", False),
    ],
)
def test_the_parser_sees_hidden_imports(source, bad):
    reached = roots(ast.parse(source)) & set(PACKAGES)
    assert (not reached <= ALLOWED["polca_edit"]) == bad
