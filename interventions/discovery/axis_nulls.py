"""What an axis is compared with: the same search for token sets that mean nothing, other spans, a free edit.

A search finds something for any target. So the same search, on the same measured directions, is made for
random token sets that have a rule (the top of a random mixture of input features) and the target's size,
loss and headroom. A target that is a whole parent (a digit) is compared with sets that cut across parents;
one inside a parent (carry of a digit) with sets inside it, by what it loses beyond the rest of its parent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interventions.causal.statistics import Array, Bits, rank_p
from interventions.controls import describable_set, feature_table, random_like
from interventions.damage import EvaluatedSplit
from interventions.discovery.axes import score_gradient
from interventions.discovery.search import AxisTarget, DirectionLibrary, Scores, ScoreSettings
from interventions.edits import Edit, from_delta
from polca_edit.basis.record import Basis, random_basis, unlabelled
from polca_edit.derivatives.lanczos import lengths, orthonormalise
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet

#: Candidates drawn for every null set that is kept: those nearest in loss and headroom are.
CANDIDATES = 4


@dataclass(frozen=True)
class AxisNull:
    """A target's axis among the axes of null sets, on unseen tokens.

    Attributes:
        value: statistic of the target: share less the worst other's, or less the rest of the parent's.
        p: its rank among the null sets.
        p95: 95th percentile of the null sets' statistic.
        null: statistic of each null set.
    """

    value: float
    p: float
    p95: float
    null: tuple[float, ...]


def null_sets(
    search: EvaluatedSplit,
    unseen: EvaluatedSplit,
    target: tuple[AxisTarget, AxisTarget],
    parents: Mapping[str, tuple[Bits, Bits]],
    count: int,
    *,
    seed: int = 0,
) -> list[tuple[AxisTarget, AxisTarget]]:
    """Describable random token sets like a target, on both splits by the same rule.

    Args:
        search: tokens of the search.
        unseen: tokens of the judgement.
        target: on both.
        parents: name -> (M,) members on both; may be empty.
        count: sets wanted.
        seed: of the mixtures.

    Raises:
        ValueError: if the tokens carry no features.
    """
    own = target[0]
    table = _joint_table(search.tokens, unseen.tokens)
    split_at = search.tokens.count
    inside = own.rest is not None
    within = None
    if own.rest is not None and target[1].rest is not None:
        within = np.concatenate([own.members | own.rest, target[1].members | target[1].rest])
    size = int(own.members.sum() + target[1].members.sum())
    generator = np.random.default_rng([seed, len(own.members), int(own.members.sum())])
    room = np.maximum(search.headroom.double().numpy(), 0.0)
    loss = search.before.double().numpy()
    candidates: list[Bits] = []
    distances: list[float] = []
    for _ in range(CANDIDATES * count):
        drawn = describable_set(table, size, generator, within)
        near = drawn[:split_at]
        if not room[near].sum() > 0 or near.all():
            continue
        candidates.append(drawn)
        distances.append(_distance(room, near, own.members) + _distance(loss, near, own.members))
    kept = np.argsort(distances, kind="stable")[:count]
    sets = []
    for number, index in enumerate(kept):
        halves = candidates[index][:split_at], candidates[index][split_at:]
        made = []
        for side, members in enumerate(halves):
            if inside:
                rest = target[side].rest
                whole = target[side].members if rest is None else target[side].members | rest
                others = {name: mask for name, mask in target[side].others.items() if (mask & ~whole).any()}
                made.append(AxisTarget(f"null {number}", members, others, whole & ~members))
            else:
                groups = {name: masks[side] & ~members for name, masks in parents.items()}
                groups = {name: mask for name, mask in groups.items() if mask.any()}
                made.append(AxisTarget(f"null {number}", members, groups or {"others": ~members}))
        sets.append((made[0], made[1]))
    return sets


def _joint_table(one: TokenSet, two: TokenSet) -> Array:
    """Features of both token sets in the same columns."""
    shared = [name for name in one.features if name in two.features]
    return feature_table(
        {
            name: np.concatenate([np.asarray(one.features[name]), np.asarray(two.features[name])])
            for name in shared
        }
    )


def _distance(values: Array, one: Bits, two: Bits) -> float:
    """Difference of two sets' means in standard deviations of the values."""
    return float(abs(values[one].mean() - values[two].mean()) / max(float(values.std()), 1e-12))


def statistic(
    targets: Sequence[AxisTarget], units: Float[Tensor, "S K"], library: DirectionLibrary
) -> list[float]:
    """Per target: share less the worst other group's, or less the rest of the parent's where it has one.

    Args:
        targets: on the tokens of the library's split.
        units: one direction a target; measured here, one forward pass each.
        library: of the unseen tokens; nothing is searched on it.
    """
    scores = Scores(targets, library.room.numpy(), ScoreSettings())
    first = len(library.units)
    library.measure(units)
    shares = scores.shares(library.capped[first:])
    values = []
    for i in range(len(targets)):
        own = float(shares[i, scores.own[i]])
        against = scores.rest[i] if bool(scores.rest[i].any()) else scores.others[i]
        values.append(own - float(shares[i][against].max()))
    return values


def ranked(value: float, null: Sequence[float]) -> AxisNull:
    """A target's statistic among those of its null sets."""
    return AxisNull(value, rank_p(value, null), float(np.percentile(null, 95)), tuple(null))


@dataclass(frozen=True)
class FreeSettings:
    """The contrast without the undo constraint.

    Attributes:
        steps: of gradient ascent in all weights.
        rate: step length, as a share of the norm.
    """

    steps: int = 12
    rate: float = 0.5


def free_edit(
    split: EvaluatedSplit,
    target: AxisTarget,
    norm: float,
    weights: ScoreSettings | None = None,
    settings: FreeSettings | None = None,
) -> Edit:
    """A rank-one edit of a given norm with the best score found, anywhere in weight space.

    Args:
        split: tokens of the search.
        target: on them.
        norm: length, weight units; that of the undone movement it is compared with.
        weights: of the score, as for the axis.
        settings: of the ascent.
    """
    settings = settings or FreeSettings()
    scores = Scores([target], split.headroom.double().clamp_min(0).numpy(), weights or ScoreSettings())
    moved = torch.zeros_like(split.theta)
    best, reached = moved, -np.inf
    for step in range(settings.steps + 1):
        value, gradient = score_gradient(split, scores, split.theta + moved)
        if value > reached and step:
            best, reached = moved, value
        rate = 1.0 if step == 0 else settings.rate * (1 - step / (settings.steps + 1))
        pushed = moved + gradient * (rate * norm / max(float(lengths(gradient[None])), 1e-30))
        moved = pushed * (norm / max(float(lengths(pushed[None])), 1e-30))
    return from_delta(split.movement.base, best, "free", provenance={"target": target.name})


def null_span(
    split: EvaluatedSplit, basis: Basis, generator: torch.Generator, *, rotated: bool, space: ParameterSpace
) -> Basis:
    """Another span of equal rank: random, or every row turned inside its weight matrices.

    Args:
        split: whose weights are edited.
        basis: K rows.
        generator: of the draw.
        rotated: keep the norm in every tensor and the singular values of every matrix of each row.
        space: parameters.
    """
    if not rotated:
        return random_basis(space.size, len(basis), generator, dtype=basis.rows.dtype)
    drawn = [
        random_like(split, from_delta(split.movement.base, row, "row"), generator, space=space).delta()
        for row in basis.rows
    ]
    return unlabelled("rotated_rows", orthonormalise(torch.stack(drawn)))
