"""Bases made from the path through weight space and from mean gradients along it; no labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polca_edit.allocation.progress import progress
from polca_edit.basis.record import Basis, unlabelled
from polca_edit.basis.streamed import HELD, combined, displacement_gram, displacements
from polca_edit.basis.subsets import Subset, taken
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import Allocate, inner_products, lengths, orthonormalise, remove_rows
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet


def odd_checkpoints(checkpoints: Checkpoints) -> Checkpoints:
    """Checkpoints 1, 3, 5, ... counted from one as in theta_1 .. theta_T: every second and the first."""
    return checkpoints.subset(range(0, len(checkpoints), 2))


def trajectory_basis(
    checkpoints: Checkpoints,
    count: int,
    *,
    mask: Bool[Tensor, " N"] | None = None,
    allocate: Allocate | None = None,
    held: int = HELD,
) -> Basis:
    """Right singular vectors of the rows theta_t - theta_0, from the T x T Gram matrix.

    Eigenvalues are squared singular values. No derivative is taken. Displacements are streamed: beside
    the K rows of the result a few vectors of N entries are in memory, however many checkpoints there are.

    Args:
        checkpoints: the series.
        count: K.
        mask: restrict vectors to these parameters.
        allocate: makes the (K, n) table of the rows, for example in a mapped file; None: in memory.
        held: displacements in memory at once; the series is read about T / (2 ``held``) times.

    Raises:
        ValueError: if the movement has fewer independent directions than asked for.
    """
    values, vectors = torch.linalg.eigh(displacement_gram(checkpoints, mask, held))
    order = torch.argsort(values, descending=True)[:count]
    values = values[order]
    if len(values) < count or float(values[-1]) <= 1e-12 * float(values[0]):
        raise ValueError(
            f"a trajectory basis of {count} vectors needs as many independent displacements, "
            f"got {int((values > 1e-12 * values.max()).sum())}; use fewer vectors"
        )
    wanted = vectors[:, order].T / values.sqrt()[:, None]
    found, coefficients = combined(checkpoints, wanted, mask, allocate, held)
    inside = None if mask is None else Subset.of_mask(mask)
    return replace(unlabelled("trajectory", found, inside), eigenvalues=values, coefficients=coefficients)


def mean_gradients(objective: Objective, checkpoints: Checkpoints, tokens: TokenSet) -> Float[Tensor, "T N"]:
    """Gradient of the mean loss at every checkpoint."""
    indices = progress(range(len(checkpoints)), "mean gradients")
    return torch.stack([objective.mean_gradient(checkpoints[i], tokens)[1] for i in indices])


def principal_rows(
    rows: Float[Tensor, "n N"], count: int
) -> tuple[Float[Tensor, "K N"], Float[Tensor, " K"]]:
    """Top right singular vectors of a few long rows, from their Gram matrix, with squared values.

    Raises:
        ValueError: if the rows span fewer dimensions than asked for.
    """
    values, vectors = torch.linalg.eigh(inner_products(rows, rows))
    order = torch.argsort(values, descending=True)[:count]
    values = values[order]
    if len(values) < count or float(values[-1]) <= 1e-12 * float(values[0]):
        raise ValueError(f"{count} principal directions need as many independent rows; ask for fewer")
    return orthonormalise(vectors[:, order].T.to(rows) @ rows), values


def trajectory_secant_basis(
    checkpoints: Checkpoints,
    gradients: Float[Tensor, "T N"],
    count: int,
    *,
    secants: int | None = None,
    mask: Bool[Tensor, " N"] | None = None,
) -> Basis:
    """Where the weights went, and where the gradient changed on the way.

    First the trajectory basis (principal directions of theta_t - theta_1). What it leaves of each
    step is a zigzag about the smooth path, small in weight space; it costs nats only where the loss
    is curved. So the other vectors are the principal directions of the gradient's changes
    g_{t+1}(X) - g_t(X) = (mean Hessian along the step) dtheta_t, the secant pairs of quasi-Newton
    methods, off the first ones. It takes T mean gradients and no Hessian-vector product.

    Args:
        checkpoints: basis checkpoints.
        gradients: (T, N) mean gradients there, on the curvature sample.
        count: K.
        secants: how many of the K come from gradient changes; default a fifth, at least one.
        mask: restrict vectors to these parameters.
    """
    secants = max(1, round(count / 5)) if secants is None else secants
    first = trajectory_basis(checkpoints, count - secants, mask=mask)
    changes = taken(gradients, first.inside).diff(dim=0).to(first.entries)
    left = remove_rows(changes, first.entries)
    return _with_principal(replace(first, kind="trajectory_secant"), left, secants)


def _with_principal(first: Basis, left: Float[Tensor, "c n"], count: int) -> Basis:
    """The first vectors and, off them, the principal directions of what they leave."""
    added, values = principal_rows(left, count)
    rows = torch.cat([first.entries, remove_rows(added, first.entries)])
    sizes = torch.cat([first.eigenvalues.double(), values.double()])
    return replace(unlabelled(first.kind, rows, first.inside), eigenvalues=sizes)


def loss_fall_density(
    losses: Float[Tensor, "T M"], groups: Mapping[str, Bool[Tensor, " M"]], *, uniform: float = 0.25
) -> Float[Tensor, " I"]:
    """Share of every interval in how far the groups' mean losses moved; sums to one over I = T - 1.

    Args:
        losses: exact losses at the basis checkpoints, nats.
        groups: token groups, from labels (then the basis is supervised) or from :func:`loss_groups`.
        uniform: weight of the uniform density mixed in, so that quiet stretches keep a say.

    Raises:
        ValueError: if no group's loss moves.
    """
    moved = torch.stack([losses[:, mask].double().mean(1).diff().abs() for mask in groups.values()])
    totals = moved.sum(1, keepdim=True)
    if not bool((totals > 0).all()):
        raise ValueError("every token group's loss must move along the path; leave still groups out")
    density = (moved / totals).mean(0)
    return (1 - uniform) * density + uniform / len(density)


def loss_weighted_basis(
    checkpoints: Checkpoints,
    gradients: Float[Tensor, "T N"],
    density: Float[Tensor, " I"],
    count: int,
    *,
    secants: int | None = None,
    mask: Bool[Tensor, " N"] | None = None,
) -> Basis:
    """Where the weights went and where the gradient changed, weighted by where the losses moved.

    The trajectory basis spends its vectors on long displacements, which are late; a skill learned
    early by a short one is left out. So displacements theta_t - theta_1 are weighted by the square
    root of the loss moved around t, and the gradient's changes, each of unit length, by the square
    root of the loss moved on their interval. Weights enter a Gram matrix, hence the roots.

    Args:
        checkpoints: basis checkpoints.
        gradients: (T, N) mean gradients there, on the curvature sample.
        density: share of every interval, see :func:`loss_fall_density`.
        count: K.
        secants: how many of the K come from gradient changes; default a fifth, at least one.
        mask: restrict vectors to these parameters.

    Raises:
        ValueError: if the movement has fewer independent directions than asked for.
    """
    secants = max(1, round(count / 5)) if secants is None else secants
    inside = None if mask is None else Subset.of_mask(mask)
    moved = torch.stack([row for _, row in displacements(checkpoints, mask)])
    around = torch.cat([(density[:-1] + density[1:]) / 2, density[-1:] / 2])  # of checkpoints 2 .. T
    first, sizes = principal_rows(moved * around.sqrt().to(moved)[:, None], count - secants)
    changes = remove_rows(taken(gradients, inside).diff(dim=0).to(first), first)
    sizes_of_changes = lengths(changes).to(changes)[:, None]
    changes = changes / sizes_of_changes.clamp_min(torch.finfo(changes.dtype).tiny)
    weighted = changes * density.sqrt().to(changes)[:, None]
    before = replace(unlabelled("loss_weighted", first, inside), eigenvalues=sizes.double())
    return _with_principal(before, weighted, secants)


def loss_path_basis(
    checkpoints: Checkpoints,
    gradients: Float[Tensor, "T N"],
    count: int,
    *,
    mask: Bool[Tensor, " N"] | None = None,
) -> Basis:
    """Eigenvectors, largest in size, of sum_t sym(g_t dtheta_t'): where the mean loss changed most.

    g_t is the mean of the gradient at an interval's two ends, so the trace is the trapezoid sum of
    the mean loss change and an eigenvalue is the change its vector is given, in nats.
    """
    inside = None if mask is None else Subset.of_mask(mask)
    steps = range(len(checkpoints) - 1)
    moves = torch.stack([taken(checkpoints[i + 1] - checkpoints[i], inside) for i in steps])
    slopes = taken((gradients[1:] + gradients[:-1]) / 2, inside).to(moves)
    span = orthonormalise(torch.cat([moves, slopes]))
    left, right = inner_products(slopes, span), inner_products(moves, span)
    matrix = left.T @ right
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    order = torch.argsort(values.abs(), descending=True)[:count]
    rows = vectors[:, order].T.to(span) @ span
    return replace(unlabelled("loss_path", orthonormalise(rows), inside), eigenvalues=values[order])


def parameter_axes_basis(
    theta: Float[Tensor, " N"], count: int, *, mask: Bool[Tensor, " N"] | None = None
) -> Basis:
    """Single parameters as axes: the ``count`` largest in size (LCA; Lan et al. 2020)."""
    inside = None if mask is None else Subset.of_mask(mask)
    sizes = taken(theta, inside).abs()
    rows = theta.new_zeros(count, len(sizes))
    rows[torch.arange(count), torch.topk(sizes, count).indices] = 1.0
    return unlabelled("parameter_axes", rows, inside)


def accelerating_checkpoints(
    losses: Float[Tensor, "T M"],
    steps: Int[Tensor, " T"],
    groups: Mapping[str, Bool[Tensor, " M"]],
    count: int,
) -> list[int]:
    """Indices of ``count`` checkpoints, dense where groups' losses begin to fall faster.

    Each group's mean loss is twice differenced over steps; the positive part of the acceleration of
    its decrease, normalised per group, is summed over groups. Checkpoints are the quantiles of this
    density mixed with a little of the uniform one, so that quiet stretches keep a vector.

    Args:
        losses: exact losses at the recorded checkpoints.
        steps: their steps.
        groups: token groups, from labels (then the basis is supervised) or from clustering losses.
        count: how many.

    Raises:
        ValueError: if there are fewer checkpoints than asked for.
    """
    if count > len(steps) - 2:
        raise ValueError(f"{count} basis checkpoints need {count + 2} recorded ones, got {len(steps)}")
    density = torch.full((len(steps) - 2,), 0.25 / (len(steps) - 2), dtype=torch.float64)
    gaps = steps.diff().double()
    for mask in groups.values():
        curve = losses[:, mask].double().mean(1)
        slope = curve.diff() / gaps
        speed_up = (slope[:-1] - slope[1:]).clamp_min(0)
        density += speed_up / speed_up.sum().clamp_min(1e-300) / len(groups)
    cumulative = density.cumsum(0) / density.sum()
    chosen: list[int] = []
    for quantile in (torch.arange(count) + 0.5) / count:
        index = int(torch.searchsorted(cumulative, quantile.double())) + 1
        free = [i for i in range(1, len(steps) - 1) if i not in chosen]
        chosen.append(min(free, key=lambda i: abs(i - index)))
    return sorted(chosen)


def loss_groups(losses: Float[Tensor, "T M"], count: int, *, seed: int) -> dict[str, Bool[Tensor, " M"]]:
    """Token groups whose exact losses move alike (k-means on loss curves), without labels."""
    from sklearn.cluster import KMeans

    labels = KMeans(count, n_init=4, random_state=seed).fit_predict(losses.T.double().numpy())
    return {f"group {i}": torch.from_numpy(labels == i) for i in range(count)}
