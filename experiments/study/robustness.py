"""Which conclusions survive other settings: a multiverse, one figure and one table.

``python -m experiments.study.robustness --preset demo --json FILE --figure FILE``

Number of vectors, spacing, rule, scaling, grouping by output token, smallest cluster: from one set
of projections. Seeds, depth, width and order of checkpoints: further runs and the shuffled basis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.application import run_application, say
from experiments.config import RunConfig, load_config
from experiments.report.figures.studies import Survival, draw_survival
from experiments.report.formats import share
from experiments.report.tables import Table, table
from experiments.run.run import Run, open_run
from experiments.run.stages.training import trained_series
from experiments.study.measured import on_select
from experiments.study.multiverse import BranchResult, branches, conclusions, outcome, survival
from experiments.study.results import publish, show
from experiments.verbs.options import Result
from polca_edit.allocation.allocate import Projections, Rule
from polca_edit.checkpoints.series import Checkpoints

KINDS = ("hessian", "shuffled_hessian", "trajectory_secant", "random")
RULES: tuple[Rule, ...] = ("first_order", "trapezoid")
#: Further runs: label -> config changes. Depth and width vary one at a time.
SHAPES: dict[str, dict[str, Any]] = {
    "as preset": {},
    "one layer less": {"model.layers": 1},
    "half as wide": {"model.d_model": 64, "model.d_mlp": 256},
}


def run_branches(
    run: Run, found: Mapping[str, Projections], strides: Sequence[int], shape: str
) -> Iterator[BranchResult]:
    """Every branch of one run, basis name -> its projections on select."""
    tokens, settings = run.task.splits.select, run.settings()
    count = found["hessian"].gradients.shape[1]
    for branch in branches((max(2, count // 2), count), strides, RULES):
        outcomes = {kind: outcome(own, branch, tokens, settings) for kind, own in found.items()}
        yield BranchResult(branch, run.config.seed, shape, conclusions(outcomes))


def configs(preset: str, seeds: int, shapes: Sequence[str]) -> list[tuple[str, RunConfig]]:
    """The preset at every seed, and the other shapes at seed 0."""
    plans = [("as preset", seed) for seed in range(seeds)] + [(s, 0) for s in shapes if s != "as preset"]
    bases = [{"kind": "trajectory"}]
    return [
        (shape, load_config(preset, {**SHAPES[shape], "seed": seed, "bases": bases})) for shape, seed in plans
    ]


def strides_of(checkpoints: Checkpoints) -> tuple[int, ...]:
    """As recorded, twice and four times as coarse, as long as nine checkpoints stay."""
    return tuple(s for s in (1, 2, 4) if (len(checkpoints) - 1) // s >= 8) or (1,)


def survival_table(found: Mapping[str, Survival]) -> Table:
    """One line per conclusion: share of branches, and the lowest and highest level of any factor."""
    rows = []
    for name, entry in found.items():
        levels = [(s, f"{f}={level}") for f, shares in entry.levels.items() for level, s in shares.items()]
        ends = [f"{level} ({share(value)})" for value, level in (min(levels), max(levels))]
        rows.append([name, str(entry.branches), share(entry.share), *ends])
    title = "Share of branches in which each conclusion holds (select split)"
    return table(["conclusion", "branches", "holds", "lowest at", "highest at"], rows, title)


def robustness(
    preset: Annotated[str, typer.Option(help="demo, mini, paper or smoke.")] = "demo",
    seeds: Annotated[int, typer.Option(help="How many seeds.", min=1)] = 2,
    vectors: Annotated[int, typer.Option(help="Most vectors of each basis.", min=2)] = 12,
    shapes: Annotated[bool, typer.Option(help="Also other depths and widths.")] = True,
    json_: Result = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the figure here (png).")] = None,
    out: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs/robustness"),
) -> None:
    """A multiverse over the settings a reviewer would vary: which conclusions survive."""
    results: list[BranchResult] = []
    plans = configs(preset, seeds, tuple(SHAPES) if shapes else ("as preset",))
    for shape, config in plans:
        say(f"{shape}, seed {config.seed}")
        run = open_run(config, out / preset / f"{shape.replace(' ', '-')}-seed{config.seed}", say)
        checkpoints = trained_series(run)
        measured = on_select(run, checkpoints, dict.fromkeys(KINDS, vectors), say)
        projections = {kind: own.projections for kind, own in measured.items()}
        results.extend(run_branches(run, projections, strides_of(checkpoints), shape))
        found = survival(results)
        tables = [survival_table(found)]
        publish(json_, "robustness/2", plans[0][1], range(seeds), {"survival": found}, tables)
    show(tables)
    if figure is not None:
        draw_survival(found, figure)
        say(f"figure: {figure}")


if __name__ == "__main__":
    run_application(robustness)
