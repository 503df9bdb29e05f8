"""The rows of the tables, and how they come from projections on two splits; no model is needed.

Clusters are found on select and carried over to evaluate by the clustering's own rule. Labels choose
one cluster on select, as in the paper; evaluate only scores it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from experiments.study.reproduce.carry import CARRY, eligible_clusters
from polca_edit.allocation.allocate import Allocation, Projections, explained_share
from polca_edit.clusters.agreement import SkillScores, score_cluster
from polca_edit.clusters.breakthroughs import fitting_delta, flat_after, is_hidden
from polca_edit.clusters.comparators import (
    Method,
    SplitClusters,
    bootstrap_stability,
    cluster_both,
    density_validity,
    fit_clustering,
    outlier_share,
    success_rate,
)
from polca_edit.clusters.density import ClusterSettings, VectorClusters, shaped
from polca_edit.clusters.membership import fit_rule
from polca_edit.tokens import TokenSet

#: Smallest exact change of a group whose explained share is judged, nats.
JUDGED = 0.1


@dataclass(frozen=True)
class Variant:
    """How trajectories are shaped and clustered."""

    method: Method
    scaled: bool

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.method}/{'scaled' if self.scaled else 'raw'}"


VARIANTS = (
    Variant("hdbscan", False),
    Variant("hdbscan", True),
    Variant("kmeans", False),
    Variant("kmeans", True),
    Variant("gaussian_mixture", True),
)


@dataclass(frozen=True)
class Scoring:
    """How the rows of a table are made.

    Attributes:
        clusters: sizes and filters of the clustering.
        delta: of the breakthroughs, steps.
        seed: of the bootstrap, of k-means and of the membership rule.
        draws: bootstrap samples of the stability.
        variants: ways of clustering.
    """

    clusters: ClusterSettings
    delta: int
    seed: int = 0
    draws: int = 4
    variants: tuple[Variant, ...] = VARIANTS


@dataclass(frozen=True)
class TokenSplits:
    """Clusters are found and chosen on ``select``, and scored on ``evaluate``."""

    select: TokenSet
    evaluate: TokenSet


@dataclass(frozen=True)
class Paths:
    """Trajectories of one family on both splits.

    Attributes:
        select: (T, K, M) nats, or the feature's own unit.
        evaluate: (T, K, E).
        falls: whether learning makes them fall; else the filters for rising ones are off.
    """

    select: Float[Tensor, "T K M"]
    evaluate: Float[Tensor, "T K E"]
    falls: bool = True


# -- records of the tables ------------------------------------------------------------------------


@dataclass(frozen=True)
class LossShares:
    """How much of the loss change a basis explains.

    Attributes:
        explained_share: attributed over exact, None where the exact change is too small.
        worst_group_error: largest |share - 1| of a judged skill group.
        groups: the share of each judged group.
        quadrature_error: nats per token.
        exact: exact change, nats per token.
    """

    explained_share: float | None
    worst_group_error: float
    groups: dict[str, float]
    quadrature_error: float
    exact: float


@dataclass(frozen=True)
class VariantScores:
    """One way of clustering, its cluster chosen as in the paper: most homogeneous on select.

    Attributes:
        clusters: eligible ones.
        select_homogeneity: of the chosen one, where it was chosen.
        homogeneity: of the chosen one on evaluate.
        recall_paper: the same.
        f1: the same.
        top_three: homogeneity on evaluate of the three most homogeneous on select.
    """

    clusters: int
    select_homogeneity: float
    homogeneity: float
    recall_paper: float
    f1: float
    top_three: tuple[float, ...]


@dataclass(frozen=True)
class CarryScores:
    """The carry columns: the cluster with the largest F1 on select over all variants.

    Without an eligible cluster its numbers are None and the others are those of the first variant.

    Attributes:
        variant: the one the cluster is of.
        hidden_share: of all its clusters, with a hidden breakthrough; None without clusters.
        outlier_share: of its kept vectors.
        success_rate: share of its kept vectors with a cluster.
        vector: the cluster's.
        select_f1: where it was chosen.
        select_homogeneity: the same.
        homogeneity: on evaluate.
        recall_all: on evaluate.
        recall_paper: on evaluate.
        f1: on evaluate.
        adjusted_rand: of all clusters of its vector with the labels, on evaluate.
        stability: of its vector's clustering under resampled sequences.
        validity: density-based, of the same.
        rule_auc: of its membership rule, which sees input features only.
        rule_homogeneity: of the tokens the rule assigns on evaluate; None for none.
        rule_recall: of the same, over all tokens with the label.
        variants: every way of clustering, None where no cluster is eligible.
    """

    variant: str
    hidden_share: float | None
    outlier_share: float
    success_rate: float
    vector: int | None = None
    select_f1: float | None = None
    select_homogeneity: float | None = None
    homogeneity: float | None = None
    recall_all: float | None = None
    recall_paper: float | None = None
    f1: float | None = None
    adjusted_rand: float | None = None
    stability: float | None = None
    validity: float | None = None
    rule_auc: float | None = None
    rule_homogeneity: float | None = None
    rule_recall: float | None = None
    variants: dict[str, VariantScores | None] = field(default_factory=dict)


@dataclass(frozen=True)
class BasisRow:
    """One basis or rotation of one seed.

    Attributes:
        basis: kind.
        rotation: of its span, or ``none``.
        supervised: labels went into it.
        seed: of the run.
        vectors: K.
        loss: on evaluate.
        captured_net: share of the net displacement in the span.
        captured_path: share of the path, mean over intervals.
        carry: its clusters and the carry.
        passes: forward passes over the select tokens that building and projecting it took.
        worst_residual: relative eigen-residual; None for a basis without eigenvalues.
    """

    basis: str
    rotation: str
    supervised: bool
    seed: int
    vectors: int
    loss: LossShares
    captured_net: float
    captured_path: float
    carry: CarryScores
    passes: float
    worst_residual: float | None


@dataclass(frozen=True)
class FeatureRow:
    """A rival family of trajectories of one seed, in the same clustering."""

    feature: str
    seed: int
    carry: CarryScores


# -- measuring them -------------------------------------------------------------------------------


def loss_shares(allocation: Allocation, tokens: TokenSet) -> LossShares:
    """Explained share in the mean and its worst error over judged skill groups; quadrature error."""
    totals = allocation.totals()
    own = {name: allocation.totals(mask) for name, mask in tokens.skills.items()}
    groups = {n: t["attributed"] / t["exact"] for n, t in own.items() if abs(t["exact"]) > JUDGED}
    return LossShares(
        explained_share(totals["attributed"], totals["exact"]),
        max((abs(share - 1) for share in groups.values()), default=0.0),
        groups,
        totals["quadrature_error"],
        totals["exact"],
    )


@dataclass(frozen=True)
class Clustered:
    """One variant's clusters of one family of trajectories.

    Attributes:
        variant: how.
        vectors: per vector, on both splits.
        eligible: carry scores on select, most homogeneous first.
        on_evaluate: the same clusters carried over, in the same order.
    """

    variant: Variant
    vectors: tuple[SplitClusters, ...]
    eligible: tuple[SkillScores, ...]
    on_evaluate: tuple[SkillScores, ...]


def cluster_variants(paths: Paths, splits: TokenSplits, scoring: Scoring) -> list[Clustered]:
    """Cluster trajectories every way, and score each eligible cluster on both splits."""
    carry, result = splits.evaluate.skills[CARRY], []
    for variant in scoring.variants:
        own = replace(
            scoring.clusters,
            scaled=variant.scaled,
            drop_rising_tokens=paths.falls and scoring.clusters.drop_rising_tokens,
            drop_rising_vectors=paths.falls and scoring.clusters.drop_rising_vectors,
        )
        vectors = cluster_both(paths.select, paths.evaluate, own, method=variant.method, seed=scoring.seed)
        chosen = eligible_clusters([v.select for v in vectors], splits.select)
        again = [score_cluster(vectors[s.vector].evaluate, s.cluster, carry) for s in chosen]
        result.append(Clustered(variant, tuple(vectors), tuple(chosen), tuple(again)))
    return result


def hidden_share(
    vectors: Sequence[VectorClusters], paths: Float[Tensor, "T K M"], projections: Projections, delta: int
) -> float | None:
    """Share of all clusters with a hidden breakthrough; None without clusters."""
    steps = projections.steps
    tau, fitting = flat_after(projections.losses.double().mean(1), steps), fitting_delta(delta, steps)
    found = [
        is_hidden(paths[:, v.vector].T[v.members(c)], steps, fitting, tau)
        for v in vectors
        for c in range(v.count)
    ]
    return sum(found) / len(found) if found else None


def carry_columns(
    paths: Paths, projections: Projections, splits: TokenSplits, scoring: Scoring
) -> CarryScores:
    """Cluster one family of trajectories every way and fill the carry columns.

    Args:
        paths: trajectories on both splits.
        projections: on select, for losses and steps.
        splits: labels.
        scoring: how.
    """
    clustered = cluster_variants(paths, splits, scoring)
    pairs = [(s, e, c) for c in clustered for s, e in zip(c.eligible, c.on_evaluate, strict=True)]
    best = max(pairs, key=lambda pair: pair[0].f1, default=None)
    used = best[2] if best else clustered[0]
    columns = CarryScores(
        used.variant.name,
        hidden_share([v.select for v in used.vectors], paths.select, projections, scoring.delta),
        outlier_share([v.select for v in used.vectors]),
        success_rate([v.select for v in used.vectors]),
        variants={c.variant.name: _most_homogeneous(c) for c in clustered},
    )
    if best is None:
        return columns
    on_select, on_evaluate, _ = best
    vector, carry = used.vectors[on_select.vector], splits.evaluate.skills[CARRY]
    stability, validity = _trust(used, on_select.vector, paths, splits.select, scoring)
    rule = fit_rule(splits.select, vector.select.members(on_select.cluster), seed=scoring.seed)
    assigned = rule.assign(splits.evaluate)
    both, size = int((assigned & carry).sum()), int(assigned.sum())
    return replace(
        columns,
        vector=on_select.vector,
        select_f1=on_select.f1,
        select_homogeneity=on_select.homogeneity,
        homogeneity=on_evaluate.homogeneity,
        recall_all=on_evaluate.recall_all,
        recall_paper=on_evaluate.recall_paper,
        f1=on_evaluate.f1,
        adjusted_rand=float(adjusted_rand_score(vector.evaluate.labels.numpy(), carry.numpy())),
        stability=stability,
        validity=validity,
        rule_auc=rule.auc,
        rule_homogeneity=both / size if size else None,
        rule_recall=both / int(carry.sum()),
    )


def _trust(
    used: Clustered, vector: int, paths: Paths, tokens: TokenSet, scoring: Scoring
) -> tuple[float, float | None]:
    """Stability and density-based validity of one vector's clustering on select."""
    found, method = used.vectors[vector].select, used.variant.method
    kept = ~found.dropped
    rows = shaped(paths.select[:, vector].T[kept], used.variant.scaled)

    def again(drawn: Tensor) -> Tensor:
        size = len(found.labels)
        fitted = fit_clustering(drawn, method, tokens=size, settings=scoring.clusters, seed=scoring.seed)
        return fitted.labels

    stability = bootstrap_stability(
        rows,
        tokens.documents[tokens.sequence_of][kept],
        found.labels[kept],
        again,
        draws=scoring.draws,
        generator=torch.Generator().manual_seed(scoring.seed),
    )
    return stability, density_validity(rows, found.labels[kept])


def _most_homogeneous(clustered: Clustered) -> VariantScores | None:
    if not clustered.eligible:
        return None
    chosen = clustered.on_evaluate[0]
    return VariantScores(
        len(clustered.eligible),
        clustered.eligible[0].homogeneity,
        chosen.homogeneity,
        chosen.recall_paper,
        chosen.f1,
        tuple(score.homogeneity for score in clustered.on_evaluate[:3]),
    )
