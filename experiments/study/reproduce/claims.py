"""The paper's qualitative claims, each held against the numbers of every seed.

A claim is a comparison that the published numbers make; whether it is reproduced is read off our
rows by the same comparison, so no words are fitted to a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from experiments.study.reproduce.published import CARRY
from experiments.study.reproduce.rows import BasisRow, CarryScores, FeatureRow

Status = Literal["reproduced", "not reproduced", "mixed", "not testable"]
#: Carry column -> its place in the published tables.
COLUMNS = {"homogeneity": 0, "recall_paper": 1, "f1": 2, "hidden_share": 3}


@dataclass(frozen=True)
class Claim:
    """``better`` has more of ``column`` than ``worse``."""

    text: str
    column: str
    better: str
    worse: str

    @property
    def published(self) -> tuple[float, float]:
        """The paper's two numbers."""
        place = COLUMNS[self.column]
        return CARRY[self.better][place], CARRY[self.worse][place]


CLAIMS = (
    *(
        Claim(f"POLCA's best carry cluster is purer than {words}", "homogeneity", "polca", rival)
        for rival, words in (
            ("exact_loss", "one of exact losses"),
            ("loss_change", "one of loss changes"),
            ("fisher", "one of Fisher trajectories"),
            ("lca", "one of single parameters (LCA)"),
            ("first_order", "one without the second-order term"),
            ("random", "one in a random basis"),
            ("shuffled_hessian", "one in the basis of shuffled checkpoints"),
        )
    ),
    Claim("POLCA has the better F1 than exact losses", "f1", "polca", "exact_loss"),
    Claim("POLCA finds hidden breakthroughs, exact losses do not", "hidden_share", "polca", "exact_loss"),
    Claim("POLCA finds more hidden breakthroughs than LCA", "hidden_share", "polca", "lca"),
    Claim("POLCA finds more hidden breakthroughs than a random basis", "hidden_share", "polca", "random"),
)


@dataclass(frozen=True)
class JudgedClaim:
    """A claim against the numbers of every seed.

    Attributes:
        claim: its words.
        column: of the carry columns; None for a claim that arithmetic cannot test.
        published: the paper's numbers, better and worse.
        ours: the same, one pair a seed; None where there is no eligible cluster.
        held: seeds in which it holds.
        seeds: seeds with both numbers.
        status: reproduced if it holds in all, not testable if all lack a number.
    """

    claim: str
    column: str | None
    published: tuple[float, ...]
    ours: tuple[tuple[float | None, float | None], ...]
    held: int
    seeds: int
    status: Status


#: The better and the worse number of a seed; None where there is no eligible cluster.
Pair = tuple[float | None, float | None]

#: The claim that arithmetic cannot test.
LANGUAGE = JudgedClaim(
    "22 of 26 vectors of the language model have a cluster with a simple label",
    None,
    (22 / 26,),
    (),
    0,
    0,
    "not testable",
)


def judge_claim(claim: Claim, pairs: Sequence[Pair]) -> JudgedClaim:
    """One claim over seeds, from the two numbers of each."""
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    held = sum(a > b for a, b in known)
    status: Status = "mixed"
    if not known:
        status = "not testable"
    elif held in (0, len(known)):
        status = "reproduced" if held else "not reproduced"
    return JudgedClaim(claim.text, claim.column, claim.published, tuple(pairs), held, len(known), status)


def judge_claims(rows: Sequence[BasisRow], features: Sequence[FeatureRow]) -> tuple[JudgedClaim, ...]:
    """Every claim of :data:`CLAIMS` over all seeds of the rows, and the one that arithmetic cannot test."""
    parts: dict[int, dict[str, CarryScores]] = {}
    for row in rows:
        if row.rotation == "none":
            parts.setdefault(row.seed, {})[row.basis] = row.carry
    for feature in features:
        parts.setdefault(feature.seed, {})[feature.feature] = feature.carry

    def pairs(claim: Claim) -> list[Pair]:
        return [
            (getattr(found[claim.better], claim.column), getattr(found[claim.worse], claim.column))
            for found in parts.values()
            if claim.better in found and claim.worse in found
        ]

    return judge_numbers(pairs)


def judge_numbers(pairs: Callable[[Claim], Sequence[Pair]]) -> tuple[JudgedClaim, ...]:
    """Every claim by the pairs of numbers it has, one a seed, and the one that arithmetic cannot test."""
    return (*(judge_claim(claim, pairs(claim)) for claim in CLAIMS), LANGUAGE)
