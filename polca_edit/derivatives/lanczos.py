"""Projected Lanczos: top eigenpairs of a symmetric operator in the null space of given rows.

Block Lanczos with full (twice repeated) reorthogonalisation, Rayleigh-Ritz on the whole Krylov
space and a stop on the residual. Paige (1972) explains why the Krylov vectors need
reorthogonalising; Golub & Underwood (1977) the block form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues in descending order with their unit vectors.

    Attributes:
        values: (k,) Ritz values.
        vectors: (k, N) orthonormal rows, orthogonal to the projected-out rows.
        residuals: (k,) ||A v - value v|| / |value|, A the projected operator.
        products: operator products used.
        converged: all residuals at most the tolerance.
        following: (s, N) the next Ritz vectors, at most ``following`` of them: the best start for a
            nearby operator off these vectors.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k N"]
    residuals: Float[Tensor, " k"]
    products: int
    converged: bool
    following: Float[Tensor, "s N"] | None = None


def inner_products(left: Float[Tensor, "a N"], right: Float[Tensor, "b N"]) -> Float[Tensor, "a b"]:
    """<left_i, right_j> in float64.

    A float32 sum over millions of entries loses four digits, and a float64 copy of every vector costs
    more than the product. So blocks of 4096 entries are multiplied in the given precision and the
    blocks' results are summed in float64. Of two precisions the wider one counts.
    """
    if left.dtype != right.dtype:
        wider = torch.promote_types(left.dtype, right.dtype)
        left, right = left.to(wider), right.to(wider)
    count = left.shape[1] // 4096
    whole = count * 4096
    total = (left[:, whole:].double() @ right[:, whole:].double().T).to(left.device)
    if count:
        mine = left[:, :whole].unflatten(1, (count, 4096)).transpose(0, 1)
        other = right[:, :whole].unflatten(1, (count, 4096)).permute(1, 2, 0)
        total = total + torch.bmm(mine, other).double().sum(0)
    return total


def lengths(vectors: Float[Tensor, "k N"]) -> Float[Tensor, " k"]:
    """Norms of long vectors, summed in float64 as :func:`inner_products` does.

    ``Tensor.norm`` sums the squares of float32 one after the other: it misses 2e-3 at ten million entries.

    >>> lengths(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [5.0, 0.0]
    """
    squares = [inner_products(row, row)[0, 0] for row in vectors.split(1)] if len(vectors) else []
    return torch.stack(squares).sqrt() if squares else vectors.new_zeros(0, dtype=torch.float64)


#: Columns that are taken to float64 at a time.
WIDTH = 1 << 20


def exact_length(vector: Float[Tensor, " N"]) -> float:
    """Norm in float64 without a float64 copy, of entries too that float32 cannot square.

    >>> round(exact_length(torch.full((4,), 1e-30)) / 2e-30, 6)
    1.0
    """
    parts = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in vector.split(WIDTH)]
    return float(torch.linalg.vector_norm(torch.stack(parts)))


def coordinates(rows: Float[Tensor, "K N"], moved: Float[Tensor, " N"]) -> Float[Tensor, " K"]:
    """<b, moved> for every row, summed in float64."""
    return inner_products(rows, moved[None])[:, 0].cpu()


def gram(rows: Float[Tensor, "K N"], width: int = WIDTH) -> Float[Tensor, "K K"]:
    """<row_i, row_j> in float64, with a float64 copy of ``width`` columns at a time."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for columns in rows.split(width, dim=1):
        wide = columns.double()
        total += wide @ wide.T
    return total


#: Orthonormal rows in one tensor, or in blocks that may lie on disk (memory-mapped) or another device.
Rows = Float[Tensor, "K N"] | Sequence[Tensor]


def remove_rows(vectors: Float[Tensor, "k N"], rows: Rows | None, times: int = 2) -> Float[Tensor, "k N"]:
    """Vectors minus their component along orthonormal rows, done twice for accuracy.

    Rows given in blocks are visited one block at a time, so only one needs to be in memory.
    """
    return vectors if rows is None else take_rows_off(vectors.clone(), rows, times)


def take_rows_off(vectors: Float[Tensor, "k N"], rows: Rows | None, times: int = 2) -> Float[Tensor, "k N"]:
    """The same in place, for vectors that nobody else holds."""
    blocks = [] if rows is None else [rows] if isinstance(rows, Tensor) else rows
    for _ in range(times):
        for block in blocks:
            if len(block):
                near = block.to(vectors)
                vectors.addmm_(inner_products(vectors, near).to(vectors), near, alpha=-1)
    return vectors


#: (rows, columns) -> an empty table, for example in a mapped file.
Allocate = Callable[[int, int], Tensor]


class _Stack:
    """Rows in blocks as they came; none is ever copied, and each may lie in a mapped file."""

    def __init__(self, allocate: Allocate | None) -> None:
        self.blocks: list[Tensor] = []
        self._allocate = allocate

    def append(self, rows: Float[Tensor, "k N"]) -> Float[Tensor, "k N"]:
        """The rows as they are kept."""
        if self._allocate is not None:
            rows = self._allocate(*rows.shape).copy_(rows)
        self.blocks.append(rows)
        return rows

    def against(self, new: Float[Tensor, "k N"]) -> Float[Tensor, "n k"]:
        """<row_i, new_j> in float64."""
        return torch.cat([inner_products(block.to(new), new) for block in self.blocks])

    def combined(self, coefficients: Float[Tensor, "n m"]) -> Float[Tensor, "m N"]:
        """Coefficients' times the rows."""
        parts = coefficients.split([len(block) for block in self.blocks])
        total: Tensor = parts[0].T @ self.blocks[0].to(parts[0])
        for part, block in zip(parts[1:], self.blocks[1:], strict=True):
            total.addmm_(part.T, block.to(part))
        return total


def orthonormalise(vectors: Float[Tensor, "k N"]) -> Float[Tensor, "r N"]:
    """Orthonormal rows spanning the given rows; numerically dependent ones are dropped."""
    kept, count = torch.empty_like(vectors), 0
    for vector in vectors:
        size = float(lengths(vector[None])[0])
        if size == 0.0:
            continue
        row = kept[count : count + 1].copy_(vector).div_(size)
        length = float(lengths(take_rows_off(row, kept[:count]))[0])
        if length > 100 * torch.finfo(vector.dtype).eps:
            row.div_(length)
            count += 1
    return kept if count == len(vectors) else kept[:count].clone()


@dataclass(frozen=True)
class LanczosSettings:
    """When projected Lanczos stops, and what it returns besides.

    Attributes:
        tolerance: stop when every relative residual is at most this.
        max_products: give up after this many products; the residuals then say how far it got.
        following: how many further Ritz vectors to return.
        noise: size of the random part added to a warm start, relative to it.
    """

    tolerance: float = 1e-3
    max_products: int = 200
    following: int = 0
    noise: float = 0.02


def projected_lanczos(
    product: Callable[[Tensor], Tensor],
    like: Float[Tensor, " N"],
    k: int,
    generator: torch.Generator,
    settings: LanczosSettings | None = None,
    *,
    rows: Rows | None = None,
    start: Float[Tensor, "s N"] | None = None,
    allocate: Allocate | None = None,
) -> Eigenpairs:
    """The k algebraically largest eigenpairs of Pi A Pi, Pi the projector off ``rows``.

    Args:
        product: v (N,) -> A v (N,), A symmetric.
        like: (N,) gives size, dtype and device of the Krylov vectors; its values do not matter.
        k: how many pairs.
        generator: draws the start vectors that ``start`` does not supply.
        settings: accuracy.
        rows: orthonormal rows to project out (Algorithm 1 of arXiv 2506.15872), in one tensor or in blocks.
        start: warm start, for example the last checkpoint's eigenvectors.
        allocate: makes the tables that hold the Krylov vectors and their images, two vectors a product.

    Raises:
        ValueError: if fewer than k dimensions remain after projection, or a product is not finite.
    """
    settings, left = settings or LanczosSettings(), _room(like, rows, k)
    basis, images, used = _Stack(allocate), _Stack(allocate), 0
    block = basis.append(_first_block(like, k, generator, rows, start, settings.noise))
    projected = torch.zeros(0, 0, dtype=torch.float64, device=block.device)
    while True:
        new = _images(product, block, rows)
        used += len(new)
        images.append(new)
        projected = _bordered(projected, basis.against(new))
        ritz, coefficients = torch.linalg.eigh((projected + projected.T) / 2)
        ranked = torch.argsort(ritz, descending=True)
        values, chosen = ritz[ranked[:k]], coefficients[:, ranked[:k]].to(block)
        # An image that was copied to its table is free; one of a product without rows may be the caller's.
        free = allocate is not None and rows is not None
        outside = _outside(new if free else new.clone(), basis.blocks, rows)
        foreseen = lengths(chosen[-len(new) :].T @ outside)
        block = orthonormalise(take_rows_off(outside, rows, 1))
        del new, outside  # a product and the vectors of the end need their room
        full = len(projected) >= left or len(block) == 0
        last = full or used + len(block) > settings.max_products
        if not last and (len(values) < k or bool((foreseen > settings.tolerance * values.abs()).any())):
            block = basis.append(block)
            continue
        vectors = basis.combined(chosen)
        residuals = _residuals(images.combined(chosen), vectors, values)
        done = len(values) == k and bool((residuals <= settings.tolerance).all())
        if done or last:
            next_ones = basis.combined(coefficients[:, ranked[k : k + settings.following]].to(block))
            break
        block = basis.append(block)
    del block
    vectors = orthonormalise(take_rows_off(vectors, rows))
    return Eigenpairs(values.cpu(), vectors, residuals.cpu(), used, done or full, next_ones)


def _outside(images: Float[Tensor, "k N"], known: Rows, rows: Rows | None) -> Float[Tensor, "k N"]:
    """What new images, which are used up, add to the Krylov space.

    The older ones lie in it, so the residual of a Ritz vector is this times its share of the new rows. The
    rows come off in the same two turns.
    """
    for some in (known, rows, known):
        take_rows_off(images, some, 1)
    return images


def _residuals(
    images: Float[Tensor, "k N"], vectors: Float[Tensor, "k N"], values: Float[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """||A v - value v|| / |value| from images A v, which are used up."""
    for image, vector, value in zip(images, vectors, values.cpu().tolist(), strict=True):
        image.sub_(vector, alpha=value)
    return lengths(images) / values.abs().clamp_min(1e-30)


def _room(like: Float[Tensor, " N"], rows: Rows | None, k: int) -> int:
    """Dimensions left after projection, of which k are wanted."""
    left = like.numel() - sum(map(len, [rows] if isinstance(rows, Tensor) else rows or []))
    if not 1 <= k <= left:
        raise ValueError(f"k must be between 1 and the {left} dimensions left, got {k}")
    return left


def _first_block(
    like: Float[Tensor, " N"],
    k: int,
    generator: torch.Generator,
    rows: Rows | None,
    start: Float[Tensor, "s N"] | None,
    noise: float,
) -> Float[Tensor, "k N"]:
    """Orthonormal start vectors off the rows: the warm start with a little noise, drawn where it has none."""
    block = torch.randn(k, like.numel(), generator=generator, dtype=like.dtype).to(like.device)
    if start is not None and len(start):
        warm = remove_rows(start[:k].to(block), rows)
        norms, before = lengths(warm).cpu().tolist(), lengths(start[:k]).cpu().tolist()
        for drawn, row, norm, whole in zip(block, warm, norms, before, strict=False):
            drawn.div_(float(lengths(drawn[None])[0]))
            if norm > 1e-6 * whole:
                # A little noise keeps directions reachable that are exactly orthogonal to the warm start.
                drawn.mul_(noise).add_(row, alpha=1 / norm)
        del warm
    return orthonormalise(take_rows_off(block, rows))


def _images(
    product: Callable[[Tensor], Tensor], block: Float[Tensor, "k N"], rows: Rows | None
) -> Float[Tensor, "k N"]:
    """Pi A v for every row v of a block."""
    found = [remove_rows(product(vector).to(block)[None], rows, 1) for vector in block]
    new = found[0] if len(found) == 1 else torch.cat(found)
    if not torch.isfinite(new).all():
        raise ValueError("operator products must be finite, got NaN or infinity; are the weights damaged?")
    return new


def _bordered(projected: Float[Tensor, "n n"], columns: Float[Tensor, "m k"]) -> Float[Tensor, "m m"]:
    """The projected operator with new columns; <b_i, A b_j> = <b_j, A b_i> fills the new rows."""
    grown = torch.zeros(len(columns), len(columns), dtype=torch.float64, device=projected.device)
    grown[: len(projected), : len(projected)] = projected
    grown[:, -columns.shape[1] :], grown[-columns.shape[1] :] = columns, columns.T
    return grown
