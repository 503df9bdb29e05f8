"""What a run reads from outside its directory, as hashes of the content.

A file counts as unchanged, and its hash is taken from the run directory's list, only while its size
and both its times (of the content and of the inode, which no copy can set back) are the noted ones.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from experiments.config import RunConfig
from experiments.run.store import CONFIG_SUM
from experiments.tasks import TASKS, own_task
from experiments.tasks.source import own_source
from polca_edit.artifacts import checksum, from_plain, key_of, to_plain
from polca_edit.checkpoints.files import write_json

#: Beginnings of file names in a checkpoint folder that no result depends on.
BESIDE_THE_WEIGHTS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "events.out", ".")


def input_paths(config: RunConfig) -> list[Path]:
    """Files and folders that a config names."""
    given = config.checkpoints
    named = [
        config.model.path if config.model.kind == "huggingface" else None,
        given.directory if given else None,
        given.reference if given else None,
    ]
    if config.task == "text":
        named += [config.text.file, config.text.probe]
    return [Path(name) for name in named if name is not None]


def task_source(task: str) -> str:
    """SHA-256 of the code that makes the task's data and loss.

    Raises:
        ValueError: for a file of the user's own that is missing.
    """
    own = own_task(task)
    name = "tasks.own" if own is not None else TASKS[task].module
    found = importlib.util.find_spec(f"experiments.{name}")
    assert found is not None
    assert found.origin is not None
    code = checksum(Path(found.origin))
    return code if own is None else key_of(code, own_source(own.file))


def files_of(path: Path) -> Iterator[Path]:
    """The file itself, or every file of a folder that a result may depend on, in order.

    Run directories inside the folder are left out: what a run writes must not make it another one.
    """
    if path.is_dir():
        members = sorted(path.rglob("*"))
        runs = {member.parent for member in members if member.name == CONFIG_SUM}
        for member in members:
            inside = member.relative_to(path).parts
            beside = any(part.startswith(BESIDE_THE_WEIGHTS) for part in inside)
            if member.is_file() and not beside and runs.isdisjoint(member.parents):
                yield member
    elif path.exists():
        yield path


class Contents:
    """Hashes of files, kept in one list so that a large file is read once.

    Args:
        index: the list; None keeps nothing.
    """

    def __init__(self, index: Path | None = None) -> None:
        self._index = index
        self._known: dict[str, tuple[list[int], str]] = {}
        self._changed = False
        if index is not None and index.exists():
            try:
                self._known = from_plain(dict[str, tuple[list[int], str]], json.loads(index.read_text()))
            except ValueError:
                self._known = {}

    def of(self, path: Path) -> str:
        """Hash of a file's bytes, or of all names and bytes in a folder; of nothing if it is missing."""
        members = [(str(p.relative_to(path)) if p != path else "", self._file(p)) for p in files_of(path)]
        return key_of(members)

    def of_config(self, config: RunConfig) -> str:
        """Hash of every file a config names and of its task's source."""
        return key_of(task_source(config.task), [self.of(path) for path in input_paths(config)])

    def save(self) -> None:
        """Write the list down if it has grown."""
        if self._index is not None and self._changed:
            write_json(self._index, to_plain(self._known))
            self._changed = False

    def _file(self, path: Path) -> str:
        real, state = str(path.resolve()), path.stat()
        marks = [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        noted = self._known.get(real)
        if noted is None or noted[0] != marks:
            noted = self._known[real] = marks, checksum(path)
            self._changed = True
        return noted[1]
