"""The method written down from the paper's pseudocode, with no attention to cost.

Algorithm 1 with double-backward Hessian-vector products and eigsh, Eq. 6 with one backward pass per
token, HDBSCAN on the projected losses. The numbers are those of :mod:`polca_edit`.
"""

from __future__ import annotations

import hdbscan
import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from benchmarks.problems import Problem


def pseudocode_pipeline(problem: Problem, tolerance: float) -> tuple[Tensor, list[np.ndarray]]:
    """(allocation (T-1, K, M), labels per vector); one basis vector per checkpoint."""
    module, space = problem.module, problem.space
    parameters = list(module.parameters())

    def flat_gradient(loss: Tensor, graph: bool) -> Tensor:
        grads = torch.autograd.grad(loss, parameters, create_graph=graph, retain_graph=True)
        return torch.cat([g.reshape(-1) for g in grads])

    def hessian_product(vector: Tensor) -> Tensor:
        loss = problem.token_loss(module, problem.curvature.inputs).mean()
        along = flat_gradient(loss, True) @ vector
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(along, parameters)])

    basis = torch.zeros(0, space.size)
    for index in range(len(problem.checkpoints)):
        space.write(module, problem.checkpoints[index])

        def project(vector: Tensor) -> Tensor:
            return vector - basis.T @ (basis @ vector)  # noqa: B023 - called within this turn

        operator = LinearOperator(
            (space.size, space.size),
            matvec=lambda v: project(  # noqa: B023
                hessian_product(project(torch.from_numpy(v.reshape(-1).astype(np.float32))))  # noqa: B023
            ).numpy(),
            dtype=np.float32,
        )
        _, vectors = eigsh(operator, k=1, which="LA", tol=tolerance)
        basis = torch.cat([basis, torch.from_numpy(vectors.T.copy())])

    slopes, means = [], []
    for index in range(len(problem.checkpoints)):
        space.write(module, problem.checkpoints[index])
        losses = problem.token_loss(module, problem.tokens.inputs).flatten()
        slopes.append(torch.stack([basis @ flat_gradient(loss, False) for loss in losses], dim=1))
        means.append(
            basis @ flat_gradient(problem.token_loss(module, problem.curvature.inputs).mean(), False)
        )
    allocation = []
    for index in range(len(problem.checkpoints) - 1):
        space.write(module, problem.checkpoints[index])
        moved = basis @ (problem.checkpoints[index + 1] - problem.checkpoints[index])
        curvature = torch.stack([row @ hessian_product(row) for row in basis])
        change = means[index + 1] - means[index]
        second = 0.5 * curvature * moved**2 / change
        allocation.append(
            slopes[index] * moved[:, None] + second[:, None] * (slopes[index + 1] - slopes[index])
        )
    values = torch.stack(allocation)
    labels = []
    for vector in range(len(basis)):
        paths = torch.cat([torch.zeros(1, values.shape[2]), values[:, vector].cumsum(0)]).T
        size = max(2, round(0.03 * len(paths)))
        labels.append(hdbscan.HDBSCAN(min_cluster_size=size).fit_predict(paths.double().numpy()))
    return values, labels
