"""What several seeds of one arithmetic config found, beside the targets of the demo.

``python -m experiments.study.demo_table runs/demo runs/demo-1 ... --json FILE``
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from experiments.application import run_application
from experiments.run.machine import hardware, versions
from polca_edit.checkpoints.files import write_json

SCHEMA = "polca-edit/demo-table/1"
#: What a cluster must reach to count: homogeneity, recall of all skill tokens, lift, share of tokens.
CLUSTER_BOUNDS = {"homogeneity": 0.9, "recall_all": 0.3, "lift": 1.5, "share": 0.05}
#: Skill that is learned first by every model and says little.
EASY = "1000s"


def best_cluster(summary: dict[str, Any]) -> dict[str, Any] | None:
    """The cluster nearest to all bounds for a skill other than the easy one, chosen on select.

    Nearness is the product of the reached fractions of the bounds; ties go to the larger F1.
    """
    best: tuple[tuple[float, float], dict[str, Any]] | None = None
    for name, analysis in summary["analyses"].items():
        for cluster in analysis["clusters"]:
            share = cluster["tokens"] / summary["tokens"]["select"]
            for skill in cluster["homogeneity"]:
                if skill == EASY:
                    continue
                values = {key: cluster[key][skill] for key in ("homogeneity", "recall_all", "lift")}
                values["share"] = share
                reached = 1.0
                for key, bound in CLUSTER_BOUNDS.items():
                    reached *= min(values[key] / bound, 1.0)
                rank = (reached, values["homogeneity"] * values["recall_all"])
                if best is None or rank > best[0]:
                    place = {"basis": name, "vector": cluster["vector"], "cluster": cluster["cluster"]}
                    met = all(values[key] >= bound for key, bound in CLUSTER_BOUNDS.items())
                    best = rank, {**place, "skill": skill, "met": met, "select": values}
    if best is None:
        return None
    row = best[1]
    analysis, pair = summary["analyses"][row["basis"]], (row["vector"], row["cluster"])
    on_evaluate = next(
        (c for c in analysis["evaluate_clusters"] if (c["vector"], c["cluster"]) == pair), None
    )
    if on_evaluate is not None:
        row["evaluate"] = {k: on_evaluate[k][row["skill"]] for k in ("homogeneity", "recall_all", "lift")}
        row["rule_auc"], row["rule"] = on_evaluate["rule_auc"], on_evaluate["rule"]
    damage = {split: find_damage(analysis, *pair, split) for split in ("select", "evaluate")}
    row["damage"] = {
        split: None if hit is None else {k: hit[k] for k in ("on_target", "off_target", "headroom")}
        for split, hit in damage.items()
    }
    return row


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


def seed_row(run: Path) -> dict[str, Any]:
    """One row from a run's records.

    Raises:
        ValueError: if the run is not finished.
    """
    try:
        summary = json.loads((run / "summary.json").read_text())
        record = json.loads((run / "run.json").read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"'{run}' must be a finished run, '{error.filename}' is missing; run it first"
        ) from None
    changes = {name: a["loss_change"] for name, a in summary["analyses"].items()}
    return {
        "run": run.name,
        "seed": summary["seed"],
        "seconds": summary["cost"]["seconds"],
        "peak_rss_bytes": summary["cost"]["peak_rss_bytes"],
        "threads": record["hardware"]["torch_threads"],
        "quadrature_share": {n: c["quadrature_error"] / c["exact"] for n, c in changes.items()},
        "explained_share": {n: a["basis"]["explained_share"] for n, a in summary["analyses"].items()},
        "cluster": best_cluster(summary),
        "vector": most_selective(summary),
    }


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """The rows as a table, one line per seed."""
    table = Table(title="Seeds beside the targets of the demo", title_justify="left")
    headings = ("seed", "seconds", "GB", "quadrature error", "explained (trajectory)", "best cluster, select")
    for heading in (*headings, "the same, rule on evaluate", "most selective vector, evaluate"):
        table.add_column(heading)
    for row in rows:
        c, v = row["cluster"], row["vector"]
        seen, judged = (c or {}).get("select"), (c or {}).get("evaluate")
        table.add_row(
            str(row["seed"]),
            f"{row['seconds']:.0f}",
            f"{row['peak_rss_bytes'] / 1e9:.1f}",
            f"{max(abs(s) for s in row['quadrature_share'].values()):.1%}",
            f"{row['explained_share'].get('trajectory') or float('nan'):.1%}",
            "-"
            if c is None or seen is None
            else f"{c['skill']} h {seen['homogeneity']:.2f} r {seen['recall_all']:.2f} l {seen['lift']:.1f}"
            + (" met" if c["met"] else ""),
            "-" if judged is None else f"h {judged['homogeneity']:.2f} r {judged['recall_all']:.2f}",
            "none" if v is None else f"{v['skill']} {v['on']:+.2f}, others {v['off']:+.3f}",
        )
    console.print(table)


def demo_table(
    runs: Annotated[list[Path], typer.Argument(help="Finished run directories, one per seed.")],
    json_: Annotated[Path | None, typer.Option("--json", help="Result file.")] = None,
) -> None:
    """Print what each seed reached beside the targets, and write it."""
    rows = sorted((seed_row(run) for run in runs), key=lambda row: row["seed"])
    print_rows(rows, Console(width=170))
    met = sum(bool(row["cluster"] and row["cluster"]["met"]) for row in rows)
    selective = sum(
        bool(row["vector"] and row["vector"]["share"] is not None and row["vector"]["share"] <= 0.05)
        for row in rows
    )
    typer.echo(f"cluster bounds met by {met} of {len(rows)} seeds, vector bounds by {selective}")
    if json_ is not None:
        write_json(
            json_,
            {
                "schema": SCHEMA,
                "config": (runs[0] / "config.yaml").read_text(),
                "bounds": CLUSTER_BOUNDS,
                "clusters_met": met,
                "vectors_met": selective,
                "median_seconds": statistics.median(row["seconds"] for row in rows),
                "rows": rows,
                "versions": versions(),
                "hardware": hardware(),
            },
        )


if __name__ == "__main__":
    run_application(demo_table)
