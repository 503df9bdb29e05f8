"""Collapsed representations and noised distillation. Oracles: gradients written out, dense algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from interventions.damage import EvaluatedSplit
from interventions.removal.grouped import GroupedSplit, GroupRule, Predictor, token_nll
from interventions.removal.optimise import FitSettings
from interventions.removal.problem import Limits, RemovalProblem
from interventions.removal.robust import (
    Collapsed,
    collapsed_ascent,
    collapsed_span,
    common_directions,
    distillation,
    noised,
)
from interventions.removal.tuning import tuned
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet
from polca_edit.training import TrainingSettings

#: Points (x, 1): four classes by the first two axes; the last input is common to all of them.
INPUTS = torch.tensor([[1.0, 0, 3], [0, 1.0, 3], [-1.0, 0, 3], [0, -1.0, 3]])


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(INPUTS[x])


def tokens_of(x: Tensor) -> TokenSet:
    ones = torch.ones(len(x), 1, dtype=torch.bool)
    return TokenSet(x[:, None], ones, torch.arange(len(x)), {}, x[:, None])


@pytest.fixture
def problem() -> RemovalProblem:
    loss = Objective(Linear(), lambda m, x: token_nll(m(x).flatten(0, 1), x.flatten()).view(x.shape))
    weight = 3.0 * INPUTS.clone()
    weight[:, 2] = 0.0
    theta = loss.space.flatten({"layer.weight": weight, "layer.bias": torch.zeros(4)})
    rule = GroupRule(("a", "b"), (True, False), lambda t: (t.inputs[:, 0] > 0).long(), "a")
    every = tokens_of(torch.arange(4).repeat(4))
    series = open_checkpoints({0: torch.zeros_like(theta), 1: theta}, loss.space)
    select = GroupedSplit(EvaluatedSplit(loss, series, every), Predictor(loss, lambda m, x: m(x)), rule)
    return RemovalProblem(select, lambda step: every, Limits())


def test_common_directions_are_the_mean_and_the_leading_components() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 6, generator=generator, dtype=torch.float64) * torch.tensor([9, 5, 1, 1, 1, 1.0])
    values += 20 * torch.eye(6, dtype=torch.float64)[5]
    rows = common_directions(values, 2)
    torch.testing.assert_close(rows @ rows.T, torch.eye(3, dtype=torch.float64))
    mean = values.mean(0)
    right = torch.linalg.svd(values - mean)[2][:2]
    for inside in (mean, *right):
        torch.testing.assert_close((inside @ rows.T) @ rows, inside)
    assert len(common_directions(torch.zeros(4, 3), 2)) == 0
    assert len(common_directions(torch.ones(4, 3), 2)) == 1


def test_a_collapsed_movement_is_the_gradient_of_collapsed_inputs(problem: RemovalProblem) -> None:
    """Sum over tokens of g a', with common directions taken out of a and g, by autograd on both sides."""
    span = collapsed_span(problem, 0)
    (inside,) = span.inputs.values()
    # All inputs share the last axis, and only that: the others cancel in the mean.
    torch.testing.assert_close(inside.abs(), torch.tensor([[0.0, 0.0, 1.0]]))
    theta = problem.theta.clone().requires_grad_()
    tokens = problem.batch(0)
    losses = token_nll(problem.predictor.at(theta, tokens, differentiable=True), tokens.output_of)
    skill = problem.rule.is_target(problem.rule.assign(tokens))
    (gradient,) = torch.autograd.grad(losses[skill].sum(), theta)
    moved = problem.select.predictor.loss.space.unflatten(span.move(gradient))
    x = tokens.inputs[skill][:, 0]
    slope = problem.predictor.at(problem.theta, tokens)[skill].softmax(-1) - nn.functional.one_hot(x, 4)
    outside = span.outputs["layer.weight"]
    expected = (slope - slope @ outside.T @ outside).T @ (INPUTS[x] - INPUTS[x] @ inside.T @ inside)
    torch.testing.assert_close(moved["layer.weight"], expected, atol=1e-5, rtol=1e-4)
    assert not bool(moved["layer.bias"].any())


def test_collapsed_ascent_hurts_the_skill_and_moves_no_common_direction(problem: RemovalProblem) -> None:
    found = collapsed_ascent(problem, FitSettings(0.1, strength=0.0, stop=False), 40)
    shares = problem.select.shares_at(problem.theta + found.delta)
    assert shares.target > 1.0
    moved = problem.predictor.loss.space.unflatten(found.delta)["layer.weight"]
    assert float(moved[:, 2].abs().max()) < 1e-6
    assert float(moved.abs().max()) > 0.1


def test_a_model_without_linear_layers_is_refused() -> None:
    from tests.test_removal import TwoTables, table_logits, table_loss
    from tests.test_removal import tokens_of as table_tokens

    loss = Objective(TwoTables(), table_loss)
    series = open_checkpoints({0: torch.zeros(40), 1: torch.ones(40)}, loss.space)
    rule = GroupRule(("a", "b"), (True, False), lambda t: t.inputs[:, 0] // 5)
    tokens = table_tokens(torch.arange(10))
    select = GroupedSplit(EvaluatedSplit(loss, series, tokens), Predictor(loss, table_logits), rule)
    with pytest.raises(ValueError, match="needs linear layers"):
        collapsed_span(RemovalProblem(select, lambda step: tokens), 1)


def test_noise_by_hand() -> None:
    space = ParameterSpace(
        ("m", "norm.weight", "b"),
        ((2, 4), (3,), (3,)),
        (("m", "m"), ("norm.weight", "norm.weight"), ("b", "b")),
    )
    theta = torch.cat([torch.full((8,), 2.0), torch.full((3,), 3.0), torch.full((3,), 4.0)])
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(noised(theta, space, 0.0, generator), theta)
    moved = noised(theta, space, 0.5, torch.Generator().manual_seed(0), size=2.0)
    noise = (moved[:8] - 1.0) / (0.5 * 2.0)
    assert 0.0 < float(noise.abs().max()) <= 1.0  # sqrt(6 / (2 + 4)) = 1
    torch.testing.assert_close(moved[8:], torch.tensor([2.0, 2, 2, 2, 2, 2]))
    assert isinstance(Collapsed(space, {}, {}).rank, int)


def test_a_student_learns_what_the_teacher_says(problem: RemovalProblem) -> None:
    """A teacher that still knows hands the skill on through its other outputs; an unlearned one does not."""
    knows = problem.theta
    unlearned = knows.clone()
    unlearned[:3] = 0.0  # the row of the skill's class
    settings = TrainingSettings(150, 0.1, weight_decay=0.0, warmup=0)
    tokens, kept = problem.select.tokens, ~problem.select.target
    found = {}
    for name, teacher in (("knows", knows), ("unlearned", unlearned)):
        loss = distillation(problem, teacher)
        student = tuned(problem.predictor, torch.zeros_like(teacher), loss, settings)
        here, there = (problem.predictor.at(t, tokens)[kept].softmax(-1) for t in (teacher, student))
        torch.testing.assert_close(here, there, atol=0.03, rtol=0)
        found[name] = problem.select.shares_at(student)
    assert found["knows"].target < 0.05
    assert found["unlearned"].target > 0.5
    assert found["unlearned"].worst_off < 0.05
