"""A verb's options without its imports, so that ``--help`` answers at once.

Verbs stand beside the code they run, and that code imports torch and more. For help only the function's
signature and docstring are wanted: they are compiled alone, with the light names that options are written in.
"""

from __future__ import annotations
import __future__

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

#: What options are written with.
LIGHT = frozenset(
    {"typing", "pathlib", "typer", "collections", "collections.abc", "experiments.verbs.options"}
)


def signature_alone(module: str, name: str) -> Callable[..., Any] | None:
    """A function of a module with its signature and docstring and no body; None where it needs more names.

    Args:
        module: dotted name; it is read, not imported.
        name: of the function.

    >>> signature_alone("experiments.verbs.cost", "plan").__name__
    'plan'
    """
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        return None
    names: dict[str, Any] = {"__name__": module}
    for node in ast.parse(Path(found.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            node.body = node.body[:1] if ast.get_docstring(node) else [ast.Pass()]
        elif not (_imports_light_names(node) or isinstance(node, ast.Assign)):
            continue
        try:
            exec(_compiled(node, found.origin), names)
        except NameError:  # a constant that stands on heavier code
            continue
    function = names.get(name)
    if not callable(function):
        return None
    try:
        get_type_hints(function, include_extras=True)
    except NameError:
        return None
    return function  # type: ignore[no-any-return]


def _imports_light_names(node: ast.stmt) -> bool:
    if isinstance(node, ast.Import):
        return all(alias.name in LIGHT for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (node.module or "") in LIGHT


def _compiled(node: ast.stmt, file: str) -> Any:
    """One statement, annotations left as text."""
    flags = __future__.annotations.compiler_flag
    return compile(ast.Module([node], []), file, "exec", flags=flags, dont_inherit=True)
