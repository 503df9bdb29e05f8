"""Skill axes: the direction of a span whose own undone movement takes one group of tokens and nothing else.

The unit vector u of span(B) that maximises the capped damage on the target less that of the other groups
when *its own* movement is undone, theta - u <u, theta_end - theta_start>. Only recorded movement can be
undone, which is what makes the axis say something about training; a free edit of the same size works
almost anywhere (Wang & Veitch, arXiv 2410.08827, make that point for probes).

A pooled search on a surrogate finds where to look (:mod:`interventions.discovery.search`); Adam on the
true losses, in the K coordinates of the span, finishes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interventions.causal.statistics import Interval, draw_units, shares_of
from interventions.damage import EvaluatedSplit, Groups, named_groups
from interventions.discovery.search import (
    AxisTarget,
    DirectionLibrary,
    Scores,
    ScoreSettings,
    SearchSettings,
    pooled_search,
)
from interventions.edits import Edit, project_out
from polca_edit.allocation.progress import progress
from polca_edit.basis.record import Basis, unlabelled
from polca_edit.derivatives.lanczos import coordinates
from polca_edit.seeds import generator_for

#: Further axes of one skill, at the most: each is orthogonal to those before it.
MOST_AXES = 4
#: Weight of what another group loses above a limit that was asked for.
HARD = 10.0


@dataclass(frozen=True)
class AxisSettings:
    """How an axis is searched.

    Attributes:
        search: the pooled search; null sets get the same.
        further: rounds of it for the targets alone, after the comparison with null sets is fixed.
        score: what is maximised.
        limit: share that any other group may lose at the most; None weighs leakage as ``score`` says.
        refine: steps on the true losses at the end, two forward passes and one backward pass each.
        rate: step length of these (Adam, on vectors of length one).
        rank: axes, each orthogonal to those before it, at most :data:`MOST_AXES`.
        crossed: search on halves of the documents and average the two axes.
        seed: of the halves.
    """

    search: SearchSettings = field(default_factory=SearchSettings)
    score: ScoreSettings = field(default_factory=ScoreSettings)
    further: int = 4
    limit: float | None = None
    refine: int = 20
    rate: float = 0.05
    rank: int = 1
    crossed: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MOST_AXES:
            raise ValueError(f"rank must be 1 to {MOST_AXES}, got {self.rank}; further axes say little")

    @property
    def weights(self) -> ScoreSettings:
        """The score with the limit in it."""
        if self.limit is None:
            return self.score
        return replace(self.score, tolerated=self.limit, excess=HARD)


@dataclass(frozen=True, eq=False)
class SkillAxis:
    """The axes of one group of tokens in one span.

    Attributes:
        target: name of the group.
        basis: rank rows (k, N), marked supervised: the group went into them.
        units: (k, K) the same in the span's own coordinates.
        along: (k,) recorded movement along each, weight units.
        score: of the first axis on the tokens of the search.
        shares: group -> share lost on the tokens of the search with the first axis undone.
        searched: (K,) the direction found by the search that null sets got too: what they are compared with.
        crossed: share of the target lost on the half of the documents that an axis was not searched on,
            mean of both halves; None where it was not cross-fitted.
    """

    target: str
    basis: Basis
    units: Float[Tensor, "k K"]
    along: Float[Tensor, " k"]
    score: float
    shares: Mapping[str, float]
    searched: Float[Tensor, " K"]
    base: str
    crossed: float | None = None

    @cached_property
    def edit(self) -> Edit:
        """The first axis's own movement undone: an ordinary edit of the final weights."""
        rows = self.basis.rows[:1]
        return Edit(self.base, rows, -self.along[:1], "project_out", provenance={"axis": self.target})

    def joint(self, split: EvaluatedSplit) -> Edit:
        """The movement along all axes undone at once."""
        return project_out(split, self.basis, axis=self.target)


def axis_target(
    split: EvaluatedSplit,
    target: str | Bool[Tensor, " M"],
    others: Groups | None = None,
    *,
    name: str = "target",
    parent: Bool[Tensor, " M"] | None = None,
) -> AxisTarget:
    """A target on the tokens of a split, with what must be left alone.

    Args:
        split: its tokens.
        target: (M,) mask, or the name of a known skill.
        others: off-target groups; tokens of the target (and of its parent) are taken out of them, groups
            left empty are dropped. None: all other tokens as one group.
        name: of a target given as a mask.
        parent: (M,) group that the target is a part of; its rest is reported and weighed apart.

    Raises:
        ValueError: for an unknown skill, an empty target, or a target that is every token.
    """
    tokens = split.tokens
    if isinstance(target, str):
        if target not in tokens.skills:
            raise ValueError(
                f"a target must be a mask or a known skill, one of {sorted(tokens.skills)[:8]}, "
                f"got '{target}'"
            )
        name, target = target, tokens.skills[target]
    members = named_groups({name: target}, tokens.count)[name].numpy().astype(bool)
    if not 0 < members.sum() < len(members):
        raise ValueError(
            f"a target must hold some tokens and not all, '{name}' holds {members.sum()} of {len(members)}"
        )
    rest = None
    if parent is not None:
        rest = named_groups({"parent": parent}, tokens.count)["parent"].numpy() & ~members
    own = members if rest is None else members | rest
    groups = named_groups(others, tokens.count) if others is not None else {}
    apart = {key: mask.numpy().astype(bool) & ~own for key, mask in groups.items()}
    apart = {key: mask for key, mask in apart.items() if mask.any()}
    if not apart:
        apart = {"all other tokens": ~own} if not own.all() else {"rest of parent": ~members}
    return AxisTarget(name, members, apart, rest if rest is not None and rest.any() else None)


def skill_axis(
    split: EvaluatedSplit,
    basis: Basis,
    target: str | Bool[Tensor, " M"],
    others: Groups | None = None,
    settings: AxisSettings | None = None,
    *,
    parent: Bool[Tensor, " M"] | None = None,
) -> SkillAxis:
    """The axis of a span whose own undone movement takes a group of tokens and leaves the others.

    Args:
        split: tokens of the search (select, never the unseen ones).
        basis: K orthonormal rows with movement to undo.
        target: (M,) mask, or the name of a known skill.
        others: groups that must be left alone; None: all other tokens.
        settings: how hard to look, what leakage costs, how many axes.
        parent: (M,) group that the target is a part of; its rest is weighed less.

    Raises:
        ValueError: for a target without headroom, or a span without movement.

    Example:
        >>> axis = skill_axis(split, basis, "10s", digits)  # doctest: +SKIP
        >>> unseen_split.damage(axis.edit).share_by(digits)  # doctest: +SKIP
    """
    settings = settings or AxisSettings()
    if settings.crossed:
        return _crossed(split, basis, target, others, settings, parent)
    aim = axis_target(split, target, others, parent=parent)
    return find_axes(DirectionLibrary(split, basis.rows), [aim], settings)[0]


def find_axes(
    library: DirectionLibrary,
    targets: Sequence[AxisTarget],
    settings: AxisSettings,
    nulls: Sequence[AxisTarget] = (),
) -> list[SkillAxis]:
    """Axes of many targets, searched together: every measured direction serves them all.

    Rank one is all that undoing can use; further axes say how many directions hurt the target by themselves.

    Args:
        library: span and tokens; it grows.
        targets: on the library's tokens.
        settings: of the search.
        nulls: further sets that take part in the pooled search; none of them is refined. Their directions
            come from :func:`searched`.
    """
    scores = Scores([*targets, *nulls], library.room.numpy(), settings.weights)
    compared, _ = pooled_search(library, scores, settings.search)
    alone = Scores(targets, library.room.numpy(), settings.weights)
    units, _ = pooled_search(library, alone, replace(settings.search, rounds=settings.further))
    found = []
    for number, target in enumerate(progress(targets, "axes")):
        own = Scores([target], library.room.numpy(), settings.weights)
        axes: list[Tensor] = [refined(library, own, units[number], settings)]
        for _ in range(1, settings.rank):
            off = torch.stack(axes)
            further, _ = pooled_search(library, own, settings.search, off=off)
            axes.append(refined(library, own, further[0], settings, off=off))
        found.append(_axis(library, target, own, torch.stack(axes), compared[number]))
    return found


def searched(
    library: DirectionLibrary, targets: Sequence[AxisTarget], weights: ScoreSettings
) -> Float[Tensor, "S K"]:
    """The best measured direction of each target; nothing new is measured."""
    scores = Scores(targets, library.room.numpy(), weights)
    shares = scores.shares(library.capped)
    best = [int(scores.of(shares, torch.full((len(shares),), i)).argmax()) for i in range(len(targets))]
    return library.units[best]


def _axis(
    library: DirectionLibrary, target: AxisTarget, own: Scores, units: Tensor, start: Tensor
) -> SkillAxis:
    along = units @ library.along
    rows = units.to(library.rows) @ library.rows
    change = library.split.damage(library.edit(units[0])).change.double()
    capped = torch.minimum(change, library.room)
    groups = {target.name: target.members, **target.others}
    if target.rest is not None:
        groups["rest of parent"] = target.rest
    masks = {name: torch.from_numpy(mask) for name, mask in groups.items()}
    shares = {n: float(capped[m].sum() / library.room[m].sum().clamp_min(1e-12)) for n, m in masks.items()}
    score = float(own.of(own.shares(capped[None]), torch.zeros(1, dtype=torch.long))[0])
    basis = replace(unlabelled(f"axis:{target.name}", rows), supervised=True)
    base = library.split.movement.base
    return SkillAxis(target.name, basis, units, along, score, shares, start, base)


def score_gradient(
    split: EvaluatedSplit, scores: Scores, theta: Float[Tensor, " N"]
) -> tuple[float, Float[Tensor, " N"]]:
    """The score of the first target at edited weights, and its gradient in all weights."""
    change = (split.loss.losses(theta, split.tokens) - split.before).double().requires_grad_()
    with torch.enable_grad():
        capped = torch.minimum(change, split.headroom.double().clamp_min(0))
        value = scores.of(scores.shares(capped[None]), torch.zeros(1, dtype=torch.long))[0]
        (weights,) = torch.autograd.grad(value, change)
    return float(value.detach()), split.loss.mean_gradient(theta, split.tokens, weights)[1].cpu()


def refined(
    library: DirectionLibrary,
    scores: Scores,
    unit: Float[Tensor, " K"],
    settings: AxisSettings,
    *,
    off: Float[Tensor, "k K"] | None = None,
) -> Float[Tensor, " K"]:
    """Adam on the true score in the K coordinates, from a direction; the best one on the way is kept."""
    raw = unit.clone().double()
    best, reached = unit.double(), -np.inf
    adam = torch.optim.Adam([raw], lr=settings.rate)
    for step in range(settings.refine):
        for group in adam.param_groups:
            group["lr"] = settings.rate * (1 - step / settings.refine)
        with torch.enable_grad():
            leaf = raw.clone().requires_grad_()
            free = leaf if off is None else leaf - leaf @ off.T @ off
            direction = free / free.norm()
            place = direction * (direction @ library.along)
        moved = library.edit(direction.detach()).moved(library.split.theta)
        value, gradient = score_gradient(library.split, scores, moved)
        if value > reached:
            best, reached = direction.detach(), value
        # The edit takes place @ rows off the weights, hence the sign; Adam descends, hence the other.
        (raw.grad,) = torch.autograd.grad(place, leaf, coordinates(library.rows, gradient))
        adam.step()
    return best


def _crossed(
    split: EvaluatedSplit,
    basis: Basis,
    target: str | Tensor,
    others: Groups | None,
    settings: AxisSettings,
    parent: Tensor | None,
) -> SkillAxis:
    """Axes of two halves of the documents, averaged; each is also judged on the other half."""
    aim = axis_target(split, target, others, parent=parent)
    tokens = split.tokens
    names = tokens.documents.unique()
    order = names[torch.randperm(len(names), generator=generator_for(settings.seed, "halves"))]
    first = torch.isin(tokens.documents, order[: len(order) // 2])
    halves = [split.on(tokens.select(rows)) for rows in (first, ~first)]
    aims = [narrowed(aim, rows[tokens.sequence_of].numpy()) for rows in (first, ~first)]
    plain = replace(settings, crossed=False)
    found = [
        find_axes(DirectionLibrary(h, basis.rows), [a], plain)[0] for h, a in zip(halves, aims, strict=True)
    ]
    judged = [
        halves[1 - i].damage(axis.edit).share_by({aim.name: torch.from_numpy(aims[1 - i].members)})[aim.name]
        for i, axis in enumerate(found)
    ]
    one, two = (axis.units for axis in found)
    signs = torch.sign((one * two).sum(1, keepdim=True))
    mean = torch.linalg.qr((one + torch.where(signs == 0, 1.0, signs) * two).T)[0].T
    library = DirectionLibrary(split, basis.rows)
    own = Scores([aim], library.room.numpy(), settings.weights)
    return replace(_axis(library, aim, own, mean, mean[0]), crossed=float(np.mean(judged)))


def narrowed(target: AxisTarget, kept: np.ndarray) -> AxisTarget:
    """The same target where only some tokens are looked at."""
    others = {name: mask[kept] for name, mask in target.others.items() if mask[kept].any()}
    rest = None if target.rest is None or not target.rest[kept].any() else target.rest[kept]
    return AxisTarget(target.name, target.members[kept], others, rest)


@dataclass(frozen=True)
class AxisEffect:
    """What undoing an axis does on tokens that it was not searched on; 95 % intervals over documents.

    Attributes:
        share: of the target's headroom lost, capped per token.
        damage: mean loss change of the target, nats per token.
        worst: name of the other group that loses most.
        worst_other: the largest share lost by another group, the maximum taken anew in every resample.
        rest_of_parent: share lost by the rest of the target's parent; None without one.
        groups: other group -> share lost.
    """

    share: Interval
    damage: Interval
    worst: str
    worst_other: Interval
    rest_of_parent: Interval | None
    groups: Mapping[str, float]


def measured(
    edit: Edit | SkillAxis, split: EvaluatedSplit, target: AxisTarget, *, resamples: int = 1000, seed: int = 0
) -> AxisEffect:
    """What an axis (or any edit) does to a target and to what must be left alone.

    Args:
        edit: of the split's final weights; of an axis the first one is undone.
        split: tokens, unseen ones for a number that is reported.
        target: on these tokens.
        resamples: document bootstrap.
        seed: of the bootstrap.
    """
    edit = edit.edit if isinstance(edit, SkillAxis) else edit
    tokens = split.tokens
    units = draw_units(tokens.documents[tokens.sequence_of].numpy(), resamples, seed)
    masks = [target.members, *target.others.values(), *([] if target.rest is None else [target.rest])]
    change = split.damage(edit).change.double().numpy()
    found = shares_of(change, split.headroom.double().numpy(), np.stack(masks), units)
    names = list(target.others)
    off = found.share[:, 1 : 1 + len(names)]
    return AxisEffect(
        units.interval(found.share[:, 0]),
        units.interval(found.damage[:, 0]),
        names[int(np.nan_to_num(off[0], nan=-np.inf).argmax())],
        units.interval(np.fmax.reduce(off, axis=1)),
        None if target.rest is None else units.interval(found.share[:, -1]),
        dict(zip(names, off[0].tolist(), strict=True)),
    )
