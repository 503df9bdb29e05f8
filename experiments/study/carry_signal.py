"""Where the published carry signal lives: spacing x rule x shape x basis, with the ablation beside it.

``python -m experiments.study.carry_signal --preset demo --json FILE``

Planning runs found paper-like carry clusters in first-order Hessian trajectories scaled to their own
maximum, hardly in trapezoid ones, and none in a basis that explains the loss. This asks each
combination, and what undoing the best cluster's vector costs the tokens with and without a carry.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from experiments.application import run_application
from experiments.config import load_config
from experiments.reproduce.measure import Say, trained
from experiments.reproduce.rivals import CURVATURE_SUMS
from experiments.run.machine import hardware, versions
from experiments.run.run import Run, open_run
from experiments.study.multiverse import best_carry, group_damage, thinned
from experiments.study.robustness import stored_projections
from interventions.damage import EvaluatedSplit
from interventions.edits import project_out
from polca_edit.allocation.allocate import Projections, Rule, allocate, explained_share, second_order_terms
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.files import write_json
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.clusters.density import ClusterSettings, cluster_trajectories

KINDS = ("hessian", "trajectory", "random")
RULES: tuple[Rule, ...] = ("first_order", "second_order", "trapezoid")
SPACINGS = (5, 20, 40)
SCHEMA = "polca-edit/carry-signal/1"


def vector_damage(run: Run, checkpoints: Checkpoints, basis: Basis) -> list[dict[str, float | None]]:
    """What undoing each vector's net movement costs, by group (O1 on the final weights), nats."""
    split = EvaluatedSplit(run.objective, checkpoints, run.task.splits.select)
    costs: list[dict[str, float | None]] = []
    for vector in range(len(basis)):
        edit = project_out(split, basis.rows[vector])
        change = split.damage(edit).change
        costs.append({**group_damage(change, split.tokens), "displacement": edit.norm})
    return costs


def signal_rows(
    run: Run,
    kind: str,
    projections: Projections,
    damage: Sequence[dict[str, float | None]],
    spacings: Sequence[int],
    min_share: float,
) -> list[dict[str, Any]]:
    """One row per spacing, rule and shape of one basis."""
    tokens = run.task.splits.select
    recorded = int(projections.steps[1] - projections.steps[0])
    base = replace(ClusterSettings(**run.config.clusters.model_dump()), min_cluster_share=min_share)
    rows = []
    for spacing in spacings:
        own = thinned(projections, max(1, spacing // recorded))
        for rule in RULES:
            allocation = allocate(own, rule)
            paths = allocation.projected_loss()
            attributed = float(allocation.values.sum((0, 1)).double().mean())
            exact = float(allocation.exact.sum(0).double().mean())
            for scaled in (False, True):
                clusters = cluster_trajectories(paths, replace(base, scaled=scaled))
                best = best_carry(clusters, tokens, min_share)
                rows.append(
                    {
                        "seed": run.config.seed,
                        "basis": kind,
                        "spacing": spacing,
                        "rule": rule,
                        "scaled": scaled,
                        "explained_share": explained_share(attributed, exact),
                        "homogeneity": best.homogeneity if best else None,
                        "recall_all": best.recall_all if best else None,
                        "recall_paper": best.recall_paper if best else None,
                        "f1": best.f1 if best else None,
                        "tokens": best.tokens if best else None,
                        "vector": best.vector if best else None,
                        "damage": damage[best.vector] if best else None,
                        "guarded": allocation.guarded,
                    }
                )
    return rows


def carry_signal(
    preset: Annotated[str, typer.Option(help="demo, mini, paper or smoke.")] = "demo",
    seeds: Annotated[int, typer.Option(help="How many seeds.", min=1)] = 1,
    vectors: Annotated[int, typer.Option(help="Vectors of each basis.", min=2)] = 12,
    min_share: Annotated[float, typer.Option(help="Smallest cluster, share of tokens.")] = 0.03,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all rows here.")] = None,
    out: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs/carry-signal"),
) -> None:
    """Settle where the published carry clusters come from."""
    console = Console(highlight=False, width=150)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        spacing = {} if preset == "smoke" else {"training.record_every": SPACINGS[0]}
        config = load_config(preset, {**spacing, "seed": seed, "bases": [{"kind": "trajectory"}]})
        run = open_run(config, out / preset / f"seed{seed}", say)
        rows.extend(seed_rows(run, vectors, min_share, say))
        if json_ is not None:
            record = {
                "schema": SCHEMA,
                "preset": preset,
                "config": config.model_dump(mode="json"),
                "versions": versions(),
                "hardware": hardware(),
                "rows": rows,
            }
            write_json(json_, json.loads(json.dumps(record)))
    console.print(signal_table(rows))


def seed_rows(run: Run, vectors: int, min_share: float, say: Say) -> list[dict[str, Any]]:
    """All rows of one run."""
    checkpoints = trained(run, say)
    found = stored_projections(run, checkpoints, KINDS, vectors, say)
    recorded = checkpoints.steps[1] - checkpoints.steps[0]
    spacings = [recorded * k for k in (1, 4, 8)]
    curvature = run.task.splits.curvature
    sample = curvature.select(torch.arange(min(CURVATURE_SUMS, curvature.sequences)))
    rows = []
    for kind, (basis, projections) in found.items():
        means, curvatures = second_order_terms(run.objective, checkpoints, basis, sample)
        full = replace(projections, mean_gradients=means, curvatures=curvatures)
        damage = vector_damage(run, checkpoints, basis)
        rows.extend(signal_rows(run, kind, full, damage, spacings, min_share))
        say(f"  {kind} done")
    return rows


def signal_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Everything in one table."""
    table = Table(title="Best carry cluster, and what undoing its vector costs (nats)", title_justify="left")
    for name in ("seed", "basis", "spacing", "rule", "shape"):
        table.add_column(name)
    for name in ("explained", "homogeneity", "recall", "F1", "carry", "no carry", "other places"):
        table.add_column(name, justify="right")

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    for row in rows:
        damage = row["damage"] or {}
        table.add_row(
            str(row["seed"]),
            row["basis"],
            str(row["spacing"]),
            row["rule"],
            "scaled" if row["scaled"] else "raw",
            *(number(row[key]) for key in ("explained_share", "homogeneity", "recall_paper", "f1")),
            *(number(damage.get(key)) for key in ("carry", "no carry", "other places")),
        )
    return table


if __name__ == "__main__":
    torch.manual_seed(0)
    run_application(carry_signal)
