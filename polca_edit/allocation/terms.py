"""What a rule needs beyond derivatives at the checkpoints: curvatures for Eq. 6, middles for Simpson.

Simpson's rule wants an odd number of places. Training leaves as many checkpoints as it leaves, so the
middle of every interval is measured too: 2T - 1 places in any window, always odd, and no interval is left
for a closing rule (3/8). The path is the straight line between neighbouring checkpoints, along which the
derivative is taken; the rule is exact where the loss is a polynomial of degree four at most in the way
along each interval, and its error falls with the fourth power of the spacing, the trapezoid's with the
second.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from polca_edit.allocation.allocate import (
    CheckpointMap,
    CheckpointSlopes,
    Projections,
    Rule,
    assemble,
    measured_slopes,
)
from polca_edit.allocation.progress import progress
from polca_edit.allocation.quadrature import fixed_plan, with_nodes
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet


def second_order_terms(
    objective: Objective, checkpoints: Checkpoints, basis: Basis, tokens: TokenSet
) -> tuple[Float[Tensor, "T K"], Float[Tensor, "Tm1 K"]]:
    """<b, g_t(X)> and b' H_t(X) b on the curvature sample, what Eq. 6 needs beyond first order."""
    gradients, curvatures = [], []
    for index in progress(range(len(checkpoints)), "curvatures"):
        theta = checkpoints[index]
        gradients.append(basis.along(objective.mean_gradient(theta, tokens)[1].cpu()))
        if index < len(checkpoints) - 1:
            expected = len(basis) * len(checkpoints)
            product = objective.hessian(theta, tokens, expected=expected, inside=basis.inside)
            curved = [row.double() @ product(row).cpu().double() for row in basis.entries]
            curvatures.append(torch.stack(curved))
    return torch.stack(gradients), torch.stack(curvatures)


# -- Simpson ------------------------------------------------------------------------------------------


def places_of(checkpoints: Checkpoints, rule: Rule) -> Checkpoints:
    """Where a rule takes derivatives: the checkpoints, for ``simpson`` also the middle of each interval."""
    return halved(checkpoints) if rule == "simpson" else checkpoints


def halved(checkpoints: Checkpoints) -> Checkpoints:
    """The series with the middle of every straight interval between its neighbours, 2T - 1 places.

    Steps are counted in halves, so that they stay whole numbers.

    >>> from polca_edit.parameters import ParameterSpace
    >>> space = ParameterSpace(("w",), ((1,),), (("w", "w"),))
    >>> series = halved(Checkpoints(space, (0, 10, 30), lambda i: {"w": torch.tensor([[0.0, 1.0, 4.0][i]])}))
    >>> series.steps, [float(series[i]) for i in range(5)]
    ((0, 10, 20, 40, 60), [0.0, 0.5, 1.0, 2.5, 4.0])
    """

    def read(place: int) -> Mapping[str, Tensor]:
        if place % 2 == 0:
            return checkpoints.read(place // 2)
        start = checkpoints[place // 2]
        return checkpoints.space.unflatten(start + (checkpoints[place // 2 + 1] - start) / 2)

    steps = checkpoints.steps
    spread = [a + b for pair in zip(steps, steps[1:], strict=False) for a, b in ((pair[0],) * 2, pair)]
    spread.append(2 * steps[-1])
    return replace(checkpoints, steps=tuple(spread), read=read, learning_rates=None)


def assemble_for(
    rule: Rule, checkpoints: Checkpoints, basis: Basis, number: int, slopes: Sequence[CheckpointSlopes]
) -> Projections:
    """One basis's record from the slopes at every place of :func:`places_of`.

    Args:
        rule: the quadrature rule they were taken for.
        checkpoints: the series itself.
        basis: the vectors.
        number: of the basis among those measured together.
        slopes: one record per place; residual directions at halves are half as long.

    Raises:
        ValueError: for another number of places than the rule has.
    """
    expected = len(places_of(checkpoints, rule))
    if len(slopes) != expected:
        raise ValueError(
            f"rule '{rule}' takes derivatives at {expected} places of {len(checkpoints)} checkpoints, got "
            f"{len(slopes)}; measure them along places_of(checkpoints, '{rule}')"
        )
    if rule != "simpson":
        return assemble(checkpoints, basis, number, slopes)
    ends, middles = slopes[::2], slopes[1::2]
    whole = [
        replace(s, before=tuple(2 * b for b in s.before), after=tuple(2 * a for a in s.after)) for s in ends
    ]
    return with_nodes(
        assemble(checkpoints, basis, number, whole),
        fixed_plan("simpson", len(middles)),
        [s.gradients[number] for s in middles],
        [s.before[number] + s.after[number] for s in middles],
    )


def project_for(
    rule: Rule,
    objective: Objective,
    checkpoints: Checkpoints,
    bases: Sequence[Basis],
    tokens: TokenSet,
    *,
    curvature: TokenSet | None = None,
    mapped: CheckpointMap = map,
) -> list[Projections]:
    """Projections of every basis with all that a rule needs.

    Args:
        rule: the quadrature rule they will be integrated by.
        objective: the token loss.
        checkpoints: the whole series.
        bases: one or more.
        tokens: where derivatives are taken.
        curvature: the sample of Eq. 6, for rule ``second_order``.
        mapped: runs the places; pass a caching map to resume.

    Raises:
        ValueError: as :func:`~polca_edit.allocation.allocate.project`, or for a rule that lacks its sample.
    """
    checkpoints.require()
    slopes = measured_slopes(objective, places_of(checkpoints, rule), bases, tokens, mapped=mapped)
    if objective.route_note:  # Python shows the same warning of the same place once
        warnings.warn(
            f"derivatives by the slower route '{objective.route_used}': {objective.route_note}", stacklevel=3
        )
    found = [assemble_for(rule, checkpoints, b, number, slopes) for number, b in enumerate(bases)]
    if rule != "second_order":
        return found
    if curvature is None:
        raise ValueError(
            "rule 'second_order' needs a sample for its curvatures; pass curvature=, or use rule 'trapezoid'"
        )
    return [
        with_curvature(objective, checkpoints, basis, curvature, own)
        for basis, own in zip(bases, found, strict=True)
    ]


def with_curvature(
    objective: Objective, checkpoints: Checkpoints, basis: Basis, tokens: TokenSet, projections: Projections
) -> Projections:
    """The record with the terms of Eq. 6 filled in."""
    means, curvatures = second_order_terms(objective, checkpoints, basis, tokens)
    return replace(projections, mean_gradients=means, curvatures=curvatures)


def projections_within(projections: Projections, window: tuple[int, int] | None) -> Projections:
    """What was measured at the checkpoints of a window and in its intervals; nothing is measured anew.

    Raises:
        ValueError: for a window that does not start and end at recorded steps.
    """
    if window is None:
        return projections
    p, steps = projections, projections.steps.tolist()
    if not set(window) <= set(steps) or window[0] >= window[1]:
        raise ValueError(
            f"a window must start and end at recorded steps, {window[0]}:{window[1]} does not; take two of "
            f"{steps[:3]} ... {steps[-1]}"
        )
    first, last = (steps.index(step) for step in window)
    points, between = slice(first, last + 1), slice(first, last)
    kept = (
        None if p.interior_interval is None else (p.interior_interval >= first) & (p.interior_interval < last)
    )

    def cut(values: Tensor | None, chosen: slice | Tensor | None) -> Tensor | None:
        return None if values is None or chosen is None else values[chosen]

    return replace(
        p,
        steps=p.steps[points],
        losses=p.losses[points],
        gradients=p.gradients[points],
        displacements=p.displacements[between],
        residual_start=p.residual_start[between],
        residual_end=p.residual_end[between],
        residual_norms=p.residual_norms[between],
        step_norms=p.step_norms[between],
        interior_interval=None if p.interior_interval is None else p.interior_interval[kept] - first,
        interior_position=cut(p.interior_position, kept),
        interior_weight=cut(p.interior_weight, kept),
        end_weights=cut(p.end_weights, between),
        interior_gradients=cut(p.interior_gradients, kept),
        interior_residual=cut(p.interior_residual, kept),
        mean_gradients=cut(p.mean_gradients, points),
        curvatures=cut(p.curvatures, between),
    )
