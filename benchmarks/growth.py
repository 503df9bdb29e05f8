"""How time grows with tokens, vectors, checkpoints and parameters; error against float64; peak memory."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.comparisons import arithmetic_shape
from benchmarks.problems import Problem, trained_arithmetic
from benchmarks.timing import Clock, time_once
from polca_edit.allocation.allocate import project
from polca_edit.basis.record import unlabelled
from polca_edit.derivatives.objective import Objective


@dataclass(frozen=True)
class Growth:
    """Seconds at several sizes and the exponent of the power law through them (least squares on logs)."""

    quantity: str
    sizes: list[int]
    seconds: list[float]
    exponent: float


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log value over log size.

    >>> round(exponent([1, 2, 4], [3, 6, 12]), 6)
    1.0
    """
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )


def measured(
    quantity: str, sizes: Sequence[int], work: Callable[[int], object], clock: Clock, repeats: int = 5
) -> Growth:
    """Median seconds of ``work(size)``, sizes interleaved."""
    for size in sizes:
        work(size)
    kept: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size in sizes:
            kept[size].append(time_once(lambda size=size: work(size), clock))  # type: ignore[misc]
    medians = [statistics.median(kept[size]) for size in sizes]
    return Growth(quantity, list(sizes), medians, exponent(sizes, medians))


def growth_rows(problem: Problem, clock: Clock, scale: int = 1) -> list[Growth]:
    """Exponents in tokens, vectors and checkpoints on one problem, and in parameters over four widths.

    Sizes are large enough that the fixed part (one backward pass per scored token for any number of
    vectors) is amortised: vectors start at 64.
    """
    objective = problem.objective(batch_size=16)
    theta = problem.checkpoints[0]
    rows = problem.rows(64)

    def tokens(count: int) -> None:
        objective.directional(theta, rows, problem.tokens.select(torch.arange(count)), expected=10_000)

    few = problem.tokens.select(torch.arange(16))
    many = problem.rows(512)

    def vectors(count: int) -> None:
        objective.directional(theta, many[:count], few, expected=10_000)

    basis = unlabelled("random", rows[:32])

    def checkpoints(count: int) -> None:
        project(objective, problem.checkpoints.subset(range(count)), [basis], few)

    found = [
        measured("tokens", [64 * scale, 128 * scale, 256 * scale], tokens, clock),
        measured("vectors", [128, 256, 512], vectors, clock),
        measured("checkpoints", [4, 8, 16], checkpoints, clock),
    ]
    sizes, seconds = [], []
    for width in (64, 128, 256):
        other = trained_arithmetic(arithmetic_shape(width), checkpoints=1, spacing=2, sums=32, curvature=8)
        mine, directions = other.objective(), other.rows(32)

        def work(mine: Objective = mine, other: Problem = other, directions: Tensor = directions) -> None:
            mine.directional(other.checkpoints[0], directions, other.tokens, expected=10_000)

        work()
        sizes.append(other.space.size)
        seconds.append(statistics.median(time_once(work, clock) for _ in range(5)))
    found.append(Growth("parameters", sizes, seconds, exponent(sizes, seconds)))
    return found


def float64_errors(problem: Problem) -> dict[str, float]:
    """Largest error of each derivative in lower precision, relative to the largest float64 value."""
    theta, rows = problem.checkpoints[-1], problem.rows(8)
    tokens = problem.tokens.select(torch.arange(min(32, problem.tokens.sequences)))
    twin = copy.deepcopy(problem.module).double()
    exact = Objective(twin, problem.token_loss, route="jvp")
    reference = exact.directional(theta.double(), rows.double(), tokens)[1]
    product = exact.hessian(theta.double(), tokens)(rows[0].double())
    found = {}
    for route in ("adjoint", "traced", "jvp", "double_backward"):
        objective = problem.objective(route)
        slopes = objective.directional(theta, rows, tokens)[1]
        found[f"slopes float32 {route}"] = float((slopes - reference).abs().max() / reference.abs().max())
    image = problem.objective("traced").hessian(theta, tokens, expected=1000)(rows[0])
    found["hessian product float32 traced"] = float((image - product).norm() / product.norm())
    half = copy.deepcopy(problem.module).bfloat16()
    low = Objective(half, problem.token_loss, route="traced")
    slopes = low.directional(theta.bfloat16(), rows.bfloat16(), tokens)[1]
    found["slopes bfloat16 traced"] = float((slopes.double() - reference).abs().max() / reference.abs().max())
    return found
