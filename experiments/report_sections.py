"""Chapters that causal tests and removals add to a run's report, from the records they left."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
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
        f"cluster minus the share lost elsewhere.{_ranked_words(record)}</p>",
        _table(heads, [_verdict_cells(row) for row in rows]),
        _positive_control(record.get("planted", [])),
        _operator_table(rows),
        _control_table(rows),
    ]
    return Section(f"Causal test, {basis} basis", "".join(body), _causal_figures(basis, rows, details))


def _ranked_words(record: Mapping[str, Any]) -> str:
    """Which part of the split effects were ranked on, where it was not all of it."""
    if not record.get("ranked"):
        return ""
    return (
        f" T and its controls were measured on the first {record['ranked']} of "
        f"{min(record['sequences'])} sequences, damage on all of them."
    )


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


def _positive_control(planted: Sequence[Mapping[str, Any]]) -> str:
    """Power at every share of a planted skill, one line per run."""
    known = [(number, run) for number, run in enumerate(planted) if run.get("by_share")]
    if not known:
        return "<p>Positive control: not run, so a negative result says nothing.</p>"
    shares = [row["share"] for row in known[0][1]["by_share"]]
    body = []
    for number, run in known:
        smallest = run["detectable_share"]
        found = f"{smallest:.0%}" if isinstance(smallest, float) and smallest <= 1 else "none"
        powers = [f"{row['power']:.0%}" for row in run["by_share"]]
        body.append([f"run {number + 1}", *powers, found, str(run["outcome"])])
    text = (
        "<p>Positive control: skills planted in each run carry a known share of their tokens' headroom. "
        "The table says how many are found at each share by this run's own nulls, and from which share on "
        "at least 80 % are. A pair below that share is not excluded by a negative verdict; several runs "
        "together find smaller skills than each alone.</p>"
    )
    heads = ("planted share", *(f"{share:.0%}" for share in shares), "found from", "control")
    return text + _table(heads, body)


def _operator_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What every operator did to the cluster, pooled over runs."""
    body = [[row["name"], *_operator_cells(row["operators"])] for row in rows if "operators" in row]
    if not body:
        return ""
    text = (
        "<p>Operators, damage to the cluster in nats per token unless said otherwise: O1 the movement "
        "undone, O3a its breakthrough window subtracted, O3b the weights rewound along the path's middle, "
        "O4 the share of headroom gained when the movement alone is inserted early, O6 the worst movement "
        "of the same size that a search finds in the vectors' span, with its T beside the median T that the "
        "same search reaches in rotated and in random spans (means over runs).</p>"
    )
    heads = ("pair", "O1", "O3a", "O3b", "O4", "O6", "O6: T", "rotated spans", "random spans")
    return text + _table(heads, body)


def _operator_cells(found: Mapping[str, Any]) -> list[str]:
    """O1, O3a, O3b, O4, and O6 with its control spans."""

    def estimate(name: str) -> str:
        value = found.get(name)
        return _number(value["estimate"] if isinstance(value, Mapping) else value).replace("_", " ")

    cells = [estimate(name) for name in ("O1 project_out", "O3a rollback_subtract", "O3b rollback_rewind")]
    cells.append(estimate("O4 transplant"))
    best = found.get("O6 optimised")
    if not isinstance(best, list):
        return [*cells, "not run", "–", "–", "–"]
    spans = [[v for run in best for v in run[family]] for family in ("rotated", "random")]
    cells += [_number(sum(run[key] for run in best) / len(best)) for key in ("damage", "effect")]
    return [*cells, *(_number(median(values)) if values else "–" for values in spans)]


CONTROLS = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8", "c9", "c10")


def _control_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """P of every control per pair, or that it did not run."""
    body = [
        [row["name"], *(_control_cell(row["controls"].get(c, "not_run")) for c in CONTROLS)]
        for row in rows
        if "controls" in row
    ]
    if not body:
        return ""
    text = (
        "<p>Controls, p-values unless said otherwise: c1 random directions, c2 same placement, c3 rotations "
        "inside the span, c4 the same total damage, c5 other vectors, c6 gradients of token sets, c7 the "
        "whole pipeline on reference bases (largest over families), c8 shuffled labels, c9 sham clusters "
        "(their mean T; other seeds' vectors are in study.json) and c10 planted skills (smallest share found "
        "by all runs together).</p>"
    )
    return text + _table(("pair", *CONTROLS), body)


def _control_cell(found: Any) -> str:
    if not isinstance(found, Mapping):
        return str(found).replace("_", " ")
    if "p_value" in found:
        return _number(found["p_value"])
    if "outcome" in found:
        smallest = found["detectable_share"]
        return f"{smallest:.0%}" if isinstance(smallest, float) else str(found["outcome"]).replace("_", " ")
    if "sham_cluster_effects" in found:
        return _mean_cell(found["sham_cluster_effects"])
    if "p_values" in found:
        known = [p for p in found["p_values"] if p is not None]
        return _number(max(known)) if known else "not run"
    families = [v["p_value"] for v in found.values() if isinstance(v, Mapping)]
    missing = [k.replace("_", " ") for k, v in found.items() if not isinstance(v, Mapping)]
    text = _number(max(families)) if families else "not run"
    return f"{text} (not run: {', '.join(missing)})" if missing and families else text


def _mean_cell(values: Any) -> str:
    known = [v for v in values if isinstance(v, float)] if isinstance(values, list) else []
    return f"T {sum(known) / len(known):.2f}" if known else "not run"


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
                "vector chosen for a cluster (rows) is undone. Selective vectors stand out on the diagonal. "
                "Tokens of both clusters are left out; a cell is blank where none remain.",
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
