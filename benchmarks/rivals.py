"""The others: curvlinops with scipy's eigsh, hessian-eigenthings, per-token gradients, plain jvp."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from benchmarks.problems import Problem
from polca_edit.parameters import call_with

Found = tuple[float, Tensor]


def missing(package: str) -> str | None:
    """Why a rival cannot run, or None."""
    if importlib.util.find_spec(package) is None:
        return f"python package '{package}' is not installed; docs/results/README.md has the command"
    return None


class ScoredLogits(nn.Module):
    """The arithmetic model reduced to (scored logits, classes), the form both libraries take."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (4 B, classes) of the four output digits."""
        logits: Tensor = self.module(inputs[:, :-1])[:, -4:]
        return logits.flatten(0, 1)


def _projected(product: Callable[[Tensor], Tensor], rows: Tensor | None) -> Callable[[Tensor], Tensor]:
    def project(vector: Tensor) -> Tensor:
        return vector if rows is None else vector - rows.T @ (rows @ vector)

    return lambda vector: project(product(project(vector)))


def curvlinops_pair(
    problem: Problem, rows: Tensor | None, start: Tensor, tolerance: float
) -> tuple[Found, int]:
    """Top eigenpair of the projected Hessian at the module's weights by curvlinops and eigsh."""
    from curvlinops import HessianLinearOperator  # type: ignore[import-untyped,unused-ignore]

    inputs = problem.curvature.inputs
    operator: Any = HessianLinearOperator(
        ScoredLogits(problem.module),
        nn.CrossEntropyLoss(),
        list(problem.module.parameters()),
        [(inputs, inputs[:, -4:].flatten())],
        check_deterministic=False,
        num_data=inputs[:, -4:].numel(),
        batch_size_fn=lambda batch: batch.shape[0] * 4,
    )
    used = [0]

    def product(vector: Tensor) -> Tensor:
        used[0] += 1
        found: Tensor = operator @ vector
        return found

    step = _projected(product, rows)
    linear = LinearOperator(
        (problem.space.size, problem.space.size),
        matvec=lambda v: step(
            torch.from_numpy(np.ascontiguousarray(v.reshape(-1), dtype=np.float32))
        ).numpy(),
        dtype=np.float32,
    )
    values, vectors = eigsh(linear, k=1, which="LA", tol=tolerance, v0=start.numpy())
    return (float(values[0]), torch.from_numpy(vectors[:, 0].copy())), used[0]


def eigenthings_pair(problem: Problem, rows: Tensor | None, tolerance: float) -> tuple[Found, int]:
    """The same by hessian-eigenthings' Lanczos.

    It takes no start vector, and a fixed number of iterations instead of a stopping rule, but it does
    report convergence. So it is run with 10, 20, 40 ... iterations until it reports the tolerance,
    which is what a user has to do. With the sufficient number known beforehand it would need the last
    run only: about half of the products, or all of them where ten suffice.
    """
    import hessian_eigenthings as library  # type: ignore[import-untyped,unused-ignore]

    inputs = problem.curvature.inputs
    operator: Any = library.HessianOperator(
        ScoredLogits(problem.module),
        [(inputs, inputs[:, -4:].flatten())],
        library.supervised_loss(nn.CrossEntropyLoss()),
    )
    step = _projected(operator.matvec, rows)
    used, iterations = 0, 10
    while True:
        found = library.lanczos(
            library.LambdaOperator(step, problem.space.size),
            k=1,
            max_iter=iterations,
            tol=tolerance,
            which="LA",
            seed=0,
            reorthogonalize=True,
        )
        used += iterations
        if bool(found.converged[0]) or iterations >= 320:
            return (float(found.eigenvalues[0]), found.eigenvectors[0]), used
        iterations *= 2


def token_gradients(problem: Problem, theta: Tensor, rows: Tensor, sequences_at_once: int) -> Tensor:
    """<row, grad of each token's loss> by vmap over sequences of jacrev, then a product."""
    values = {name: value.clone() for name, value in problem.space.unflatten(theta).items()}
    directions = problem.space.unflatten(rows)

    def losses(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        found: Tensor = call_with(problem.module, problem.space, weights, problem.token_loss, row[None])
        return found[0]

    gradients = torch.func.vmap(torch.func.jacrev(losses), in_dims=(None, 0))
    parts = []
    for some in problem.tokens.inputs.split(sequences_at_once):
        jacobian = gradients(values, some)
        parts.append(sum(jacobian[n].flatten(0, 1).flatten(1) @ directions[n].flatten(1).T for n in jacobian))
    return torch.cat(parts).T
