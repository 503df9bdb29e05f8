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
from experiments.run.cost.sizes import Sizes, Speeds
from experiments.run.machine import peak_rss_bytes
from experiments.tasks.task import BatchLoss, Task
from polca_edit.checkpoints.files import read_weights, write_tensors
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet

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
    theta = task.space.read(task.module)
    select = _part(task.splits.select, config.batch_size)
    curvature = _part(task.splits.curvature, config.batch_size)
    training = 0.0 if task.batch_loss is None else _training_seconds(task.module, task.batch_loss)
    objective.losses(theta, select)
    forward = _fastest(lambda: objective.losses(theta, select), 3) / select.sequences
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(sizes.rows, task.space.size, generator=draw) / math.sqrt(task.space.size)
    planned = sizes.rows * sizes.checkpoints

    def slopes() -> object:
        return objective.directional(theta, rows, select, expected=planned)

    first, later = _timed(slopes), _fastest(slopes, 2)
    linearise, setup, product = _product_seconds(objective, theta, rows[0], curvature, config, sizes)
    file = folder / "rehearsal.safetensors"
    write = _timed(lambda: write_tensors(file, task.space.unflatten(theta)))
    read = _timed(lambda: task.space.flatten(read_weights(file)))
    file.unlink()
    speeds = Speeds(
        training,
        forward,
        later / select.sequences,
        max(0.0, first - later),
        product / curvature.sequences,
        linearise / curvature.sequences,
        setup,
        read,
        write,
        peak_rss_bytes(),
    )
    return speeds, objective.route_used or "jvp"


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
