"""Removed means removed: relabelling against enumeration, relearning and what it is measured on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from interventions.damage import EvaluatedSplit
from interventions.removal.grouped import GroupedSplit, GroupRule, Predictor, token_nll
from interventions.removal.measures import (
    SkillOutputs,
    chance,
    refit_damage,
    relearn,
)
from interventions.removal.relabelling import best_permutation, fit_relabelling
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet


def known(answers: Tensor, classes: int, margin: float = 5.0) -> Tensor:
    return margin * nn.functional.one_hot(answers, classes).float()


def test_best_permutation_beats_every_other() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4, generator=generator)
    answers = torch.randint(0, 4, (50,), generator=generator)
    losses = {
        order: float(token_nll(logits[:, list(order)], answers).mean())
        for order in itertools.permutations(range(4))
    }
    best = min(losses, key=lambda order: losses[order])
    assert tuple(best_permutation(logits, answers).tolist()) == best


def test_relabelling_finds_a_planted_permutation_bias_and_scale() -> None:
    generator = torch.Generator().manual_seed(1)
    answers = torch.randint(0, 5, (400,), generator=generator)
    order = torch.tensor([2, 0, 4, 1, 3])
    # Class k's logit sits in column order[k]: a confidently wrong model that still knows everything.
    hidden = torch.zeros(400, 5)
    hidden[torch.arange(400), order[answers]] = 6.0
    found = fit_relabelling(hidden, answers)
    assert torch.equal(found.order, order)
    assert float(token_nll(found.apply(hidden), answers).mean()) < 0.05
    # An upside-down model is found only when a multiple is refitted.
    upside = -known(answers, 5, 3.0)
    plain, scaled = fit_relabelling(upside, answers), fit_relabelling(upside, answers, with_scale=True)
    assert float(token_nll(plain.apply(upside), answers).mean()) > 1.0
    assert scaled.scale < 0
    assert float(token_nll(scaled.apply(upside), answers).mean()) < 0.05


def test_bias_of_uninformative_outputs_reaches_the_marginal_entropy() -> None:
    answers = torch.tensor([0] * 75 + [1] * 25)
    logits = torch.zeros(100, 4)
    found = fit_relabelling(logits, answers)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(token_nll(found.apply(logits), answers).mean()) == pytest.approx(entropy, abs=5e-3)


def test_refit_tells_wrong_from_gone() -> None:
    generator = torch.Generator().manual_seed(2)
    answers, truth = (torch.randint(0, 10, (600,), generator=generator) for _ in range(2))

    def outputs(function) -> SkillOutputs:
        return SkillOutputs(function(answers), function(truth))

    original = outputs(lambda a: known(a, 10, 9.0))
    untrained = outputs(lambda a: torch.zeros(len(a), 10))
    wrong = outputs(lambda a: known((a + 1) % 10, 10, 2.5))
    gone = outputs(lambda a: 0.5 * torch.randn(len(a), 10, generator=generator))
    assert refit_damage(original, untrained, gone, answers, truth).kept > 0.9
    result = refit_damage(original, untrained, wrong, answers, truth)
    assert result.kept < 0.7
    assert result.accuracy == 1.0
    assert refit_damage(original, untrained, untrained, answers, truth).kept_of_untrained == pytest.approx(
        1, abs=0.03
    )


def test_chance_is_the_best_constant_answer() -> None:
    assert chance(torch.tensor([1, 1, 1, 0]), 10) == 0.75
    assert chance(torch.arange(20), 10) == pytest.approx(0.1)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[x]


def table_tokens(x: Tensor) -> TokenSet:
    return TokenSet(
        x[:, None], torch.ones(len(x), 1, dtype=torch.bool), torch.arange(len(x)), {}, (x % 4)[:, None]
    )


def test_relearning_needs_the_skills_own_data() -> None:
    module = Table()
    space = ParameterSpace.from_module(module)
    theta = known(torch.arange(8) % 4, 4).flatten()
    rule = GroupRule(("skill", "rest"), (True, False), lambda t: (t.inputs[:, 0] >= 4).long())
    loss = Objective(module, lambda m, x: token_nll(m(x).flatten(0, 1), x.flatten() % 4).view(x.shape), space)
    everything = table_tokens(torch.arange(8).repeat(4))
    series = open_checkpoints({0: torch.zeros(32), 1: theta}, space)
    split = EvaluatedSplit(loss, series, everything)
    judged = GroupedSplit(split, Predictor(loss, lambda m, inputs: m(inputs)), rule)
    removed = theta.clone()
    removed[:16] = 0.0

    def curve(with_skill: bool):
        mask = torch.ones(32, dtype=torch.bool) if with_skill else ~rule.is_target(rule.assign(everything))
        return relearn(
            judged,
            removed,
            lambda step: (everything, mask),
            60,
            learning_rate=0.1,
            every=20,
        )

    without, with_ = curve(False), curve(True)
    assert [point.step for point in with_] == [0, 20, 40, 60]
    assert without[0].target_share == pytest.approx(1.0, abs=1e-5)
    assert without[-1].target_share == pytest.approx(1.0, abs=1e-5)
    assert with_[-1].target_share < 0.1
    assert with_[-1].accuracy == 1.0
