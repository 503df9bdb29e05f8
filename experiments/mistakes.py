"""Known mistakes that ``selftest --break NAME`` switches in, and the beds that must notice them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np


@dataclass(frozen=True)
class Mistake:
    """One wrong function in place of a right one.

    Attributes:
        words: what goes wrong.
        place: dotted name of the function that is replaced.
        wrong: makes the wrong function from the right one.
        beds: beds of which at least one check must fail.
    """

    words: str
    place: str
    wrong: Callable[[Callable[..., Any]], Callable[..., Any]]
    beds: tuple[str, ...]


def _gradient_only(right: Callable[..., Any]) -> Callable[..., Any]:
    del right
    return lambda hold, theta: theta


def _label_shuffle(right: Callable[..., Any]) -> Callable[..., Any]:
    del right
    from experiments import planted_softmax

    return planted_softmax.label_shuffle_null


def _by_subtraction(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(projections: Any, rule: Any = "trapezoid", **more: Any) -> Any:
        found = right(projections, rule, **more)
        return replace(found, residual=found.exact - found.values.sum(1))

    return wrong


def _flipped(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(theta: Any, reference: Any, rows: Any, dose: float, **more: Any) -> Any:
        return right(theta, reference, rows, -dose, **more)

    return wrong


def _uncapped(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(damage: Any, headroom: Any) -> Any:
        return np.asarray(damage / np.where(headroom > 0, headroom, np.nan), dtype=np.float64)

    del right
    return wrong


MISTAKES: dict[str, Mistake] = {
    "gradient_only_blocking": Mistake(
        "blocking takes the direction out of gradient and momentum but never puts the weights back",
        "interventions.blocking.Hold.put_back",
        _gradient_only,
        ("T10",),
    ),
    "label_shuffle_null": Mistake(
        "shuffled cluster labels are the primary null instead of the whole pipeline",
        "experiments.planted_softmax.primary_null",
        _label_shuffle,
        ("T7",),
    ),
    "residual_by_subtraction": Mistake(
        "the residual is what is left over, so no quadrature error can ever be seen",
        "polca_edit.allocation.allocate",
        _by_subtraction,
        ("T2",),
    ),
    "flipped_sign": Mistake(
        "undoing a movement moves on instead of back", "interventions.edits.reverse", _flipped, ("T10",)
    ),
    "uncapped_n": Mistake(
        "shares of headroom are not capped, so blowing a skill up scores better than removing it",
        "interventions.measures.capped_share",
        _uncapped,
        ("T10",),
    ),
}


@contextmanager
def switched_in(name: str | None) -> Iterator[None]:
    """Within the block the named mistake is made.

    Raises:
        ValueError: for an unknown name.
    """
    if name is None:
        yield
        return
    if name not in MISTAKES:
        raise ValueError(f"--break must be one of {sorted(MISTAKES)}, got '{name}'")
    mistake = MISTAKES[name]
    owner, _, attribute = mistake.place.rpartition(".")
    right = getattr(_resolve(owner), attribute)
    with patch(mistake.place, mistake.wrong(right)):
        yield


def _resolve(dotted: str) -> Any:
    import importlib

    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ValueError(f"'{dotted}' must name a module or a class in one")
