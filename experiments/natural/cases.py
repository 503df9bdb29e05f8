"""The table of cases: every one is built by name, with its target, truth and twin."""

from __future__ import annotations

from experiments.natural import columns, grokking, parity, sequences
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
        Case(
            "a_then_b",
            "chain A, then A and B; twin: A goes on alone",
            sequences.a_then_b,
            "B",
            "carrier",
            minutes=0.5,
        ),
        Case(
            "sparse_parity",
            "six parities in units of their own, with a mixing ladder; twin: one shared trunk",
            parity.sparse_parity,
            "task0",
            "carrier",
            source="arXiv 2303.13506",
            minutes=0.3,
        ),
        Case(
            "composite_parity",
            "an atom that a composite builds on, learned between two others; twin: its data never come",
            parity.composite_parity,
            "first",
            "carrier",
            exempt=("composite",),
            source="arXiv 2505.15811",
            minutes=0.2,
        ),
        Case(
            "induction",
            "attention alone, repeats shown from step 100; twin: never",
            sequences.induction,
            "repeated",
            "carrier",
            source="arXiv 2404.07129",
            minutes=0.5,
        ),
        Case(
            "grokking",
            "sums modulo 97 that generalise after they are known by heart; twin: a random table",
            grokking.grokking,
            "hidden",
            "carrier",
            source="arXiv 2201.02177",
            minutes=4.0,
        ),
    )
}
