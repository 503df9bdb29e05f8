"""Per-token loss change under an edit, and its (sum, count) per group of tokens. Nats per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interventions.edits import Edit
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet, group_means


@dataclass(frozen=True)
class Damage:
    """Loss change per token under one edit.

    Attributes:
        edit: operator, dose and provenance are read off it; rows are not kept alive here.
        before: (M,) loss at the base weights.
        after: (M,) loss at the edited weights.
        headroom: (M,) loss at the reference minus loss at the base: what undoing can cost.
    """

    operator: str
    dose: float
    before: Float[Tensor, " M"]
    after: Float[Tensor, " M"]
    headroom: Float[Tensor, " M"]

    @property
    def change(self) -> Float[Tensor, " M"]:
        """Loss after minus loss before."""
        return self.after - self.before

    def groups(self, groups: Mapping[str, Bool[Tensor, " M"]]) -> dict[str, tuple[float, int]]:
        """(sum, count) of the change per group."""
        return group_means(self.change, groups)


def measure(
    objective: Objective,
    theta: Float[Tensor, " N"],
    edit: Edit,
    tokens: TokenSet,
    *,
    before: Float[Tensor, " M"] | None = None,
    reference_loss: Float[Tensor, " M"] | None = None,
) -> Damage:
    """Loss change of every token under an edit.

    Args:
        objective: the token loss.
        theta: base weights.
        edit: made for theta.
        tokens: where.
        before: losses at theta if already known.
        reference_loss: losses at the edit's reference, for the headroom; zero headroom if absent.
    """
    before = objective.losses(theta, tokens) if before is None else before
    after = objective.losses(edit.apply(theta), tokens)
    headroom = torch.zeros_like(before) if reference_loss is None else reference_loss - before
    return Damage(edit.operator, edit.dose, before, after, headroom)


@dataclass(frozen=True)
class EvaluatedSplit:
    """Tokens with the two ends of a movement and their losses: what every edit is measured against.

    Attributes:
        loss: the token loss.
        series: recorded weights; the last one is edited, the first one is the reference.
        tokens: the split.
    """

    loss: Objective
    series: Checkpoints
    tokens: TokenSet

    @cached_property
    def theta(self) -> Float[Tensor, " N"]:
        """Final weights."""
        return self.series[-1]

    @cached_property
    def reference(self) -> Float[Tensor, " N"]:
        """Weights from which headroom is counted."""
        return self.series[0]

    @cached_property
    def before(self) -> Float[Tensor, " M"]:
        """Loss at the final weights, nats."""
        return self.loss.losses(self.theta, self.tokens)

    @cached_property
    def reference_loss(self) -> Float[Tensor, " M"]:
        """Loss at the reference, nats."""
        return self.loss.losses(self.reference, self.tokens)

    def damage(self, edit: Edit) -> Damage:
        """Loss change of every token under an edit of the final weights."""
        return measure(
            self.loss,
            self.theta,
            edit,
            self.tokens,
            before=self.before,
            reference_loss=self.reference_loss,
        )


def mean(value: Tensor, mask: Tensor) -> float | None:
    """Mean over a mask in float64, None for an empty mask."""
    return float(value[mask].double().mean()) if bool(mask.any()) else None


@dataclass(frozen=True)
class DamageRow:
    """One row of ``damage[]`` in a summary; nats per token.

    Attributes:
        vector: basis vector, or the first of a set.
        cluster: target cluster, None for the vector alone.
        operator: what was done.
        dose: how much of it.
        split: tokens it was measured on.
        on_target: mean over the target.
        off_target: mean over all other tokens.
        off_target_worst: largest mean over the other groups.
        headroom: mean headroom of the target.
        groups: skill -> mean change.
        group_headroom: skill -> mean headroom.
    """

    vector: int
    cluster: int | None
    operator: str
    dose: float
    split: str
    on_target: float | None
    off_target: float | None
    off_target_worst: float | None
    headroom: float | None
    groups: dict[str, float]
    group_headroom: dict[str, float]


def damage_row(
    damage: Damage,
    *,
    vector: int,
    cluster: int | None,
    split: str,
    target: Bool[Tensor, " M"],
    others: Sequence[Bool[Tensor, " M"]],
    groups: Mapping[str, Bool[Tensor, " M"]],
) -> DamageRow:
    """Summarise one damage for a target group.

    Args:
        damage: per-token change.
        vector: see :class:`DamageRow`.
        cluster: see :class:`DamageRow`.
        split: see :class:`DamageRow`.
        target: tokens of the target (all tokens where cluster is None).
        others: other clusters; tokens shared with the target are left out of each.
        groups: skills.
    """
    change = damage.change
    apart = [mean(change, other & ~target) for other in others]
    known = [value for value in apart if value is not None]
    means = {name: mean(change, mask) for name, mask in groups.items()}
    rooms = {name: mean(damage.headroom, mask) for name, mask in groups.items()}
    return DamageRow(
        vector,
        cluster,
        damage.operator,
        damage.dose,
        split,
        mean(change, target),
        mean(change, ~target),
        max(known) if known else None,
        mean(damage.headroom, target),
        {name: value for name, value in means.items() if value is not None},
        {name: value for name, value in rooms.items() if value is not None},
    )
