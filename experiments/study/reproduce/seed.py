"""All tables of one seed: training, bases, rotations, rival features, quadrature rules."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from experiments.config import Rotation
from experiments.run.run import Run
from experiments.run.run_record import open_evaluate
from experiments.run.stages.rotated import fit_rotation
from experiments.run.stages.training import trained_series
from experiments.study.measured import Say, second_order
from experiments.study.reproduce.carry import CARRY
from experiments.study.reproduce.measure import Measured, ReproductionSettings, measure_bases, scoring_of
from experiments.study.reproduce.rivals import (
    QuadratureRow,
    SecondOrderError,
    quadrature_rows,
    rival_rows,
    second_order_error,
)
from experiments.study.reproduce.rows import (
    BasisRow,
    FeatureRow,
    Paths,
    Scoring,
    TokenSplits,
    carry_columns,
    loss_shares,
)
from polca_edit.allocation.allocate import allocate
from polca_edit.basis.rotate import allocation_matrices

#: Every rotation of a span; the first name means none.
PLAIN, *ROTATIONS = get_args(Rotation)


@dataclass(frozen=True)
class SeedTables:
    """All rows of one seed.

    Attributes:
        seed: of the run.
        settings: they were made with.
        rows: bases and rotations.
        features: rival trajectories.
        quadrature: rules on the evaluate split.
        second_order: of the Hessian basis, where it was measured.
        seconds: it took.
    """

    seed: int
    settings: ReproductionSettings
    rows: tuple[BasisRow, ...]
    features: tuple[FeatureRow, ...]
    quadrature: tuple[QuadratureRow, ...]
    second_order: SecondOrderError | None
    seconds: float


def turned(measured: Measured, rotation: Rotation, splits: TokenSplits, seed: int) -> Measured:
    """The same span rotated, the rotation fitted on select."""
    turn = fit_rotation(rotation, allocation_matrices(measured.select), splits.select, seed, CARRY)
    return replace(
        measured,
        basis=measured.basis.rotated(turn, rotation, supervised=rotation == "contrastive"),
        select=measured.select.rotated(turn),
        evaluate=measured.evaluate.rotated(turn),
    )


def basis_row(
    kind: str, rotation: str, measured: Measured, splits: TokenSplits, scoring: Scoring
) -> BasisRow:
    """One row of the table of bases."""
    basis, residuals = measured.basis, measured.basis.residuals
    known = residuals[~residuals.isnan()]
    select, evaluate = (
        allocate(own, "trapezoid").projected_loss() for own in (measured.select, measured.evaluate)
    )
    return BasisRow(
        kind,
        rotation,
        basis.supervised,
        scoring.seed,
        len(basis),
        loss_shares(allocate(measured.evaluate, "quadrature"), splits.evaluate),
        captured_net=measured.captured[0],
        captured_path=measured.captured[1],
        carry=carry_columns(Paths(select, evaluate), measured.select, splits, scoring),
        passes=measured.passes,
        worst_residual=float(known.max()) if len(known) else None,
    )


def basis_rows(
    run: Run, measured: dict[str, Measured], settings: ReproductionSettings, say: Say
) -> Iterator[BasisRow]:
    """Every basis, and every rotation of the chosen spans."""
    scoring = scoring_of(run, settings)
    splits = TokenSplits(run.task.splits.select, run.task.splits.evaluate)
    for kind, own in measured.items():
        started = time.perf_counter()
        yield basis_row(kind, PLAIN, own, splits, scoring)
        for rotation in ROTATIONS if settings.tables and kind in settings.rotated else ():
            yield basis_row(kind, rotation, turned(own, rotation, splits, scoring.seed), splits, scoring)
        say(f"  rows of {kind:<20} {time.perf_counter() - started:6.1f} s")


@dataclass(frozen=True)
class ReproductionPlan:
    """What a reproduction looks at on the evaluate split: every basis and rotation of its settings.

    Attributes:
        evaluate_tokens: fingerprint of the split.
        settings: bases, rotations, rivals and quadrature.
    """

    evaluate_tokens: str
    settings: ReproductionSettings


def measure_seed(run: Run, settings: ReproductionSettings, say: Say) -> SeedTables:
    """All tables of one seed."""
    started = time.perf_counter()
    checkpoints = trained_series(run)
    open_evaluate(run, ReproductionPlan(run.task.splits.evaluate.fingerprint(), settings), by="reproduce")
    measured = measure_bases(run, checkpoints, settings, say)
    rows = tuple(basis_rows(run, measured, settings, say))
    features: tuple[FeatureRow, ...] = ()
    error: SecondOrderError | None = None
    if settings.tables and "hessian" in measured:
        hessian, curved = measured["hessian"], None
        if settings.rivals:
            curved = second_order(run, checkpoints, hessian.basis, hessian.select, hessian.evaluate)
            error = second_order_error(run, checkpoints, hessian.basis, curved[0])
        features = rival_rows(run, checkpoints, measured, curved, settings)
        say(f"  rival features done at {time.perf_counter() - started:.0f} s")
    quadrature = quadrature_rows(run, checkpoints, settings.tolerance) if settings.tables else ()
    seconds = time.perf_counter() - started
    return SeedTables(run.config.seed, settings, rows, features, quadrature, error, seconds)


def seed_tables(run: Run, settings: ReproductionSettings, say: Say) -> SeedTables:
    """The tables of one seed, kept with the run; what they were made from is dropped when they are done."""
    config, name = run.config, "study/tables.json"
    key = run.key_for(name, settings, config.clusters.model_dump(), config.breakthrough_delta)
    if run.directory.finished(name, key):
        say(f"seed {config.seed}, kept")
    else:
        say(f"seed {config.seed}")
    found = run.directory.kept(
        name, key, SeedTables, lambda: measure_seed(run, settings, say), run.objective.passes
    )
    for part in ("bases", "select", "evaluate", "nodes"):
        shutil.rmtree(run.directory / "kept" / "study" / part, ignore_errors=True)
    return found
