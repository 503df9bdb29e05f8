"""Bases of a recorded run and their projections, kept in the run's store; every study starts from them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch

from experiments.run.parts import Ledger, kept_parts
from experiments.run.run import Run
from experiments.run.stages.bases import basis_inputs
from interventions.edits import weights_fingerprint
from polca_edit.allocation.allocate import CheckpointSlopes, Projections, project
from polca_edit.allocation.terms import second_order_terms
from polca_edit.artifacts import load_record, save_record
from polca_edit.basis.build import build_basis
from polca_edit.basis.hessian import EigenSettings
from polca_edit.basis.path import odd_checkpoints
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.tokens import TokenSet

#: Forward passes one unit of each kind costs (measured on a small model; a backward pass counts two).
PASS_COST = {"forward": 1.0, "backward": 2.0, "tangent": 1.7, "hvp": 5.0}
#: Sequences of the curvature sample that Eq. 6's mean terms are taken on: one Hessian-vector product
#: per vector and checkpoint is its dearest part.
CURVATURE_SUMS = 64
Say = Callable[[str], None]
Part = TypeVar("Part")
Mapped = Callable[[Callable[[int], Part], Sequence[int]], Iterator[Part]]


@dataclass(frozen=True)
class OnSelect:
    """One basis on the select split.

    Attributes:
        basis: its vectors.
        projections: on select.
        passes: forward passes over the select tokens that building and projecting it took.
    """

    basis: Basis
    projections: Projections
    passes: float


def cost(spent: Mapping[str, float], sequences: int) -> float:
    """Work in forward passes over ``sequences`` sequences."""
    return sum(PASS_COST[kind] * spent[kind] for kind in PASS_COST) / sequences


def spent_on(run: Run, name: str) -> Mapping[str, float]:
    """Passes that a kept record of the run took when it was made."""
    record = run.directory.record(name)
    assert record is not None
    return record.passes


def kept_projections(
    run: Run,
    name: str,
    depends: object,
    count: int,
    part: type[Part],
    measure: Callable[[Mapped[Part]], Sequence[Projections]],
) -> list[Projections]:
    """Projections of several bases, kept in the run's store; an interrupted measurement goes on.

    Args:
        run: where they are kept.
        name: of the measurement, unique in the run directory.
        depends: what they depend on besides weights and data.
        count: of bases.
        part: record of one finished piece.
        measure: makes them with a map that keeps its pieces.
    """
    key, passes = run.key_for(name, depends), run.objective.passes
    outputs = [run.directory / "kept" / name / f"{index}.safetensors" for index in range(count)]
    if not run.directory.finished(name, key):
        parts = run.directory / "parts" / name
        with run.directory.stage(name, key, outputs, passes, parts=parts):
            found = measure(kept_parts(parts, part, Ledger(parts, passes)))
            for path, own in zip(outputs, found, strict=True):
                save_record(path, own)
    return [load_record(Projections, path) for path in outputs]


def fingerprints(bases: Sequence[Basis]) -> list[str]:
    """Hash of each basis's vectors."""
    return [weights_fingerprint(basis.rows.flatten()) for basis in bases]


def projected(
    run: Run, checkpoints: Checkpoints, bases: Sequence[Basis], split: Literal["select", "evaluate"]
) -> list[Projections]:
    """Projections of several bases on one split, in one go over the checkpoints."""
    tokens: TokenSet = getattr(run.task.splits, split)
    return kept_projections(
        run,
        f"study/{split}",
        (fingerprints(bases), tokens.fingerprint(), checkpoints.steps),
        len(bases),
        CheckpointSlopes,
        lambda mapped: project(run.objective, checkpoints, bases, tokens, mapped=mapped),
    )


def on_select(run: Run, checkpoints: Checkpoints, counts: Mapping[str, int], say: Say) -> dict[str, OnSelect]:
    """Bases by kind and their projections on select, kept in the store.

    Args:
        run: its weights and data.
        checkpoints: the recorded series.
        counts: kind -> number of vectors.
        say: told what took how long.
    """
    settings = EigenSettings(tolerance=0.05, max_products=24, seed=run.config.seed)
    inputs, bases, prices = basis_inputs(run, odd_checkpoints(checkpoints), settings), [], []
    sequences = run.task.splits.select.sequences
    for kind, count in counts.items():
        started, name = time.perf_counter(), f"study/bases/{kind}-{count}"
        build = functools.partial(build_basis, kind, inputs, count)
        key = run.key_for(name, checkpoints.steps)
        bases.append(run.directory.kept(name, key, Basis, build, run.objective.passes))
        prices.append(cost(spent_on(run, name), sequences))
        say(f"  basis {kind:<20} {time.perf_counter() - started:6.1f} s")
    started = time.perf_counter()
    found = projected(run, checkpoints, bases, "select")
    say(f"  projected on select in {time.perf_counter() - started:.0f} s")
    share = cost(spent_on(run, "study/select"), sequences) / sum(len(basis) for basis in bases)
    return {
        kind: OnSelect(basis, own, price + share * len(basis))
        for kind, basis, own, price in zip(counts, bases, found, prices, strict=True)
    }


def second_order(
    run: Run, checkpoints: Checkpoints, basis: Basis, *measured: Projections
) -> list[Projections]:
    """The same projections with the mean terms of Eq. 6, taken on a part of the curvature sample."""
    curvature = run.task.splits.curvature
    sample = curvature.select(torch.arange(min(CURVATURE_SUMS, curvature.sequences)))
    means, curvatures = second_order_terms(run.objective, checkpoints, basis, sample)
    return [replace(own, mean_gradients=means, curvatures=curvatures) for own in measured]
