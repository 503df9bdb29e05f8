"""Results of several removal studies as one small file and one table over seeds.

``python -m experiments.removal.table FILE [FILE ...] --json MERGED --markdown TABLE``
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.application import run_application, say
from experiments.removal.comparison import matched_damage, over_seeds
from experiments.removal.results import StudyResult
from experiments.removal.rows import RelearningCurve, Row
from experiments.report.formats import share
from experiments.report.tables import Column
from experiments.report.tables import table as drawn
from experiments.verbs.options import Result
from polca_edit.artifacts import from_plain, to_plain
from polca_edit.checkpoints.files import finite_json, write_atomically, write_json


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


#: What the small file keeps of a row and of a match; ``missed`` names the bounds that a row does not meet.
ROW = (
    "skill",
    "method",
    "seed",
    "target_share",
    "worst_off_share",
    "worst_positive_share",
    "accuracy",
    "passes",
)
MATCH = ("seed", "skill", "goal", "rival", "ratio", "ratio_signed", "one_fifth")


def small(result: StudyResult) -> dict[str, object]:
    """What table and figures need, as plain values: numbers to four digits, those of curves to three."""
    plain = to_plain(result)
    rows = [
        {
            **{key: row[key] for key in ROW},
            "refit_kept": row["refit"]["kept"],
            "refit_kept_of_untrained": row["refit"]["kept_of_untrained"],
            "missed": sorted(name for name, met in row["checks"].items() if not met),
        }
        for row in plain["rows"]
    ]
    pareto = [
        {
            **curve,
            "points": [{k: p[k] for k in ("target_share", "worst_positive_share")} for p in curve["points"]],
        }
        for curve in plain["pareto"]
    ]
    kept = {
        "schema": "polca-edit/remove-skill/table-2",
        "matched_damage": [{key: match[key] for key in MATCH} for match in plain["matched_damage"]],
        "rows": rows,
    }
    curves = {"pareto": pareto, "relearning": medians(result.relearning)}
    dropped = {"log", "workers", *curves}
    whole = {key: value for key, value in {**plain, **kept}.items() if key not in dropped}
    return {**rounded(whole, 4), **rounded(curves, 3)}


def medians(curves: Sequence[RelearningCurve]) -> list[dict[str, object]]:
    """Accuracy while relearning, median over seeds, in the order of the first seed."""
    found: list[dict[str, object]] = []
    for skill, method, data in dict.fromkeys((c.skill, c.method, c.data) for c in curves):
        seeds = [c.points for c in curves if (c.skill, c.method, c.data) == (skill, method, data)]
        points = [
            {"step": at[0].step, "accuracy": statistics.median(point.accuracy for point in at)}
            for at in zip(*seeds, strict=True)
        ]
        found.append({"skill": skill, "method": method, "data": data, "seeds": len(seeds), "points": points})
    return found


def rounded(value: Any, digits: int) -> Any:
    """Plain values with every float cut to so many significant digits.

    >>> rounded({"a": [0.123456, 7]}, 3)
    {'a': [0.123, 7]}
    """
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


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
    json_: Result = None,
    table: Annotated[Path | None, typer.Option("--markdown", help="Write the table here.")] = None,
) -> None:
    """Merge results of several seeds and print each method over seeds."""
    result = merged([from_plain(StudyResult, finite_json(file.read_text())) for file in files])
    text = markdown(result.rows)
    if json_ is not None:
        write_json(json_, small(result))
    if table is not None:
        write_atomically(table, lambda part: part.write_text(text))
    say(text)


if __name__ == "__main__":
    run_application(removal_table)
