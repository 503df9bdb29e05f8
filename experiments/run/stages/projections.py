"""Stage ``projections``: derivatives along every measured basis, one checkpoint after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.run.engines import slope_engine
from experiments.run.parts import Ledger, kept_parts, part_path
from experiments.run.pieces import products_of
from experiments.run.run import Run
from polca_edit.allocation.allocate import Allocation, CheckpointSlopes, allocate
from polca_edit.allocation.directions import directions_at
from polca_edit.allocation.gaps import sparse_intervals
from polca_edit.allocation.progress import progress
from polca_edit.allocation.terms import assemble_for, places_of, with_curvature
from polca_edit.artifacts import load_record, save_record
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.rounding import slope_rounding

#: Quadrature error of a token, as a share of its change, that is not worth a line; intervals one names.
TOLERATED, NAMED = 0.05, 8


@dataclass(frozen=True)
class SlopeRounding:
    """Error of a run's slopes for their matrix products in fewer bits.

    Attributes:
        products: type of the products.
        steps: of the checkpoints at which it was measured.
        errors: relative to the slopes' root mean square, one a checkpoint.
    """

    products: str
    steps: tuple[int, ...]
    errors: tuple[float, ...]

    def __str__(self) -> str:
        return (
            f"slopes by products in {self.products}: off by {max(self.errors):.1e} of their root mean square"
        )


def run_projections(run: Run, stage: str) -> None:
    """Project the select split; finished checkpoints survive an interruption."""
    labels = [basis.label for basis in run.config.measured_bases()]
    bases = [load_record(Basis, run.directory.basis(label)) for label in labels]
    rule, series, tokens = run.config.rule, run.observed(), run.task.splits.select
    places = places_of(series, rule)
    parts = run.directory.path / "projections" / "parts"
    outputs, products = [run.directory.projections(label) for label in labels], products_of(run.config)
    with run.directory.stage(stage, run.key(stage), outputs, run.objective.passes, parts=parts):
        mapped = kept_parts(parts, CheckpointSlopes, Ledger(parts, run.objective.passes))
        if products is not None:
            rounding = measured_rounding(run, places, bases, products)
            save_record(run.directory.path / "projections" / "rounding.json", rounding)
            run.say(f"  {rounding}")
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


def measured_rounding(
    run: Run, places: Checkpoints, bases: list[Basis], products: torch.dtype
) -> SlopeRounding:
    """What products in fewer bits cost at the first, the middle and the last place."""
    steps, errors = [], []
    for index in sorted({0, len(places) // 2, len(places) - 1}):
        theta, rows = directions_at(places, bases, index)
        planned = len(rows) * len(places)
        tokens = run.task.splits.select
        errors.append(slope_rounding(run.objective, theta, rows, tokens, products, expected=planned))
        steps.append(places.steps[index])
    return SlopeRounding(run.config.slope_products, tuple(steps), tuple(errors))


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
