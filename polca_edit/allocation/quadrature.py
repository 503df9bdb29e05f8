"""Where along each interval derivatives are measured, and with which weights.

The path is the straight line between neighbouring checkpoints. All parts of an allocation along
one interval share its nodes, and their sum (every vector plus the residual direction) is the
derivative along the whole displacement. So the completeness error is the same for every basis:
:func:`adaptive_plan` needs one directional derivative per node to decide where nodes go, and
:func:`measure_nodes` then measures the rows of any number of bases there. A check on the sum cannot
see errors of single vectors that cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from polca_edit.allocation.allocate import Projections
from polca_edit.allocation.directions import with_remainders
from polca_edit.allocation.progress import progress
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet

FixedRule = Literal["trapezoid", "trapezoid2", "simpson", "simpson2", "gauss2", "gauss3", "gauss4", "gauss5"]


@dataclass(frozen=True)
class NodePlan:
    """Quadrature nodes of every interval on [0, 1].

    Attributes:
        interval: (I,) interval of each interior node.
        position: (I,) its place in (0, 1).
        weight: (I,) its weight.
        end_weights: (T-1, 2) weights of the interval's two ends.
    """

    interval: Int[Tensor, " I"]
    position: Float[Tensor, " I"]
    weight: Float[Tensor, " I"]
    end_weights: Float[Tensor, "Tm1 2"]

    @property
    def nodes(self) -> int:
        """Places at which derivatives are measured: interior nodes and the ends that carry weight."""
        carried = torch.cat([self.end_weights[:1, 0] != 0, (self.end_weights != 0).any(1)])
        return len(self.interval) + int(carried.sum())


def unit_rule(rule: FixedRule) -> tuple[tuple[float, float], list[tuple[float, float]]]:
    """End weights and interior (position, weight) pairs on [0, 1].

    Degrees of exactness: trapezoid 1, Simpson 3, Gauss-Legendre with n nodes 2n - 1. A trailing 2
    on trapezoid and simpson means two equal panels.

    >>> unit_rule("simpson")
    ((0.16666666666666666, 0.16666666666666666), [(0.5, 0.6666666666666666)])
    """
    if rule.startswith("gauss"):
        places, weights = np.polynomial.legendre.leggauss(int(rule.removeprefix("gauss")))
        return (0.0, 0.0), [(float(p + 1) / 2, float(w) / 2) for p, w in zip(places, weights, strict=True)]
    panels = {
        "trapezoid": [(0.0, 1.0, False)],
        "trapezoid2": [(0.0, 0.5, False), (0.5, 1.0, False)],
        "simpson": [(0.0, 1.0, True)],
        "simpson2": [(0.0, 0.5, True), (0.5, 1.0, True)],
    }[rule]
    weights_at: dict[float, float] = {}
    for low, high, middle in panels:
        for place, weight in panel_weights(low, high, middle):
            weights_at[place] = weights_at.get(place, 0.0) + weight
    inner = [(p, w) for p, w in sorted(weights_at.items()) if 0 < p < 1]
    return (weights_at[0.0], weights_at[1.0]), inner


def panel_weights(low: float, high: float, middle: bool) -> list[tuple[float, float]]:
    """(position, weight) of one panel: Simpson where the middle is measured, else trapezoid."""
    width = high - low
    if middle:
        return [(low, width / 6), ((low + high) / 2, 4 * width / 6), (high, width / 6)]
    return [(low, width / 2), (high, width / 2)]


def fixed_plan(rule: FixedRule, intervals: int) -> NodePlan:
    """The same rule on every interval."""
    ends, inner = unit_rule(rule)
    count = len(inner)
    return NodePlan(
        torch.arange(intervals).repeat_interleave(count),
        torch.tensor([p for p, _ in inner], dtype=torch.float64).repeat(intervals),
        torch.tensor([w for _, w in inner], dtype=torch.float64).repeat(intervals),
        torch.tensor(ends, dtype=torch.float64).expand(intervals, 2).clone(),
    )


# -- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeSlopes:
    """Derivatives at one interior node, for several bases at once.

    Attributes:
        gradients: per basis (K, M).
        residuals: per basis (M,) derivative along what the basis leaves of the interval.
    """

    gradients: tuple[Float[Tensor, "_ M"], ...]
    residuals: tuple[Float[Tensor, " M"], ...]


def measure_nodes(
    objective: Objective,
    checkpoints: Checkpoints,
    bases: Sequence[Basis],
    tokens: TokenSet,
    plan: NodePlan,
    projections: Sequence[Projections],
    *,
    mapped: Callable[[Callable[[int], NodeSlopes], Sequence[int]], Iterable[NodeSlopes]] = map,
) -> list[Projections]:
    """Projections of each basis with the plan's interior nodes filled in (rule ``quadrature``).

    Args:
        objective: the token loss.
        checkpoints: the series the projections were taken on.
        bases: in the order of ``projections``; they share every forward pass.
        tokens: the token set of the projections.
        plan: nodes and weights.
        projections: derivatives at the checkpoints themselves.
        mapped: runs the nodes; pass a caching map to resume.
    """
    planned = sum(len(basis) + 1 for basis in bases) * (len(plan.interval) + len(checkpoints))

    def at(node: int) -> NodeSlopes:
        interval, place = int(plan.interval[node]), float(plan.position[node])
        start = checkpoints[interval]
        moved = checkpoints[interval + 1] - start
        rows = with_remainders(bases, moved)
        _, slopes = objective.directional(start + place * moved, rows, tokens, expected=planned)
        blocks = slopes.split([len(basis) + 1 for basis in bases])
        return NodeSlopes(tuple(block[:-1] for block in blocks), tuple(block[-1] for block in blocks))

    count = len(plan.interval)
    found = list(progress(mapped(at, range(count)), "interior nodes", total=count))
    return [
        with_nodes(own, plan, [n.gradients[number] for n in found], [n.residuals[number] for n in found])
        for number, own in enumerate(projections)
    ]


def with_nodes(
    projections: Projections, plan: NodePlan, gradients: Sequence[Tensor], residuals: Sequence[Tensor]
) -> Projections:
    """The record with interior nodes: one (K, M) block and one (M,) residual derivative per node."""
    p, like = projections, projections.losses
    vectors, tokens = p.gradients.shape[1:]
    return replace(
        p,
        interior_interval=plan.interval,
        interior_position=plan.position.to(like),
        interior_weight=plan.weight.to(like),
        end_weights=plan.end_weights.to(like),
        interior_gradients=torch.stack(list(gradients)) if gradients else like.new_zeros(0, vectors, tokens),
        interior_residual=torch.stack(list(residuals)) if residuals else like.new_zeros(0, tokens),
    )
