"""Spans of recorded movement that a removal edit may use, and the control spans beside them.

A span holds orthonormal rows inside contiguous blocks of the flat vector. One block over
everything is an ordinary basis. One block per weight tensor lets every tensor take its own
combination of the recorded displacements: each row is still a movement that training made, cut to
one tensor, and the rank grows from T to at most T times the number of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from polca_edit.derivatives.lanczos import inner_products
from polca_edit.parameters import ParameterSpace

#: Weights in each group of rows of a removal's span, and leading recorded rows kept in each group. More
#: rows (up to the 112 recorded ones) cost more and were no better on select (demo model).
BLOCK, LEADING = 1024, 36


@runtime_checkable
class Movable(Protocol):
    """Where an edit may lie: coordinates, and the movement they stand for."""

    @property
    def rank(self) -> int:
        """Number of coordinates."""

    def move(self, z: Float[Tensor, " k"]) -> Float[Tensor, " N"]:
        """The movement with coordinates z; differentiable."""


@dataclass(frozen=True)
class Span:
    """Block-orthonormal rows.

    Attributes:
        kind: where the rows come from.
        size: N.
        blocks: (start, stop) of each block, ascending and disjoint.
        rows: per block (k, stop - start) orthonormal rows; no block at all means the whole space.
    """

    kind: str
    size: int
    blocks: tuple[tuple[int, int], ...]
    rows: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        ends = [0, *(stop for _, stop in self.blocks)]
        if (
            any(start < end for (start, _), end in zip(self.blocks, ends, strict=False))
            or ends[-1] > self.size
        ):
            raise ValueError(
                f"blocks of a span must be ascending, disjoint and inside {self.size}, got {self.blocks[:4]}"
            )

    @property
    def rank(self) -> int:
        """Number of coordinates."""
        return sum(len(r) for r in self.rows) if self.blocks else self.size

    def move(self, z: Float[Tensor, " k"]) -> Float[Tensor, " N"]:
        """The movement with coordinates z; differentiable."""
        if not self.blocks:
            return z
        parts, end, used = [], 0, 0
        for (start, stop), rows in zip(self.blocks, self.rows, strict=True):
            if start > end:
                parts.append(z.new_zeros(start - end))
            parts.append(z[used : used + len(rows)] @ rows.to(z))
            end, used = stop, used + len(rows)
        parts.append(z.new_zeros(self.size - end))
        return torch.cat(parts)


def whole_space(size: int) -> Span:
    """Every weight its own coordinate: what fine-tuning rivals use."""
    return Span("all weights", size, (), ())


def span_of_rows(rows: Float[Tensor, "k N"], kind: str) -> Span:
    """One block of rows that are orthonormal already, for example a basis."""
    return Span(kind, rows.shape[1], ((0, rows.shape[1]),), (rows,))


def leading_rows(vectors: Float[Tensor, "T n"], count: int | None = None) -> Float[Tensor, "k n"]:
    """Orthonormal right singular vectors, largest first, of at most ``count``; dependent ones dropped."""
    gram = inner_products(vectors, vectors)
    values, left = torch.linalg.eigh(gram)
    order = torch.argsort(values, descending=True)[: count if count is not None else len(values)]
    # Below this ratio the row would be rounding noise of the float32 recording.
    order = order[values[order] > 1e-9 * float(values.max().clamp_min(1e-300))]
    if not len(order):
        return vectors[:0]
    rough = left[:, order].T.to(vectors) @ vectors / values[order].sqrt().to(vectors)[:, None]
    orthonormal: Tensor = torch.linalg.qr(rough.T)[0].T.contiguous()
    return orthonormal


def span_by_tensor(
    vectors: Float[Tensor, "T N"],
    space: ParameterSpace,
    kind: str,
    *,
    per_block: int | None = None,
    block: int | None = None,
) -> Span:
    """Recorded vectors cut to each weight tensor, or to groups of its rows, and orthonormalised there.

    Args:
        vectors: displacements, Hessian vectors or both.
        space: gives the tensors.
        kind: name.
        per_block: keep this many leading rows of each block.
        block: cut tensors into groups of whole rows (output neurons, vocabulary entries) of about
            this many weights; None keeps tensors whole. Cost and memory do not depend on it, the
            rank grows with the number of groups.
    """
    blocks, rows = [], []
    for (start, stop), shape in zip(space.offsets.values(), space.shapes, strict=True):
        width = (stop - start) // shape[0]
        size = stop - start if block is None else max(1, round(block / width)) * width
        for first in range(start, stop, size):
            last = min(first + size, stop)
            found = leading_rows(vectors[:, first:last], per_block)
            if len(found):
                blocks.append((first, last))
                rows.append(found)
    return Span(kind, space.size, tuple(blocks), tuple(rows))


def random_like(span: Span, generator: torch.Generator) -> Span:
    """Random rows with the same number in every block: equal rank, same placement, no recording."""
    rows = []
    for mine in span.rows:
        draw = torch.randn(mine.shape[1], mine.shape[0], generator=generator, dtype=mine.dtype)
        rows.append(torch.linalg.qr(draw)[0].T.contiguous())
    return replace(span, kind="random span", rows=tuple(rows))


def rotated_within(span: Span, wider: Span, generator: torch.Generator) -> Span:
    """A random subspace of a wider span, with as many rows in every block as ``span`` has.

    Raises:
        ValueError: if the two spans do not have the same blocks, or the wider one is not wider.
    """
    if span.blocks != wider.blocks or any(
        len(a) > len(b) for a, b in zip(span.rows, wider.rows, strict=True)
    ):
        raise ValueError(
            "a rotated span needs a wider span with the same blocks; take both from the same vectors"
        )
    rows = []
    for mine, other in zip(span.rows, wider.rows, strict=True):
        draw = torch.randn(len(other), len(mine), generator=generator, dtype=other.dtype)
        rows.append(torch.linalg.qr(draw)[0].T @ other)
    return replace(span, kind="rotated span", rows=tuple(rows))


def stacked_displacements(thetas: Sequence[Float[Tensor, " N"]]) -> Float[Tensor, "T N"]:
    """theta_t - theta_0 for t = 1 .. T."""
    return torch.stack([theta - thetas[0] for theta in thetas[1:]])
