"""The chapter on labels, and what the terminal says of them: both from ``labels/NAME.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup
from rich.console import Console

from experiments.report.answers import count_cell
from experiments.report.blocks import Block, Section, paragraph
from experiments.report.formats import count, decimal, highlighted
from experiments.report.tables import Cell, Column, Table, table
from experiments.run.stages.label_records import (
    EXACT_LOSS,
    BasisLabels,
    ClusterLabel,
    TagRecord,
    TransferredLabel,
    label_files,
)
from experiments.run.store import RunDirectory
from polca_edit.artifacts import load_record

#: Clusters whose contexts are shown, and rows the terminal shows.
MOST_CONTEXTS, MOST_ROWS = 12, 8


def read_labels(directory: RunDirectory) -> dict[str, BasisLabels]:
    """Basis (or ``exact_loss``) -> labels of a run, empty where none were made."""
    return {name: load_record(BasisLabels, path) for name, path in label_files(directory.path).items()}


def label_section(directory: RunDirectory) -> Section | None:
    """The chapter "What the tokens of a cluster share"; None where nothing was labelled."""
    blocks: list[Block] = []
    for basis, found in read_labels(directory).items():
        title = "Clusters of the exact losses (no basis)" if basis == EXACT_LOSS else f"{basis} basis"
        blocks += [Markup("<h3>{}</h3>").format(title), paragraph(counted(basis, found))]
        blocks.append(labels_table(found.clusters))
        shown = [entry for entry in found.clusters if entry.contexts][:MOST_CONTEXTS]
        blocks += [_contexts(entry) for entry in shown]
        if len(shown) < len(found.clusters):
            blocks.append(paragraph(f"Tokens in context of {len(shown)} of {len(found.clusters)} clusters."))
    return Section("What the tokens of a cluster share", blocks) if blocks else None


def counted(basis: str, found: BasisLabels) -> str:
    """How many clusters or vectors have a label, in words."""
    rule = f"a feature rule of AUC {found.threshold} or more on held-out documents"
    if basis == EXACT_LOSS:
        told = f"{found.clusters_with_rule} of {count(len(found.clusters))} clusters have {rule}"
    else:
        told = f"{found.vectors_with_rule} of {found.vectors_kept} kept vectors have a cluster with {rule}"
    if any(entry.tags is not None for entry in found.clusters):
        told += f", {found.vectors_with_tags} one with a part-of-speech label"
    return (
        f"{told}; {len(found.distinct_groups)} groups of clusters are left when those that share more than "
        "half of their tokens are taken together."
    )


def labels_table(entries: Sequence[ClusterLabel], title: str = "") -> Table:
    """One line per cluster: its rule, how well it holds, and its tags where the tokens have some."""
    gold = any(entry.tags is not None for entry in entries)
    columns: list[Column | str] = [
        Column("vector:cluster", left=True), "tokens", Column("rule", left=True), "AUC", "AUC shuffled",
        "coverage", "precision", "support",
    ]  # fmt: skip
    columns += [Column("tags", left=True), "tag coverage", "lift", "chance"] if gold else []
    rows = []
    for entry in entries:
        strong = "strong" if entry.counts else ""
        cells = [Cell(f"{entry.vector}:{entry.cluster}", look=strong), count_cell(entry.tokens)]
        cells.append(Cell(entry.rule, look=f"rule {strong}".strip()))
        numbers = (entry.auc, entry.auc_shuffled, entry.coverage, entry.precision)
        cells += [Cell(decimal(value), sort=value) for value in numbers]
        cells.append(count_cell(entry.support))
        rows.append([*cells, *_tag_cells(entry.tags)] if gold else cells)
    return table(columns, rows, title)


def transferred_table(rows: Sequence[TransferredLabel]) -> Table:
    """How well each cluster's rule holds on another text."""
    columns = (
        Column("basis", left=True), Column("vector:cluster", left=True), "AUC", "AUC on the other text",
        "tokens there", Column("rule", left=True),
    )  # fmt: skip
    cells: list[list[Cell | str]] = [
        [
            row.basis,
            f"{row.vector}:{row.cluster}",
            Cell(decimal(row.auc), sort=row.auc),
            Cell(decimal(row.auc_transferred), sort=row.auc_transferred),
            count_cell(row.tokens),
            row.rule,
        ]
        for row in rows
    ]
    return table(columns, cells, "Do the labels hold on the other text?")


def _tag_cells(tags: TagRecord | None) -> list[Cell]:
    if tags is None:
        return [Cell("–")] * 4
    numbers = ((tags.coverage, 2), (tags.lift, 1), (tags.chance, 2))
    return [Cell(tags.text), *(Cell(decimal(value, digits), sort=value) for value, digits in numbers)]


def _contexts(entry: ClusterLabel) -> Markup:
    title = f"{entry.vector}:{entry.cluster}: tokens nearest the medoid"
    items = Markup("").join(Markup("<li>{}</li>").format(highlighted(text)) for text in entry.contexts)
    return Markup("<details><summary>{}</summary><ol>{}</ol></details>").format(title, items)


def print_labels(labels: Mapping[str, BasisLabels], console: Console) -> None:
    """The best labels of every basis, and how many there are."""
    for basis, found in labels.items():
        console.print(f"{basis}: {counted(basis, found)}")
        best = sorted(found.clusters, key=lambda entry: -entry.auc)[:MOST_ROWS]
        title = f"{basis}: {len(best)} of {len(found.clusters)} clusters, best rules first"
        console.print(labels_table(best, title).terminal())
