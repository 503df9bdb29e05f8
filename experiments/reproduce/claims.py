"""The paper's qualitative claims, each held against the numbers of every seed.

A claim is a comparison that the published numbers make; whether it is reproduced is read off our
rows by the same comparison, so no words are fitted to a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from experiments.reproduce.published import CARRY

Status = Literal["reproduced", "not reproduced", "mixed", "not testable"]
#: Column of a row -> its place in the published tables.
COLUMNS = {"carry_homogeneity": 0, "recall_paper": 1, "f1": 2, "hidden_share": 3}


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
        Claim(f"POLCA's best carry cluster is purer than {words}", "carry_homogeneity", "polca", rival)
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


def _by_feature(part: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Mapping[str, Any]]:
    bases = {row["basis"]: row for row in part["rows"] if row["rotation"] == "none"}
    return {**bases, **{row["feature"]: row for row in part["features"]}}


def judge_claim(claim: Claim, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One claim over seeds: reproduced if it holds in all, not testable if all lack a number."""
    pairs = []
    for part in parts:
        found = _by_feature(part)
        if claim.better in found and claim.worse in found:
            pairs.append([found[name][claim.column] for name in (claim.better, claim.worse)])
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    held = sum(a > b for a, b in known)
    status: Status = "mixed"
    if not known:
        status = "not testable"
    elif held == len(known):
        status = "reproduced"
    elif held == 0:
        status = "not reproduced"
    return {
        "claim": claim.text,
        "column": claim.column,
        "published": list(claim.published),
        "ours": pairs,
        "held": held,
        "seeds": len(known),
        "status": status,
    }


def judge_claims(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every claim of :data:`CLAIMS`, and the one that arithmetic cannot test.

    Args:
        parts: per seed, ``rows`` and ``features`` of a reproduction.
    """
    language = {
        "claim": "22 of 26 vectors of the language model have a cluster with a simple label",
        "column": None,
        "published": [22 / 26],
        "ours": [],
        "held": 0,
        "seeds": 0,
        "status": "not testable",
    }
    return [*(judge_claim(claim, parts) for claim in CLAIMS), language]
