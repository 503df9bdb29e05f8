"""The basis of parameter space, and how much of a movement lies in its span.

Rows are orthonormal. Everything that supplies rows returns the same record, so a rival is data of
the same type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import gram, orthonormalise

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
        coefficients: (K, T-1) where rows are made of displacements: rows = coefficients times the rows
            theta_t - theta_0, so that rows can be made anew from the series; None where they are not.
    """

    kind: str
    rows: Float[Tensor, "K N"]
    origins: Int[Tensor, " K"]
    eigenvalues: Float[Tensor, " K"]
    residuals: Float[Tensor, " K"]
    supervised: bool = False
    products: int = 0
    coefficients: Float[Tensor, "K Tm1"] | None = None

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
        # A slice is a view, so the rows of a mapped file stay where they are.
        index = chosen if isinstance(chosen, slice) else torch.atleast_1d(torch.as_tensor(chosen))
        return replace(
            self,
            rows=self.rows[index],
            origins=self.origins[index],
            eigenvalues=self.eigenvalues[index],
            residuals=self.residuals[index],
            coefficients=None if self.coefficients is None else self.coefficients[index],
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
    """Largest entry of |B B' - I|; 0 for no rows."""
    products = gram(rows)
    return float((products - torch.eye(len(rows)).to(products)).abs().max()) if len(rows) else 0.0


def require_orthonormal(basis: Basis) -> None:
    """Row by row against the rows before it, so that rows on disk are never all in memory.

    Raises:
        ValueError: for the first row that is not of length one or not at right angles to those before it.
    """
    for number in range(len(basis)):
        products = basis.rows[: number + 1] @ basis.rows[number]
        products[number] -= 1
        error = float(products.abs().max())
        if not error <= 1e-2:
            raise ValueError(
                f"rows of a basis must be orthonormal, row {number} of '{basis.kind}' misses by {error:.3g}; "
                "orthonormalise them (torch.linalg.qr), or parts would be counted twice"
            )
