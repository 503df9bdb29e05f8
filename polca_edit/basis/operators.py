"""Further bases from operators other than the Hessian of one checkpoint after another.

Each supplies an operator per basis checkpoint to the same projected Lanczos as Algorithm 1
(:func:`polca_edit.basis.record.next_vectors`), so masks, residuals and the null-space projection are those
of the Hessian basis. None uses labels. Bases made from the path itself are in
:mod:`polca_edit.basis.path`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polca_edit.basis.record import Basis, BasisCheckpoint, join, next_vectors
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import inner_products, orthonormalise, projected_lanczos
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import call_with
from polca_edit.tokens import TokenSet

Product = Callable[[Tensor], Tensor]
#: ``outputs(module, inputs)`` -> logits (B, P, C), one row per prediction slot of the token loss.
OutputFunction = Callable[[nn.Module, Tensor], Tensor]


def operator_basis(
    kind: str,
    product_at: Callable[[int], Product],
    checkpoints: Checkpoints,
    *,
    order: Sequence[int] | None = None,
    generator: torch.Generator,
    k: int = 1,
    tolerance: float = 1e-2,
    max_products: int = 60,
    mask: Bool[Tensor, " N"] | None = None,
    before: Sequence[BasisCheckpoint] = (),
) -> Basis:
    """Algorithm 1 of arXiv 2506.15872 with any symmetric operator in place of the Hessian.

    Args:
        kind: name of the basis.
        product_at: index into ``checkpoints`` -> the operator's product there.
        checkpoints: basis checkpoints.
        order: indices in the order they are taken; default as they come.
        generator: start vectors.
        k: vectors per checkpoint.
        tolerance: relative eigen-residual to stop at.
        max_products: products per checkpoint at most.
        mask: restrict vectors to these parameters.
        before: vectors that are already in the basis and come first.
    """
    parts = list(before)
    for index in range(len(checkpoints)) if order is None else order:
        theta, step = checkpoints[index], checkpoints.steps[index]
        product = product_at(index)
        parts.append(next_vectors(product, theta, parts, step, generator, k, tolerance, max_products, mask))
    return join(kind, parts)


def shuffled_hessian_basis(
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    *,
    generator: torch.Generator,
    k: int = 1,
    tolerance: float = 1e-2,
    max_products: int = 60,
    mask: Bool[Tensor, " N"] | None = None,
) -> Basis:
    """The Hessian basis with its checkpoints taken in random order (arXiv 2506.15872, Table 10)."""
    order = torch.randperm(len(checkpoints), generator=generator).tolist()
    return operator_basis(
        "shuffled_hessian",
        lambda i: objective.hessian(checkpoints[i], tokens, expected=8 * k * len(checkpoints)),
        checkpoints,
        order=order,
        generator=generator,
        k=k,
        tolerance=tolerance,
        max_products=max_products,
        mask=mask,
    )


def final_hessian_basis(
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    count: int,
    *,
    generator: torch.Generator,
    tolerance: float = 1e-2,
    max_products: int = 200,
    mask: Bool[Tensor, " N"] | None = None,
) -> Basis:
    """The top ``count`` Hessian eigenvectors of the last checkpoint alone."""
    last = checkpoints.subset([len(checkpoints) - 1])
    return operator_basis(
        "final_hessian",
        lambda i: objective.hessian(last[i], tokens, expected=8 * count),
        last,
        generator=generator,
        k=count,
        tolerance=tolerance,
        max_products=max_products,
        mask=mask,
    )


def sliding_hessian_basis(
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    *,
    window: int = 3,
    generator: torch.Generator,
    k: int = 1,
    tolerance: float = 1e-2,
    max_products: int = 60,
    mask: Bool[Tensor, " N"] | None = None,
) -> Basis:
    """Top eigenvectors of the mean Hessian over up to ``window`` basis checkpoints, ending at each."""

    def product_at(index: int) -> Product:
        inside = range(max(0, index - window + 1), index + 1)
        products = [objective.hessian(checkpoints[i], tokens, expected=8 * k) for i in inside]
        return lambda v: torch.stack([p(v) for p in products]).mean(0)

    return operator_basis(
        "sliding_hessian",
        product_at,
        checkpoints,
        generator=generator,
        k=k,
        tolerance=tolerance,
        max_products=max_products,
        mask=mask,
    )


def gauss_newton_product(
    objective: Objective, outputs: OutputFunction, theta: Float[Tensor, " N"], tokens: TokenSet
) -> Product:
    """Map v to the token mean of J'(diag(p) - p p')J v: the Gauss-Newton matrix of cross-entropy.

    J is the Jacobian of a token's logits, p their softmax (Schraudolph 2002); this equals the Fisher
    matrix under the model's own predictions.
    """
    space, module = objective.space, objective.module
    weights = tuple(objective.split(theta.to(objective.device)))

    def logits(inputs: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(space.names, values, strict=True))
        result: Tensor = call_with(module, space, named, outputs, inputs)
        return result

    def product(vector: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        tangents = tuple(objective.split(vector.to(theta)))
        total = torch.zeros_like(theta)
        for rows in tokens.batches(objective.batch_size):
            inputs, scored = tokens.inputs[rows].to(objective.device), tokens.scored[rows].to(theta)

            def at(*values: Tensor, given: Tensor = inputs) -> Tensor:
                return logits(given, *values)

            with torch.no_grad():
                values, moved = torch.func.jvp(at, weights, tangents)[:2]
            p = values.softmax(-1)
            curved = (p * moved - p * (p * moved).sum(-1, keepdim=True)) * scored[..., None] / tokens.count
            leaves = [w.detach().requires_grad_() for w in weights]
            with torch.enable_grad():
                grads = torch.autograd.grad(at(*leaves), leaves, curved, materialize_grads=True)
            total += torch.cat([g.reshape(-1) for g in grads])
        objective.passes.hvp += tokens.sequences
        return total

    return product


def fisher_product(
    objective: Objective, theta: Float[Tensor, " N"], tokens: TokenSet, *, centred: bool = False
) -> Product:
    """Map v to mean_x g_x <g_x, v>: the empirical Fisher matrix, or the gradient covariance if centred."""

    def product(vector: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        slopes = objective.directional(theta, vector[None], tokens)[1][0]
        if centred:
            slopes = slopes - slopes.mean()
        return objective.mean_gradient(theta, tokens, slopes / tokens.count)[1]

    return product


def gauss_newton_basis(
    objective: Objective,
    outputs: OutputFunction,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    *,
    generator: torch.Generator,
    k: int = 1,
    tolerance: float = 1e-2,
    max_products: int = 60,
    mask: Bool[Tensor, " N"] | None = None,
) -> Basis:
    """Algorithm 1 with the Gauss-Newton matrix."""
    return operator_basis(
        "gauss_newton",
        lambda i: gauss_newton_product(objective, outputs, checkpoints[i], tokens),
        checkpoints,
        generator=generator,
        k=k,
        tolerance=tolerance,
        max_products=max_products,
        mask=mask,
    )


def fisher_basis(
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    *,
    generator: torch.Generator,
    centred: bool = False,
    k: int = 1,
    tolerance: float = 1e-2,
    max_products: int = 60,
    mask: Bool[Tensor, " N"] | None = None,
) -> Basis:
    """Algorithm 1 with the empirical Fisher matrix, or with the gradient covariance."""
    return operator_basis(
        "gradient_covariance" if centred else "fisher",
        lambda i: fisher_product(objective, checkpoints[i], tokens, centred=centred),
        checkpoints,
        generator=generator,
        k=k,
        tolerance=tolerance,
        max_products=max_products,
        mask=mask,
    )


def stacked_jacobian_basis(
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    count: int,
    *,
    generator: torch.Generator,
    tolerance: float = 1e-2,
    max_products: int = 100,
    mask: Bool[Tensor, " N"] | None = None,
) -> Basis:
    """Right singular vectors of every token's gradient at every basis checkpoint, stacked.

    That is, top eigenvectors of the mean over checkpoints of the empirical Fisher matrices; the
    stack itself (T M rows of length N) is never formed.
    """
    products = [fisher_product(objective, checkpoints[i].clone(), tokens) for i in range(len(checkpoints))]
    last = checkpoints.subset([len(checkpoints) - 1])
    return operator_basis(
        "stacked_jacobian",
        lambda _: lambda v: torch.stack([p(v) for p in products]).mean(0),
        last,
        generator=generator,
        k=count,
        tolerance=tolerance,
        max_products=max_products,
        mask=mask,
    )


def adam_hessian_basis(
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    second_moments: Callable[[int], Float[Tensor, " N"]],
    *,
    generator: torch.Generator,
    epsilon: float = 1e-8,
    tolerance: float = 1e-2,
    max_products: int = 60,
    mask: Bool[Tensor, " N"] | None = None,
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
        generator: start vectors.
        epsilon: Adam's.
        tolerance: relative eigen-residual.
        max_products: products per checkpoint at most.
        mask: restrict vectors to these parameters.
    """
    parts: list[BasisCheckpoint] = []
    size = objective.space.size
    inside = torch.arange(size) if mask is None else mask.nonzero()[:, 0]
    for index in range(len(checkpoints)):
        theta, step = checkpoints[index], checkpoints.steps[index]
        scale = (second_moments(step).to(theta).sqrt() + epsilon).rsqrt()[inside]
        # A common factor changes no eigenvector and keeps the numbers near one.
        scale = scale / scale.mean()
        plain = objective.hessian(theta, tokens, expected=8 * len(checkpoints))

        def product(vector: Tensor, plain: Product = plain, scale: Tensor = scale) -> Tensor:
            full = vector.new_zeros(size)
            full[inside] = scale * vector
            return scale * plain(full)[inside]

        held = torch.cat([part.rows for part in parts])[:, inside] * scale if parts else None
        pairs = projected_lanczos(
            product,
            len(inside),
            1,
            generator=generator,
            rows=None if held is None else orthonormalise(held),
            tolerance=tolerance,
            max_products=max_products,
            dtype=theta.dtype,
        )
        row = theta.new_zeros(1, size)
        row[:, inside] = pairs.vectors * scale
        if parts:
            row = row - inner_products(row, torch.cat([p.rows for p in parts])).to(row) @ torch.cat(
                [p.rows for p in parts]
            )
        parts.append(BasisCheckpoint(step, row / row.norm(), pairs.values, pairs.residuals, pairs.products))
    return join("adam_hessian", parts)


def trajectory_and_hessian_basis(
    trajectory: Basis,
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    *,
    generator: torch.Generator,
    k: int = 1,
    tolerance: float = 1e-2,
    max_products: int = 60,
    mask: Bool[Tensor, " N"] | None = None,
) -> Basis:
    """A trajectory basis first, then Hessian vectors in its null space, one checkpoint after another."""
    nan = torch.full((len(trajectory),), float("nan"), dtype=torch.float64)
    first = BasisCheckpoint(-1, trajectory.rows, trajectory.eigenvalues, nan, 0)
    found = operator_basis(
        "trajectory_hessian",
        lambda i: objective.hessian(checkpoints[i], tokens, expected=8 * k * len(checkpoints)),
        checkpoints,
        generator=generator,
        k=k,
        tolerance=tolerance,
        max_products=max_products,
        mask=mask,
        before=[first],
    )
    return replace(found, supervised=trajectory.supervised)
