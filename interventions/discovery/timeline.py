"""The causal timeline: the movement of each stretch of training undone in the final model.

Undoing a stretch takes the skill that was learned in it and the skills that build on it, and leaves
earlier ones alone. One picture of windows x groups therefore shows an order of dependence; neither a
basis nor a label is needed, and one forward pass a window is all it costs. Two checkpoints are held at
a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from interventions.causal.statistics import Array, Interval, Shares, Units, draw_units, rank_p, shares_of
from interventions.controls import Kind, random_like
from interventions.damage import EvaluatedSplit, Groups, named_groups
from interventions.discovery.windows import (
    EQUAL,
    FALLS,
    Window,
    doubling_windows,
    equal_windows,
    learned_at,
    proposed_windows,
)
from interventions.edits import Edit, Movement, rollback
from polca_edit.allocation.progress import progress
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.seeds import generator_for

#: Headroom below which a group's loss says more in nats than as a share.
FLOOR = 0.05
#: A skill that loses a smaller share of its headroom does not depend on the window.
LEAST = 0.02


@dataclass(frozen=True)
class TimelineSettings:
    """What is undone, and what it is compared with.

    Attributes:
        windows: pieces into which all recorded intervals are merged.
        doubling: also undo windows of doubling length.
        proposed: also undo the window of each group's own fall.
        falls: shares of a group's fall still to come at the start and end of its window.
        control: kind of the random movement of the same norm.
        random_draws: random movements a window; 0 leaves them out.
        curve_points: checkpoints at which the groups' losses are measured, at most.
        resamples: document bootstrap.
        shuffles: orders of the windows under the null.
        seed: of every draw.
    """

    windows: int = 10
    doubling: bool = True
    proposed: bool = True
    falls: tuple[float, float] = FALLS
    control: Kind = "spectrum"
    random_draws: int = 1
    curve_points: int = 101
    resamples: int = 400
    shuffles: int = 999
    seed: int = 0


@dataclass(frozen=True)
class WindowEffect:
    """One window's movement undone in the final model.

    Attributes:
        window: the stretch.
        norm: length of its movement, weight units.
        shares: group -> share of its headroom lost, capped per token; groups with next to no headroom are
            left out.
        damage: group -> mean loss change, nats per token.
        random_shares: group -> mean share lost to random movements of the same norm; empty without draws.
    """

    window: Window
    norm: float
    shares: Mapping[str, float]
    damage: Mapping[str, float]
    random_shares: Mapping[str, float]


@dataclass(frozen=True)
class Dependence:
    """Whether a skill falls with the window of another one and not the other way round.

    Attributes:
        skill: group that falls.
        on: group whose window is undone.
        share: of the skill's headroom lost with the window of ``on``.
        back: of the headroom of ``on`` lost with the window of ``skill``.
        beyond: share minus back, taken anew in every resample of documents.
        random: share of the skill lost to a random movement of the norm of the window of ``on``.
    """

    skill: str
    on: str
    share: Interval
    back: Interval
    beyond: Interval
    random: float

    @property
    def holds(self) -> bool:
        """The skill falls with the other's window, by more than a random movement and than the reverse."""
        return self.beyond.low > 0 and self.share.low > max(self.random, LEAST)


@dataclass(frozen=True)
class Timeline:
    """What was learned when, and what falls when that stretch is undone.

    Attributes:
        steps: (T,) steps of the curves.
        curves: group -> (T,) mean loss, nats.
        learned: group -> step at which half of its fall is done, None where its loss does not fall.
        proposed: group -> window of its fall.
        effects: one a window, in the order equal, doubling, proposed.
        dependences: every ordered pair of groups with a window.
        alignment: agreement of what windows take with when groups were learned: mean over windows and groups
            of the double-centred share beyond random times the double-centred "begins before it is learned".
            None with fewer than two groups that were learned.
        p: of the alignment among shuffled orders of the windows; 1 where nothing can be told.
    """

    steps: tuple[int, ...]
    curves: Mapping[str, tuple[float, ...]]
    learned: Mapping[str, int | None]
    proposed: Mapping[str, Window]
    effects: tuple[WindowEffect, ...]
    dependences: tuple[Dependence, ...]
    alignment: Interval | None
    p: float

    def order(self) -> list[str]:
        """Groups by when they were learned, those without a fall last."""
        return sorted(self.learned, key=lambda name: (self.learned[name] is None, self.learned[name] or 0))

    def own(self, group: str) -> WindowEffect | None:
        """What undoing a group's own window does; None where it has none."""
        found = [e for e in self.effects if e.window.kind == group]
        return found[0] if found else None

    def of_kind(self, kind: str) -> list[WindowEffect]:
        """Effects of the windows of one kind."""
        return [e for e in self.effects if e.window.kind == kind]


def causal_timeline(
    split: EvaluatedSplit,
    series: Checkpoints | None,
    groups: Groups,
    settings: TimelineSettings | None = None,
    *,
    losses: Float[Tensor, "T M"] | None = None,
) -> Timeline:
    """Undo the movement of each window in the final weights of a split.

    Args:
        split: final model and the tokens on which damage is measured.
        series: the recorded checkpoints; None takes the split's own.
        groups: name -> (M,) mask, or the clusters of an observation: labels, POLCA's or interventional.
        settings: windows, controls, draws.
        losses: exact losses of the split's tokens at every checkpoint where they are known already; else
            one forward pass at each of ``settings.curve_points`` checkpoints.

    Raises:
        ValueError: for no group, or masks of other tokens.

    Example:
        >>> timeline = causal_timeline(split, None, tokens.skills)  # doctest: +SKIP
        >>> timeline.own("10s").shares  # doctest: +SKIP
    """
    settings = settings or TimelineSettings()
    series = split.series if series is None else series
    masks = named_groups(groups, split.tokens.count)
    if not masks:
        raise ValueError("a timeline needs at least one group of tokens, got none; give labels or clusters")
    steps, curves = _curves(split, series, masks, settings, losses)
    proposed = proposed_windows(steps, curves, settings.falls)
    windows = equal_windows(series.steps, settings.windows)
    windows += doubling_windows(series.steps) if settings.doubling else []
    windows += list(proposed.values()) if settings.proposed else []
    table = _Table(split, np.stack([m.numpy() for m in masks.values()]), list(masks), settings)
    found = [table.measure(series, window, n) for n, window in enumerate(progress(windows, "timeline"))]
    learned = {name: learned_at(steps, curve) for name, curve in curves.items()}
    alignment, p = aligned(found, learned, table, settings)
    return Timeline(
        tuple(int(s) for s in steps),
        {name: tuple(float(v) for v in curve) for name, curve in curves.items()},
        learned,
        proposed,
        tuple(measured.effect for measured in found),
        dependences(found, table) if settings.proposed else (),
        alignment,
        p,
    )


@dataclass(frozen=True)
class _Measured:
    """One window with its bootstrap draws."""

    effect: WindowEffect
    shares: Shares


@dataclass(frozen=True, eq=False)
class _Table:
    """Tokens, groups and resampled documents that every window shares."""

    split: EvaluatedSplit
    masks: NDArray[np.bool_]
    names: Sequence[str]
    settings: TimelineSettings

    @cached_property
    def headroom(self) -> Array:
        return np.asarray(self.split.headroom.double().numpy())

    @cached_property
    def units(self) -> Units:
        tokens = self.split.tokens
        documents = tokens.documents[tokens.sequence_of].numpy()
        return draw_units(documents, self.settings.resamples, self.settings.seed)

    def measure(self, series: Checkpoints, window: Window, number: int) -> _Measured:
        """Undo one window, and as much of a random movement."""
        at = series.steps.index
        movement = Movement(self.split.theta, series[at(window.start)], series[at(window.end)])
        edit = rollback(movement, window=str(window))
        shares = shares_of(self._change(edit), self.headroom, self.masks, self.units)
        generator = generator_for(self.settings.seed, "timeline", number)
        random = np.array(
            [
                shares_of(self._change(drawn), self.headroom, self.masks, self.units).share[0]
                for drawn in (
                    random_like(
                        movement, edit, generator, kind=self.settings.control, space=self.split.loss.space
                    )
                    for _ in range(self.settings.random_draws if edit.norm > 0 else 0)
                )
            ]
        )
        effect = WindowEffect(
            window,
            edit.norm,
            self._known(shares.share[0], shares),
            dict(zip(self.names, shares.damage[0].tolist(), strict=True)),
            self._known(random.mean(0), shares) if len(random) else {},
        )
        return _Measured(effect, shares)

    def _known(self, values: Array, shares: Shares) -> dict[str, float]:
        """Values of the groups whose headroom is large enough for a share to say something."""
        tiny = shares.judged_in_nats(FLOOR)
        return {
            n: v for n, v, left_out in zip(self.names, values.tolist(), tiny, strict=True) if not left_out
        }

    def _change(self, edit: Edit) -> Array:
        return np.asarray(self.split.changes([edit])[0].numpy())


def _curves(
    split: EvaluatedSplit,
    series: Checkpoints,
    masks: Mapping[str, Tensor],
    settings: TimelineSettings,
    losses: Tensor | None,
) -> tuple[list[int], dict[str, Array]]:
    """Mean loss of every group over the checkpoints, read once and in order."""
    last = len(series) - 1
    count = last + 1 if losses is not None else min(last + 1, max(2, settings.curve_points))
    chosen = sorted({round(i * last / (count - 1)) for i in range(count)})
    paths: dict[str, list[float]] = {name: [] for name in masks}
    for index in chosen:
        found = split.loss.losses(series[index], split.tokens) if losses is None else losses[index]
        for name, mask in masks.items():
            paths[name].append(float(found[mask].double().mean()) if bool(mask.any()) else float("nan"))
    return [series.steps[i] for i in chosen], {name: np.array(path) for name, path in paths.items()}


def dependences(found: Sequence[_Measured], table: _Table) -> tuple[Dependence, ...]:
    """Every ordered pair of groups with a window: what falls with what."""
    names = list(table.names)
    # A group without headroom has no share that could fall.
    own = {m.effect.window.kind: m for m in found if m.effect.window.kind in m.effect.shares}
    units = table.units
    pairs = []
    for on, undone in own.items():
        for skill, other in own.items():
            if skill == on:
                continue
            share = undone.shares.share[:, names.index(skill)]
            back = other.shares.share[:, names.index(on)]
            random = undone.effect.random_shares.get(skill, 0.0)
            pairs.append(
                Dependence(
                    skill,
                    on,
                    units.interval(share),
                    units.interval(back),
                    units.interval(share - back),
                    random,
                )
            )
    return tuple(pairs)


def _centred(matrix: Array) -> Array:
    """Last two axes without their row and column means: what is common to all windows or groups is gone."""
    return np.asarray(
        matrix
        - matrix.mean(-1, keepdims=True)
        - matrix.mean(-2, keepdims=True)
        + matrix.mean((-2, -1), keepdims=True)
    )


def aligned(
    found: Sequence[_Measured],
    learned: Mapping[str, int | None],
    table: _Table,
    settings: TimelineSettings,
) -> tuple[Interval | None, float]:
    """Whether equal windows take the groups learned in or after them; p among shuffled window orders.

    Rows and columns are centred, so neither large windows nor fragile groups count, only which window
    takes which group.
    """
    equal = [m for m in found if m.effect.window.kind == EQUAL]
    known = equal[0].effect.shares if equal else {}
    usable = [g for g, name in enumerate(table.names) if learned[name] is not None and name in known]
    if len(usable) < 2 or len(equal) < 2:
        return None, 1.0
    names = [table.names[g] for g in usable]
    random = np.array([[m.effect.random_shares.get(n, 0.0) for n in names] for m in equal])
    # (R + 1, W, G): shares beyond a random movement's, in the sample and in every resample.
    beyond = _centred(np.stack([m.shares.share[:, usable] for m in equal], axis=1) - random)
    before = _centred(
        np.array([[float(m.effect.window.start < (learned[n] or 0)) for n in names] for m in equal])
    )
    draws = (beyond * before).mean((1, 2))
    generator = np.random.default_rng(settings.seed)
    orders = (generator.permutation(len(equal)) for _ in range(settings.shuffles))
    null = [float((beyond[0][order] * before).mean()) for order in orders]
    p = 1.0 if np.allclose(before, 0) else rank_p(float(draws[0]), null)
    return table.units.interval(draws), p
