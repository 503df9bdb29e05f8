"""Testbed T9: sparse parities in disjoint hidden units (tasks of ejmichaud/quantization-model)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

from experiments.testbeds.base import (
    Assessed,
    BedResult,
    BedSettings,
    Check,
    World,
    assess,
    at_least,
    at_most,
    bed_result,
    between,
    holds,
    labelled_pair,
    landscape_split,
    slot_tokens,
    worst,
)
from experiments.testbeds.networks import Problem, TrainedPath, block_rows, train_path
from interventions.edits import project_out
from polca_edit.allocation.allocate import allocate, project
from polca_edit.basis.record import unlabelled
from polca_edit.clusters.hypotheses import Hypothesis, TokenGroup
from polca_edit.seeds import generator_for
from polca_edit.training import TrainingSettings

BITS, TASKS, UNITS, SUBSET = 20, 6, 48, 3
BLOCK = UNITS * BITS + 2 * UNITS
READ = TASKS * BLOCK
#: Weights that no loss reads, beside those that one does.
IDLE = 2 * READ
STEPS, CHECKPOINTS = 450, 15
NAMES = tuple(f"task{i}" for i in range(TASKS))
BLOCKS = tuple(slice(i * BLOCK, (i + 1) * BLOCK) for i in range(TASKS))


def parity_logits(theta: Tensor, x: Tensor) -> Tensor:
    """(B, TASKS) logits; task i reads its own block of hidden units."""
    part = theta[:READ].view(TASKS, BLOCK)
    first = part[:, : UNITS * BITS].reshape(TASKS, UNITS, BITS)
    bias = part[:, UNITS * BITS : UNITS * (BITS + 1)]
    readout = part[:, UNITS * (BITS + 1) :]
    hidden = torch.relu(torch.einsum("tub,nb->ntu", first, x) + bias)
    return torch.einsum("ntu,tu->nt", hidden, readout)


def parity_losses(theta: Tensor, inputs: Tensor) -> Tensor:
    """(B, TASKS) logistic losses."""
    return nn.functional.softplus(-inputs[:, BITS:] * parity_logits(theta, inputs[:, :BITS]))


def parity_data(count: int, generator: torch.Generator, subsets: Tensor) -> Tensor:
    """(count, BITS + TASKS): bits as +-1 and the parity of every task's three bits as +-1."""
    x = torch.randint(0, 2, (count, BITS), generator=generator) * 2.0 - 1.0
    parity = torch.stack([x[:, subset].prod(1) for subset in subsets], dim=1)
    return torch.cat([x, parity], dim=1)


@dataclass(frozen=True)
class ParityRun:
    """One trained network: its path and the bits that every task reads."""

    seed: int
    path: TrainedPath
    subsets: Tensor

    def data(self, count: int, purpose: str) -> Tensor:
        """Inputs for a purpose, the same at every call."""
        return parity_data(count, generator_for(self.seed, "T9", purpose), self.subsets)

    def world(self, *, mixed: bool) -> World:
        """True blocks as rows, or two of them mixed at 45 degrees; either way also both together."""
        span = block_rows(self.path.thetas, BLOCKS, 1)
        if mixed:
            first, second = span[0].clone(), span[1].clone()
            span[0], span[1] = (first + second) / math.sqrt(2), (first - second) / math.sqrt(2)
        split = landscape_split(parity_losses, self.path.thetas, slot_tokens(NAMES, self.data(60, "unseen")))
        if not mixed:
            pairs = [labelled_pair(NAMES[i], span, (i,), NAMES[i]) for i in (0, 3)]
            return World(split, tuple(pairs), split.tokens.skills)
        both = split.tokens.skills["task0"] | split.tokens.skills["task1"]
        group = TokenGroup.labelled("task0 and task1", both, split.tokens)
        pairs = [
            labelled_pair("mixed at 45 degrees", span, (0,), "task0"),
            Hypothesis("both mixed rows", span[:2], group, "own", "planted", (0, 1), span=span),
        ]
        return World(split, tuple(pairs), split.tokens.skills)


def parity_run(seed: int) -> ParityRun:
    """Train all blocks; task i has weight 1 / (i + 1), which an elementwise optimiser only rescales."""
    g = generator_for(seed, "T9")
    subsets = torch.stack([torch.randperm(BITS, generator=g)[:SUBSET] for _ in range(TASKS)])
    start = torch.zeros(READ + IDLE)
    drawn = torch.randn(TASKS, UNITS * BITS, generator=g) / math.sqrt(BITS)
    start[:READ].view(TASKS, BLOCK)[:, : UNITS * BITS] = drawn
    frequency = 1.0 / torch.arange(1, TASKS + 1)
    problem = Problem(
        lambda theta, inputs: parity_losses(theta, inputs) * frequency,
        lambda step: parity_data(256, generator_for(seed, "T9 batch", step), subsets),
        NAMES,
        parity_data(500, generator_for(seed, "T9 held out"), subsets),
        TrainingSettings(STEPS, 0.01, 0.0, (0.9, 0.95), warmup=0),
    )
    return ParityRun(seed, train_path(problem, start, every=STEPS // CHECKPOINTS), subsets)


def _task_checks(task: int, runs: list[ParityRun], found: Assessed) -> list[Check]:
    """What undoing a task's block does on fresh samples, over all runs."""
    before: list[float] = []
    after: list[float] = []
    loss: list[float] = []
    others: list[float] = []
    for run, world in zip(runs, found.worlds, strict=True):
        data, split = run.data(4000, "fresh"), world.split
        pair = next(p for p in world.pairs if p.name == NAMES[task])
        edited = project_out(split, pair.rows).apply(split.theta)
        with torch.no_grad():
            right = data[:, BITS + task] > 0
            for theta, kept in ((split.theta, before), (edited, after)):
                said = parity_logits(theta, data[:, :BITS])[:, task] > 0
                kept.append(float((said == right).double().mean()))
            lost = parity_losses(edited, data)
            change = (lost - parity_losses(split.theta, data)).abs().max(0).values
        loss.append(float(lost[:, task].mean()))
        others.append(float(np.delete(change.numpy(), task).max()))
    return [
        at_least("trained: smallest accuracy over runs", min(before), 0.99),
        between("accuracy without it, farthest from .5", max(after, key=lambda v: abs(v - 0.5)), 0.47, 0.53),
        at_most("|loss without it - ln 2|", worst(np.array(loss) - math.log(2)), 0.01),
        at_most("other tasks' change", max(others), 1e-6),
    ]


def _blocking_checks(run: ParityRun) -> list[Check]:
    """One run trained again with all coordinates of block 0 held."""
    mask = torch.zeros(READ + IDLE, dtype=torch.bool)
    mask[BLOCKS[0]] = True
    free, blocked = run.path.arm("none", 0), run.path.arm("block", 0, mask)
    same = [np.array_equal(free.losses[name], blocked.losses[name]) for name in NAMES[1:]]
    return [
        at_most("|blocked task - ln 2| throughout", worst(blocked.losses["task0"] - math.log(2)), 0.02),
        holds("other tasks' curves bit for bit", all(same)),
    ]


def _recovery(world: World) -> float:
    """Agreement of 'along which block did the loss fall most' with the task of each token.

    As in the paper's pipeline, tokens whose projected loss rises along every block are left out.
    """
    split = world.split
    rows = world.pairs[0].span
    assert rows is not None
    basis = unlabelled("planted", rows[:TASKS])
    found = allocate(project(split.loss, split.series, [basis], split.tokens)[0])
    attributed = found.values.sum(0).numpy()
    kept = attributed.min(0) < 0
    return float(adjusted_rand_score(split.tokens.position_of.numpy()[kept], attributed.argmin(0)[kept]))


def bed_t9(settings: BedSettings) -> list[BedResult]:
    """T9: parities whose blocks are known, true and mixed."""
    runs = [parity_run(seed) for seed in range(settings.seeds)]
    found = assess(lambda seed: runs[seed].world(mixed=False), settings)
    mixed = assess(lambda seed: runs[seed].world(mixed=True), settings)
    results = []
    for task in (0, 3):
        checks = _task_checks(task, runs, found)
        if task == 0:
            recovered = at_least("ARI of tasks from attributions", _recovery(found.worlds[0]), 0.9)
            checks += [*_blocking_checks(runs[0]), recovered]
        results.append(bed_result("T9", found[NAMES[task]], "carrier", checks, gate="always"))
    world = mixed.worlds[0]
    edit = project_out(world.split, world.pairs[1].rows)
    lost = world.split.loss.losses(edit.apply(world.split.theta), world.split.tokens)
    apart = [float(lost[world.split.tokens.skills[name]].mean()) - math.log(2) for name in NAMES[:2]]
    return [
        *results,
        bed_result("T9", mixed["mixed at 45 degrees"], "shared", gate="never"),
        bed_result(
            "T9",
            mixed["both mixed rows"],
            "carrier",
            [at_most("|loss of both without them - ln 2|", worst(np.array(apart)), 0.01)],
            gate="always",
        ),
    ]
