"""Speeds of this machine with a run's own model: one batch of every kind of work, done for real and timed."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.config import RunConfig
from experiments.run.cost.sizes import LARGE, Sizes, Speeds
from experiments.run.machine import resident_bytes
from experiments.tasks.task import BatchLoss, Task
from polca_edit.checkpoints.files import read_weights, write_tensors
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet

#: Directions and, of a large model, sequences that are rehearsed.
FEW_DIRECTIONS, FEW_SEQUENCES = 4, 2
#: A rehearsed piece of work that took this long is not repeated for a steadier time.
ENOUGH_SECONDS = 2.0


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _fastest(work: Callable[[], object], times: int) -> float:
    """Shortest of up to this many tries; one try is enough for work that takes seconds."""
    best = _timed(work)
    for _ in range(times - 1):
        if best > ENOUGH_SECONDS:
            break
        best = min(best, _timed(work))
    return best


def _part(tokens: TokenSet, count: int) -> TokenSet:
    return tokens.select(torch.arange(min(count, tokens.sequences)))


def rehearse(task: Task, config: RunConfig, sizes: Sizes, folder: Path) -> tuple[Speeds, str]:
    """Do one batch of every kind of work and time it; also the route that derivatives took."""
    objective = task.objective(config)
    base = resident_bytes()
    theta = task.space.read(task.module)
    # A large model fills the machine with a few sequences; a small one needs its whole batch for that.
    most = config.batch_size if task.space.size < LARGE else min(config.batch_size, FEW_SEQUENCES)
    select, curvature = _part(task.splits.select, most), _part(task.splits.curvature, most)
    training = 0.0 if task.batch_loss is None else _training_seconds(task.module, task.batch_loss)
    objective.losses(theta, select)
    forward = _fastest(lambda: objective.losses(theta, select), 3) / select.sequences
    rows, setup_slopes, later = _slope_seconds(objective, theta, select, sizes)
    linearise, setup, product = _product_seconds(objective, theta, rows[0], curvature, config, sizes)
    file = folder / "rehearsal.safetensors"
    write = _timed(lambda: write_tensors(file, task.space.unflatten(theta)))
    read = _timed(lambda: task.space.flatten(read_weights(file)))
    file.unlink()
    speeds = Speeds(
        training,
        forward,
        later / select.sequences,
        setup_slopes,
        product / curvature.sequences,
        linearise / curvature.sequences,
        setup,
        read,
        write,
        base,
        objective.batch_bytes / curvature.sequences,
        objective.curvature_route,
    )
    return speeds, objective.route_used or "jvp"


def _slope_seconds(
    objective: Objective, theta: Tensor, tokens: TokenSet, sizes: Sizes
) -> tuple[Tensor, float, float]:
    """(directions used, what the first time costs beyond, all of a checkpoint's directions), seconds.

    Few directions are drawn and the cost of the others follows in proportion, on the route that all of
    them would take.
    """
    few = min(FEW_DIRECTIONS, sizes.rows)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(few, theta.numel(), generator=draw).div_(math.sqrt(theta.numel()))
    planned, asked = sizes.rows * sizes.places, objective.route
    if objective.wants_adjoint(sizes.rows, tokens, planned):
        objective.route = "adjoint"

    def slopes(count: int) -> None:
        try:
            objective.directional(theta, rows[:count], tokens, expected=planned)
        except ValueError:  # the route is not for this model
            objective.route = asked
            objective.directional(theta, rows[:count], tokens, expected=planned)

    first = _timed(lambda: slopes(few))
    several = _fastest(lambda: slopes(few), 2)
    each = 0.0 if few == 1 else max(0.0, several - _fastest(lambda: slopes(1), 2)) / (few - 1)
    objective.route = asked
    return rows, max(0.0, first - several), several + each * (sizes.rows - few)


def _training_seconds(module: nn.Module, batch_loss: BatchLoss, steps: int = 4) -> float:
    """One optimiser step of a copy of the model (the first, which allocates, is not counted)."""
    module = copy.deepcopy(module).train()
    optimiser = torch.optim.AdamW(module.parameters(), foreach=True)

    def step(number: int) -> None:
        optimiser.zero_grad(set_to_none=True)
        batch_loss(module, number).backward()
        optimiser.step()

    step(1)
    return min(_timed(partial(step, number)) for number in range(2, 2 + steps))


def _product_seconds(
    objective: Objective, theta: Tensor, row: Tensor, tokens: TokenSet, config: RunConfig, sizes: Sizes
) -> tuple[float, float, float]:
    """(linearising once more, first time beyond that, one product), seconds for these tokens."""
    wanted = [
        (spec, taken)
        for spec, (kind, _, taken) in zip(config.bases, sizes.bases, strict=True)
        if kind == "hessian"
    ]
    if not wanted:
        return 0.0, 0.0, 0.0
    spec, taken = wanted[0]
    expected = 8 * spec.per_checkpoint * taken
    first = _timed(lambda: objective.hessian(theta, tokens, expected=expected))
    started = time.perf_counter()
    product = objective.hessian(theta, tokens, expected=expected)
    later = time.perf_counter() - started
    return later, max(0.0, first - later), _fastest(lambda: product(row), 2)
