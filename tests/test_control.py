"""The positive control: a planted rule is found and called selective, its shuffled twin is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from interventions.causal.control import Control, ControlSettings, Plant, Planted, positive_control
from interventions.causal.settings import TestSettings
from polca_edit.basis.record import unlabelled
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet

CONTEXTS, CLASSES = 24, 4
FEW = TestSettings(resamples=200, null_documents=60, random_draws=19, rotations=12, transplants=0, least=5)
MADE = ControlSettings(steps=60, learning_rate=0.2, batch=64)


class Table(nn.Module):
    """One row of logits per context, so that a rule on some contexts touches no other."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(CONTEXTS, CLASSES))


def token_loss(module: Table, inputs: Tensor) -> Tensor:
    return nn.functional.cross_entropy(module.logits[inputs[:, 0]], inputs[:, 1], reduction="none")[:, None]


def sums(count: int, seed: int) -> TokenSet:
    context = torch.randint(0, CONTEXTS, (count,), generator=torch.Generator().manual_seed(seed))
    inputs = torch.stack([context, context % CLASSES], 1)
    return TokenSet(inputs, torch.ones(count, 1, dtype=torch.bool), torch.arange(count))


def planted(tokens: TokenSet) -> Planted:
    return changed(tokens, tokens.inputs[:, 0] < CONTEXTS // 4)


def planted_everywhere(tokens: TokenSet) -> Planted:
    """The rule holds for all contexts, the label names a quarter of them."""
    everywhere = changed(tokens, tokens.inputs[:, 0] >= 0)
    return replace(everywhere, member=tokens.inputs[:, 0] < CONTEXTS // 4)


def changed(tokens: TokenSet, chosen: Tensor) -> Planted:
    target = torch.where(chosen, (tokens.inputs[:, 1] + 1) % CLASSES, tokens.inputs[:, 1])
    return Planted(replace(tokens, inputs=torch.stack([tokens.inputs[:, 0], target], 1)), chosen)


def control(plant: Plant, settings: ControlSettings = MADE) -> Control:
    module = Table()
    space = ParameterSpace.from_module(module)
    end = 4 * nn.functional.one_hot(torch.arange(CONTEXTS) % CLASSES, CLASSES).float().flatten()
    series = open_checkpoints({0: torch.zeros_like(end), 10: end}, space)
    rows = torch.linalg.qr(torch.randn(space.size, 8, generator=torch.Generator().manual_seed(1)))[0].T
    sets = (sums(400, 1), sums(200, 2), sums(300, 3))
    basis = unlabelled("random", rows.contiguous())
    return positive_control(Objective(module, token_loss, space), series, basis, sets, plant, FEW, settings)


def test_a_planted_rule_is_found_and_selective_and_its_twin_is_not() -> None:
    found = control(planted)
    assert found.found == (8, 8)
    assert found.planted.word == "selective"
    assert found.planted.answers["S"] == "yes"
    assert found.twin.word not in ("selective", "carrier")
    assert found.passed


def test_a_movement_that_every_token_feels_does_not_pass() -> None:
    found = control(planted_everywhere)
    assert found.found == (8, 8)
    assert found.planted.word == "shared"
    assert not found.passed


def test_a_rule_that_cannot_be_learned_is_refused() -> None:
    with pytest.raises(ValueError, match="which did not move"):
        control(planted, ControlSettings(steps=1, learning_rate=1e-30))
