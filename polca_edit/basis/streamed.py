"""Trajectory vectors without all displacements in memory: a small Gram matrix over streamed checkpoints.

Only a few displacements are held at a time. Vectors are combinations of displacements, so what is kept of
them is a K x (T-1) coefficient matrix, and their rows are added up in one more pass over the series.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import Allocate, gram

#: Displacements held beside the one that streams past.
HELD = 4
#: Columns of which a float64 copy is made at a time.
WIDTH = 1 << 18
#: The same for products, where both copies fit into a processor's cache: by half faster.
PRODUCT_WIDTH = 1 << 15


def displacements(
    checkpoints: Checkpoints, mask: Bool[Tensor, " N"] | None = None, first: int = 1
) -> Iterator[tuple[int, Float[Tensor, " n"]]]:
    """(index, theta_t - theta_0 inside the mask) for t = first .. T-1, one at a time."""
    origin = _inside(checkpoints[0], mask).clone()
    for index in range(first, len(checkpoints)):
        yield index, _inside(checkpoints[index], mask) - origin


def _inside(theta: Tensor, mask: Tensor | None) -> Tensor:
    return theta if mask is None else theta[mask]


def displacement_gram(
    checkpoints: Checkpoints, mask: Bool[Tensor, " N"] | None = None, held: int = HELD
) -> Float[Tensor, "Tm1 Tm1"]:
    """<theta_s - theta_0, theta_t - theta_0> in float64.

    Args:
        checkpoints: the series; it is read about T / (2 ``held``) times.
        mask: parameters that count; default all.
        held: displacements in memory beside the one that streams past.
    """
    count = len(checkpoints) - 1
    products = torch.zeros(count, count, dtype=torch.float64)
    for start in range(0, count, held):
        group: list[Tensor] = []
        for index, moved in displacements(checkpoints, mask, start + 1):
            row = index - 1
            if len(group) < held:
                group.append(moved)
            for place, other in enumerate(group):
                products[row, start + place] = products[start + place, row] = _inner(moved, other)
    return products


def _inner(left: Float[Tensor, " n"], right: Float[Tensor, " n"]) -> Tensor:
    """<left, right> in float64, with a float64 copy of a few columns at a time."""
    total = torch.zeros((), dtype=torch.float64, device=left.device)
    for mine, other in zip(left.split(PRODUCT_WIDTH), right.split(PRODUCT_WIDTH), strict=True):
        total += mine.double() @ other.double()
    return total.cpu()


def combined(
    checkpoints: Checkpoints,
    coefficients: Float[Tensor, "K Tm1"],
    mask: Bool[Tensor, " N"] | None = None,
    allocate: Allocate | None = None,
) -> tuple[Float[Tensor, "K n"], Float[Tensor, "K Tm1"]]:
    """Orthonormal rows spanning coefficients times displacements, and the coefficients that give them.

    The rows are made orthonormal where they lie, block by block of columns (Cholesky twice, which is
    Gram-Schmidt in the given order), so that nothing of their size is made beside them.

    Args:
        checkpoints: the series, read once.
        coefficients: (K, T-1), float64.
        mask: parameters that count; rows have their number of columns.
        allocate: makes the (K, n) table, for example in a mapped file; None makes it in memory.
    """
    size = checkpoints.space.size if mask is None else int(mask.sum())
    rows: Tensor | None = None
    for index, moved in displacements(checkpoints, mask):
        if rows is None:
            make = moved.new_empty if allocate is None else allocate
            rows = make(len(coefficients), size).zero_()
        share = coefficients[:, index - 1].to(rows)
        for columns, part in zip(rows.split(WIDTH, dim=1), moved.split(WIDTH), strict=True):
            columns.addr_(share, part.to(rows))
    assert rows is not None
    for _ in range(2):
        turn = torch.linalg.inv(torch.linalg.cholesky(gram(rows, WIDTH)))
        for columns in rows.split(WIDTH, dim=1):
            columns.copy_(turn.to(columns) @ columns)
        coefficients = turn.to(coefficients) @ coefficients
    return rows, coefficients
