"""A run from checkpoints to a causal test at a Pythia shape, stage by stage, each in its own process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch

import polca_edit.checkpoints.files as weight_files
from experiments.run.driver import run_stages
from experiments.run.run import load_run, open_run
from experiments.study.pythia.kept import Cost, Notes, kept, measured, piece_path
from experiments.study.pythia.shapes import Amount, run_config
from experiments.verbs.guard import writing

#: Stages before discovery; ``evaluate`` is left to the causal test.
STAGES = (
    "basis:trajectory",
    "basis:hessian",
    "projections",
    "clusters:hessian",
    "clusters:trajectory",
    "damage:hessian",
    "damage:trajectory",
    "evaluate",
)
#: What discovery and the test draw for each null, beside the defaults of a run on two cores.
NULLS = 20


@contextmanager
def reading_counted() -> Iterator[Callable[[], int]]:
    """Within the block bytes of weight files that are read are counted."""
    real, total = safetensors.torch.load_file, [0]

    def counted(path: Path) -> Any:
        total[0] += os.path.getsize(path)
        return real(path)

    with mock.patch.object(weight_files, "load_file", counted):
        yield lambda: total[0]


def stage_cost(folder: Path, amount: Amount, memory_gb: float | None, stage: str) -> Cost:
    """One stage of the run in ``folder/run``."""

    def work() -> Notes:
        run = open_run(run_config(folder, amount, memory_gb), run_folder(folder, amount), say=lambda _: None)
        with reading_counted() as read, writing(run.directory.path):
            run_stages(run, stages=[stage])
        record = next(r for r in run.directory.stage_records() if r.stage == stage)
        files = [run.directory.path / name for name in record.files]
        routes = run.objective
        return {
            "stage_seconds": record.seconds,
            "hvps": record.passes["hvp"] / run.task.splits.curvature.sequences,
            "forward_sequences": record.passes["forward"],
            "tangent_sequences": record.passes["tangent"],
            "bytes_read": read(),
            "bytes_written": sum(path.stat().st_size for path in files if path.exists()),
            "batch_bytes": routes.batch_bytes,
            "streamed_batches": routes.streamed_batches,
            "route": routes.route_used,
            "curvature_route": routes.curvature_route,
            "route_note": routes.route_note,
        }

    return measured(work)


def run_folder(folder: Path, amount: Amount) -> Path:
    """Where a run of some amount lies."""
    return folder / ("run" if amount == Amount() else f"run-{amount.name}")


def discovered(run: Path) -> Cost:
    """``polca-edit discover RUN --basis trajectory``."""
    from experiments.discover.verb import discover

    def work() -> Notes:
        discover(run, basis=["trajectory"], nulls=NULLS - 1, workers=1)
        return _passes(run)

    return measured(work)


def tested(run: Path) -> Cost:
    """``polca-edit test RUN --basis trajectory``."""
    from experiments.verdicts.verb import causal_test

    def work() -> Notes:
        causal_test([run], basis=["trajectory"], rotations=NULLS, draws=NULLS - 1, workers=1)
        return _passes(run)

    return measured(work)


def _passes(run: Path) -> Notes:
    records = load_run(run, say=lambda _: None).directory.stage_records()
    return {"hvp_of_all_stages": sum(record.passes.get("hvp", 0.0) for record in records)}


def whole_run(
    folder: Path, amount: Amount, memory_gb: float | None, *, finished: bool = False
) -> dict[str, Cost]:
    """Every stage, discovery and the causal test on the trajectory basis; finished ones are read back.

    Args:
        folder: with checkpoints; pieces and run come there.
        amount: how much is looked at.
        memory_gb: budget of the run.
        finished: only what is finished already.
    """
    place, run = folder / "pieces", run_folder(folder, amount)
    works: dict[str, Callable[[], Cost]] = {
        stage: partial(stage_cost, folder, amount, memory_gb, stage) for stage in STAGES
    }
    works |= {"discover": partial(discovered, run), "test": partial(tested, run)}
    names = {stage: f"{run.name} {stage}" for stage in works}
    return {
        stage: kept(place, names[stage], work)
        for stage, work in works.items()
        if not finished or piece_path(place, names[stage]).exists()
    }
