"""Tables of a reproduction: bases and rotations, rivals beside the paper, quadrature rules, claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.report.formats import decimal
from experiments.report.tables import Column, Table, table
from experiments.study.reproduce.claims import JudgedClaim
from experiments.study.reproduce.measure import ReproductionSettings
from experiments.study.reproduce.published import CARRY, SECOND_ORDER_RMSE, TOP_THREE
from experiments.study.reproduce.rivals import QuadratureRow, SecondOrderError
from experiments.study.reproduce.rows import BasisRow, CarryScores, FeatureRow


@dataclass(frozen=True)
class Reproduction:
    """All numbers of a reproduction.

    Attributes:
        settings: seed -> what it was made with.
        rows: bases and rotations.
        features: rival trajectories.
        quadrature: rules on the evaluate split.
        second_order: Eq. 6's term, per seed in which it was measured.
        claims: the paper's, judged over the seeds.
        seconds: per seed.
    """

    settings: dict[str, ReproductionSettings]
    rows: tuple[BasisRow, ...]
    features: tuple[FeatureRow, ...]
    quadrature: tuple[QuadratureRow, ...]
    second_order: tuple[SecondOrderError, ...]
    claims: tuple[JudgedClaim, ...]
    seconds: tuple[float, ...]


#: Heading -> number of a row.
NUMBERS: dict[str, Callable[[BasisRow], float | None]] = {
    "explained": lambda row: row.loss.explained_share,
    "worst group": lambda row: row.loss.worst_group_error,
    "net": lambda row: row.captured_net,
    "path": lambda row: row.captured_path,
    "carry hom.": lambda row: row.carry.homogeneity,
    "recall": lambda row: row.carry.recall_paper,
    "F1": lambda row: row.carry.f1,
    "hidden": lambda row: row.carry.hidden_share,
    "outliers": lambda row: row.carry.outlier_share,
    "stab.": lambda row: row.carry.stability,
    "validity": lambda row: row.carry.validity,
}


def spread(values: Sequence[float | None]) -> str:
    """Mean over seeds, with the range where several are known.

    >>> spread([0.2, None, 0.4]), spread([0.5]), spread([None])
    ('0.30 [0.20, 0.40]', '0.50', '–')
    """
    known = [value for value in values if value is not None]
    mean = decimal(sum(known) / len(known) if known else None)
    return f"{mean} [{decimal(min(known))}, {decimal(max(known))}]" if len(known) > 1 else mean


def reproduction_tables(found: Reproduction) -> list[Table]:
    """Every table of a reproduction that has rows."""
    made = [
        bases_table(found.rows),
        rivals_table(found.features),
        top_three_table(found),
        quadrature_table(found.quadrature),
        second_order_table(found.second_order),
        claims_table(found.claims),
    ]
    return [each for each in made if each.rows]


def bases_table(rows: Sequence[BasisRow]) -> Table:
    """One line a basis and rotation, over seeds."""
    groups: dict[str, list[BasisRow]] = {}
    for row in rows:
        name = row.basis if row.rotation == "none" else f"{row.basis} / {row.rotation}"
        groups.setdefault(name + (" (supervised)" if row.supervised else ""), []).append(row)
    return table(
        ["basis / rotation", *NUMBERS],
        [
            [name, *(spread([number(row) for row in members]) for number in NUMBERS.values())]
            for name, members in groups.items()
        ],
        "Every basis and rotation, evaluate split (clusters found and chosen on select)",
    )


def rivals_table(features: Sequence[FeatureRow]) -> Table:
    """Rival trajectories beside the published numbers."""
    numbers = ("homogeneity", "recall (paper)", "F1", "hidden")
    words = [Column(name, left=True) for name in ("trajectories", "seed", "clustering")]
    rows = []
    for row in features:
        carry = row.carry
        ours = (carry.homogeneity, carry.recall_paper, carry.f1, carry.hidden_share)
        cells = [decimal(value, 3) for value in (*ours, *CARRY.get(row.feature, (None,) * 4))]
        rows.append([row.feature, str(row.seed), carry.variant, *cells])
    return table(
        [*words, *(Column(name) for name in (*numbers, *(f"paper: {name}" for name in numbers)))],
        rows,
        "Tables 1, 8 and 11: trajectories in the same clustering",
    )


def top_three_table(found: Reproduction) -> Table:
    """The three purest carry clusters of the paper's clustering and of the scaled one."""

    def three(carry: CarryScores, variant: str) -> str:
        scores = carry.variants.get(variant)
        return " ".join(decimal(v, 3) for v in scores.top_three) if scores else "none"

    plain = [row for row in found.rows if row.rotation == "none" and row.basis in TOP_THREE]
    named = [(row.feature, row.seed, row.carry) for row in found.features]
    named += [(row.basis, row.seed, row.carry) for row in plain]
    rows = [
        [
            name,
            str(seed),
            three(carry, "hdbscan/raw"),
            three(carry, "hdbscan/scaled"),
            " ".join(decimal(v, 3) for v in TOP_THREE.get(name, ())) or "–",
        ]
        for name, seed, carry in named
    ]
    headings = ("trajectories", "seed", "ours, paper's clustering", "ours, scaled", "paper")
    title = "Tables 9 and 10: three most homogeneous carry clusters"
    return table([Column(name, left=True) for name in headings], rows, title)


def quadrature_table(rows: Sequence[QuadratureRow]) -> Table:
    """Error of every rule."""
    return table(
        ["rule", "seed", "places", "mean", "no cancelling", "worst group", "median token", "met"],
        [
            [
                row.rule,
                str(row.seed),
                str(row.places),
                decimal(row.mean_error, 4),
                decimal(row.mean_error_no_cancelling, 4),
                f"{row.worst_group} {decimal(row.worst_group_error, 4)} of {decimal(row.worst_group_exact)}",
                f"{decimal(row.median_token_error, 4)} of {decimal(row.median_token_exact)}",
                "" if row.met is None else ("yes" if row.met else "no"),
            ]
            for row in rows
        ],
        "Completeness error by rule (nats, whole run, evaluate split)",
    )


def second_order_table(rows: Sequence[SecondOrderError]) -> Table:
    """Error of Eq. 6's second-order term."""
    return table(
        ["seed", "RMSE", "true term", "ratio", "cosine", "paper's RMSE"],
        [
            [
                str(row.seed),
                decimal(row.rmse, 4),
                decimal(row.scale, 4),
                decimal(row.relative_rmse),
                decimal(row.cosine),
                decimal(SECOND_ORDER_RMSE, 3),
            ]
            for row in rows
        ],
        "Table 12: Eq. 6's second-order term against the true one (nats)",
    )


def claims_table(claims: Sequence[JudgedClaim]) -> Table:
    """What the paper says, and what we find."""
    rows = []
    for row in claims:
        paper = " : ".join(decimal(value, 3) for value in row.published)
        ours = ", ".join(" : ".join(decimal(value) for value in pair) for pair in row.ours)
        count = f" ({row.held} of {row.seeds} seeds)" if row.seeds else ""
        rows.append([row.claim, paper, ours or "–", row.status + count])
    headings = [Column(name, left=True) for name in ("claim", "paper", "ours, by seed", "verdict")]
    return table(headings, rows, "What the paper says, and what we find")
