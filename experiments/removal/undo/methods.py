"""Every method of the study up to where repair sets in: weights, what was tried, and what it cost.

Fitted methods try four settings, methods by undoing up to three windows. What is kept is the one that does
best on select after a short repair and a short relearning, so that every method is chosen by what it is
judged by. All of them are repaired alike afterwards.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.removal.undo.place import Place
from interventions.discovery.axes import AxisSettings, skill_axis
from interventions.discovery.search import SearchSettings
from interventions.discovery.windows import Window
from interventions.edits import Edit, project_out
from interventions.removal import rivals
from interventions.removal.optimise import Fit, FitSettings, constrained, edit_of
from interventions.removal.problem import RemovalProblem, score
from interventions.removal.robust import collapsed_ascent, distillation, noised
from interventions.removal.spans import (
    BLOCK,
    LEADING,
    Span,
    random_like,
    span_by_tensor,
    stacked_displacements,
)
from interventions.removal.tuning import tuned
from interventions.removal.undo import Undo, interpolated, probed, replayed, tried_window
from interventions.removal.windows import (
    begun_earlier,
    candidate_windows,
    group_masks,
    recommended,
    undoing,
    with_descendants,
)
from polca_edit.basis.path import trajectory_basis
from polca_edit.seeds import generator_for

#: Vectors of the trajectory basis in which skill axes are searched, and axes at most.
VECTORS, AXES = 12, 4


@dataclass(frozen=True)
class TriedSetting:
    """One setting on select: what it took, what the worst other group lost, and the score it had."""

    setting: str
    target: float
    worst_off: float
    score: float


@dataclass(frozen=True)
class Start:
    """Weights where repair sets in.

    Attributes:
        theta: (N,) weights.
        setting: chosen, in words.
        tried: every setting on select.
        passes: sequences through the model so far, a forward with its backward counting three.
        seconds: so far.
        finished: nothing is repaired afterwards (retraining without the data).
    """

    theta: Tensor
    setting: str
    tried: tuple[TriedSetting, ...]
    passes: float
    seconds: float
    finished: bool = False


#: (place, starts it needs) -> weights where repair sets in.
Method = Callable[[Place, Mapping[str, Start]], Start]


def tried_as(setting: str, problem: RemovalProblem, theta: Float[Tensor, " N"]) -> TriedSetting:
    """A setting's record from weights."""
    shares = problem.select.shares_at(theta)
    return TriedSetting(setting, shares.target, shares.worst_off, score(shares, problem.limits))


@dataclass(frozen=True)
class Clock:
    """Passes and seconds since it was made, on top of what went before."""

    place: Place
    passes: float
    began: float

    @classmethod
    def on(cls, place: Place) -> Clock:
        """From now on; what all methods share is computed before."""
        select = place.problem.select
        _ = place.problem.headroom, select.before, select.untrained, place.timeline
        return cls(place, place.problem.predictor.spent, time.perf_counter())

    def start(
        self, theta: Tensor, setting: str, tried: Sequence[TriedSetting] = (), *, finished: bool = False,
        before: Sequence[Start] = (), more: float = 0.0,
    ) -> Start:  # fmt: skip
        """The record, with the cost of starts that it was made from, and other passes made before."""
        spent = self.place.problem.predictor.spent - self.passes + sum(s.passes for s in before) + more
        seconds = time.perf_counter() - self.began + sum(s.seconds for s in before)
        return Start(theta.clone(), setting, tuple(tried), spent, seconds, finished)


# -- methods that fit ---------------------------------------------------------------------------------

Iterative = Callable[[RemovalProblem, FitSettings, int], Fit]


def grid(
    rates: Sequence[float],
    retain: Sequence[float],
    confusion: float,
    strength: Sequence[float],
    *,
    stop: bool = False,
) -> list[FitSettings]:
    """Settings, four of them."""
    return [FitSettings(r, k, confusion, s, stop) for r, k, s in itertools.product(rates, retain, strength)]


SETTINGS: Mapping[str, list[FitSettings]] = {
    # Ascent without a retain term destroys the model unless it stops at the goal; the others go on.
    "gradient ascent": grid((1e-4, 3e-4, 1e-3, 3e-3), (0.0,), 0.0, (1.0,), stop=True),
    "GradDiff": grid((3e-4, 1e-3), (1.0, 5.0), 0.0, (1.0,)),
    "NPO": grid((3e-4, 1e-3), (3.0,), 0.0, (0.1, 0.5)),
    "task vector": grid((1e-4, 5e-4), (0.0,), 0.0, (1.0, 4.0)),
    "CIR": grid((3e-4, 1e-3), (0.0,), 0.0, (2.0, 8.0), stop=True),
    "free edit in the span": grid((0.003, 0.01), (10.0, 25.0), 6.0, (1.0,)),
    "random span": grid((0.003, 0.01), (10.0, 25.0), 6.0, (1.0,)),
}  # fmt: skip
#: Candidates of one method that are probed, the best by damage alone where there are more.
PROBED = 4


def _recorded_span(place: Place) -> Span:
    series = place.problem.select.split.series
    thetas = [series[index].clone() for index in range(len(series))]
    return span_by_tensor(
        stacked_displacements(thetas),
        place.run.task.space,
        "recorded movement",
        block=BLOCK,
        per_block=LEADING,
    )


def _iterative(name: str, place: Place) -> Iterative:
    simple: dict[str, Iterative] = {
        "gradient ascent": rivals.gradient_ascent,
        "GradDiff": rivals.grad_diff,
        "NPO": rivals.npo,
        "task vector": rivals.task_vector,
        "CIR": collapsed_ascent,
    }
    if name in simple:
        return simple[name]
    span = _recorded_span(place)
    if name == "random span":
        span = random_like(span, generator_for(place.run.config.seed, "random span"))
    return lambda problem, setting, steps: constrained(problem, span, setting, steps)


def fitted(name: str, settings: Sequence[FitSettings] = ()) -> Method:
    """Four settings (the study's by default) with half the steps each; the best one after a probe."""

    def method(place: Place, starts: Mapping[str, Start]) -> Start:
        clock, problem, run = Clock.on(place), place.problem, _iterative(name, place)
        steps, wanted = max(1, place.effort.fit_steps // 2), settings or SETTINGS[name]
        found = [(_words(s), problem.theta + run(problem, s, steps).delta) for s in wanted]
        return _best(place, clock, found)

    return method


def _words(setting: FitSettings) -> str:
    return ", ".join(f"{k} {v:g}" for k, v in asdict(setting).items() if k != "stop")


# -- methods that rewind or undo ----------------------------------------------------------------------


def probe_of(place: Place, method: str = "rollback") -> Undo:
    """The probe that every method is chosen by."""
    return Undo(method, training=place.repair_settings(1), probe=min(12, place.effort.fit_steps))


def _best(place: Place, clock: Clock, candidates: Sequence[tuple[str, Tensor]]) -> Start:
    """The candidate that does best on select after a short repair and a short relearning."""
    problem, kept = place.problem, list(candidates)
    if len(kept) > PROBED:
        kept.sort(key=lambda c: score(problem.select.shares_at(c[1]), problem.limits))
    tried = []
    for name, theta in kept[:PROBED]:
        found = probed(problem, theta, probe_of(place))
        value = found.score if found.score == found.score else float("inf")
        tried.append(TriedSetting(name, found.target, found.worst_off, value))
    index = min(range(len(tried)), key=lambda i: tried[i].score)
    return clock.start(kept[index][1], kept[index][0], tried)


def fisher_ablation(place: Place, starts: Mapping[str, Start]) -> Start:
    """The weights that matter most for the skill, per unit of what they matter for others, put back."""
    clock, problem = Clock.on(place), place.problem
    found = rivals.importance(problem, place.effort.trial_steps)
    shares = (0.001, 0.01, 0.05, 0.2)
    moved = [rivals.rewind_weights(problem, found, "fisher ratio", share) for share in shares]
    return _best(
        place, clock, [(f"share {s:g}", problem.theta + m) for s, m in zip(shares, moved, strict=True)]
    )


def layer_rollback(place: Place, starts: Mapping[str, Start]) -> Start:
    """Every attention block, MLP and embedding put back to where training began."""
    clock, problem = Clock.on(place), place.problem
    names = place.run.task.space.names
    parts = sorted({".".join(n.split(".")[:3]) if n.startswith("blocks") else n.split(".")[0] for n in names})
    return _best(place, clock, [(p, problem.theta + rivals.rewind_part(problem, [f"{p}.*"])) for p in parts])


def undone(method: str) -> Method:
    """Windows compared on select by a short repair and a short relearning, the best one undone."""

    def made(place: Place, starts: Mapping[str, Start]) -> Start:
        clock, problem = Clock.on(place), place.problem
        undo = probe_of(place, method)
        found = [
            tried_window(problem, undo, (window,), repair=True)
            for window in candidate_windows(place.timeline, place.skill)
        ]
        tried = [
            TriedSetting(f"{t.windows[0].kind} {t.windows[0]}", t.target, t.worst_off, t.score) for t in found
        ]
        best = min(range(len(found)), key=lambda i: found[i].score)
        theta = undoing(problem.select.split.series, found[best].windows, method).moved(problem.theta)
        return clock.start(theta, tried[best].setting, tried, more=place.timeline_passes)

    return made


def _of_edit(make: Callable[[Place, Mapping[str, Start]], tuple[Edit, str, tuple[Start, ...]]]) -> Method:
    def made(place: Place, starts: Mapping[str, Start]) -> Start:
        clock = Clock.on(place)
        edit, words, before = make(place, starts)
        more = place.timeline_passes
        return clock.start(edit.moved(place.problem.theta), words, before=before, more=more)

    return made


def _window(method: str, windows: Callable[[Place], tuple[Window, ...]]) -> Method:
    def make(place: Place, starts: Mapping[str, Start]) -> tuple[Edit, str, tuple[Start, ...]]:
        chosen = windows(place)
        words = ", ".join(str(window) for window in chosen)
        return undoing(place.problem.select.split.series, chosen, method), words, ()

    return _of_edit(make)


def _by_default(method: str) -> Method:
    """The skill's window as the library undoes it by default."""
    return _window(method, lambda p: (recommended(p.problem.select, p.own, method, p.problem.limits),))


def _earlier(widths: float) -> Callable[[Place], tuple[Window, ...]]:
    """The skill's window, begun so many widths earlier."""
    return lambda place: (begun_earlier(place.problem.select.split.series.steps, place.own, widths),)


# -- methods that stand on others ---------------------------------------------------------------------


def axes_of(place: Place, starts: Mapping[str, Start]) -> Start:
    """Four skill axes of the trajectory span as one stack of weights: (AXES N,), shared by all ranks."""
    clock, problem = Clock.on(place), place.problem
    split = problem.select.split
    few = split.on(split.tokens.select(torch.arange(min(125, split.tokens.sequences))))
    groups = group_masks(problem.select.on(few.tokens))
    basis = trajectory_basis(split.series, min(VECTORS, len(split.series) - 1))
    search = SearchSettings(directions=place.effort.axis_directions, rounds=2, starts=2, climb=30)
    settings = AxisSettings(search=search, further=1, refine=10, rank=AXES)
    others = {name: mask for name, mask in groups.items() if name != place.skill}
    axis = skill_axis(few, basis, groups[place.skill], others, settings)
    return clock.start(axis.basis.rows.flatten(), f"{len(basis)} trajectory vectors")


def _axis(rank: int) -> Method:
    def make(place: Place, starts: Mapping[str, Start]) -> tuple[Edit, str, tuple[Start, ...]]:
        found = starts["axes"]
        rows = found.theta.view(AXES, -1)[:rank]
        return project_out(place.problem.select.split, rows), f"rank {rank}", (found,)

    return _of_edit(make)


def _replay(place: Place, starts: Mapping[str, Start]) -> tuple[Edit, str, tuple[Start, ...]]:
    found = starts["axes"]
    rows = found.theta.view(AXES, -1)
    return replayed(place.problem.select.split.series, place.own, rows), f"{place.own}, rank {AXES}", (found,)


def _between(place: Place, starts: Mapping[str, Start]) -> tuple[Edit, str, tuple[Start, ...]]:
    series, theta, other = place.problem.select.split.series, place.problem.theta, starts["GradDiff"]
    back = undoing(series, (place.own,), "rollback")
    pushed = edit_of(place.problem, other.theta - theta, "GradDiff")
    return interpolated(back, pushed, 0.5), f"{place.own}, half of each", (other,)


def distilled(
    place: Place, teacher: Float[Tensor, " N"], start: Float[Tensor, " N"], steps: int
) -> Float[Tensor, " N"]:
    """A student after some steps of distillation on everything but the skill."""
    loss = distillation(place.problem, teacher)
    return tuned(place.problem.predictor, start, loss, place.repair_settings(steps))


def noise_and_distil(place: Place, starts: Mapping[str, Start]) -> Start:
    """The unlearned model noised by the share that a short distillation mends best; repair distils on."""
    clock, problem, teacher = Clock.on(place), place.problem, starts["GradDiff"]
    candidates, tried = [], []
    for share in place.effort.noise:
        generator = generator_for(place.run.config.seed, "noise and distil")
        candidates.append(noised(teacher.theta, place.run.task.space, share, generator))
        student = distilled(place, teacher.theta, candidates[-1], place.effort.trial_steps)
        tried.append(tried_as(f"noise {share:g}", problem, student))
    best = min(range(len(tried)), key=lambda i: tried[i].score)
    return clock.start(candidates[best], tried[best].setting, tried, before=(teacher,))


def retrained(place: Place, starts: Mapping[str, Start]) -> Start:
    """The gold model: the whole training again without the skill's labels."""
    clock = Clock.on(place)
    return clock.start(place.trained_without(), "from the start", finished=True)


def retrained_from_window(place: Place, starts: Mapping[str, Start]) -> Start:
    """Training again from before the skill's window, optimiser state and data order as they were."""
    clock, theta = Clock.on(place), place.trained_without(place.own.start)
    words, more = f"from the last state before {place.own.start}", place.timeline_passes
    return clock.start(theta, words, finished=True, more=more)


def untouched(place: Place, starts: Mapping[str, Start]) -> Start:
    """The trained model itself."""
    return Clock.on(place).start(place.problem.theta, "as trained", finished=True)


GOLD, DISTIL, HELD = "retrained without the data", "noise and distil", "rollback, repair off its span"
METHODS: Mapping[str, Method] = {
    GOLD: retrained,
    "untouched": untouched,
    "rollback and repair": _by_default("rollback"),
    "return and repair": _by_default("return"),
    "rollback, windows compared": undone("rollback"),
    "return, windows compared": undone("return"),
    "rollback of its own window": _window("rollback", lambda place: (place.own,)),
    "GradDiff": fitted("GradDiff"),
    "NPO": fitted("NPO"),
    "gradient ascent": fitted("gradient ascent"),
    "CIR": fitted("CIR"),
    DISTIL: noise_and_distil,
    "task vector": fitted("task vector"),
    "Fisher ablation": fisher_ablation,
    "layer rollback": layer_rollback,
    "free edit in the span": fitted("free edit in the span"),
    "random span": fitted("random span"),
    **{f"skill axes, rank {rank}": _axis(rank) for rank in range(1, AXES + 1)},
    "retrained from the window": retrained_from_window,
    "rollback with descendants": _window("rollback", lambda p: tuple(with_descendants(p.timeline, p.skill))),
    "rollback, one width earlier": _window("rollback", _earlier(1.0)),
    HELD: _window("rollback", lambda place: (place.own,)),
    "replay off the axes": _of_edit(_replay),
    "rollback and GradDiff, half each": _of_edit(_between),
    "return to the window": _window("return", lambda place: (place.own,)),
    "return, one width earlier": _window("return", _earlier(1.0)),
}
#: Starts that other methods are made from, and which methods need which.
SHARED: Mapping[str, Method] = {"axes": axes_of}
NEEDS: Mapping[str, tuple[str, ...]] = {
    **{f"skill axes, rank {rank}": ("axes",) for rank in range(1, AXES + 1)},
    "replay off the axes": ("axes",),
    "rollback and GradDiff, half each": ("GradDiff",),
    DISTIL: ("GradDiff",),
}
#: Methods without settings of their own whose candidates are probed too.
CHOSEN_AFTER_PROBES = ("Fisher ablation", "layer rollback")
