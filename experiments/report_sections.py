"""Chapters that causal tests and removals add to a run's report, from the records they left."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from experiments import figures_causal
from experiments.figures import Drawing
from experiments.labelling import label_sections
from experiments.report import Section
from polca_edit.artifacts import RunDirectory

#: Pairs of one basis that get their own figures.
MOST_PAIRS = 4


def extra_sections(directory: RunDirectory) -> list[Section]:
    """Every chapter the run has records for: labels, causal tests, removals."""
    return [*label_sections(directory), *causal_sections(directory), *removal_sections(directory)]


def causal_sections(directory: RunDirectory) -> list[Section]:
    """One chapter per basis whose present clusters ``polca-edit test`` judged."""
    analyses = json.loads((directory / "summary.json").read_text())["analyses"]
    return [
        _causal_section(basis, json.loads((directory / f"verdicts-{basis}.json").read_text()))
        for basis, analysis in analyses.items()
        if analysis["verdicts"]
    ]


def _causal_section(basis: str, record: Mapping[str, Any]) -> Section:
    rows, details = record["rows"], record["details"]
    heads = ("pair", "verdict", "by one run", "grade", "effect T", "pipeline p", "seeds", "why")
    body = [
        f"<p>{len(rows)} pairs of a vector and a cluster were chosen on the select split and judged on the "
        f"evaluate split, over {record['runs']} runs (seeds {escape(str(record['seeds']))}). "
        "<em>Causal</em> without blocking evidence means that the trained model depends on the movement "
        "along the vector for these tokens, and for them only. T is the share of headroom lost on the "
        "cluster minus the share lost elsewhere.</p>",
        _table(heads, [_verdict_cells(row) for row in rows]),
    ]
    return Section(f"Causal test, {basis} basis", "".join(body), _causal_figures(basis, rows, details))


def _verdict_cells(row: Mapping[str, Any]) -> list[str]:
    effect, p = row["inputs"]["effect"], row["inputs"]["pipeline_p"]
    return [
        row["name"],
        row["verdict"].replace("_", " "),
        str(row["single_run_verdict"]).replace("_", " "),
        str(row["grade"] or "–"),
        f"{_number(effect['estimate'])} [{_number(effect['low'])}, {_number(effect['high'])}]",
        "not run" if p is None else _number(p),
        str(row["inputs"]["seeds"]),
        row["reason"],
    ]


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) else str(value)


def _causal_figures(
    basis: str, rows: Sequence[Mapping[str, Any]], details: Mapping[str, Mapping[str, Any]]
) -> list[Drawing]:
    drawings: list[Drawing] = []
    if rows:
        first = details[rows[0]["name"]]
        drawings.append(
            Drawing(
                f"{basis}-dissociation",
                "Double dissociation: share of its headroom that each cluster loses (columns) when the "
                "vector chosen for a cluster (rows) is undone. Selective vectors stand out on the diagonal.",
                figures_causal.dissociation(first["matrix"], first["matrix_names"]),
            )
        )
    for number, row in enumerate(rows[:MOST_PAIRS]):
        name, detail = row["name"], details[row["name"]]
        stem = f"{basis}-pair{number}-" + re.sub(r"[^a-zA-Z0-9]+", "-", name).strip("-")[:40]
        drawings.append(
            Drawing(
                f"{stem}-ladder",
                f"{name}: the pair's effect against the range of every control.",
                figures_causal.ladder(row),
            )
        )
        drawings.append(
            Drawing(f"{stem}-doses", f"{name}: damage of the cluster by dose.", figures_causal.doses(row))
        )
        if detail.get("blocking"):
            caption = f"{name}: the cluster's loss when training is repeated with the vector held still."
            drawings.append(Drawing(f"{stem}-blocking", caption, figures_causal.blocking(detail["blocking"])))
        caption = f"{name}: damage when only one part of the model gets the edit."
        drawings.append(
            Drawing(f"{stem}-localisation", caption, figures_causal.localisation(detail["localisation"]))
        )
    return drawings


def removal_sections(directory: RunDirectory) -> list[Section]:
    """One chapter with every edit that ``polca-edit remove`` left in the run."""
    rows = []
    for path in sorted((directory.path / "edits").glob("*.result.json")):
        for result in json.loads(path.read_text())["removals"]:
            groups = {k: v for k, v in result["groups"].items() if v is not None}
            rows.append(
                [
                    path.name.removesuffix(".result.json"),
                    result["skill"],
                    f"{result['target_share']:.1%}",
                    f"{result['worst_off_share']:+.2%}",
                    f"{result['worst_positive_share']:.2%}",
                    f"{result['kl']:.3f}",
                    f"{result['accuracy']:.1%} ({result['refit']['chance']:.1%})",
                    f"{result['refit']['kept']:.0%}",
                    f"{result['norm']:.2f} / {result['rank']}",
                    ", ".join(f"{name} {share:+.1%}" for name, share in groups.items()),
                ]
            )
    if not rows:
        return []
    heads = (
        "edit",
        "skill",
        "damage on target",
        "worst other group",
        "its positive part",
        "largest KL elsewhere",
        "accuracy (chance)",
        "kept after a refit",
        "norm / rank",
        "share of headroom per group",
    )
    text = (
        "<p>Edits fitted on the select split and judged on the evaluate split. Damage is in shares of "
        "headroom; a refit may change an output bias and permute the answers.</p>"
    )
    return [Section("Skill removal", text + _table(heads, rows))]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th class="l">{escape(h)}</th>' for h in heads)
    body = "".join(
        "<tr>" + "".join(f'<td class="l">{escape(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
