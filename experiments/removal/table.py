"""Results of several removal studies as one file and one table over seeds.

``python -m experiments.removal.table FILE [FILE ...] --json MERGED --markdown TABLE``
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.application import run_application
from experiments.removal.bed import REQUIRED
from experiments.removal.study import finite, matched_damage
from polca_edit.checkpoints.files import write_atomically, write_json


def merged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One result of several with the same preset and effort; compared again at matched damage.

    Raises:
        ValueError: for results of different studies, or a row that is in two of them.
    """
    efforts = [(r["preset"], json.dumps(r["study"]["effort"], sort_keys=True)) for r in results]
    if len(set(efforts)) != 1:
        raise ValueError(
            f"merged results must share preset and steps, got {sorted(set(efforts))}; merge those apart"
        )
    keys = [(row["seed"], row["skill"], row["method"]) for r in results for row in r["rows"]]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"every row must be in one result only, {twice[0]} is in two; leave one file out")
    rows = [row for r in results for row in r["rows"]]
    return {
        **{key: results[0][key] for key in ("schema", "preset", "required", "versions", "hardware")},
        "study": results[0]["study"],
        "seeds": sorted({row["seed"] for row in rows}),
        "wall_seconds": sum(r["wall_seconds"] for r in results),
        "cpu_seconds": sum(r["cpu_seconds"] for r in results),
        "matched_damage": matched_damage(rows),
        **{
            key: [item for r in results for item in r[key]] for key in ("rows", "pareto", "relearning", "log")
        },
    }


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per skill and method: how many seeds reach the goal, and what that costs the worst other group.

    Costs and what stays after relabelling are over the seeds that reach the goal, since a small edit
    harms nobody.
    """
    table = []
    for skill in REQUIRED:
        for method in dict.fromkeys(row["method"] for row in rows):
            here = [row for row in rows if (row["skill"], row["method"]) == (skill, method)]
            if not here:
                continue
            reached = [row for row in here if row["checks"]["target_share"]]
            costs = [row["worst_off_share"] for row in reached]
            kept = [row["refit_kept"] for row in reached]
            table.append(
                {
                    "skill": skill,
                    "method": method,
                    "seeds": len(here),
                    "reached": len(reached),
                    "selective": sum(row["checks"]["worst_off_share"] for row in reached),
                    "met": sum(row["met"] for row in here),
                    "worst_off_median": statistics.median(costs) if costs else None,
                    "worst_off_max": max(costs) if costs else None,
                    "refit_kept_median": statistics.median(kept) if kept else None,
                }
            )
    return table


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of :func:`over_seeds`."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    lines = [
        "| skill | method | goal reached | and within the bound | worst other group: median | largest | "
        "kept after relabelling |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in over_seeds(rows):
        lines.append(
            f"| {line['skill']} | {line['method']} | {line['reached']} of {line['seeds']} "
            f"| {line['selective']} of {line['seeds']} | {percent(line['worst_off_median'])} "
            f"| {percent(line['worst_off_max'])} | {percent(line['refit_kept_median'])} |"
        )
    return "\n".join(lines) + "\n"


def removal_table(
    files: Annotated[list[Path], typer.Argument(help="results of remove-skill")],
    json_: Annotated[Path | None, typer.Option("--json", help="Write the merged result here.")] = None,
    table: Annotated[Path | None, typer.Option("--markdown", help="Write the table here.")] = None,
) -> None:
    """Merge results of several seeds and print each method over seeds."""
    result = merged([json.loads(file.read_text()) for file in files])
    text = markdown(result["rows"])
    if json_ is not None:
        write_json(json_, finite(result))
    if table is not None:
        write_atomically(table, lambda part: part.write_text(text) and None)
    typer.echo(text)


if __name__ == "__main__":
    run_application(removal_table)
