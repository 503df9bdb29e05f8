"""Rows of ``damage[]`` and ``controls[]`` in a summary: damage for one target group, nats per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from experiments.run.summary.records import ControlRow, DamageRow
from interventions.damage import Damage


def mean(value: Tensor, mask: Tensor) -> float | None:
    """Mean over a mask in float64, None for an empty mask."""
    return float(value[mask].double().mean()) if bool(mask.any()) else None


@dataclass(frozen=True)
class DamageRecord:
    """Exploratory damage of one basis on the select split."""

    damage: tuple[DamageRow, ...]
    controls: tuple[ControlRow, ...]


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
