"""Which stretch of training to undo for a skill, and what will fall with it, said before it is undone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from interventions.discovery.timeline import LEAST, Timeline, TimelineSettings, causal_timeline
from interventions.discovery.windows import Window, proposed_windows
from interventions.edits import Edit, Movement, composed, rollback
from interventions.removal.forecast import Forecast
from interventions.removal.grouped import GroupedSplit
from interventions.removal.problem import Limits, score
from interventions.removal.spans import leading_rows
from polca_edit.checkpoints.series import Checkpoints

#: Shares of a skill's fall still to come at both ends of the windows that are tried, narrowest first.
FALLS = {"own": (0.9, 0.15), "wide": (0.98, 0.05)}
#: Window's lengths by which undoing begins before a skill's fall: what lets the skill come back is learned
#: before its loss falls (measured, docs/results/removal-demo.md).
EARLIER = 0.5
#: Ends that are tried after a skill's fall, and the share of headroom by which a later one must be better.
LATER, CLEARLY = 6, 0.1
#: Sequences on which curves and falls are measured, at most.
SEQUENCES = 100


def group_masks(select: GroupedSplit) -> dict[str, Bool[Tensor, " M"]]:
    """The skill under its own name, then every other group that has tokens."""
    rule, groups = select.rule, select.groups
    others = {
        name: groups == index
        for index, (name, target) in enumerate(zip(rule.names, rule.targets, strict=True))
        if not target and bool((groups == index).any())
    }
    return {rule.skill: select.target, **others}


def skill_timeline(
    select: GroupedSplit, *, points: int = 41, sequences: int = SEQUENCES, seed: int = 0
) -> Timeline:
    """Curves, own windows and what falls with each, for the skill and every other group.

    Args:
        select: tokens that choose.
        points: checkpoints at which losses are measured, at most: one forward pass each.
        sequences: of the tokens, the first so many.
        seed: of the random movements beside the windows.
    """
    settings = TimelineSettings(
        windows=1, doubling=False, random_draws=1, curve_points=points, resamples=100, shuffles=1, seed=seed
    )
    few = _first(select, sequences)
    return causal_timeline(few.split, None, group_masks(few), settings)


def _first(select: GroupedSplit, sequences: int = SEQUENCES) -> GroupedSplit:
    """The same on its first sequences alone."""
    tokens = select.tokens
    return select.on(tokens.select(torch.arange(min(sequences, tokens.sequences))))


def forecast(timeline: Timeline, skill: str) -> Forecast:
    """What undoing a skill's own window will do.

    Raises:
        ValueError: for a skill whose loss does not fall in the recorded steps.
    """
    own = timeline.own(skill)
    if own is None or skill not in own.shares:
        raise ValueError(
            f"a skill must be learned in the recorded steps to be undone, '{skill}' is not; "
            "use --method span, or record earlier checkpoints"
        )
    others = {name: value for name, value in own.shares.items() if name != skill}
    later = tuple(d.skill for d in timeline.dependences if d.on == skill and d.holds)
    first, last = timeline.steps[0], timeline.steps[-1]
    fraction = (last - own.window.start) / max(last - first, 1)
    return Forecast(skill, own.window, own.shares[skill], others, later, fraction)


def measured_forecast(
    said: Forecast, select: GroupedSplit, windows: tuple[Window, ...], method: str, rows: Tensor | None = None
) -> Forecast:
    """A forecast of the windows that will be undone, measured on the first sequences of select.

    Args:
        said: of the skill's own window.
        select: tokens that choose.
        windows: that will be undone.
        method: ``rollback`` or ``return``.
        rows: only movement along them.
    """
    few, steps = _first(select), select.split.series.steps
    edit = undoing(select.split.series, windows, method, rows)
    shares = few.shares_at(edit.moved(select.split.theta))
    return replace(
        said,
        share=shares.target,
        falls={name: shares.raw[name] for name in shares.others if math.isfinite(shares.raw[name])},
        fraction=(steps[-1] - min(window.start for window in windows)) / max(steps[-1] - steps[0], 1),
        windows=windows,
        method=method,
        rank=0 if rows is None else len(rows),
    )


def begun_earlier(steps: Sequence[int], own: Window, widths: float = EARLIER) -> Window:
    """A window that begins so many of its lengths earlier, at a recorded step.

    >>> str(begun_earlier(range(0, 100, 10), Window(50, 90), 0.5))
    '30:90'
    """
    wanted = own.start - widths * (own.end - own.start)
    first = max((step for step in steps if step <= wanted), default=steps[0])
    return Window(first, own.end, "earlier")


def recommended(
    select: GroupedSplit, own: Window, method: str, limits: Limits, rows: Tensor | None = None
) -> Window:
    """A skill's window as it is undone by default: begun earlier, ended later where that is clearly better.

    A skill that falls in a few steps is deepened for long, and what the others learn meanwhile comes to
    stand on it: to undo its fall alone costs them more and takes less. Later ends, evenly spaced over what
    was recorded, are undone on the first sequences of select, one forward pass each; to return, ends do not
    matter.

    Args:
        select: tokens that choose.
        own: window of the skill's fall.
        method: ``rollback`` or ``return``.
        limits: how much of the target is wanted.
        rows: only movement along them.
    """
    series = select.split.series
    window = begun_earlier(series.steps, own)
    later = [step for step in series.steps if step > window.end]
    if method == "return" or not later:
        return window
    few = _first(select)
    picked = sorted({round(place) for place in np.linspace(0, len(later) - 1, min(LATER, len(later)))})

    def lost(end: int) -> float:
        edit = undoing(series, (replace(window, end=end),), method, rows)
        # More than all of it cannot be lost: early windows, with which everything falls, are all alike.
        return min(1.0, score(few.shares_at(edit.moved(select.split.theta)), limits))

    scores = {end: lost(end) for end in (window.end, *(later[place] for place in picked))}
    best = min(scores, key=lambda end: scores[end])
    return replace(window, end=best) if scores[best] < scores[window.end] - CLEARLY else window


def candidate_windows(timeline: Timeline, skill: str) -> list[Window]:
    """The skill's own window, a wider one, and those that begin half a length and a length earlier.

    The own window begins when a tenth of the fall is done; what the skill is built from may be learned
    before that.
    """
    curve, steps = np.array(timeline.curves[skill]), list(timeline.steps)
    found = [proposed_windows(steps, {kind: curve}, falls).get(kind) for kind, falls in FALLS.items()]
    windows = [replace(window, kind=kind) for window, kind in zip(found, FALLS, strict=True) if window]
    windows += [begun_earlier(steps, windows[0], widths) for widths in (EARLIER, 1.0)]
    return list({(window.start, window.end): window for window in reversed(windows)}.values())[::-1]


def with_descendants(timeline: Timeline, skill: str) -> list[Window]:
    """The windows of the skill and of all that was built on it; overlapping ones are merged."""
    own = timeline.own(skill)
    later = [timeline.own(d.skill) for d in timeline.dependences if d.on == skill and d.share.low > LEAST]
    learned = timeline.learned.get(skill) or 0
    wanted = [own, *(e for e in later if e and (timeline.learned[e.window.kind] or 0) >= learned)]
    return merged([effect.window for effect in wanted if effect is not None])


def merged(windows: Sequence[Window]) -> list[Window]:
    """Disjoint windows that cover the same steps, in order; no movement would be undone twice.

    >>> [str(w) for w in merged([Window(40, 60), Window(0, 10), Window(50, 80)])]
    ['0:10', '40:80']
    """
    found: list[Window] = []
    for window in sorted(windows, key=lambda w: (w.start, w.end)):
        if found and window.start <= found[-1].end:
            found[-1] = replace(found[-1], end=max(found[-1].end, window.end))
        else:
            found.append(window)
    return found


def movement_rows(select: GroupedSplit, window: Window, rank: int) -> Tensor:
    """(k, N) leading orthonormal directions of what was recorded inside a window."""
    series = select.split.series
    inside = [i for i, step in enumerate(series.steps) if window.start <= step <= window.end]
    first = series[inside[0]].clone()
    return leading_rows(torch.stack([series[i] - first for i in inside[1:]]), rank)


# -- the edit ---------------------------------------------------------------------------------------


def check_windows(series: Checkpoints, windows: tuple[Window, ...]) -> None:
    """Nothing where every window begins before it ends, both at recorded steps.

    Raises:
        ValueError: for another window.
    """
    for window in windows:
        unknown = [step for step in (window.start, window.end) if step not in series.steps]
        if unknown or window.start >= window.end:
            raise ValueError(
                f"a window must begin before it ends, both at recorded steps, got {window}; steps "
                f"{series.steps[0]} to {series.steps[-1]} are recorded, {len(series)} in all"
            )


def undoing(
    series: Checkpoints, windows: tuple[Window, ...], method: str, rows: Tensor | None = None
) -> Edit:
    """The edit of the final weights that takes windows back; two checkpoints are held at a time.

    Args:
        series: recorded weights; the last one is edited.
        windows: overlapping ones are merged, so that no movement is taken back twice.
        method: ``rollback`` or ``return``.
        rows: only movement along them.

    Raises:
        ValueError: for a window that does not begin and end at recorded steps.
    """
    theta, at = series[-1].clone(), series.steps.index
    check_windows(series, windows)
    if method == "return":
        first = min(window.start for window in windows)
        return rollback(Movement(theta, series[at(first)]), rows, rewind=True, back_to=first)
    parts = []
    for window in merged(windows):
        movement = Movement(theta, series[at(window.start)], series[at(window.end)])
        parts.append(rollback(movement, rows, window=str(window)))
    return composed(parts)
