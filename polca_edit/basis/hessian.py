"""Algorithm 1 of arXiv 2506.15872: top eigenvectors of an operator, checkpoint after checkpoint.

The operator is the Hessian of the mean loss (:func:`hessian_basis`) or any other symmetric one
(:func:`operator_basis`, used by :mod:`polca_edit.basis.operators`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polca_edit.basis.record import Basis, confined
from polca_edit.basis.streamed import HELD
from polca_edit.basis.subsets import Subset, taken
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import Allocate, LanczosSettings, Rows, projected_lanczos
from polca_edit.derivatives.objective import Objective
from polca_edit.derivatives.routes import matrix_products
from polca_edit.tokens import TokenSet

#: v (n,) -> A v (n,); n = N, or the number of entries that vectors may use.
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class EigenSettings:
    """How eigenvectors are taken at each basis checkpoint.

    Attributes:
        per_checkpoint: vectors at each (k of Algorithm 1).
        tolerance: relative eigen-residual to stop at.
        max_products: operator products per checkpoint at most; the residuals then say how far it got.
        seed: of the start vectors.
        mask: (N,) restrict vectors to these parameters; None for all.
        coarse: whether vectors are sought by products in fewer bits first (:func:`in_fewer_bits`), from which
            exact products go on until the residuals are small enough: one product a vector where they are.

    Operators, vectors and the rows that are stored then have those n entries alone.
    """

    per_checkpoint: int = 1
    tolerance: float = 1e-2
    max_products: int = 60
    seed: int = 0
    mask: Bool[Tensor, " N"] | None = None
    coarse: bool = False

    def generator(self) -> torch.Generator:
        """A fresh generator, so that a basis does not depend on which were built before it."""
        return torch.Generator().manual_seed(self.seed)

    def lanczos(self, *, following: int = 0, noise: float = 0.02) -> LanczosSettings:
        """The same for one checkpoint's Lanczos."""
        return LanczosSettings(self.tolerance, self.max_products, following, noise)

    @cached_property
    def inside(self) -> Subset | None:
        """The entries that vectors may use; None for all."""
        return None if self.mask is None else Subset.of_mask(self.mask)


@dataclass(frozen=True)
class BasisCheckpoint:
    """Vectors found at one checkpoint (one step of Algorithm 1), by the entries that they may use.

    ``following`` holds the next Ritz vectors, where the next checkpoint's Lanczos starts.
    """

    step: int
    rows: Float[Tensor, "k n"]
    eigenvalues: Float[Tensor, " k"]
    residuals: Float[Tensor, " k"]
    products: int
    following: Float[Tensor, "s n"] | None = None


@dataclass(frozen=True)
class Keeping:
    """What a caller keeps of a basis while it is built, so that it can be resumed or streamed.

    Attributes:
        finished: checkpoints already done, to resume from.
        on_start: called before a checkpoint is read, when nothing of the one before is held.
        on_checkpoint: called with each finished checkpoint.
        products: wraps the operator of a checkpoint (given its index), so that products of an
            interrupted checkpoint can be replayed.
        rows_in_memory: bytes of earlier vectors that may be taken from their table at once. None: no limit.
        allocate: makes the (K, n) table of all vectors, in a mapped file say; None makes it in memory.
        krylov: makes the tables of one checkpoint's Krylov vectors; None keeps them in memory.
        displacements: of a trajectory, held at once (:func:`~polca_edit.basis.path.trajectory_basis`).
    """

    finished: Sequence[BasisCheckpoint] = ()
    on_start: Callable[[], None] | None = None
    on_checkpoint: Callable[[BasisCheckpoint], object] | None = None
    products: Callable[[int, Product], Product] | None = None
    rows_in_memory: int | None = None
    allocate: Allocate | None = None
    krylov: Allocate | None = None
    displacements: int = HELD


def hessian_basis(
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    count: int,
    settings: EigenSettings | None = None,
    *,
    keeping: Keeping | None = None,
) -> Basis:
    """Algorithm 1 of arXiv 2506.15872: top eigenvectors of Pi H_t Pi, checkpoint after checkpoint.

    Pi projects off all vectors found before; the symmetric form Pi H Pi is used. Lanczos starts
    from the last checkpoint's next Ritz vectors: those it found are projected out.

    Args:
        objective: the token loss.
        checkpoints: the series; vectors are taken at equally spaced checkpoints, the last one
            included, or at all of them where ``count`` needs as many.
        tokens: the curvature sample X.
        count: K, vectors in all.
        settings: vectors per checkpoint, accuracy, seed, mask.
        keeping: hooks for resuming and streaming.

    Raises:
        ValueError: for more vectors than the checkpoints can give.
    """
    settings, keeping = settings or EigenSettings(), keeping or Keeping()
    chosen = checkpoints.spaced(-(-count // settings.per_checkpoint))
    # One draw seeds every checkpoint apart, so that a resumed basis gets the same start vectors.
    seed = int(torch.randint(2**31, (1,), generator=settings.generator()))
    expected = 8 * settings.per_checkpoint * len(chosen)
    found = _algorithm_one(
        lambda index: objective.hessian(chosen[index], tokens, expected=expected, inside=settings.inside),
        chosen,
        range(len(keeping.finished), len(chosen)),
        settings,
        lambda index: torch.Generator().manual_seed(seed + index),
        keeping.finished,
        keeping,
    )
    basis = found.basis("hessian", settings.inside)
    return basis if len(basis) == count else basis[:count]


def operator_basis(
    kind: str,
    product_at: Callable[[int], Product],
    checkpoints: Checkpoints,
    settings: EigenSettings | None = None,
    *,
    order: Sequence[int] | None = None,
    before: Sequence[BasisCheckpoint] = (),
    generator: torch.Generator | None = None,
) -> Basis:
    """Algorithm 1 with any symmetric operator in place of the Hessian.

    Args:
        kind: name of the basis.
        product_at: index into ``checkpoints`` -> the operator's product there, between the entries of
            ``settings.inside``.
        checkpoints: basis checkpoints, all of which are used.
        settings: vectors per checkpoint, accuracy, seed, mask.
        order: indices in the order they are taken; default as they come.
        before: vectors that are already in the basis and come first.
        generator: draws the start vectors; default a fresh one from the settings' seed.
    """
    settings = settings or EigenSettings()
    drawn = generator or settings.generator()
    wanted = range(len(checkpoints)) if order is None else order
    found = _algorithm_one(product_at, checkpoints, wanted, settings, lambda _: drawn, before, Keeping())
    return found.basis(kind, settings.inside)


class _Found:
    """Checkpoints done so far, whose vectors lie in one table: copies of it would be most of the memory."""

    def __init__(self, vectors: int, keeping: Keeping) -> None:
        """``vectors`` is how many there will be."""
        self.parts: list[BasisCheckpoint] = []
        self._vectors, self._keeping = vectors, keeping
        self._table: Tensor | None = None

    def add(self, part: BasisCheckpoint) -> None:
        """Take over a checkpoint's vectors; its start vectors alone are wanted from now on."""
        if self._table is None:
            self._table = (self._keeping.allocate or part.rows.new_empty)(self._vectors, part.rows.shape[1])
        rows = self._table[self.count : self.count + len(part.rows)].copy_(part.rows)
        if self.parts:
            self.parts[-1] = replace(self.parts[-1], following=None)
        # Later vectors are orthogonal to those that were found, not to what a table of fewer bits holds.
        self.parts.append(replace(part, rows=rows) if rows.dtype == part.rows.dtype else part)

    @property
    def count(self) -> int:
        """Vectors so far."""
        return sum(len(part.rows) for part in self.parts)

    def rows(self) -> Sequence[Tensor]:
        """(n, N) the vectors so far, in blocks that may be held at once."""
        if self._table is None or self._table.dtype != self.parts[0].rows.dtype:
            return [part.rows for part in self.parts]
        rows = self._table[: self.count]
        each, most = rows.shape[1] * rows.element_size(), self._keeping.rows_in_memory
        return [rows] if most is None else rows.split(max(1, most // each))

    def basis(self, kind: str, inside: Subset | None) -> Basis:
        """All vectors."""
        return join(kind, self.parts, inside, None if self._table is None else self._table[: self.count])


def _algorithm_one(
    product_at: Callable[[int], Product],
    checkpoints: Checkpoints,
    order: Sequence[int],
    settings: EigenSettings,
    generator_at: Callable[[int], torch.Generator],
    before: Sequence[BasisCheckpoint],
    keeping: Keeping,
) -> _Found:
    """Those before and the checkpoints still to come."""
    found = _Found(sum(len(part.rows) for part in before) + settings.per_checkpoint * len(order), keeping)
    for part in before:
        found.add(part)
    for index in order:
        if keeping.on_start is not None:
            keeping.on_start()
        theta, product = checkpoints[index], product_at(index)
        checkpoints.forget()  # each is read once, and Lanczos needs the room
        if keeping.products is not None:
            product = keeping.products(index, product)
        step, generator = checkpoints.steps[index], generator_at(index)
        part = next_vectors(product, theta, found.parts, step, generator, settings, keeping, found.rows())
        if keeping.on_checkpoint is not None:
            keeping.on_checkpoint(part)
        found.add(part)
        # What the next checkpoint linearises does not lie beside what this one did.
        del product, theta, part
    return found


def in_fewer_bits(product: Product) -> Product:
    """The same product with its matrix products taken in bfloat16."""
    return matrix_products(torch.bfloat16)(product)


def next_vectors(
    product: Product,
    theta: Float[Tensor, " N"],
    parts: Sequence[BasisCheckpoint],
    step: int,
    generator: torch.Generator,
    settings: EigenSettings,
    keeping: Keeping | None = None,
    rows: Rows | None = None,
) -> BasisCheckpoint:
    """Top eigenpairs of the operator at one checkpoint, off the vectors found so far and inside the mask.

    Args:
        product: v (n,) -> A v (n,), between the entries that vectors may use.
        theta: weights there; their dtype and device are those of the vectors.
        parts: vectors found at earlier checkpoints.
        step: optimiser step of this one.
        generator: draws what the warm start does not supply.
        settings: vectors, accuracy, mask.
        keeping: its ``krylov``.
        rows: the vectors found at all of them, as they lie in a table; None takes those of ``parts``.
    """
    keeping, like = keeping or Keeping(), taken(theta, settings.inside)
    start, extra = parts[-1].following if parts else None, 0
    if start is not None:
        # The vectors found last are projected out; the Ritz vectors behind them are their successors.
        start = start.to(theta)
    elif parts and settings.mask is None:
        # Without them, what is left of H v, v the last vectors, points the same way.
        start = torch.stack([product(vector) for vector in parts[-1].rows.to(theta)])
        extra = len(start)
    seek = partial(
        projected_lanczos,
        like=like,
        k=settings.per_checkpoint,
        generator=generator,
        rows=[part.rows for part in parts] if rows is None else rows,
        allocate=keeping.krylov,
    )
    lanczos = settings.lanczos(following=settings.per_checkpoint, noise=1e-3 if extra == 0 else 0.02)
    sought = None
    if settings.coarse:
        found = seek(in_fewer_bits(product), settings=lanczos, start=start)
        start, sought, extra = found.vectors, found.following, extra + found.products
        lanczos = replace(lanczos, noise=0.0)
    pairs = seek(product, settings=lanczos, start=start)
    # One exact product a vector leaves no Ritz vectors behind it; those it was sought with stand for them.
    behind = next((some for some in (pairs.following, sought) if some is not None and len(some)), None)
    return BasisCheckpoint(step, pairs.vectors, pairs.values, pairs.residuals, pairs.products + extra, behind)


def join(
    kind: str,
    parts: Sequence[BasisCheckpoint],
    inside: Subset | None = None,
    rows: Float[Tensor, "m n"] | None = None,
) -> Basis:
    """One basis from the vectors of several checkpoints.

    Args:
        kind: name of the basis.
        parts: vectors of each checkpoint.
        inside: the entries that their rows are; None for whole rows.
        rows: all of them in one table; None copies them into one.
    """
    rows = torch.cat([part.rows for part in parts]) if rows is None else rows
    basis = Basis(
        kind,
        rows,
        torch.tensor([part.step for part in parts for _ in part.rows]),
        torch.cat([part.eigenvalues for part in parts]).double(),
        torch.cat([part.residuals for part in parts]).double(),
        products=sum(part.products for part in parts),
    )
    return confined(basis, inside)
