"""Where the derivatives of a run are computed: in this process, or on a Ray cluster.

Both engines cut the work of a checkpoint into the same tasks, (checkpoint, vector block, token
shard), run the same function on each and put the pieces together in the same order, so that they
write the same bytes. Finished checkpoints are kept by the caller (``parts.kept_parts``);
an engine is only told which ones are still wanted.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.run.memory import memory_shares
from experiments.run.run import Run, load_run
from polca_edit.allocation.allocate import CheckpointSlopes, directions_at, slopes_from
from polca_edit.allocation.terms import places_of
from polca_edit.artifacts import load_record
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet


@dataclass(frozen=True)
class Blocks:
    """How a checkpoint's work is cut.

    Attributes:
        vectors: directions per task, or None for all.
        sequences: sequences per task, or None for all; a multiple of the batch size keeps batches whole.
    """

    vectors: int | None = None
    sequences: int | None = None

    def tasks(self, rows: int, sequences: int) -> list[tuple[range, range]]:
        """(vectors, sequences) of every task, token shards outermost.

        >>> Blocks(2, None).tasks(3, 4)
        [(range(0, 2), range(0, 4)), (range(2, 3), range(0, 4))]

        Raises:
            ValueError: for a size below one.
        """
        if any(size is not None and size < 1 for size in (self.vectors, self.sequences)):
            raise ValueError(f"block sizes must be at least 1, got {self.vectors} and {self.sequences}")
        return [(v, s) for s in _cut(sequences, self.sequences) for v in _cut(rows, self.vectors)]


def _cut(total: int, size: int | None) -> list[range]:
    size = size or total
    return [range(first, min(first + size, total)) for first in range(0, total, size)]


@dataclass(frozen=True)
class Piece:
    """Result of one task: losses (m,), slopes (k, m) and the passes it took."""

    losses: Tensor
    slopes: Tensor
    passes: dict[str, float]


def compute_piece(
    objective: Objective,
    checkpoints: Checkpoints,
    bases: Sequence[Basis],
    tokens: TokenSet,
    index: int,
    vectors: range,
    sequences: range,
) -> Piece:
    """Derivatives of one token shard along one vector block at one checkpoint."""
    theta, rows = directions_at(checkpoints, bases, index, vectors)
    shard = tokens
    if len(sequences) < tokens.sequences:
        shard = tokens.select(torch.arange(sequences.start, sequences.stop))
    before = objective.passes.as_dict()
    planned = sum(len(basis) + 2 for basis in bases) * len(checkpoints)
    losses, slopes = objective.directional(theta, rows, shard, expected=planned)
    passes = {kind: value - before[kind] for kind, value in objective.passes.as_dict().items()}
    return Piece(losses, slopes, passes)


def assemble_pieces(
    pieces: Sequence[Piece], blocks_per_shard: int, bases: Sequence[Basis]
) -> CheckpointSlopes:
    """One checkpoint's record from its tasks, in task order."""
    shards = [pieces[i : i + blocks_per_shard] for i in range(0, len(pieces), blocks_per_shard)]
    losses = torch.cat([shard[0].losses for shard in shards])
    slopes = torch.cat([torch.cat([piece.slopes for piece in shard]) for shard in shards], dim=1)
    return slopes_from(losses, slopes, bases)


def local_slopes(
    objective: Objective,
    checkpoints: Checkpoints,
    bases: Sequence[Basis],
    tokens: TokenSet,
    index: int,
    blocks: Blocks,
) -> CheckpointSlopes:
    """One checkpoint, task after task, in this process."""
    rows = sum(len(basis) + 2 for basis in bases)
    tasks = blocks.tasks(rows, tokens.sequences)
    pieces = [compute_piece(objective, checkpoints, bases, tokens, index, v, s) for v, s in tasks]
    return assemble_pieces(pieces, len(_cut(rows, blocks.vectors)), bases)


@contextmanager
def slope_engine(
    run: Run, checkpoints: Checkpoints, bases: Sequence[Basis], tokens: TokenSet, wanted: Sequence[int]
) -> Iterator[Callable[[int], CheckpointSlopes]]:
    """The function (checkpoint index -> slopes) of the run's engine, open inside the block.

    Args:
        run: the run; its config names the engine.
        checkpoints: the places the run's rule takes derivatives at.
        bases: in the order of the config.
        tokens: the select split.
        wanted: indices that will be asked for, in that order; others are kept already.
    """
    config = run.config
    blocks = Blocks(memory_shares(config, run.task.space.size).directions, config.token_shard)
    if config.engine == "local":
        yield lambda index: local_slopes(run.objective, checkpoints, bases, tokens, index, blocks)
        return
    with ray_session(config.engine_address):
        queue = RayQueue(
            str(run.directory.path.absolute()), bases, tokens.sequences, wanted, blocks, run.objective
        )
        try:
            yield queue.result
        finally:
            queue.cancel()


# -- Ray --------------------------------------------------------------------------------------------


def require_ray() -> Any:
    """The ray module.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "engine 'ray' needs the ray package; install polca-edit[ray] or use --engine local"
        ) from error
    return ray


@contextmanager
def ray_session(address: str | None) -> Iterator[Any]:
    """A connection to a cluster, or a cluster of this machine's cores while the block lasts.

    A connection that was open before stays open.

    Args:
        address: of the head node, ``auto`` for the one on this machine; None also reads RAY_ADDRESS.
    """
    ray = require_ray()
    opened = not ray.is_initialized()
    if opened:
        ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level="error")
    try:
        yield ray
    finally:
        if opened:
            ray.shutdown()


_OPEN: dict[str, tuple[Run, Checkpoints, list[Basis]]] = {}


def _open_once(directory: str, threads: int) -> tuple[Run, Checkpoints, list[Basis]]:
    """The run as a worker sees it; kept between tasks, so that a model is traced once per worker."""
    if directory not in _OPEN:
        torch.set_num_threads(threads)
        run = load_run(Path(directory), lambda text: None)
        bases = [load_record(Basis, run.directory.basis(b.label)) for b in run.config.measured_bases()]
        _OPEN[directory] = run, places_of(run.observed(), run.config.rule), bases
    return _OPEN[directory]


def worker_task(
    directory: str,
    index: int,
    vectors: tuple[int, int],
    sequences: tuple[int, int],
    threads: int,
    journal: str | None,
) -> Piece:
    """One task on a worker: the run is read from the shared file system, only the piece travels."""
    if journal is not None:
        name = f"{index}-{vectors[0]}-{sequences[0]}-{os.getpid()}"
        (Path(journal) / name).touch()
    run, checkpoints, bases = _open_once(directory, threads)
    return compute_piece(
        run.objective, checkpoints, bases, run.task.splits.select, index, range(*vectors), range(*sequences)
    )


class RayQueue:
    """Tasks of the wanted checkpoints, at most a few per core under way.

    A task whose worker dies is started again by Ray, up to ``retries`` times; an error in the task
    itself is raised here. Results are taken in task order, whatever order they finish in.
    """

    def __init__(
        self,
        directory: str,
        bases: Sequence[Basis],
        sequences: int,
        wanted: Sequence[int],
        blocks: Blocks,
        objective: Objective,
        *,
        retries: int = 4,
        per_core: int = 2,
    ) -> None:
        ray = require_ray()
        self.ray, self.bases, self.objective = ray, bases, objective
        rows = sum(len(basis) + 2 for basis in bases)
        self.tasks = blocks.tasks(rows, sequences)
        self.per_shard = len(_cut(rows, blocks.vectors))
        self.ahead = max(1, per_core * int(ray.cluster_resources().get("CPU", 1)))
        self.remote = ray.remote(max_retries=retries, num_cpus=1)(worker_task)
        self.fixed = directory, torch.get_num_threads(), os.environ.get("POLCA_EDIT_JOURNAL")
        self.pending = deque((index, number) for index in wanted for number in range(len(self.tasks)))
        self.under_way: dict[tuple[int, int], Any] = {}

    def _fill(self) -> None:
        """Back-pressure: submit only while few tasks are under way or waiting to be taken."""
        directory, threads, journal = self.fixed
        while self.pending and len(self.under_way) < self.ahead:
            index, number = self.pending.popleft()
            vectors, sequences = self.tasks[number]
            self.under_way[index, number] = self.remote.remote(
                directory,
                index,
                (vectors.start, vectors.stop),
                (sequences.start, sequences.stop),
                threads,
                journal,
            )

    def result(self, index: int) -> CheckpointSlopes:
        """One checkpoint's slopes; waits for its tasks.

        Raises:
            ValueError: if a task failed for good.
        """
        pieces = []
        for number in range(len(self.tasks)):
            self._fill()
            reference = self.under_way[index, number]
            try:
                piece = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                raise ValueError(
                    f"a Ray task of checkpoint {index} must succeed, it failed: {reason}"
                ) from error
            del self.under_way[index, number]
            for kind, value in piece.passes.items():
                setattr(self.objective.passes, kind, getattr(self.objective.passes, kind) + value)
            pieces.append(piece)
        self._fill()
        return assemble_pieces(pieces, self.per_shard, self.bases)

    def cancel(self) -> None:
        """Withdraw what is still under way."""
        for reference in self.under_way.values():
            self.ray.cancel(reference)
        self.under_way.clear()
