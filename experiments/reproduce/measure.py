"""What a reproduction measures with the model at hand: training, bases, projections on both splits."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from experiments.config import Rotation
from experiments.reproduce.rows import TokenSplits
from experiments.run.parts import Ledger, kept_parts, spent_on
from experiments.run.rotated import fit_rotation
from experiments.run.stages import Run, recorder_of, training_settings
from interventions.edits import weights_fingerprint
from polca_edit.allocation.allocate import CheckpointSlopes, Projections, project
from polca_edit.allocation.quadrature import (
    FixedRule,
    NodeSlopes,
    QuadratureReport,
    adaptive_plan,
    fixed_plan,
    measure_nodes,
)
from polca_edit.artifacts import load_record, save_record
from polca_edit.basis.build import (
    KINDS,
    BasisInputs,
    build_basis,
    output_logits,
    recorded_second_moments,
)
from polca_edit.basis.path import odd_checkpoints
from polca_edit.basis.record import Basis, capture
from polca_edit.basis.rotate import allocation_matrices
from polca_edit.checkpoints.files import write_json
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import PassCount
from polca_edit.tokens import TokenSet
from polca_edit.training import train

#: Forward passes one unit of each kind costs (measured on a small model; a backward pass counts two).
PASS_COST = {"forward": 1.0, "backward": 2.0, "tangent": 1.7, "hvp": 5.0}
ROTATED = ("trajectory_secant", "loss_weighted", "hessian")
#: Bases that get the full number of vectors; the others get ``Settings.others``.
MAIN = ("hessian", "shuffled_hessian", "trajectory", "trajectory_secant", "loss_weighted", "random")
#: Row label -> rotation.
ROTATIONS: dict[str, Rotation] = {
    "varimax": "varimax",
    "quartimax": "quartimax",
    "joint_diagonal": "joint",
    "joint_diagonal_centred": "joint_centred",
    "joint_diagonal_normalised": "joint_normalised",
    "fastica": "fastica",
    "contrastive": "contrastive",
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Sizes of a reproduction.

    Attributes:
        vectors: K of every basis; None for a quarter of the intervals, at most 50.
        others: K of the bases not in ``MAIN``; None for the same.
        kinds: bases.
        rotated: bases whose span is rotated.
        rivals: whether rival features that need derivatives of their own are measured.
        tolerance: of the adaptive quadrature.
        draws: bootstrap samples of each stability.
        rule: quadrature on evaluate, ``adaptive`` or a fixed rule, which takes fewer places.
        tables: rotations, rival features and the table of quadrature rules, besides the bases.
    """

    vectors: int | None = None
    others: int | None = None
    kinds: tuple[str, ...] = tuple(KINDS)
    rotated: tuple[str, ...] = ROTATED
    rivals: bool = True
    tolerance: float = 0.01
    draws: int = 4
    rule: FixedRule | Literal["adaptive"] = "adaptive"
    tables: bool = True


@dataclass(frozen=True)
class Measured:
    """One basis on both splits, with what it cost (forward passes over the select tokens)."""

    basis: Basis
    select: Projections
    evaluate: Projections
    captured: tuple[float, float]
    passes: float


def cost(spent: Mapping[str, float], sequences: int) -> float:
    """Work in forward passes over ``sequences`` sequences."""
    return sum(PASS_COST[kind] * spent[kind] for kind in PASS_COST) / sequences


def trained(run: Run, say: Say) -> Checkpoints:
    """The run's checkpoints, training (or resuming) first where needed."""
    if not (run.directory.checkpoints / "series.json").exists():
        started = time.perf_counter()
        assert run.task.batch_loss is not None
        train(
            copy.deepcopy(run.task.module),
            run.task.batch_loss,
            training_settings(run.config),
            recorder=recorder_of(run),
            data_order=run.task.data_order,
        )
        say(f"  trained in {time.perf_counter() - started:.0f} s")
    return run.checkpoints()


def basis_inputs(run: Run, checkpoints: Checkpoints) -> BasisInputs:
    """Odd checkpoints and the curvature sample."""
    recorder = recorder_of(run)
    return BasisInputs(
        run.objective,
        odd_checkpoints(checkpoints),
        run.task.splits.curvature,
        output_logits if run.config.task == "arithmetic" else None,
        recorded_second_moments(recorder.folder, run.task.space, run.config.training.betas[1]),
        run.config.seed,
    )


@dataclass(frozen=True)
class Parts:
    """Finished parts of a measurement, so that an interrupted one goes on where it stopped.

    Attributes:
        folder: of this run; removed when the seed is finished.
        passes: running count of the objective.
    """

    folder: Path
    passes: PassCount

    def basis(self, kind: str, count: int, build: Callable[[], Basis]) -> tuple[Basis, dict[str, float]]:
        """A basis, built or read back, with the passes it cost."""
        path = self.folder / f"basis-{kind}-{count}.safetensors"
        bill = path.with_suffix(".json")
        if bill.exists():
            return load_record(Basis, path), json.loads(bill.read_text())
        before = self.passes.as_dict()
        basis = build()
        spent = {kind: done - before[kind] for kind, done in self.passes.as_dict().items()}
        save_record(path, basis)
        write_json(bill, spent)
        return basis, spent

    def at(self, stage: str, *inputs: object) -> Path:
        """Folder of the parts of one stage; another input gets another folder."""
        digest = hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]
        folder = self.folder / f"{stage}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def measure_bases(
    run: Run, checkpoints: Checkpoints, settings: Settings, say: Say
) -> tuple[dict[str, Measured], dict[str, Any]]:
    """Build every basis and project it on both splits; the evaluate split gets adaptive nodes too."""
    objective, splits = run.objective, run.task.splits
    inputs = basis_inputs(run, checkpoints)
    parts = Parts(run.directory.path / "parts", objective.passes)
    count = settings.vectors or min(50, (len(checkpoints) - 1) // 4)
    built: dict[str, tuple[Basis, float]] = {}
    for kind in settings.kinds:
        started = time.perf_counter()
        wanted = count if kind in MAIN or settings.others is None else min(count, settings.others)
        basis, spent = parts.basis(kind, wanted, functools.partial(build_basis, kind, inputs, wanted))
        built[kind] = (basis, cost(spent, splits.select.sequences))
        say(f"  basis {kind:<20} {time.perf_counter() - started:6.1f} s")
    bases = [basis for basis, _ in built.values()]
    rows = [weights_fingerprint(basis.rows.flatten()) for basis in bases]

    def slopes(split: str, tokens: TokenSet) -> tuple[list[Projections], dict[str, float]]:
        place = parts.at(split, rows, tokens.fingerprint(), checkpoints.steps)
        kept = kept_parts(place, CheckpointSlopes, Ledger(place, objective.passes))
        found = project(objective, checkpoints, bases, tokens, mapped=kept)
        return found, spent_on(place)

    started = time.perf_counter()
    select, spent = slopes("select", splits.select)
    share = cost(spent, splits.select.sequences) / sum(len(b) for b in bases)
    say(f"  projected on select in {time.perf_counter() - started:.0f} s")
    started = time.perf_counter()
    evaluate, _ = slopes("evaluate", splits.evaluate)
    report: QuadratureReport | None = None
    if settings.rule == "adaptive":
        plan, report = adaptive_plan(
            objective, checkpoints, splits.evaluate, splits.evaluate.skills, tolerance=settings.tolerance
        )
    else:
        plan = fixed_plan(settings.rule, len(checkpoints) - 1)
    places = (plan.interval.tolist(), plan.position.tolist())
    place = parts.at("nodes", rows, splits.evaluate.fingerprint(), checkpoints.steps, places)
    evaluate = measure_nodes(
        objective,
        checkpoints,
        bases,
        splits.evaluate,
        plan,
        evaluate,
        mapped=kept_parts(place, NodeSlopes, Ledger(place, objective.passes)),
    )
    say(f"  projected on evaluate in {time.perf_counter() - started:.0f} s, {plan.nodes} places")
    measured = {}
    for (kind, (basis, price)), own, other in zip(built.items(), select, evaluate, strict=True):
        captured = capture(basis.rows, checkpoints)
        measured[kind] = Measured(basis, own, other, captured, price + share * len(basis))
    return measured, {} if report is None else dataclasses.asdict(report)


def rotations_of(measured: Measured, splits: TokenSplits, seed: int) -> dict[str, Tensor]:
    """Every rotation of a span, fitted on select."""
    matrices = allocation_matrices(measured.select)
    return {
        label: fit_rotation(rotation, matrices, splits.select, seed, splits.skill)
        for label, rotation in ROTATIONS.items()
    }
