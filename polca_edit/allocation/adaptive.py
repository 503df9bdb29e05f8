"""Splitting intervals where the loss bends, until every group's change is accounted for.

The completeness error along an interval is the same for every basis, so one directional derivative
per node, along the whole displacement, decides where nodes go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polca_edit.allocation.quadrature import NodePlan, panel_weights
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet

#: Smallest tolerance in nats: below this a relative error means nothing.
FLOOR = 0.005


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


@dataclass(frozen=True)
class _Criteria:
    """What the errors of all panels together must stay within, nats.

    Attributes:
        masks: the mean over all tokens (``mean``) and every group that has a token.
        allowed: per mask, of the mean error.
        allowed_token: of the median token's error.
    """

    masks: dict[str, Tensor]
    allowed: dict[str, float]
    allowed_token: float

    @classmethod
    def of(
        cls,
        change: Float[Tensor, " M"],
        groups: Mapping[str, Bool[Tensor, " M"]],
        tolerance: float,
        floor: float,
    ) -> _Criteria:
        """From the exact change of every token over the run."""
        present = {name: mask for name, mask in groups.items() if bool(mask.any())}
        masks = {"mean": torch.ones(len(change), dtype=torch.bool), **present}
        allowed = {n: max(tolerance * abs(float(change[m].mean())), floor) for n, m in masks.items()}
        return cls(masks, allowed, max(tolerance * float(change.abs().median()), floor))

    def share(self, error: Float[Tensor, " M"]) -> list[float]:
        """How much of each allowance one panel's error takes, the median token's last."""
        own = [abs(float(error[mask].mean())) / self.allowed[name] for name, mask in self.masks.items()]
        return [*own, float(error.abs().median()) / self.allowed_token]

    def group_error(self, parts: Sequence[Tensor]) -> dict[str, tuple[float, float, float]]:
        """Group -> (error of the whole run, sum of panel error sizes, allowed), nats."""
        total = torch.stack(list(parts)).sum(0)
        return {
            name: (
                float(total[mask].mean()),
                float(sum(abs(float(part[mask].mean())) for part in parts)),
                self.allowed[name],
            )
            for name, mask in self.masks.items()
        }


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
    last = len(checkpoints) - 2
    change = path.at(last, 1.0)[0] - path.at(0, 0.0)[0]
    criteria = _Criteria.of(change, groups, tolerance, floor)
    panels = [_Panel(i, 0.0, 1.0, False, 0) for i in range(len(checkpoints) - 1)]
    errors = {panel: path.error(panel) for panel in panels}
    share = {panel: criteria.share(errors[panel]) for panel in panels}
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
                share[child] = criteria.share(errors[child])
    met = bool(totals.max() <= 1)
    deepest = [p for p in panels if p.depth >= max_depth and max(share[p]) > 1 / len(panels)]
    plan = _plan(panels, len(checkpoints) - 1)
    parts = [errors[panel] for panel in panels]
    report = QuadratureReport(
        met,
        tuple(int((plan.interval == i).sum()) for i in range(len(checkpoints) - 1)),
        () if met else tuple(sorted({p.interval for p in deepest})),
        criteria.group_error(parts),
        float(torch.stack(parts).sum(0).abs().median()),
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
