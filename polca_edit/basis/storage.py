"""Rows of a basis in fewer bits, with the error that this makes.

Rounding moves every row a little. What the rounded rows say of themselves stays true: slopes, coordinates
and residual directions are all taken of them, so an allocation still adds up to the exact loss change. What
changes is which rows they are, and that is measured here and kept in the record.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from polca_edit.basis.record import Basis, Rounding, gram_error
from polca_edit.basis.subsets import Directions
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet

STORAGES = ("float32", "bfloat16", "float16")
#: Rows of which slopes are taken at once.
AT_ONCE = 4


def stored_as(
    basis: Basis, storage: str, objective: Objective, theta: Float[Tensor, " N"], tokens: TokenSet
) -> Basis:
    """A basis with its entries in fewer bits, and its rounding; ``float32`` leaves it as it is.

    Slopes are compared on one batch of tokens at one place: 2 K directional derivatives.

    Args:
        basis: as it was computed.
        storage: type of the stored numbers.
        objective: the token loss.
        theta: weights at which slopes are compared.
        tokens: a sample; its first batch is used.

    Raises:
        ValueError: for another type, or rows that it rounds to something that is no basis.
    """
    if storage == "float32":
        return basis
    if storage not in STORAGES:
        raise ValueError(f"storage must be one of {list(STORAGES)}, got '{storage}'; correct the name")
    rounded = replace(basis, entries=basis.entries.to(getattr(torch, storage)))
    error = gram_error(rounded.entries)
    if not error <= 1e-2:
        raise ValueError(
            f"rows of '{basis.kind}' in {storage} miss being orthonormal by {error:.3g}; keep float32"
        )
    few = tokens.select(torch.arange(min(objective.batch_size, tokens.sequences)))
    worst = 0.0
    for first in range(0, len(basis), AT_ONCE):
        some = slice(first, first + AT_ONCE)
        exact = basis.entries[some]
        shift = rounded.entries[some].to(exact) - exact
        pair = Directions.of(torch.cat([exact, shift]).to(theta), basis.inside)
        slopes = objective.directional(theta, pair, few)[1].abs().amax(1).double()
        sizes, errors = slopes.split(len(exact))
        worst = max(worst, float((errors / sizes.clamp_min(1e-300)).max()))
    return replace(rounded, rounding=Rounding(storage, error, worst))
