"""Verb ``study grokking``: a published claim put to the test, kept seed by seed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from experiments.application import say
from experiments.natural import grokking
from experiments.natural.kept import source_of
from experiments.report.tables import Table, table
from experiments.run.machine import hardware, versions
from experiments.run.store import RunDirectory
from experiments.study.grokking import arms as grokking_arms
from experiments.study.grokking import claim as grokking_claim
from experiments.study.grokking.claim import (
    ArmSummary,
    ClaimSettings,
    SeedResult,
    WeakPoints,
    run_seed,
    summaries,
)
from experiments.study.results import show, to_terminal, write_with_tables
from experiments.verbs.options import Result
from interventions.causal.statistics import Interval
from polca_edit.artifacts import key_of


@dataclass(frozen=True)
class ClaimResult:
    """What ``--json`` writes.

    Attributes:
        arms: every arm over the seeds.
        weak: mean over the seeds of what the procedure does to one step.
        runs: every arm of every seed.
        seeds: of the runs.
        settings: branch and limit.
        minutes: of training, summed over seeds, as they ran.
        versions: of the software.
        hardware: of the machine.
    """

    arms: tuple[ArmSummary, ...]
    weak: WeakPoints
    runs: tuple[SeedResult, ...]
    seeds: tuple[int, ...]
    settings: ClaimSettings
    minutes: float
    versions: Mapping[str, str]
    hardware: Mapping[str, object]
    schema: str = "polca-edit/study-grokking/1"


def grokking_study(
    seeds: Annotated[int, typer.Option(help="Runs of every arm; intervals are over them.", min=2)] = 5,
    branch: Annotated[int, typer.Option(help="Step from which arms differ.", min=20)] = 300,
    limit: Annotated[int, typer.Option(help="Last step of any arm.")] = 1200,
    json_: Result = None,
    out: Annotated[Path, typer.Option(help="Where finished seeds are kept.")] = Path("runs/study-grokking"),
) -> None:
    """Does grokking need the motion along 16 trajectory components (arXiv 2602.16746)?

    Its own procedure (components taken out of the gradient before AdamW, 16 random directions as control)
    beside components that are really held, and a sham of equal carried movement.
    """
    if limit <= branch:
        raise ValueError(f"--limit must lie after --branch {branch}, got {limit}; raise it")
    settings, store, spent, runs = ClaimSettings(branch, limit), RunDirectory(out), 0.0, []
    for seed in range(seeds):
        key = key_of(
            "study-grokking",
            seed,
            settings,
            source_of(grokking_arms, grokking_claim, grokking),
            versions()["torch"],
        )
        stage, started = f"seed{seed}.json", time.perf_counter()
        runs.append(store.kept(stage, key, SeedResult, partial(run_seed, seed, settings, say)))
        record = store.record(stage)
        spent += record.seconds if record is not None else time.perf_counter() - started
    weak = WeakPoints(
        **{key: float(np.mean([asdict(run.weak)[key] for run in runs])) for key in asdict(runs[0].weak)}
    )
    result = ClaimResult(
        tuple(summaries(runs)),
        weak,
        tuple(runs),
        tuple(range(seeds)),
        settings,
        spent / 60,
        versions(),
        hardware(),
    )
    tables = claim_tables(result)
    show(tables)
    if json_ is not None:
        write_with_tables(json_, result, tables)
    if json_ is not None and not to_terminal(json_):
        from experiments.report.figures.studies import draw_arms

        curves = {
            arm.arm: [(row.steps, row.hidden) for run in runs for row in run.arms if row.arm == arm.arm]
            for arm in result.arms
        }
        draw_arms(curves, branch, json_.with_suffix(".png"))


def _interval(found: Interval | None) -> str:
    return "" if found is None else f"{found.estimate:.0f} [{found.low:.0f}, {found.high:.0f}]"


def claim_tables(result: ClaimResult) -> list[Table]:
    """Arms, and the two weak points."""
    lines = [
        [arm.arm, _interval(arm.step), str(arm.censored), _interval(arm.delay), _interval(arm.beyond_sham)]
        for arm in result.arms
    ]
    heads = ["arm", "step of grokking", "never", "later than free", "later than sham"]
    weak = [[key.replace("_", " "), f"{value:.4f}"] for key, value in asdict(result.weak).items()]
    count = len(result.seeds)
    return [
        table(heads, lines, f"Steps, mean over {count} seeds and 95 % t interval"),
        table(["measured at the branch", "mean"], weak, "What the procedure does to a step"),
    ]
