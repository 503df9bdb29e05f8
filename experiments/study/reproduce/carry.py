"""The carry label as the paper scores it: which places count, the best cluster, and damage by group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polca_edit.clusters.agreement import SkillScores, carry_scores
from polca_edit.clusters.density import VectorClusters
from polca_edit.tokens import TokenSet

#: The label, and the skills whose tokens count for the 85 % rule.
CARRY, COUNTED = "carry", ("100s", "10s")


@dataclass(frozen=True)
class GroupDamage:
    """Mean loss change in nats per token; None where a group is empty.

    Attributes:
        carry: tokens at the counted places with a carry.
        no_carry: tokens there without one.
        other_places: all others.
    """

    carry: float | None
    no_carry: float | None
    other_places: float | None


def counted_places(tokens: TokenSet) -> Bool[Tensor, " M"]:
    """Tokens at the places that count: where the digit is not the carry itself."""
    return torch.stack([tokens.skills[name] for name in COUNTED]).any(0)


def eligible_clusters(
    clusters: Sequence[VectorClusters], tokens: TokenSet, min_share: float = 0.03
) -> list[SkillScores]:
    """Eligible carry clusters of every vector, most homogeneous first."""
    return carry_scores(clusters, tokens.skills[CARRY], counted_places(tokens), min_share=min_share)


def group_damage(change: Float[Tensor, " M"], tokens: TokenSet) -> GroupDamage:
    """Loss change with and without a carry at the counted places, and elsewhere."""
    counted, carry = counted_places(tokens), tokens.skills[CARRY]

    def mean(mask: Tensor) -> float | None:
        return float(change[mask].double().mean()) if bool(mask.any()) else None

    return GroupDamage(mean(counted & carry), mean(counted & ~carry), mean(~counted))
