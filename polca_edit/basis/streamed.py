"""Trajectory vectors without all displacements in memory: a small Gram matrix over streamed checkpoints.

Only a few displacements are held at a time. Vectors are combinations of displacements, so what is kept of
them is a K x (T-1) coefficient matrix, and their rows are added up in one more pass over the series.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import Allocate, gram

#: Displacements held beside the one that streams past.
HELD = 4
#: Columns of which a float64 copy is made at a time.
WIDTH = 1 << 18
#: Entries of all copies that products take at a time, so that they fit into a processor's cache.
PRODUCT_ENTRIES = 1 << 17


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
        stop = min(count, start + held)
        for index, moved in displacements(checkpoints, mask, start + 1):
            row = index - 1
            if row < stop:
                group.append(moved)
                if row == stop - 1:
                    products[start:stop, start:stop] = _inner(group, group)
            else:
                products[start:stop, row] = _inner(group, [moved])[:, 0]
                products[row, start:stop] = products[start:stop, row]
    return products


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Float[Tensor, "a b"]:
    """<left_i, right_j> in float64, with a float64 copy of a few columns at a time."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left[0].device)
    width = max(1, PRODUCT_ENTRIES // (len(left) + len(right)))
    for start in range(0, len(left[0]), width):
        mine = _columns(left, start, width).double()
        other = mine if right is left else _columns(right, start, width).double()
        total.addmm_(mine, other.T)
    return total.cpu()


def _columns(vectors: Iterable[Tensor], start: int, width: int) -> Float[Tensor, "k w"]:
    """Some entries of vectors that lie apart, as one table."""
    return torch.stack([each[start : start + width] for each in vectors])


def combined(
    checkpoints: Checkpoints,
    coefficients: Float[Tensor, "K Tm1"],
    mask: Bool[Tensor, " N"] | None = None,
    allocate: Allocate | None = None,
    held: int = HELD,
) -> tuple[Float[Tensor, "K n"], Float[Tensor, "K Tm1"]]:
    """Orthonormal rows spanning coefficients times displacements, and the coefficients that give them.

    The rows are made orthonormal where they lie, block by block of columns (Cholesky twice, which is
    Gram-Schmidt in the given order), so that nothing of their size is made beside them. A table in a mapped
    file may not fit into memory, so it is gone through seldom: once for every ``held`` displacements, twice
    for the turns.

    Args:
        checkpoints: the series, read once.
        coefficients: (K, T-1), float64.
        mask: parameters that count; rows have their number of columns.
        allocate: makes the (K, n) table, for example in a mapped file; None makes it in memory.
        held: displacements in memory.
    """
    size = checkpoints.space.size if mask is None else int(mask.sum())
    rows: Tensor | None = None
    group: dict[int, Tensor] = {}
    total = torch.zeros(len(coefficients), len(coefficients), dtype=torch.float64)
    for index, moved in displacements(checkpoints, mask):
        group[index - 1] = moved
        last = index == len(checkpoints) - 1
        if len(group) < held and not last:
            continue
        first = rows is None
        if rows is None:
            rows = (moved.new_empty if allocate is None else allocate)(len(coefficients), size)
            total = total.to(rows.device)
        share = coefficients[:, list(group)].to(rows)
        for start in range(0, size, WIDTH):
            columns = rows[:, start : start + WIDTH]
            parts = _columns(group.values(), start, WIDTH).to(rows)
            columns.addmm_(share, parts, beta=0 if first else 1)
            if last:
                total += gram(columns)
        group.clear()
    assert rows is not None
    for again in (True, False):
        turn = torch.linalg.inv(torch.linalg.cholesky(total))
        total = torch.zeros_like(total)
        for columns in rows.split(WIDTH, dim=1):
            columns.copy_(turn.to(columns) @ columns)
            if again:
                total += gram(columns)
        coefficients = turn.to(coefficients) @ coefficients
    return rows, coefficients
