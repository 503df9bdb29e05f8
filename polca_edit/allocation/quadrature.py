"""Where along each interval derivatives are measured, and with which weights.

The path is the straight line between neighbouring checkpoints. All parts of an allocation along
one interval share its nodes, and their sum (every vector plus the residual direction) is the
derivative along the whole displacement. So the completeness error is the same for every basis:
:func:`adaptive_plan` needs one directional derivative per node to decide where nodes go, and
:func:`measure_nodes` then measures the rows of any number of bases there. A check on the sum cannot
see errors of single vectors that cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polca_edit.allocation.allocate import Allocation, Projections, residual_direction
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet

FixedRule = Literal["trapezoid", "trapezoid2", "simpson", "simpson2", "gauss2", "gauss3", "gauss4", "gauss5"]
#: Smallest tolerance in nats: below this a relative error means nothing.
FLOOR = 0.005


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


# -- adaptive splitting ---------------------------------------------------------------------------


@dataclass(frozen=True)
class QuadratureReport:
    """What adaptive splitting reached.

    Attributes:
        met: every group and the mean are within tolerance, summing error sizes (no cancelling).
        nodes: (T-1,) interior nodes of each interval.
        unresolved: intervals whose own error still exceeds their share at the deepest split.
        group_error: group -> (error of the whole run, sum of error sizes, allowed), nats.
        median_token_error: median over tokens of the whole run's error size, nats.
        evaluations: places at which the derivative along the path was measured.
    """

    met: bool
    nodes: tuple[int, ...]
    unresolved: tuple[int, ...]
    group_error: dict[str, tuple[float, float, float]]
    median_token_error: float
    evaluations: int


@dataclass(frozen=True)
class _Panel:
    interval: int
    low: float
    high: float
    middle: bool
    depth: int


class _PathDerivatives:
    """Losses and derivatives along the whole displacement, measured once per place."""

    def __init__(self, objective: Objective, checkpoints: Checkpoints, tokens: TokenSet) -> None:
        self.objective, self.checkpoints, self.tokens = objective, checkpoints, tokens
        self.known: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}

    def at(self, interval: int, place: float) -> tuple[Tensor, Tensor]:
        key = (interval, place)
        if key not in self.known:
            start = self.checkpoints[interval]
            moved = self.checkpoints[interval + 1] - start
            theta = start + place * moved
            losses, slopes = self.objective.directional(theta, moved[None], self.tokens)
            self.known[key] = (losses.double(), slopes[0].double())
        return self.known[key]

    def error(self, panel: _Panel) -> Tensor:
        """(M,) exact change over the panel minus its quadrature."""
        exact = self.at(panel.interval, panel.high)[0] - self.at(panel.interval, panel.low)[0]
        parts = panel_weights(panel.low, panel.high, panel.middle)
        return exact - torch.stack([self.at(panel.interval, p)[1] * w for p, w in parts]).sum(0)


def adaptive_plan(
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    groups: Mapping[str, Bool[Tensor, " M"]],
    *,
    tolerance: float = 0.01,
    floor: float = FLOOR,
    max_depth: int = 4,
) -> tuple[NodePlan, QuadratureReport]:
    """Split intervals until the completeness error is under a tolerance in every group.

    Every panel starts as a trapezoid, gets its middle (Simpson) when its error is too large, and
    is then halved. The sum over panels of |error| in each group and in the mean over all tokens,
    and the sum of the median token's |error|, must stay within ``max(tolerance * |exact|, floor)``;
    the panels with the largest share go first.

    Args:
        objective: the token loss.
        checkpoints: the series.
        tokens: where the allocation is taken.
        groups: skill groups or clusters.
        tolerance: relative to each group's exact change over the run.
        floor: smallest allowed error, nats.
        max_depth: refinements of one panel at most.
    """
    path = _PathDerivatives(objective, checkpoints, tokens)
    present = {name: mask for name, mask in groups.items() if bool(mask.any())}
    masks = {"mean": torch.ones(tokens.count, dtype=torch.bool), **present}
    panels = [_Panel(i, 0.0, 1.0, False, 0) for i in range(len(checkpoints) - 1)]
    last = len(checkpoints) - 2
    change = path.at(last, 1.0)[0] - path.at(0, 0.0)[0]
    allowed = {n: max(tolerance * abs(float(change[m].mean())), floor) for n, m in masks.items()}
    allowed_token = max(tolerance * float(change.abs().median()), floor)
    errors = {panel: path.error(panel) for panel in panels}

    def sizes(panel: _Panel) -> list[float]:
        error = errors[panel]
        own = [abs(float(error[m].mean())) / allowed[n] for n, m in masks.items()]
        return [*own, float(error.abs().median()) / allowed_token]

    share = {panel: sizes(panel) for panel in panels}
    while True:
        totals = np.sum([share[p] for p in panels], axis=0)
        open_panels = [p for p in panels if p.depth < max_depth]
        if totals.max() <= 1 or not open_panels:
            break
        for panel in _worst(open_panels, share, totals):
            panels.remove(panel)
            for child in _refined(panel):
                panels.append(child)
                errors[child] = path.error(child)
                share[child] = sizes(child)
    met = bool(totals.max() <= 1)
    deepest = [p for p in panels if p.depth >= max_depth and max(share[p]) > 1 / len(panels)]
    total_error = torch.stack([errors[p] for p in panels]).sum(0)
    plan = _plan(panels, len(checkpoints) - 1)
    report = QuadratureReport(
        met,
        tuple(int((plan.interval == i).sum()) for i in range(len(checkpoints) - 1)),
        () if met else tuple(sorted({p.interval for p in deepest})),
        {
            name: (
                float(total_error[mask].mean()),
                float(sum(abs(float(errors[p][mask].mean())) for p in panels)),
                allowed[name],
            )
            for name, mask in masks.items()
        },
        float(total_error.abs().median()),
        len(path.known),
    )
    return plan, report


def _refined(panel: _Panel) -> list[_Panel]:
    """A trapezoid gets its middle; a Simpson panel is halved."""
    if not panel.middle:
        return [replace(panel, middle=True, depth=panel.depth + 1)]
    middle = (panel.low + panel.high) / 2
    return [
        _Panel(panel.interval, panel.low, middle, True, panel.depth + 1),
        _Panel(panel.interval, middle, panel.high, True, panel.depth + 1),
    ]


def _worst(panels: Sequence[_Panel], share: Mapping[_Panel, list[float]], totals: np.ndarray) -> list[_Panel]:
    """Panels to refine now: the fewest that leave every criterion at half its allowance."""
    order = sorted(panels, key=lambda p: -max(share[p]))
    left = totals.copy()
    chosen: list[_Panel] = []
    for panel in order:
        if chosen and left.max() <= 0.5:
            break
        chosen.append(panel)
        left = left - np.array(share[panel])
    return chosen


def _plan(panels: Sequence[_Panel], intervals: int) -> NodePlan:
    weights: dict[tuple[int, float], float] = {}
    for panel in panels:
        for place, weight in panel_weights(panel.low, panel.high, panel.middle):
            key = (panel.interval, place)
            weights[key] = weights.get(key, 0.0) + weight
    inner = sorted(key for key in weights if 0 < key[1] < 1)
    ends = [[weights[(i, 0.0)], weights[(i, 1.0)]] for i in range(intervals)]
    return NodePlan(
        torch.tensor([i for i, _ in inner], dtype=torch.long),
        torch.tensor([p for _, p in inner], dtype=torch.float64),
        torch.tensor([weights[key] for key in inner], dtype=torch.float64),
        torch.tensor(ends, dtype=torch.float64),
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
        rows = [torch.cat([basis.rows, residual_direction(basis, moved)[None]]) for basis in bases]
        _, slopes = objective.directional(start + place * moved, torch.cat(rows), tokens, expected=planned)
        blocks = slopes.split([len(r) for r in rows])
        return NodeSlopes(tuple(block[:-1] for block in blocks), tuple(block[-1] for block in blocks))

    found = list(mapped(at, range(len(plan.interval))))
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


@dataclass(frozen=True)
class PathDifference:
    """Straight lines between coarse checkpoints against the recorded path between them.

    Attributes:
        steps: coarse steps.
        attributed: (T-1,) mean attribution along the straight line minus along the finer path, nats.
        per_vector: (K,) the same, summed over the run for each vector.
        residual: mean residual of the line minus that of the path, whole run.
    """

    steps: tuple[int, ...]
    attributed: Float[Tensor, " Tm1"]
    per_vector: Float[Tensor, " K"]
    residual: float


def path_difference(straight: Allocation, finer: Allocation) -> PathDifference:
    """What the straight-line assumption changes, from the same basis on a coarse and a finer series.

    Raises:
        ValueError: if the finer series lacks one of the coarse steps.
    """
    coarse, fine = straight.steps.tolist(), finer.steps.tolist()
    missing = [step for step in coarse if step not in fine]
    if missing:
        raise ValueError(f"the finer series must hold every coarse step, {missing[:5]} are missing")
    places = torch.tensor([fine.index(step) for step in coarse])
    running = finer.projected_loss().double().mean(2)
    along = running[places].diff(dim=0)
    gap = straight.values.double().mean(2) - along
    inside = slice(int(places[0]), int(places[-1]))
    residual = straight.residual.double().sum(0).mean() - finer.residual[inside].double().sum(0).mean()
    return PathDifference(tuple(coarse), gap.sum(1), gap.sum(0), float(residual))
