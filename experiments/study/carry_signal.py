"""Where the published carry signal lives: spacing x rule x shape x basis, with the ablation beside it.

``python -m experiments.study.carry_signal --preset demo --json FILE``

Planning runs found paper-like carry clusters in first-order Hessian trajectories scaled to their own
maximum, hardly in trapezoid ones, and none in a basis that explains the loss. This asks each
combination, and what undoing the best cluster's vector costs the tokens with and without a carry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from experiments.application import run_application, say
from experiments.config import load_config
from experiments.report.formats import decimal
from experiments.report.tables import Column, Table, table
from experiments.run.run import Run, open_run
from experiments.run.stages.training import trained_series
from experiments.study.measured import OnSelect, Say, on_select, second_order
from experiments.study.multiverse import thinned
from experiments.study.reproduce.carry import GroupDamage, eligible_clusters, group_damage
from experiments.study.results import publish, show
from experiments.verbs.options import Result, finite
from interventions.damage import EvaluatedSplit
from interventions.edits import project_out
from polca_edit.allocation.allocate import Rule, allocate, explained_share
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.clusters.agreement import SkillScores
from polca_edit.clusters.density import cluster_trajectories

KINDS = ("hessian", "trajectory", "random")
RULES: tuple[Rule, ...] = ("first_order", "second_order", "trapezoid")
#: Steps between records, and how many of them a spacing of the table takes.
RECORDED, MULTIPLES = 5, (1, 4, 8)


@dataclass(frozen=True)
class SignalRow:
    """The best carry cluster of one combination.

    Attributes:
        seed: of the run.
        basis: kind.
        spacing: steps between checkpoints.
        rule: of the allocation.
        scaled: whether trajectories are divided by their own maximum.
        explained_share: attributed over exact change.
        guarded: denominators of Eq. 6 that were too small to divide by.
        vector: of the most homogeneous eligible cluster on select; None, as all below, without one.
        tokens: in the cluster.
        homogeneity: of the cluster.
        recall_all: of the cluster.
        recall_paper: of the cluster.
        f1: of the cluster.
        damage: cost of undoing the net movement along its vector, nats.
        displacement: size of that movement, weight units.
    """

    seed: int
    basis: str
    spacing: int
    rule: str
    scaled: bool
    explained_share: float | None
    guarded: int
    vector: int | None = None
    tokens: int | None = None
    homogeneity: float | None = None
    recall_all: float | None = None
    recall_paper: float | None = None
    f1: float | None = None
    damage: GroupDamage | None = None
    displacement: float | None = None


def signal_rows(
    run: Run, kind: str, measured: OnSelect, split: EvaluatedSplit, min_share: float
) -> Iterator[SignalRow]:
    """One row per spacing, rule and shape of one basis, whose projections have the terms of Eq. 6."""
    projections, tokens = measured.projections, split.tokens
    recorded = int(projections.steps[1] - projections.steps[0])
    base = replace(run.settings().clusters, min_cluster_share=min_share)
    for multiple, rule in product(MULTIPLES, RULES):
        allocation = allocate(thinned(projections, multiple), rule)
        paths, totals = allocation.projected_loss(), allocation.totals()
        for scaled in (False, True):
            clusters = cluster_trajectories(paths, replace(base, scaled=scaled))
            row = SignalRow(
                run.config.seed,
                kind,
                recorded * multiple,
                rule,
                scaled,
                explained_share(totals["attributed"], totals["exact"]),
                allocation.guarded,
            )
            best = next(iter(eligible_clusters(clusters, tokens, min_share)), None)
            yield row if best is None else _with_cluster(row, best, measured.basis, split)


def _with_cluster(row: SignalRow, best: SkillScores, basis: Basis, split: EvaluatedSplit) -> SignalRow:
    edit = project_out(split, basis.rows[best.vector])
    return replace(
        row,
        vector=best.vector,
        tokens=best.tokens,
        homogeneity=best.homogeneity,
        recall_all=best.recall_all,
        recall_paper=best.recall_paper,
        f1=best.f1,
        damage=group_damage(split.damage(edit).change, split.tokens),
        displacement=edit.norm,
    )


def seed_rows(
    run: Run, checkpoints: Checkpoints, vectors: int, min_share: float, say: Say
) -> Iterator[SignalRow]:
    """All rows of one run."""
    split = EvaluatedSplit(run.objective, checkpoints, run.task.splits.select)
    for kind, own in on_select(run, checkpoints, dict.fromkeys(KINDS, vectors), say).items():
        [curved] = second_order(run, checkpoints, own.basis, own.projections)
        yield from signal_rows(run, kind, replace(own, projections=curved), split, min_share)
        say(f"  {kind} done")


def signal_table(rows: Sequence[SignalRow]) -> Table:
    """Every combination."""
    words = [Column(name, left=True) for name in ("seed", "basis", "spacing", "rule", "shape")]
    numbers = ("explained", "homogeneity", "recall", "F1", "carry", "no carry", "other places")
    lines = []
    for row in rows:
        damage, values = row.damage, [row.explained_share, row.homogeneity, row.recall_paper, row.f1]
        values += [damage.carry, damage.no_carry, damage.other_places] if damage else [None] * 3
        shape = "scaled" if row.scaled else "raw"
        lines.append(
            [str(row.seed), row.basis, str(row.spacing), row.rule, shape, *(decimal(v) for v in values)]
        )
    title = "Best carry cluster, and what undoing its vector costs (nats)"
    return table([*words, *(Column(name) for name in numbers)], lines, title)


def carry_signal(
    preset: Annotated[str, typer.Option(help="demo, mini, paper or smoke.")] = "demo",
    seeds: Annotated[int, typer.Option(help="How many seeds.", min=1)] = 1,
    vectors: Annotated[int, typer.Option(help="Vectors of each basis.", min=2)] = 12,
    min_share: Annotated[
        float, typer.Option(min=1e-6, max=1.0, callback=finite, help="Smallest cluster, a share.")
    ] = 0.03,
    json_: Result = None,
    out: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs/carry-signal"),
) -> None:
    """Settle where the published carry clusters come from."""
    rows: list[SignalRow] = []
    spacing = {} if preset == "smoke" else {"training.record_every": RECORDED}
    for seed in range(seeds):
        config = load_config(preset, {**spacing, "seed": seed, "bases": [{"kind": "trajectory"}]})
        run = open_run(config, out / preset / f"seed{seed}", say)
        rows.extend(seed_rows(run, trained_series(run), vectors, min_share, say))
        tables = [signal_table(rows)]
        publish(json_, "carry-signal/2", config, range(seed + 1), {"rows": rows}, tables)
    show(tables)


if __name__ == "__main__":
    run_application(carry_signal)
