"""POLCA: how much of each token's loss change each basis vector accounts for.

Derivatives are stored apart from the rule that integrates them (:class:`Projections`), because
rotations, nulls and closed-form edits need them again. Equation numbers are those of
arXiv 2506.15872.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polca_edit.allocation.directions import directions_at, displacement
from polca_edit.allocation.progress import progress
from polca_edit.basis.record import Basis, require_orthonormal
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import lengths
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet

Rule = Literal["first_order", "second_order", "trapezoid", "simpson", "quadrature"]


@dataclass(frozen=True)
class Projections:
    """Token derivatives and weight displacements along basis vectors.

    The residual direction of interval t is (I - B'B)(theta_{t+1} - theta_t); its derivatives are
    measured like those of any vector, never obtained by subtraction.

    Attributes:
        steps: (T,) optimiser steps.
        losses: (T, M) exact losses, nats.
        gradients: (T, K, M) <b, g_t(x)>, nats per weight unit.
        displacements: (T-1, K) <b, theta_{t+1} - theta_t>, weight units.
        residual_start: (T-1, M) derivative along the residual at the interval's start, nats.
        residual_end: (T-1, M) the same at its end.
        residual_norms: (T-1,) norm of the residual direction.
        step_norms: (T-1,) norm of the whole displacement.
        interior_interval: (I,) interval of each interior quadrature node.
        interior_position: (I,) its place s in (0, 1) on the straight line.
        interior_weight: (I,) its quadrature weight.
        end_weights: (T-1, 2) weights of the two ends in rule ``quadrature``.
        interior_gradients: (I, K, M).
        interior_residual: (I, M).
        mean_gradients: (T, K) <b, g_t(X)> on the curvature sample, for Eq. 6.
        curvatures: (T-1, K) b' H_t(X) b, for Eq. 6.
    """

    steps: Int[Tensor, " T"]
    losses: Float[Tensor, "T M"]
    gradients: Float[Tensor, "T K M"]
    displacements: Float[Tensor, "Tm1 K"]
    residual_start: Float[Tensor, "Tm1 M"]
    residual_end: Float[Tensor, "Tm1 M"]
    residual_norms: Float[Tensor, " Tm1"]
    step_norms: Float[Tensor, " Tm1"]
    interior_interval: Int[Tensor, " I"] | None = None
    interior_position: Float[Tensor, " I"] | None = None
    interior_weight: Float[Tensor, " I"] | None = None
    end_weights: Float[Tensor, "Tm1 2"] | None = None
    interior_gradients: Float[Tensor, "I K M"] | None = None
    interior_residual: Float[Tensor, "I M"] | None = None
    mean_gradients: Float[Tensor, "T K"] | None = None
    curvatures: Float[Tensor, "Tm1 K"] | None = None

    def rotated(self, rotation: Float[Tensor, "K K"]) -> Projections:
        """Projections onto the rows R'B; no model is needed."""
        rotation = rotation.to(self.gradients.dtype)
        interior = self.interior_gradients
        return replace(
            self,
            gradients=torch.einsum("kj,tkm->tjm", rotation, self.gradients),
            displacements=self.displacements @ rotation.to(self.displacements.dtype),
            interior_gradients=None if interior is None else torch.einsum("kj,tkm->tjm", rotation, interior),
            mean_gradients=None,
            curvatures=None,
        )


@dataclass(frozen=True)
class Allocation:
    """Loss change per interval, vector and token; parts + residual + quadrature error = exact.

    Attributes:
        rule: the quadrature rule.
        steps: (T,) optimiser steps.
        values: (T-1, K, M) nats given to each vector.
        residual: (T-1, M) nats given to the residual direction.
        exact: (T-1, M) exact loss change.
        guarded: denominators of Eq. 6 that were too small and fell back to first order.
    """

    rule: str
    steps: Int[Tensor, " T"]
    values: Float[Tensor, "Tm1 K M"]
    residual: Float[Tensor, "Tm1 M"]
    exact: Float[Tensor, "Tm1 M"]
    guarded: int = 0

    @property
    def quadrature_error(self) -> Float[Tensor, "Tm1 M"]:
        """Exact change minus everything allocated: what the rule failed to integrate."""
        return self.exact - self.residual - self.values.sum(1)

    def projected_loss(self) -> Float[Tensor, "T K M"]:
        """Running sum of the allocation, zero at the first checkpoint (Eq. 8)."""
        start = torch.zeros_like(self.values[:1])
        return torch.cat([start, self.values.cumsum(0)])

    def totals(self, tokens: Tensor | None = None) -> dict[str, float]:
        """Mean exact, attributed, residual and quadrature-error change over tokens, in nats."""
        chosen = slice(None) if tokens is None else tokens
        return {
            "exact": float(self.exact.sum(0)[chosen].double().mean()),
            "attributed": float(self.values.sum((0, 1))[chosen].double().mean()),
            "residual": float(self.residual.sum(0)[chosen].double().mean()),
            "quadrature_error": float(self.quadrature_error.sum(0)[chosen].double().mean()),
        }


# -- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointSlopes:
    """Derivatives at one checkpoint, for several bases at once.

    Attributes:
        losses: (M,).
        gradients: per basis (K, M).
        before: per basis (M,) derivative along the residual of the interval that ends here.
        after: per basis (M,) the same for the interval that starts here.
    """

    losses: Float[Tensor, " M"]
    gradients: tuple[Float[Tensor, "_ M"], ...]
    before: tuple[Float[Tensor, " M"], ...]
    after: tuple[Float[Tensor, " M"], ...]


@runtime_checkable
class CheckpointMap(Protocol):
    """Applies a function to every index; may cache, resume or run elsewhere."""

    def __call__(
        self, function: Callable[[int], CheckpointSlopes], indices: Sequence[int], /
    ) -> Iterable[CheckpointSlopes]:
        """Results in the order of the indices."""
        ...


def slopes_at(
    objective: Objective,
    checkpoints: Checkpoints,
    bases: Sequence[Basis],
    tokens: TokenSet,
    index: int,
    *,
    derivative_scale: float = 1.0,
) -> CheckpointSlopes:
    """Token derivatives at one checkpoint along all rows and the residuals of its two intervals.

    ``derivative_scale`` is for tests only: a wrong derivative must surface as quadrature error.
    """
    theta, rows = directions_at(checkpoints, bases, index)
    planned = len(rows) * len(checkpoints)
    losses, slopes = objective.directional(theta, rows, tokens, expected=planned)
    return slopes_from(losses, slopes * derivative_scale, bases)


def slopes_from(
    losses: Float[Tensor, " M"], slopes: Float[Tensor, "R M"], bases: Sequence[Basis]
) -> CheckpointSlopes:
    """The record of one checkpoint from the slopes along :func:`directions_at`."""
    blocks = slopes.split([len(basis) + 2 for basis in bases])
    return CheckpointSlopes(
        losses,
        tuple(block[:-2] for block in blocks),
        tuple(block[-2] for block in blocks),
        tuple(block[-1] for block in blocks),
    )


def project(
    objective: Objective,
    checkpoints: Checkpoints,
    bases: Sequence[Basis],
    tokens: TokenSet,
    *,
    mapped: CheckpointMap = map,
    derivative_scale: float = 1.0,
) -> list[Projections]:
    """Projections of every basis, sharing the forward passes at each checkpoint.

    Args:
        objective: the token loss.
        checkpoints: the whole series.
        bases: one or more.
        tokens: where derivatives are taken.
        mapped: runs the checkpoints; pass a caching map to resume.
        derivative_scale: see :func:`slopes_at`.

    Raises:
        ValueError: for a basis whose rows are not orthonormal, or a series that is too short.
    """
    slopes = measured_slopes(
        objective, checkpoints, bases, tokens, mapped=mapped, derivative_scale=derivative_scale
    )
    return [assemble(checkpoints, basis, number, slopes) for number, basis in enumerate(bases)]


def measured_slopes(
    objective: Objective,
    checkpoints: Checkpoints,
    bases: Sequence[Basis],
    tokens: TokenSet,
    *,
    mapped: CheckpointMap = map,
    derivative_scale: float = 1.0,
) -> list[CheckpointSlopes]:
    """What :func:`project` measures, one record per checkpoint."""
    checkpoints.require()
    for basis in bases:
        require_orthonormal(basis)

    def at(index: int) -> CheckpointSlopes:
        return slopes_at(objective, checkpoints, bases, tokens, index, derivative_scale=derivative_scale)

    count = len(checkpoints)
    return list(progress(mapped(at, range(count)), "projections", total=count))


def assemble(
    checkpoints: Checkpoints, basis: Basis, number: int, slopes: Sequence[CheckpointSlopes]
) -> Projections:
    """One basis's record from the slopes at every checkpoint."""
    displacements, residual_norms, step_norms = [], [], []
    for index in range(len(checkpoints) - 1):
        moved = displacement(checkpoints, index, 1)
        displacements.append(basis.along(moved))
        residual_norms.append(lengths(basis.remainder(moved)[None])[0])
        step_norms.append(lengths(moved[None])[0])
    dtype = slopes[0].losses.dtype
    return Projections(
        torch.tensor(checkpoints.steps),
        torch.stack([s.losses for s in slopes]),
        torch.stack([s.gradients[number] for s in slopes]),
        torch.stack(displacements).to(dtype),
        torch.stack([s.after[number] for s in slopes[:-1]]),
        torch.stack([s.before[number] for s in slopes[1:]]),
        torch.stack(residual_norms).to(dtype),
        torch.stack(step_norms).to(dtype),
    )


# -- integrating ----------------------------------------------------------------------------------


def allocate(projections: Projections, rule: Rule = "trapezoid", *, guard: float = 1e-6) -> Allocation:
    """Integrate stored derivatives over each interval.

    - ``first_order`` (Eq. 2): <b, g_t(x)> <b, dtheta_t>.
    - ``second_order`` (Eq. 6): plus 1/2 lambda_t d^2 <g_{t+1}(x) - g_t(x), b> / <g_{t+1}(X) - g_t(X), b>.
      Where the denominator is below ``guard`` times its root mean square over the vector's
      intervals, or below the rounding of the token slopes, the term is dropped and counted.
    - ``trapezoid``: 1/2 <b, g_t(x) + g_{t+1}(x)> <b, dtheta_t>; exact for quadratic losses in any basis.
    - ``simpson``: 1/6, 4/6 and 1/6 of the derivatives at start, middle and end; exact for quartic losses.
    - ``quadrature``: the nodes and weights stored in the record (Simpson, Gauss-Legendre, adaptive).

    Args:
        projections: stored derivatives.
        rule: as above.
        guard: relative threshold for the denominators of Eq. 6.

    Raises:
        ValueError: if the record lacks what the rule needs.
    """
    p = projections
    moves = p.displacements[:, :, None]
    exact = p.losses.diff(dim=0)
    guarded = 0
    if rule == "first_order":
        values, residual = p.gradients[:-1] * moves, p.residual_start
    elif rule == "trapezoid":
        values = (p.gradients[:-1] + p.gradients[1:]) / 2 * moves
        residual = (p.residual_start + p.residual_end) / 2
    elif rule == "second_order":
        values, guarded = _second_order(p, guard)
        residual = p.residual_start
    else:
        if rule == "simpson":
            _require_middles(p)
        values, residual = _stored_quadrature(p)
    return Allocation(rule, p.steps, values, residual, exact, guarded)


def _second_order(p: Projections, guard: float) -> tuple[Tensor, int]:
    if p.mean_gradients is None or p.curvatures is None:
        raise ValueError(
            "Eq. 6 needs mean gradients and curvatures of the curvature sample; run second_order_terms first"
        )
    change = p.mean_gradients.diff(dim=0).to(p.gradients.dtype)
    scale = change.square().mean(0, keepdim=True).sqrt()
    # Along a flat direction every denominator is the rounding of a mean of far larger token slopes.
    token_change = p.gradients.diff(dim=0)
    rounding = 100 * torch.finfo(change.dtype).eps * token_change.square().mean(2).sqrt()
    usable = change.abs() > torch.maximum(guard * scale, rounding)
    factor = torch.where(
        usable,
        p.curvatures.to(change) * p.displacements.square() / (2 * torch.where(usable, change, 1.0)),
        0.0,
    )
    values = p.gradients[:-1] * p.displacements[:, :, None] + factor[:, :, None] * token_change
    return values, int((~usable).sum())


def _require_middles(p: Projections) -> None:
    """Three places in every interval: an odd number in any window, whatever its length."""
    places = None if p.interior_position is None else p.interior_position.tolist()
    numbers = None if p.interior_interval is None else p.interior_interval.tolist()
    if places != [0.5] * len(p.displacements) or numbers != [*range(len(p.displacements))]:
        raise ValueError(
            "rule 'simpson' needs derivatives at the middle of every interval, these projections have none; "
            "measure them with rule='simpson' (terms.project_for), or use rule 'trapezoid'"
        )


def _stored_quadrature(p: Projections) -> tuple[Tensor, Tensor]:
    if p.end_weights is None or p.interior_interval is None or p.interior_weight is None:
        raise ValueError("rule 'quadrature' needs interior nodes; measure them first or use 'trapezoid'")
    assert p.interior_gradients is not None
    assert p.interior_residual is not None
    start, end = p.end_weights[:, 0], p.end_weights[:, 1]
    slopes = p.gradients[:-1] * start[:, None, None] + p.gradients[1:] * end[:, None, None]
    residual = p.residual_start * start[:, None] + p.residual_end * end[:, None]
    slopes = slopes.index_add(0, p.interior_interval, p.interior_gradients * p.interior_weight[:, None, None])
    residual = residual.index_add(0, p.interior_interval, p.interior_residual * p.interior_weight[:, None])
    return slopes * p.displacements[:, :, None], residual


def explained_share(attributed: float, exact: float) -> float | None:
    """Attributed / exact, or None where |exact| < 0.01 nats."""
    return None if abs(exact) < 0.01 else attributed / exact


def loss_change(allocation: Allocation, groups: Mapping[str, Tensor]) -> dict[str, object]:
    """The ``loss_change`` entry of a summary: means over all tokens and per group, nats."""
    result: dict[str, object] = dict(allocation.totals())
    result["per_group"] = {name: allocation.totals(mask) for name, mask in groups.items() if bool(mask.any())}
    return result
