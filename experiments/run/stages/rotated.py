"""A basis turned inside its span: fitted on stored select projections, with no model at hand."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from experiments.config import BasisConfig, Rotation
from polca_edit.allocation.allocate import Projections
from polca_edit.basis import rotate as rotations
from polca_edit.basis.record import Basis
from polca_edit.tokens import TokenSet

#: Enough for the angles to settle at the sizes of a run.
JACOBI: dict[str, Any] = {"sweeps": 30, "tolerance": 1e-6}


def fit_rotation(
    rotation: Rotation, matrices: Tensor, select: TokenSet, seed: int, skill: str | None = None
) -> Tensor:
    """(K, K) rotation by name, from the (M, K, K) allocation matrices of the select split.

    Raises:
        ValueError: for a contrastive rotation of a skill the tokens do not know.
    """
    table = matrices.diagonal(dim1=1, dim2=2)
    if rotation in ("varimax", "quartimax"):
        return rotations.orthomax(table, "varimax" if rotation == "varimax" else "quartimax")
    if rotation == "fastica":
        return rotations.independent_components(table, seed=seed)
    if rotation == "contrastive":
        if skill is None or skill not in select.skills:
            raise ValueError(
                f"skill of a contrastive rotation must be one of {sorted(select.skills)}, got '{skill}'"
            )
        return rotations.contrastive(matrices, select.skills[skill])
    centred = rotation in ("joint_centred", "joint_normalised")
    normalised = rotation == "joint_normalised"
    return rotations.joint_diagonalisation(matrices, centred=centred, normalised=normalised, **JACOBI)


def turned(
    spec: BasisConfig, basis: Basis, projections: Projections, select: TokenSet, seed: int
) -> tuple[Basis, Projections]:
    """The rotated basis and its projections; residual parts are those of the span and stay."""
    matrices = rotations.allocation_matrices(projections)
    rotation = fit_rotation(spec.rotation, matrices, select, seed, spec.skill)
    supervised = spec.rotation == "contrastive"
    return (
        basis.rotated(rotation, f"{spec.kind}_{spec.rotation}", supervised=supervised),
        projections.rotated(rotation),
    )
