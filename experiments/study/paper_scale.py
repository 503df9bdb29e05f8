"""The paper-scale arithmetic experiment end to end, with the time of every stage.

``python -m experiments.study.paper_scale --device cuda --out runs/paper --json FILE``

Training, 50 Hessian and 50 trajectory vectors, POLCA at 20-step spacing, clusters, interventions,
report. It resumes like any run. ``--preset`` and ``--set`` make it smaller for a trial.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.application import run_application, settings_from
from experiments.run.machine import hardware, versions
from experiments.run.store import RunDirectory
from experiments.verbs.pipeline import execute
from polca_edit.checkpoints.files import write_json

SCHEMA = "polca-edit/paper-scale/1"


def stage_table(out: Path) -> list[dict[str, Any]]:
    """Stage, seconds, passes and peak memory of a finished run, in the order they ran."""
    records = RunDirectory(out).stage_records()
    return [
        {
            "stage": r.stage,
            "seconds": r.seconds,
            "passes": r.passes,
            "peak_rss_bytes": r.peak_rss_bytes,
        }
        for r in records
    ]


def paper_scale(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/paper"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    preset: Annotated[str, typer.Option(help="Config file or preset.")] = "paper",
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a config key.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="File for the table of stages.")] = None,
) -> None:
    """Run the paper's arithmetic experiment and write what each stage took."""
    started = time.perf_counter()
    summary = execute(preset, out, settings_from(set_, seed=seed, device=device), None, False)
    stages = stage_table(out)
    for row in stages:
        typer.echo(f"  {row['stage']:<24} {row['seconds']:8.1f} s")
    result = {
        "schema": SCHEMA,
        "preset": preset,
        "seed": seed,
        "device": device,
        "seconds": sum(row["seconds"] for row in stages),
        "seconds_of_this_call": time.perf_counter() - started,
        "stages": stages,
        "parameters": None if summary is None else summary["model"]["parameters"],
        "versions": versions(),
        "hardware": hardware(),
    }
    write_json(json_ or out / "timing.json", result)


if __name__ == "__main__":
    run_application(paper_scale)
