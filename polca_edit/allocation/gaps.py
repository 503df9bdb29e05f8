"""Where checkpoints are too far apart: the quadrature error of intervals, and the few that hold most of it.

Exact change minus the trapezoid along the straight line between two checkpoints, as
:attr:`polca_edit.allocation.allocate.Allocation.quadrature_error` has it; it is the same for every basis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polca_edit.allocation.progress import progress
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet

#: Two checkpoints by index, the earlier first.
Interval = tuple[int, int]


@dataclass(frozen=True)
class IntervalErrors:
    """Exact change and quadrature error of intervals between any two checkpoints.

    Attributes:
        exact: interval -> (M,) loss change of each token, nats.
        error: interval -> (M,) exact change minus the trapezoid, nats.
    """

    exact: dict[Interval, Tensor]
    error: dict[Interval, Tensor]

    def of(self, chosen: Sequence[int]) -> SeriesError:
        """The error of a series made of these checkpoints, whose intervals were measured."""
        pairs = list(zip(chosen, chosen[1:], strict=False))
        exact = torch.stack([self.exact[pair] for pair in pairs]).double().sum(0)
        error = torch.stack([self.error[pair] for pair in pairs]).double().sum(0)
        change = float(exact.mean())
        return SeriesError(
            len(chosen),
            change,
            float(error.mean()) / change if change else float("nan"),
            float(error.abs().mean() / exact.abs().mean().clamp_min(1e-300)),
        )


@dataclass(frozen=True)
class SeriesError:
    """How well a series of checkpoints accounts for the loss change of the whole training.

    Attributes:
        checkpoints: T.
        change: mean exact change, nats per token.
        total: mean quadrature error over the mean change; tokens may cancel.
        per_token: mean size of a token's error over the mean size of its change.
    """

    checkpoints: int
    change: float
    total: float
    per_token: float


def interval_errors(
    objective: Objective, checkpoints: Checkpoints, intervals: Iterable[Interval], tokens: TokenSet
) -> IntervalErrors:
    """Measure intervals; every checkpoint is passed once, with all intervals that begin or end at it.

    Args:
        objective: the token loss.
        checkpoints: the dense series.
        intervals: pairs of its indices, the earlier first.
        tokens: where losses are taken.

    Raises:
        ValueError: for a pair that is not in order.
    """
    wanted = sorted(set(intervals))
    wrong = next((pair for pair in wanted if not 0 <= pair[0] < pair[1] < len(checkpoints)), None)
    if wrong is not None:
        raise ValueError(f"an interval must be two indices of the series in order, got {wrong}; swap them")
    partners: dict[int, list[int]] = {}
    for start, end in wanted:
        partners.setdefault(start, []).append(end)
        partners.setdefault(end, []).append(start)
    losses: dict[int, Tensor] = {}
    slopes: dict[Interval, Tensor] = {}
    for node in progress(sorted(partners), "quadrature errors", total=len(partners)):
        theta = checkpoints[node]
        rows = torch.stack([checkpoints[other] - theta for other in partners[node]])
        losses[node], found = objective.directional(theta, rows, tokens, expected=2 * len(wanted))
        slopes.update(((node, other), slope) for other, slope in zip(partners[node], found, strict=True))
    exact = {(a, b): losses[b] - losses[a] for a, b in wanted}
    # The derivative at the end was taken along the way back, hence its sign.
    error = {(a, b): exact[a, b] - (slopes[a, b] - slopes[b, a]) / 2 for a, b in wanted}
    return IntervalErrors(exact, error)


@dataclass(frozen=True)
class SparseInterval:
    """An interval over which a series has too few checkpoints.

    Attributes:
        start: optimiser step.
        end: optimiser step.
        error: mean size of a token's quadrature error over it, nats.
        share: of the sum of these over all intervals.
    """

    start: int
    end: int
    error: float
    share: float

    def __str__(self) -> str:
        return f"{self.start}-{self.end}"


def sparse_intervals(
    steps: Sequence[int], error: Float[Tensor, "Tm1 M"], cover: float = 0.5
) -> tuple[SparseInterval, ...]:
    """The fewest intervals that hold a share of the error, largest first.

    >>> error = torch.tensor([[0.1, -0.1], [0.6, -0.6], [0.3, 0.3]])
    >>> [(str(found), round(found.share, 2)) for found in sparse_intervals([0, 10, 20, 30], error)]
    [('10-20', 0.6)]

    Args:
        steps: (T,) optimiser steps.
        error: quadrature error of every interval and token, nats.
        cover: share they must hold together.

    Returns:
        Nothing where there is no error.

    Raises:
        ValueError: for another number of intervals than the steps have.
    """
    if len(error) != len(steps) - 1:
        raise ValueError(f"errors must have a row per interval, got {len(error)} for {len(steps)} steps")
    sizes = error.double().abs().mean(1)
    total = float(sizes.sum())
    found: list[SparseInterval] = []
    for index in torch.argsort(sizes, descending=True, stable=True).tolist():
        if total <= 0 or sum(own.share for own in found) >= cover - 1e-12:
            break
        size = float(sizes[index])
        found.append(SparseInterval(int(steps[index]), int(steps[index + 1]), size, size / total))
    return tuple(found)
