"""The positive control: a movement with a known effect, made by training alone, put through the same test.

A copy of the final model is trained for a few dozen steps on tokens whose targets were changed by a rule.
That movement joins the basis as one more vector. The whole chooser must find it for the planted tokens and
the test must call it selective; the twin, trained as long on targets without a rule, must not be.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
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


#: (tokens, generator, whether targets follow a rule) -> the same tokens with planted targets.
Plant = Callable[[TokenSet, torch.Generator, bool], Planted]


@dataclass(frozen=True)
class ControlSettings:
    """How the planted movement is made.

    Attributes:
        steps: of training.
        learning_rate: of Adam.
        batch: sequences of a step.
        seed: of batches and of the twin's targets.
    """

    steps: int = 60
    learning_rate: float = 1e-3
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
        plant: changes targets by a rule, or without one.
        test: draws and thresholds.
        settings: how the movement is made.
    """
    test, settings = test or TestSettings(), settings or ControlSettings()
    found = [_tested(loss, series, basis, sets, plant, ruled, test, settings) for ruled in (True, False)]
    return Control(found[0][0], found[1][0], found[0][1])


def _tested(
    loss: Objective,
    series: Checkpoints,
    basis: Basis,
    sets: Sequence[TokenSet],
    plant: Plant,
    ruled: bool,
    test: TestSettings,
    settings: ControlSettings,
) -> tuple[Verdict, tuple[int, int]]:
    generator = torch.Generator().manual_seed(settings.seed)
    train, select, unseen = (plant(tokens, generator, ruled) for tokens in sets)
    theta = series[-1]
    moved = trained_copy(loss, theta, train.tokens, settings)
    last = series.steps[-1]
    ends = open_checkpoints({last: theta, last + settings.steps: moved}, loss.space)
    rows = orthonormalise(torch.cat([basis.rows, (moved - theta)[None].to(basis.rows)]))
    chooser = EvaluatedSplit(loss, ends, select.tokens)
    shares = [
        chooser.damage(project_out(chooser, row)).share_by({"planted": select.member})["planted"]
        for row in rows
    ]
    chosen = int(torch.tensor(shares).nan_to_num(-torch.inf).argmax())
    split = EvaluatedSplit(loss, ends, unseen.tokens)
    pair = Hypothesis(
        "planted" if ruled else "twin",
        rows[chosen][None],
        TokenGroup.labelled("planted", unseen.member, unseen.tokens),
        basis="control",
        vectors=(chosen,),
        span=rows,
        why="of all vectors, undoing it costs the planted tokens most on select",
    )
    [verdict] = causal_test(split, [pair], test).rows
    return verdict, (chosen, len(rows) - 1)


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
