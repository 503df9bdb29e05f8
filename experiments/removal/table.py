"""Results of several removal studies as one small file and one table over seeds.

``python -m experiments.removal.table FILE [FILE ...] --json MERGED --markdown TABLE``
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from experiments.application import run_application
from experiments.removal.comparison import matched_damage, over_seeds
from experiments.removal.found import Effort
from experiments.removal.results import StudyResult
from experiments.removal.rows import DoseCurve, RelearningCurve, Row
from experiments.report.formats import share
from experiments.report.tables import Column
from experiments.report.tables import table as drawn
from interventions.removal.problem import Limits
from polca_edit.artifacts import from_plain, to_plain
from polca_edit.checkpoints.files import write_atomically, write_json


def merged(results: Sequence[StudyResult]) -> StudyResult:
    """One result of several with the same preset and effort; compared again at matched damage.

    Raises:
        ValueError: for results of different studies, or a row that is in two of them.
    """
    efforts = sorted({f"{result.preset}, {result.effort}" for result in results})
    if len(efforts) != 1:
        raise ValueError(f"merged results must share preset and steps, got {efforts}; merge those apart")
    rows = [row for result in results for row in result.rows]
    keys = [(row.seed, row.skill, row.method) for row in rows]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"every row must be in one result only, {twice[0]} is in two; leave one file out")
    return replace(
        results[0],
        seeds=tuple(sorted({row.seed for row in rows})),
        wall_seconds=sum(result.wall_seconds for result in results),
        cpu_seconds=sum(result.cpu_seconds for result in results),
        matched_damage=tuple(matched_damage(rows)),
        rows=tuple(rows),
        pareto=tuple(item for result in results for item in result.pareto),
        relearning=tuple(item for result in results for item in result.relearning),
        log=tuple(item for result in results for item in result.log),
    )


# -- the small file --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShortRow:
    """What the small file keeps of a row; ``missed`` names the bounds that it does not meet."""

    skill: str
    method: str
    seed: int
    target_share: float
    worst_off_share: float
    worst_positive_share: float
    accuracy: float
    refit_kept: float
    refit_kept_of_untrained: float
    passes: float
    met: bool
    missed: tuple[str, ...]

    @classmethod
    def of(cls, row: Row) -> ShortRow:
        """Of a row."""
        return cls(
            row.skill,
            row.method,
            row.seed,
            target_share=rounded(row.target_share, 4),
            worst_off_share=rounded(row.worst_off_share, 4),
            worst_positive_share=rounded(row.worst_positive_share, 4),
            accuracy=rounded(row.accuracy, 4),
            refit_kept=rounded(row.refit.kept, 4),
            refit_kept_of_untrained=rounded(row.refit.kept_of_untrained, 4),
            passes=rounded(row.passes, 4),
            met=row.met,
            missed=tuple(sorted(name for name, met in row.checks.items() if not met)),
        )


@dataclass(frozen=True)
class ShortPoint:
    """One dose of a Pareto front."""

    target_share: float
    worst_positive_share: float


@dataclass(frozen=True)
class ShortCurve:
    """One method's Pareto front on one skill and seed."""

    skill: str
    method: str
    seed: int
    points: tuple[ShortPoint, ...]

    @classmethod
    def of(cls, curve: DoseCurve) -> ShortCurve:
        """Of a dose curve."""
        points = (
            ShortPoint(rounded(p.target_share, 3), rounded(p.worst_positive_share, 3)) for p in curve.points
        )
        return cls(curve.skill, curve.method, curve.seed, tuple(points))


@dataclass(frozen=True)
class MedianPoint:
    """Median accuracy over seeds after some fine-tuning steps."""

    step: int
    accuracy: float


@dataclass(frozen=True)
class MedianCurve:
    """Relearning of one method's edits of one skill, over seeds."""

    skill: str
    method: str
    data: str
    seeds: int
    points: tuple[MedianPoint, ...]


def medians(curves: Sequence[RelearningCurve]) -> tuple[MedianCurve, ...]:
    """Relearning curves over seeds, in the order of their first seed."""
    found = []
    for skill, method, data in dict.fromkeys((c.skill, c.method, c.data) for c in curves):
        seeds = [c.points for c in curves if (c.skill, c.method, c.data) == (skill, method, data)]
        points = tuple(
            MedianPoint(points[0].step, rounded(statistics.median(p.accuracy for p in points), 3))
            for points in zip(*seeds, strict=True)
        )
        found.append(MedianCurve(skill, method, data, len(seeds), points))
    return tuple(found)


@dataclass(frozen=True)
class ShortMatch:
    """Our best edit of a skill against the best tuned rival: ratios of what the worst other group loses."""

    seed: int
    skill: str
    goal: float
    rival: str | None
    ratio: float | None
    ratio_signed: float | None
    one_fifth: bool | None


@dataclass(frozen=True)
class ShortResult:
    """The small file: what table and figures need."""

    preset: str
    effort: Effort
    config: Mapping[str, object]
    seeds: tuple[int, ...]
    required: Mapping[str, Limits]
    versions: Mapping[str, str]
    hardware: Mapping[str, object]
    wall_seconds: float
    cpu_seconds: float
    matched_damage: tuple[ShortMatch, ...]
    rows: tuple[ShortRow, ...]
    pareto: tuple[ShortCurve, ...]
    relearning: tuple[MedianCurve, ...]
    schema: str = "polca-edit/remove-skill/table-2"

    @classmethod
    def of(cls, result: StudyResult) -> ShortResult:
        """Of a whole result; numbers are rounded to four digits, those of curves to three."""
        matches = (
            ShortMatch(
                match.seed,
                match.skill,
                match.goal,
                None if match.rival is None else match.rival.method,
                None if match.ratio is None else rounded(match.ratio, 4),
                None if match.ratio_signed is None else rounded(match.ratio_signed, 4),
                match.one_fifth,
            )
            for match in result.matched_damage
        )
        return cls(
            result.preset,
            result.effort,
            result.config,
            result.seeds,
            result.required,
            result.versions,
            result.hardware,
            rounded(result.wall_seconds, 4),
            rounded(result.cpu_seconds, 4),
            tuple(matches),
            tuple(ShortRow.of(row) for row in result.rows),
            tuple(ShortCurve.of(curve) for curve in result.pareto),
            medians(result.relearning),
        )


def rounded(value: float, digits: int) -> float:
    """A number with so many significant digits.

    >>> rounded(0.123456, 3), rounded(123456.0, 2)
    (0.123, 120000.0)
    """
    return float(f"{value:.{digits}g}")


# -- the table ---------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """The table of :func:`~experiments.removal.comparison.over_seeds`."""
    columns = (
        Column("skill", left=True), Column("method", left=True), "goal reached", "and within the bound",
        "worst other group: median", "largest", "kept after relabelling",
    )  # fmt: skip
    cells = (
        (
            line.skill,
            line.method,
            f"{line.reached} of {line.seeds}",
            f"{line.selective} of {line.seeds}",
            share(line.worst_off_median),
            share(line.worst_off_max),
            share(line.refit_kept_median),
        )
        for line in over_seeds(rows)
    )
    return drawn(columns, cells).markdown()


def removal_table(
    files: Annotated[list[Path], typer.Argument(help="Results of remove-skill.")],
    json_: Annotated[Path | None, typer.Option("--json", help="Write the small file here.")] = None,
    table: Annotated[Path | None, typer.Option("--markdown", help="Write the table here.")] = None,
) -> None:
    """Merge results of several seeds and print each method over seeds."""
    result = merged([from_plain(StudyResult, json.loads(file.read_text())) for file in files])
    text = markdown(result.rows)
    if json_ is not None:
        write_json(json_, to_plain(ShortResult.of(result)))
    if table is not None:
        write_atomically(table, lambda part: part.write_text(text))
    typer.echo(text)


if __name__ == "__main__":
    run_application(removal_table)
