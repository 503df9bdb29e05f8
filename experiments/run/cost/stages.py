"""What the stages of a run cost: counts from its sizes, times from measured speeds."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.config import BasisConfig, RunConfig
from experiments.run.cost.rates import Speeds
from experiments.run.cost.sizes import (
    FLOAT,
    ROTATED,
    BasisSize,
    Sizes,
    curvature_work,
    is_traced,
    padded,
    products,
    reads_of,
    streamed_order,
)
from experiments.run.memory.budget import memory_shares
from polca_edit.derivatives.curvature import UNDER_WAY

#: Additions of a vector of N entries to another that pieces of work take about, beside passes of the model:
#: per product and Krylov vector, per product and earlier row, an undone movement, a random one, and a
#: direction in the slopes of a checkpoint.
PER_KRYLOV, PER_ROW, PER_EDIT, PER_DRAW, PER_DIRECTION = 5, 8, 6, 20, 5


@dataclass(frozen=True)
class StageCost:
    """What one stage costs.

    Attributes:
        stage: its name.
        forward: sequences through the model's own forward.
        hvps: Hessian-vector products.
        bytes_read: of weights.
        bytes_written: of weights and records.
        seconds: on this machine.
    """

    stage: str
    forward: float
    hvps: int
    bytes_read: int
    bytes_written: int
    seconds: float


@dataclass(frozen=True)
class _Priced:
    """Sizes, speeds and settings, from which every stage's cost follows."""

    sizes: Sizes
    speeds: Speeds
    config: RunConfig

    @property
    def weights(self) -> int:
        """Bytes of a checkpoint."""
        return self.sizes.parameters * FLOAT

    def passes(self, sequences: int, count: int) -> float:
        """Seconds of ``count`` plain passes over some sequences."""
        return count * self.speeds.forward.total(sequences, self.sizes.derivative_batch)


def stage_costs(sizes: Sizes, speeds: Speeds, config: RunConfig) -> list[StageCost]:
    """Every stage's counts and time, in the pipeline's order."""
    s, priced = sizes, _Priced(sizes, speeds, config)
    select, evaluate = padded(s.select, s.derivative_batch), padded(s.evaluate, s.derivative_batch)
    stages = []
    if s.steps:
        # Weights, and at each state two moments and a counter per parameter tensor.
        written = (s.checkpoints + 2 * s.states) * priced.weights
        seconds = s.steps * speeds.training_step + (s.checkpoints + 2 * s.states) * speeds.write
        stages.append(StageCost("train", s.steps * s.batch, 0, 0, written, seconds))
    for spec, basis in zip(config.bases, s.bases, strict=True):
        stages.append(_basis_cost(priced, spec, basis))
    stages.append(_projection_cost(priced, select))
    ends = 2 * priced.weights
    for spec, basis in zip(config.bases, s.bases, strict=True):
        vectors = basis.vectors
        runs = 2 + vectors * (s.doses + s.draws)
        seconds = priced.passes(s.select, runs) + 2 * speeds.read
        seconds += vectors * (s.doses * PER_EDIT + s.draws * PER_DRAW) * speeds.vector
        stored = vectors * s.select_tokens * s.itemsize
        stages.append(StageCost(f"damage:{spec.label}", runs * select, 0, ends, stored, seconds))
    stages += _discovery_cost(priced, select)
    runs = 2 + s.vectors
    seconds = priced.passes(s.evaluate, runs) + 2 * speeds.read + s.vectors * PER_EDIT * speeds.vector
    stages.append(StageCost("evaluate", runs * evaluate, 0, ends, 0, seconds))
    # The summary measures capture: the whole series once more for each basis, its end twice.
    reads = len(s.bases) * (s.checkpoints + 1)
    seconds = reads * speeds.read + s.checkpoints * s.vectors * speeds.vector
    stages.append(StageCost("summary", 0, 0, reads * priced.weights, 0, seconds))
    return stages


def _discovery_cost(priced: _Priced, select: int) -> list[StageCost]:
    """Signatures of every measured basis and the windows of the timeline: forward passes alone."""
    config, tokens = priced.config, priced.sizes.select
    edits, pieces = config.discover.edits, config.discover.windows
    if not edits:
        return []
    found = []

    def stage(name: str, runs: int) -> StageCost:
        seconds = priced.passes(tokens, runs) + runs * PER_EDIT * priced.speeds.vector
        return StageCost(name, runs * select, 0, 0, 0, seconds)

    for number, spec in enumerate(config.measured_bases()):
        # The first one also undoes every contiguous window of training.
        windows = pieces * (pieces + 1) // 2 if number == 0 else 0
        found.append(stage(f"signatures:{spec.label}", 2 + edits + windows))
    # Equal, doubling and proposed windows, each beside one random movement.
    return [*found, stage("timeline", 2 + 2 * (2 * pieces + 10))]


def _basis_cost(priced: _Priced, spec: BasisConfig, basis: BasisSize) -> StageCost:
    s, speeds = priced.sizes, priced.speeds
    kind, vectors, taken = basis.kind, basis.vectors, basis.taken
    stored, name = basis.bytes_of(s.parameters), f"basis:{spec.label}"
    # Additions of rows take a share of those of whole vectors.
    row = speeds.vector * basis.columns_of(s.parameters) / s.parameters
    if kind == ROTATED:  # turned from stored projections, which it stores anew
        return StageCost(name, 0, 0, 0, stored + projected_bytes(s, vectors), 0.0)
    if kind == "random":
        return StageCost(name, 0, 0, 0, stored, vectors * (PER_DRAW + vectors) * row)
    if kind == "trajectory":
        held = memory_shares(priced.config, s.parameters).displacements
        reads = reads_of(streamed_order(s.checkpoints, held))
        # The Gram matrix in float64, the rows, and their orthonormal turn, twice.
        turned = s.checkpoints**2 + s.checkpoints * vectors + 4 * vectors**2
        seconds = reads * speeds.read + turned * row + vectors * speeds.write
        return StageCost(name, 0, 0, reads * priced.weights, stored, seconds)
    if kind != "hessian":
        return StageCost(name, 0, 0, s.checkpoints * priced.weights, stored, s.checkpoints * speeds.read)
    budget = memory_shares(priced.config, s.parameters).curvature
    work = curvature_work(s, speeds.sequence_bytes, budget)
    curvature = padded(s.curvature, work.size)
    count = products(kind, taken, spec.tolerance, spec.max_products, s.parameters)
    # Vectors that were sought in fewer bits are checked by one product each.
    count += vectors if priced.config.sought_coarsely else 0
    # The choice of route is the objective's, by the batches of all products that it expects.
    traced = is_traced(work, spec, basis)
    held, streamed = linearised(s, speeds, budget)
    # Reverse mode goes through the model once a linearisation, a trace once in all.
    share = streamed / (held + streamed)
    forward = work.size if traced else round(curvature * (taken + share * count))
    one = speeds.linearise.batch(work.size)
    additions = PER_KRYLOV * count / taken / 2 + PER_ROW * vectors / 2
    each = speeds.product.total(s.curvature, work.size) + streamed * one
    each += additions * row + speeds.write
    seconds = count * each + taken * (max(1, held) * one + speeds.read) + speeds.product_setup
    return StageCost(name, forward, count, taken * priced.weights, stored, seconds)


def linearised(s: Sizes, speeds: Speeds, budget: int) -> tuple[int, int]:
    """(batches that stay linearised, batches linearised anew for every product), as products keep them.

    Args:
        s: of the run.
        speeds: what a batch holds.
        budget: bytes for those that stay.
    """
    work = curvature_work(s, speeds.sequence_bytes, budget)
    each, count = speeds.batch_bytes.batch(work.size), work.batches
    room = max(0, int(budget // each) - UNDER_WAY) if each else count
    held = count if room >= count else max(0, room - 1)
    return held, count - held


def projected_bytes(s: Sizes, vectors: int) -> int:
    """Stored projections of one basis: token slopes along its vectors and residuals, exact losses."""
    return s.select_tokens * s.itemsize * s.places * (vectors + 3)


def _projection_cost(priced: _Priced, select: int) -> StageCost:
    s, speeds = priced.sizes, priced.speeds
    block = priced.config.vector_block or s.rows
    blocks = -(-s.rows // min(block, s.rows))
    if s.route == "adjoint":
        forward = s.places * s.select * blocks
    elif s.route == "traced":
        forward = min(s.select, s.derivative_batch)
    else:
        forward = s.places * select * (blocks + s.rows)
    # One pass over the series for the slopes, one more per basis for the displacements.
    measured = [basis.vectors for basis in s.measured]
    reads = s.checkpoints * (1 + len(measured))
    stored = sum(projected_bytes(s, vectors) for vectors in measured)
    hvps = 0
    if s.second_order:
        hvps = s.vectors * (s.checkpoints - 1)
        reads += s.checkpoints * len(measured)
    once = blocks * speeds.slopes.total(s.select, s.derivative_batch)
    once += s.rows * speeds.row.total(s.select, s.derivative_batch)
    once += s.rows * PER_DIRECTION * speeds.vector
    seconds = s.places * once + speeds.slopes_setup + reads * speeds.read
    seconds += hvps * speeds.product.total(s.curvature, s.derivative_batch)
    return StageCost("projections", forward, hvps, reads * priced.weights, stored, seconds)
