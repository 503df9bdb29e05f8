"""Rows of the paper's tables from stored projections: its own clustering, its own score.

Clusters are scored on the tokens that were clustered and the most homogeneous one counts, as in the paper
(arXiv 2506.15872, section 4). No model is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Bool
from torch import Tensor

from experiments.run.run import Run
from experiments.study.multiverse import spaced
from experiments.study.reproduce.carry import CARRY, counted_places
from experiments.study.reproduce.claims import Claim, JudgedClaim, Pair, judge_numbers
from experiments.study.reproduce.rows import hidden_share
from polca_edit.allocation.allocate import Projections, Rule, allocate
from polca_edit.artifacts import load_record
from polca_edit.clusters import features
from polca_edit.clusters.agreement import SkillScores, carry_scores
from polca_edit.clusters.comparators import outlier_share
from polca_edit.clusters.density import ClusterSettings, cluster_trajectories
from polca_edit.clusters.features import Trajectories
from polca_edit.tokens import TokenSet

#: The paper's clustering: 150 of 5,000 tokens, a fifteenth of them for density, raw trajectories.
PUBLISHED_CLUSTERS = ClusterSettings(0.03, 1 / 15, algorithm="generic")
#: Share of a cluster's carry tokens that must sit at the places that count.
PLACES_RULE = 0.85


@dataclass(frozen=True)
class FamilyRow:
    """The paper's measure of one family in one clustering.

    Attributes:
        name: of the family, or of the one setting that differs.
        seed: of the run.
        spacing: steps between checkpoints; the least and the most where they differ.
        rule: of the allocation, empty for a family without one.
        scaled: whether trajectories are divided by their own maximum.
        kept: vectors that the filters leave.
        clusters: of all kept vectors.
        eligible: large enough and with their carry tokens where they count.
        outliers: share of the clustered tokens that no cluster has.
        hidden: share of clusters with a hidden breakthrough; None without clusters.
        homogeneity: of the most homogeneous eligible cluster; None, as the next two, without one.
        recall: of the same, outliers not counted.
        f1: of the two.
        top_three: homogeneities of the three most homogeneous.
    """

    name: str
    seed: int
    spacing: str
    rule: str
    scaled: bool
    kept: int
    clusters: int
    eligible: int
    outliers: float
    hidden: float | None
    homogeneity: float | None = None
    recall: float | None = None
    f1: float | None = None
    top_three: tuple[float, ...] = ()


@dataclass(frozen=True)
class Stored:
    """Stored projections of one basis of one run, and the tokens they are of."""

    seed: int
    kind: str
    projections: Projections
    tokens: TokenSet
    delta: int

    @property
    def spacing(self) -> str:
        """Steps between checkpoints; the least and the most where they differ."""
        gaps = self.projections.steps.diff()
        least, most = int(gaps.min()), int(gaps.max())
        return str(least) if least == most else f"{least}–{most}"


def stored(run: Run) -> Iterator[Stored]:
    """Every measured basis of a run.

    Raises:
        ValueError: for a run whose projections are not there, or whose tokens have no carry.
    """
    tokens = run.task.splits.select
    if CARRY not in tokens.skills:
        raise ValueError(
            f"run '{run.directory.path}' must be of task 'arithmetic', for its carries; name another"
        )
    for spec in run.config.measured_bases():
        file = run.directory.projections(spec.label)
        if not file.exists():
            raise ValueError(
                f"run '{run.directory.path}' must have projections of basis '{spec.label}', it has none; go "
                f"on with polca-edit run {run.directory.path / 'config.yaml'} --out {run.directory.path}"
            )
        projections = load_record(Projections, file)
        yield Stored(run.config.seed, spec.kind, projections, tokens, run.config.breakthrough_delta)


def families(given: Stored, *, plain: bool) -> Iterator[tuple[str, Trajectories]]:
    """(rule, trajectories) of a basis; ``plain`` adds those that need no basis."""
    p, hessian = given.projections, given.kind == "hessian"
    if plain:
        yield "", features.exact_loss(p)
        yield "", features.loss_change(p)
    if hessian:
        yield "", features.fisher(p)
        yield "first_order", features.first_order(p)
    if given.kind == "parameter_axes":
        yield "first_order", features.parameter_lca(p)
        return
    rules: list[Rule] = ["trapezoid"]
    if p.curvatures is not None:
        rules.append("second_order")
    for rule in rules:
        # Along eigenvectors Eq. 6 is the trapezoid rule up to third order (Eq. 13).
        yield rule, along(p, rule, "polca" if hessian else given.kind)


def along(projections: Projections, rule: Rule, name: str) -> Trajectories:
    """Projected losses of a rule."""
    return Trajectories(name, allocate(projections, rule).projected_loss(), True)


def signal_row(
    given: Stored,
    rule: str,
    own: Trajectories,
    settings: ClusterSettings,
    *,
    counted: Bool[Tensor, " M"] | None = None,
    least: float = PLACES_RULE,
    name: str | None = None,
) -> FamilyRow:
    """Cluster one family and score it as the paper does.

    Args:
        given: the tokens and their losses.
        rule: of the allocation.
        own: trajectories.
        settings: of the clustering.
        counted: tokens at the places that count; default the paper's.
        least: share of a cluster's carry tokens that must be among them.
        name: of the row; default the family's.
    """
    tokens = given.tokens
    settings = replace(
        settings,
        drop_rising_tokens=settings.drop_rising_tokens and own.falls,
        drop_rising_vectors=settings.drop_rising_vectors and own.falls,
    )
    found = cluster_trajectories(own.paths, settings)
    places = counted_places(tokens) if counted is None else counted
    scores = carry_scores(
        found, tokens.skills[CARRY], places, min_share=settings.min_cluster_share, rule=least
    )
    row = FamilyRow(
        name or own.name,
        given.seed,
        given.spacing,
        rule,
        settings.scaled,
        sum(vector.kept for vector in found),
        sum(vector.count for vector in found),
        len(scores),
        outlier_share(found),
        hidden_share(found, own.paths, given.projections, given.delta),
    )
    return row if not scores else _with_scores(row, scores)


def _with_scores(row: FamilyRow, scores: Sequence[SkillScores]) -> FamilyRow:
    best = scores[0]
    return replace(
        row,
        homogeneity=best.homogeneity,
        recall=best.recall_paper,
        f1=best.f1,
        top_three=tuple(score.homogeneity for score in scores[:3]),
    )


def family_rows(measured: Sequence[Stored]) -> Iterator[FamilyRow]:
    """Every family, raw as published and scaled to one size."""
    for number, given in enumerate(measured):
        for rule, own in families(given, plain=number == 0):
            for scaled in (False, True):
                yield signal_row(given, rule, own, replace(PUBLISHED_CLUSTERS, scaled=scaled))


def factor_rows(given: Stored, spacings: Sequence[int] = (80, 120, 200)) -> Iterator[FamilyRow]:
    """The published setting, and each of its parts changed alone, by both orders of the allocation."""
    tokens, base = given.tokens, PUBLISHED_CLUSTERS
    changes: Mapping[str, ClusterSettings] = {
        "as published": base,
        "trajectories scaled": replace(base, scaled=True),
        "rising tokens kept": replace(base, drop_rising_tokens=False),
        "rising vectors kept": replace(base, drop_rising_vectors=False),
        "nothing dropped": replace(base, drop_rising_tokens=False, drop_rising_vectors=False),
        "min_samples 1.5 % of the tokens": replace(base, min_samples_share=0.015),
        "min_samples 0.5 % of the tokens": replace(base, min_samples_share=0.005),
        "smallest cluster 2 %": replace(base, min_cluster_share=0.02),
        "smallest cluster 5 %": replace(base, min_cluster_share=0.05),
        "leaves of the density tree": replace(base, selection="leaf"),
    }
    rules: tuple[Rule, ...] = ("first_order", "trapezoid")
    for rule in rules:
        own = along(given.projections, rule, rule)
        for name, settings in changes.items():
            yield signal_row(given, rule, own, settings, name=name)
        yield signal_row(given, rule, own, base, least=0.0, name="any place counts")
        for place in ("100s", "10s"):
            at = tokens.skills[place]
            yield signal_row(given, rule, own, base, counted=at, name=f"{place} place alone counts")
        for least in spacings:
            wider = replace(given, projections=spaced(given.projections, least))
            own_wider = along(wider.projections, rule, rule)
            yield signal_row(wider, rule, own_wider, base, name=f"checkpoints {wider.spacing} steps apart")


def claims_of(rows: Sequence[FamilyRow]) -> tuple[JudgedClaim, ...]:
    """The published comparisons on the raw rows, one pair a seed; Eq. 6 by its trapezoid where need be."""
    seeds = sorted({row.seed for row in rows})
    parts: list[dict[str, FamilyRow]] = [
        {row.name: row for row in rows if row.seed == seed and not row.scaled} for seed in seeds
    ]

    def number(part: Mapping[str, FamilyRow], family: str, column: str) -> float | None:
        if family not in part:
            return None
        value: float | None = getattr(part[family], column)
        return value

    def pairs(claim: Claim) -> list[Pair]:
        column = {"recall_paper": "recall", "hidden_share": "hidden"}.get(claim.column, claim.column)
        return [(number(p, claim.better, column), number(p, claim.worse, column)) for p in parts]

    return judge_numbers(pairs)
