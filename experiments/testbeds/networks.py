"""Testbed T8: two tasks in two blocks of a trained network, and T8' in one shared trunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from experiments.testbeds.base import (
    BedResult,
    BedSettings,
    Check,
    Landscape,
    World,
    assess,
    at_least,
    at_most,
    bed_result,
    holds,
    labelled_pair,
    landscape_split,
    slot_tokens,
    worst,
)
from interventions.blocking import BlockingResult, BranchPoint, Curve, Hold, compare_arms, run_arm
from interventions.edits import project_out, transplant
from polca_edit.derivatives.lanczos import orthonormalise
from polca_edit.parameters import ParameterSpace
from polca_edit.seeds import generator_for
from polca_edit.training import TrainingSettings, train

WIDTH, INPUTS, CLASSES = 16, 10, 4
READ = WIDTH * INPUTS
BLOCK = READ + WIDTH + CLASSES * WIDTH
#: Weights that no loss reads, per weight that one does.
IDLE = 4
TASKS = ("A", "B")


@dataclass(frozen=True)
class Problem:
    """What a small network is trained on.

    Attributes:
        losses: (theta, inputs) -> (B, groups) nats.
        batches: optimiser step -> inputs.
        names: of the groups.
        held_out: inputs on which arms are compared.
        settings: optimisation.
    """

    losses: Callable[[Tensor, Tensor], Tensor]
    batches: Callable[[int], Tensor]
    names: tuple[str, ...]
    held_out: Tensor
    settings: TrainingSettings

    def batch_loss(self, module: nn.Module, step: int) -> Tensor:
        """Mean loss of a step's batch."""
        found: Tensor = module(self.batches(step))
        return found.mean()

    def measure(self, module: nn.Module) -> Mapping[str, float]:
        """Mean loss of every group on the held-out inputs."""
        with torch.no_grad():
            found = module(self.held_out).mean(0)
        return dict(zip(self.names, found.tolist(), strict=True))


@dataclass(frozen=True)
class TrainedPath:
    """Weights of a small network over training.

    Attributes:
        problem: what it was trained on.
        thetas: every few steps, the start first.
        every: how many steps lie between them.
    """

    problem: Problem
    thetas: tuple[Tensor, ...]
    every: int

    def arm(self, name: str, seed: int, held: Tensor | None = None, rows: Tensor | None = None) -> Curve:
        """The same training again from the first step, with coordinates or directions held, or neither."""
        module = Landscape(self.thetas[0], self.problem.losses)
        space = ParameterSpace.from_module(module)
        hold = None
        if held is not None or rows is not None:
            hold = Hold(space, self.thetas[0], mask=held, rows=rows)
        settings = self.problem.settings
        return run_arm(
            module,
            space,
            self.problem.batch_loss,
            settings,
            BranchPoint(0, self.thetas[0], {}),
            settings.steps,
            self.problem.measure,
            arm=name,
            branch=seed,
            hold=hold,
            every=self.every,
        )


def train_path(problem: Problem, start: Float[Tensor, " N"], *, every: int) -> TrainedPath:
    """Train a landscape with AdamW and keep its weights every few steps."""
    module = Landscape(start, problem.losses)
    space = ParameterSpace.from_module(module)
    thetas = [start.clone()]

    def keep(step: int, trained: nn.Module, _: torch.optim.Optimizer) -> None:
        if step % every == 0:
            thetas.append(space.read(trained).clone())

    train(module, problem.batch_loss, problem.settings, after_step=keep)
    return TrainedPath(problem, tuple(thetas), every)


def block_rows(thetas: Sequence[Tensor], blocks: Sequence[slice], further: int) -> Float[Tensor, "K N"]:
    """Every block's unit net displacement, then ``further`` more directions of its path per block."""
    net: list[Tensor] = []
    more: list[Tensor] = []
    for block in blocks:
        path = torch.stack([t[block] - thetas[0][block] for t in thetas[1:]])
        leading = torch.linalg.svd(path, full_matrices=False)[2][: further + 2]
        for index, part in enumerate(orthonormalise(torch.cat([path[-1:], leading]))[: further + 1]):
            row = torch.zeros_like(thetas[0])
            row[block] = part
            (net if index == 0 else more).append(row)
    return torch.stack(net + more)


def block_logits(theta: Tensor, x: Tensor, block: slice) -> Tensor:
    """(B, CLASSES) logits of one two-layer block."""
    part = theta[block]
    first, bias, readout = part[:READ], part[READ : READ + WIDTH], part[-CLASSES * WIDTH :]
    return torch.tanh(x @ first.view(WIDTH, INPUTS).T + bias) @ readout.view(CLASSES, WIDTH).T


def task_data(count: int, generator: torch.Generator, teachers: Tensor) -> Tensor:
    """(count, INPUTS + 2): inputs and the class of either task, by fixed teachers."""
    x = torch.randn(count, INPUTS, generator=generator, dtype=torch.float64)
    labels = torch.stack([(x @ teacher.T).argmax(1) for teacher in teachers], dim=1)
    return torch.cat([x, labels.double()], dim=1)


def _cross_entropies(logits: Sequence[Tensor], inputs: Tensor) -> Tensor:
    parts = []
    for task, values in enumerate(logits):
        labels = inputs[:, INPUTS + task].long()
        parts.append(-values.log_softmax(1).gather(1, labels[:, None])[:, 0])
    return torch.stack(parts, dim=1)


BLOCKS = (slice(0, BLOCK), slice(BLOCK, 2 * BLOCK))


def two_block_losses(theta: Tensor, inputs: Tensor) -> Tensor:
    """Task A reads block A, task B reads block B."""
    x = inputs[:, :INPUTS]
    return _cross_entropies([block_logits(theta, x, block) for block in BLOCKS], inputs)


def shared_losses(theta: Tensor, inputs: Tensor) -> Tensor:
    """Both tasks read one trunk; each has its own readout (the trunk comes first)."""
    hidden = torch.tanh(inputs[:, :INPUTS] @ theta[:READ].view(WIDTH, INPUTS).T)
    heads = theta[READ : READ + 2 * CLASSES * WIDTH].view(2, CLASSES, WIDTH)
    return _cross_entropies([hidden @ heads[0].T, hidden @ heads[1].T], inputs)


def two_task_path(seed: int, *, shared: bool) -> tuple[TrainedPath, Tensor]:
    """A trained two-task network and its teachers; readouts start at zero in blocks."""
    g = generator_for(seed, "T8", int(shared))
    teachers = torch.randn(2, CLASSES, INPUTS, generator=g, dtype=torch.float64)
    data, held_out = task_data(512, g, teachers), task_data(200, g, teachers)
    read = READ + 2 * CLASSES * WIDTH if shared else 2 * BLOCK
    start = torch.zeros((1 + IDLE) * read, dtype=torch.float64)
    for first in [0] if shared else [block.start for block in BLOCKS]:
        drawn = torch.randn(READ, generator=g, dtype=torch.float64)
        start[first : first + READ] = drawn / math.sqrt(INPUTS)
    if shared:  # a trunk has no gradient behind a zero readout
        start[READ:read] = torch.randn(read - READ, generator=g, dtype=torch.float64) / 4
    losses = shared_losses if shared else two_block_losses
    settings = TrainingSettings(150, 0.02, 0.01, (0.9, 0.95), warmup=0)
    problem = Problem(losses, lambda step: data, TASKS, held_out, settings)
    return train_path(problem, start, every=10), teachers


@dataclass(frozen=True)
class TwoTasks:
    """One run of T8: the world and the path it was trained along."""

    world: World
    path: TrainedPath


def two_task_run(seed: int, *, shared: bool) -> TwoTasks:
    """T8 (two blocks) or T8' (one trunk)."""
    path, teachers = two_task_path(seed, shared=shared)
    blocks = [slice(0, READ), slice(READ, READ + 2 * CLASSES * WIDTH)] if shared else BLOCKS
    span = block_rows(path.thetas, blocks, 4)
    unseen = task_data(120, generator_for(seed, "T8 unseen", int(shared)), teachers)
    split = landscape_split(path.problem.losses, path.thetas, slot_tokens(TASKS, unseen))
    if shared:
        pairs = [labelled_pair("shared trunk", span, (0,), "A")]
    else:
        pairs = [labelled_pair(task, span, (k,), task) for k, task in enumerate(TASKS)]
        pairs.append(labelled_pair("A, block set", span, (0, 2, 3, 4, 5), "A"))
    return TwoTasks(World(split, tuple(pairs), split.tokens.skills), path)


def blocked_arms(runs: Sequence[TwoTasks]) -> tuple[BlockingResult, list[list[Curve]]]:
    """Free, blocked (all coordinates of block A) and sham (all of block B) arms of every run."""
    arms: list[list[Curve]] = [[], [], []]
    for seed, run in enumerate(runs):
        for index, (name, part) in enumerate((("none", None), ("block", BLOCKS[0]), ("sham", BLOCKS[1]))):
            mask = None
            if part is not None:
                mask = torch.zeros(len(run.path.thetas[0]), dtype=torch.bool)
                mask[part] = True
            arms[index].append(run.path.arm(name, seed, mask))
    free, blocked, shams = arms
    return compare_arms(free, blocked, [[s] for s in shams], "A", ["B"], margin=0.01), arms


def _block_checks(run: TwoTasks) -> list[Check]:
    """Exact facts of one run: undoing A's displacement is A's initial weights, and nothing of B's."""
    split, pair = run.world.split, run.world.pairs[0]
    edited = project_out(split, pair.rows).apply(split.theta)
    x, group = split.tokens.inputs[:, :INPUTS], split.tokens.skills["A"]
    a, b = BLOCKS
    same = torch.equal(block_logits(edited, x, b), block_logits(split.theta, x, b))
    back = block_logits(edited, x, a) - block_logits(split.movement.start, x, a)
    lost = split.loss.losses(edited, split.tokens)[group].mean()
    inserted = transplant(split, pair.rows).apply(split.movement.start)
    restored = split.loss.losses(inserted, split.tokens)[group].mean() - split.before[group].mean()
    single = run.path.arm("direction of A", 0, rows=pair.rows)
    return [
        holds("B logits identical bit for bit", same),
        at_most("|A logits - initial|", worst(back), 1e-10),
        at_most("|L_A - ln K|", abs(float(lost) - math.log(CLASSES)), 1e-9),
        at_most("|L_A restored by insertion - final|", abs(float(restored)), 1e-6),
        holds("a held direction stays put", single.held),
    ]


def _arm_checks(runs: Sequence[TwoTasks]) -> list[Check]:
    """D for the set: without block A task A is not learned, beyond what a sham does; B never notices."""
    result, (free, blocked, _) = blocked_arms(runs)
    level = worst([float(np.abs(arm.losses["A"] - math.log(CLASSES)).max()) for arm in blocked])
    same = [np.array_equal(f.losses["B"], b.losses["B"]) for f, b in zip(free, blocked, strict=True)]
    return [
        holds("blocking block A leaves B's curve bit for bit", all(same)),
        at_most("|L_A - ln K| throughout", level, 1e-9),
        holds("every block held", result.held),
        at_least("D: lower bound of the gap beyond shams", result.gap.low, 0.0),
        at_least("D: lower bound of the delay beyond shams", result.delay.low, 0.0),
    ]


def bed_t8(settings: BedSettings) -> list[BedResult]:
    """T8: two blocks, and T8' with a shared trunk."""
    runs = [two_task_run(seed, shared=False) for seed in range(settings.seeds)]
    found = assess(lambda seed: runs[seed].world, settings)
    trunk = assess(lambda seed: two_task_run(seed, shared=True).world, settings)["shared trunk"]
    shares = [trunk.pooled.share.estimate, float(np.mean([r.others["B"].share for r in trunk.pooled.runs]))]
    near = abs(shares[0] - shares[1]) <= 0.2 * max(map(abs, shares)) or min(shares) >= 0.3
    return [
        bed_result("T8", found["A"], "carrier", _block_checks(runs[0]), gate="always"),
        bed_result("T8", found["B"], "carrier", gate="always"),
        bed_result("T8", found["A, block set"], "carrier", _arm_checks(runs), gate="always"),
        bed_result("T8'", trunk, "shared", [holds("n_A and n_B alike", near)], gate="never"),
    ]
