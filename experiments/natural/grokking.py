"""Modular addition that groks: a two-layer transformer, p = 97, half of the table, AdamW with decay 1.

Set-up of Power et al. (arXiv 2201.02177) as arXiv 2602.16746 uses it: width 128, 4 heads, MLP 256, batch 512,
learning rate 1e-3, betas .9 and .98, gradient norm clipped at 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from experiments.natural.case import Natural
from experiments.tasks.task import DATA_ORDER, BatchLoss, Task, training_generator
from polca_edit.models import SmallTransformer, TransformerShape, build_small_transformer
from polca_edit.parameters import ParameterSpace
from polca_edit.seeds import generator_for
from polca_edit.tokens import Splits, TokenSet
from polca_edit.training import TrainingSettings

PRIME = 97
SHAPE = TransformerShape(layers=2, d_model=128, heads=4, d_mlp=256, d_vocab=PRIME, n_ctx=2)
BATCH, CLIP = 512, 1.0
#: Share of the table that training shows.
SHARE = 0.5


def settings(steps: int, *, decay: float = 1.0) -> TrainingSettings:
    """Optimisation of the paper."""
    return TrainingSettings(steps, 1e-3, decay, (0.9, 0.98), warmup=0)


def sum_loss(module: nn.Module, inputs: Int[Tensor, "B 3"]) -> Tensor:
    """(B, 1) cross-entropy of (a + b) mod p, nats."""
    logits = module(inputs[:, :2])[:, -1]
    return nn.functional.cross_entropy(logits, inputs[:, 2], reduction="none")[:, None]


@dataclass(frozen=True)
class GrokkingData:
    """The table cut into a half that is shown and one that is not.

    Attributes:
        shown: (n, 3) a, b and their sum.
        hidden: the others.
        seed: of the cut and of the data order.
    """

    shown: Int[Tensor, "n 3"]
    hidden: Int[Tensor, "m 3"]
    seed: int

    def batch_loss(self, module: nn.Module, step: int, branch: int = 0) -> Tensor:
        """Mean loss of one step's batch, nats."""
        drawn = torch.randint(
            0, len(self.shown), (BATCH,), generator=training_generator(self.seed, step, branch)
        )
        return sum_loss(module, self.shown[drawn]).mean()


def grokking_data(seed: int) -> GrokkingData:
    """The table of sums modulo p, dealt by a seed."""
    pairs = torch.cartesian_prod(torch.arange(PRIME), torch.arange(PRIME))
    table = torch.cat([pairs, pairs.sum(1, keepdim=True) % PRIME], dim=1)
    order = torch.randperm(len(table), generator=generator_for(seed, "grokking"))
    cut = int(SHARE * len(table))
    return GrokkingData(table[order[:cut]], table[order[cut:]], seed)


def grokking_module(seed: int) -> SmallTransformer:
    """The model at its first weights."""
    return build_small_transformer(SHAPE, seed)


@torch.no_grad()
def accuracy(module: nn.Module, table: Int[Tensor, "n 3"]) -> float:
    """Share of sums that are right."""
    found = module(table[:, :2])[:, -1].argmax(1) == table[:, 2]
    return float(found.double().mean())


# -- the case ---------------------------------------------------------------------------------------

#: Step at which the shown half is known by heart, and the last one.
BEGIN, LAST = 300, 900
#: Sums of each half in the curvature, select and evaluate splits.
SIZES = (100, 100, 150)


def table_tokens(table: Int[Tensor, "n 3"], shown: Bool[Tensor, " n"]) -> TokenSet:
    """Sums as documents, labelled by the half they are in."""
    features = {"a": table[:, 0], "b": table[:, 1], "sum": table[:, 2], "half": shown.long()}
    return TokenSet(
        table,
        torch.ones(len(table), 1, dtype=torch.bool),
        torch.arange(len(table)),
        {"shown": shown, "hidden": ~shown},
        table[:, 2:].clone(),
        {name: values.numpy() for name, values in features.items()},
    )


def grokking(seed: int, twin: bool) -> Natural:
    """Sums modulo 97; in the twin every pair has a random answer, which no hidden pair follows from.

    Both halves of the table are judged; only the hidden one was never trained on.
    """
    data = grokking_data(seed)
    if twin:
        answers = torch.randint(0, PRIME, (PRIME * PRIME,), generator=generator_for(seed, "random table"))
        cut = len(data.shown)
        shown, hidden = data.shown.clone(), data.hidden.clone()
        shown[:, 2], hidden[:, 2] = answers[:cut], answers[cut:]
        data = GrokkingData(shown, hidden, seed)
    halves = [part.split([*SIZES, len(part) - sum(SIZES)])[:3] for part in (data.shown, data.hidden)]
    # One half after the other would leave the first documents, on which random edits are measured, without
    # the hidden half.
    sets = [
        table_tokens(torch.stack([one, two], 1).flatten(0, 1), torch.arange(2 * len(one)) % 2 == 0)
        for one, two in zip(*halves, strict=True)
    ]
    module = grokking_module(seed)

    def training(branch: int) -> BatchLoss:
        return lambda trained, step: data.batch_loss(trained, step, branch)

    task = Task(
        "grokking",
        module,
        ParameterSpace.from_module(module),
        sum_loss,
        Splits(*sets),
        training,
        {"seed": seed, "rule": DATA_ORDER, "batch_size": BATCH},
        parents=("shown", "hidden"),
    )
    stretches = (0, 75, 150, 225, BEGIN, 450, 650, LAST)
    return Natural(task, settings(LAST), stretches, (BEGIN, LAST), every=50)
