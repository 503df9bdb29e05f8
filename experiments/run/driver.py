"""The one driver of a run: every stage in order, each done once for its key."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from experiments.discover.stages import run_signatures, run_timeline
from experiments.run.keys import stage_names, window_of
from experiments.run.memory.allocator import trim_memory
from experiments.run.run import Run
from experiments.run.run_record import write_run_record
from experiments.run.stages.bases import run_basis
from experiments.run.stages.clusters import run_clusters
from experiments.run.stages.damage import run_damage
from experiments.run.stages.evaluate import run_evaluate
from experiments.run.stages.projections import run_projections
from experiments.run.stages.training import run_training

#: Stage, or what its name begins with before the colon -> body.
BODIES: dict[str, Callable[[Run, str], None]] = {
    "train": run_training,
    "basis": run_basis,
    "projections": run_projections,
    "clusters": run_clusters,
    "damage": run_damage,
    "signatures": run_signatures,
    "timeline": run_timeline,
    "evaluate": run_evaluate,
}


def run_stages(run: Run, redo: Sequence[str] = (), stages: Sequence[str] | None = None) -> None:
    """Run every stage that is not finished, in order.

    Args:
        run: the run.
        redo: stages to run again even if finished.
        stages: which stages; default all of the config.
    """
    for stage in stage_names(run.config) if stages is None else stages:
        started = time.perf_counter()
        if stage in redo:
            run.directory.stage_file(stage).unlink(missing_ok=True)
        if run.directory.finished(stage, run.key(stage)):
            run.say(f"  {stage:<24} done before, kept")
            continue
        BODIES[window_of(stage.partition(":")[0])[0]](run, stage)
        trim_memory()
        run.say(f"  {stage:<24} {time.perf_counter() - started:7.1f} s")
        if stage.startswith("basis:") and run.objective.curvature_route and run.objective.route_note:
            run.say(f"  products by route {run.objective.curvature_route}: {run.objective.route_note}")
    write_run_record(run)
