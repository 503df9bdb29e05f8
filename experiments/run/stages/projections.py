"""Stage ``projections``: derivatives along every measured basis, one checkpoint after the other."""

from __future__ import annotations

import dataclasses

from tqdm import tqdm

from experiments.run.engines import slope_engine
from experiments.run.parts import Ledger, kept_parts, part_path
from experiments.run.run import Run
from polca_edit.allocation.allocate import CheckpointSlopes, Projections, assemble, second_order_terms
from polca_edit.artifacts import load_record, save_record
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.series import Checkpoints


def run_projections(run: Run, stage: str) -> None:
    """Project the select split; finished checkpoints survive an interruption."""
    labels = [basis.label for basis in run.config.measured_bases()]
    bases = [load_record(Basis, run.directory.basis(label)) for label in labels]
    checkpoints, tokens = run.observed(), run.task.splits.select
    parts = run.directory.path / "projections" / "parts"
    outputs = [run.directory.projections(label) for label in labels]
    with run.directory.stage(stage, run.key(stage), outputs, run.objective.passes, parts=parts):
        mapped = kept_parts(parts, CheckpointSlopes, Ledger(parts, run.objective.passes))
        indices = range(len(checkpoints))
        wanted = [i for i in indices if not part_path(parts, i).exists()]
        with slope_engine(run, checkpoints, bases, tokens, wanted) as at:
            slopes = list(
                tqdm(mapped(at, indices), total=len(indices), desc="projections", disable=None, leave=False)
            )
        if run.objective.route_note:
            run.say(f"  derivatives by route {run.objective.route_used}: {run.objective.route_note}")
        for number, (basis, path) in enumerate(zip(bases, outputs, strict=True)):
            projections = assemble(checkpoints, basis, number, slopes)
            save_record(path, _with_curvature(run, checkpoints, basis, projections))


def _with_curvature(
    run: Run, checkpoints: Checkpoints, basis: Basis, projections: Projections
) -> Projections:
    """Terms of Eq. 6 where the config's rule needs them."""
    if run.config.rule != "second_order":
        return projections
    means, curvatures = second_order_terms(run.objective, checkpoints, basis, run.task.splits.curvature)
    return dataclasses.replace(projections, mean_gradients=means, curvatures=curvatures)
