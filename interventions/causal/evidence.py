"""What is measured for one pair in one run: the only record between measuring and judging."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from interventions.causal.nulls import SpanPool, matched_level, random_changes
from interventions.causal.settings import TestSettings
from interventions.causal.statistics import Array, Bits, Interval, Shares, Units, capped, shares_of
from interventions.damage import EvaluatedSplit
from interventions.edits import Edit, displace, project_out, transplant
from polca_edit.clusters.hypotheses import Hypothesis
from polca_edit.derivatives.lanczos import coordinates

#: Path over displacement from which a movement counts as having come back.
THERE_AND_BACK = 5.0


@dataclass(frozen=True)
class Other:
    """One off-target group.

    Attributes:
        share: of its headroom lost; NaN where it is judged in nats.
        damage: with its interval, nats per token.
        in_nats: whether its headroom is too small for a share.
    """

    share: float
    damage: Interval
    in_nats: bool


@dataclass(frozen=True)
class Insertion:
    """The movement inserted alone into the weights at the window's start (L).

    Attributes:
        gain: share Q of the target's headroom that it brings.
        beyond_others: Q minus the largest share that it brings to another group; groups with next to no
            headroom at the window's start count by the nats they gain, over the target's headroom.
        null95: 95th percentile of Q over random transplants of equal size in the span.
    """

    gain: Interval
    beyond_others: Interval
    null95: float


@dataclass(frozen=True)
class Evidence:
    """One pair in one run, on unseen tokens. Losses in nats per token, shares without unit.

    Attributes:
        tokens: tokens of the group.
        parent: parent that holds most of them, None without one.
        damage: D_C.
        share: n_C.
        headroom: mean G_C.
        in_nats: whether that is too small for shares; leakage is a ratio of damages then.
        random95: 95th percentile of D_C under random edits of equal norm, placement and spectrum.
        leakage: lambda, the largest n_U over n_C, the maximum taken anew in every resample.
        worst: name of the group that loses most besides; empty if there is none.
        others: off-target groups.
        selectivity: n_C minus the largest n_U, on the tokens of the null.
        selectivity_null: the same for directions of the span at the same total damage.
        rest: n_C minus the share lost by the rest of its parent; None where there is no rest.
        rest_share: that share.
        insertion: None where it was left out or there is nothing to gain.
        attributed: attribution A_C, mean over the group, None where there is none.
        displacement: length of the movement, weight units.
        path_ratio: length of the path along the rows over the displacement; large where it came back.
        halfway: D_C where the coordinates are put back to the middle of the path instead of the start.
        joint_damage: D_C under the pair's rows and its partners together, less that under the partners alone.
        joint_gain: Q of rows and partners inserted together.
    """

    tokens: int
    parent: str | None
    damage: Interval
    share: Interval
    headroom: float
    in_nats: bool
    random95: float
    leakage: Interval
    worst: str
    others: Mapping[str, Other]
    selectivity: float
    selectivity_null: tuple[float, ...]
    rest: Interval | None = None
    rest_share: float | None = None
    insertion: Insertion | None = None
    attributed: float | None = None
    displacement: float = 0.0
    path_ratio: float = 1.0
    halfway: float = 0.0
    joint_damage: float | None = None
    joint_gain: float | None = None


@dataclass
class Bench:
    """Everything the pairs of one run share: losses, resampling, parents, pools.

    Attributes:
        split: unseen tokens.
        settings: of the test.
        units: documents of the split, resampled.
        parents: name -> (M,) partition; may be empty.
        tested: name of a tested group -> (M,) members.
        nulls: the split's first documents, on which random edits are measured.
        kept: (M,) tokens of the split that are in ``nulls``.
        paths: pair name -> (T, k) coordinates along its rows.
        pools: basis name -> directions of its span.
    """

    split: EvaluatedSplit
    settings: TestSettings
    units: Units
    parents: Mapping[str, Bits]
    tested: Mapping[str, Bits]
    nulls: EvaluatedSplit
    kept: Bits
    paths: Mapping[str, Array] = field(default_factory=dict)
    pools: dict[str, SpanPool] = field(default_factory=dict)
    _random: dict[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)
    _gains: dict[str, Array] = field(default_factory=dict, repr=False)
    _inserted: dict[tuple[str, float], NDArray[np.float64]] = field(default_factory=dict, repr=False)

    @property
    def headroom(self) -> Array:
        """(M,) nats."""
        return np.asarray(self.split.headroom.double().numpy())

    def change(self, edit: Edit) -> Array:
        """(M,) damage of an edit, computed once."""
        return np.asarray(self.split.damage(edit).change.double().numpy())

    def random(self, edit: Edit) -> NDArray[np.float64]:
        """(draws, M of the nulls) damage of random edits like this one, computed once."""
        if edit.key not in self._random:
            self._random[edit.key] = random_changes(
                self.nulls, edit, self.settings.random_draws, self.settings.seed + 1
            )
        return self._random[edit.key]

    def gain(self, edit: Edit) -> Array:
        """(M,) loss that a transplant takes away, computed once."""
        if edit.key not in self._gains:
            self._gains[edit.key] = np.asarray(self.split.gain(edit).double().numpy())
        return self._gains[edit.key]

    def inserted(self, basis: str, size: float) -> NDArray[np.float64]:
        """(draws, M of the nulls) gains of random transplants of one size in a basis's span, once."""
        if (basis, size) not in self._inserted:
            pool, movement = self.pools[basis], self.nulls.movement
            generator = torch.Generator().manual_seed(self.settings.seed + 2)
            gains = []
            for _ in range(self.settings.transplants):
                mix = torch.randn(len(pool.rows), generator=generator, dtype=torch.float64)
                edit = Edit(movement.source, pool.rows, mix / mix.norm() * size, "transplant_null")
                gains.append(self.nulls.gain(edit).double().numpy())
            self._inserted[basis, size] = np.stack(gains)
        return self._inserted[basis, size]

    def parent_of(self, members: Bits) -> str | None:
        """The parent that holds at least half of a group."""
        held = {
            name: float((mask & members).sum()) / max(1, members.sum()) for name, mask in self.parents.items()
        }
        best = max(held, key=lambda name: held[name], default=None)
        return best if best is not None and held[best] >= 0.5 else None

    def off_target(self, members: Bits, parent: str | None) -> dict[str, Bits]:
        """Other parents and tested groups of other parents, none with tokens of the group or its parent.

        A tested group of the same parent is not off target: what it holds besides that parent are tokens
        of other parents, which are judged whole.
        """
        own = members | self.parents[parent] if parent is not None else members
        groups = {name: mask & ~own for name, mask in self.parents.items() if name != parent}
        for name, mask in self.tested.items():
            if parent is None or self.parent_of(mask) != parent:
                groups.setdefault(name, mask & ~own)
        if not self.parents:
            groups["all other tokens"] = ~members
        return {name: mask for name, mask in groups.items() if mask.sum() >= self.settings.least}


def leakage_draws(found: Shares, in_nats: Bits) -> Array:
    """(R + 1,) largest loss of another group over the target's, the maximum taken in every draw.

    Column 0 is the target. Groups judged in nats enter by damage where the target is judged in nats too.
    """
    values = found.damage if in_nats[0] else found.share
    usable = [g for g in range(1, values.shape[1]) if in_nats[0] or not in_nats[g]]
    if not usable:
        return np.zeros(len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.nanmax(values[:, usable], axis=1) / values[:, 0]
    # Where the target gained in a resample, the ratio means nothing and nothing is excluded.
    return np.asarray(np.where(values[:, 0] > 0, ratio, np.inf))


def selectivity_of(change: Array, headroom: Array, target: Bits, others: Mapping[str, Bits]) -> float:
    """n_C minus the largest n_U of the given tokens."""
    lost, room = capped(change, headroom), np.maximum(headroom, 0.0)

    def share(mask: Bits) -> float:
        total = float(room[mask].sum())
        return float(lost[mask].sum()) / total if total > 0 else 0.0

    return share(target) - max((share(mask) for mask in others.values()), default=0.0)


def measure(bench: Bench, pair: Hypothesis, members: Bits, attributed: Array | None = None) -> Evidence:
    """Everything about one pair in one run.

    Args:
        bench: of the run.
        pair: what is undone.
        members: (M,) its tokens on the unseen split.
        attributed: (M,) loss change that POLCA gives the rows there, if known.
    """
    settings, edit = bench.settings, project_out(bench.split, pair.rows)
    parent = bench.parent_of(members)
    others = bench.off_target(members, parent)
    change = bench.change(edit)
    masks = np.stack([members, *others.values()])
    found = shares_of(change, bench.headroom, masks, bench.units)
    in_nats = found.judged_in_nats(settings.headroom_floor)
    leak = leakage_draws(found, in_nats)
    damage = bench.random(edit)
    inside = members[bench.kept]
    random95 = float(np.percentile(damage[:, inside].mean(1), 95)) if inside.any() else 0.0
    selectivity, null = _selectivity(bench, pair, change, members, others)
    rest, rest_share = _rest_of_parent(bench, change, members, parent)
    values = found.damage[0] if in_nats[0] else np.where(in_nats, -np.inf, found.share[0])
    names = list(others)
    worst = names[int(np.argmax(values[1:]))] if names else ""
    joint_damage, joint_gain = _joint(bench, pair, members)
    ratio, halfway = _path(bench, pair, members)
    return Evidence(
        int(members.sum()),
        parent,
        bench.units.interval(found.damage[:, 0]),
        bench.units.interval(found.share[:, 0]),
        float(found.room[0, 0]),
        bool(in_nats[0]),
        random95,
        bench.units.interval(np.where(np.isfinite(leak), leak, 1e6)),
        worst,
        {
            name: Other(float(found.share[0, i]), bench.units.interval(found.damage[:, i]), bool(in_nats[i]))
            for i, name in enumerate(names, start=1)
        },
        selectivity,
        null,
        rest,
        rest_share,
        _insertion(bench, pair, members, others),
        None if attributed is None else float(attributed[members].mean()),
        edit.norm,
        ratio,
        halfway,
        joint_damage,
        joint_gain,
    )


def _selectivity(
    bench: Bench, pair: Hypothesis, change: Array, members: Bits, others: Mapping[str, Bits]
) -> tuple[float, tuple[float, ...]]:
    """The pair's selectivity on the null's tokens, and that of its span's directions at equal damage."""
    kept, room = bench.kept, bench.headroom[bench.kept]
    target = members[kept]
    there = {name: mask[kept] for name, mask in others.items()}
    own = selectivity_of(change[kept], room, target, there)
    level = matched_level(change[kept], room)
    pool = bench.pools.get(pair.basis)
    # Where undoing the movement costs no token anything there is nothing to match.
    if pool is None or level <= 0 or not target.any():
        return own, ()
    return own, tuple(selectivity_of(c, room, target, there) for c in pool.matched(level))


def _rest_of_parent(
    bench: Bench, change: Array, members: Bits, parent: str | None
) -> tuple[Interval | None, float | None]:
    """n_C - n_rest with the rest's share; None where the group is all of its parent."""
    if parent is None:
        return None, None
    rest = bench.parents[parent] & ~members
    if rest.sum() < bench.settings.least:
        return None, None
    found = shares_of(change, bench.headroom, np.stack([members, rest]), bench.units)
    return bench.units.interval(found.share[:, 0] - found.share[:, 1]), float(found.share[0, 1])


def _insertion(bench: Bench, pair: Hypothesis, members: Bits, others: Mapping[str, Bits]) -> Insertion | None:
    settings, split = bench.settings, bench.split
    room = (split.start_loss - split.before).double().numpy()
    masks = np.stack([members, *others.values()])
    if settings.transplants == 0:
        return None
    gained = bench.gain(transplant(split, pair.rows))
    found = shares_of(gained, room, masks, bench.units)
    in_nats = found.judged_in_nats(settings.headroom_floor)
    if bool(in_nats[0]):
        return None
    # A share of next to no headroom says nothing: such a group counts by its nats over the target's room.
    with np.errstate(invalid="ignore", divide="ignore"):
        counted = np.where(in_nats, found.damage / found.room[:, :1], found.share)
    share = np.nan_to_num(counted, nan=-np.inf)
    beyond = share[:, 0] - np.maximum(share[:, 1:].max(1, initial=0.0), 0.0)
    return Insertion(
        bench.units.interval(found.share[:, 0]),
        bench.units.interval(beyond),
        _transplant_null(bench, pair, members, room),
    )


def _transplant_null(bench: Bench, pair: Hypothesis, members: Bits, room: Array) -> float:
    """95th percentile of Q over random transplants of equal size in the pair's span."""
    pool = bench.pools.get(pair.basis)
    inside = members[bench.kept]
    if pool is None or not pool.possible or not inside.any():
        return 0.0
    size = float(bench.nulls.movement.along(pair.rows).norm())
    gains = bench.inserted(pair.basis, size)
    lost = np.stack([capped(gained, room[bench.kept]) for gained in gains])
    total = np.maximum(room[bench.kept][inside], 0).sum()
    return float(np.percentile(lost[:, inside].sum(1) / total, 95))


def _joint(bench: Bench, pair: Hypothesis, members: Bits) -> tuple[float | None, float | None]:
    """Damage that the rows add once their partners are undone, and Q of all of them inserted."""
    if pair.partners is None:
        return None, None
    both = torch.cat([pair.rows, pair.partners])
    together = bench.change(project_out(bench.split, both))[members].mean()
    alone = bench.change(project_out(bench.split, pair.partners))[members].mean()
    room = (bench.split.start_loss - bench.split.before).double().numpy()
    gained = capped(bench.split.gain(transplant(bench.split, both)).double().numpy(), room)
    total = float(np.maximum(room[members], 0).sum())
    return float(together - alone), float(gained[members].sum()) / total if total > 0 else None


def recorded_paths(split: EvaluatedSplit, pairs: Sequence[Hypothesis]) -> dict[str, Array]:
    """Pair name -> (T, k) coordinates along its rows inside the window, from one reading of the series."""
    first, last = split.window or (split.series.steps[0], split.series.steps[-1])
    start = split.movement.start
    found: dict[str, list[Array]] = {pair.name: [] for pair in pairs}
    for index, step in enumerate(split.series.steps):
        if first <= step <= last:
            moved = split.series[index] - start
            for pair in pairs:
                found[pair.name].append(coordinates(pair.rows, moved).numpy())
    return {name: np.stack(points) for name, points in found.items()}


def _path(bench: Bench, pair: Hypothesis, members: Bits) -> tuple[float, float]:
    """Path length over net displacement along the rows, and the damage of going back to its far end."""
    points = bench.paths[pair.name]
    length = float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())
    net = float(np.linalg.norm(points[-1] - points[0]))
    # A loop that closes up to rounding has no net displacement to speak of.
    closed = net <= 1e-12 * length
    ratio = (math.inf if length > 0 else 1.0) if closed else length / net
    if ratio <= THERE_AND_BACK:
        return ratio, 0.0
    far = int(np.linalg.norm(points - points[-1], axis=1).argmax())
    edit = displace(bench.split, pair.rows, (points[far] - points[-1]).tolist(), "halfway")
    return ratio, float(bench.change(edit)[members].mean())
