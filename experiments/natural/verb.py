"""Verb ``validate``: cases with a known answer and their twins through the whole tool."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from experiments.application import say
from experiments.natural.cases import CASES
from experiments.natural.kept import Job, run_jobs
from experiments.natural.measure import MeasureSettings
from experiments.natural.records import SCHEMA, CaseRow, RunRows
from experiments.natural.scores import (
    Failure,
    Ladder,
    Rate,
    confusion,
    failures,
    ladder,
    rates,
    rates_by_case,
    rates_by_chooser,
)
from experiments.report.tables import Table, table
from experiments.run.machine import hardware, versions
from experiments.study.results import show, write_with_tables
from experiments.verbs.options import Result
from interventions.causal.settings import TestSettings

#: Draws and thresholds of the causal test: the defaults, with fewer rotations.
TEST = TestSettings(rotations=20, observed_rotations=0)


@dataclass(frozen=True)
class Validation:
    """What ``--json`` writes.

    Attributes:
        cases: one row a case, twin and seed: the declared movement and its group.
        others: other pairs of the same runs, of which no truth is known.
        rates: cases and twins -> question -> yes and asked.
        by_case: the same per case.
        by_chooser: basis and family -> how often they find the case's own group, in cases and twins.
        confusion: truth -> word -> count.
        ladder: ROC of selectivity over mixed axes, None where the case was left out.
        failures: rows whose word is not the truth, with the question at fault.
        extra: run -> further numbers.
        train_minutes: case -> mean minutes of training, case and twin together.
        seeds: of the runs.
        settings: of the measurement.
        seconds: of this command.
        versions: of the software.
        hardware: of the machine.
    """

    cases: tuple[CaseRow, ...]
    others: tuple[CaseRow, ...]
    rates: Mapping[str, Mapping[str, Rate]]
    by_case: Mapping[str, Mapping[str, Mapping[str, Rate]]]
    by_chooser: Mapping[str, Mapping[str, Rate]]
    confusion: Mapping[str, Mapping[str, int]]
    ladder: Ladder | None
    failures: tuple[Failure, ...]
    extra: Mapping[str, Mapping[str, float]]
    train_minutes: Mapping[str, float]
    seeds: tuple[int, ...]
    settings: MeasureSettings
    seconds: float
    versions: Mapping[str, str]
    hardware: Mapping[str, object]
    schema: str = SCHEMA


def validate(
    case: Annotated[
        list[str] | None, typer.Option(help="Case by name; repeat. A wrong name lists them.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of every case and twin.", min=1)] = 1,
    basis: Annotated[
        list[str] | None, typer.Option(help="Basis beside the declared stretches; repeat; 'none' for none.")
    ] = None,
    discovery: Annotated[bool, typer.Option(help="Also clusters, and the skill axis of the target.")] = True,
    workers: Annotated[int, typer.Option(help="Processes; a run is the unit of work.", min=1)] = 1,
    json_: Result = None,
    out: Annotated[Path, typer.Option(help="Where runs are kept; finished ones are read back.")] = Path(
        "runs/validate"
    ),
) -> None:
    """How often does the tool say yes where yes is true, and no to the twin?

    Every case is trained, and so is its twin, in which the answer must be no. Pairs are fixed on the select
    split by the shipped chooser and tested on unseen tokens. The declared movement is a stretch of training
    whose effect follows from the data: a skill cannot be learned before its data are shown.
    """
    unknown = sorted(set(case or ()) - set(CASES))
    if unknown:
        raise ValueError(f"--case must be one of {list(CASES)}, got {unknown}; correct the name")
    names = [name for name in CASES if not case or name in case]
    kinds = tuple(k for k in basis if k != "none") if basis else MeasureSettings().bases
    settings = MeasureSettings(TEST, bases=kinds, discovery=discovery and bool(kinds))
    jobs = [
        Job(name, twin, seed, out, settings)
        for seed in range(seeds)
        for name in names
        for twin in (False, True)
    ]
    started = time.perf_counter()
    runs = run_jobs(jobs, workers, say)
    result = summed(jobs, runs, settings, time.perf_counter() - started)
    tables = tables_of(result)
    show(tables)
    for failed in result.failures:
        half = "twin" if failed.twin else "case"
        say(
            f"  {failed.case} {half} seed {failed.seed}: {failed.word} ({failed.question}). {failed.sentence}"
        )
    if json_ is not None:
        write_with_tables(json_, result, tables)


def summed(
    jobs: Sequence[Job], runs: Sequence[RunRows], settings: MeasureSettings, seconds: float
) -> Validation:
    """All runs as one result."""
    rows = tuple(run.declared for run in runs)
    others = tuple(row for run in runs for row in run.others)
    names = dict.fromkeys(job.case for job in jobs)
    seeds = tuple(dict.fromkeys(job.seed for job in jobs))
    spent = {
        name: sum(run.train_seconds for job, run in zip(jobs, runs, strict=True) if job.case == name)
        for name in names
    }
    return Validation(
        rows,
        others,
        rates(rows),
        rates_by_case(rows),
        rates_by_chooser(others, {name: CASES[name].target for name in names}),
        confusion(rows),
        ladder(runs),
        tuple(failures(rows)),
        {job.name: run.extra for job, run in zip(jobs, runs, strict=True) if run.extra},
        {name: value / 60 / len(seeds) for name, value in spent.items()},
        seeds,
        settings,
        seconds,
        versions(),
        hardware(),
    )


def _shown(rate: Rate) -> str:
    return f"{rate.yes}/{rate.asked}" if rate.asked else "-"


def tables_of(result: Validation) -> list[Table]:
    """Yes-rates, words, choosers, and the ladder."""
    questions = ("N", "S", "N+S", "W", "L", "D")
    lines = [
        [name, half, *(_shown(found[half][q]) for q in questions)]
        for name, found in (*result.by_case.items(), ("all", result.rates))
        for half in ("cases", "twins")
    ]
    made = [table(["case", "half", *questions], lines, "Yes over asked, declared movement")]
    words = sorted({word for counts in result.confusion.values() for word in counts})
    counts = [[truth, *(str(row.get(word, 0)) for word in words)] for truth, row in result.confusion.items()]
    made.append(table(["truth", *words], counts, "Words"))
    if result.by_chooser:
        found = [
            [name, *(_shown(row[h]) for h in ("cases", "twins"))] for name, row in result.by_chooser.items()
        ]
        title = "N and S both yes for the case's own group, other bases and choosers"
        made.append(table(["basis and family", "cases", "twins"], found, title))
    if result.ladder is not None:
        steps = [
            [angle, f"{value:.2f}", ", ".join(f"{w} {n}" for w, n in result.ladder.words[angle].items())]
            for angle, value in result.ladder.by_degrees.items()
        ]
        title = f"Mixing ladder: AUC {result.ladder.auc:.3f}, concordance {result.ladder.concordance:.3f}"
        made.append(table(["degrees", "selectivity", "words"], steps, title))
    return made
