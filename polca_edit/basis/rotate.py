"""Rotations inside the span of a basis, found from stored projections alone; no model is needed.

Along unit vector r of the K-dimensional span, token x is given r' S_x r nats, where S_x is the
symmetric part of sum_t <b_i, g_t(x)> <b_j, dtheta_t> (g the mean of an interval's two ends, so this
is the trapezoid rule). The trace of S_x, what all vectors are given together, is the same for every
rotation. Rotations are fitted on the select split and judged on the evaluate split.

What each optimises:

- :func:`orthomax`: Kaiser's quartimax / varimax criterion of the table A R, A the token x vector
  allocation in the given basis. The table is rotated as loadings are, which is not the allocation of
  the rotated basis (that one is quadratic in R): a surrogate, kept because it is what factor
  analysts use.
- :func:`joint_diagonalisation`: sum over tokens and vectors of (r' S_x r)^2, which is quartimax of the
  allocation itself; with ``centred`` the mean S is taken off first, which is its varimax (sum over
  vectors of the variance over tokens of their allocation). With ``normalised`` every S_x first gets
  Frobenius norm one: the same criterion of each token's relative allocation.
- :func:`independent_components`: FastICA's negentropy of the allocation table's columns; its mixing
  matrix is replaced by the nearest rotation.
- :func:`contrastive`: generalised eigenvectors of the on-target against the off-target second moment
  of S_x, made orthonormal in descending order. Uses labels: supervised.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polca_edit.allocation.allocate import Projections


def allocation_matrices(projections: Projections) -> Float[Tensor, "M K K"]:
    """S_x of every token, nats: its diagonal is the token's whole-run allocation (trapezoid)."""
    slopes = (projections.gradients[:-1] + projections.gradients[1:]).double() / 2
    product = torch.einsum("tim,tj->mij", slopes, projections.displacements.double())
    return (product + product.transpose(1, 2)) / 2


def orthomax(
    table: Float[Tensor, "M K"],
    kind: Literal["varimax", "quartimax"] = "varimax",
    *,
    iterations: int = 500,
    tolerance: float = 1e-10,
) -> Float[Tensor, "K K"]:
    """Rotation R that maximises sum_xj L_xj^4 - (gamma / M) sum_j (sum_x L_xj^2)^2 for L = table R.

    gamma is 1 for varimax (Kaiser 1958) and 0 for quartimax; the iteration is the usual one of
    repeated polar factors.
    """
    gamma = 1.0 if kind == "varimax" else 0.0
    table = table.double()
    count, size = table.shape
    rotation = torch.eye(size, dtype=torch.float64)
    before = 0.0
    for _ in range(iterations):
        turned = table @ rotation
        target = turned**3 - turned * turned.square().sum(0) * (gamma / count)
        left, values, right = torch.linalg.svd(table.T @ target)
        rotation = left @ right
        now = float(values.sum())
        if now <= before * (1 + tolerance):
            break
        before = now
    return rotation


def joint_diagonalisation(
    matrices: Float[Tensor, "M K K"],
    *,
    centred: bool = False,
    normalised: bool = False,
    sweeps: int = 100,
    tolerance: float = 1e-9,
) -> Float[Tensor, "K K"]:
    """Rotation that makes all symmetric matrices as diagonal as possible (Jacobi angles).

    Each pair of axes is turned by the angle that is best for all matrices at once (Cardoso and
    Souloumiac 1996), until no angle exceeds the tolerance.

    Args:
        matrices: S_x, symmetric.
        centred: take their mean off first, so that what varies over tokens counts and what all share
            does not.
        normalised: divide every matrix by its Frobenius norm before that, so that a token counts by
            the directions of its loss change and not by its size.
        sweeps: over all pairs of axes at most.
        tolerance: radians.
    """
    stack = matrices.double().numpy().copy()
    if normalised:
        stack /= np.maximum(np.linalg.norm(stack, axis=(1, 2), keepdims=True), 1e-300)
    if centred:
        stack -= stack.mean(0)
    size = stack.shape[1]
    rotation = np.eye(size)
    for _ in range(sweeps):
        largest = 0.0
        for p in range(size - 1):
            for q in range(p + 1, size):
                angle = _best_angle(stack, p, q)
                if abs(angle) <= tolerance:
                    continue
                largest = max(largest, abs(angle))
                turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
                stack[:, :, [p, q]] = stack[:, :, [p, q]] @ turn
                stack[:, [p, q], :] = turn.T @ stack[:, [p, q], :]
                rotation[:, [p, q]] = rotation[:, [p, q]] @ turn
        if largest <= tolerance:
            break
    return torch.from_numpy(rotation)


def _best_angle(stack: np.ndarray, p: int, q: int) -> float:
    """The angle that maximises the sum of squared diagonal entries p and q over the stack."""
    difference = stack[:, p, p] - stack[:, q, q]
    cross = 2 * stack[:, p, q]
    on, off = float(difference @ difference - cross @ cross), 2 * float(difference @ cross)
    return 0.5 * float(np.arctan2(off, on + np.hypot(on, off)))


def independent_components(table: Float[Tensor, "M K"], *, seed: int) -> Float[Tensor, "K K"]:
    """The rotation nearest to FastICA's mixing matrix of the allocation table (polar factor)."""
    from sklearn.decomposition import FastICA

    model = FastICA(table.shape[1], whiten="unit-variance", random_state=seed, max_iter=1000, tol=1e-4)
    model.fit(table.double().numpy())
    columns = model.mixing_ / np.linalg.norm(model.mixing_, axis=0, keepdims=True)
    rotation, _ = scipy.linalg.polar(columns)
    return torch.from_numpy(rotation)


def contrastive(
    matrices: Float[Tensor, "M K K"], on_target: Bool[Tensor, " M"], *, ridge: float = 1e-3
) -> Float[Tensor, "K K"]:
    """Directions along which a named skill's tokens are given much and all others little (supervised).

    Solves C_on r = mu (C_off + ridge tr(C_off)/K I) r with C the mean of S_x S_x over the tokens of
    either side, and orthonormalises the r in descending order of mu, so the first column is the
    generalised eigenvector itself.

    Raises:
        ValueError: if one side holds no token.
    """
    if not bool(on_target.any()) or bool(on_target.all()):
        raise ValueError("a contrastive rotation needs tokens on and off target; choose another skill")
    squares = matrices.double() @ matrices.double()
    on, off = squares[on_target].mean(0).numpy(), squares[~on_target].mean(0).numpy()
    off = off + ridge * np.trace(off) / len(off) * np.eye(len(off))
    _, vectors = scipy.linalg.eigh(on, off)
    rotation, _ = np.linalg.qr(vectors[:, ::-1])
    return torch.from_numpy(rotation.copy())
