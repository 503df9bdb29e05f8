"""Training again with a direction held still (O5), its shams, and the delay and gap that follow.

Projecting the gradient alone does not hold a coordinate under Adam or weight decay, so the
parameters are put back after every optimiser step. The first moment of a *direction* is left alone:
projecting it puts a little of it on parameters that never had a gradient (positions no input uses), which
Adam divides by a second moment of zero and so throws far away. Masked coordinates are cleared one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interventions.causal.statistics import Array, Interval, t_interval
from interventions.edits import Edit
from polca_edit.checkpoints.files import SeriesFolder, read_weights
from polca_edit.derivatives.lanczos import coordinates, lengths
from polca_edit.parameters import ParameterSpace, parameter_slots
from polca_edit.training import TrainingSettings, TrainingSpan, train

#: Share of the window below which a delay counts as none.
DELAY_MARGIN = 0.1


@dataclass
class Hold:
    """Keeps directions, or whole coordinates, where they were; pass it as ``after_step``.

    Attributes:
        space: flat order of the module's parameters.
        anchor: (N,) weights at the start of the window, theta_t1.
        rows: (k, N) orthonormal directions to hold, or None.
        mask: (N,) coordinates to hold, or None.
        first: first step that is held.
        last: last step that is held; None: to the end.
        drift: largest |<b, theta_t - theta_t1>| after each held step, weight units.
        scale: largest weight norm seen, to judge the drift by.
    """

    space: ParameterSpace
    anchor: Float[Tensor, " N"]
    rows: Float[Tensor, "k N"] | None = None
    mask: Bool[Tensor, " N"] | None = None
    first: int = 1
    last: int | None = None
    drift: list[float] = field(default_factory=list)
    scale: float = 0.0

    def __post_init__(self) -> None:
        if (self.rows is None) == (self.mask is None):
            raise ValueError(
                "a block holds either directions or coordinates; give rows or a mask, not both or neither"
            )

    def __call__(self, step: int, module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Put the held part back; masked coordinates are taken out of the first moment too."""
        if step < self.first or (self.last is not None and step > self.last):
            return
        theta = self.space.read(module)
        held = self.put_back(theta)
        self.space.write(module, held)
        if self.mask is not None:
            self.clear_momentum(module, optimiser, self.mask)
        self.drift.append(self.moved(self.space.read(module)))
        self.scale = max(self.scale, float(lengths(held[None])))

    def put_back(self, theta: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Weights theta - P (theta - anchor), exact on masked coordinates."""
        if self.mask is not None:
            return torch.where(self.mask.to(theta.device), self.anchor.to(theta), theta)
        assert self.rows is not None
        # Once more on what rounding left: the second pass removes what the weights' type can hold.
        for _ in range(2):
            theta = theta - coordinates(self.rows, theta - self.anchor.to(theta)).to(theta) @ self.rows.to(
                theta
            )
        return theta

    def moved(self, theta: Float[Tensor, " N"]) -> float:
        """Largest held coordinate's distance from the anchor."""
        away = theta - self.anchor.to(theta)
        if self.mask is not None:
            return float(away[self.mask.to(away.device)].abs().max())
        assert self.rows is not None
        return float(coordinates(self.rows, away).abs().max())

    def clear_momentum(
        self, module: nn.Module, optimiser: torch.optim.Optimizer, mask: Bool[Tensor, " N"]
    ) -> None:
        """First moment zero on masked coordinates."""
        parameters = dict(parameter_slots(module))
        for name, own in self.space.unflatten(mask).items():
            state = optimiser.state[parameters[name]]
            moment = state.get("exp_avg", state.get("momentum_buffer"))
            if moment is not None:
                moment.masked_fill_(own.to(moment.device), 0.0)

    @property
    def held(self) -> bool:
        """Whether the coordinates stayed put: drift at most 1e-6 of the weight norm at every step."""
        return bool(self.drift) and max(self.drift) <= 1e-6 * max(self.scale, 1e-30)


@dataclass(frozen=True)
class BranchPoint:
    """Weights and optimiser state after ``step`` steps of a recorded run."""

    step: int
    theta: Tensor
    optimiser_state: dict[str, Tensor]


def open_branch_point(folder: SeriesFolder, space: ParameterSpace, step: int | None = None) -> BranchPoint:
    """The recorded state to branch from; the latest one at or before ``step`` (the first one if None).

    Raises:
        ValueError: for a run without optimiser state, which cannot be branched.
    """
    known = folder.state_steps()
    if not known:
        raise ValueError(
            f"blocking needs optimiser state, '{folder.directory}' has none; record the run with state_every"
        )
    usable = [s for s in known if step is None or s <= step]
    if not usable:
        raise ValueError(
            f"blocking from step {step} needs a state at or before it, the first is at {known[0]}"
        )
    chosen = usable[-1] if step is not None else usable[0]
    return BranchPoint(
        chosen, space.flatten(read_weights(folder.weights(chosen))), read_weights(folder.state(chosen))
    )


def edited(point: BranchPoint, edit: Edit) -> BranchPoint:
    """The branch point with edited weights and its optimiser state as recorded (O3c, O5'')."""
    return replace(point, theta=edit.apply(point.theta))


@dataclass(frozen=True)
class BlockingResult:
    """Training with the direction held still, against shams (O5).

    Attributes:
        delay: later half-fall of the target than in the free arm and beyond shams, share of the window.
        gap: target's final loss beyond shams, nats.
        within_margin: whether both are shown to be negligible.
        others_equivalent: whether every other group's final loss stays within the margin.
        held: whether the coordinates were still.
    """

    delay: Interval
    gap: Interval
    within_margin: bool
    others_equivalent: bool
    held: bool


@dataclass(frozen=True)
class Curve:
    """Loss per group over the steps of one arm.

    Attributes:
        arm: name: ``none``, ``block``, ``sham`` ...
        branch: data-order seed.
        steps: (n,) optimiser steps.
        losses: group -> (n,) mean loss, nats per token.
        held: whether the block held (true for the free arm).
    """

    arm: str
    branch: int
    steps: tuple[int, ...]
    losses: Mapping[str, Array]
    held: bool


@dataclass(frozen=True)
class Retraining:
    """What every arm of a recorded run trains with, and how it is measured.

    Attributes:
        space: recorded parameters.
        batch_loss: loss of a step's batch, which decides the data order.
        settings: optimisation of the run.
        measure: mean loss per group of a module, nats per token.
        every: steps between measurements.
    """

    space: ParameterSpace
    batch_loss: Callable[[nn.Module, int], Tensor]
    settings: TrainingSettings
    measure: Callable[[nn.Module], Mapping[str, float]]
    every: int = 10


def run_arm(
    module: nn.Module,
    run: Retraining,
    start: BranchPoint,
    stop: int,
    *,
    arm: str,
    branch: int = 0,
    hold: Hold | None = None,
) -> Curve:
    """Train one arm from a branch point.

    Args:
        module: any weights; the branch point's are written into it.
        run: data and optimisation of the recorded run.
        start: where to branch.
        stop: last step.
        arm: name.
        branch: data-order seed, for the record.
        hold: what is held, None for the free arm.
    """
    run.space.write(module, start.theta)
    steps, found = [start.step], [dict(run.measure(module))]

    def after(step: int, trained: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        if hold is not None:
            hold(step, trained, optimiser)
        if (step - start.step) % run.every == 0 or step == stop:
            trained.eval()
            steps.append(step)
            found.append(dict(run.measure(trained)))
            trained.train()

    span = TrainingSpan(start.step, stop, start.optimiser_state)
    train(module, run.batch_loss, run.settings, span=span, after_step=after)
    losses = {name: np.array([values[name] for values in found]) for name in found[0]}
    return Curve(arm, branch, tuple(steps), losses, hold is None or hold.held)


def delay(blocked: Curve, free: Curve, group: str, share: float = 0.5) -> tuple[float, bool]:
    """Steps later than the free arm reaches ``share`` of its fall; (restricted delay, censored).

    A blocked arm that never gets there is censored at the end of the window.
    """
    path = free.losses[group]
    level = path[0] - share * (path[0] - path[-1])
    reached = np.flatnonzero(path <= level)
    own = np.flatnonzero(blocked.losses[group] <= level)
    at = free.steps[int(reached[0])] if len(reached) else free.steps[-1]
    late = blocked.steps[int(own[0])] if len(own) else blocked.steps[-1]
    return float(late - at), len(own) == 0


def compare_arms(
    free: Sequence[Curve],
    blocked: Sequence[Curve],
    shams: Sequence[Sequence[Curve]],
    target: str,
    others: Sequence[str],
    *,
    margin: float,
) -> BlockingResult:
    """Delay and final gap of the target beyond its shams, and whether other groups stay put.

    Branches are paired: arm b of branch i is compared with the free arm and shams of branch i.
    Delays are restricted to the window (RMST difference), in shares of the window; intervals are t
    intervals over branches.

    Args:
        free: unblocked arm per branch.
        blocked: blocked arm per branch.
        shams: sham arms per branch.
        target: group of the skill.
        others: off-target groups.
        margin: equivalence margin for the others' final loss, nats.
    """
    window = free[0].steps[-1] - free[0].steps[0]
    delays: list[float] = []
    gaps: list[float] = []
    moved: list[float] = []
    for base, arm, sham in zip(free, blocked, shams, strict=True):
        sham_delay = [delay(s, base, target)[0] for s in sham] or [0.0]
        sham_gap = [float(s.losses[target][-1] - base.losses[target][-1]) for s in sham] or [0.0]
        delays.append((delay(arm, base, target)[0] - float(np.mean(sham_delay))) / window)
        gaps.append(float(arm.losses[target][-1] - base.losses[target][-1]) - float(np.mean(sham_gap)))
        moved.extend(float(arm.losses[o][-1] - base.losses[o][-1]) for o in others)
    late = t_interval(delays)
    return BlockingResult(
        late,
        t_interval(gaps),
        bool(max(abs(late.low), abs(late.high)) < DELAY_MARGIN),
        all(abs(v) <= margin for v in moved),
        all(arm.held for arm in blocked),
    )
