"""Single pieces of work at a Pythia shape: products, bases, Lanczos, growth, and the plan of a run."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from experiments.run.cost import speeds
from experiments.run.cost.plan import make_plan
from experiments.run.parts import mapped_rows
from experiments.study.pythia.kept import Cost, Notes, measured
from experiments.study.pythia.shapes import LENGTH, Amount, counted, few_scored, run_config, series_of
from polca_edit.basis.path import trajectory_basis
from polca_edit.derivatives.lanczos import LanczosSettings, lengths, projected_lanczos
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import next_token_loss

#: Bytes that rows of a growth measurement may take.
MOST_ROWS = 5e9
VECTORS, PRODUCTS, SEQUENCES, SCORED = 3, 8, 8, 16


def everywhere(module: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The loss that cannot be asked for slots, so that logits are computed at all positions."""
    return next_token_loss(module, inputs)


def product(folder: Path, *, scored: bool) -> Cost:
    """One linearisation and one Hessian-vector product."""
    model, series = series_of(folder)
    loss = Objective(model, next_token_loss if scored else everywhere, batch_size=4, route="double_backward")
    theta, tokens = series[len(series) - 1], few_scored(SEQUENCES, SCORED)

    def work() -> Notes:
        loss.hessian(theta, tokens)(theta)
        return {"route": loss.curvature_route}

    return measured(work)


def trajectory(folder: Path) -> Cost:
    """A trajectory basis from streamed displacements."""
    _, series = series_of(folder)

    def work() -> Notes:
        return {"vectors": len(trajectory_basis(series, VECTORS)), "checkpoints": len(series)}

    return measured(work)


def lanczos(folder: Path, *, mapped: bool) -> Cost:
    """Products with a diagonal operator, so that the Krylov vectors alone count."""
    size = counted(folder)
    diagonal, numbers = torch.linspace(0, 1, size), itertools.count()

    def work() -> Notes:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            found = projected_lanczos(
                lambda vector: diagonal * vector,
                diagonal,
                1,
                torch.Generator().manual_seed(0),
                LanczosSettings(1e-9, PRODUCTS),
                allocate=(lambda k, n: mapped_rows(Path(place) / str(next(numbers)), k, n))
                if mapped
                else None,
            )
        return {"products": found.products}

    return measured(work)


def compared(folder: Path, pairs: int = 3) -> Cost:
    """Products with logits everywhere against those with the scored ones, in interleaved pairs."""
    model, series = series_of(folder)
    theta, tokens = series[len(series) - 1], few_scored(SEQUENCES, SCORED)
    ways = [Objective(model, f, batch_size=4, route="double_backward") for f in (next_token_loss, everywhere)]

    def work() -> Notes:
        losses = [way.losses(theta, tokens) for way in ways]
        vector = series[len(series) - 1] - series[0]
        maps = [way.hessian(theta, tokens) for way in ways]
        images = [each(vector) for each in maps]
        ratios = []
        for pair in range(pairs):
            taken = [0.0, 0.0]
            for number in (0, 1) if pair % 2 == 0 else (1, 0):
                started = time.process_time()
                maps[number](vector)
                taken[number] = time.process_time() - started
            ratios.append(taken[1] / taken[0])
        return {
            "ratio": sorted(ratios)[len(ratios) // 2],
            "largest_ratio": max(ratios),
            "smallest_ratio": min(ratios),
            "loss_difference": float((losses[0] - losses[1]).abs().max()),
            "product_difference": float((images[0] - images[1]).norm() / images[1].norm()),
        }

    return measured(work)


def one_vector(folder: Path, memory_gb: float | None) -> Cost:
    """One checkpoint and vector: a Hessian product, slopes of four sequences along it, and its damage."""
    from interventions.damage import EvaluatedSplit
    from interventions.edits import project_out

    model, series = series_of(folder)
    loss = Objective(model, next_token_loss, batch_size=2, curvature_budget=0, memory_budget=1 << 29)
    tokens = few_scored(4, 10)

    def work() -> Notes:
        theta = series[len(series) - 1]
        moved = theta - series[0]
        moved /= float(lengths(moved[None]))
        curvature = float(moved @ loss.hessian(theta, tokens, expected=1)(moved))
        _, slopes = loss.directional(theta, moved[None], tokens)
        split = EvaluatedSplit(loss, series, tokens)
        damage = float(split.damage(project_out(split, moved[None])).change.double().mean())
        return {
            "curvature": curvature,
            "mean_slope": float(slopes.double().mean()),
            "damage": damage,
            "curvature_route": loss.curvature_route,
            "route": loss.route_used,
            "memory_gb": memory_gb,
        }

    return measured(work)


def planned(folder: Path, amount: Amount, memory_gb: float | None) -> Cost:
    """The plan of the whole run, with one thread in processor seconds: others may use the machine."""

    def work() -> Notes:
        config = run_config(folder, amount, memory_gb)
        alone = torch.get_num_threads() == 1
        timed = time.process_time if alone else time.perf_counter
        with tempfile.TemporaryDirectory() as place, mock.patch.object(speeds, "clock", timed):
            found = make_plan(config, Path(place))
        notes: Notes = {
            "parameters": found.parameters,
            "hvps": found.hvps,
            "peak_bytes": found.peak_bytes,
            "bytes_read": found.bytes_read,
            "bytes_written": found.bytes_written,
            "seconds": found.seconds,
            "clock": "processor" if alone else "wall",
            "route": found.route,
            "curvature_route": found.curvature_route,
            "warnings": "; ".join(found.warnings),
        }
        for stage in found.stages:
            notes[f"{stage.stage} seconds"] = stage.seconds
            notes[f"{stage.stage} read"] = stage.bytes_read
            notes[f"{stage.stage} written"] = stage.bytes_written
        return notes

    return measured(work)


def growth(folder: Path, quantity: str) -> Cost:
    """Processor seconds of slopes at doubled K, T or M; the exponent of the power law through them.

    Vectors, tokens and checkpoints are doubled twice (once where rows would not fit) from sizes of one route;
    every size is done once before it is timed, so that traces and checks are apart.
    """
    model, series = series_of(folder)
    loss = Objective(model, next_token_loss, batch_size=4)
    theta = series[len(series) - 1]
    sizes = (1, 2, 4) if 4 * 16 * 4 * theta.numel() < MOST_ROWS else (1, 2)
    most = 16 * sizes[-1] if quantity == "K" else 8
    rows = torch.randn(most, theta.numel(), generator=torch.Generator().manual_seed(0))

    def seconds(sequences: int, vectors: int, places: int) -> float:
        tokens = few_scored(sequences, 10)
        started = time.process_time()
        for index in range(places):
            loss.directional(series[index], rows[:vectors], tokens, expected=10_000)
        return time.process_time() - started

    calls: dict[str, Callable[[int], float]] = {
        "M": lambda n: seconds(4 * n, 8, 1),
        "K": lambda n: seconds(4, 16 * n, 1),
        "T": lambda n: seconds(4, 8, n),
    }

    def work() -> Notes:
        for n in sizes:
            calls[quantity](n)
        taken = {n: calls[quantity](n) for n in sizes}
        return {
            "exponent": _exponent(taken),
            **{f"at {n}": value for n, value in taken.items()},
            "route": loss.route_used,
        }

    return measured(work)


def _exponent(taken: dict[int, float]) -> float:
    """Slope of log seconds over log size."""
    x, y = [math.log(n) for n in taken], [math.log(v) for v in taken.values()]
    middle = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - middle[0]) * (b - middle[1]) for a, b in zip(x, y, strict=True))
    return above / sum((a - middle[0]) ** 2 for a in x)


#: Pieces of a trained shape by name.
PIECES: dict[str, Callable[[Path], Cost]] = {
    "product, logits at scored slots": partial(product, scored=True),
    "product, logits everywhere": partial(product, scored=False),
    "products in pairs": compared,
    "trajectory basis": trajectory,
    "lanczos": partial(lanczos, mapped=False),
    "lanczos, tables mapped": partial(lanczos, mapped=True),
    "growth in M": partial(growth, quantity="M"),
    "growth in K": partial(growth, quantity="K"),
    "growth in T": partial(growth, quantity="T"),
}
#: Positions of a sequence that are predicted.
SLOTS = LENGTH - 1
