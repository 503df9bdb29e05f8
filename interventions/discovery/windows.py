"""Windows of training, and the ones in which a group of tokens was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from interventions.causal.statistics import Array

#: Kinds of window that no loss went into.
EQUAL, DOUBLING = "equal", "doubling"
#: A group's window runs from the first to the second share of its fall that is still to come.
FALLS = (0.9, 0.15)


@dataclass(frozen=True)
class Window:
    """A stretch of training between two recorded steps.

    Attributes:
        start: optimiser step.
        end: optimiser step, later than ``start``.
        kind: ``equal``, ``doubling``, or the name of the group whose fall proposed it.
    """

    start: int
    end: int
    kind: str = EQUAL

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


def equal_windows(steps: Sequence[int], count: int) -> list[Window]:
    """All recorded intervals merged to about ``count`` pieces of equally many checkpoints.

    >>> [str(window) for window in equal_windows([0, 10, 20, 30, 40], 2)]
    ['0:20', '20:40']
    """
    last = len(steps) - 1
    cuts = sorted({round(i * last / count) for i in range(count + 1)})
    return [Window(steps[a], steps[b], EQUAL) for a, b in zip(cuts, cuts[1:], strict=False)]


def doubling_windows(steps: Sequence[int]) -> list[Window]:
    """Windows of 1, 1, 2, 4, 8 ... intervals, one after the other: early training seen closely.

    >>> [str(window) for window in doubling_windows([0, 10, 20, 30, 40, 50])]
    ['0:10', '10:20', '20:40', '40:50']
    """
    cuts, last = [0, 1], len(steps) - 1
    while cuts[-1] < last:
        cuts.append(min(2 * cuts[-1], last))
    return [Window(steps[a], steps[b], DOUBLING) for a, b in zip(cuts, cuts[1:], strict=False)]


def reached(curve: Array, share: float) -> int | None:
    """First index at which at most this share of the curve's fall is still to come; None without a fall.

    >>> reached(np.array([4.0, 3.0, 1.0, 0.0]), 0.5)
    2
    """
    fall = float(curve[0] - curve[-1])
    if not fall > 0:
        return None
    return int(np.flatnonzero(curve <= curve[-1] + share * fall)[0])


def learned_at(steps: Sequence[int], curve: Array) -> int | None:
    """Step at which half of a group's fall is done; None where its loss does not fall."""
    index = reached(curve, 0.5)
    return None if index is None else int(steps[index])


def proposed_windows(
    steps: Sequence[int], curves: Mapping[str, Array], falls: tuple[float, float] = FALLS
) -> dict[str, Window]:
    """The window in which each group's loss falls.

    Args:
        steps: (T,) optimiser steps of the curves.
        curves: group -> (T,) mean loss, nats.
        falls: shares of the fall still to come at the window's start and end.

    Returns:
        Group -> window; groups whose loss does not fall are left out.

    >>> found = proposed_windows([0, 10, 20, 30, 40], {"late": np.array([2.0, 2.0, 2.0, 0.1, 0.0])})
    >>> str(found["late"])
    '20:30'
    """
    found = {}
    for name, curve in curves.items():
        first, last = reached(curve, falls[0]), reached(curve, falls[1])
        if first is None or last is None:
            continue
        start = max(0, first - 1)
        found[name] = Window(int(steps[start]), int(steps[max(last, start + 1)]), name)
    return found
