"""The code of a task of the user's own, as one hash: its file and what that imports from beside it."""

from __future__ import annotations

import ast
from pathlib import Path

from polca_edit.artifacts import checksum, key_of


def own_source(file: Path) -> str:
    """Hash of a user's task file and of every module beside it that it imports, directly or not.

    Raises:
        ValueError: if the file is missing or is no Python.
    """
    if not file.is_file():
        raise ValueError(
            f"the task file '{file}' must exist, it does not; put it back, or run again with --task FILE.py"
        )
    found: dict[str, str] = {}
    waiting = [file]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(file.parent).as_posix()
        if name not in found:
            found[name] = checksum(path)
            waiting += imported_beside(path, file.parent)
    # The file's own name does not matter, those of the modules it imports do.
    return key_of(found.pop(file.name), found)


def imported_beside(path: Path, folder: Path) -> list[Path]:
    """Files of a folder that a Python file imports.

    Raises:
        ValueError: for a file that is no Python.
    """
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"'{path}' must be Python, it is not ({error}); correct it") from error
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    places = [folder.joinpath(*name.split(".")) for name in names]
    files = [p for place in places for p in (place.with_suffix(".py"), place / "__init__.py")]
    return [p for p in files if p.is_file()]
