"""Every basis against dense matrices on a float64 model of 53 parameters."""

import math

import pytest
import torch
from torch import nn

from polca_edit.basis import operators as bases
from polca_edit.basis import path as path_bases
from polca_edit.basis.hessian import EigenSettings, operator_basis
from polca_edit.basis.path import trajectory_basis
from polca_edit.basis.record import gram_error
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6, dtype=torch.float64)
        self.second = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def logits(module, inputs):
    return module(inputs[:, :, :4])


def token_loss(module, inputs):
    target = inputs[:, :, 4].long()
    return nn.functional.cross_entropy(logits(module, inputs).transpose(1, 2), target, reduction="none")


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    module = Net()
    space = ParameterSpace.from_module(module)
    assert space.size == 51
    inputs = torch.cat([torch.randn(7, 2, 4), torch.randint(3, (7, 2, 1)).float()], 2).double()
    scored = torch.ones(7, 2, dtype=torch.bool)
    scored[3, 1] = False
    tokens = TokenSet(inputs, scored, torch.arange(7))
    objective = Objective(module, token_loss, space, batch_size=4)
    thetas = [space.read(module)]
    for _ in range(8):
        step = -0.7 * objective.mean_gradient(thetas[-1], tokens)[1] + 0.05 * torch.randn(51).double()
        thetas.append(thetas[-1] + step)
    return objective, open_checkpoints(thetas, space, steps=range(0, 90, 10)), tokens


def dense_loss(objective, tokens):
    def mean(theta):
        values = objective.space.unflatten(theta)
        from polca_edit.parameters import call_with

        losses = call_with(objective.module, objective.space, values, token_loss, tokens.inputs)
        return losses[tokens.scored].mean()

    return mean


def dense_hessian(objective, theta, tokens):
    return torch.func.hessian(dense_loss(objective, tokens))(theta)


def sequential(matrices, k=1):
    """Algorithm 1 with dense eigendecompositions."""
    rows = matrices[0].new_zeros(0, len(matrices[0]))
    for matrix in matrices:
        projector = torch.eye(len(matrix), dtype=matrix.dtype) - rows.T @ rows
        values, vectors = torch.linalg.eigh(projector @ matrix @ projector)
        rows = torch.cat([rows, vectors[:, values.argsort(descending=True)[:k]].T])
    return rows


def assert_same(found, expected, tolerance=1e-4):
    """Row by row up to sign."""
    assert gram_error(found) < 1e-8
    overlaps = (found * expected).sum(1).abs()
    assert float((overlaps - 1).abs().max()) < tolerance, overlaps


def settings(k=1, products=150, mask=None):
    return EigenSettings(k, 1e-7, products, mask=mask)


def test_shuffled_final_and_sliding_hessian(problem):
    objective, checkpoints, tokens = problem
    chosen = checkpoints.subset([1, 3, 5, 7])
    dense = [dense_hessian(objective, chosen[i], tokens) for i in range(4)]
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()
    assert order != [0, 1, 2, 3]
    found = bases.shuffled_hessian_basis(objective, chosen, tokens, settings())
    assert_same(found.rows, sequential([dense[i] for i in order]))
    assert found.origins.tolist() == [chosen.steps[i] for i in order]
    final = bases.final_hessian_basis(objective, chosen, tokens, 3, settings())
    assert_same(final.rows, sequential([dense[3]], k=3))
    sliding = bases.sliding_hessian_basis(objective, chosen, tokens, settings(), window=2)
    means = [dense[0], *((dense[i] + dense[i + 1]) / 2 for i in range(3))]
    assert_same(sliding.rows, sequential(means))


def test_gauss_newton_product_and_basis(problem):
    objective, checkpoints, tokens = problem
    theta = checkpoints[2]

    def outputs(point):
        from polca_edit.parameters import call_with

        values = objective.space.unflatten(point)
        return call_with(objective.module, objective.space, values, logits, tokens.inputs)

    jacobian = torch.func.jacrev(outputs)(theta)[tokens.scored]
    p = outputs(theta)[tokens.scored].softmax(-1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    dense = torch.einsum("mcn,mcd,mdk->nk", jacobian, middle, jacobian) / tokens.count
    product = bases.gauss_newton_product(objective, logits, theta, tokens)
    vector = torch.randn(51, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(product(vector), dense @ vector, atol=1e-12, rtol=1e-9)
    one = checkpoints.subset([2])
    found = bases.gauss_newton_basis(objective, logits, one, tokens, settings(2))
    assert_same(found.rows, sequential([dense], k=2))


@pytest.mark.parametrize("centred", [False, True])
def test_fisher_covariance_and_stacked_jacobian(problem, centred):
    objective, checkpoints, tokens = problem
    chosen = checkpoints.subset([1, 4])
    gradients = [objective.token_gradients(chosen[i], tokens) for i in range(2)]
    if centred:
        dense = [torch.cov(g.T, correction=0) for g in gradients]
    else:
        dense = [g.T @ g / len(g) for g in gradients]
    found = bases.fisher_basis(objective, chosen, tokens, settings(2), centred=centred)
    assert_same(found.rows, sequential(dense, k=2))
    if not centred:
        stacked = bases.stacked_jacobian_basis(objective, chosen, tokens, 3, settings())
        right = torch.linalg.svd(torch.cat(gradients), full_matrices=False)[2]
        assert_same(stacked.rows, right[:3])


def test_adam_hessian(problem):
    objective, checkpoints, tokens = problem
    chosen = checkpoints.subset([2, 6])
    draw = torch.Generator().manual_seed(0)
    moments = {s: torch.rand(51, generator=draw).double() + 0.01 for s in chosen.steps}
    found = bases.adam_hessian_basis(objective, chosen, tokens, moments.__getitem__, settings())
    rows = torch.zeros(0, 51).double()
    for i in range(2):
        scale = (moments[chosen.steps[i]].sqrt() + 1e-8).rsqrt()
        matrix = scale[:, None] * dense_hessian(objective, chosen[i], tokens) * scale
        held = torch.linalg.qr((rows * scale).T)[0] if len(rows) else torch.zeros(51, 0).double()
        projector = torch.eye(51).double() - held @ held.T
        values, vectors = torch.linalg.eigh(projector @ matrix @ projector)
        row = scale * vectors[:, values.argmax()]
        rows = torch.cat([rows, row[None] / row.norm()])
    assert float((rows @ rows.T - torch.eye(2).double()).abs().max()) < 1e-8
    assert_same(found.rows, rows)
    plain = operator_basis("hessian", lambda i: objective.hessian(chosen[i], tokens), chosen, settings())
    assert float((plain.rows * found.rows).sum(1).abs().min()) < 0.99


def test_trajectory_and_hessian(problem):
    objective, checkpoints, tokens = problem
    first = trajectory_basis(checkpoints, 3)
    chosen = checkpoints.subset([4, 8])
    found = bases.trajectory_and_hessian_basis(first, objective, chosen, tokens, settings())
    projector = torch.eye(51).double() - first.rows.T @ first.rows
    dense = [projector @ dense_hessian(objective, chosen[i], tokens) @ projector for i in range(2)]
    assert_same(found.rows, torch.cat([first.rows, sequential(dense)]))
    assert found.origins.tolist() == [-1, -1, -1, 40, 80]


def test_trajectory_secant_and_loss_path(problem):
    objective, checkpoints, tokens = problem
    gradients = path_bases.mean_gradients(objective, checkpoints, tokens)
    mean = dense_loss(objective, tokens)
    torch.testing.assert_close(gradients[3], torch.func.grad(mean)(checkpoints[3]))
    found = path_bases.trajectory_secant_basis(checkpoints, gradients, 5)
    stack = torch.stack([checkpoints[i] for i in range(9)])
    first = torch.linalg.svd(stack[1:] - stack[0], full_matrices=False)[2][:4]
    left = gradients.diff(dim=0)
    left = left - left @ first.T @ first
    assert_same(found.rows, torch.cat([first, torch.linalg.svd(left, full_matrices=False)[2][:1]]))
    path = path_bases.loss_path_basis(checkpoints, gradients, 3)
    slopes, moves = (gradients[1:] + gradients[:-1]) / 2, stack.diff(dim=0)
    matrix = slopes.T @ moves
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    order = values.abs().argsort(descending=True)[:3]
    assert_same(path.rows, vectors[:, order].T)
    torch.testing.assert_close(path.eigenvalues, values[order], atol=1e-10, rtol=1e-8)
    given = torch.einsum("kn,tn,tm,km->k", path.rows, slopes, moves, path.rows)
    torch.testing.assert_close(given, path.eigenvalues, atol=1e-10, rtol=1e-8)


def test_loss_weighted_basis(problem):
    objective, checkpoints, tokens = problem
    gradients = path_bases.mean_gradients(objective, checkpoints, tokens)
    losses = torch.stack([objective.losses(checkpoints[i], tokens) for i in range(9)])
    early = torch.arange(tokens.count) < 5
    density = path_bases.loss_fall_density(losses, {"a": early, "b": ~early}, uniform=0.0)
    falls = [losses[:, m].mean(1).diff().abs() for m in (early, ~early)]
    expected = (falls[0] / falls[0].sum() + falls[1] / falls[1].sum()) / 2
    torch.testing.assert_close(density, expected.double())
    mixed = path_bases.loss_fall_density(losses, {"a": early, "b": ~early}, uniform=0.4)
    torch.testing.assert_close(mixed, 0.6 * density + 0.4 / 8)
    found = path_bases.loss_weighted_basis(checkpoints, gradients, density, 5, secants=2)
    stack = torch.stack([checkpoints[i] for i in range(9)])
    weights = torch.tensor([density[t : t + 2].sum() / 2 for t in range(8)]).sqrt()
    first = torch.linalg.svd((stack[1:] - stack[0]) * weights[:, None], full_matrices=False)[2][:3]
    left = gradients.diff(dim=0)
    left = left - left @ first.T @ first
    left = left / left.norm(dim=1, keepdim=True) * density.sqrt()[:, None]
    second = torch.linalg.svd(left, full_matrices=False)
    assert_same(found.rows, torch.cat([first, second[2][:2]]))
    torch.testing.assert_close(found.eigenvalues[3:], second[1][:2] ** 2)
    assert not found.supervised
    with pytest.raises(ValueError, match="still"):
        path_bases.loss_fall_density(losses[:1].repeat(9, 1), {"a": early})


def test_a_short_early_move_that_costs_nats_gets_a_vector():
    space = ParameterSpace.from_module(nn.Linear(3, 1, bias=False))
    path = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0.5, 1, 0], [0.5, 2, 0], [0.5, 3, 0]])
    series = open_checkpoints(list(path), space, steps=range(5))
    density = torch.tensor([0.97, 0.01, 0.01, 0.01]).double()
    weighted = path_bases.loss_weighted_basis(series, torch.eye(3).repeat(2, 1)[:5], density, 2, secants=1)
    # Weighted Gram matrix by hand: [[.12875, .0225], [.0225, .095]], so tan(2 angle) = 4/3, cos^2 = .8.
    assert math.isclose(float(weighted.rows[0, 0].square()), 0.8, rel_tol=1e-5)
    assert float(trajectory_basis(series, 1).rows[0, 0].square()) < 0.1


def test_parameter_axes_and_odd_checkpoints(problem):
    _, checkpoints, _ = problem
    found = path_bases.parameter_axes_basis(checkpoints[8], 4)
    expected = checkpoints[8].abs().argsort(descending=True)[:4]
    assert found.rows.argmax(1).tolist() == expected.tolist()
    assert float(found.rows.sum()) == 4
    assert path_bases.odd_checkpoints(checkpoints).steps == (0, 20, 40, 60, 80)


def test_masks_confine_every_basis(problem):
    objective, checkpoints, tokens = problem
    mask = objective.space.mask(["second.*"])
    chosen = checkpoints.subset([2, 6])
    moments = torch.ones(51).double()
    gradients = path_bases.mean_gradients(objective, checkpoints, tokens)
    first = trajectory_basis(checkpoints, 2, mask=mask)
    given = settings(products=40, mask=mask)
    found = [
        bases.shuffled_hessian_basis(objective, chosen, tokens, given),
        bases.final_hessian_basis(objective, chosen, tokens, 2, given),
        bases.sliding_hessian_basis(objective, chosen, tokens, given),
        bases.gauss_newton_basis(objective, logits, chosen, tokens, given),
        bases.fisher_basis(objective, chosen, tokens, given),
        bases.stacked_jacobian_basis(objective, chosen, tokens, 2, given),
        bases.adam_hessian_basis(objective, chosen, tokens, lambda _: moments, given),
        bases.trajectory_and_hessian_basis(first, objective, chosen, tokens, given),
        path_bases.trajectory_secant_basis(checkpoints, gradients, 3, mask=mask),
        path_bases.loss_weighted_basis(checkpoints, gradients, torch.full((8,), 1 / 8), 3, mask=mask),
        path_bases.loss_path_basis(checkpoints, gradients, 2, mask=mask),
        path_bases.parameter_axes_basis(checkpoints[8], 3, mask=mask),
    ]
    for basis in found:
        assert float(basis.rows[:, ~mask].abs().max()) == 0, basis.kind
        assert gram_error(basis.rows) < 1e-8, basis.kind
        assert not basis.supervised
    inner = dense_hessian(objective, chosen[1], tokens)[mask][:, mask]
    assert math.isclose(float(found[1].eigenvalues[0]), float(torch.linalg.eigvalsh(inner)[-1]), rel_tol=1e-6)


def test_checkpoints_are_placed_where_groups_accelerate():
    steps = torch.arange(0, 410, 10)
    curves = torch.stack([1 / (1 + ((steps - at) / 5.0).exp()) for at in (100, 300)], 1)
    losses = curves.repeat_interleave(3, 1)
    groups = path_bases.loss_groups(losses, 2, seed=0)
    assert sorted(m.tolist() for m in groups.values()) == [[False] * 3 + [True] * 3, [True] * 3 + [False] * 3]
    chosen = steps[path_bases.accelerating_checkpoints(losses, steps, groups, 10)]
    # Sigmoids that fall at 100 and 300 accelerate in the 20 steps before.
    near = ((chosen >= 70) & (chosen <= 100)) | ((chosen >= 270) & (chosen <= 300))
    assert int(near.sum()) >= 8 - 1
    assert len(set(chosen.tolist())) == 10
    with pytest.raises(ValueError, match="recorded"):
        path_bases.accelerating_checkpoints(losses, steps, groups, 40)
