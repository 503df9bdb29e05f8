"""Stage ``projections``: derivatives along every measured basis, one checkpoint after the other."""

from __future__ import annotations

from experiments.run.engines import slope_engine
from experiments.run.parts import Ledger, kept_parts, part_path
from experiments.run.run import Run
from polca_edit.allocation.allocate import Allocation, CheckpointSlopes, allocate
from polca_edit.allocation.gaps import sparse_intervals
from polca_edit.allocation.progress import progress
from polca_edit.allocation.terms import assemble_for, places_of, with_curvature
from polca_edit.artifacts import load_record, save_record
from polca_edit.basis.record import Basis

#: Quadrature error of a token, as a share of its change, that is not worth a line; intervals one names.
TOLERATED, NAMED = 0.05, 8


def run_projections(run: Run, stage: str) -> None:
    """Project the select split; finished checkpoints survive an interruption."""
    labels = [basis.label for basis in run.config.measured_bases()]
    bases = [load_record(Basis, run.directory.basis(label)) for label in labels]
    rule, series, tokens = run.config.rule, run.observed(), run.task.splits.select
    places = places_of(series, rule)
    parts = run.directory.path / "projections" / "parts"
    outputs = [run.directory.projections(label) for label in labels]
    with run.directory.stage(stage, run.key(stage), outputs, run.objective.passes, parts=parts):
        mapped = kept_parts(parts, CheckpointSlopes, Ledger(parts, run.objective.passes))
        indices = range(len(places))
        wanted = [i for i in indices if not part_path(parts, i).exists()]
        with slope_engine(run, places, bases, tokens, wanted) as at:
            slopes = list(progress(mapped(at, indices), "projections", total=len(indices)))
        if run.objective.route_note:
            run.say(f"  derivatives by route {run.objective.route_used}: {run.objective.route_note}")
        for number, (basis, path) in enumerate(zip(bases, outputs, strict=True)):
            projections = assemble_for(rule, series, basis, number, slopes)
            if rule == "second_order":
                sample = run.task.splits.curvature
                projections = with_curvature(run.objective, series, basis, sample, projections)
            save_record(path, projections)
            if number == 0:  # the error is the same for every basis
                for line in gap_lines(allocate(projections, rule)):
                    run.say(f"  {line}")


def gap_lines(allocation: Allocation) -> list[str]:
    """Where checkpoints are too far apart, in a sentence; nothing where a token's error is small."""
    error, exact = allocation.quadrature_error.double(), allocation.exact.double()
    size = float(error.sum(0).abs().mean() / exact.sum(0).abs().mean().clamp_min(1e-300))
    if size <= TOLERATED:
        return []
    steps = allocation.steps.tolist()
    wide = sparse_intervals(steps, error)
    named = ", ".join(f"{found} ({found.share:.0%})" for found in wide[:NAMED])
    return [
        f"quadrature misses {size:.1%} of a token's loss change, half of that in {len(wide)} of "
        f"{len(steps) - 1} intervals{', first ' if len(wide) > NAMED else ': '}{named}; record more there "
        "(training.record: adaptive), set rule to simpson, or leave those steps out"
    ]
