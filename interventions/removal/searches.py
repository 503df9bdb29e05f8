"""Searches that need no gradient in the loop: doses, single vectors, greedy sets, closed form, sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.removal.grouped import LEAST_HEADROOM, Shares
from interventions.removal.problem import RemovalProblem, score
from polca_edit.derivatives.lanczos import coordinates, inner_products

# -- dose ----------------------------------------------------------------------------------------


def match_dose(
    problem: RemovalProblem,
    delta: Float[Tensor, " N"],
    goal: float,
    *,
    largest: float = 1.5,
    evaluations: int = 5,
) -> tuple[float, Shares]:
    """A dose in (0, largest] whose target share on select reaches the goal, least harm elsewhere.

    Bisection looks for the smallest such dose. Damage need not grow with the dose (half of an edit may
    break what the whole edit keeps), so of all doses tried that reach the goal the one with the
    smallest positive part off target is taken. If none does, the dose with the best score.
    """

    def at(dose: float) -> Shares:
        return problem.select.shares_at(problem.theta + dose * delta)

    tried = {1.0: at(1.0)}
    low, high = (0.0, 1.0) if tried[1.0].target >= goal else (1.0, largest)
    if high == largest:
        tried[largest] = at(largest)
    if tried[high].target < goal:
        tried.update({dose: at(dose) for dose in (0.25, 0.5, 0.75)})
        chosen = min(tried, key=lambda d: score(tried[d], replace(problem.limits, target=min(goal, 1.0))))
        return chosen, tried[chosen]
    for _ in range(evaluations):
        middle = (low + high) / 2
        tried[middle] = at(middle)
        if tried[middle].target >= goal:
            high = middle
        else:
            low = middle
    reached = [dose for dose, shares in tried.items() if shares.target >= goal]
    chosen = min(reached, key=lambda dose: (tried[dose].worst_positive, abs(dose)))
    return chosen, tried[chosen]


# -- searches without a gradient in the loop -------------------------------------------------------


#: A dose is chosen this far above the goal, for the sampling error between select and evaluate.
DOSE_MARGIN = 0.03
DOSES = (-2.0, -1.0, -0.5, -0.25, 0.25, 0.5, 1.0, 2.0)


def best_single(
    problem: RemovalProblem,
    rows: Float[Tensor, "K N"],
    scales: Sequence[float],
    doses: Sequence[float] = DOSES,
) -> tuple[int, float, Shares]:
    """The one vector and coordinate with the best score on select.

    Args:
        problem: what is being removed.
        rows: candidate unit vectors.
        scales: per vector the coordinate that counts as dose 1.
        doses: multiples of it that are tried.
    """
    return _best_addition(problem, torch.zeros_like(problem.theta), rows, scales, range(len(rows)), doses)


def _best_addition(
    problem: RemovalProblem,
    sofar: Tensor,
    rows: Tensor,
    scales: Sequence[float],
    candidates: Iterable[int],
    doses: Sequence[float],
) -> tuple[int, float, Shares]:
    best: tuple[int, float, Shares] | None = None
    for index in candidates:
        for dose in sorted(doses, key=abs):  # of equal scores the smaller movement wins
            shift = dose * scales[index]
            shares = problem.select.shares_at(problem.theta + sofar + shift * rows[index])
            if best is None or score(shares, problem.limits) < score(best[2], problem.limits):
                best = index, shift, shares
    if best is None:
        raise ValueError(
            "a search needs at least one vector and one dose, got none; pass a basis with vectors"
        )
    return best


def greedy_set(
    problem: RemovalProblem,
    rows: Float[Tensor, "K N"],
    scales: Sequence[float],
    *,
    most: int = 4,
    doses: Sequence[float] = (-1.0, -0.5, 0.5, 1.0),
) -> tuple[Float[Tensor, " K"], Shares]:
    """Add one vector at a time, the one whose best dose improves the select score most.

    Returns:
        (K,) coordinates and the shares they reach on select.
    """
    z = torch.zeros(len(rows))
    reached: Shares | None = None
    for _ in range(min(most, len(rows))):
        left = [i for i in range(len(rows)) if float(z[i]) == 0.0]
        index, shift, shares = _best_addition(problem, z @ rows, rows, scales, left, doses)
        if reached is not None and score(shares, problem.limits) >= score(reached, problem.limits):
            break
        z[index], reached = shift, shares
    if reached is None:
        raise ValueError("a greedy set needs at least one vector, got none; pass a basis with vectors")
    return z, reached


@dataclass(frozen=True)
class GroupCurvature:
    """Second-order model of each group's loss in span coordinates at theta.

    Attributes:
        gradients: (G, K) nats per weight unit.
        hessians: (G, K, K) nats per squared weight unit.
    """

    gradients: Float[Tensor, "G K"]
    hessians: Float[Tensor, "G K K"]


def group_curvature(
    product: Callable[[int, Tensor], Tensor],
    gradient: Callable[[int], Tensor],
    rows: Float[Tensor, "K N"],
    groups: int,
) -> GroupCurvature:
    """K x K curvature of every group from Hessian-vector products along the rows.

    Args:
        product: (group, v) -> H_group v.
        gradient: group -> mean gradient (N,).
        rows: span.
        groups: how many groups.
    """
    slopes = torch.stack([coordinates(rows, gradient(g)) for g in range(groups)])
    curved = []
    for g in range(groups):
        image = torch.stack([product(g, row) for row in rows])
        block = inner_products(rows, image)
        curved.append((block + block.T) / 2)
    return GroupCurvature(slopes, torch.stack(curved))


def closed_form(
    curvature: GroupCurvature,
    targets: Sequence[bool],
    rooms: Float[Tensor, " G"],
    *,
    ridge: float = 1e-3,
    most: int = 3,
) -> Float[Tensor, "c K"]:
    """Directions with the most target curvature per unit of the other groups' curvature.

    Solves H_C v = lambda (sum_j |H_j| / G_j + ridge tr/K I) v, where |H_j| takes absolute
    eigenvalues: a group that a direction would improve is left alone too. Returned vectors have
    v' H_C v / 2 = 1, one headroom of predicted damage.

    Args:
        curvature: per-group quadratic model.
        targets: which groups are the skill.
        rooms: (G,) headroom in nats.
        ridge: relative regularisation of the denominator.
        most: how many directions.
    """
    import scipy.linalg

    count = curvature.hessians.shape[-1]
    zero = torch.zeros(count, count, dtype=torch.float64)
    top, bottom = zero.clone(), zero.clone()
    for g, target in enumerate(targets):
        room = float(rooms[g])
        if room <= LEAST_HEADROOM:
            continue
        if target:
            top += curvature.hessians[g] / room
        else:
            values, vectors = torch.linalg.eigh(curvature.hessians[g])
            bottom += (vectors * values.abs()) @ vectors.T / room
    scale = float(top.diagonal().abs().mean() + bottom.diagonal().mean())
    bottom += ridge * scale * torch.eye(count, dtype=torch.float64)
    values, vectors = scipy.linalg.eigh(top.numpy(), bottom.numpy())
    found: list[Tensor] = []
    for index in reversed(range(count)):
        vector = torch.from_numpy(vectors[:, index].copy())
        lift = float(vector @ top @ vector)
        if lift > 0 and len(found) < most:
            found.append(vector * math.sqrt(2 / lift))
    return torch.stack(found) if found else torch.zeros(0, count, dtype=torch.float64)
