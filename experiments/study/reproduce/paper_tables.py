"""The paper's tables from the stored projections of a run: its own measure, its own clustering, its claims.

``polca-edit study paper-tables RUN --beside OTHER --json FILE``

A second table changes one setting at a time and leaves all else as published, so that one can see which of
them makes the carry signal (arXiv 2506.15872, Tables 1, 8-11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from experiments.application import say
from experiments.report.formats import decimal
from experiments.report.tables import Column, Table, table
from experiments.run.run import Run, load_run
from experiments.study.reproduce.carry import CARRY, counted_places
from experiments.study.reproduce.claims import JudgedClaim
from experiments.study.reproduce.paper_rows import FamilyRow, claims_of, factor_rows, family_rows, stored
from experiments.study.reproduce.published import CARRY as PUBLISHED
from experiments.study.reproduce.published import TOP_THREE
from experiments.study.reproduce.tables import claims_table
from experiments.study.results import publish, show
from experiments.verbs.options import Result


@dataclass(frozen=True)
class PaperTables:
    """All rows.

    Attributes:
        carry_share: share of carry tokens among those at the places that count: what chance gives.
        families: every family, raw and scaled.
        factors: one setting changed at a time.
        claims: the published comparisons, judged on the raw rows.
    """

    carry_share: float
    families: tuple[FamilyRow, ...]
    factors: tuple[FamilyRow, ...]
    claims: tuple[JudgedClaim, ...]


def signal_table(rows: Sequence[FamilyRow], title: str) -> Table:
    """Families beside the published numbers."""
    words = [Column(name, left=True) for name in ("trajectories", "seed", "spacing", "rule", "shape")]
    numbers = ("kept", "clusters", "eligible", "homogeneity", "recall", "F1", "hidden", "outliers")
    lines = []
    for row in rows:
        paper = PUBLISHED.get(row.name)
        published = [decimal(value, 3) for value in paper] if paper and not row.scaled else [""] * 4
        lines.append(
            [
                *(row.name, str(row.seed), row.spacing, row.rule or "–"),
                "scaled" if row.scaled else "raw",
                *(str(row.kept), str(row.clusters), str(row.eligible)),
                *(decimal(value, 3) for value in (row.homogeneity, row.recall, row.f1, row.hidden)),
                decimal(row.outliers),
                *published,
            ]
        )
    beside = [Column(f"paper: {name}") for name in ("homogeneity", "recall", "F1", "hidden")]
    return table([*words, *(Column(name) for name in numbers), *beside], lines, title)


def top_three_table(rows: Sequence[FamilyRow]) -> Table:
    """The three most homogeneous carry clusters, raw and scaled, beside the published ones."""
    lines = [
        [
            row.name,
            str(row.seed),
            row.rule or "–",
            "scaled" if row.scaled else "raw",
            " ".join(decimal(value, 3) for value in row.top_three) or "none",
            "" if row.scaled else " ".join(decimal(v, 3) for v in TOP_THREE.get(row.name, ())) or "–",
        ]
        for row in rows
    ]
    headings = ("trajectories", "seed", "rule", "shape", "ours", "paper")
    return table(
        [Column(name, left=True) for name in headings],
        lines,
        "Tables 9 and 10: three most homogeneous carry clusters",
    )


def factor_table(rows: Sequence[FamilyRow]) -> Table:
    """One setting changed at a time."""
    lines = [
        [
            row.name,
            row.rule,
            *(str(row.kept), str(row.clusters), str(row.eligible)),
            *(decimal(value, 3) for value in (row.homogeneity, row.recall, row.f1)),
            decimal(row.outliers),
        ]
        for row in rows
    ]
    words = [Column("changed", left=True), Column("rule", left=True)]
    numbers = ("kept", "clusters", "eligible", "homogeneity", "recall", "F1", "outliers")
    return table(
        [*words, *(Column(name) for name in numbers)],
        lines,
        "Where the carry signal comes from: the published setting, and one part of it changed at a time",
    )


def paper_tables_of(run: Run, beside: Sequence[Run]) -> PaperTables:
    """All tables of a run with a Hessian basis, and of other bases of the same training.

    Raises:
        ValueError: for a run without a Hessian basis.
    """
    measured = [given for each in (run, *beside) for given in stored(each)]
    hessian = next((given for given in measured if given.kind == "hessian"), None)
    if hessian is None:
        raise ValueError(
            f"run '{run.directory.path}' must have a basis of kind 'hessian', it has none; name another run"
        )
    tokens = run.task.splits.select
    rows = tuple(family_rows(measured))
    carry_share = float(tokens.skills[CARRY][counted_places(tokens)].double().mean())
    return PaperTables(carry_share, rows, tuple(factor_rows(hessian)), claims_of(rows))


def tables_of(found: PaperTables) -> list[Table]:
    """Every table."""
    share = f"{found.carry_share:.3f}"
    title = (
        "Tables 1, 8 and 11 by the paper's own clustering and score "
        f"({share} of the tokens at the 10s and 100s place have a carry)"
    )
    return [
        signal_table(found.families, title),
        top_three_table(found.families),
        factor_table(found.factors),
        claims_table(found.claims),
    ]


def paper_tables(
    run: Annotated[Path, typer.Argument(help="Run with a Hessian basis and its projections.")],
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Runs with other bases of the same training, e.g. random; repeat."),
    ] = None,
    json_: Result = None,
) -> None:
    """The paper's tables from stored projections, scored as the paper scores them."""
    opened = load_run(run, say=say)
    others = [load_run(each, say=say) for each in beside or []]
    found = paper_tables_of(opened, others)
    tables = tables_of(found)
    show(tables)
    publish(json_, "paper-tables/1", opened.config, [opened.config.seed], found, tables)
