"""Chapters that labels and removals add to a run's report, from the records they left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from experiments.report.page import Section
from experiments.run.labelling import label_sections
from experiments.run.store import RunDirectory


def extra_sections(directory: RunDirectory) -> list[Section]:
    """Every chapter the run has records for: labels, causal tests, removals."""
    return [*label_sections(directory), *removal_sections(directory)]


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
