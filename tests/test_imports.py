"""Rules of the house that a parser can hold: arrows, circles, sizes, files in few places, no pickle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import SHAPES

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


# -- circles and sizes ------------------------------------------------------------------------------

MODULES = {
    name_of(path).removesuffix("/__init__.py").removesuffix(".py").replace("/", "."): path for path in FILES
}
LINES, FUNCTION, ARGUMENTS, FOLDER = 400, 60, 8, 15
#: Modules of the two library packages that touch files.
STARRED = {
    "polca_edit/artifacts.py",
    "polca_edit/recording.py",
    "polca_edit/checkpoints/agreement.py",
    "polca_edit/checkpoints/files.py",
    "polca_edit/checkpoints/huggingface.py",
    "polca_edit/checkpoints/huggingface_models.py",
    "polca_edit/checkpoints/opening.py",
    "polca_edit/checkpoints/survey.py",
    "polca_edit/checkpoints/tokenizer_files.py",
    "interventions/edit_files.py",
}
#: Calls that read, write or ask for files: functions, and methods of paths.
TOUCHING = {"open", "load_file", "save_file", "safe_open", "rmtree", "copytree"} | {
    *("read_text", "write_text", "read_bytes", "write_bytes", "exists", "is_file", "is_dir", "mkdir"),
    *("unlink", "glob", "rglob", "iterdir", "touch", "from_pretrained", "save_pretrained"),
}


def arrows(trees: dict[str, ast.AST]) -> dict[str, set[str]]:
    """Module -> modules it imports, inside functions too; a package that names its parts is no arrow."""
    graph = {name: imported(tree) & trees.keys() - {name} for name, tree in trees.items()}
    inside = {name for name in trees if any(other.startswith(f"{name}.") for other in trees)}
    return {name: set() if name in inside else targets for name, targets in graph.items()}


def on_a_circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules from which an import leads back to themselves."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        ahead = list(graph[start])
        while ahead:
            module = ahead.pop()
            if module not in found:
                found.add(module)
                ahead.extend(graph[module])
        return found

    return sorted(name for name in graph if name in reached(name))


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def wide(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """More arguments than allowed; ``self`` is none, and a verb has as many as it has options."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    if any("Annotated" in ast.dump(a.annotation) for a in every if a.annotation is not None):
        return False
    return len(every) - (bool(every) and every[0].arg in ("self", "cls")) > ARGUMENTS


def touches_files(tree: ast.AST) -> set[str]:
    named = {dotted(c.func).split(".")[-1] for c in ast.walk(tree) if isinstance(c, ast.Call)}
    return named & TOUCHING


def test_no_import_circle_anywhere():
    assert on_a_circle(arrows({name: TREES[path] for name, path in MODULES.items()})) == []


def test_a_circle_through_a_function_is_found():
    sources = {"a": "import b", "b": "def f():\n    from c import d", "c": "import a", "d": "import a"}
    graph = arrows({name: ast.parse(text) for name, text in sources.items()})
    assert on_a_circle(graph) == ["a", "b", "c"]


def test_modules_functions_and_argument_lists_stay_small():
    long_modules = [name_of(p) for p in FILES if p.read_text().count("\n") > LINES]
    every = [(name_of(p), f) for p in FILES for f in functions(TREES[p])]
    long_functions = [f"{n}:{f.name}" for n, f in every if f.end_lineno - f.lineno + 1 > FUNCTION]
    assert (long_modules, long_functions) == ([], [])
    assert [f"{n}:{f.name}" for n, f in every if wide(f)] == []


def test_folders_stay_small():
    parents = [name.rpartition(".")[0] for name in MODULES]
    assert {parent for parent in parents if parent and parents.count(parent) > FOLDER} == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_touched_in_few_modules_of_the_libraries(path):
    if not name_of(path).startswith("experiments/") and name_of(path) not in STARRED:
        assert touches_files(TREES[path]) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(p):\n    return p.read_text()", {"read_text"}),
        ("open('x')", {"open"}),
        ("open_checkpoints('x')", set()),
    ],
)
def test_the_parser_sees_files_touched(source, found):
    assert touches_files(ast.parse(source)) == found


def test_bounds_are_seen():
    many = ", ".join("abcdefghi")
    tree = ast.parse(f"class A:\n    def f(self, {many}): ...\n    def g(self, {many[:-3]}): ...")
    assert [wide(f) for f in functions(tree)] == [True, False]
    verb = ast.parse(f"def v({many}, j: Annotated[int, typer.Option()] = 1): ...")
    assert [wide(f) for f in functions(verb)] == [False]


def test_every_file_whose_annotations_are_checked_is_there():
    """A name without a file would be a check that is never made."""
    assert [name for name in SHAPES if not (Path(__file__).parent / f"test_{name}.py").exists()] == []
