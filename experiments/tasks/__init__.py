"""What a run is about: model, data, loss and groups of tokens.

A config names its task. To add one that ships with the package, write a module with
``build(config, tokenizer=None) -> Task`` (:class:`experiments.tasks.task.Task`) and add a line to
:data:`TASKS`; it may read ``config.options``, a free mapping that is part of every key. A task that does
not ship is named ``FILE.py:FUNCTION`` (:mod:`experiments.tasks.own`). Nothing is imported here, so that a
config can be read without a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shipped:
    """A task that comes with the package.

    Attributes:
        module: under ``experiments``, with a function ``build(config, tokenizer)``.
        about: what the model learns, for the first line of a report.
    """

    module: str
    about: str


TASKS: dict[str, Shipped] = {
    "arithmetic": Shipped(
        "tasks.arithmetic", "adding two three-digit numbers (the four digits of the answer are scored)"
    ),
    "text": Shipped("tasks.text", "predicting the next token of a text"),
}


@dataclass(frozen=True)
class OwnTask:
    """Where a task of the user's own is made: a Python file and a function in it."""

    file: Path
    function: str

    @property
    def name(self) -> str:
        """What it is called in summaries and reports; no path is in it.

        >>> OwnTask(Path("/a/wraps.py"), "build").name
        'wraps:build'
        """
        return f"{self.file.stem}:{self.function}"


def own_task(task: str) -> OwnTask | None:
    """The file and function that a task's name points at, None for a name of :data:`TASKS`.

    >>> own_task("wraps.py").function, own_task("wraps.py:make").function, own_task("text")
    ('build', 'make', None)

    Raises:
        ValueError: for a name that is neither.
    """
    file, _, function = task.partition(".py:")
    if file != task or task.endswith(".py"):
        own = OwnTask(Path(f"{file.removesuffix('.py')}.py"), function or "build")
        if own.function.isidentifier():
            return own
    if task in TASKS:
        return None
    raise ValueError(f"a task must be one of {sorted(TASKS)} or FILE.py:FUNCTION, got '{task}'")


def resolved(task: str) -> str:
    """A task's name with the absolute path of its file, so that a run finds it from any folder."""
    own = own_task(task)
    return task if own is None else f"{own.file.expanduser().absolute()}:{own.function}"
