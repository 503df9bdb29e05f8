"""Terminal tables that a newcomer can read."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """What a run found, in two tables and a few sentences."""
    bases = Table(
        title="How much of the loss change each basis accounts for (nats per token)", title_justify="left"
    )
    for heading in (
        "basis",
        "vectors",
        "exact",
        "attributed",
        "residual",
        "quadrature error",
        "explained share",
    ):
        bases.add_column(heading, justify="left" if heading == "basis" else "right")
    bases.add_column("movement held (net / path)", justify="right")
    bases.add_column("random walk", justify="right")
    for name, analysis in summary["analyses"].items():
        change, basis = analysis["loss_change"], analysis["basis"]
        share = basis["explained_share"]
        bases.add_row(
            name,
            str(basis["vectors"]),
            f"{change['exact']:.3f}",
            f"{change['attributed']:.3f}",
            f"{change['residual']:.3f}",
            f"{change['quadrature_error']:.3f}",
            "-" if share is None else f"{share:.1%}",
            f"{basis['captured_net']:.2%} / {basis['captured_path']:.2%}",
            f"{basis['random_walk_net']:.1%} / {basis['random_walk_path']:.1%}",
        )
    console.print(bases)
    console.print(_cluster_table(summary))
    best = most_selective(summary)
    if best:
        console.print(
            f"Most selective vector: undoing {best['basis']} {best['vector']} costs '{best['skill']}' "
            f"{best['on']:+.2f} nats and each other digit at most {best['off']:+.3f} ({best['split']} split)."
        )


PER_SKILL, ROWS = 2, 12


def f1(cluster: dict[str, Any]) -> float:
    """F1 of homogeneity and recall for the cluster's label, 0 without one."""
    label = cluster["label"]
    if label not in cluster["homogeneity"]:
        return 0.0
    precision, recall = float(cluster["homogeneity"][label]), float(cluster["recall_all"][label])
    return 2.0 * precision * recall / max(precision + recall, 1e-12)


def _cluster_table(summary: dict[str, Any]) -> Table:
    table = Table(
        title="Clusters that agree best with a known skill; cost of undoing their vector (select split)",
        title_justify="left",
    )
    for heading in ("basis", "vector", "cluster", "tokens", "best skill", "homogeneity", "recall", "lift"):
        table.add_column(heading, justify="left" if heading in ("basis", "best skill") else "right")
    table.add_column("damage on / off target", justify="right")
    found = [(name, a, c) for name, a in summary["analyses"].items() for c in a["clusters"]]
    found.sort(key=lambda item: (-f1(item[2]), -item[2]["tokens"]))
    shown: dict[str | None, int] = {}
    for name, analysis, c in found:
        label = c["label"]
        shown[label] = shown.get(label, 0) + 1
        known = label in c["homogeneity"]
        if sum(shown.values()) > ROWS or (known and shown[label] > PER_SKILL):
            shown[label] -= 1
            continue
        hit = find_damage(analysis, c["vector"], c["cluster"], "select")
        table.add_row(
            name,
            str(c["vector"]),
            str(c["cluster"]),
            str(c["tokens"]),
            label or "-",
            f"{c['homogeneity'][label]:.2f}" if known else "-",
            f"{c['recall_all'][label]:.2f}" if known else "-",
            f"{c['lift'][label]:.1f}" if known else "-",
            "-" if hit is None else f"{hit['on_target']:+.3f} / {hit['off_target'] or 0:+.3f}",
        )
    if not found:
        table.add_row("no clusters found", *[""] * 8)
    return table


def find_damage(
    analysis: dict[str, Any], vector: int, cluster: int | None, split: str
) -> dict[str, Any] | None:
    """The project_out row of a (vector, cluster) on a split."""
    return next(
        (
            row
            for row in analysis["damage"]
            if row["vector"] == vector
            and row["cluster"] == cluster
            and row["split"] == split
            and row["dose"] == 1.0
        ),
        None,
    )


def most_selective(
    summary: dict[str, Any],
    partition: tuple[str, ...] = ("1000s", "100s", "10s", "1s"),
    split: str = "evaluate",
) -> dict[str, Any] | None:
    """The vector whose removal costs one part at least 1 nat and the worst other part least of that.

    It is chosen on the select split; the numbers are those of ``split``.
    """
    chosen: tuple[float, str, int, str] | None = None
    for name, analysis in summary["analyses"].items():
        for row in analysis["damage"]:
            parts = _parts(row, partition, "select")
            if len(parts) < 2:
                continue
            skill = max(parts, key=lambda key: parts[key])
            off = max(value for key, value in parts.items() if key != skill)
            share = max(off, 0.0) / max(parts[skill], 1e-12)
            if parts[skill] >= 1.0 and (chosen is None or share < chosen[0]):
                chosen = share, name, row["vector"], skill
    if chosen is None:
        return None
    _, name, vector, skill = chosen
    row = find_damage(summary["analyses"][name], vector, None, split)
    parts = {} if row is None else _parts(row, partition, split)
    if skill not in parts:
        return None
    off = max(value for key, value in parts.items() if key != skill)
    return {
        "basis": name,
        "vector": vector,
        "skill": skill,
        "on": parts[skill],
        "off": off,
        "share": max(off, 0.0) / parts[skill] if parts[skill] > 0 else None,
        "split": split,
    }


def _parts(row: dict[str, Any], partition: tuple[str, ...], split: str) -> dict[str, float]:
    """Damage per part of a whole-vector project_out row of the split; empty for other rows."""
    if row["cluster"] is not None or row["split"] != split or row["dose"] != 1.0:
        return {}
    return {skill: row["groups"][skill] for skill in partition if skill in row["groups"]}
