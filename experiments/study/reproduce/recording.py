"""Adaptive against equal recording: quadrature error against the number of checkpoints.

``polca-edit study recording --preset demo --seeds 2 --json docs/results/recording-demo.json``

All series are cut from one that was recorded densely. Which checkpoints are kept follows from the probe's
losses alone, as in a recording; the errors are those of the evaluate split, on which nothing is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from experiments.application import say
from experiments.config import load_config
from experiments.report.formats import share
from experiments.report.tables import Table, table
from experiments.run.run import Run, load_run, open_run
from experiments.run.stages.training import probed, trained_series
from experiments.study.results import publish, show, to_terminal
from experiments.verbs.guard import require_different
from experiments.verbs.options import Result, Set
from polca_edit.allocation.gaps import (
    SeriesError,
    SparseInterval,
    interval_errors,
    sparse_intervals,
)
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.checkpoints.spacing import Thinning, steps_to_keep

#: Ways of choosing checkpoints: equal steps; while training; from the finished dense series.
EQUAL, ADAPTIVE, PLANNED = "equal", "adaptive", "planned"
WAYS = (EQUAL, ADAPTIVE, PLANNED)
COUNTS = (26, 51, 101, 201)
#: The rule of :mod:`polca_edit.checkpoints.spacing`, raised when it chooses otherwise.
CHOICE = 2


@dataclass(frozen=True)
class RecordingRow:
    """One way with one number of checkpoints in one run.

    Attributes:
        seed: of the run.
        way: ``equal``, ``adaptive`` (online) or ``planned`` (all candidates known).
        steps: that are kept.
        found: errors on the evaluate split.
        equal_to: equally spaced checkpoints with the same error per token, between the measured ones; None
            for equal spacing, and outside of what was measured.
    """

    seed: int
    way: str
    steps: tuple[int, ...]
    found: SeriesError
    equal_to: float | None


@dataclass(frozen=True)
class SparseRow:
    """Where equal spacing leaves its error.

    Attributes:
        seed: of the run.
        checkpoints: equally spaced.
        intervals: the fewest that hold half of it.
    """

    seed: int
    checkpoints: int
    intervals: tuple[SparseInterval, ...]


def equally_spaced(candidates: int, count: int) -> list[int]:
    """Indices of ``count`` equally spaced candidates, both ends included.

    >>> equally_spaced(11, 3)
    [0, 5, 10]
    """
    return [round(i * (candidates - 1) / (count - 1)) for i in range(count)]


def kept_online(steps: Sequence[int], losses: torch.Tensor, count: int) -> list[int]:
    """Steps that adaptive recording keeps when the candidates come one after the other."""
    thinning = Thinning(count)
    for step, row in zip(steps, losses, strict=True):
        thinning.offer(step, row)
    return thinning.steps


def equivalent(error: float, equal: Mapping[int, float]) -> float | None:
    """Equally spaced checkpoints that would have an error, on straight lines between logarithms.

    >>> round(equivalent(0.05, {11: 0.2, 41: 0.0125}))
    21

    Returns:
        None outside of what was measured.
    """
    known = sorted(equal.items())
    for (few, large), (many, small) in zip(known, known[1:], strict=False):
        if small <= error <= large and small < large:
            place = (math.log(large) - math.log(error)) / (math.log(large) - math.log(max(small, 1e-300)))
            return math.exp(math.log(few) + place * (math.log(many) - math.log(few)))
    return None


def choices(
    series: Checkpoints, losses: torch.Tensor, counts: Sequence[int]
) -> dict[tuple[str, int], list[int]]:
    """(way, count) -> indices of the dense series."""
    at = {step: index for index, step in enumerate(series.steps)}
    chosen: dict[tuple[str, int], list[int]] = {}
    for count in counts:
        chosen[EQUAL, count] = equally_spaced(len(series), count)
        chosen[ADAPTIVE, count] = [at[step] for step in kept_online(series.steps, losses, count)]
        chosen[PLANNED, count] = [at[step] for step in steps_to_keep(series.steps, losses, count)]
    return chosen


@dataclass(frozen=True)
class RunErrors:
    """What was measured in one run.

    Attributes:
        rows: one a way and number of checkpoints.
        sparse: one a number of checkpoints.
    """

    rows: tuple[RecordingRow, ...]
    sparse: tuple[SparseRow, ...]


def run_errors(run: Run, counts: Sequence[int], sequences: int | None) -> RunErrors:
    """Every way and number of checkpoints in one run, trained first and measured once."""
    trained_series(run)
    name = "recording/errors.json"
    key = run.key_for(name, list(counts), sequences, CHOICE)
    return run.directory.kept(
        name, key, RunErrors, lambda: measured_errors(run, counts, sequences), run.objective.passes
    )


def measured_errors(run: Run, counts: Sequence[int], sequences: int | None) -> RunErrors:
    """Every way and number of checkpoints in one trained run.

    Raises:
        ValueError: where no number of checkpoints is as small as the series.
    """
    series, seed = run.checkpoints(), run.config.seed
    fitting = [count for count in counts if count <= len(series)]
    if not fitting:
        raise ValueError(
            f"--count must be at most the {len(series)} recorded checkpoints, got {min(counts)}; lower it, "
            "or record more"
        )
    probe = probed(run)
    losses = torch.stack([run.objective.losses(series[i], probe) for i in range(len(series))])
    chosen = choices(series, losses, fitting)
    tokens = run.task.splits.evaluate
    if sequences is not None and sequences < tokens.sequences:
        tokens = tokens.select(torch.arange(sequences))
    pairs = [pair for kept in chosen.values() for pair in zip(kept, kept[1:], strict=False)]
    measured = interval_errors(run.objective, series, pairs, tokens)
    found = {key: measured.of(kept) for key, kept in chosen.items()}
    equal = {count: found[EQUAL, count].per_token for count in fitting}
    steps = {key: tuple(series.steps[i] for i in kept) for key, kept in chosen.items()}
    lines = [
        RecordingRow(
            seed,
            way,
            steps[way, count],
            found[way, count],
            None if way == EQUAL else equivalent(found[way, count].per_token, equal),
        )
        for way, count in chosen
    ]
    sparse = []
    for count in fitting:
        kept = chosen[EQUAL, count]
        error = torch.stack([measured.error[pair] for pair in zip(kept, kept[1:], strict=False)])
        sparse.append(SparseRow(seed, count, sparse_intervals(steps[EQUAL, count], error)))
    return RunErrors(tuple(lines), tuple(sparse))


def errors_table(rows: Sequence[RecordingRow]) -> Table:
    """One line a seed and number of checkpoints, the ways beside each other."""
    known = {(row.seed, row.found.checkpoints, row.way): row for row in rows}
    lines = []
    for seed, count in dict.fromkeys((row.seed, row.found.checkpoints) for row in rows):
        own = [known[seed, count, way] for way in WAYS]
        same = [row.equal_to for row in own[1:]]
        lines.append(
            [
                str(seed),
                str(count),
                *(share(row.found.per_token) for row in own),
                *(share(row.found.total) for row in own),
                *("–" if value is None else f"{value:.0f}" for value in same),
            ]
        )
    headings = [
        "seed",
        "checkpoints",
        *(f"{way}, per token" for way in WAYS),
        *(f"{way}, total" for way in WAYS),
        "adaptive is like equal with",
        "planned is like equal with",
    ]
    return table(headings, lines, "Quadrature error on evaluate, share of the loss change")


def sparse_table(rows: Sequence[SparseRow]) -> Table:
    """Where equal spacing leaves half of its error."""
    lines = [
        [
            str(row.seed),
            str(row.checkpoints),
            f"{len(row.intervals)} of {row.checkpoints - 1}",
            ", ".join(f"{found} ({share(found.share)})" for found in row.intervals[:6])
            + (" ..." if len(row.intervals) > 6 else ""),
        ]
        for row in rows
    ]
    return table(
        ["seed", "checkpoints", "intervals", "steps (share of the error)"],
        lines,
        "The intervals that hold half of the error of equal spacing",
    )


def recording(
    dense: Annotated[
        list[Path] | None, typer.Argument(help="Runs recorded densely, one a seed; default: train them.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Config file or preset of the runs to train.")] = "demo",
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs, seeds 0, 1, ...")] = 1,
    every: Annotated[int, typer.Option(min=1, help="Steps between candidates.")] = 3,
    counts: Annotated[
        list[int] | None, typer.Option("--count", min=3, help="Checkpoints kept; repeat. 26, 51, 101, 201.")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(min=4, help="Evaluate sequences that errors are measured on; default all.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/recording"),
    set_: Set = None,
    json_: Result = None,
) -> None:
    """Adaptive against equal recording, and which intervals of equal spacing hold its error."""
    from experiments.application import settings_from
    from experiments.report.figures.studies import draw_recording

    wanted = sorted(set(counts or COUNTS))
    if dense:
        require_different(dense)
        runs = [load_run(place, say) for place in dense]
    else:
        given = {"training.record_every": every, **settings_from(set_)}
        runs = [
            open_run(load_config(preset, {**given, "seed": seed}), out / f"{Path(preset).stem}-{seed}", say)
            for seed in range(seeds)
        ]
    rows: list[RecordingRow] = []
    sparse: list[SparseRow] = []
    for opened in runs:
        found = run_errors(opened, wanted, sequences)
        rows, sparse = [*rows, *found.rows], [*sparse, *found.sparse]
    tables = [errors_table(rows), sparse_table(sparse)]
    show(tables)
    config = runs[0].config
    publish(
        json_,
        "recording/1",
        config,
        [opened.config.seed for opened in runs],
        {"candidates": len(config.training.candidates), "rows": rows, "sparse": sparse},
        tables,
    )
    if json_ is not None and not to_terminal(json_):
        draw_recording(
            [(row.way, row.seed, row.found.checkpoints, row.found.per_token) for row in rows],
            json_.with_suffix(".png"),
        )
