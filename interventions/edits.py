"""Edits: weights in, weights out. Every operator is a constructor of :class:`Edit`.

theta' = theta + sum_j z_j b_j. A :class:`Movement` says what was recorded between two checkpoints and
which weights are edited; an operator takes it and orthonormal rows B_J, with P_J = B_J' B_J, and
returns the coordinates z. Operator numbers (O1 ...) in docstrings are those of the causal protocol.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polca_edit.basis.record import Basis, gram_error
from polca_edit.derivatives.lanczos import WIDTH, coordinates, exact_length, lengths, orthonormalise
from polca_edit.parameters import ParameterSpace


def weights_fingerprint(theta: Float[Tensor, " N"]) -> str:
    """SHA-256 of a flat weight vector's bytes."""
    return hashlib.sha256(theta.detach().cpu().contiguous().numpy().data).hexdigest()


@dataclass(frozen=True, eq=False)
class Movement:
    """What training did between two checkpoints, and the weights in which it is undone.

    Attributes:
        theta: (N,) weights that are edited.
        start: (N,) weights at the start of the window.
        end: (N,) weights at its end; None where the window ends at ``theta``.
    """

    theta: Float[Tensor, " N"]
    start: Float[Tensor, " N"]
    end: Float[Tensor, " N"] | None = None

    @cached_property
    def base(self) -> str:
        """Fingerprint of ``theta``, hashed once however many edits are made."""
        return weights_fingerprint(self.theta)

    @cached_property
    def source(self) -> str:
        """Fingerprint of ``start``, the base of a transplant."""
        return weights_fingerprint(self.start)

    @cached_property
    def displacement(self) -> Float[Tensor, " N"]:
        """End minus start."""
        return (self.theta if self.end is None else self.end) - self.start

    def along(self, rows: Float[Tensor, "k N"]) -> Float[Tensor, " k"]:
        """Displacement along orthonormal rows, float64."""
        return coordinates(rows, self.displacement)


@runtime_checkable
class HasMovement(Protocol):
    """Anything that knows its movement, above all an evaluated split."""

    @property
    def movement(self) -> Movement:
        """The movement between the two ends."""


Place = Movement | HasMovement
Rows = Basis | Tensor


def movement_of(place: Place) -> Movement:
    """The movement itself, or that of a split."""
    return place if isinstance(place, Movement) else place.movement


def rows_of(rows: Rows) -> Float[Tensor, "k N"]:
    """Orthonormal rows of a basis or a tensor; one vector (N,) is one row.

    Raises:
        ValueError: for rows that are not orthonormal (P_J would be no projection).
    """
    if isinstance(rows, Basis):
        sizes = lengths(rows.rows)
        if not bool(((sizes - 1).abs() <= 1e-3).all()):
            raise ValueError(
                f"rows of a basis must have length 1, '{rows.kind}' has {float(sizes.min()):.3g} to "
                f"{float(sizes.max()):.3g}; orthonormalise them (torch.linalg.qr)"
            )
        return rows.rows
    rows = rows[None] if rows.ndim == 1 else rows
    if len(rows):
        error = gram_error(rows)
        if not error <= 1e-3:
            raise ValueError(
                f"rows of an edit must be orthonormal, |B B' - I| is {error:.3g}; "
                "pass a Basis, or rows from torch.linalg.qr"
            )
    return rows


@dataclass(frozen=True)
class Edit:
    """A movement inside the span of a few orthonormal rows, made for one set of weights.

    Attributes:
        base: fingerprint of the weights it was made for.
        rows: (k, N) orthonormal.
        coordinates: (k,) z, float64, weight units.
        operator: name of the constructor.
        dose: alpha of the operator, for records.
        provenance: where it came from (basis, vectors, reference step).
    """

    base: str
    rows: Float[Tensor, "k N"]
    coordinates: Float[Tensor, " k"]
    operator: str
    dose: float = 1.0
    provenance: dict[str, object] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """Length of the edit in weight space."""
        return float(self.coordinates.norm())

    @property
    def rank(self) -> int:
        """Number of rows."""
        return self.rows.shape[0]

    @cached_property
    def key(self) -> str:
        """Hash of base, rows and coordinates: two edits with one key move the same weights alike."""
        digest = hashlib.sha256(self.base.encode())
        active = self.coordinates != 0
        for tensor in (*(self.rows[n] for n in active.nonzero()[:, 0]), self.coordinates[active]):
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def delta(self) -> Float[Tensor, " N"]:
        """The movement as a flat vector, in the rows' dtype."""
        if not self.rank:
            return torch.zeros(self.rows.shape[1], dtype=self.rows.dtype)
        return self.coordinates.to(self.rows) @ self.rows

    def scaled(self, dose: float) -> Edit:
        """The same edit with every coordinate times ``dose``."""
        return replace(self, coordinates=self.coordinates * dose, dose=self.dose * dose)

    def then(self, other: Edit) -> Edit:
        """Both movements at once, as one edit of the same base.

        Raises:
            ValueError: if the two were made for different weights.
        """
        if self.base != other.base:
            raise ValueError("edits compose only on the same base weights; make both for the same checkpoint")
        rows = orthonormalise(torch.cat([self.rows, other.rows]))
        along = coordinates(rows, self.delta()) + coordinates(rows, other.delta())
        return Edit(
            self.base,
            rows,
            along,
            f"{self.operator}+{other.operator}",
            provenance={"first": self.provenance, "second": other.provenance},
        )

    def restricted(self, mask: Tensor) -> Edit:
        """The part of the movement inside a parameter mask (one layer, head, tensor)."""
        moved = self.delta() * mask.to(self.rows.dtype)
        return from_delta(self.base, moved, f"{self.operator}|subset", provenance=self.provenance)

    def apply(self, theta: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Edited weights. A zero edit returns the same bytes.

        Raises:
            ValueError: if the weights are not those the edit was made for.
        """
        if theta.shape[0] != self.rows.shape[1]:
            raise ValueError(
                f"an edit of {self.rows.shape[1]} parameters cannot edit {theta.shape[0]}; another model?"
            )
        self.require_base(weights_fingerprint(theta))
        return self.moved(theta)

    def require_base(self, fingerprint: str) -> None:
        """Nothing where the fingerprint is the base's.

        Raises:
            ValueError: for the fingerprint of other weights.
        """
        if fingerprint != self.base:
            raise ValueError(
                "an edit only applies to the weights it was made for; these differ, load that checkpoint"
            )

    def moved(self, theta: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Theta + delta without the fingerprint check; zero coordinates add nothing at all."""
        active = self.coordinates != 0
        if not bool(active.any()):
            return theta.clone()
        z, rows = self.coordinates, self.rows
        alike = rows.dtype == theta.dtype and rows.device == theta.device
        if not alike or 8 * int(active.sum()) <= len(rows):
            z, rows = z[active], rows[active].to(theta)
        # Of several like theta none is left out, which would copy the others: the rest adds exact zeros.
        return (z.to(theta) @ rows).add_(theta)


@contextmanager
def applied(module: nn.Module, edit: Edit, space: ParameterSpace | None = None) -> Iterator[nn.Module]:
    """The edited module within the block; afterwards every weight is back bit for bit.

    Args:
        module: holds the weights the edit was made for.
        edit: what is done to them.
        space: which parameters the edit is of; all trainable ones by default.

    Raises:
        ValueError: if the module does not hold those weights.
    """
    space = space or ParameterSpace.from_module(module)
    with space.substituted(module, edit.apply(space.read(module))):
        yield module


def from_delta(
    base: str, moved: Float[Tensor, " N"], operator: str, *, provenance: dict[str, object] | None = None
) -> Edit:
    """A rank-one edit from any movement (rivals outside the span included); rank zero for none at all."""
    size, kept = torch.tensor([exact_length(moved)], dtype=torch.float64), provenance or {}
    if float(size) == 0.0:
        return Edit(base, moved.new_zeros(0, moved.shape[0]), size[:0], operator, provenance=kept)
    # Divided in float64: a float32 movement below 1e-38 would divide by zero otherwise.
    unit = torch.empty_like(moved)
    for part, given in zip(unit.split(WIDTH), moved.split(WIDTH), strict=True):
        part.copy_(given.double() / size)
    return Edit(base, unit[None], size, operator, provenance=kept)


def project_out(place: Place, rows: Rows, **provenance: object) -> Edit:
    """O1: theta - P_J (end - start), the movement of the window along the rows undone.

    Args:
        place: a movement, or a split that has one.
        rows: (k, N) orthonormal, or a basis.
        **provenance: kept with the edit.

    >>> import torch
    >>> movement = Movement(torch.tensor([3.0, 4.0]), torch.zeros(2))
    >>> project_out(movement, torch.tensor([[1.0, 0.0]])).apply(movement.theta).tolist()
    [0.0, 4.0]
    """
    return reverse(place, rows, 1.0, operator="project_out", **provenance)


def reverse(
    place: Place, rows: Rows, dose: float, *, operator: str = "reverse", **provenance: object
) -> Edit:
    """O2: theta - dose P_J (end - start); 0 is nothing, 1 is O1, 2 a reflection."""
    movement, rows = movement_of(place), rows_of(rows)
    return Edit(movement.base, rows, -movement.along(rows) * dose, operator, dose, dict(provenance))


def rollback(place: Place, rows: Rows | None = None, *, rewind: bool = False, **provenance: object) -> Edit:
    """O3: the window's movement undone in theta, whole or along rows.

    Args:
        place: the window.
        rows: (k, N); None undoes the movement at full rank.
        rewind: put the coordinates back to the window's start, later movement along the rows included
            (O3b: theta - P_J (theta - start)) instead of subtracting the window's (O3a).
        **provenance: kept with the edit.
    """
    movement = movement_of(place)
    back = Movement(movement.theta, movement.start) if rewind else movement
    name = "rollback_rewind" if rewind else "rollback"
    if rows is None:
        return from_delta(movement.base, -back.displacement, name, provenance=dict(provenance))
    rows = rows_of(rows)
    return Edit(movement.base, rows, -back.along(rows), name, 1.0, dict(provenance))


def transplant(
    place: Place, rows: Rows, *, outside: bool = False, size: float = 1.0, **provenance: object
) -> Edit:
    """O4: start + P_J (end - start), an edit of the early weights (sufficiency).

    Args:
        place: the window; its start is what is edited.
        rows: (k, N) orthonormal, or a basis.
        outside: insert everything but the movement along the rows instead (O4').
        size: factor on what is inserted.
        **provenance: kept with the edit.
    """
    movement, rows = movement_of(place), rows_of(rows)
    along = movement.along(rows)
    if not outside:
        return Edit(movement.source, rows, along * size, "transplant", size, dict(provenance))
    pairs = zip(movement.displacement.split(WIDTH), rows.split(WIDTH, dim=1), strict=True)
    moved = torch.cat([(a.double() - along @ b.double()).to(movement.theta) for a, b in pairs])
    edit = from_delta(movement.source, moved, "transplant_outside", provenance=dict(provenance))
    return edit if size == 1.0 else edit.scaled(size)


def displace(
    place: Place,
    rows: Rows,
    shift: Float[Tensor, " k"] | Sequence[float],
    operator: str,
    **provenance: object,
) -> Edit:
    """Any coordinates along any rows: random controls, optimised edits."""
    z = torch.as_tensor(shift, dtype=torch.float64)
    return Edit(movement_of(place).base, rows_of(rows), z, operator, 1.0, dict(provenance))


def composed(edits: Sequence[Edit]) -> Edit:
    """All movements at once; the order does not matter up to rounding.

    Raises:
        ValueError: for no edit, or edits made for different weights.
    """
    if not edits:
        raise ValueError("at least one edit must be given to compose, got none")
    total = edits[0]
    for edit in edits[1:]:
        total = total.then(edit)
    return total
