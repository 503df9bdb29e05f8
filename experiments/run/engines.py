"""Where the derivatives of a run are computed: in this process, or on a Ray cluster.

Both engines cut the work of a checkpoint into the same tasks (:mod:`experiments.run.pieces`), run the same
function on each and put the pieces together in the same order, so that they write the same bytes. Finished
checkpoints are kept by the caller (``parts.kept_parts``); an engine is only told which ones are still wanted.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from experiments.run.pieces import (
    Along,
    Blocks,
    Measured,
    Piece,
    Task,
    assemble_pieces,
    compute_piece,
    products_of,
)
from experiments.run.run import Run, load_run
from polca_edit.allocation.allocate import CheckpointSlopes
from polca_edit.allocation.terms import places_of
from polca_edit.artifacts import load_columns, load_record
from polca_edit.basis.record import Basis
from polca_edit.basis.subsets import Subset
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.tokens import TokenSet


def local_slopes(given: Measured, index: int, blocks: Blocks) -> CheckpointSlopes:
    """One checkpoint, task after task, in this process."""
    space = given.objective.space
    parts = blocks.of(space)
    tasks = blocks.tasks(given.rows, given.tokens.sequences, len(parts))
    along = given.along(index) if len(parts) > 1 else None
    pieces = [compute_piece(given, index, task, parts[task.block], along) for task in tasks]
    return assemble_pieces(tasks, pieces, given.bases)


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
    blocks = Blocks(config.vector_block, config.token_shard, config.parameter_block)
    given = Measured(run.objective, checkpoints, bases, tokens, products_of(config))
    if config.engine == "local":
        yield lambda index: local_slopes(given, index, blocks)
        return
    with ray_session(config.engine_address, run.say) as ray:
        queue = TaskQueue(RayPool(ray, run.directory.path.absolute()), given, wanted, blocks)
        try:
            yield queue.result
        finally:
            queue.cancel()


# -- tasks under way --------------------------------------------------------------------------------


class Pool(Protocol):
    """Where tasks run: a Ray cluster, or whatever a test puts in its place."""

    @property
    def cores(self) -> int:
        """Tasks that run at once."""
        ...

    def submit(self, call: WorkerCall) -> Any:
        """Start a task; what is returned is given back to :meth:`get` or :meth:`cancel`."""
        ...

    def get(self, handle: Any) -> Piece:
        """Wait for a task; one that is lost with its worker is started again before.

        Raises:
            ValueError: for a task that failed, or was lost too often.
        """
        ...

    def cancel(self, handle: Any) -> None:
        """Withdraw a task."""
        ...


class TaskQueue:
    """Tasks of the wanted checkpoints, at most a few per core under way.

    Results are taken in task order, whatever order they finish in.
    """

    def __init__(
        self, pool: Pool, given: Measured, wanted: Sequence[int], blocks: Blocks, *, per_core: int = 2
    ) -> None:
        self.pool, self.given, self.blocks = pool, given, blocks
        self.count = len(blocks.of(given.objective.space))
        self.tasks = blocks.tasks(given.rows, given.tokens.sequences, self.count)
        self.ahead = max(1, per_core * pool.cores)
        self.pending = deque((index, number) for index in wanted for number in range(len(self.tasks)))
        self.under_way: dict[tuple[int, int], Any] = {}
        self.along: dict[int, Along] = {}

    def _fill(self) -> None:
        """Back-pressure: submit only while few tasks are under way or waiting to be taken."""
        while self.pending and len(self.under_way) < self.ahead:
            index, number = self.pending.popleft()
            if self.count > 1 and index not in self.along:
                self.along[index] = self.given.along(index)
            call = WorkerCall(index, self.tasks[number], self.blocks.parameters, self.along.get(index))
            self.under_way[index, number] = self.pool.submit(call)

    def result(self, index: int) -> CheckpointSlopes:
        """One checkpoint's slopes; waits for its tasks.

        Raises:
            ValueError: if a task failed for good.
        """
        pieces = []
        for number in range(len(self.tasks)):
            self._fill()
            piece = self.pool.get(self.under_way.pop((index, number)))
            passes = self.given.objective.passes
            for kind, value in piece.passes.items():
                setattr(passes, kind, getattr(passes, kind) + value)
            pieces.append(piece)
        self._fill()
        self.along.pop(index, None)
        return assemble_pieces(self.tasks, pieces, self.given.bases)

    def cancel(self) -> None:
        """Withdraw what is still under way."""
        for handle in self.under_way.values():
            self.pool.cancel(handle)
        self.under_way.clear()


# -- a worker ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkerCall:
    """What travels to a worker.

    Attributes:
        index: of the checkpoint.
        task: which piece of its work.
        parameters: weights of a block at most; None: one block.
        along: see :func:`~experiments.run.pieces.compute_piece`.
    """

    index: int
    task: Task
    parameters: int | None
    along: Along | None


@dataclass
class Opened:
    """A run as a worker sees it: kept between tasks, so that a model is traced once per worker.

    Rows are those of one block of parameters, read from the columns of the stored file; the rest is never
    in the worker's memory.
    """

    run: Run
    checkpoints: Checkpoints
    block: tuple[int | None, int] | None = None
    bases: tuple[Basis, ...] = ()

    @classmethod
    def at(cls, directory: Path) -> Opened:
        """The run of a directory."""
        run = load_run(directory, lambda text: None)
        return cls(run, places_of(run.observed(), run.config.rule))

    def measured(self, call: WorkerCall) -> tuple[Measured, Subset | None]:
        """What a call is about, with the rows of its block, and the block."""
        block = Blocks(parameters=call.parameters).of(self.run.task.space)[call.task.block]
        if self.block != (call.parameters, call.task.block):
            self.bases = ()  # before the next block is read
            paths = [self.run.directory.basis(spec.label) for spec in self.run.config.measured_bases()]
            self.bases = tuple(stored_rows(path, block) for path in paths)
            self.block = call.parameters, call.task.block
        tokens, products = self.run.task.splits.select, products_of(self.run.config)
        return Measured(self.run.objective, self.checkpoints, self.bases, tokens, products), block


def stored_rows(path: Path, block: Subset | None) -> Basis:
    """A stored basis, or its part inside a block of parameters."""
    if block is None:
        return load_record(Basis, path)
    slim = load_columns(Basis, path, "entries", [(0, 0)])
    inside = None if slim.ranges is None else Subset.of_tensor(slim.size or 0, slim.ranges)
    common = block if inside is None else inside.common(block)
    found = load_columns(Basis, path, "entries", common.places(inside))
    return replace(found, ranges=common.tensor(), size=common.size)


_OPEN: dict[str, Opened] = {}


def worker_task(directory: str, call: WorkerCall, threads: int, journal: str | None) -> Piece:
    """One task on a worker: the run is read from the shared file system, only the piece travels."""
    if journal is not None:
        name = f"{call.index}-{call.task.vectors[0]}-{call.task.sequences[0]}-{call.task.block}-{os.getpid()}"
        (Path(journal) / name).touch()
    if directory not in _OPEN:
        torch.set_num_threads(threads)
        _OPEN[directory] = Opened.at(Path(directory))
    given, block = _OPEN[directory].measured(call)
    return compute_piece(given, call.index, call.task, block, call.along)


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


#: What a cluster of this machine's cores sets aside for pieces on their way, bytes: Ray's least is 78 MB.
OBJECT_STORE = 256 << 20


@contextmanager
def ray_session(address: str | None, say: Callable[[str], None] = lambda text: None) -> Iterator[Any]:
    """A connection to a cluster, or a cluster of this machine's cores while the block lasts.

    A connection that was open before stays open. A cluster that is started here gets an object store of
    :data:`OBJECT_STORE` bytes; pieces beyond it are spilt to files of the session's directory.

    Args:
        address: of the head node, ``auto`` for the one on this machine; None also reads RAY_ADDRESS.
        say: where the line about the store goes.
    """
    ray = require_ray()
    opened = not ray.is_initialized()
    if opened:
        here = address is None and not os.environ.get("RAY_ADDRESS")
        store = {"object_store_memory": OBJECT_STORE} if here else {}
        ray.init(
            address=address, log_to_driver=False, include_dashboard=False, logging_level="error", **store
        )
    size = int(ray.cluster_resources().get("object_store_memory", 0))
    say(f"  Ray object store {size / 1e6:.0f} MB; pieces beyond it are spilt to the session's directory")
    try:
        yield ray
    finally:
        if opened:
            ray.shutdown()


class RayPool:
    """Tasks on a Ray cluster. One whose worker dies is started again by Ray, up to ``retries`` times."""

    def __init__(self, ray: Any, directory: Path, *, retries: int = 4) -> None:
        self.ray = ray
        self.remote = ray.remote(max_retries=retries, num_cpus=1)(worker_task)
        self.directory, self.threads = str(directory), torch.get_num_threads()
        self.journal = os.environ.get("POLCA_EDIT_JOURNAL")

    @property
    def cores(self) -> int:
        """CPUs of the cluster."""
        return int(self.ray.cluster_resources().get("CPU", 1))

    def submit(self, call: WorkerCall) -> Any:
        """A reference to the piece."""
        return self.remote.remote(self.directory, call, self.threads, self.journal)

    def get(self, handle: Any) -> Piece:
        """The piece of a reference.

        Raises:
            ValueError: for a task that failed for good.
        """
        try:
            piece: Piece = self.ray.get(handle)
        except self.ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"a Ray task must succeed, it failed: {reason}; look at its log, or use --engine local"
            ) from error
        return piece

    def cancel(self, handle: Any) -> None:
        """Withdraw a task."""
        self.ray.cancel(handle)
