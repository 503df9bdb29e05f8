"""The basis of parameter space: a record, and the ways to build one.

Rows are orthonormal. Everything that supplies rows returns the same record, so a rival is data of
the same type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import orthonormalise, projected_lanczos, remove_rows
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet

NO_ORIGIN = -1


@dataclass(frozen=True)
class Basis:
    """Orthonormal rows with where each came from.

    Attributes:
        kind: how it was built.
        rows: (K, N) orthonormal.
        origins: (K,) optimiser step each was taken at, -1 where it has none.
        eigenvalues: (K,) curvature eigenvalue (or squared singular value), NaN where it has none.
        residuals: (K,) relative eigen-residual, NaN where it has none.
        supervised: True if labels went into it.
        products: Hessian-vector products it took.
    """

    kind: str
    rows: Float[Tensor, "K N"]
    origins: Int[Tensor, " K"]
    eigenvalues: Float[Tensor, " K"]
    residuals: Float[Tensor, " K"]
    supervised: bool = False
    products: int = 0

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, chosen: int | slice | Sequence[int] | Tensor) -> Basis:
        """Only the given vectors, in the given order; one index gives a basis of one vector.

        >>> basis = unlabelled("axes", torch.eye(3))
        >>> len(basis[1]), len(basis[:2]), basis[2, 0].rows.tolist()
        (1, 2, [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])

        Raises:
            IndexError: for a vector that is not there.
        """
        if isinstance(chosen, slice):
            chosen = range(len(self))[chosen]
        index = torch.atleast_1d(torch.as_tensor(chosen, dtype=torch.long))
        return replace(
            self,
            rows=self.rows[index],
            origins=self.origins[index],
            eigenvalues=self.eigenvalues[index],
            residuals=self.residuals[index],
        )

    def rotated(self, rotation: Float[Tensor, "K K"], kind: str, *, supervised: bool = False) -> Basis:
        """Rows R'B: a rotation inside the span; per-vector origins and eigenvalues no longer apply.

        Raises:
            ValueError: if the matrix is not orthogonal.
        """
        identity = torch.eye(len(self), dtype=rotation.dtype)
        if float((rotation.T @ rotation - identity).abs().max()) > 1e-4:
            raise ValueError(
                "a rotation must be orthogonal (R'R = I within 1e-4); orthonormalise its columns"
            )
        rows = rotation.T.to(self.rows) @ self.rows
        return replace(unlabelled(kind, rows), supervised=self.supervised or supervised)


def unlabelled(kind: str, rows: Float[Tensor, "K N"]) -> Basis:
    """A basis whose vectors have no origin, eigenvalue or residual."""
    count = rows.shape[0]
    nan = torch.full((count,), float("nan"), dtype=torch.float64)
    return Basis(kind, rows, torch.full((count,), NO_ORIGIN), nan, nan.clone())


#: v (N,) -> H v (N,).
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BasisCheckpoint:
    """Vectors found at one checkpoint (one step of Algorithm 1).

    ``following`` holds the next Ritz vectors, where the next checkpoint's Lanczos starts.
    """

    step: int
    rows: Float[Tensor, "k N"]
    eigenvalues: Float[Tensor, " k"]
    residuals: Float[Tensor, " k"]
    products: int
    following: Float[Tensor, "s N"] | None = None


def hessian_basis(
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    *,
    generator: torch.Generator,
    k: int = 1,
    tolerance: float = 1e-2,
    max_products: int = 60,
    mask: Bool[Tensor, " N"] | None = None,
    finished: Sequence[BasisCheckpoint] = (),
    on_checkpoint: Callable[[BasisCheckpoint], BasisCheckpoint | None] | None = None,
    keep_products: Callable[[int, Product], Product] | None = None,
    rows_in_memory: int | None = None,
    allocate: Callable[[int, int], Tensor] | None = None,
    kind: str = "hessian",
) -> Basis:
    """Algorithm 1 of arXiv 2506.15872: top eigenvectors of Pi H_t Pi, checkpoint after checkpoint.

    Pi projects off all vectors found before; the symmetric form Pi H Pi is used. Lanczos starts
    from the last checkpoint's next Ritz vectors: those it found are projected out.

    Args:
        objective: the token loss.
        checkpoints: basis checkpoints, in the order they are taken.
        tokens: the curvature sample X.
        generator: start vectors.
        k: vectors per checkpoint.
        tolerance: relative eigen-residual to stop at.
        max_products: Hessian-vector products per checkpoint at most.
        mask: restrict vectors to these parameters.
        finished: checkpoints already done, to resume from.
        on_checkpoint: called with each finished checkpoint; what it returns (the same vectors, memory-mapped
            from disk, say) takes the checkpoint's place.
        keep_products: wraps the operator of a checkpoint (given its index), so that products of an
            interrupted checkpoint can be replayed.
        rows_in_memory: bytes of earlier vectors that may be held beside the Krylov vectors; above it they
            are taken block by block from where the parts hold them. None: no limit.
        allocate: makes the (K, N) tensor of the joined rows; None joins in memory.
        kind: name of the basis.
    """
    parts = list(finished)
    # One draw seeds every checkpoint apart, so that a resumed basis gets the same start vectors.
    seed = int(torch.randint(2**31, (1,), generator=generator))
    for index in range(len(parts), len(checkpoints)):
        theta = checkpoints[index]
        product = objective.hessian(theta, tokens, expected=8 * k * len(checkpoints))
        if keep_products is not None:
            product = keep_products(index, product)
        part = next_vectors(
            product,
            theta,
            parts,
            checkpoints.steps[index],
            torch.Generator().manual_seed(seed + index),
            k,
            tolerance,
            max_products,
            mask,
            rows_in_memory,
        )
        if parts:
            parts[-1] = replace(parts[-1], following=None)
        parts.append(part)
        if on_checkpoint is not None:
            parts[-1] = on_checkpoint(part) or part
    return join(kind, parts, allocate)


def next_vectors(
    product: Callable[[Tensor], Tensor],
    theta: Float[Tensor, " N"],
    parts: Sequence[BasisCheckpoint],
    step: int,
    generator: torch.Generator,
    k: int,
    tolerance: float,
    max_products: int,
    mask: Bool[Tensor, " N"] | None = None,
    rows_in_memory: int | None = None,
) -> BasisCheckpoint:
    """Top k eigenpairs of the operator, off the vectors found so far and inside the mask."""
    size = sum(part.rows.numel() * part.rows.element_size() for part in parts)
    streamed = rows_in_memory is not None and size > rows_in_memory
    start = parts[-1].following if parts else None
    # Lanczos runs on the masked coordinates alone, so a subset costs its own size, not N.
    inside = torch.arange(theta.numel()) if mask is None else mask.nonzero()[:, 0]

    def restricted(vector: Tensor) -> Tensor:
        if mask is None:
            return product(vector)
        full = torch.zeros_like(theta)
        full[inside] = vector.to(full)
        return product(full)[inside]

    def inner(vectors: Tensor | None) -> Tensor | None:
        return vectors if vectors is None or mask is None else vectors[:, inside]

    blocks = [part.rows if mask is None else part.rows[:, inside] for part in parts]
    extra = 0
    if start is not None:
        # The vectors found last are projected out; the Ritz vectors behind them are their successors.
        start = inner(start.to(theta))
    elif parts and mask is None:
        # Without them, what is left of H v, v the last vectors, points the same way.
        start = torch.stack([restricted(vector) for vector in parts[-1].rows.to(theta)])
        extra = len(start)
    pairs = projected_lanczos(
        restricted,
        len(inside),
        k,
        generator=generator,
        rows=blocks if streamed or not blocks else torch.cat(blocks).to(theta),
        start=start,
        tolerance=tolerance,
        max_products=max_products,
        following=k,
        noise=1e-3 if extra == 0 else 0.02,
        dtype=theta.dtype,
        device=theta.device,
    )

    def outer(vectors: Tensor) -> Tensor:
        if mask is None:
            return vectors
        full = torch.zeros(len(vectors), theta.numel(), dtype=theta.dtype, device=theta.device)
        full[:, inside] = vectors
        return full

    behind = None if pairs.following is None or len(pairs.following) == 0 else outer(pairs.following)
    return BasisCheckpoint(
        step, outer(pairs.vectors), pairs.values, pairs.residuals, pairs.products + extra, behind
    )


def join(
    kind: str, parts: Sequence[BasisCheckpoint], allocate: Callable[[int, int], Tensor] | None = None
) -> Basis:
    """One basis from the vectors of several checkpoints.

    Args:
        kind: name of the basis.
        parts: vectors of each checkpoint.
        allocate: makes the (K, N) tensor the rows are copied into, for example in a mapped file.
    """
    if allocate is None:
        rows = torch.cat([part.rows for part in parts])
    else:
        rows = allocate(sum(len(part.rows) for part in parts), parts[0].rows.shape[1])
        first = 0
        for part in parts:
            rows[first : first + len(part.rows)] = part.rows
            first += len(part.rows)
    return Basis(
        kind,
        rows,
        torch.tensor([part.step for part in parts for _ in part.rows]),
        torch.cat([part.eigenvalues for part in parts]).double(),
        torch.cat([part.residuals for part in parts]).double(),
        products=sum(part.products for part in parts),
    )


def random_basis(
    size: int,
    count: int,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
) -> Basis:
    """Random orthonormal rows (uniform on the Stiefel manifold), inside the mask where given."""
    rows = torch.randn(count, size, generator=generator, dtype=dtype)
    if mask is not None:
        rows = rows * mask.to(dtype)
    return unlabelled("random", orthonormalise(rows))


def displacements_from_start(checkpoints: Checkpoints) -> Iterator[tuple[int, Float[Tensor, " N"]]]:
    """(index, theta_t - theta_0) for t = 1 .. T-1, one at a time."""
    origin = checkpoints[0].clone()
    for index in range(1, len(checkpoints)):
        yield index, checkpoints[index] - origin


def trajectory_basis(
    checkpoints: Checkpoints, count: int, *, mask: Bool[Tensor, " N"] | None = None
) -> Basis:
    """Right singular vectors of the rows theta_t - theta_0, from the T x T Gram matrix.

    Eigenvalues are squared singular values. No derivative is taken.

    Raises:
        ValueError: if the movement has fewer independent directions than asked for.
    """
    keep = slice(None) if mask is None else mask
    rows = torch.stack([moved[keep] for _, moved in displacements_from_start(checkpoints)])
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for columns in rows.split(1 << 20, dim=1):  # float64 in slices keeps the memory of one copy
        gram += columns.double() @ columns.double().T
    values, vectors = torch.linalg.eigh(gram)
    order = torch.argsort(values, descending=True)[:count]
    values = values[order]
    if len(values) < count or float(values[-1]) <= 1e-12 * float(values[0]):
        raise ValueError(
            f"a trajectory basis of {count} vectors needs as many independent displacements, "
            f"got {int((values > 1e-12 * values.max()).sum())}; use fewer vectors"
        )
    found = orthonormalise(vectors[:, order].T.to(rows) @ rows)
    if mask is not None:
        full = torch.zeros(len(found), mask.numel(), dtype=found.dtype)
        full[:, mask] = found
        found = full
    return replace(unlabelled("trajectory", found), eigenvalues=values)


def capture(basis_rows: Float[Tensor, "K N"], checkpoints: Checkpoints) -> tuple[float, float]:
    """Share of squared displacement inside the span: of the net movement, and mean over intervals.

    Both divide by the full displacement's squared norm; the second is the mean over intervals of
    each interval's own share.
    """
    total = checkpoints[-1] - checkpoints[0]
    net = float(
        (basis_rows @ total).double().square().sum() / total.double().square().sum().clamp_min(1e-300)
    )
    shares = []
    for index in range(len(checkpoints) - 1):
        step = checkpoints[index + 1] - checkpoints[index]
        size = float(step.double().square().sum())
        if size > 0:
            shares.append(float((basis_rows @ step).double().square().sum()) / size)
    return net, sum(shares) / len(shares) if shares else 0.0


def random_walk_capture(step_norms: Sequence[float], count: int) -> tuple[float, float]:
    """What a trajectory basis of ``count`` vectors captures of a random walk with these step norms.

    In high dimension the steps are orthogonal, so the walk's Gram matrix is G[s, t] =
    sum of the first min(s, t) squared norms; shares follow from its eigenvectors with no draw.
    (Antognini & Sohl-Dickstein 2018 study this spectrum.)

    >>> net, path = random_walk_capture([1.0, 1.0], 2)
    >>> round(net, 6), round(path, 6)
    (1.0, 1.0)
    """
    squares = torch.tensor(step_norms, dtype=torch.float64).square()
    # Row t of L times unit steps gives theta_t - theta_0, so G = L diag(squares) L'.
    lower = torch.ones(len(squares), len(squares), dtype=torch.float64).tril() * squares.sqrt()
    _, _, right = torch.linalg.svd(lower, full_matrices=False)
    top = right[:count]
    total = squares.sqrt()
    net = float((top @ total).square().sum() / squares.sum().clamp_min(1e-300))
    moving = squares > 0
    path = float(top.square().sum(0)[moving].mean()) if bool(moving.any()) else 0.0
    return net, path


def gram_error(rows: Float[Tensor, "K N"]) -> float:
    """Largest entry of |B B' - I|."""
    gram = rows.double() @ rows.double().T
    return float((gram - torch.eye(len(rows), dtype=torch.float64)).abs().max())


__all__ = [
    "Basis",
    "BasisCheckpoint",
    "capture",
    "displacements_from_start",
    "gram_error",
    "hessian_basis",
    "join",
    "next_vectors",
    "random_basis",
    "random_walk_capture",
    "remove_rows",
    "trajectory_basis",
    "unlabelled",
]
