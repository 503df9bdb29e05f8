"""A published claim put to the test: grokking needs the motion along 16 trajectory components.

arXiv 2602.16746 takes components of a free run away from the gradient before every AdamW step and finds
grokking delayed or gone; with 16 random directions nothing happens. Beside that procedure the coordinates are
put back after every step, so that they do not move, and a sham of equal carried movement is held alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.study.grokking.arms import (
    Arm,
    Change,
    Runner,
    Start,
    random_rows,
    sham_rows,
    trajectory_rows,
)
from interventions.blocking import Hold
from interventions.causal.statistics import Interval, t_interval

ARMS = ("free", "gradient off PCs", "gradient off random", "held PCs", "held sham")
#: Accuracy on hidden sums that counts as having grokked.
GROKKED = 0.9
Say = Callable[[str], None]


@dataclass(frozen=True)
class ClaimSettings:
    """What is run.

    Attributes:
        branch: step from which arms differ.
        limit: last step of any arm.
    """

    branch: int = 300
    limit: int = 1200


@dataclass(frozen=True)
class ArmRow:
    """One arm of one seed.

    Attributes:
        arm: name.
        seed: of the run.
        grokked: step at which hidden accuracy passes .9, interpolated; the limit where it never does.
        censored: whether it never does.
        steps: where accuracy was measured.
        hidden: accuracy there.
        moved: length of the movement along the 16 components since the branch.
        total: of the whole movement.
    """

    arm: str
    seed: int
    grokked: float
    censored: bool
    steps: tuple[int, ...]
    hidden: tuple[float, ...]
    moved: tuple[float, ...]
    total: tuple[float, ...]


@dataclass(frozen=True)
class WeakPoints:
    """What the procedure does to one step, at the branch; all without unit.

    Attributes:
        gradient_pcs: share of the gradient's squared norm in the 16 components, mean over batches.
        gradient_random: in 16 random directions.
        update_pcs: cosine of the AdamW update without the components with the free one.
        update_random: without the random directions.
        drift_pcs: movement along the components with their gradient off, over the free run's, at the end of
            the shorter arm.
        carried: share of the free run's net movement after the branch that lies in the components (squared).
    """

    gradient_pcs: float
    gradient_random: float
    update_pcs: float
    update_random: float
    drift_pcs: float
    carried: float


@dataclass(frozen=True)
class SeedResult:
    """All arms of one seed."""

    arms: tuple[ArmRow, ...]
    weak: WeakPoints


def off(rows: Tensor) -> Change:
    """Gradient without its part along rows."""
    return lambda gradient: gradient - (rows @ gradient) @ rows


def grokked_at(arm: Arm, limit: int) -> tuple[float, bool]:
    """Step at which accuracy passes .9, linear between measurements; (limit, True) where it never does.

    >>> grokked_at(Arm((0, 20), (0.8, 1.0), (), (), torch.zeros(1)), 100)
    (10.0, False)
    """
    for i in range(1, len(arm.steps)):
        low, high = arm.hidden[i - 1], arm.hidden[i]
        if high >= GROKKED:
            part = 0.0 if high == low else max(0.0, (GROKKED - low) / (high - low))
            return arm.steps[i - 1] + part * (arm.steps[i] - arm.steps[i - 1]), False
    return float(limit), True


def run_seed(seed: int, settings: ClaimSettings, say: Say) -> SeedResult:
    """Every arm of one seed.

    Args:
        seed: of weights, table and batches.
        settings: branch and limit.
        say: told how each arm ended.
    """
    runner = Runner(seed, settings.limit)
    before: list[Tensor] = [runner.first]
    start = runner.prefix(settings.branch, lambda _, theta: before.append(theta))
    after: list[Tensor] = [start.theta]
    none = torch.zeros(0, runner.space.size)
    free = runner.run(start, none, keep=lambda _, theta: after.append(theta))
    rows = trajectory_rows([*before, *after[1:]], runner.space)
    random = random_rows(len(rows), runner.space.size, seed)
    away = after[-1] - after[0]
    carried = float((rows @ away).norm())
    sham = sham_rows(after, rows, carried, seed)
    moved = tuple(float((rows @ (theta - after[0])).norm()) for theta in after)
    arms = {"free": Arm(free.steps, free.hidden, moved, free.total, free.theta)}
    made: Mapping[str, Callable[[], Arm]] = {
        "gradient off PCs": lambda: runner.run(start, rows, change=off(rows)),
        "gradient off random": lambda: runner.run(start, rows, change=off(random)),
        "held PCs": lambda: runner.run(start, rows, hold=Hold(runner.space, start.theta, rows)),
        "held sham": lambda: runner.run(start, rows, hold=Hold(runner.space, start.theta, sham)),
    }
    for name, run in made.items():
        arms[name] = run()
    done = []
    for name, arm in arms.items():
        step, censored = grokked_at(arm, settings.limit)
        done.append(ArmRow(name, seed, step, censored, arm.steps, arm.hidden, arm.moved, arm.total))
        say(f"  seed {seed} {name:<20} {'never' if censored else f'step {step:.0f}'}")
    weak = weak_points(runner, start, rows, random)
    shared = min(len(arms["free"].moved), len(arms["gradient off PCs"].moved)) - 1
    drift = arms["gradient off PCs"].moved[shared] / max(moved[shared], 1e-12)
    squared = (carried / float(away.norm())) ** 2
    return SeedResult(tuple(done), WeakPoints(*weak, drift, squared))


def weak_points(
    runner: Runner, start: Start, rows: Tensor, random: Tensor, batches: int = 8
) -> tuple[float, float, float, float]:
    """Shares of the gradient inside two spans, and cosines of the AdamW update without them."""
    beta1, beta2 = 0.9, 0.98
    space, module = runner.space, runner.module
    first = space.flatten(_moment(start.state, "exp_avg"))
    second = space.flatten(_moment(start.state, "exp_avg_sq"))
    space.write(module, start.theta)
    shares: list[list[float]] = []
    for number in range(batches):
        step = start.step + 1 + number
        with torch.enable_grad():
            module.zero_grad()
            runner.data.batch_loss(module, step).backward()
        gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        gradient = gradient * min(1.0, 1.0 / float(gradient.norm()))

        def update(g: Tensor) -> Tensor:
            m = (beta1 * first + (1 - beta1) * g) / (1 - beta1 ** (start.step + 1))
            v = (beta2 * second + (1 - beta2) * g.square()) / (1 - beta2 ** (start.step + 1))
            return m / (v.sqrt() + 1e-8)

        whole = update(gradient)
        own = [float((r @ gradient).square().sum() / gradient.square().sum()) for r in (rows, random)]
        cosines = [
            float(torch.cosine_similarity(whole, update(off(r)(gradient)), dim=0)) for r in (rows, random)
        ]
        shares.append([*own, *cosines])
    module.zero_grad()
    a, b, c, d = np.mean(shares, axis=0).tolist()
    return a, b, c, d


def _moment(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    suffix = f"//{name}"
    return {key.removesuffix(suffix): value for key, value in state.items() if key.endswith(suffix)}


@dataclass(frozen=True)
class ArmSummary:
    """One arm over seeds.

    Attributes:
        arm: name.
        step: mean step of grokking (restricted to the limit).
        censored: seeds that never grok.
        delay: against the free arm of the same seed, steps; None for the free arm itself.
        beyond_sham: against the held sham of the same seed; for the held components alone.
    """

    arm: str
    step: Interval
    censored: int
    delay: Interval | None
    beyond_sham: Interval | None


def summaries(results: Sequence[SeedResult]) -> list[ArmSummary]:
    """Steps and paired delays with t intervals over seeds; a seed more than one is needed."""
    steps = {arm: [_row(result, arm).grokked for result in results] for arm in ARMS}
    found = []
    for arm in ARMS:
        late = [own - free for own, free in zip(steps[arm], steps["free"], strict=True)]
        sham = [own - held for own, held in zip(steps[arm], steps["held sham"], strict=True)]
        found.append(
            ArmSummary(
                arm,
                t_interval(steps[arm]),
                sum(_row(result, arm).censored for result in results),
                None if arm == "free" else t_interval(late),
                t_interval(sham) if arm == "held PCs" else None,
            )
        )
    return found


def _row(result: SeedResult, arm: str) -> ArmRow:
    return next(row for row in result.arms if row.arm == arm)
