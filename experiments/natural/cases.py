"""The table of cases: every one is built by name, with its target, truth and twin."""

from __future__ import annotations

from experiments.natural import columns
from experiments.natural.case import Case

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            "later_skill",
            "a new operator enters at step 200; twin: old sums go on alone",
            columns.later_skill,
            "minus",
            "carrier",
            minutes=0.4,
        ),
        Case(
            "backdoor",
            "a fine-tune gives a mark a planted answer; twin: the mark goes on meaning nothing",
            columns.backdoor,
            "triggered",
            "carrier",
            minutes=0.3,
        ),
        Case(
            "backdoor_lora",
            "the same through adapters of rank 4",
            columns.backdoor_lora,
            "triggered",
            "carrier",
            minutes=0.3,
        ),
    )
}
