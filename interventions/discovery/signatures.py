"""Interventional clusters: tokens grouped by what undoing training does to them. No label is needed.

Three steps. (1) HDBSCAN on the embedded signatures of random partial undo edits finds dense groups; those
differ also in *which* outputs a direction favours. (2) Each group grows by the outliers whose neighbours
nearly all belong to it. (3) Groups that the same *windows* of training carry are one skill: undone whole, a
window does not care which output a direction favours. The groups of (2) are kept as parts of their skill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import hdbscan
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from interventions.causal.statistics import capped
from interventions.damage import EvaluatedSplit
from interventions.discovery.axes import SkillAxis
from interventions.discovery.partial_undo import EditSettings, Signatures, embedded, signatures
from interventions.edits import project_out
from polca_edit.basis.record import Basis
from polca_edit.clusters.hypotheses import Hypothesis, TokenGroup
from polca_edit.clusters.membership import fit_rule

OUTLIER = -1
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class SignatureSettings:
    """How signatures are drawn and clustered.

    Attributes:
        edits: which edits, how many.
        method: ``hdbscan``, or ``kmeans`` and ``spectral`` for comparison (every token is clustered).
        clusters: of the last two.
        least_share: smallest cluster, as a share of the tokens.
        samples_share: HDBSCAN's ``min_samples``, likewise.
        neighbours: neighbours an outlier asks; 0: groups do not grow.
        agreeing: share of the clustered ones among them that must be of one group.
        same_windows: correlation of two groups' losses over windows from which they are one skill.
        inner_share: smallest part when a cluster is clustered again inside, as a share of its tokens.
        seed: of k-means, spectral clustering and membership rules.
    """

    edits: EditSettings = field(default_factory=EditSettings)
    method: Literal["hdbscan", "kmeans", "spectral"] = "hdbscan"
    clusters: int = 6
    least_share: float = 0.025
    samples_share: float = 0.005
    neighbours: int = 15
    agreeing: float = 0.9
    same_windows: float = 0.9
    inner_share: float = 0.05
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Found:
    """Interventional clusters of the tokens of a split.

    Attributes:
        basis: names of the undone bases, joined by ``+``.
        labels: (M,) cluster of each token, -1 outside every cluster.
        parts: (M,) group of each token before groups of one skill were joined, -1 outside.
        inner: (M,) group of each token when its cluster was clustered again by its own signatures, numbered
            through all clusters, -1 outside.
        stability: (edits a basis, agreement of two halves of the edits).
        edits: partial undo edits in all.
        split: the tokens; None once it was stored.
        bases: name -> basis; empty once it was stored.
    """

    basis: str
    labels: Int[Tensor, " M"]
    parts: Int[Tensor, " M"]
    inner: Int[Tensor, " M"]
    stability: tuple[tuple[int, float], ...]
    edits: int
    split: EvaluatedSplit | None = field(default=None, repr=False)
    bases: Mapping[str, Basis] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        """Number of clusters."""
        return int(self.labels.max()) + 1 if self.labels.numel() else 0

    @property
    def outlier_share(self) -> float:
        """Share of tokens in no cluster."""
        return float((self.labels == OUTLIER).double().mean())

    @property
    def clusters(self) -> dict[str, Bool[Tensor, " M"]]:
        """Name -> members; names are numbers, largest cluster first."""
        return {str(c): self.labels == c for c in range(self.count)}

    def masks(self) -> dict[str, Bool[Tensor, " M"]]:
        """The clusters under names that say which bases were undone, ``"basis:cluster"``."""
        return {f"{self.basis}:{name}": mask for name, mask in self.clusters.items()}

    def parts_of(self, cluster: int, *, inner: bool = False) -> dict[str, Bool[Tensor, " M"]]:
        """Name -> members of the groups inside a cluster, ``"cluster.part"``.

        Args:
            cluster: number.
            inner: those found by clustering again inside it, instead of those joined to make it.
        """
        given = self.inner if inner else self.parts
        inside = self.labels == cluster
        names = [int(p) for p in given[inside].unique() if p != OUTLIER]
        return {f"{cluster}.{i}": (given == p) & inside for i, p in enumerate(names)}

    def hypotheses(self, axes: Mapping[str, SkillAxis] | None = None, *, seed: int = 0) -> list[Hypothesis]:
        """Each cluster with the movement that hurts it most here, for a test on unseen tokens.

        Args:
            axes: cluster name -> skill axis, taken instead of a vector where there is one.
            seed: of the membership rules.

        Raises:
            ValueError: for clusters read from a file, which have no model at hand.
        """
        if self.split is None or not self.bases:
            raise ValueError(
                "hypotheses need the split and bases of the clusters, these were read from a file; find "
                "the clusters again with interventional_clusters"
            )
        shares = vector_shares(self.split, self.bases, self.clusters)
        tokens, made = self.split.tokens, []
        for name, members in self.clusters.items():
            group = TokenGroup.labelled(f"{self.basis}:{name}", members, tokens)
            if tokens.features:
                group = TokenGroup(group.name, rule=fit_rule(tokens, members, seed=seed))
            best = max(shares, key=lambda key: shares[key][name])
            basis, vector = best
            axis = (axes or {}).get(name)
            rows = self.bases[basis][vector].rows if axis is None else axis.basis.rows
            why = f"of all vectors, undoing it costs the cluster most on select ({shares[best][name]:.2f})"
            made.append(
                Hypothesis(
                    f"{basis} {vector if axis is None else 'axis'} | {group.name}",
                    rows,
                    group,
                    "interventional",
                    basis,
                    (vector,) if axis is None else (),
                    int(name),
                    supervised=axis is not None or self.bases[basis].supervised,
                    why=why if axis is None else "the span's own axis of the cluster, searched on select",
                )
            )
        return made


def interventional_clusters(
    split: EvaluatedSplit,
    bases: Basis | Sequence[Basis] | Mapping[str, Basis],
    settings: SignatureSettings | None = None,
) -> Found:
    """Cluster tokens by what undoing recorded movement does to them.

    Args:
        split: tokens of the exploration (select, never the unseen ones).
        bases: one or several, their edits side by side; names default to their kinds.
        settings: edits and clustering.

    Raises:
        ValueError: for no basis, or a basis without movement.

    Example:
        >>> found = interventional_clusters(split, [hessian, trajectory])  # doctest: +SKIP
        >>> {name: int(mask.sum()) for name, mask in found.clusters.items()}  # doctest: +SKIP
    """
    settings = settings or SignatureSettings()
    named = name_bases(bases)
    return clustered(signatures(split, named, settings.edits), "+".join(named), settings, split, named)


def name_bases(bases: Basis | Sequence[Basis] | Mapping[str, Basis]) -> dict[str, Basis]:
    """Bases under names; a kind that comes twice is numbered."""
    if isinstance(bases, Mapping):
        return dict(bases)
    given = [bases] if isinstance(bases, Basis) else list(bases)
    kinds = [basis.kind for basis in given]
    return {
        kind if kinds.count(kind) == 1 else f"{kind}{index}": basis
        for index, (kind, basis) in enumerate(zip(kinds, given, strict=True))
    }


def clustered(
    signed: Signatures,
    name: str,
    settings: SignatureSettings,
    split: EvaluatedSplit | None = None,
    bases: Mapping[str, Basis] | None = None,
) -> Found:
    """Clusters from signatures that were measured already.

    Args:
        signed: signatures.
        name: of the bases.
        settings: of the clustering.
        split: tokens, where hypotheses are wanted.
        bases: likewise.
    """
    places = embedded(signed.changes, settings.edits)
    parts = grown(dense_groups(places, settings), places, settings)
    labels = by_size(joined_by_windows(parts, signed, settings))
    inner = inner_groups(labels, signed, settings)
    as_tensor = torch.from_numpy
    return Found(
        name,
        as_tensor(labels),
        as_tensor(parts),
        as_tensor(inner),
        signed.stability,
        len(signed.changes),
        split,
        bases or {},
    )


def dense_groups(places: Float[np.ndarray, "M d"], settings: SignatureSettings) -> Labels:
    """Groups of the embedded tokens by the method asked for."""
    count = len(places)
    if settings.method == "kmeans":
        fitted = KMeans(settings.clusters, n_init=10, random_state=settings.seed).fit_predict(places)
    elif settings.method == "spectral":
        fitted = SpectralClustering(
            settings.clusters, affinity="nearest_neighbors", random_state=settings.seed
        ).fit_predict(places)
    else:
        least = max(2, round(settings.least_share * count))
        if count <= least:
            return np.full(count, OUTLIER, dtype=np.int64)
        fitted = hdbscan.HDBSCAN(
            min_cluster_size=least,
            min_samples=max(1, round(settings.samples_share * count)),
            cluster_selection_method="leaf",
            core_dist_n_jobs=1,
        ).fit_predict(places)
    return np.asarray(fitted, dtype=np.int64)


def grown(groups: Labels, places: Float[np.ndarray, "M d"], settings: SignatureSettings) -> Labels:
    """Outliers join the group that nearly all of their clustered neighbours belong to.

    At least half of the neighbours asked must be of that group, so tokens far from every group stay out.
    """
    count = min(settings.neighbours, len(groups) - 1)
    if count < 1 or groups.max() < 0:
        return groups
    near = NearestNeighbors(n_neighbors=count + 1).fit(places).kneighbors(places)[1][:, 1:]
    groups = groups.copy()
    while True:
        following = groups.copy()
        for token in np.flatnonzero(groups == OUTLIER):
            known = groups[near[token]]
            known = known[known != OUTLIER]
            if not len(known):
                continue
            votes = np.bincount(known)
            if votes.max() >= max(count / 2, settings.agreeing * len(known)):
                following[token] = int(votes.argmax())
        if (following == groups).all():
            return groups
        groups = following


def joined_by_windows(parts: Labels, signed: Signatures, settings: SignatureSettings) -> Labels:
    """Groups whose shares lost over the windows of training go together, as one (average linkage)."""
    count = int(parts.max()) + 1
    if count < 2 or len(signed.windows) < 3:
        return parts
    room = np.maximum(signed.headroom, 0.0)
    lost = np.stack([capped(change, signed.headroom) for change in signed.windows])
    profiles = np.stack(
        [lost[:, parts == c].sum(1) / max(float(room[parts == c].sum()), 1e-12) for c in range(count)]
    )
    # A group that no window touches has no profile; it stays alone.
    flat = profiles.std(1) < 1e-12
    profiles[flat] = np.random.default_rng(settings.seed).normal(size=(int(flat.sum()), profiles.shape[1]))
    tree = linkage(profiles, "average", metric="correlation")
    skill = fcluster(tree, 1 - settings.same_windows, "distance") - 1
    return np.where(parts == OUTLIER, OUTLIER, skill[parts]).astype(np.int64)


def by_size(labels: Labels) -> Labels:
    """The same clusters numbered from the largest down."""
    names, sizes = np.unique(labels[labels != OUTLIER], return_counts=True)
    rank = {int(names[i]): number for number, i in enumerate(np.argsort(-sizes, kind="stable"))}
    return np.array([rank.get(int(label), OUTLIER) for label in labels], dtype=np.int64)


def inner_groups(labels: Labels, signed: Signatures, settings: SignatureSettings) -> Labels:
    """Every cluster clustered again, by its own tokens' signatures less the cluster's mean signature."""
    inner = np.full(len(labels), OUTLIER, dtype=np.int64)
    first = 0
    for cluster in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == cluster)
        changes = signed.changes[:, members]
        least = max(8, round(settings.inner_share * len(members)))
        if len(members) < 3 * least:
            continue
        places = embedded(changes - changes.mean(1, keepdims=True), settings.edits)
        found = hdbscan.HDBSCAN(
            min_cluster_size=least, min_samples=4, cluster_selection_method="leaf", core_dist_n_jobs=1
        ).fit_predict(places)
        inner[members] = np.where(found >= 0, found + first, OUTLIER)
        first += int(found.max()) + 1
    return inner


def vector_shares(
    split: EvaluatedSplit, bases: Mapping[str, Basis], groups: Mapping[str, Tensor]
) -> dict[tuple[str, int], dict[str, float]]:
    """(basis, vector) -> group -> share lost when that vector's movement is undone."""
    return {
        (name, vector): split.damage(project_out(split, basis[vector])).share_by(groups)
        for name, basis in bases.items()
        for vector in range(len(basis))
    }
