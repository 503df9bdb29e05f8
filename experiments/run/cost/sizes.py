"""Sizes of a run, and what follows from them alone: passes, products, reads of checkpoints.

The only guess is how many products Lanczos needs at a basis checkpoint (:data:`PRODUCTS_PER_CHECKPOINT`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from experiments.config import BasisConfig, RunConfig
from experiments.tasks.task import Task
from polca_edit.basis.streamed import HELD
from polca_edit.derivatives.curvature import CurvatureWork
from polca_edit.derivatives.routes import TRACE_BREAK_EVEN
from polca_edit.parameters import ParameterSpace

#: Lanczos products per basis checkpoint at tolerance 1e-2 with a warm start, and how many fewer the
#: first takes (arithmetic runs of 9,706 to 401,162 parameters: 17, 33 and 87 products at 3, 5, 12).
PRODUCTS_PER_CHECKPOINT = 8
FIRST_CHECKPOINT_FEWER = 7
#: The same from LARGE parameters on (Pythia shapes of 14 and 70 million: 7 to 10 a vector).
LARGE, PRODUCTS_OF_LARGE = 5_000_000, 8.5
FLOAT = 4
#: Kind of a basis that is turned from another one's stored projections.
ROTATED = "rotated"


@dataclass(frozen=True)
class BasisSize:
    """What a basis takes, as far as its config says.

    Attributes:
        kind: how its directions are found; ``rotated`` where another basis is turned.
        vectors: K.
        taken: basis checkpoints, 0 for a kind that takes no Hessian.
        columns: parameters that it may lie in; None for all N.
        stored: bytes of a number in its stored rows.
    """

    kind: str
    vectors: int
    taken: int
    columns: int | None = None
    stored: int = FLOAT

    def columns_of(self, parameters: int) -> int:
        """Entries of a row."""
        return parameters if self.columns is None else self.columns

    def bytes_of(self, parameters: int) -> int:
        """Of its stored rows."""
        return self.vectors * self.columns_of(parameters) * self.stored

    def fewer(self, share: float, least: int) -> BasisSize:
        """The same with a share of vectors and basis checkpoints, none below ``least``."""
        taken = max(least, round(self.taken * share)) if self.taken else 0
        return replace(self, vectors=max(least, round(self.vectors * share)), taken=taken)


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
        bases: each basis.
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
    bases: tuple[BasisSize, ...]
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
        return sum(basis.vectors for basis in self.bases)

    @property
    def rows(self) -> int:
        """Directions per checkpoint: vectors and two residual directions of every measured basis."""
        return sum(basis.vectors + 2 for basis in self.measured)

    @property
    def measured(self) -> tuple[BasisSize, ...]:
        """The bases that are not turned from others."""
        return tuple(basis for basis in self.bases if basis.kind != ROTATED)


def basis_sizes(config: RunConfig, space: ParameterSpace) -> tuple[BasisSize, ...]:
    """Sizes of the bases of a config in a model's parameters."""
    kept = config.basis_storage
    stored = config.itemsize if kept == "float32" else int(getattr(torch, kept).itemsize)
    found = []
    for spec in config.bases:
        taken = len(spec.steps) if spec.steps is not None else -(-spec.vectors // spec.per_checkpoint)
        kind = ROTATED if spec.rotated else spec.kind
        taken = taken if kind == "hessian" else 0
        found.append(BasisSize(kind, spec.vectors, taken, space.count(spec.include), stored))
    return tuple(found)


def sizes_of(
    task: Task, config: RunConfig, steps: Sequence[int], space: ParameterSpace | None = None
) -> Sizes:
    """Sizes of a config.

    Args:
        task: its task.
        config: the run.
        steps: of its checkpoints.
        space: the parameters of the run's own model, where a smaller one stands in for it in the task.
    """
    splits, t = task.splits, config.training
    opened = config.checkpoints is not None
    space = task.space if space is None else space
    return Sizes(
        space.size,
        len(steps),
        0 if opened else t.steps,
        t.batch_size,
        splits.select.sequences,
        splits.select.count,
        splits.curvature.sequences,
        splits.evaluate.sequences,
        config.batch_size,
        0 if opened else -(-t.steps // t.state_every),
        basis_sizes(config, space),
        len({1.0, *config.damage.doses}),
        config.damage.random_draws,
        "jvp",
        config.rule == "second_order",
        config.rule == "simpson",
        config.itemsize,
    )


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


def curvature_work(sizes: Sizes, sequence_bytes: float, budget: int) -> CurvatureWork:
    """How products with a Hessian will go through the curvature split."""
    return CurvatureWork.of(sizes.curvature, sizes.derivative_batch, sequence_bytes, budget)


def expected_products(spec: BasisConfig, basis: BasisSize) -> int:
    """Products that a Hessian basis expects in all, by which it chooses their route."""
    return PRODUCTS_PER_CHECKPOINT * spec.per_checkpoint * basis.taken


def is_traced(work: CurvatureWork, spec: BasisConfig, basis: BasisSize) -> bool:
    """Whether the products of a Hessian basis will be traced where the route is left open."""
    return work.passes(expected_products(spec, basis)) >= TRACE_BREAK_EVEN


#: Checkpoints that an open series keeps.
CACHED = 3


def streamed_order(checkpoints: int, held: int = HELD) -> Iterator[int]:
    """Indices in the order in which a trajectory basis reads them: its Gram matrix, then its rows.

    >>> list(streamed_order(3))
    [0, 1, 2, 0, 1, 2]
    """
    for start in range(0, checkpoints - 1, held):
        yield from (0, *range(start + 1, checkpoints))
    yield from range(checkpoints)


def reads_of(order: Iterator[int] | Sequence[int]) -> int:
    """Reads from disk that an order of indices takes, with the last :data:`CACHED` kept.

    >>> reads_of([0, 1, 0, 2, 3, 0])
    5
    """
    kept: list[int] = []
    reads = 0
    for index in order:
        if index not in kept:
            reads += 1
            kept = [*kept, index][-CACHED:]
    return reads
