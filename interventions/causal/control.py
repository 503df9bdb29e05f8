"""The positive control: a movement with a known effect, made by training alone, put through the same test.

A copy of the final model is trained for a few dozen steps on tokens whose targets were changed by a rule.
That movement joins the basis as one more vector. The whole chooser must find it for the planted tokens and
the test must call it selective. Its twin is the same movement with shuffled labels: as many tokens, drawn
among all, so that whatever the movement does it does not do to them alone; it must not be selective.
(Training on random targets is no twin: the model learns to hedge on the tokens that got them, which is a
selective effect, and a test that says so is right.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from interventions.causal.questions import Verdict
from interventions.causal.settings import TestSettings
from interventions.causal.test import causal_test
from interventions.damage import EvaluatedSplit
from interventions.edits import project_out
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.clusters.hypotheses import Hypothesis, TokenGroup
from polca_edit.derivatives.lanczos import orthonormalise
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet


@dataclass(frozen=True, eq=False)
class Planted:
    """Tokens with changed targets.

    Attributes:
        tokens: the set, inputs and targets changed.
        member: (M,) the tokens whose target was changed.
    """

    tokens: TokenSet
    member: Bool[Tensor, " M"]


#: The same tokens with planted targets.
Plant = Callable[[TokenSet], Planted]


@dataclass(frozen=True)
class ControlSettings:
    """How the planted movement is made.

    Attributes:
        steps: of training.
        learning_rate: of Adam.
        batch: sequences of a step.
        seed: of batches and of the twin's labels.
    """

    steps: int = 150
    learning_rate: float = 3e-4
    batch: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Control:
    """Both halves of a positive control.

    Attributes:
        planted: verdict of the rule.
        twin: verdict of the twin.
        found: vector that the chooser took for the planted tokens, and the one that it should.
    """

    planted: Verdict
    twin: Verdict
    found: tuple[int, int]

    @property
    def passed(self) -> bool:
        """Yes where yes is true and no where no is true."""
        return self.planted.word in ("selective", "carrier") and self.twin.word not in (
            "selective",
            "carrier",
        )


def positive_control(
    loss: Objective,
    series: Checkpoints,
    basis: Basis,
    sets: tuple[TokenSet, TokenSet, TokenSet],
    plant: Plant,
    test: TestSettings | None = None,
    settings: ControlSettings | None = None,
) -> Control:
    """Plant a rule and its twin in copies of the final model, and test both like any pair.

    Args:
        loss: of the model.
        series: its checkpoints.
        basis: to which the planted movement is added.
        sets: tokens to train on, to choose on and to test on; no sequence in two of them.
        plant: changes targets by a rule.
        test: draws and thresholds.
        settings: how the movement is made.
    """
    test, settings = test or TestSettings(), settings or ControlSettings()
    train, select, unseen = map(plant, sets)
    theta, last = series[-1], series.steps[-1]
    moved = trained_copy(loss, theta, train.tokens, settings)
    end = last + settings.steps
    points = open_checkpoints({series.steps[0]: series[0], last: theta, end: moved}, loss.space)
    # What is undone is the planted stretch; headroom counts from the run's start, as for every other pair:
    # from the stretch's own start, tokens that it barely touched would have no headroom to lose.
    window, reference = (last, end), series.steps[0]
    # The planted movement first: the basis gives way to it, so that undoing that one vector takes all of it.
    rows = orthonormalise(torch.cat([(moved - theta)[None].to(basis.rows), basis.rows])).roll(-1, 0)
    chooser = EvaluatedSplit(loss, points, select.tokens, window, reference)
    lost = [chooser.damage(project_out(chooser, row)).share_by({"": select.member})[""] for row in rows]
    found = int(torch.tensor(lost).nan_to_num(-torch.inf).argmax())
    generator = torch.Generator().manual_seed(settings.seed)
    twin = unseen.member[torch.randperm(len(unseen.member), generator=generator)]
    split = EvaluatedSplit(loss, points, unseen.tokens, window, reference)
    verdicts: list[Verdict] = []
    for name, vector, member in (("planted", found, unseen.member), ("twin", len(rows) - 1, twin)):
        group = TokenGroup.labelled(name, member, unseen.tokens)
        pair = Hypothesis(name, rows[vector][None], group, basis="control", vectors=(vector,), span=rows)
        verdicts += causal_test(split, [pair], test).rows
    # A vector without movement makes no row: then the chooser has missed the planted one.
    if len(verdicts) < 2:
        raise ValueError(
            f"the chooser must find the planted movement, vector {len(rows) - 1}, it took vector {found}, "
            "which did not move; plant a rule that the model can learn in these steps"
        )
    return Control(verdicts[0], verdicts[1], (found, len(rows) - 1))


def trained_copy(loss: Objective, theta: Tensor, tokens: TokenSet, settings: ControlSettings) -> Tensor:
    """Weights after a few Adam steps on tokens; the module itself is not changed."""
    module: nn.Module = copy.deepcopy(loss.module)
    loss.space.write(module, theta)
    module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    for _ in range(settings.steps):
        rows = torch.randint(0, tokens.sequences, (settings.batch,), generator=generator)
        scored = tokens.scored[rows].to(loss.device)
        optimiser.zero_grad()
        loss.token_loss(module, tokens.inputs[rows].to(loss.device))[scored].mean().backward()
        optimiser.step()
    return loss.space.read(module).to(theta)
