"""Which conclusions survive other settings: a multiverse, one figure and one table.

``python -m experiments.study.robustness --preset demo --json FILE --figure FILE``

Number of vectors, spacing, rule, scaling, grouping by output token, smallest cluster: from one set
of projections. Seeds, depth, width and order of checkpoints: further runs and the shuffled basis.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from experiments.application import run_application
from experiments.config import RunConfig, load_config
from experiments.report.figures_robustness import Survival, draw_survival
from experiments.reproduce.measure import Say, basis_inputs, trained
from experiments.run.machine import hardware, versions
from experiments.run.stages import Run, open_run
from experiments.study.multiverse import branches, conclusions, outcome, survival
from polca_edit.allocation.allocate import Projections, Rule, project
from polca_edit.artifacts import from_plain, load_record, save_record
from polca_edit.basis.build import build_basis
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.files import write_json
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.clusters.density import ClusterSettings

KINDS = ("hessian", "shuffled_hessian", "trajectory_secant", "random")
FACTORS = ("vectors", "stride", "rule", "scaled", "by_output", "min_cluster", "seed", "shape")
RULES: tuple[Rule, ...] = ("first_order", "trapezoid")
#: Further runs: label -> config changes. Depth and width vary one at a time.
SHAPES: dict[str, dict[str, Any]] = {
    "as preset": {},
    "one layer less": {"model.layers": 1},
    "half as wide": {"model.d_model": 64, "model.d_mlp": 256},
}
SCHEMA = "polca-edit/robustness/1"


def stored_projections(
    run: Run, checkpoints: Checkpoints, kinds: Sequence[str], count: int, say: Say
) -> dict[str, tuple[Basis, Projections]]:
    """Bases and their projections on select, kept on disk so that a second call takes no time."""
    folder = run.directory.path / f"multiverse-{count}"
    missing = [kind for kind in kinds if not (folder / f"{kind}.projections.safetensors").exists()]
    if missing:
        inputs = basis_inputs(run, checkpoints)
        started = time.perf_counter()
        built = [build_basis(kind, inputs, count) for kind in missing]
        say(f"  {len(built)} bases in {time.perf_counter() - started:.0f} s")
        started = time.perf_counter()
        measured = project(run.objective, checkpoints, built, run.task.splits.select)
        say(f"  projected in {time.perf_counter() - started:.0f} s")
        for kind, basis, own in zip(missing, built, measured, strict=True):
            save_record(folder / f"{kind}.basis.safetensors", basis)
            save_record(folder / f"{kind}.projections.safetensors", own)
    return {
        kind: (
            load_record(Basis, folder / f"{kind}.basis.safetensors"),
            load_record(Projections, folder / f"{kind}.projections.safetensors"),
        )
        for kind in kinds
    }


def run_branches(
    run: Run, found: dict[str, tuple[Basis, Projections]], strides: Sequence[int], shape: str
) -> list[dict[str, Any]]:
    """Every branch of one run."""
    config, tokens = run.config, run.task.splits.select
    base = ClusterSettings(**config.clusters.model_dump())
    count = len(found["hessian"][0])
    results = []
    for branch in branches((max(2, count // 2), count), strides, RULES):
        outcomes = {
            kind: outcome(projections, branch, tokens, base, config.breakthrough_delta)
            for kind, (_, projections) in found.items()
        }
        results.append(
            {
                **dataclasses.asdict(branch),
                "seed": config.seed,
                "shape": shape,
                "outcomes": outcomes,
                "conclusions": conclusions(outcomes),
            }
        )
    return results


def configs(
    preset: str, seeds: int, shapes: Sequence[str], changes: dict[str, Any]
) -> list[tuple[str, RunConfig]]:
    """The preset at every seed, and the other shapes at seed 0."""
    plans = [("as preset", seed) for seed in range(seeds)] + [(s, 0) for s in shapes if s != "as preset"]
    bases = [{"kind": "trajectory"}]
    return [
        (shape, load_config(preset, {**changes, **SHAPES[shape], "seed": seed, "bases": bases}))
        for shape, seed in plans
    ]


def robustness(
    preset: Annotated[str, typer.Option(help="demo, mini, paper or smoke.")] = "demo",
    seeds: Annotated[int, typer.Option(help="How many seeds.", min=1)] = 2,
    vectors: Annotated[int, typer.Option(help="Most vectors of each basis.", min=2)] = 12,
    shapes: Annotated[bool, typer.Option(help="Also other depths and widths.")] = True,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all branches here.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the figure here (png or svg).")] = None,
    out: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs/robustness"),
) -> None:
    """A multiverse over the settings a reviewer would vary: which conclusions survive."""
    console = Console(highlight=False, width=150)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    results: list[dict[str, Any]] = []
    chosen = tuple(SHAPES) if shapes else ("as preset",)
    for shape, config in configs(preset, seeds, chosen, {}):
        say(f"{shape}, seed {config.seed}")
        run = open_run(config, out / preset / f"{shape.replace(' ', '-')}-seed{config.seed}", say)
        checkpoints = trained(run, say)
        found = stored_projections(run, checkpoints, KINDS, vectors, say)
        results.extend(run_branches(run, found, strides_of(checkpoints), shape))
        table = survival(results, FACTORS)
        record = {
            "schema": SCHEMA,
            "preset": preset,
            "config": config.model_dump(mode="json"),
            "versions": versions(),
            "hardware": hardware(),
            "survival": table,
            "branches": results,
        }
        if json_ is not None:
            write_json(json_, json.loads(json.dumps(record)))
    console.print(survival_table(table))
    if figure is not None:
        draw_survival(from_plain(dict[str, Survival], table), figure)
        say(f"figure: {figure}")


def strides_of(checkpoints: Checkpoints) -> tuple[int, ...]:
    """As recorded, twice and four times as coarse, as long as nine checkpoints stay."""
    return tuple(s for s in (1, 2, 4) if (len(checkpoints) - 1) // s >= 8) or (1,)


def survival_table(table: dict[str, dict[str, Any]]) -> Table:
    """One line per conclusion: share of branches, and the lowest and highest level of any factor."""
    title = "Share of branches in which each conclusion holds (select split)"
    printed = Table(title=title, title_justify="left")
    printed.add_column("conclusion")
    for heading in ("branches", "holds", "lowest at", "highest at"):
        printed.add_column(heading, justify="right")
    for name, entry in table.items():
        levels = [
            (share, f"{factor}={level}")
            for factor, shares in entry["levels"].items()
            for level, share in shares.items()
        ]
        low, high = min(levels), max(levels)
        printed.add_row(
            name,
            str(entry["branches"]),
            f"{entry['share']:.0%}",
            f"{low[1]} ({low[0]:.0%})",
            f"{high[1]} ({high[0]:.0%})",
        )
    return printed


if __name__ == "__main__":
    torch.manual_seed(0)
    run_application(robustness)
