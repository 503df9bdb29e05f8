"""Tables of the study: one line a skill and method, over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from experiments.removal.undo.rows import Row, best_attack
from experiments.report.formats import decimal, share
from experiments.report.tables import Column, Table, table


def over(values: Sequence[float | None]) -> float | None:
    """Mean of what is known, None where nothing is."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def study_tables(rows: Sequence[Row]) -> list[Table]:
    """Means over seeds; the best method of a skill is the one with the smallest gap to ignorance."""
    columns = (
        Column("skill", left=True), Column("method", left=True), "seeds", "repair steps", "passes",
        "loss", "worst other", "beyond gold", "relearned: loss", "best attack",
        "gap to gold", "gap to ignorance",
    )  # fmt: skip
    lines = []
    for skill in dict.fromkeys(row.skill for row in rows):
        kinds = dict.fromkeys((r.method, r.repair_steps) for r in rows if r.skill == skill)
        measured = []
        for method, steps in kinds:
            here = [r for r in rows if (r.skill, r.method, r.repair_steps) == (skill, method, steps)]
            measured.append((over([r.gap_to_ignorance for r in here]), method, steps, here))
        measured.sort(key=lambda entry: (entry[0] is None, entry[0] or 0.0))
        for gap, method, steps, here in measured:
            lines.append(
                [
                    skill,
                    method,
                    str(len(here)),
                    str(steps),
                    share(over([r.passes_share for r in here])),
                    decimal(over([r.target_loss for r in here])),
                    share(over([r.worst_other_share for r in here])),
                    share(over([r.beyond_gold for r in here])),
                    decimal(over([r.relearn.loss[-1] for r in here])),
                    decimal(over([best_attack(r)[-1] for r in here])),
                    share(over([r.gap for r in here])),
                    share(gap),
                ]
            )
    return [table(columns, lines, "Removal by undoing: losses in nats, shares of headroom and of training")]
