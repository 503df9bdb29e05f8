"""What labelling leaves of a run: ``labels/NAME.json``, one file a basis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: Name under which the labels of the rival without a basis are kept.
EXACT_LOSS = "exact_loss"


@dataclass(frozen=True)
class TagRecord:
    """A label by part of speech: see :class:`polca_edit.clusters.labels.TagLabel`."""

    text: str
    found: bool
    support: int
    coverage: float
    lift: float
    chance: float


@dataclass(frozen=True)
class ClusterLabel:
    """What the tokens of one cluster share.

    Attributes:
        vector: index in the basis.
        cluster: index along that vector.
        tokens: how many it has.
        rule: feature rule in words.
        auc: of the rule on held-out documents.
        auc_shuffled: the same after the members were shuffled.
        coverage: share of the cluster that the rule picks.
        precision: share of what the rule picks that is in the cluster.
        support: cluster tokens that the rule picks.
        base_rate: share of all tokens that are in the cluster.
        counts: whether the AUC is large enough for a label.
        contexts: of the tokens nearest the medoid of the cluster's trajectories.
        tags: label by part of speech, where the tokens have tags.
    """

    vector: int
    cluster: int
    tokens: int
    rule: str
    auc: float
    auc_shuffled: float
    coverage: float
    precision: float
    support: int
    base_rate: float
    counts: bool
    contexts: tuple[str, ...]
    tags: TagRecord | None = None


@dataclass(frozen=True)
class BasisLabels:
    """Labels of all clusters of one basis.

    Attributes:
        threshold: held-out AUC from which a rule counts.
        clusters: one entry each.
        overlap: Jaccard index of every pair of clusters.
        distinct_groups: clusters that share more than half of their tokens, taken together.
        vectors_kept: vectors that were clustered.
        vectors_with_rule: of them, those with a cluster whose rule counts.
        vectors_with_tags: of them, those with a part-of-speech label.
        clusters_with_rule: clusters whose rule counts.
    """

    threshold: float
    clusters: tuple[ClusterLabel, ...]
    overlap: tuple[tuple[float, ...], ...]
    distinct_groups: tuple[tuple[str, ...], ...]
    vectors_kept: int
    vectors_with_rule: int
    vectors_with_tags: int
    clusters_with_rule: int


@dataclass(frozen=True)
class TransferredLabel:
    """How well a cluster's rule names the tokens of another text that move like the cluster."""

    basis: str
    vector: int
    cluster: int
    rule: str
    auc: float
    auc_transferred: float | None
    tokens: int


def label_files(directory: Path) -> dict[str, Path]:
    """Basis (or ``exact_loss``) -> file of its labels, empty where none were made."""
    found = sorted((directory / "labels").glob("*.json"))
    return {path.stem: path for path in found if path.stem != "transfer"}
