"""Which pairs are tested beside POLCA's own: known skills with the vector that hurts them most on select."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from polca_edit.basis.record import Basis
from polca_edit.clusters.hypotheses import FAMILIES, Hypothesis, TokenGroup, Unchosen

__all__ = ["FAMILIES", "Hypothesis", "TokenGroup", "Unchosen", "skill_hypotheses"]


def skill_hypotheses(
    shares: Mapping[str, Sequence[float]], basis: Basis, *, basis_name: str
) -> list[Hypothesis]:
    """Known skills, each with the vector whose undoing costs it most on select.

    Args:
        shares: skill -> share of its headroom that undoing each of the K vectors costs, on select.
        basis: K vectors.
        basis_name: what it is called in records.
    """
    chosen = []
    for skill, lost in shares.items():
        vector = int(torch.tensor(list(lost)).nan_to_num(-torch.inf).argmax())
        chosen.append(
            Hypothesis(
                f"{basis_name} {vector} | {skill}",
                basis.rows[vector][None],
                TokenGroup(skill, skill=skill),
                "skill",
                basis_name,
                (vector,),
                span=basis.rows,
                supervised=basis.supervised,
                why=f"of all vectors, undoing it costs '{skill}' most on select ({lost[vector]:.2f})",
            )
        )
    return chosen
