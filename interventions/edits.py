"""Edits: weights in, weights out. Every operator is a constructor of :class:`Edit`.

theta' = theta_base + sum_j z_j b_j. Operator names and numbers (O1 ...) follow the causal
protocol; theta_ref is a reference checkpoint, B_J the chosen rows, P_J = B_J' B_J.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polca_edit.allocation.allocate import coordinates
from polca_edit.parameters import ParameterSpace


def weights_fingerprint(theta: Float[Tensor, " N"]) -> str:
    """SHA-256 of a flat weight vector's bytes."""
    return hashlib.sha256(theta.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


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

    def delta(self) -> Float[Tensor, " N"]:
        """The movement as a flat vector, in the rows' dtype."""
        return (self.coordinates.to(self.rows) @ self.rows) if self.rank else torch.zeros(self.rows.shape[1])

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
        from polca_edit.curvature import orthonormalise

        rows = orthonormalise(torch.cat([self.rows, other.rows]))
        total = self.delta().double() + other.delta().double()
        return Edit(
            self.base,
            rows,
            coordinates(rows, total),
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
        if weights_fingerprint(theta) != self.base:
            raise ValueError(
                "an edit only applies to the weights it was made for; these differ, load that checkpoint"
            )
        return self.moved(theta)

    def moved(self, theta: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Theta + delta without the fingerprint check; zero coordinates add nothing at all."""
        active = self.coordinates != 0
        if not bool(active.any()):
            return theta.clone()
        return theta + (self.coordinates[active].to(theta) @ self.rows[active].to(theta))


@contextmanager
def applied(module: nn.Module, space: ParameterSpace, edit: Edit) -> Iterator[nn.Module]:
    """The edited module within the block; afterwards every weight is back bit for bit.

    Raises:
        ValueError: if the module does not hold the weights the edit was made for.
    """
    with space.substituted(module, edit.apply(space.read(module))):
        yield module


def from_delta(
    base: str, moved: Float[Tensor, " N"], operator: str, *, provenance: dict[str, object] | None = None
) -> Edit:
    """A rank-one edit from any movement (rivals outside the span included)."""
    size = moved.double().norm()
    unit = moved / size.clamp_min(1e-300).to(moved)
    return Edit(base, unit[None], size[None], operator, provenance=provenance or {})


def project_out(
    theta: Float[Tensor, " N"],
    reference: Float[Tensor, " N"],
    rows: Float[Tensor, "k N"],
    **provenance: object,
) -> Edit:
    """O1: theta - P_J (theta - theta_ref), the net movement along the rows undone."""
    return reverse(theta, reference, rows, 1.0, operator="project_out", **provenance)


def reverse(
    theta: Float[Tensor, " N"],
    reference: Float[Tensor, " N"],
    rows: Float[Tensor, "k N"],
    dose: float,
    *,
    operator: str = "reverse",
    **provenance: object,
) -> Edit:
    """O2: theta - dose P_J (theta - theta_ref); 0 is nothing, 1 is O1, 2 a reflection."""
    back = -coordinates(rows, theta - reference) * dose
    return Edit(weights_fingerprint(theta), rows, back, operator, dose, dict(provenance))


def rollback_subtract(
    theta: Float[Tensor, " N"],
    start: Float[Tensor, " N"],
    end: Float[Tensor, " N"],
    rows: Float[Tensor, "k N"],
    **provenance: object,
) -> Edit:
    """O3a: theta - P_J (theta_t2 - theta_t1), one window's movement undone."""
    return Edit(
        weights_fingerprint(theta),
        rows,
        -coordinates(rows, end - start),
        "rollback_subtract",
        1.0,
        dict(provenance),
    )


def rollback_rewind(
    theta: Float[Tensor, " N"], start: Float[Tensor, " N"], rows: Float[Tensor, "k N"], **provenance: object
) -> Edit:
    """O3b: theta - P_J (theta - theta_t1), the coordinates put back to the window's start."""
    return reverse(theta, start, rows, 1.0, operator="rollback_rewind", **provenance)


def branch_skip(
    theta: Float[Tensor, " N"], start: Float[Tensor, " N"], rows: Float[Tensor, "k N"], **provenance: object
) -> Edit:
    """O3c: theta_t2 - P_J (theta_t2 - theta_t1), made at t2; training goes on from the edited weights."""
    return reverse(theta, start, rows, 1.0, operator="branch_skip", **provenance)


def transplant(
    source: Float[Tensor, " N"], theta: Float[Tensor, " N"], rows: Float[Tensor, "k N"], **provenance: object
) -> Edit:
    """O4: theta_s + P_J (theta - theta_s), an edit of the early weights theta_s (sufficiency)."""
    return Edit(
        weights_fingerprint(source),
        rows,
        coordinates(rows, theta - source),
        "transplant",
        1.0,
        dict(provenance),
    )


def displace(
    theta: Float[Tensor, " N"],
    rows: Float[Tensor, "k N"],
    shift: Float[Tensor, " k"] | Sequence[float],
    operator: str,
    **provenance: object,
) -> Edit:
    """Any coordinates along any rows: random controls, optimised edits."""
    z = torch.as_tensor(shift, dtype=torch.float64)
    return Edit(weights_fingerprint(theta), rows, z, operator, 1.0, dict(provenance))


def complement(
    source: Float[Tensor, " N"], theta: Float[Tensor, " N"], rows: Float[Tensor, "k N"], **provenance: object
) -> Edit:
    """O4': theta_s + (I - P_J)(theta - theta_s) as an edit of theta; equals O1 with reference theta_s."""
    return reverse(theta, source, rows, 1.0, operator="complement", **provenance)


def movement_outside(
    source: Float[Tensor, " N"], theta: Float[Tensor, " N"], rows: Float[Tensor, "k N"], **provenance: object
) -> Edit:
    """Edit of the early weights theta_s that inserts everything but the movement along the rows.

    The weights reached are those of :func:`complement`; as an edit of theta_s it measures the gain.
    """
    moved = (theta - source).double()
    moved = moved - coordinates(rows, moved) @ rows.double()
    size = moved.norm()
    unit = (moved / size.clamp_min(1e-300)).to(theta)[None]
    return Edit(weights_fingerprint(source), unit, size[None], "movement_outside", 1.0, dict(provenance))


def amplify(
    theta: Float[Tensor, " N"],
    start: Float[Tensor, " N"],
    end: Float[Tensor, " N"],
    rows: Float[Tensor, "k N"],
    strength: float,
) -> Edit:
    """O5'': theta + strength P_J (theta_t2 - theta_t1), a planned movement made early or once more."""
    shift = coordinates(rows, end - start) * strength
    return Edit(weights_fingerprint(theta), rows, shift, "amplify", strength, {})


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
