"""Terminal tables of a reproduction."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.reproduce.published import CARRY, SECOND_ORDER_RMSE, TOP_THREE


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _range(entry: dict[str, float] | None, digits: int = 3) -> str:
    if entry is None:
        return "-"
    if entry["count"] == 1:
        return f"{entry['mean']:.{digits}f}"
    return f"{entry['mean']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


def print_tables(result: dict[str, Any], console: Console) -> None:
    """Bases and rotations, rivals beside the paper, quadrature rules."""
    console.print(_bases(result))
    console.print(_rivals(result))
    console.print(_top_three(result))
    console.print(_quadrature(result))
    console.print(_claims(result))
    for row in result["second_order"]:
        if "rmse" in row:
            console.print(
                f"Table 12, seed {row['seed']}: RMSE of Eq. 6's second-order term {row['rmse']:.3g} nats "
                f"(true term's root mean square {row['scale']:.3g}, relative {row['relative_rmse']:.2f}, "
                f"cosine {row['cosine']:.2f}); paper {SECOND_ORDER_RMSE} with no scale."
            )


def _bases(result: dict[str, Any]) -> Table:
    title = "Every basis and rotation (evaluate split; clusters chosen on select)"
    table = Table(title=title, title_justify="left")
    table.add_column("basis / rotation")
    for name in ("explained", "worst group", "net", "path", "carry hom.", "recall", "F1", "hidden"):
        table.add_column(name, justify="right")
    for name in ("outliers", "stab.", "validity"):
        table.add_column(name, justify="right")
    for line in result["over_seeds"]:
        label = line["basis"] + ("" if line["rotation"] == "none" else f" / {line['rotation']}")
        table.add_row(
            label + (" (supervised)" if line["supervised"] else ""),
            *(
                _range(line[key], 2)
                for key in (
                    "explained_share",
                    "worst_group_share_error",
                    "captured_net",
                    "captured_path",
                    "carry_homogeneity",
                    "recall_paper",
                    "f1",
                    "hidden_share",
                    "outlier_share",
                    "stability",
                    "validity",
                )
            ),
        )
    return table


def _rivals(result: dict[str, Any]) -> Table:
    table = Table(title="Tables 1, 8 and 11: trajectories in the same clustering", title_justify="left")
    for name in ("trajectories", "seed", "clustering"):
        table.add_column(name)
    numbers = ("homogeneity", "recall (paper)", "F1", "hidden")
    for name in (*numbers, *(f"paper: {name}" for name in numbers)):
        table.add_column(name, justify="right")
    for row in result["features"]:
        ours = [row["carry_homogeneity"], row["recall_paper"], row["f1"], row["hidden_share"]]
        paper = CARRY.get(row["feature"], (None,) * 4)
        cells = [_number(value) for value in (*ours, *paper)]
        table.add_row(row["feature"], str(row["seed"]), row["variant"], *cells)
    return table


def _top_three(result: dict[str, Any]) -> Table:
    table = Table(title="Tables 9 and 10: three most homogeneous carry clusters", title_justify="left")
    for name in ("trajectories", "seed", "ours, paper's clustering", "ours, scaled", "paper"):
        table.add_column(name)
    bases = [
        {**row, "feature": row["basis"]}
        for row in result["rows"]
        if row["rotation"] == "none" and row["basis"] in TOP_THREE
    ]
    for row in [*result["features"], *bases]:
        ours = []
        for variant in ("hdbscan/raw", "hdbscan/scaled"):
            found = row["by_variant"].get(variant)
            ours.append(" ".join(_number(v) for v in found["top_three_evaluate"]) if found else "none")
        paper = " ".join(_number(v) for v in TOP_THREE.get(row["feature"], ()))
        table.add_row(row["feature"], str(row["seed"]), *ours, paper or "-")
    return table


def _quadrature(result: dict[str, Any]) -> Table:
    table = Table(title="Completeness error by rule (nats, whole run, evaluate split)", title_justify="left")
    for name in ("seed", "rule", "places", "mean", "no cancelling", "worst group", "median token", "met"):
        table.add_column(name, justify="right")
    for row in result["quadrature"]:
        table.add_row(
            str(row["seed"]),
            row["rule"],
            str(row["places"]),
            _number(row["mean_error"], 4),
            _number(row["mean_error_no_cancelling"], 4),
            f"{row['worst_group']} {row['worst_group_error']:+.4f} of {row['worst_group_exact']:.2f}",
            f"{row['median_token_error']:.4f} of {row['median_token_exact']:.2f}",
            "" if row["met"] is None else str(row["met"]),
        )
    return table


def _claims(result: dict[str, Any]) -> Table:
    table = Table(title="What the paper says, and what we find", title_justify="left")
    for name in ("claim", "paper", "ours, by seed", "verdict"):
        table.add_column(name)
    for row in result["claims"]:
        paper = " : ".join(_number(v) for v in row["published"])
        ours = ", ".join(" : ".join(_number(v, 2) for v in pair) for pair in row["ours"])
        count = f" ({row['held']} of {row['seeds']} seeds)" if row["seeds"] else ""
        table.add_row(row["claim"], paper, ours or "-", row["status"] + count)
    return table
