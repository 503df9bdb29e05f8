"""Speeds of this machine with a run's own kind of model: every kind of work done for real and timed.

Each kind is timed on two batches of different size, after a call that traces, allocates and warms up and
is counted apart: what is done once must not be charged to every sequence of a run.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.config import BasisConfig, RunConfig
from experiments.run.cost.rates import Rate, Speeds
from experiments.run.cost.sizes import BasisSize, Sizes, curvature_work, expected_products
from experiments.run.machine import resident_bytes
from experiments.run.memory.budget import memory_shares
from experiments.tasks.task import BatchLoss, Task
from polca_edit.basis.hessian import in_fewer_bits
from polca_edit.checkpoints.files import read_weights, write_tensors
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet

#: Directions that are rehearsed; the cost of the others follows in proportion.
FEW_DIRECTIONS = 4
#: Seconds that the rehearsed work along one direction may take about, by which its batch is chosen.
ENOUGH_SECONDS = 0.5
#: Forward passes that a Hessian product costs about, for that choice.
PASSES_OF_A_PRODUCT = 6
#: Entries of the vector by which memory speed is measured: more than any cache holds.
VECTOR = 1 << 23


#: Seconds so far. A study on a machine that others use puts processor seconds here.
clock: Callable[[], float] = time.perf_counter


def _timed(work: Callable[[], object]) -> float:
    started = clock()
    work()
    return clock() - started


def _fastest(work: Callable[[], object], times: int) -> float:
    """Shortest of up to this many tries; one try is enough for work that takes seconds."""
    best = _timed(work)
    for _ in range(times - 1):
        if best > 4 * ENOUGH_SECONDS:
            break
        best = min(best, _timed(work))
    return best


def _part(tokens: TokenSet, count: int) -> TokenSet:
    return tokens.select(torch.arange(min(count, tokens.sequences)))


def rehearse(
    task: Task, config: RunConfig, sizes: Sizes, folder: Path, activations: float = 1.0
) -> tuple[Speeds, str]:
    """Do batches of every kind of work and time them; also the route that derivatives took.

    Args:
        task: of the run, or around a model that stands in for its own.
        config: the run.
        sizes: of the run, by which routes are chosen.
        folder: where a file is written and read.
        activations: numbers that the run's own model holds a sequence over those of the task's.
    """
    objective = task.objective(config)
    # Compiling takes minutes, which is no rehearsal; a plan says so.
    objective.compiled = False
    base = resident_bytes()
    theta = task.space.read(task.module)
    training = 0.0 if task.batch_loss is None else _training_seconds(task.module, task.batch_loss)
    select, curvature = task.splits.select, task.splits.curvature
    most = _affordable(objective, theta, select, config.batch_size)
    forward = _line(select, most, lambda some: _forward_seconds(objective, theta, some))
    few = min(FEW_DIRECTIONS, sizes.rows)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(few, theta.numel(), generator=draw).div_(math.sqrt(theta.numel()))
    slopes = _Slopes(objective, theta, rows, sizes)
    start = _line(select, most, lambda some: slopes.seconds(some)[0])
    row = _line(select, most, lambda some: slopes.seconds(some)[1])
    route = objective.route_used or "jvp"
    wanted = _first_hessian(config, sizes)
    held_of_one = objective.curvature_work(theta, curvature).sequence_bytes if wanted else 0.0
    work = curvature_work(sizes, held_of_one * activations, memory_shares(config, sizes.parameters).curvature)
    expected = work.passes(expected_products(*wanted)) if wanted else None
    # What is rehearsed stays linearised whole; what of the run does is reckoned from its sizes.
    objective.curvature_budget = sys.maxsize
    products = _Products(objective, theta, rows[0], expected, config.sought_coarsely)
    linearise, product, held = (
        _line(curvature, most, lambda some, part=part: products.cost(some)[part])  # type: ignore[misc]
        for part in range(3)
    )
    read, write = _file_seconds(task, theta, folder / "rehearsal.safetensors")
    one, other = torch.ones(VECTOR, dtype=theta.dtype), torch.ones(VECTOR, dtype=theta.dtype)
    vector = _fastest(lambda: one.add_(other, alpha=0.5), 4) * theta.numel() / VECTOR
    speeds = Speeds(
        training,
        forward,
        start,
        row,
        product,
        linearise,
        slopes.setup,
        products.setup,
        read,
        write,
        vector,
        base,
        held,
        held_of_one,
        objective.curvature_route,
    )
    return speeds, route


def _affordable(objective: Objective, theta: Tensor, tokens: TokenSet, batch: int) -> int:
    """Sequences of a batch whose Hessian product takes about :data:`ENOUGH_SECONDS`."""
    few = _part(tokens, 2)
    objective.losses(theta, few)
    seconds = _fastest(lambda: objective.losses(theta, few), 3) / few.sequences
    return max(2, min(batch, math.floor(ENOUGH_SECONDS / (PASSES_OF_A_PRODUCT * seconds))))


def _line(tokens: TokenSet, most: int, cost: Callable[[TokenSet], float]) -> Rate:
    """The rate through a batch of ``most`` sequences and one of a quarter."""
    large = _part(tokens, most)
    small = _part(tokens, max(1, large.sequences // 4))
    return Rate.through((small.sequences, cost(small)), (large.sequences, cost(large)))


def _file_seconds(task: Task, theta: Tensor, file: Path) -> tuple[float, float]:
    """Reading and writing one checkpoint."""
    write = _timed(lambda: write_tensors(file, task.space.unflatten(theta)))
    read = _timed(lambda: task.space.flatten(read_weights(file)))
    file.unlink()
    return read, write


def _forward_seconds(objective: Objective, theta: Tensor, tokens: TokenSet) -> float:
    objective.losses(theta, tokens)
    return _fastest(lambda: objective.losses(theta, tokens), 3)


@dataclass
class _Slopes:
    """Seconds of a batch's slopes: before any direction, and of every direction."""

    objective: Objective
    theta: Tensor
    rows: Tensor
    sizes: Sizes
    setup: float = 0.0

    def __post_init__(self) -> None:
        self.known: dict[int, tuple[float, float]] = {}

    def seconds(self, tokens: TokenSet) -> tuple[float, float]:
        """(before any direction, of each) on the route that all directions would take."""
        if tokens.sequences not in self.known:
            few = len(self.rows)
            first = _timed(lambda: self._take(few, tokens))
            several = _fastest(lambda: self._take(few, tokens), 2)
            one = several if few == 1 else _fastest(lambda: self._take(1, tokens), 2)
            each = several if few == 1 else max(0.0, several - one) / (few - 1)
            self.setup = max(self.setup, first - several)
            self.known[tokens.sequences] = max(0.0, several - few * each), each
        return self.known[tokens.sequences]

    def _take(self, count: int, tokens: TokenSet) -> None:
        planned, asked = self.sizes.rows * self.sizes.places, self.objective.route
        if self.objective.wants_adjoint(self.sizes.rows, tokens, planned):
            self.objective.route = "adjoint"
        try:
            self.objective.directional(self.theta, self.rows[:count], tokens, expected=planned)
        except ValueError:  # the route is not for this model
            self.objective.route = asked
            self.objective.directional(self.theta, self.rows[:count], tokens, expected=planned)
        finally:
            self.objective.route = asked


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


def _first_hessian(config: RunConfig, sizes: Sizes) -> tuple[BasisConfig, BasisSize] | None:
    """The first basis whose products with a Hessian are to be reckoned."""
    pairs = zip(config.bases, sizes.bases, strict=True)
    return next((pair for pair in pairs if pair[1].kind == "hessian"), None)


@dataclass
class _Products:
    """Seconds of a batch's linearisation and product, and what the former holds."""

    objective: Objective
    theta: Tensor
    row: Tensor
    expected: int | None
    coarse: bool = False
    setup: float = 0.0

    def __post_init__(self) -> None:
        self.known: dict[int, tuple[float, float, float]] = {}

    def cost(self, tokens: TokenSet) -> tuple[float, float, float]:
        """(linearising once more, one product, bytes held); nothing where no product is wanted."""
        if self.expected is None:
            return 0.0, 0.0, 0.0
        if tokens.sequences not in self.known:
            expected = self.expected
            first = _timed(lambda: self.objective.hessian(self.theta, tokens, expected=expected))
            later = _timed(lambda: self.objective.hessian(self.theta, tokens, expected=expected))
            product = self.objective.hessian(self.theta, tokens, expected=expected)
            cold = _timed(lambda: product(self.row))
            usual = in_fewer_bits(product) if self.coarse else product
            warm = _fastest(lambda: usual(self.row), 2)
            self.setup = max(self.setup, max(0.0, first - later) + max(0.0, cold - warm))
            self.known[tokens.sequences] = later, warm, float(self.objective.batch_bytes)
        return self.known[tokens.sequences]
