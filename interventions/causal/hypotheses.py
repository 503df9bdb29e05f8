"""Which pairs are tested beside POLCA's own: groups with the vector that hurts them most on select."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from polca_edit.basis.record import Basis
from polca_edit.clusters.hypotheses import FAMILIES, Hypothesis, TokenGroup, Unchosen

__all__ = ["FAMILIES", "Hypothesis", "TokenGroup", "Unchosen", "hardest_hit"]


def hardest_hit(
    shares: Mapping[str, Sequence[float]],
    groups: Mapping[str, TokenGroup],
    basis: Basis,
    *,
    basis_name: str,
    family: str,
    clusters: Mapping[str, int] | None = None,
) -> list[Hypothesis]:
    """Groups, each with the vector whose undoing costs it most on select.

    Args:
        shares: group -> share of its headroom that undoing each of the K vectors costs, on select.
        groups: the same groups, as they are found again on unseen tokens.
        basis: K vectors.
        basis_name: what it is called in records.
        family: of the pairs, one of :data:`FAMILIES`.
        clusters: group -> number of its cluster, where it is one.
    """
    chosen = []
    for name, lost in shares.items():
        vector = int(torch.tensor(list(lost)).nan_to_num(-torch.inf).argmax())
        group = groups[name]
        chosen.append(
            Hypothesis(
                f"{basis_name} {vector} | {name}",
                basis.rows[vector][None],
                group,
                family,
                basis_name,
                (vector,),
                (clusters or {}).get(name),
                span=basis.rows,
                supervised=basis.supervised,
                why=f"of all vectors, undoing it costs '{group.name}' most on select ({lost[vector]:.2f})",
            )
        )
    return chosen
