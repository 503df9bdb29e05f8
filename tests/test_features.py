"""Rival trajectories against dense per-token gradients and closed forms."""

import pytest
import torch

from experiments.tasks.arithmetic import make_data, token_loss
from polca_edit.allocation.allocate import project
from polca_edit.basis.path import parameter_axes_basis
from polca_edit.basis.record import random_basis
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.clusters import features
from polca_edit.derivatives.objective import Objective
from polca_edit.models import TransformerShape, build_small_transformer
from polca_edit.parameters import ParameterSpace, call_with

torch.set_num_threads(1)
SHAPE = TransformerShape(1, 8, 2, 8, 12, 12, 10)


@pytest.fixture(scope="module")
def problem():
    module = build_small_transformer(SHAPE, 0).double()
    space = ParameterSpace.from_module(module)
    tokens = make_data(10, 10, 10, 4, 0).splits.select
    objective = Objective(module, token_loss, space, batch_size=6)
    generator = torch.Generator().manual_seed(0)
    thetas = [space.read(module)]
    for _ in range(3):
        thetas.append(thetas[-1] + 0.05 * torch.randn(space.size, generator=generator, dtype=torch.float64))
    checkpoints = open_checkpoints(thetas, space, steps=(0, 2, 5, 9))
    dense = torch.stack([objective.token_gradients(theta, tokens) for theta in thetas])
    return objective, checkpoints, tokens, dense


def test_loss_fisher_and_first_order(problem):
    objective, checkpoints, tokens, dense = problem
    basis = random_basis(objective.space.size, 3, torch.Generator().manual_seed(1), dtype=torch.float64)
    p = project(objective, checkpoints, [basis], tokens)[0]
    losses = torch.stack([objective.losses(checkpoints[i], tokens) for i in range(4)])
    torch.testing.assert_close(features.exact_loss(p).paths[:, 0], losses)
    change = features.loss_change(p).paths[:, 0]
    torch.testing.assert_close(change.cumsum(0), losses - losses[0])
    slopes = torch.einsum("tmn,kn->tkm", dense, basis.rows)
    torch.testing.assert_close(features.fisher(p).paths, slopes.square(), atol=1e-12, rtol=1e-8)
    moves = torch.stack([basis.rows @ (checkpoints[i + 1] - checkpoints[i]) for i in range(3)])
    expected = (slopes[:-1] * moves[:, :, None]).cumsum(0)
    torch.testing.assert_close(features.first_order(p).paths[1:], expected, atol=1e-12, rtol=1e-8)


def test_lca_on_single_parameters(problem):
    objective, checkpoints, tokens, dense = problem
    basis = parameter_axes_basis(checkpoints[3], 4)
    found = features.parameter_lca(project(objective, checkpoints, [basis], tokens)[0])
    chosen = basis.rows.argmax(1)
    for row, j in enumerate(chosen.tolist()):
        moved = torch.stack([checkpoints[i + 1][j] - checkpoints[i][j] for i in range(3)])
        expected = (dense[:3, :, j] * moved[:, None]).cumsum(0)
        torch.testing.assert_close(found.paths[1:, row], expected, atol=1e-12, rtol=1e-8)


def test_saliency_is_the_gradient_norm_in_the_embeddings(problem):
    objective, checkpoints, tokens, _ = problem
    found = features.input_saliency(objective, checkpoints, tokens).paths[2, 0]
    # Finite differences in the embedding of one sequence, through a shifted forward hook.
    module, row, slot = objective.module, 4, 2
    values = objective.space.unflatten(checkpoints[2])
    grads = torch.zeros(11, SHAPE.d_model, dtype=torch.float64)
    for position in range(11):
        for unit in range(SHAPE.d_model):
            sides = []
            for sign in (1, -1):
                shift = torch.zeros(1, 11, SHAPE.d_model, dtype=torch.float64)
                shift[0, position, unit] = sign * 1e-5
                handle = module.embed.register_forward_hook(lambda m, a, y, shift=shift: y + shift)
                given = tokens.inputs[row : row + 1]
                sides.append(call_with(module, objective.space, values, token_loss, given)[0, slot].detach())
                handle.remove()
            grads[position, unit] = (sides[0] - sides[1]) / 2e-5
    assert float(found[row * 4 + slot]) == pytest.approx(float(grads.norm()), rel=1e-5)
    assert not module.embed._forward_hooks


def test_influence_is_the_product_of_dense_gradients(problem):
    objective, checkpoints, tokens, dense = problem
    probes = [tokens.select(torch.arange(3)), tokens.select(torch.arange(3, 8))]
    rates = [0.0, 0.5, 1.0, 2.0]
    found = features.gradient_influence(objective, checkpoints, tokens, probes, rates).paths
    means = torch.stack([dense[:, :12].mean(1), dense[:, 12:32].mean(1)], 1)
    steps = torch.einsum("tmn,tpn->tpm", dense, means) * torch.tensor(rates).double()[:, None, None]
    torch.testing.assert_close(found, steps.cumsum(0), atol=1e-10, rtol=1e-7)


def test_activations_keep_their_leading_components(problem):
    objective, checkpoints, tokens, _ = problem
    hook = "blocks.0.hook_resid_post"
    found = features.hidden_activations(objective, checkpoints, tokens, hook, SHAPE.d_model).paths
    kept = []
    objective.module.hook_dict[hook].add_hook(lambda value, hook: kept.append(value[:, -4:].detach()))
    for i in range(4):
        with objective.space.substituted(objective.module, checkpoints[i]), torch.no_grad():
            objective.module(tokens.inputs[:, :-1])
    objective.module.hook_dict[hook].remove_hooks()
    values = torch.stack([k.flatten(0, 1) for k in kept]).flatten(0, 1)
    values = values - values.mean(0)
    # With all components kept, distances are those of the activations; variances descend.
    flat = found.permute(0, 2, 1).flatten(0, 1)
    torch.testing.assert_close(torch.cdist(flat, flat), torch.cdist(values, values), atol=1e-6, rtol=1e-6)
    spread = flat.square().sum(0)
    assert bool((spread[:-1] >= spread[1:]).all())
