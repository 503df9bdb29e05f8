"""How long calls show that they go on: a bar on a terminal, now and then a line anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sized
from typing import Any, TypeVar, cast

from tqdm import tqdm

Item = TypeVar("Item")
#: Seconds before anything is shown, and between two lines where there is no terminal.
PATIENCE, LINES_EVERY = 2.0, 20.0


class _Lines:
    """A stream for logs: each state of a bar as a line of its own, an erased bar as none."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        said = text.replace("\r", "").rstrip()
        return int(self.stream.write(f"  {said}\n")) if said else 0

    def flush(self) -> None:
        self.stream.flush()


def progress(
    items: Iterable[Item] | None, task: str, *, total: int | None = None, initial: int = 0, unit: str = "it"
) -> tqdm[Item]:
    """The items, with a bar of them on standard error once two seconds have gone by.

    Where standard error is no terminal, a line every twenty seconds takes the bar's place, so that a log
    shows that the work goes on. Without items it is a bar that is moved by hand (``update``, ``close``).

    >>> list(progress(range(3), "counting"))
    [0, 1, 2]

    Args:
        items: what is worked through, or None.
        task: what is done, a word or two.
        total: how many there are, where ``items`` does not say.
        initial: how many were done before.
        unit: of one item.
    """
    terminal = sys.stderr.isatty()
    kind: dict[str, Any] = {"mininterval": 0.1, "delay": PATIENCE}
    if not terminal:
        kind = {
            "mininterval": LINES_EVERY,
            "maxinterval": LINES_EVERY,
            "delay": LINES_EVERY,
            "miniters": 1,
            "file": _Lines(sys.stderr),
            "bar_format": "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left",
        }
        if total is None and not isinstance(items, Sized):
            kind["bar_format"] = "{desc}: {n_fmt}, {elapsed} gone"
    bar = tqdm(items, desc=task, total=total, initial=initial, unit=unit, leave=False, **kind)
    return cast("tqdm[Item]", bar)
