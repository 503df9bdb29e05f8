"""Sparse parities of trained networks: disjoint units with a mixing ladder, a shared trunk, and a composite.

Tasks of the quantization model (Michaud et al., arXiv 2303.13506); the composite of arXiv 2505.15811.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experiments.natural.case import Natural
from experiments.tasks.task import DATA_ORDER, BatchLoss, Task
from experiments.testbeds.base import Landscape, landscape_loss, slot_tokens
from experiments.testbeds.networks import block_rows
from experiments.testbeds.parity import (
    BITS,
    BLOCKS,
    IDLE,
    NAMES,
    READ,
    SUBSET,
    TASKS,
    UNITS,
    parity_data,
    parity_losses,
)
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import orthonormalise
from polca_edit.parameters import ParameterSpace
from polca_edit.seeds import generator_for
from polca_edit.tokens import Splits, TokenSet
from polca_edit.training import TrainingSettings

STEPS, BATCH = 390, 256
#: Samples of the curvature, select and evaluate splits.
SIZES = (60, 100, 150)
TRUNK = 192
#: Losses of a landscape: (theta, inputs) -> (B, tasks).
Losses = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Samples:
    """Random bits and their parities.

    Attributes:
        draw: (count, generator) -> inputs.
        losses: of the network.
        names: of the scored slots.
        weights: step -> weight of every slot in training.
        seed: of the run.
    """

    draw: Callable[[int, torch.Generator], Tensor]
    losses: Losses
    names: tuple[str, ...]
    weights: Callable[[int], Tensor]
    seed: int

    def batch_loss(self, module: nn.Module, step: int, branch: int = 0) -> Tensor:
        """Mean weighted loss of one step's batch; samples are drawn anew and meet no split but by chance."""
        inputs = self.draw(BATCH, generator_for(self.seed, "batch", branch, step))
        found: Tensor = module(inputs) * self.weights(step)
        return found.mean()

    def tokens(self, count: int, purpose: str) -> TokenSet:
        """Samples of one split, each a document with one scored slot a task."""
        inputs = self.draw(count, generator_for(self.seed, "split", purpose))
        made = slot_tokens(self.names, inputs)
        bits = {
            f"bit {i}": (inputs[:, i][made.sequence_of] > 0).long().numpy()
            for i in range(inputs.shape[1] - len(self.names))
        }
        return replace(made, features={"task": made.position_of.numpy(), **bits})

    def task(self, name: str, start: Float[Tensor, " N"]) -> Task:
        """The task of one run."""
        module = Landscape(start, self.losses)
        parts = ("curvature", "select", "evaluate")
        splits = Splits(*(self.tokens(n, p) for n, p in zip(SIZES, parts, strict=True)))

        def training(branch: int) -> BatchLoss:
            return lambda trained, step: self.batch_loss(trained, step, branch)

        return Task(
            name,
            module,
            ParameterSpace.from_module(module),
            landscape_loss,
            splits,
            training,
            {"seed": self.seed, "rule": DATA_ORDER, "batch_size": BATCH},
            parents=self.names,
        )


def all_thetas(series: Checkpoints) -> list[Tensor]:
    """Every recorded weight vector."""
    return [series[i].clone() for i in range(len(series))]


# -- disjoint units and a shared trunk --------------------------------------------------------------


def trunk_losses(theta: Tensor, inputs: Tensor) -> Tensor:
    """(B, TASKS) logistic losses of six readouts of one trunk."""
    cut = TRUNK * BITS
    first, bias = theta[:cut].view(TRUNK, BITS), theta[cut : cut + TRUNK]
    readout = theta[cut + TRUNK : cut + (1 + TASKS) * TRUNK].view(TASKS, TRUNK)
    logits = torch.relu(inputs[:, :BITS] @ first.T + bias) @ readout.T
    return nn.functional.softplus(-inputs[:, BITS:] * logits)


def trunk_rows(series: Checkpoints) -> Float[Tensor, "K N"]:
    """The trunk's net movement, then the leading directions of its path; readouts are left alone."""
    size = TRUNK * (BITS + 1)
    path = torch.stack([theta - series[0] for theta in all_thetas(series)[1:]])
    path[:, size:] = 0
    leading = torch.linalg.svd(path, full_matrices=False)[2][:8]
    return orthonormalise(torch.cat([path[-1:], leading]))[:8]


def disjoint_rows(series: Checkpoints) -> Float[Tensor, "K N"]:
    """Every block's net movement, then one more direction of its path per block."""
    return block_rows(all_thetas(series), BLOCKS, 1)


def sparse_parity(seed: int, twin: bool) -> Natural:
    """Six parities of three bits: in blocks of their own units, or all through one trunk (twin)."""
    g = generator_for(seed, "parity", int(twin))
    subsets = torch.stack([torch.randperm(BITS, generator=g)[:SUBSET] for _ in range(TASKS)])
    if twin:
        start = torch.zeros(3 * TRUNK * (1 + BITS + TASKS))
        start[: TRUNK * BITS] = torch.randn(TRUNK * BITS, generator=g) / math.sqrt(BITS)
    else:
        start = torch.zeros(READ + IDLE)
        drawn = torch.randn(TASKS, UNITS * BITS, generator=g) / math.sqrt(BITS)
        start[:READ].view(TASKS, -1)[:, : UNITS * BITS] = drawn
    samples = Samples(
        lambda count, generator: parity_data(count, generator, subsets),
        trunk_losses if twin else parity_losses,
        NAMES,
        lambda step: torch.ones(TASKS),
        seed,
    )
    mixed = () if twin else tuple((i, i + 1) for i in range(0, TASKS, 2))
    settings = TrainingSettings(STEPS, 0.01, 0.0, (0.9, 0.95), warmup=0)
    return Natural(
        samples.task("sparse_parity", start),
        settings,
        (0, STEPS),
        (0, STEPS),
        every=STEPS // 15,
        rows=trunk_rows if twin else disjoint_rows,
        mixed=mixed,
    )


# -- a composite of two atoms -----------------------------------------------------------------------

WIDTH, DEEP, ATOM_BITS = 64, 64, 12
ATOMS = ("first", "second", "composite")
#: Last steps of three phases: the second atom; the first atom; the composite.
CUTS = (400, 900, 1250)


def composite_losses(theta: Tensor, inputs: Tensor) -> Tensor:
    """(B, 3) logistic losses: atoms read the first hidden layer, their product the second one."""
    first, bias, atoms, second, low, top = theta[:COMPOSITE_SIZE].split(COMPOSITE_SPLIT)
    hidden = torch.relu(inputs[:, :ATOM_BITS] @ first.view(WIDTH, ATOM_BITS).T + bias)
    deep = torch.relu(hidden @ second.view(DEEP, WIDTH).T + low)
    logits = torch.cat([hidden @ atoms.view(2, WIDTH).T, (deep @ top)[:, None]], dim=1)
    return nn.functional.softplus(-inputs[:, ATOM_BITS:] * logits)


COMPOSITE_SPLIT = [WIDTH * ATOM_BITS, WIDTH, 2 * WIDTH, DEEP * WIDTH, DEEP, DEEP]
COMPOSITE_SIZE = sum(COMPOSITE_SPLIT)


def composite_data(count: int, generator: torch.Generator) -> Tensor:
    """(count, 15): bits as +-1, the parities of bits 0-2 and 3-5, and their product."""
    x = torch.randint(0, 2, (count, ATOM_BITS), generator=generator) * 2.0 - 1.0
    first, second = x[:, :3].prod(1), x[:, 3:6].prod(1)
    return torch.cat([x, torch.stack([first, second, first * second], dim=1)], dim=1)


def composite_parity(seed: int, twin: bool) -> Natural:
    """The second atom, then the first (never in the twin), then their product with replay."""
    g = generator_for(seed, "composite", int(twin))
    start = torch.zeros(3 * COMPOSITE_SIZE)
    parts = start[:COMPOSITE_SIZE].split(COMPOSITE_SPLIT)
    parts[0].copy_(torch.randn(len(parts[0]), generator=g) / math.sqrt(ATOM_BITS))
    parts[3].copy_(torch.randn(len(parts[3]), generator=g) / math.sqrt(WIDTH))
    shown = 0.0 if twin else 1.0

    def weights(step: int) -> Tensor:
        return torch.tensor([shown * (step > CUTS[0]), 1.0, 1.0 * (step > CUTS[1])])

    samples = Samples(composite_data, composite_losses, ATOMS, weights, seed)
    settings = TrainingSettings(CUTS[-1], 5e-3, 0.0, (0.9, 0.95), warmup=0)
    stretches = (0, 130, 260, *CUTS, 650, 1050)
    return Natural(
        samples.task("composite_parity", start), settings, stretches, (CUTS[0], CUTS[1]), every=100
    )
