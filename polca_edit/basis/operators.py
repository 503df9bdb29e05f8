"""Further bases from operators other than the Hessian of one checkpoint after another.

Each supplies an operator per basis checkpoint to the same projected Lanczos as Algorithm 1
(:mod:`polca_edit.basis.hessian`), so masks, residuals and the null-space projection are those of the
Hessian basis. None uses labels. Bases made from the path itself are in :mod:`polca_edit.basis.path`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polca_edit.basis.hessian import BasisCheckpoint, EigenSettings, Product, join, operator_basis
from polca_edit.basis.record import Basis
from polca_edit.basis.subsets import Directions, Subset, taken
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import inner_products, lengths, orthonormalise, projected_lanczos
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet

#: ``outputs(module, inputs)`` -> logits (B, P, C), one row per prediction slot of the token loss.
OutputFunction = Callable[[nn.Module, Tensor], Tensor]


def shuffled_hessian_basis(
    objective: Objective, checkpoints: Checkpoints, tokens: TokenSet, settings: EigenSettings
) -> Basis:
    """The Hessian basis with its checkpoints taken in random order (arXiv 2506.15872, Table 10)."""
    generator = settings.generator()
    order = torch.randperm(len(checkpoints), generator=generator).tolist()
    expected = 8 * settings.per_checkpoint * len(checkpoints)
    return operator_basis(
        "shuffled_hessian",
        lambda i: objective.hessian(checkpoints[i], tokens, expected=expected, inside=settings.inside),
        checkpoints,
        settings,
        order=order,
        generator=generator,
    )


def final_hessian_basis(
    objective: Objective, checkpoints: Checkpoints, tokens: TokenSet, count: int, settings: EigenSettings
) -> Basis:
    """The top ``count`` Hessian eigenvectors of the last checkpoint alone."""
    last = checkpoints.subset([len(checkpoints) - 1])
    return operator_basis(
        "final_hessian",
        lambda i: objective.hessian(last[i], tokens, expected=8 * count, inside=settings.inside),
        last,
        replace(settings, per_checkpoint=count),
    )


def sliding_hessian_basis(
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    settings: EigenSettings,
    *,
    window: int = 3,
) -> Basis:
    """Top eigenvectors of the mean Hessian over up to ``window`` basis checkpoints, ending at each."""

    def product_at(index: int) -> Product:
        ending = range(max(0, index - window + 1), index + 1)
        expected = 8 * settings.per_checkpoint
        products = [
            objective.hessian(checkpoints[i], tokens, expected=expected, inside=settings.inside)
            for i in ending
        ]
        return lambda v: torch.stack([p(v) for p in products]).mean(0)

    return operator_basis("sliding_hessian", product_at, checkpoints, settings)


def gauss_newton_product(
    objective: Objective, outputs: OutputFunction, theta: Float[Tensor, " N"], tokens: TokenSet
) -> Product:
    """Map v to the token mean of J'(diag(p) - p p')J v: the Gauss-Newton matrix of cross-entropy.

    J is the Jacobian of a token's logits, p their softmax (Schraudolph 2002); this equals the Fisher
    matrix under the model's own predictions.
    """

    def curved(logits: Tensor, moved: Tensor, scored: Tensor) -> Tensor:
        p = logits.softmax(-1)
        weights = scored[..., None].to(p) / tokens.count
        return (p * moved - p * (p * moved).sum(-1, keepdim=True)) * weights

    parts = objective.weights(theta)

    def function(point: Sequence[Tensor], given: Sequence[Tensor]) -> Sequence[Tensor]:
        return (objective.evaluate(outputs, point, given[0]),)

    def product(vector: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        tangents = objective.weights(vector, theta.dtype)
        total = objective.placed(torch.zeros_like(theta))
        for inputs, scored in objective.batches(tokens):
            with torch.no_grad():
                linear = objective.linear("outputs", function, parts, [inputs])
                cotangents = curved(linear.values[0], linear(tangents)[0], scored)
            leaves = [w.detach().requires_grad_() for w in parts]
            with torch.enable_grad():
                found = function(leaves, [inputs])
                grads = torch.autograd.grad(found, leaves, cotangents, materialize_grads=True)
            total += torch.cat([g.reshape(-1) for g in grads])
        objective.passes.hvp += tokens.sequences
        return total.to(vector.device)

    return product


def fisher_product(
    objective: Objective,
    theta: Float[Tensor, " N"],
    tokens: TokenSet,
    *,
    centred: bool = False,
    inside: Subset | None = None,
) -> Product:
    """Map v to mean_x g_x <g_x, v>: the empirical Fisher matrix, or the gradient covariance if centred."""

    def product(vector: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        slopes = objective.directional(theta, Directions.of(vector[None], inside), tokens)[1][0]
        if centred:
            slopes = slopes - slopes.mean()
        return objective.mean_gradient(theta, tokens, slopes / tokens.count, inside=inside)[1]

    return product


def gauss_newton_basis(
    objective: Objective,
    outputs: OutputFunction,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    settings: EigenSettings,
) -> Basis:
    """Algorithm 1 with the Gauss-Newton matrix."""

    def product_at(index: int) -> Product:
        whole, inside = gauss_newton_product(objective, outputs, checkpoints[index], tokens), settings.inside
        return whole if inside is None else lambda v: inside.take(whole(inside.spread(v)))

    return operator_basis("gauss_newton", product_at, checkpoints, settings)


def fisher_basis(
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    settings: EigenSettings,
    *,
    centred: bool = False,
) -> Basis:
    """Algorithm 1 with the empirical Fisher matrix, or with the gradient covariance."""
    return operator_basis(
        "gradient_covariance" if centred else "fisher",
        lambda i: fisher_product(objective, checkpoints[i], tokens, centred=centred, inside=settings.inside),
        checkpoints,
        settings,
    )


def stacked_jacobian_basis(
    objective: Objective, checkpoints: Checkpoints, tokens: TokenSet, count: int, settings: EigenSettings
) -> Basis:
    """Right singular vectors of every token's gradient at every basis checkpoint, stacked.

    That is, top eigenvectors of the mean over checkpoints of the empirical Fisher matrices; the
    stack itself (T M rows of length N) is never formed.
    """
    products = [
        fisher_product(objective, checkpoints[i].clone(), tokens, inside=settings.inside)
        for i in range(len(checkpoints))
    ]
    last = checkpoints.subset([len(checkpoints) - 1])
    return operator_basis(
        "stacked_jacobian",
        lambda _: lambda v: torch.stack([p(v) for p in products]).mean(0),
        last,
        replace(settings, per_checkpoint=count),
    )


def adam_hessian_basis(
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    second_moments: Callable[[int], Float[Tensor, " N"]],
    settings: EigenSettings,
    *,
    epsilon: float = 1e-8,
) -> Basis:
    """Directions in which Adam's own geometry sees most curvature, one per checkpoint.

    With D = sqrt(v) + epsilon, Adam steps along -D^-1 g, so its stability is set by the spectrum of
    D^-1/2 H D^-1/2 (Cohen et al. 2022). An eigenvector u of that matrix is the weight direction
    D^-1/2 u. Earlier vectors b are kept out by projecting D^-1/2 b out of u, which makes the new
    direction orthogonal to them.

    Args:
        objective: the token loss.
        checkpoints: basis checkpoints.
        tokens: the curvature sample.
        second_moments: optimiser step -> bias-corrected second moments v (N,).
        settings: accuracy, seed, mask.
        epsilon: Adam's.
    """
    parts: list[BasisCheckpoint] = []
    generator = settings.generator()
    for index in range(len(checkpoints)):
        theta, step = checkpoints[index], checkpoints.steps[index]
        plain = objective.hessian(theta, tokens, expected=8 * len(checkpoints), inside=settings.inside)
        scale = taken((second_moments(step).to(theta).sqrt() + epsilon).rsqrt(), settings.inside)
        held = torch.cat([part.rows for part in parts]) if parts else scale.new_zeros(0, len(scale))
        parts.append(_adam_vector(plain, scale, held, step, generator, settings))
    return join("adam_hessian", parts, settings.inside)


def _adam_vector(
    plain: Product,
    scale: Float[Tensor, " n"],
    held: Float[Tensor, "k n"],
    step: int,
    generator: torch.Generator,
    settings: EigenSettings,
) -> BasisCheckpoint:
    """The next direction D^-1/2 u off the rows held, for scale = D^-1/2 of one checkpoint."""
    # A common factor changes no eigenvector and keeps the numbers near one.
    scale = scale / scale.mean()

    def product(vector: Tensor) -> Tensor:
        return scale * plain(scale * vector)

    rows = orthonormalise(held * scale) if len(held) else None
    pairs = projected_lanczos(product, scale, 1, generator, settings.lanczos(), rows=rows)
    row = pairs.vectors * scale
    if len(held):
        row = row - inner_products(row, held).to(row) @ held
    return BasisCheckpoint(
        step, row / lengths(row).to(row)[:, None], pairs.values, pairs.residuals, pairs.products
    )


def trajectory_and_hessian_basis(
    trajectory: Basis,
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    settings: EigenSettings,
) -> Basis:
    """A trajectory basis first, then Hessian vectors in its null space, one checkpoint after another."""
    nan = torch.full((len(trajectory),), float("nan"), dtype=torch.float64)
    first = BasisCheckpoint(-1, trajectory.entries, trajectory.eigenvalues, nan, 0)
    expected = 8 * settings.per_checkpoint * len(checkpoints)
    found = operator_basis(
        "trajectory_hessian",
        lambda i: objective.hessian(checkpoints[i], tokens, expected=expected, inside=settings.inside),
        checkpoints,
        settings,
        before=[first],
    )
    return replace(found, supervised=trajectory.supervised)
