"""``polca-edit plan``: what a run would cost before it is started, on this machine.

Counts follow from the config: passes through the model's forward, Hessian-vector products, bytes.
Times come from a rehearsal of a few seconds: one batch of every kind of work is done for real with
the run's own model at its initial weights, and scaled. The only guess is how many products Lanczos
needs at a basis checkpoint (:data:`PRODUCTS_PER_CHECKPOINT`).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.config import BasisConfig, RunConfig
from experiments.run.machine import peak_rss_bytes
from experiments.tasks.task import Task, build_task
from polca_edit.derivatives.objective import TRACE_BREAK_EVEN, Objective
from polca_edit.tokens import TokenSet

#: Lanczos products per basis checkpoint at tolerance 1e-2 with a warm start, and how many fewer the
#: first takes (arithmetic runs of 9,706 to 401,162 parameters: 17, 33 and 87 products at 3, 5, 12).
PRODUCTS_PER_CHECKPOINT = 8
FIRST_CHECKPOINT_FEWER = 7
#: Learning rate times steps between checkpoints above which a trapezoid may miss much. Two arithmetic
#: runs stand behind it: quadrature error 0.2 % at 3e-3; at 1.2e-2 18 % missing, residual included.
COARSE_SPACING = 6e-3
#: An opened series is too coarse where a step is more than this times the one before.
COARSE_RATIO = 1.5
FLOAT = 4
#: A rehearsed piece of work that took this long is not repeated for a steadier time.
ENOUGH_SECONDS = 2.0
#: Kind of a basis that is turned from another one's stored projections.
ROTATED = "rotated"


@dataclass(frozen=True)
class Sizes:
    """Everything the counts depend on.

    Attributes:
        parameters: N.
        checkpoints: T.
        steps: optimiser steps of the run, 0 where checkpoints are opened.
        batch: training sequences a step.
        select: sequences of the select split.
        select_tokens: its scored tokens.
        curvature: sequences of the curvature split.
        evaluate: sequences of the evaluate split.
        derivative_batch: sequences per derivative batch.
        states: optimiser states recorded.
        bases: (kind, vectors, basis checkpoints) of each basis; a rotated one has kind ``rotated``.
        doses: damage doses per vector.
        draws: random directions per vector.
        route: how directional derivatives are taken.
        second_order: whether Eq. 6 is asked for.
    """

    parameters: int
    checkpoints: int
    steps: int
    batch: int
    select: int
    select_tokens: int
    curvature: int
    evaluate: int
    derivative_batch: int
    states: int
    bases: tuple[tuple[str, int, int], ...]
    doses: int
    draws: int
    route: str
    second_order: bool

    @property
    def vectors(self) -> int:
        """K over all bases."""
        return sum(vectors for _, vectors, _ in self.bases)

    @property
    def rows(self) -> int:
        """Directions per checkpoint: vectors and two residual directions of every measured basis."""
        return sum(vectors + 2 for kind, vectors, _ in self.bases if kind != ROTATED)


@dataclass(frozen=True)
class Speeds:
    """Measured on this machine with the run's model, in seconds.

    Attributes:
        training_step: one optimiser step.
        forward: one plain pass, per sequence.
        slopes: all directions of one checkpoint, per select sequence.
        slopes_setup: what the first checkpoint costs beyond that.
        product: one Hessian-vector product, per curvature sequence.
        linearise: setting up products at a checkpoint, per curvature sequence.
        linearise_setup: what the first one costs beyond that.
        read: reading one checkpoint.
        write: writing one checkpoint.
        peak_bytes: peak memory of the rehearsal.
    """

    training_step: float
    forward: float
    slopes: float
    slopes_setup: float
    product: float
    linearise: float
    linearise_setup: float
    read: float
    write: float
    peak_bytes: int


@dataclass(frozen=True)
class StageCost:
    """What one stage costs; ``forward`` counts sequences through the model's own forward."""

    stage: str
    forward: float
    hvps: int
    bytes_read: int
    bytes_written: int
    seconds: float


# -- counts ---------------------------------------------------------------------------------------


def padded(sequences: int, batch: int) -> int:
    """Sequences that go through the model when the last batch is filled up."""
    size = min(batch, sequences)
    return math.ceil(sequences / size) * size


def products(kind: str, checkpoints: int, tolerance: float, most: int) -> int:
    """Hessian-vector products of a basis; Lanczos gains about a digit in four products."""
    if kind != "hessian" or checkpoints == 0:
        return 0
    extra = max(0.0, 4 * math.log10(1e-2 / tolerance))
    each = min(PRODUCTS_PER_CHECKPOINT + extra, most + 1)
    return max(checkpoints, round(each * checkpoints - min(FIRST_CHECKPOINT_FEWER, each - 1)))


def stage_costs(sizes: Sizes, speeds: Speeds, config: RunConfig) -> list[StageCost]:
    """Every stage's counts and time, in the pipeline's order."""
    s, weights = sizes, sizes.parameters * FLOAT
    select, evaluate = padded(s.select, s.derivative_batch), padded(s.evaluate, s.derivative_batch)
    stages = []
    if s.steps:
        # Weights, and at each state two moments and a counter per parameter tensor.
        written = s.checkpoints * weights + s.states * 2 * weights
        seconds = s.steps * speeds.training_step + (s.checkpoints + 2 * s.states) * speeds.write
        stages.append(StageCost("train", s.steps * s.batch, 0, 0, written, seconds))
    for spec, (kind, vectors, taken) in zip(config.bases, s.bases, strict=True):
        stages.append(_basis_cost(s, speeds, spec, kind, vectors, taken))
    stages.append(_projection_cost(s, speeds, select))
    for spec, (_, vectors, _) in zip(config.bases, s.bases, strict=True):
        runs = 2 + vectors * (s.doses + s.draws)
        seconds = runs * select * speeds.forward + 2 * speeds.read
        stored = vectors * s.select_tokens * FLOAT
        stages.append(StageCost(f"damage:{spec.label}", runs * select, 0, 2 * weights, stored, seconds))
    runs = 2 + s.vectors
    seconds = runs * evaluate * speeds.forward + 2 * speeds.read
    stages.append(StageCost("evaluate", runs * evaluate, 0, 2 * weights, 0, seconds))
    # The summary measures capture: the whole series once more for each basis, its end twice.
    reads = len(s.bases) * (s.checkpoints + 1)
    stages.append(StageCost("summary", 0, 0, reads * weights, 0, 0.0))
    return stages


def _basis_cost(
    s: Sizes, speeds: Speeds, spec: BasisConfig, kind: str, vectors: int, taken: int
) -> StageCost:
    weights, stored = s.parameters * FLOAT, vectors * s.parameters * FLOAT
    name = f"basis:{spec.label}"
    if kind == ROTATED:  # turned from stored projections, which it stores anew
        return StageCost(name, 0, 0, 0, stored + projected_bytes(s, vectors), 0.0)
    if kind == "random":
        return StageCost(name, 0, 0, 0, stored, 0.0)
    if kind != "hessian":
        return StageCost(name, 0, 0, s.checkpoints * weights, stored, s.checkpoints * speeds.read)
    curvature = padded(s.curvature, s.derivative_batch)
    count = products(kind, taken, spec.tolerance, spec.max_products)
    # The choice of route is the objective's: a trace pays from four expected products on.
    traced = 8 * spec.per_checkpoint * taken * TRACE_BREAK_EVEN // 4 >= TRACE_BREAK_EVEN
    forward = min(s.curvature, s.derivative_batch) if traced else curvature * (taken + count)
    seconds = (
        count * s.curvature * speeds.product
        + taken * s.curvature * speeds.linearise
        + speeds.linearise_setup
        + taken * speeds.read
    )
    return StageCost(name, forward, count, taken * weights, stored, seconds)


def projected_bytes(s: Sizes, vectors: int) -> int:
    """Stored projections of one basis: token slopes along its vectors and residuals, exact losses."""
    return s.select_tokens * FLOAT * s.checkpoints * (vectors + 3)


def _projection_cost(s: Sizes, speeds: Speeds, select: int) -> StageCost:
    weights = s.parameters * FLOAT
    if s.route == "adjoint":
        forward = s.checkpoints * s.select
    elif s.route == "traced":
        forward = min(s.select, s.derivative_batch)
    else:
        forward = s.checkpoints * select * (1 + s.rows)
    # One pass over the series for the slopes, one more per basis for the displacements.
    measured = [vectors for kind, vectors, _ in s.bases if kind != ROTATED]
    reads = s.checkpoints * (1 + len(measured))
    stored = sum(projected_bytes(s, vectors) for vectors in measured)
    hvps = 0
    if s.second_order:
        hvps = s.vectors * (s.checkpoints - 1)
        reads += s.checkpoints * len(measured)
    seconds = s.checkpoints * s.select * speeds.slopes + speeds.slopes_setup + reads * speeds.read
    seconds += hvps * s.curvature * speeds.product
    return StageCost("projections", forward, hvps, reads * weights, stored, seconds)


# -- rehearsal ------------------------------------------------------------------------------------


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
    from polca_edit.checkpoints.files import read_weights, write_tensors

    objective = task.objective(config)
    theta = task.space.read(task.module)
    select = _part(task.splits.select, config.batch_size)
    curvature = _part(task.splits.curvature, config.batch_size)
    training = _training_seconds(task) if task.batch_loss is not None else 0.0
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


def _training_seconds(task: Task, steps: int = 4) -> float:
    """One optimiser step of a copy of the model (the first, which allocates, is not counted)."""
    module: nn.Module = copy.deepcopy(task.module).train()
    optimiser = torch.optim.AdamW(module.parameters(), foreach=True)
    assert task.batch_loss is not None

    def step(number: int) -> None:
        optimiser.zero_grad(set_to_none=True)
        assert task.batch_loss is not None
        task.batch_loss(module, number).backward()
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


# -- the plan -------------------------------------------------------------------------------------


def sizes_of(task: Task, config: RunConfig, steps: Sequence[int]) -> Sizes:
    """Sizes of a config; ``steps`` are its checkpoints."""
    splits, t = task.splits, config.training
    opened = config.checkpoints is not None
    bases = []
    for spec in config.bases:
        taken = len(spec.steps) if spec.steps is not None else -(-spec.vectors // spec.per_checkpoint)
        kind = ROTATED if spec.rotated else spec.kind
        bases.append((kind, spec.vectors, taken if kind == "hessian" else 0))
    return Sizes(
        task.space.size,
        len(steps),
        0 if opened else t.steps,
        t.batch_size,
        splits.select.sequences,
        splits.select.count,
        splits.curvature.sequences,
        splits.evaluate.sequences,
        config.batch_size,
        0 if opened else -(-t.steps // t.state_every),
        tuple(bases),
        len({1.0, *config.damage.doses}),
        config.damage.random_draws,
        "jvp",
        config.rule == "second_order",
    )


def gap_warnings(config: RunConfig, steps: Sequence[int]) -> list[str]:
    """Where checkpoints are too far apart for a quadrature over the straight line between them."""
    if config.checkpoints is None:
        t = config.training
        product = t.learning_rate * t.record_every
        if product > COARSE_SPACING:
            fitting = max(1, int(COARSE_SPACING / t.learning_rate))
            return [
                f"learning rate x spacing is {product:.1e}, above {COARSE_SPACING:.0e} the trapezoid misses "
                f"much of the loss change; set training.record_every to {fitting} or less"
            ]
        return []
    wide = [
        (a, b) for a, b in zip(steps, steps[1:], strict=False) if b - a > 1 and b > COARSE_RATIO * max(a, 1)
    ]
    if not wide:
        return []
    listed = ", ".join(f"{a}-{b}" for a, b in wide[:12])
    return [
        f"{len(wide)} intervals are wider than half the training before them ({listed}); loss changes there "
        "cannot be attributed by a trapezoid, use interior quadrature nodes or leave those steps out"
    ]


def smallest_effect(task: Task, config: RunConfig) -> dict[str, float]:
    """The smallest mean damage a two-sided 5 % test would find with power 0.8, on the evaluate split.

    The spread is that of document means of the loss at the initial weights, an upper bound where
    undoing a movement changes losses less than the model's own variation between documents.
    """
    from interventions.causal.statistics import minimum_detectable

    tokens = task.splits.evaluate
    losses = task.objective(config).losses(task.space.read(task.module), tokens).double()
    documents = tokens.documents[tokens.sequence_of]
    means = torch.stack([losses[documents == name].mean() for name in documents.unique()])
    spread = float(means.std()) if len(means) > 1 else math.nan
    error = 1 / math.sqrt(len(means))
    return {
        "documents": float(len(means)),
        "in_standard_deviations": minimum_detectable(error),
        "nats_per_token": minimum_detectable(error) * spread,
    }


def make_plan(config: RunConfig, folder: Path, budget_seconds: float | None = None) -> dict[str, Any]:
    """The plan of a config as plain values.

    Args:
        config: the run.
        folder: where one checkpoint is written and read for timing.
        budget_seconds: also find settings that fit this.
    """
    task = build_task(config)
    given = task.given_checkpoints(config)
    steps = config.training.recorded if given is None else list(given.steps)
    effect = smallest_effect(task, config)
    sizes = sizes_of(task, config, steps)
    speeds, route = rehearse(task, config, sizes, folder)
    sizes = replace(sizes, route=route)
    stages = stage_costs(sizes, speeds, config)
    total = sum(stage.seconds for stage in stages)
    plan: dict[str, Any] = {
        "forward_passes": round(sum(stage.forward for stage in stages) / sizes.select, 3),
        "forward_sequences": sum(stage.forward for stage in stages),
        "hvps": sum(stage.hvps for stage in stages),
        "bytes_read": sum(stage.bytes_read for stage in stages),
        "bytes_written": sum(stage.bytes_written for stage in stages),
        "peak_bytes": peak_bytes(sizes, speeds),
        "seconds": total,
        "route": route,
        "parameters": sizes.parameters,
        "checkpoints": sizes.checkpoints,
        "stages": [asdict(stage) for stage in stages],
        "smallest_effect": effect,
        "warnings": gap_warnings(config, steps),
    }
    if budget_seconds is not None:
        plan["budget"] = fit_budget(sizes, speeds, config, budget_seconds)
    return plan


def peak_bytes(sizes: Sizes, speeds: Speeds) -> int:
    """The rehearsal's peak, which holds all rows once, and what the run holds beside it.

    Three checkpoints are cached, and the trajectory basis stacks all displacements.
    """
    weights = sizes.parameters * FLOAT
    stacked = sizes.checkpoints if any(kind == "trajectory" for kind, _, _ in sizes.bases) else 0
    slopes = sizes.select_tokens * sizes.checkpoints * sizes.rows * FLOAT
    return speeds.peak_bytes + weights * (3 + max(stacked, sizes.vectors)) + 2 * slopes


def fit_budget(sizes: Sizes, speeds: Speeds, config: RunConfig, seconds: float) -> dict[str, Any]:
    """The largest share of vectors and tokens that fits a budget; training is not shortened."""
    for share in (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05):
        bases = tuple(
            (kind, max(2, round(v * share)), max(2, round(taken * share)) if taken else 0)
            for kind, v, taken in sizes.bases
        )
        tried = replace(
            sizes,
            bases=bases,
            select=max(8, round(sizes.select * share)),
            select_tokens=max(8, round(sizes.select_tokens * share)),
            curvature=max(8, round(sizes.curvature * share)),
        )
        # Slopes of a checkpoint are timed for all directions; fewer directions cost in proportion.
        scaled = replace(speeds, slopes=speeds.slopes * tried.rows / sizes.rows)
        needed = sum(stage.seconds for stage in stage_costs(tried, scaled, config))
        if needed <= seconds:
            return {
                "fits": True,
                "share": share,
                "seconds": needed,
                "vectors": {spec.label: v for spec, (_, v, _) in zip(config.bases, bases, strict=True)},
                "select_sequences": tried.select,
                "curvature_sequences": tried.curvature,
            }
    training = sizes.steps * speeds.training_step
    return {"fits": False, "seconds": needed, "training_seconds": training}


def describe(found: dict[str, Any]) -> str:
    """The plan as a few lines."""
    lines = [
        f"{found['parameters']:,} parameters, {found['checkpoints']} checkpoints, route {found['route']}",
        f"forward passes {found['forward_passes']:,.0f} (of the select split), "
        f"Hessian-vector products {found['hvps']:,}",
        f"reads {found['bytes_read'] / 1e9:.2f} GB, writes {found['bytes_written'] / 1e9:.2f} GB, "
        f"peak memory {found['peak_bytes'] / 1e9:.1f} GB",
        f"about {found['seconds'] / 60:.1f} minutes on this machine:",
    ]
    lines += [f"  {stage['stage']:<24} {stage['seconds']:8.1f} s" for stage in found["stages"]]
    effect = found["smallest_effect"]
    lines.append(
        f"smallest effect a 5 % test finds with power 0.8 on {effect['documents']:.0f} documents: "
        f"{effect['in_standard_deviations']:.2f} standard deviations between documents "
        f"(at most {effect['nats_per_token']:.3f} nats per token)"
    )
    lines += [f"warning: {text}" for text in found["warnings"]]
    if "budget" in found:
        budget = found["budget"]
        lines.append(
            f"within the budget: {budget['vectors']} vectors, {budget['select_sequences']} select sequences, "
            f"{budget['seconds'] / 60:.1f} minutes"
            if budget["fits"]
            else "no setting fits the budget; training and fixed work alone take longer"
        )
    return "\n".join(lines)
