"""The basis of parameter space, and how much of a movement lies in its span.

Rows are orthonormal. Everything that supplies rows returns the same record, so a rival is data of
the same type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polca_edit.basis.subsets import Subset, taken
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import coordinates, gram, lengths, orthonormalise

NO_ORIGIN = -1


@dataclass(frozen=True)
class Rounding:
    """What storing rows in fewer bits did to them.

    Attributes:
        storage: type of the stored numbers.
        gram: largest entry of |B B' - I| of the stored rows.
        slopes: largest change of a token's slope along a row, relative to the row's largest slope.
    """

    storage: str
    gram: float
    slopes: float

    def __str__(self) -> str:
        return (
            f"rows in {self.storage}: |B B' - I| at most {self.gram:.1e}, "
            f"slopes off by at most {self.slopes:.1e} of the largest"
        )


@dataclass(frozen=True)
class Basis:
    """Orthonormal rows with where each came from.

    Rows that lie in a few tensors are held, and stored, as these tensors' entries alone. ``rows`` has them
    whole; what is taken often (slopes, coordinates, residual directions) goes by the entries.

    Attributes:
        kind: how it was built.
        entries: (K, n) orthonormal rows, without the columns that are zero in all.
        origins: (K,) optimiser step each was taken at, -1 where it has none.
        eigenvalues: (K,) curvature eigenvalue (or squared singular value), NaN where it has none.
        residuals: (K,) relative eigen-residual, NaN where it has none.
        supervised: True if labels went into it.
        products: Hessian-vector products it took.
        coefficients: (K, T-1) where rows are made of displacements: rows = coefficients times the rows
            theta_t - theta_0, so that rows can be made anew from the series; None where they are not.
        ranges: (r, 2) runs of the flat vector whose entries are held; None: all of it.
        size: N where only some entries are held.
        rounding: how far entries in fewer than 32 bits are off; None where they are as computed.
    """

    kind: str
    #: Files call them rows, as they did when every basis had whole ones.
    entries: Float[Tensor, "K n"] = field(metadata={"stored": "rows"})
    origins: Int[Tensor, " K"]
    eigenvalues: Float[Tensor, " K"]
    residuals: Float[Tensor, " K"]
    supervised: bool = False
    products: int = 0
    coefficients: Float[Tensor, "K Tm1"] | None = None
    ranges: Int[Tensor, "r 2"] | None = None
    size: int | None = None
    rounding: Rounding | None = None

    def __len__(self) -> int:
        return self.entries.shape[0]

    @cached_property
    def inside(self) -> Subset | None:
        """Where the entries lie; None where they are whole rows.

        Raises:
            ValueError: for ranges that do not fit the entries.
        """
        if self.ranges is None:
            return None
        subset = Subset.of_tensor(self.size or 0, self.ranges)
        if subset.count != self.entries.shape[1]:
            raise ValueError(
                f"a basis must hold {subset.count} entries a row by its ranges, got {self.entries.shape[1]}; "
                "make it again"
            )
        return subset

    @cached_property
    def rows(self) -> Float[Tensor, "K N"]:
        """(K, N) whole rows, zero where no entry is held, of 32 bits at least; made at the first use."""
        return self.wide() if self.inside is None else self.inside.spread(self.wide())

    def wide(self, chosen: int | slice = slice(None)) -> Tensor:
        """Entries of one row or of some, in the 32 bits at least that are computed with."""
        entries = self.entries[chosen]
        return entries if entries.element_size() >= 4 else entries.float()

    def along(self, moved: Float[Tensor, " N"]) -> Float[Tensor, " K"]:
        """<b, moved> for every row, summed in float64."""
        part = taken(moved, self.inside)
        if self.entries.element_size() >= 4:
            return coordinates(self.entries, part)
        # One wide row at a time.
        each = [coordinates(self.wide(number)[None], part) for number in range(len(self))]
        return torch.cat(each) if each else torch.zeros(0, dtype=torch.float64)

    def remainder(self, moved: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """(I - B'B) moved, with no normalisation."""
        part = taken(moved, self.inside)
        if self.entries.element_size() >= 4:
            left = torch.addmv(part, self.entries.T, self.entries @ part, alpha=-1)
        else:
            left = part.clone()
            for number, size in enumerate(self.along(moved).to(part)):
                left -= size * self.wide(number).to(part)
        if self.inside is None:
            return left
        first, whole = 0, moved.clone()
        for start, stop in self.inside.ranges:
            whole[start:stop] = left[first : first + stop - start]
            first += stop - start
        return whole

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
            entries=self.entries[index],
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
        entries = self.wide()
        rows = rotation.T.to(entries) @ entries
        turned = unlabelled(kind, rows, self.inside)
        return replace(turned, supervised=self.supervised or supervised)


def unlabelled(kind: str, rows: Float[Tensor, "K n"], inside: Subset | None = None) -> Basis:
    """A basis whose vectors have no origin, eigenvalue or residual.

    Args:
        kind: its name.
        rows: orthonormal, whole or the entries of a subset.
        inside: that subset.
    """
    count = rows.shape[0]
    nan = torch.full((count,), float("nan"), dtype=torch.float64)
    basis = Basis(kind, rows, torch.full((count,), NO_ORIGIN), nan, nan.clone())
    return confined(basis, inside)


def confined(basis: Basis, inside: Subset | None) -> Basis:
    """The record of entries that lie in a subset, which so far says that they are whole rows."""
    if inside is None:
        return basis
    return replace(basis, ranges=inside.tensor(), size=inside.size)


def random_basis(
    size: int,
    count: int,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
) -> Basis:
    """Random orthonormal rows (uniform on the Stiefel manifold), inside the mask where given."""
    inside = None if mask is None else Subset.of_mask(mask)
    width = size if inside is None else inside.count
    rows = torch.randn(count, width, generator=generator, dtype=dtype)
    return unlabelled("random", orthonormalise(rows), inside)


def capture(basis: Basis, checkpoints: Checkpoints) -> tuple[float, float]:
    """Share of squared displacement inside the span: of the net movement, and mean over intervals.

    Both divide by the full displacement's squared norm; the second is the mean over intervals of
    each interval's own share.
    """
    total = checkpoints[-1] - checkpoints[0]
    inside = _within(basis, total).double().square().sum()
    net = float(inside / lengths(total[None])[0].square().clamp_min(1e-300))
    shares = []
    for index in range(len(checkpoints) - 1):
        step = checkpoints[index + 1] - checkpoints[index]
        size = float(lengths(step[None])[0].square())
        if size > 0:
            shares.append(float(_within(basis, step).double().square().sum()) / size)
    return net, sum(shares) / len(shares) if shares else 0.0


def _within(basis: Basis, moved: Float[Tensor, " N"]) -> Float[Tensor, " K"]:
    return basis.along(moved) if basis.rounding is not None else basis.entries @ taken(moved, basis.inside)


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
        row = basis.wide(number)
        if basis.rounding is None:
            products = basis.entries[: number + 1] @ row
        else:
            products = torch.stack([basis.wide(other) @ row for other in range(number + 1)])
        products[number] -= 1
        error = float(products.abs().max())
        if not error <= 1e-2:
            raise ValueError(
                f"rows of a basis must be orthonormal, row {number} of '{basis.kind}' misses by {error:.3g}; "
                "orthonormalise them (torch.linalg.qr), or parts would be counted twice"
            )
