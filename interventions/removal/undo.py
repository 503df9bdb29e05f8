"""Removal by undoing: the movement that taught a skill taken back, and the rest repaired without its data.

*Rollback* subtracts the movement of the window in which the skill was learned from the final weights.
*Return* goes back to the checkpoint at the window's start. Either takes other things along; *repair* trains
on what is left with the skill's tokens masked. Both parts are kept in one edit of the final weights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.blocking import Hold
from interventions.discovery.timeline import Timeline
from interventions.discovery.windows import Window
from interventions.edits import Edit, Movement, composed, from_delta, rollback
from interventions.removal.forecast import Forecast
from interventions.removal.grouped import GroupedSplit, Shares
from interventions.removal.measures import relearn
from interventions.removal.problem import Limits, RemovalProblem, score
from interventions.removal.tuning import label_loss, masked_batches, tuned
from interventions.removal.windows import (
    candidate_windows,
    forecast,
    measured_forecast,
    movement_rows,
    recommended,
    skill_timeline,
    undoing,
)
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import coordinates
from polca_edit.training import TrainingSettings

METHODS = ("rollback", "return")
#: A repaired model is another model than the original, so KL hardly bounds it; what others lose does.
UNDO_LIMITS = Limits(target=0.9, off=0.02, kl=1.0)
#: Repair anneals from this multiple of training's rate: others come back in a third of the steps that a
#: constant rate takes (chosen on the select split of one seed of the demo, among 1, 1.5, 2, 3, 4 and 8).
REPAIR_RATE = 1.5


def repair_settings(
    steps: int,
    learning_rate: float,
    *,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    seed: int = 0,
) -> TrainingSettings:
    """Optimisation of a repair: a fresh optimiser, no warm-up, a cosine down from 1.5 times training's rate.

    Args:
        steps: of the repair, best a tenth of the recorded training's.
        learning_rate: of the recorded training.
        weight_decay: of the same.
        betas: of the same.
        seed: of the data's draws.
    """
    rate = REPAIR_RATE * learning_rate
    return TrainingSettings(steps, rate, weight_decay, betas, 0, decay="cosine", seed=seed)


@dataclass(frozen=True)
class Undo:
    """How a skill is removed by undoing.

    Attributes:
        method: ``rollback`` subtracts the windows' movement from the final weights, ``return`` goes back to
            the start of the first window.
        windows: steps to undo; empty: the skill's own from the timeline, as :func:`recommended` has it.
        compare: where no windows are given: own, wider and earlier ones are compared by a short repair and
            a short relearning. What makes a skill come back shows late, so long probes are needed.
        rows: (k, N) orthonormal; only movement along them is undone. None undoes it at full rank.
        training: optimisation of the repair; ``training.steps`` of zero leaves it out.
        every: repair steps between looks at select; the best look is kept.
        hold: rank of the windows' movement that repair may not touch, 0 for none.
        probe: steps of repair, and of relearning, by which windows are compared.
        given_back: share of the skill's labels in that relearning.
        seed: of the draws.
        timeline: of the split's tokens, where it is known already; its passes are not counted again.

    Raises:
        ValueError: for another method.
    """

    method: str = "rollback"
    windows: tuple[Window, ...] = ()
    rows: Float[Tensor, "k N"] | None = None
    training: TrainingSettings = field(default_factory=lambda: repair_settings(120, 2.5e-4))
    every: int = 10
    hold: int = 0
    probe: int = 12
    given_back: float = 0.1
    seed: int = 0
    timeline: Timeline | None = None
    compare: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"a method of undoing must be 'rollback' or 'return', got '{self.method}'")


@dataclass(frozen=True)
class TriedWindow:
    """One choice of windows on select.

    Attributes:
        windows: what was undone.
        target: share of its headroom that the skill lost, after the probe's repair.
        worst_off: largest share another group lost, after the probe's repair.
        relearned: share that the skill still lost after the probe's relearning; NaN without data.
        score: what is chosen by, smaller is better.
    """

    windows: tuple[Window, ...]
    target: float
    worst_off: float
    relearned: float
    score: float


@dataclass(frozen=True)
class Undone:
    """What was undone, and how it was repaired.

    Attributes:
        forecast: what would fall with these windows before any repair, measured on select.
        windows: undone.
        tried: choices compared on select; one where windows were given.
        repair_steps: kept, 0 where there was no data or no step helped.
        undone_norm: length of the movement taken back, weight units.
        repair_norm: length of the repair.
        passes_choosing: sequences through the model for timeline and choice, of all passes.
        seconds: of everything.
    """

    forecast: Forecast
    windows: tuple[Window, ...]
    tried: tuple[TriedWindow, ...]
    repair_steps: int
    undone_norm: float
    repair_norm: float
    passes_choosing: float
    seconds: float


def replayed(series: Checkpoints, window: Window, axis: Float[Tensor, "k N"]) -> Edit:
    """Back to the window's start, then all recorded later movement again, but for its part along an axis.

    theta_s + (I - P)(theta_T - theta_e): a rollback that also takes back what later training did along
    the skill's axis.
    """
    at, theta = series.steps.index, series[-1].clone()
    start, end = series[at(window.start)], series[at(window.end)]
    later = rollback(Movement(theta, end), axis, window=f"{window.end}:{series.steps[-1]}")
    return rollback(Movement(theta, start, end), window=str(window)).then(later)


def interpolated(first: Edit, second: Edit, share: float) -> Edit:
    """(1 - share) of one edit and ``share`` of another, of the same weights."""
    return composed([first.scaled(1 - share), second.scaled(share)])


@dataclass(frozen=True)
class Repaired:
    """Weights after repair.

    Attributes:
        theta: (N,) at the look that was kept.
        steps: trained until there.
        shares: on select.
    """

    theta: Float[Tensor, " N"]
    steps: int
    shares: Shares


def repaired(
    problem: RemovalProblem,
    start: Float[Tensor, " N"],
    settings: TrainingSettings,
    *,
    every: int,
    hold: Float[Tensor, "k N"] | None = None,
) -> Repaired:
    """Train on the problem's batches with the skill masked; the look with the best score on select is kept.

    Args:
        problem: batches, select and bounds.
        start: (N,) weights after undoing.
        settings: optimisation.
        every: steps between looks.
        hold: (k, N) orthonormal directions that repair leaves where they are.
    """
    best: list[Repaired] = []
    looks = 0

    def watch(theta: Tensor) -> Mapping[str, float]:
        nonlocal looks
        found = Repaired(theta.clone(), min(looks * every, settings.steps), problem.select.shares_at(theta))
        looks += 1
        if not best or score(found.shares, problem.limits) < score(best[0].shares, problem.limits):
            best[:] = [found]
        return {}

    held = None if hold is None else Hold(problem.predictor.loss.space, start, hold)
    loss = label_loss(problem.predictor, masked_batches(problem.batch, problem.rule))
    tuned(problem.predictor, start, loss, settings, every=every, watch=watch, hold=held)
    return best[0]


@dataclass(frozen=True)
class Probe:
    """How weights do after a short repair and a short relearning, on select.

    Attributes:
        target: share of its headroom that the skill has lost, after the repair.
        worst_off: largest share another group has lost, after the repair.
        relearned: share that the skill still has lost after the relearning.
        score: smaller is better: what others lose, what the target keeps, and what of it comes back.
    """

    target: float
    worst_off: float
    relearned: float
    score: float


def probed(problem: RemovalProblem, theta: Float[Tensor, " N"], undo: Undo) -> Probe:
    """Repair weights for ``undo.probe`` steps, then train for as many with some of the skill's labels.

    Early stopping would keep the start where a few steps cannot mend it yet, so all steps are done.
    """
    loss = label_loss(problem.predictor, masked_batches(problem.batch, problem.rule))
    theta = tuned(problem.predictor, theta, loss, replace(undo.training, steps=undo.probe))
    shares = problem.select.shares_at(theta)
    given = masked_batches(
        lambda step: problem.batch(undo.training.steps + step), problem.rule, undo.given_back, seed=undo.seed
    )
    rate = undo.training.learning_rate
    points = relearn(problem.select, theta, given, undo.probe, learning_rate=rate, every=undo.probe)
    relearned = points[-1].target_share
    value = score(shares, problem.limits) + max(0.0, problem.limits.target - relearned)
    return Probe(shares.target, shares.worst_off, relearned, value)


def tried_window(
    problem: RemovalProblem, undo: Undo, windows: tuple[Window, ...], *, repair: bool
) -> TriedWindow:
    """Undo, a short repair, a short relearning; all on select and the fit's batches."""
    theta = undoing(problem.select.split.series, windows, undo.method, undo.rows).moved(problem.theta)
    if repair:
        found = probed(problem, theta, undo)
        return TriedWindow(windows, found.target, found.worst_off, found.relearned, found.score)
    shares = problem.select.shares_at(theta)
    return TriedWindow(windows, shares.target, shares.worst_off, float("nan"), score(shares, problem.limits))


def undo_skill(problem: RemovalProblem, undo: Undo, *, repair: bool = True) -> tuple[Edit, Undone, Shares]:
    """Choose windows, undo them, repair the rest; everything is chosen on select.

    Args:
        problem: skill, select, bounds, and the batches that repair trains on.
        undo: how.
        repair: false where there is no data to repair with.

    Returns:
        One edit of the final weights that holds both parts, what was done, and its shares on select.

    Raises:
        ValueError: for a skill that was not learned in the recorded steps.
    """
    began, before = time.perf_counter(), problem.predictor.spent
    series = problem.select.split.series
    timeline = undo.timeline or skill_timeline(problem.select, seed=undo.seed)
    own, choices = (
        forecast(timeline, problem.rule.skill),
        _choices(timeline, problem.select, undo, problem.limits),
    )
    tried = [
        tried_window(problem, undo, windows, repair=repair and undo.training.steps > 0)
        for windows in (choices if len(choices) > 1 else [])
    ]
    chosen = min(tried, key=lambda found: found.score).windows if tried else choices[0]
    said = measured_forecast(own, problem.select, chosen, undo.method, undo.rows)
    choosing = problem.predictor.spent - before
    back = undoing(series, chosen, undo.method, undo.rows)
    start = back.moved(problem.theta)
    steps, mended, shares = 0, torch.zeros_like(start), problem.select.shares_at(start)
    if repair and undo.training.steps > 0:
        rows = _held(problem, chosen, undo.hold)
        found = repaired(problem, start, undo.training, every=undo.every, hold=rows)
        steps, mended, shares = found.steps, found.theta - start, found.shares
    edit = _of_both(problem, undo, back, mended, chosen, steps)
    record = Undone(
        said,
        chosen,
        tuple(tried),
        steps,
        back.norm,
        float(mended.double().norm()),
        choosing,
        time.perf_counter() - began,
    )
    return edit, record, shares


def decided(select: GroupedSplit, undo: Undo, timeline: Timeline, limits: Limits = UNDO_LIMITS) -> Undo:
    """The settings with a timeline, and with the windows that follow from it where none are to be compared.

    Args:
        select: tokens that choose.
        undo: how.
        timeline: of the skill and every other group.
        limits: how much of the target is wanted.
    """
    choices = _choices(timeline, select, undo, limits)
    return replace(undo, timeline=timeline, windows=choices[0] if len(choices) == 1 else undo.windows)


def foreseen(select: GroupedSplit, undo: Undo, timeline: Timeline, limits: Limits = UNDO_LIMITS) -> Forecast:
    """What undoing will do before any repair, on the first sequences of select.

    Of windows that are given, or follow from the timeline, it is measured: one pass. Where windows are still
    to be compared, it is what the timeline says of the skill's own.

    Args:
        select: tokens that choose.
        undo: how.
        timeline: of the skill and every other group.
        limits: how much of the target is wanted.

    Raises:
        ValueError: for a skill that was not learned in the recorded steps.
    """
    said = forecast(timeline, select.rule.skill)
    choices = _choices(timeline, select, undo, limits)
    if len(choices) > 1:
        return said
    return measured_forecast(said, select, choices[0], undo.method, undo.rows)


def _choices(
    timeline: Timeline, select: GroupedSplit, undo: Undo, limits: Limits
) -> list[tuple[Window, ...]]:
    """Windows worth comparing, one where they are not compared; to return, only their starts differ."""
    if undo.windows:
        return [undo.windows]
    skill, own = select.rule.skill, timeline.own(select.rule.skill)
    if not undo.compare and own is not None:
        return [(recommended(select, own.window, undo.method, limits, undo.rows),)]
    windows = candidate_windows(timeline, skill)
    if undo.method == "return":
        windows = list({window.start: window for window in reversed(windows)}.values())[::-1]
    return [(window,) for window in windows]


def _held(problem: RemovalProblem, windows: tuple[Window, ...], rank: int) -> Tensor | None:
    if not rank:
        return None
    whole = Window(min(w.start for w in windows), max(w.end for w in windows))
    return movement_rows(problem.select, whole, rank)


def _of_both(
    problem: RemovalProblem,
    undo: Undo,
    back: Edit,
    mended: Float[Tensor, " N"],
    windows: tuple[Window, ...],
    steps: int,
) -> Edit:
    """One edit whose rows span what was undone and what was repaired; provenance says which is which."""
    base = problem.select.split.movement.base
    repair = from_delta(base, mended, "repair", provenance={"steps": steps, "data": "without the skill"})
    both = back.then(repair) if repair.rank else back
    parts = [{"operator": part.operator, "norm": part.norm, **part.provenance} for part in (back, repair)]
    provenance: dict[str, object] = {
        "skill": problem.rule.skill,
        "method": undo.method,
        "windows": [str(window) for window in windows],
        "parts": parts if repair.rank else parts[:1],
        "coordinates_of_undoing": coordinates(both.rows, back.delta()).tolist(),
    }
    return replace(both, operator=f"{undo.method}{'+repair' if repair.rank else ''}", provenance=provenance)
