"""Rival unlearning: losses against hand-written formulas, rewinds and ablations against direct edits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from interventions.damage import EvaluatedSplit
from interventions.removal import rivals
from interventions.removal.grouped import GroupedSplit, GroupRule, Predictor, token_nll
from interventions.removal.optimise import FitSettings, batch_at
from interventions.removal.problem import Limits, RemovalProblem
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.models import (
    TransformerShape,
    build_small_transformer,
    cached_activations,
    replaced_activations,
)
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet


class TwoTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(5, 4))
        self.second = nn.Parameter(torch.zeros(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first, self.second])[x]


def tokens_of(x: Tensor) -> TokenSet:
    return TokenSet(
        x[:, None], torch.ones(len(x), 1, dtype=torch.bool), torch.arange(len(x)), {}, (x % 4)[:, None]
    )


@pytest.fixture
def problem() -> RemovalProblem:
    module = TwoTables()
    space = ParameterSpace.from_module(module)
    table = 3.0 * nn.functional.one_hot(torch.arange(10) % 4, 4).float()
    theta = table.flatten()

    def batch(step: int) -> TokenSet:
        return tokens_of(torch.randint(0, 10, (60,), generator=torch.Generator().manual_seed(step)))

    def token_loss(m: nn.Module, x: Tensor) -> Tensor:
        return token_nll(m(x).flatten(0, 1), x.flatten() % 4).view(x.shape)

    loss = Objective(module, token_loss, space)
    series = open_checkpoints({0: torch.zeros(40), 1: theta}, space)
    split = EvaluatedSplit(loss, series, tokens_of(torch.arange(10)))
    rule = GroupRule(("a", "b"), (True, False), lambda t: t.inputs[:, 0] // 5, "first")
    select = GroupedSplit(split, Predictor(loss, lambda m, inputs: m(inputs)), rule)
    return RemovalProblem(select, batch)


def test_losses_are_their_formulas(problem: RemovalProblem) -> None:
    moved = problem.theta + 0.3 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    batch = batch_at(problem, 0, moved)
    skill = batch.tokens.inputs[:, 0] < 5
    new = -batch.nll_after.double()
    old = -batch.nll_before.double()
    forget, others = -float(new[skill].mean()), -float(new[~skill].mean())
    assert float(rivals.gradient_ascent_loss(batch)) == pytest.approx(-forget, rel=1e-5)
    settings = FitSettings(retain=2.0, strength=0.3)
    assert float(rivals.grad_diff_loss(settings)(batch)) == pytest.approx(2 * others - 0.3 * forget, rel=1e-5)
    beta = 0.3
    ratio = (new - old).exp()  # pi_theta / pi_ref of the answers
    direct = float((2 / beta * torch.log(1 + ratio.pow(beta)))[skill].mean()) + 2 * others
    assert float(rivals.npo_loss(settings)(batch)) == pytest.approx(direct, rel=1e-5)


def test_npo_at_the_reference_has_half_the_gradient_of_ascent(problem: RemovalProblem) -> None:
    # d/d(nll) of (2/b) softplus(-b (nll - ref)) is -2 sigmoid(0) = -1 at the reference.
    theta = problem.theta.clone().requires_grad_()
    batch = batch_at(problem, 1, theta)
    settings = FitSettings(retain=0.0, strength=0.2)
    (npo,) = torch.autograd.grad(rivals.npo_loss(settings)(batch), [theta], retain_graph=True)
    (ascent,) = torch.autograd.grad(rivals.gradient_ascent_loss(batch), [theta])
    torch.testing.assert_close(npo, ascent)


@pytest.mark.parametrize("method", [rivals.gradient_ascent, rivals.grad_diff, rivals.npo])
def test_rivals_hurt_the_skill_and_stop_at_the_goal(problem: RemovalProblem, method) -> None:
    found = method(problem, FitSettings(learning_rate=0.1, retain=1.0, strength=0.5), 200)
    shares = problem.select.shares_at(problem.theta + found.delta)
    assert shares.target > 0.9
    assert found.steps < 200
    # Disjoint tables: a loss masked to the skill cannot reach the other one.
    assert shares.worst_off <= 1e-6
    assert found.passes > 0


@pytest.mark.parametrize("method", [rivals.grad_diff, rivals.npo])
def test_without_the_stop_all_steps_are_used(problem: RemovalProblem, method) -> None:
    settings = FitSettings(learning_rate=0.1, retain=1.0, strength=0.5, stop=False)
    found = method(problem, settings, 60)
    stopped = method(problem, replace(settings, stop=True), 60)
    assert found.steps == 60 > stopped.steps
    assert problem.select.shares_at(problem.theta + found.delta).target > 1.04


def test_task_vector_is_the_negative_of_fine_tuning(problem: RemovalProblem) -> None:
    once = rivals.task_vector(problem, FitSettings(learning_rate=0.05, strength=1.0), 10)
    twice = rivals.task_vector(problem, FitSettings(learning_rate=0.05, strength=2.0), 10)
    torch.testing.assert_close(twice.delta, 2 * once.delta)
    assert problem.select.shares_at(problem.theta - once.delta).target < 0  # fine-tuning helped
    assert problem.select.shares_at(problem.theta + once.delta).target > 0


def test_importance_separates_disjoint_tables(problem: RemovalProblem) -> None:
    found = rivals.importance(problem, 3)
    assert float(found.target[20:].abs().max()) == 0.0
    assert float(found.others[:20].abs().max()) == 0.0
    for rule in ("fisher ratio", "movement times gradient"):
        moved = rivals.rewind_weights(problem, found, rule, 0.1)
        assert int((moved != 0).sum()) <= 4
        assert float(moved[20:].abs().max()) == 0.0
    whole = rivals.rewind_weights(problem, found, "magnitude", 1.0)
    torch.testing.assert_close(problem.theta + whole, problem.select.reference)
    with pytest.raises(ValueError, match="importance rule"):
        rivals.rewind_weights(problem, found, "other", 0.1)


def test_part_rewind_is_the_reference_on_that_part_only(problem: RemovalProblem) -> None:
    moved = problem.theta + rivals.rewind_part(problem, ["first"])
    torch.testing.assert_close(moved[:20], problem.select.reference[:20])
    assert torch.equal(moved[20:], problem.theta[20:])


def test_masked_loss_is_the_mean_over_the_others() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0])
    groups = torch.tensor([0, 1, 1, -1])
    assert float(rivals.masked_loss(losses, groups, (True, False))) == pytest.approx(2.5)


def test_activation_ablation_replaces_one_head_at_given_positions() -> None:
    module = build_small_transformer(TransformerShape(1, 16, 2, 32, 12, 12, 10), 0)
    inputs = torch.randint(0, 12, (6, 8), generator=torch.Generator().manual_seed(0))
    hook = "blocks.0.attn.hook_z"
    cached = cached_activations(module, inputs, [hook])
    ablation = rivals.mean_activation(cached, hook, [3, 5], 1)
    with torch.no_grad(), replaced_activations(module, {hook: ablation.function()}):
        changed = cached_activations(module, inputs, ["blocks.0.hook_attn_out"])["blocks.0.hook_attn_out"]
    z = cached[hook].clone()
    z[:, [3, 5], 1] = cached[hook][:, [3, 5], 1].mean(0)
    direct = module.blocks[0].attn.out(z.reshape(6, 8, 16)).detach()
    torch.testing.assert_close(changed, direct)


def test_more_damage_than_the_headroom_shows_in_the_ratio_alone(problem: RemovalProblem) -> None:
    far = problem.select.shares_at(torch.cat([-problem.theta[:20], problem.theta[20:]]))
    assert far.target > 1.5
    assert far.target_capped == 1.0
    # Three of five answers made wrong beyond their headroom: the cap is per token, the ratio sees none of it.
    part = problem.theta.clone()
    part[:12] = -part[:12]
    some = problem.select.shares_at(part)
    assert some.target_capped == pytest.approx(0.6, abs=1e-6)
    assert some.target > 0.9


def test_a_rival_that_diverges_keeps_finite_weights(problem: RemovalProblem) -> None:
    wild = replace(problem, limits=Limits(target=1e30))
    found = rivals.gradient_ascent(wild, FitSettings(learning_rate=1e37), 20)
    assert torch.isfinite(found.delta).all()
