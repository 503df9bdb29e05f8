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


def _cluster_table(summary: dict[str, Any]) -> Table:
    table = Table(
        title="Largest clusters: what they hold, and what undoing their vector costs (select split)",
        title_justify="left",
    )
    for heading in ("basis", "vector", "cluster", "tokens", "best skill", "homogeneity", "recall", "lift"):
        table.add_column(heading, justify="left" if heading in ("basis", "best skill") else "right")
    table.add_column("damage on / off target", justify="right")
    rows = []
    for name, analysis in summary["analyses"].items():
        for c in analysis["clusters"]:
            rows.append((c["homogeneity"].get(c["label"], 0.0) * c["tokens"], name, analysis, c))
    for _, name, analysis, c in sorted(rows, key=lambda row: -row[0])[:10]:
        hit = find_damage(analysis, c["vector"], c["cluster"], "select")
        label = c["label"]
        table.add_row(
            name,
            str(c["vector"]),
            str(c["cluster"]),
            str(c["tokens"]),
            label or "-",
            "-" if label is None else f"{c['homogeneity'][label]:.2f}",
            "-" if label is None else f"{c['recall_all'][label]:.2f}",
            "-" if label is None else f"{c['lift'][label]:.1f}",
            "-" if hit is None else f"{hit['on_target']:+.3f} / {hit['off_target'] or 0:+.3f}",
        )
    if not rows:
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
    """The vector whose removal costs one part at least 1 nat and the worst other part least of that."""
    best: dict[str, Any] | None = None
    for name, analysis in summary["analyses"].items():
        for row in analysis["damage"]:
            if row["cluster"] is not None or row["split"] != split or row["dose"] != 1.0:
                continue
            parts = {skill: row["groups"][skill] for skill in partition if skill in row["groups"]}
            if len(parts) < 2:
                continue
            skill = max(parts, key=lambda key: parts[key])
            off = max(value for key, value in parts.items() if key != skill)
            if parts[skill] < 1.0:
                continue
            share = max(off, 0.0) / parts[skill]
            if best is None or share < best["share"]:
                best = {
                    "basis": name,
                    "vector": row["vector"],
                    "skill": skill,
                    "on": parts[skill],
                    "off": off,
                    "share": share,
                    "split": split,
                }
    return best
