"""Blocking along skill axes: training again with directions held still, over data-order branches.

Does learning a skill *need* its axis, or does it only end up there? Arms hold one axis, all axes of the
targets, or the whole span, from the start of training or from just before a skill's window; shams hold as
many random directions of the same span, or of weight space. Breakthrough times scatter between data orders,
so every arm is run on the same branches and compared with the free arm of its own branch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from experiments.discover.axes import axis_basis
from experiments.discover.records import AxesRecord
from experiments.discover.stages import load_timeline
from experiments.run.run import Run, load_run
from experiments.run.stages.training import training_settings
from interventions.blocking import (
    BranchPoint,
    Curve,
    Hold,
    Retraining,
    compare_arms,
    open_branch_point,
    run_arm,
)
from interventions.causal.statistics import Interval, t_interval
from interventions.controls import carrying_frame, random_frame
from interventions.discovery.windows import reached
from polca_edit.artifacts import load_record, save_record
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.files import SeriesFolder
from polca_edit.seeds import generator_for

FREE = "free"
BEGINNINGS = ("start", "window", "both")


@dataclass(frozen=True)
class BlockingSettings:
    """What is held, and how often training is repeated.

    Attributes:
        basis: span of the axes.
        targets: skills whose axes are held.
        branches: data orders; every arm is run on each.
        every: steps between measurements.
        sequences: select sequences on which losses are measured.
        margin: equivalence margin for the final loss of other groups, nats.
        begin: ``start`` of training, ``window`` (from just before the skill's), or ``both``.
    """

    basis: str
    targets: tuple[str, ...]
    branches: int = 10
    every: int = 12
    sequences: int = 100
    margin: float = 0.05
    begin: str = "both"


@dataclass(frozen=True)
class ArmPlan:
    """One arm.

    Attributes:
        name: ``free``, ``axis 10s``, ``axes``, ``span``, ``sham axis 10s``, ``matched span`` ...
        start: step from which directions are held.
        stop: last step.
        target: skill it is about; None for all.
        sham_of: arm that it is the sham of.
    """

    name: str
    start: int
    stop: int
    target: str | None = None
    sham_of: str | None = None

    @property
    def label(self) -> str:
        """Name with the step it starts from."""
        return f"{self.name} from {self.start}"


@dataclass(frozen=True)
class ArmCurve:
    """Losses of one arm on one branch."""

    arm: str
    branch: int
    steps: tuple[int, ...]
    losses: dict[str, tuple[float, ...]]
    held: bool

    def curve(self) -> Curve:
        """As the comparison takes it."""
        losses = {name: np.array(path) for name, path in self.losses.items()}
        return Curve(self.arm, self.branch, self.steps, losses, self.held)


@dataclass(frozen=True)
class BlockedRow:
    """One arm against the free arm of each branch and against its shams.

    Attributes:
        arm: what was held, and from which step.
        target: skill.
        rank: directions held.
        carried: share of the free run's squared net movement that they hold.
        learned: branches in which the skill was half learned by the end.
        delay: later half-fall than the free arm, beyond shams, steps; a sham's own is beyond nothing.
        gap: final loss above the free arm's, beyond shams, nats; likewise.
        negligible: whether the delay is shown to be within a tenth of the run.
        others_equivalent: whether other groups end within the margin.
        held: whether the directions stayed still.
        above: other group -> final loss above the free arm's, mean over branches, nats.
    """

    arm: str
    target: str
    rank: int
    carried: float
    learned: int
    delay: Interval
    gap: Interval
    negligible: bool
    others_equivalent: bool
    held: bool
    above: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockedStudy:
    """The whole study.

    Attributes:
        rows: one an arm and target.
        free: target -> step at which it is half learned in the free arms from the start, over branches.
        scatter: target -> standard deviation of that step between branches.
        settings: of the study.
    """

    rows: tuple[BlockedRow, ...]
    free: dict[str, Interval]
    scatter: dict[str, float]
    settings: BlockingSettings


def arm_plans(run: Run, settings: BlockingSettings) -> list[ArmPlan]:
    """Every arm of the study, free arms first.

    Raises:
        ValueError: for a beginning that there is not.
    """
    if settings.begin not in BEGINNINGS:
        raise ValueError(f"--begin must be one of {', '.join(BEGINNINGS)}, got '{settings.begin}'")
    last = run.config.training.steps
    plans = [ArmPlan(FREE, 0, last)]
    for target in settings.targets:
        plans += _with_shams(ArmPlan(f"axis {target}", 0, last, target))
    # One target's axes together are its axis.
    for name in ("axes", "span") if len(settings.targets) > 1 else ("span",):
        plans += _with_shams(ArmPlan(name, 0, last))
    if settings.begin == "start":
        return plans
    if settings.begin == "window":
        plans = plans[:1]
    windows = load_timeline(run).proposed
    states = SeriesFolder(run.directory.checkpoints).state_steps()
    for target in settings.targets:
        if target not in windows or not any(s <= windows[target].start for s in states):
            continue
        window = windows[target]
        start = max(s for s in states if s <= window.start)
        stop = min(last, 2 * window.end - start)
        plans.append(ArmPlan(FREE, start, stop, target))
        for name in (f"axis {target}", "span"):
            plans += _with_shams(ArmPlan(name, start, stop, target))
    return list(dict.fromkeys(plans))


def _with_shams(plan: ArmPlan) -> list[ArmPlan]:
    """An arm, then its shams; no other directions of a span are left where all of it is held."""
    kinds = ("matched",) if plan.name == "span" else ("sham", "matched")
    return [plan, *(replace(plan, name=f"{kind} {plan.name}", sham_of=plan.name) for kind in kinds)]


def held_rows(run: Run, settings: BlockingSettings, plan: ArmPlan, branch: int) -> Tensor | None:
    """(k, N) directions that an arm holds on one branch; None for the free arm. Shams differ by branch."""
    if plan.name == FREE:
        return None
    basis = load_record(Basis, run.directory.basis(settings.basis))
    path = run.directory.path / "kept" / "discover" / f"axes-{settings.basis}.safetensors"
    if not path.exists():
        raise ValueError(
            f"blocking needs the axes of basis '{settings.basis}'; run polca-edit discover "
            f"{run.directory.path} --basis {settings.basis} first"
        )
    record = load_record(AxesRecord, path)
    axes = {t: axis_basis(run, settings.basis, record, t).rows for t in settings.targets}
    together = torch.linalg.qr(torch.cat(list(axes.values())).T)[0].T
    own = {**{f"axis {t}": rows for t, rows in axes.items()}, "axes": together, "span": basis.rows}
    if plan.sham_of is None:
        whole: Tensor = own[plan.name].contiguous()
        return whole
    generator = generator_for(run.config.seed, "blocking", plan.name, plan.start, branch)
    held = own[plan.sham_of]
    if plan.name.startswith("matched"):
        return carrying_frame(held, _movement(run), generator).contiguous()
    return (random_frame(len(basis), len(held), generator).to(basis.rows) @ basis.rows).contiguous()


def _movement(run: Run) -> Tensor:
    """From the first recorded weights to the last."""
    series = run.checkpoints()
    first = series[0].clone()
    return series[-1] - first


def run_one(
    place: Path, settings: BlockingSettings, plan: ArmPlan, branch: int, threads: int | None
) -> ArmCurve:
    """One arm on one branch, read back where it was trained before."""
    run = load_run(place, say=lambda _: None)
    if threads is not None:
        torch.set_num_threads(threads)
    name = f"blocking/{settings.basis}-{plan.label.replace(' ', '-')}-{branch}.json"
    depends = settings.every, settings.sequences, plan, run.key(f"basis:{settings.basis}"), branch
    key = run.key_for(name, *depends, _axes_key(run, settings, plan))
    return run.directory.kept(
        name, key, ArmCurve, lambda: _trained(run, settings, plan, branch), run.objective.passes
    )


def _axes_key(run: Run, settings: BlockingSettings, plan: ArmPlan) -> str:
    """Key of the axes that an arm holds; the free arm holds none."""
    if plan.name == FREE:
        return ""
    record = run.directory.record(f"discover/axes-{settings.basis}")
    return "" if record is None else record.key


def _trained(run: Run, settings: BlockingSettings, plan: ArmPlan, branch: int) -> ArmCurve:
    task = run.task
    if task.training is None:
        raise ValueError(f"task '{task.name}' has no training data, blocking needs to train again")
    start = (
        BranchPoint(0, run.checkpoints()[0], {})
        if plan.start == 0
        else open_branch_point(SeriesFolder(run.directory.checkpoints), task.space, plan.start)
    )
    rows = held_rows(run, settings, plan, branch)
    hold = None if rows is None else Hold(task.space, start.theta, rows, first=plan.start + 1)
    tokens = task.splits.select.select(torch.arange(min(settings.sequences, task.splits.select.sequences)))
    groups = {name: tokens.skills[name] for name in task.parents or tokens.skills}

    def measure(module: nn.Module) -> Mapping[str, float]:
        losses = run.objective.losses(task.space.read(module), tokens)
        return {name: float(losses[mask].double().mean()) for name, mask in groups.items()}

    # Branch 0 is the recorded run's own data order.
    retraining = Retraining(
        task.space, task.training(branch + 1), training_settings(run.config), measure, every=settings.every
    )
    module = copy.deepcopy(task.module)
    curve = run_arm(module, retraining, start, plan.stop, arm=plan.label, branch=branch, hold=hold)
    losses = {name: tuple(float(v) for v in path) for name, path in curve.losses.items()}
    return ArmCurve(plan.label, branch, curve.steps, losses, curve.held)


def blocking_study(run: Run, settings: BlockingSettings, *, workers: int = 1) -> BlockedStudy:
    """Train every arm on every branch and compare; what was trained before is kept.

    Args:
        run: with axes of the basis measured.
        settings: of the study.
        workers: processes; an arm on a branch is the unit of work.

    Raises:
        ValueError: for fewer than two branches, or axes that were not measured.
    """
    if settings.branches < 2:
        raise ValueError(f"an interval over branches needs at least two, got {settings.branches}")
    plans = arm_plans(run, settings)
    jobs = [(plan, branch) for branch in range(settings.branches) for plan in plans]
    place = run.directory.path
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            waiting = [pool.submit(run_one, place, settings, p, b, 1) for p, b in jobs]
            found = [job.result() for job in waiting]
    else:
        found = [run_one(place, settings, p, b, None) for p, b in jobs]
    curves = {(curve.arm, curve.branch): curve.curve() for curve in found}
    result = compared(run, settings, plans, curves)
    save_record(place / "blocking.json", result)
    return result


def compared(
    run: Run, settings: BlockingSettings, plans: Sequence[ArmPlan], curves: Mapping[tuple[str, int], Curve]
) -> BlockedStudy:
    """Rows of every arm that is not free; shams stand beside what they are shams of."""
    branches = range(settings.branches)
    moved = _movement(run)
    rows = []
    for plan in plans:
        if plan.name == FREE:
            continue
        place = plan.name, plan.start, plan.target
        shams = [p for p in plans if (p.sham_of, p.start, p.target) == place]
        free = [curves[f"{FREE} from {plan.start}", b] for b in branches]
        own = [curves[plan.label, b] for b in branches]
        against = [[curves[s.label, b] for s in shams] for b in branches]
        held = held_rows(run, settings, plan, 0)
        assert held is not None
        for target in settings.targets if plan.target is None else (plan.target,):
            others = [name for name in own[0].losses if name != target]
            found = compare_arms(free, own, against, target, others, margin=settings.margin)
            rows.append(
                BlockedRow(
                    plan.label,
                    target,
                    len(held),
                    float((held @ moved).double().square().sum() / moved.double().square().sum()),
                    sum(_half(curve, free[b], target) is not None for b, curve in enumerate(own)),
                    _scaled(found.delay, plan.stop - plan.start),
                    found.gap,
                    found.within_margin,
                    found.others_equivalent,
                    found.held,
                    {name: _above(own, free, name) for name in others},
                )
            )
    steps = {t: [_half(curves[f"{FREE} from 0", b], None, t) for b in branches] for t in settings.targets}
    known = {t: [float(s) for s in values if s is not None] for t, values in steps.items()}
    return BlockedStudy(
        tuple(rows),
        {t: t_interval(values) for t, values in known.items() if len(values) > 1},
        {t: float(np.std(values, ddof=1)) for t, values in known.items() if len(values) > 1},
        settings,
    )


def _above(own: Sequence[Curve], free: Sequence[Curve], group: str) -> float:
    """Final loss of a group above the free arm's of the same branch, mean over branches, nats."""
    pairs = zip(own, free, strict=True)
    return float(np.mean([arm.losses[group][-1] - base.losses[group][-1] for arm, base in pairs]))


def _scaled(interval: Interval, factor: float) -> Interval:
    """An interval in other units."""
    return Interval(interval.estimate * factor, interval.low * factor, interval.high * factor, interval.units)


def _half(curve: Curve, free: Curve | None, target: str) -> int | None:
    """Step at which half of the free arm's fall (or its own) is done; None if that is never reached."""
    path, own = curve.losses[target], (curve if free is None else free).losses[target]
    if free is None:
        index = reached(own, 0.5)
        return None if index is None else curve.steps[index]
    below = np.flatnonzero(path <= own[0] - 0.5 * (own[0] - own[-1]))
    return curve.steps[int(below[0])] if len(below) else None
