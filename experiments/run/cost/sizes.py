"""What the stages of a run cost, counted from its sizes and timed by measured speeds.

Passes through the model's forward, Hessian-vector products and bytes follow from the config. The only
guess is how many products Lanczos needs at a basis checkpoint (:data:`PRODUCTS_PER_CHECKPOINT`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.config import BasisConfig, RunConfig
from experiments.tasks.task import Task
from polca_edit.derivatives.routes import TRACE_BREAK_EVEN

#: Lanczos products per basis checkpoint at tolerance 1e-2 with a warm start, and how many fewer the
#: first takes (arithmetic runs of 9,706 to 401,162 parameters: 17, 33 and 87 products at 3, 5, 12).
PRODUCTS_PER_CHECKPOINT = 8
FIRST_CHECKPOINT_FEWER = 7
#: The same from LARGE parameters on (Pythia shapes of 14 and 70 million: 9 to 10 a vector).
LARGE, PRODUCTS_OF_LARGE = 5_000_000, 9.5
FLOAT = 4
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
        simpson: whether derivatives are taken in the middle of intervals too.
        itemsize: bytes of a number in vectors and tables; weights on disk keep their own.
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
    simpson: bool = False
    itemsize: int = FLOAT

    @property
    def places(self) -> int:
        """Where derivatives are taken: checkpoints, and middles of intervals if the rule has them."""
        return 2 * self.checkpoints - 1 if self.simpson else self.checkpoints

    @property
    def vectors(self) -> int:
        """K over all bases."""
        return sum(vectors for _, vectors, _ in self.bases)

    @property
    def rows(self) -> int:
        """Directions per checkpoint: vectors and two residual directions of every measured basis."""
        return sum(vectors + 2 for kind, vectors, _ in self.bases if kind != ROTATED)


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
        config.rule == "simpson",
        config.itemsize,
    )


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
        base_bytes: resident memory before any derivative: libraries, data, the model.
        sequence_bytes: what a linearised batch holds, per curvature sequence.
        curvature_route: how products with the Hessian were taken, None where none were.
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
    base_bytes: int
    sequence_bytes: float = 0.0
    curvature_route: str | None = None


@dataclass(frozen=True)
class StageCost:
    """What one stage costs; ``forward`` counts sequences through the model's own forward."""

    stage: str
    forward: float
    hvps: int
    bytes_read: int
    bytes_written: int
    seconds: float


def padded(sequences: int, batch: int) -> int:
    """Sequences that go through the model when the last batch is filled up."""
    size = min(batch, sequences)
    return math.ceil(sequences / size) * size


def products(kind: str, checkpoints: int, tolerance: float, most: int, parameters: int = 0) -> int:
    """Hessian-vector products of a basis; Lanczos gains about a digit in four products."""
    if kind != "hessian" or checkpoints == 0:
        return 0
    extra = max(0.0, 4 * math.log10(1e-2 / tolerance))
    usual = PRODUCTS_OF_LARGE if parameters >= LARGE else PRODUCTS_PER_CHECKPOINT
    each = min(usual + extra, most + 1)
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
        stored = vectors * s.select_tokens * s.itemsize
        stages.append(StageCost(f"damage:{spec.label}", runs * select, 0, 2 * weights, stored, seconds))
    stages += _discovery_cost(speeds, config, select)
    runs = 2 + s.vectors
    seconds = runs * evaluate * speeds.forward + 2 * speeds.read
    stages.append(StageCost("evaluate", runs * evaluate, 0, 2 * weights, 0, seconds))
    # The summary measures capture: the whole series once more for each basis, its end twice.
    reads = len(s.bases) * (s.checkpoints + 1)
    stages.append(StageCost("summary", 0, 0, reads * weights, 0, 0.0))
    return stages


def _discovery_cost(speeds: Speeds, config: RunConfig, select: int) -> list[StageCost]:
    """Signatures of every measured basis and the windows of the timeline: forward passes alone."""
    edits, pieces = config.discover.edits, config.discover.windows
    if not edits:
        return []
    found = []
    for number, spec in enumerate(config.measured_bases()):
        # The first one also undoes every contiguous window of training.
        runs = 2 + edits + (pieces * (pieces + 1) // 2 if number == 0 else 0)
        seconds = runs * select * speeds.forward
        found.append(StageCost(f"signatures:{spec.label}", runs * select, 0, 0, 0, seconds))
    # Equal, doubling and proposed windows, each beside one random movement.
    runs = 2 + 2 * (2 * pieces + 10)
    found.append(StageCost("timeline", runs * select, 0, 0, 0, runs * select * speeds.forward))
    return found


def _basis_cost(
    s: Sizes, speeds: Speeds, spec: BasisConfig, kind: str, vectors: int, taken: int
) -> StageCost:
    weights, stored = s.parameters * FLOAT, vectors * s.parameters * s.itemsize
    name = f"basis:{spec.label}"
    if kind == ROTATED:  # turned from stored projections, which it stores anew
        return StageCost(name, 0, 0, 0, stored + projected_bytes(s, vectors), 0.0)
    if kind == "random":
        return StageCost(name, 0, 0, 0, stored, 0.0)
    if kind != "hessian":
        return StageCost(name, 0, 0, s.checkpoints * weights, stored, s.checkpoints * speeds.read)
    curvature = padded(s.curvature, s.derivative_batch)
    count = products(kind, taken, spec.tolerance, spec.max_products, s.parameters)
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
    return s.select_tokens * s.itemsize * s.places * (vectors + 3)


def _projection_cost(s: Sizes, speeds: Speeds, select: int) -> StageCost:
    weights = s.parameters * FLOAT
    if s.route == "adjoint":
        forward = s.places * s.select
    elif s.route == "traced":
        forward = min(s.select, s.derivative_batch)
    else:
        forward = s.places * select * (1 + s.rows)
    # One pass over the series for the slopes, one more per basis for the displacements.
    measured = [vectors for kind, vectors, _ in s.bases if kind != ROTATED]
    reads = s.checkpoints * (1 + len(measured))
    stored = sum(projected_bytes(s, vectors) for vectors in measured)
    hvps = 0
    if s.second_order:
        hvps = s.vectors * (s.checkpoints - 1)
        reads += s.checkpoints * len(measured)
    seconds = s.places * s.select * speeds.slopes + speeds.slopes_setup + reads * speeds.read
    seconds += hvps * s.curvature * speeds.product
    return StageCost("projections", forward, hvps, reads * weights, stored, seconds)
