"""How clusters agree with skills: the one set of scores of the project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from polca_edit.clusters.density import OUTLIER, VectorClusters


@dataclass(frozen=True)
class SkillScores:
    """How one cluster agrees with one skill.

    Attributes:
        vector: basis vector or feature.
        cluster: cluster along it.
        tokens: its size.
        homogeneity: share of the cluster's tokens with the skill.
        recall_all: share of all tokens with the skill that are in the cluster.
        recall_paper: the same without dropped tokens and outliers.
        lift: homogeneity over the skill's base rate.
        f1: harmonic mean of homogeneity and recall_paper, as in the paper.
    """

    vector: int
    cluster: int
    tokens: int
    homogeneity: float
    recall_all: float
    recall_paper: float
    lift: float
    f1: float


def score_cluster(found: VectorClusters, cluster: int, skill: Bool[Tensor, " M"]) -> SkillScores:
    """One cluster against one skill; a share of nothing counts as 0."""
    members = found.members(cluster)
    clustered = (found.labels != OUTLIER) & ~found.dropped
    both, size = int((members & skill).sum()), int(members.sum())
    homogeneity = _share(both, size)
    recall = _share(both, int((skill & clustered).sum()))
    return SkillScores(
        found.vector,
        cluster,
        size,
        homogeneity,
        _share(both, int(skill.sum())),
        recall,
        _share(homogeneity, float(skill.double().mean())),
        _share(2 * homogeneity * recall, homogeneity + recall),
    )


def _share(part: int | float, whole: int | float) -> float:
    return part / whole if whole else 0.0


def skill_scores(
    clusters: VectorClusters, cluster: int, skills: Mapping[str, Bool[Tensor, " M"]]
) -> dict[str, SkillScores]:
    """Agreement of one cluster with every skill."""
    return {name: score_cluster(clusters, cluster, skill) for name, skill in skills.items()}


def carry_scores(
    clusters: Sequence[VectorClusters],
    carry: Bool[Tensor, " M"],
    counted: Bool[Tensor, " M"],
    *,
    min_share: float = 0.03,
    rule: float = 0.85,
) -> list[SkillScores]:
    """Every eligible cluster against the carry label, most homogeneous first.

    Eligible (arXiv 2506.15872, section 4): at least ``min_share`` of the tokens, and over ``rule`` of
    its carry tokens at the places that count (10s and 100s), so that the 1000s place, where the digit
    is the carry, cannot win.

    Args:
        clusters: one record per vector.
        carry: the label.
        counted: tokens at the 10s or 100s place.
        min_share: smallest cluster as a share of all tokens.
        rule: the 85 %.
    """
    scores = []
    for found in clusters:
        for cluster in range(found.count):
            members = found.members(cluster)
            carried = int((members & carry).sum())
            inside = int((members & carry & counted).sum())
            if int(members.sum()) >= min_share * len(carry) and carried and inside > rule * carried:
                scores.append(score_cluster(found, cluster, carry))
    return sorted(scores, key=lambda score: -score.homogeneity)
