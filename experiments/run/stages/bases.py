"""Stages ``basis:NAME``: the orthonormal directions that losses are projected on."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from experiments.config import BasisConfig
from experiments.run.memory.allocator import trim_memory
from experiments.run.memory.budget import krylov_in_files, memory_shares
from experiments.run.parts import Ledger, kept_parts, kept_products, mapped_rows
from experiments.run.run import Run
from experiments.run.stages.rotated import turned
from experiments.run.stages.training import trained_series
from polca_edit.allocation.allocate import Projections
from polca_edit.allocation.progress import progress
from polca_edit.artifacts import load_record, save_record
from polca_edit.basis import build
from polca_edit.basis.build import BasisInputs
from polca_edit.basis.hessian import BasisCheckpoint, EigenSettings, Keeping
from polca_edit.basis.path import odd_checkpoints
from polca_edit.basis.record import Basis
from polca_edit.basis.storage import stored_as
from polca_edit.checkpoints.files import SeriesFolder
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import Allocate


def run_basis(run: Run, stage: str) -> None:
    """Build one basis of the config, or turn another's."""
    spec = next(b for b in run.config.bases if b.label == stage.partition(":")[2])
    if spec.rotated:
        _run_rotated(run, stage, spec)
    else:
        _run_measured(run, spec)


def basis_of(run: Run, spec: BasisConfig) -> Basis:
    """A measured basis of a run, kept in its directory; the run is trained first where needed.

    Args:
        run: the run.
        spec: any basis section without a rotation; it need not be one of the config's.

    Raises:
        ValueError: for a rotated basis, which a run has only where its config names it.
    """
    if spec.rotated:
        raise ValueError(
            f"basis '{spec.label}' is turned from stored projections; name it in the config's bases"
        )
    trained_series(run)
    if not run.directory.finished(f"basis:{spec.label}", run.basis_key(spec)):
        started = time.perf_counter()
        _run_measured(run, spec)
        run.say(f"  {f'basis:{spec.label}':<24} {time.perf_counter() - started:7.1f} s")
    return load_record(Basis, run.directory.basis(spec.label))


def _run_measured(run: Run, spec: BasisConfig) -> None:
    path = run.directory.basis(spec.label)
    parts = run.directory.path / "basis" / f"{spec.label}.parts"
    checkpoints = run.observed()
    stage = f"basis:{spec.label}"
    with run.directory.stage(stage, run.basis_key(spec), [path], run.objective.passes, parts=parts):
        found = build_basis(run, spec, checkpoints, parts)
        save_record(path, found)
    if found.rounding is not None:
        run.say(f"  basis {spec.label}: {found.rounding}")


def _run_rotated(run: Run, stage: str, spec: BasisConfig) -> None:
    """Basis and projections at once, both turned from stored ones."""
    source = run.config.source_of(spec).label
    outputs = [run.directory.basis(spec.label), run.directory.projections(spec.label)]
    with run.directory.stage(stage, run.key(stage), outputs, run.objective.passes):
        basis, projections = turned(
            spec,
            load_record(Basis, run.directory.basis(source)),
            load_record(Projections, run.directory.projections(source)),
            run.task.splits.select,
            run.config.seed,
        )
        # Turned rows are rounded like those of the basis they are turned from.
        last, sample = run.observed()[-1], run.task.splits.curvature
        save_record(outputs[0], stored_as(basis, run.config.basis_storage, run.objective, last, sample))
        save_record(outputs[1], projections)


def build_basis(run: Run, spec: BasisConfig, checkpoints: Checkpoints, parts: Path) -> Basis:
    """The basis a config section asks for, by the one table of kinds."""
    mask = None if spec.include == ("*",) else run.task.space.mask(spec.include)
    storage = run.config.basis_storage
    if spec.steps is not None:
        source = basis_checkpoints(run, checkpoints, spec)
    elif spec.kind in build.FROM_THE_WHOLE_SERIES:
        source = checkpoints
    else:
        source = odd_checkpoints(checkpoints)
    inputs = basis_inputs(
        run,
        source,
        EigenSettings(
            spec.per_checkpoint,
            spec.tolerance,
            spec.max_products,
            run.config.seed,
            mask,
            run.config.sought_coarsely,
        ),
    )
    on_disk = mapped_in(parts / "rows.bin", checkpoints.dtype) if _on_disk(run, spec) else None
    held = memory_shares(run.config, run.task.space.size).displacements
    inputs = dataclasses.replace(inputs, keeping=Keeping(allocate=on_disk, displacements=held))
    if spec.kind != "hessian":
        return build.build_basis(spec.kind, inputs, spec.vectors, storage=storage)
    chosen = basis_checkpoints(run, checkpoints, spec)
    chosen = chosen.subset(range(min(inputs.places(spec.vectors), len(chosen))))
    with kept_basis(run, spec, len(chosen), parts) as keeping:
        given = dataclasses.replace(inputs, checkpoints=chosen, keeping=keeping)
        count = min(spec.vectors, len(chosen) * spec.per_checkpoint)
        return build.build_basis(spec.kind, given, count, storage=storage)


def basis_inputs(run: Run, checkpoints: Checkpoints, settings: EigenSettings) -> BasisInputs:
    """What the kinds of :mod:`polca_edit.basis.build` take: basis checkpoints and the curvature sample."""
    folder = SeriesFolder(run.directory.checkpoints)
    return BasisInputs(
        run.objective,
        checkpoints,
        run.task.splits.curvature,
        settings,
        run.task.logits,
        build.recorded_second_moments(folder, run.task.space, run.config.training.betas[1]),
    )


def row_bytes(run: Run, spec: BasisConfig) -> int:
    """What a row of a basis takes: the entries it may have, not all weights."""
    return run.task.space.count(spec.include) * run.config.itemsize


def _on_disk(run: Run, spec: BasisConfig) -> bool:
    """Whether a basis is too large for the share of memory that its rows have."""
    return spec.vectors * row_bytes(run, spec) > memory_shares(run.config, run.task.space.size).rows


def mapped_in(path: Path, dtype: torch.dtype = torch.float32) -> Allocate:
    """Makes a table in a mapped file."""
    return lambda rows, width: mapped_rows(path, rows, width, dtype)


@contextmanager
def kept_basis(run: Run, spec: BasisConfig, places: int, parts: Path) -> Iterator[Keeping]:
    """Hooks that keep every finished checkpoint and product of a basis on disk, with a progress bar."""
    ledger = Ledger(parts, run.objective.passes)
    keep = kept_parts(parts, BasisCheckpoint, ledger)
    each, large = row_bytes(run, spec), _on_disk(run, spec)
    budget = memory_shares(run.config, run.task.space.size).rows
    deep = krylov_in_files(run.config, spec, each, budget)
    numbers = itertools.count()
    dtype = torch.float64 if run.config.precision == "float64" else torch.float32
    finished = [load_record(BasisCheckpoint, p) for p in sorted(parts.glob("part-*.safetensors"))]
    # Only the last one's start vectors are wanted again.
    finished[:-1] = [dataclasses.replace(part, following=None) for part in finished[:-1]]
    indices = itertools.count(len(finished))
    bar = progress(None, f"basis {spec.label}", total=places, initial=len(finished))

    def note(part: BasisCheckpoint) -> None:
        # Written through the keeping map, so that cost and part survive together.
        index = next(indices)
        list(keep(lambda _: part, [index]))
        shutil.rmtree(parts / f"products-{index:05d}", ignore_errors=True)
        shutil.rmtree(parts / "krylov", ignore_errors=True)
        bar.update()

    with bar:
        yield Keeping(
            finished=finished,
            on_start=trim_memory,
            on_checkpoint=note,
            products=lambda index, product: kept_products(parts / f"products-{index:05d}", product, ledger),
            rows_in_memory=budget,
            allocate=mapped_in(parts / "rows.bin", dtype) if large else None,
            krylov=(
                lambda rows, width: mapped_rows(
                    parts / "krylov" / f"{next(numbers):05d}.bin", rows, width, dtype
                )
            )
            if deep
            else None,
        )


def basis_checkpoints(run: Run, checkpoints: Checkpoints, spec: BasisConfig) -> Checkpoints:
    """Where vectors are taken: the given steps, or spread as the config says, the last one included.

    Raises:
        ValueError: for steps that were not recorded, or more basis checkpoints than recorded ones.
    """
    if spec.steps is not None:
        missing = [s for s in spec.steps if s not in checkpoints.steps]
        if missing:
            raise ValueError(
                f"basis '{spec.label}' wants steps {missing[:5]} that were not recorded; record or drop them"
            )
        return checkpoints.subset([checkpoints.steps.index(s) for s in spec.steps])
    count = require_places(spec, len(checkpoints))
    if spec.placement == "equal":
        return checkpoints.spaced(count)
    sample = run.task.splits.curvature
    means = [
        float(run.objective.losses(checkpoints[i], sample).double().mean()) for i in range(len(checkpoints))
    ]
    return checkpoints.subset(equal_falls(means, count))


def require_places(spec: BasisConfig, recorded: int) -> int:
    """Basis checkpoints that a section needs.

    Args:
        spec: of a basis that takes vectors at checkpoints, or of displacements.
        recorded: T.

    Raises:
        ValueError: for more than there are.
    """
    count = -(-spec.vectors // (1 if spec.kind == "trajectory" else spec.per_checkpoint))
    if count > recorded - 1:
        raise ValueError(
            f"basis '{spec.label}' wants {count} checkpoints, only {recorded - 1} are recorded; "
            "lower vectors or raise per_checkpoint"
        )
    return count


def equal_falls(means: Sequence[float], count: int) -> list[int]:
    """Indices of ``count`` checkpoints at equal shares of the mean loss's fall, the last one included.

    The fall is that of the running minimum; where it is steep, checkpoints lie close together.

    >>> equal_falls([4.0, 3.9, 1.0, 0.9, 0.8], 2)
    [2, 4]
    """
    lowest = torch.tensor(means, dtype=torch.float64).cummin(0).values
    fall = lowest[0] - lowest
    chosen: list[int] = []
    for number in range(count):
        wanted = fall[-1] * (number + 1) / count
        first = int((fall >= wanted - 1e-12).nonzero()[0, 0]) if number < count - 1 else len(means) - 1
        # Steep stretches may offer fewer checkpoints than wanted: go on to the next free one, but
        # leave enough for those still to come.
        previous = chosen[-1] if chosen else 0
        chosen.append(min(max(first, previous + 1), len(means) - (count - number)))
    return chosen
