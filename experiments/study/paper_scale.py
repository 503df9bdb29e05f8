"""The paper-scale arithmetic experiment end to end, with the time of every stage.

``python -m experiments.study.paper_scale --device cuda --out runs/paper --json FILE``

Training, 50 Hessian and 50 trajectory vectors, POLCA at 20-step spacing, clusters, interventions,
report. It resumes like any run. ``--preset`` and ``--set`` make it smaller for a trial.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from experiments.application import run_application, settings_from
from experiments.config import load_config
from experiments.report.formats import number
from experiments.report.tables import Table, table
from experiments.run.store import RunDirectory, StageRecord
from experiments.study.results import publish, show
from experiments.verbs.options import Result
from experiments.verbs.pipeline import execute


def stages_table(stages: tuple[StageRecord, ...]) -> Table:
    """Seconds, peak memory and passes of every stage; passes count sequences."""
    kinds = ("forward", "backward", "tangent", "hvp")
    return table(
        ["stage", "seconds", "GB", *kinds],
        [
            [
                stage.stage,
                f"{stage.seconds:.1f}",
                f"{stage.peak_rss_bytes / 1e9:.1f}",
                *(number(stage.passes.get(kind)) for kind in kinds),
            ]
            for stage in stages
        ],
        "Time of every stage",
    )


def paper_scale(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/paper"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    preset: Annotated[str, typer.Option(help="Config file or preset.")] = "paper",
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a config key.")] = None,
    json_: Result = None,
) -> None:
    """Run the paper's arithmetic experiment and write what each stage took."""
    started, overrides = time.perf_counter(), settings_from(set_, seed=seed, device=device)
    summary = execute(preset, out, overrides, None, False)
    assert summary is not None
    stages = tuple(RunDirectory(out).stage_records())
    contents = {
        "parameters": summary["model"]["parameters"],
        "seconds": sum(stage.seconds for stage in stages),
        "seconds_of_this_call": time.perf_counter() - started,
        "stages": stages,
    }
    tables = [stages_table(stages)]
    show(tables)
    config = load_config(preset, overrides)
    publish(json_ or out / "timing.json", "paper-scale/2", config, [seed], contents, tables)


if __name__ == "__main__":
    run_application(paper_scale)
