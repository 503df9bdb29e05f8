"""Which heads carry an effect: their weights and their activations, side by side.

``polca-edit study heads runs/demo --target 10s --case induction --seeds 5 --json FILE``

Two movements are cut by heads: the axis of one skill in a span of a run (searched on select), and the
declared stretch of a case. Weights: the head's part of the edit alone. Activations: the edited model's output
of the head given to the original model, through TransformerLens hooks. Both on tokens that nothing has used.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from experiments.application import say
from experiments.natural.cases import CASES
from experiments.natural.kept import recording_of
from experiments.natural.measure import MeasureSettings, open_case
from experiments.report.formats import decimal
from experiments.report.tables import Table, table
from experiments.run.machine import hardware, versions
from experiments.run.run import Run, load_run
from experiments.study.results import show, to_terminal, write_with_tables
from experiments.verbs.options import Result
from experiments.verdicts.choose import split_of, unseen_tokens
from interventions.causal.statistics import Interval, t_interval
from interventions.discovery.axes import skill_axis
from interventions.edits import project_out
from interventions.patching import HeadMap, head_map
from polca_edit.artifacts import load_record
from polca_edit.basis.record import Basis


@dataclass(frozen=True)
class HeadRow:
    """One movement of one run, cut by heads.

    Attributes:
        source: task or case.
        seed: of the run.
        movement: what is undone.
        target: group whose damage is measured.
        tokens: of the group.
        map: every head, both ways, and how far they agree.
    """

    source: str
    seed: int
    movement: str
    target: str
    tokens: int
    map: HeadMap


@dataclass(frozen=True)
class Summary:
    """All runs of one source.

    Attributes:
        source: task or case.
        runs: how many.
        alone: rank correlation of weights alone and outputs given, mean over runs; NaN bounds for one run.
        left_out: the same with each head left out.
        largest_single: largest share of any single head's weights, mean over runs.
        together: share of all heads' weights, mean over runs.
        largest_kept: largest share that any single head's weights bring back to the edited model, mean.
        together_kept: share that all heads' weights bring back, mean over runs.
        same_top: runs in which both sides name the same head first.
    """

    source: str
    runs: int
    alone: Interval
    left_out: Interval
    largest_single: float
    together: float
    largest_kept: float
    together_kept: float
    same_top: int


@dataclass(frozen=True)
class HeadsResult:
    """What ``--json`` writes.

    Attributes:
        summaries: one a source.
        rows: one a run.
        seconds: of this command.
        versions: of the software.
        hardware: of the machine.
    """

    summaries: tuple[Summary, ...]
    rows: tuple[HeadRow, ...]
    seconds: float
    versions: Mapping[str, str]
    hardware: Mapping[str, object]
    schema: str = "polca-edit/study-heads/1"


def run_row(run: Run, target: str, label: str, unseen: int) -> HeadRow:
    """The axis of one skill in a span of a run.

    Raises:
        ValueError: for a skill or basis that the run does not have.
    """
    run.require_bases([label])
    select = run.task.splits.select
    if target not in select.skills:
        raise ValueError(f"--target must be one of {list(select.skills)}, got '{target}'; correct the name")
    others = {name: select.skills[name] for name in run.task.parents if name != target}
    basis = load_record(Basis, run.directory.basis(label))
    axis = skill_axis(split_of(run, select), basis, target, others or None)
    split = split_of(run, unseen_tokens(run, unseen))
    members = split.tokens.skills[target].numpy()
    found = head_map(split, axis.edit, members)
    movement = f"axis in {label}"
    return HeadRow(run.task.name, run.config.seed, movement, target, int(members.sum()), found)


def case_row(name: str, seed: int, out: Path) -> HeadRow:
    """The declared stretch of a case."""
    case = CASES[name]
    settings = MeasureSettings(bases=(), discovery=False)
    opened = open_case(case, case.build(seed, False), recording_of(name, False, seed, out), settings)
    split, row = opened.unseen, opened.bases["declared"].rows[:1]
    members = split.tokens.skills[case.target].numpy()
    found = head_map(split, project_out(split, row), members)
    first, last = opened.natural.window
    return HeadRow(name, seed, f"steps {first} to {last}", case.target, int(members.sum()), found)


def summary(source: str, rows: Sequence[HeadRow]) -> Summary:
    """Runs of one source together."""

    def over(values: Sequence[float]) -> Interval:
        return t_interval(values) if len(values) > 1 else Interval(values[0], float("nan"), float("nan"))

    maps = [row.map for row in rows]
    single = [max(effect.weights for effect in one.effects) for one in maps]
    return Summary(
        source,
        len(rows),
        over([one.alone.rho for one in maps]),
        over([one.left_out.rho for one in maps]),
        sum(single) / len(rows),
        sum(one.together for one in maps) / len(rows),
        sum(max(effect.weights_left for effect in one.effects) for one in maps) / len(rows),
        sum(one.together_left for one in maps) / len(rows),
        sum(one.alone.same_top for one in maps),
    )


ALONE, KEPT = "rho, head alone", "rho, head kept"


def _source_table(summaries: Sequence[Summary]) -> Table:
    def interval(found: Interval) -> str:
        bounds = f" [{found.low:.2f}, {found.high:.2f}]" if found.units > 1 else ""
        return f"{found.estimate:.2f}{bounds}"

    lines = [
        [
            one.source,
            str(one.runs),
            interval(one.alone),
            interval(one.left_out),
            decimal(one.largest_single),
            decimal(one.together),
            decimal(one.largest_kept),
            decimal(one.together_kept),
            f"{one.same_top}/{one.runs}",
        ]
        for one in summaries
    ]
    columns = ["source", "runs", ALONE, KEPT, "one head", "all", "one kept", "all kept", "same first"]
    return table(columns, lines, "Weights against activations, mean over runs, 95 % t interval")


def _tables(result: HeadsResult) -> list[Table]:
    """Sources, runs, heads."""
    runs = [
        [
            row.source,
            str(row.seed),
            row.movement,
            row.target,
            decimal(row.map.whole),
            *(f"{a.rho:.2f} (p {a.p:.4f})" for a in (row.map.alone, row.map.left_out)),
        ]
        for row in result.rows
    ]
    heads = [
        [
            row.source,
            str(row.seed),
            f"{effect.layer}.{effect.head}",
            *map(decimal, (effect.weights, effect.output, effect.weights_left, effect.output_left)),
        ]
        for row in result.rows
        for effect in row.map.effects
    ]
    columns = ["source", "seed", "head", "its weights", "its output", "weights missing", "output missing"]
    return [
        _source_table(result.summaries),
        table(["source", "seed", "movement", "target", "nats", ALONE, KEPT], runs, "Runs"),
        table(columns, heads, "Shares of the damage"),
    ]


def heads_study(
    runs: Annotated[list[Path] | None, typer.Argument(help="Finished runs of a model with hooks.")] = None,
    target: Annotated[str, typer.Option(help="Skill whose axis is cut, in the runs.")] = "10s",
    basis: Annotated[str, typer.Option(help="Span of the axis.")] = "hessian",
    unseen: Annotated[int, typer.Option(min=0, help="Sequences drawn anew; 0: the evaluate split.")] = 1000,
    case: Annotated[str | None, typer.Option(help="Also a case of `validate`, by name.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of the case.")] = 5,
    json_: Result = None,
    out: Annotated[Path, typer.Option(help="Where runs of the case are kept.")] = Path("runs/validate"),
) -> None:
    """Which heads carry an effect, by their weights and by their activations, and do the two agree?"""
    if case is not None and case not in CASES:
        raise ValueError(f"--case must be one of {list(CASES)}, got '{case}'; correct the name")
    if not runs and case is None:
        raise ValueError("heads are read off runs or a case, got neither; name a run, or --case induction")
    started, rows = time.perf_counter(), []
    for place in runs or []:
        rows.append(run_row(load_run(place, say=lambda _: None), target, basis, unseen))
        say(f"  {place}: rank correlation {rows[-1].map.alone.rho:.2f}")
    for seed in range(seeds if case is not None else 0):
        rows.append(case_row(str(case), seed, out))
        say(f"  {case} seed {seed}: rank correlation {rows[-1].map.alone.rho:.2f}")
    sources = dict.fromkeys(row.source for row in rows)
    made = tuple(summary(name, [row for row in rows if row.source == name]) for name in sources)
    spent = time.perf_counter() - started
    result = HeadsResult(made, tuple(rows), spent, versions(), hardware())
    tables = _tables(result)
    if not to_terminal(json_):
        show(tables)
    if json_ is not None:
        write_with_tables(json_, result, tables)
