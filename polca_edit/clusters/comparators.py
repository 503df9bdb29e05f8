"""Clusterings beside HDBSCAN, and how far any of them can be trusted.

A clustering is fitted on the select split. It carries over to other tokens by its own rule
(:meth:`FittedClustering.assign`), never by labels: HDBSCAN by approximate prediction, k-means and
mixtures by their own prediction, the others by the nearest fitted trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import hdbscan
import numpy as np
import torch
from hdbscan.validity import validity_index
from jaxtyping import Float, Int
from sklearn import metrics
from sklearn.cluster import AgglomerativeClustering, KMeans, SpectralClustering
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from polca_edit.clusters.density import OUTLIER, ClusterSettings, VectorClusters, rising_filter, shaped

Method = Literal["hdbscan", "kmeans", "gaussian_mixture", "agglomerative", "spectral"]
METHODS: tuple[Method, ...] = ("hdbscan", "kmeans", "gaussian_mixture", "agglomerative", "spectral")
#: Principal components a Gaussian mixture sees of each trajectory.
MIXTURE_COMPONENTS = 10


@dataclass(frozen=True)
class FittedClustering:
    """Labels of the fitted trajectories and the rule for new ones.

    Attributes:
        labels: (m,) cluster of each fitted trajectory, -1 for outliers.
        predict: (n, T) array -> (n,) labels.
    """

    labels: Int[Tensor, " m"]
    predict: Callable[[np.ndarray], np.ndarray]

    def assign(self, paths: Float[Tensor, "n T"]) -> Int[Tensor, " n"]:
        """Clusters of unseen trajectories, shaped as the fitted ones were."""
        if len(paths) == 0:
            return torch.zeros(0, dtype=torch.long)
        return torch.from_numpy(np.asarray(self.predict(paths.double().numpy()), dtype=np.int64))


def fit_clustering(
    paths: Float[Tensor, "m T"],
    method: Method,
    *,
    tokens: int,
    settings: ClusterSettings,
    count: int = 8,
    seed: int = 0,
) -> FittedClustering:
    """Cluster trajectories that are already shaped (raw or scaled).

    Args:
        paths: one trajectory per token.
        method: HDBSCAN, or a comparator with a fixed number of clusters.
        tokens: token count before any filter, which HDBSCAN's sizes are shares of.
        settings: HDBSCAN's shares and selection.
        count: clusters of the comparators.
        seed: of their starts.
    """
    points = paths.double().numpy()
    size = max(2, round(settings.min_cluster_share * tokens))
    samples = max(1, round(settings.min_samples_share * tokens))
    if len(points) <= max(size, samples if method == "hdbscan" else count):
        return FittedClustering(torch.full((len(points),), OUTLIER), lambda new: np.full(len(new), OUTLIER))
    if method == "hdbscan":
        found = hdbscan.HDBSCAN(
            min_cluster_size=size,
            min_samples=samples,
            cluster_selection_method=settings.selection,
            core_dist_n_jobs=1,
            prediction_data=True,
        ).fit(points)
        if found.labels_.max() < 0:
            return FittedClustering(_labels(found.labels_), lambda new: np.full(len(new), OUTLIER))
        return FittedClustering(
            _labels(found.labels_), lambda new: hdbscan.approximate_predict(found, new)[0]
        )
    if method == "kmeans":
        means = KMeans(count, n_init=4, random_state=seed).fit(points)
        return FittedClustering(_labels(means.labels_), means.predict)
    if method == "gaussian_mixture":
        return _mixture(points, count, seed)
    model: Any = (
        AgglomerativeClustering(count)
        if method == "agglomerative"
        else SpectralClustering(count, affinity="nearest_neighbors", n_neighbors=15, random_state=seed)
    )
    labels = model.fit_predict(points)
    nearest = KNeighborsClassifier(5).fit(points, labels)
    return FittedClustering(_labels(labels), nearest.predict)


def _labels(found: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(found, dtype=np.int64))


def _mixture(points: np.ndarray, count: int, seed: int) -> FittedClustering:
    reduced = PCA(min(MIXTURE_COMPONENTS, *points.shape), random_state=seed).fit(points)
    model = GaussianMixture(count, covariance_type="full", reg_covar=1e-6, random_state=seed)
    labels = model.fit_predict(reduced.transform(points))
    return FittedClustering(_labels(labels), lambda new: model.predict(reduced.transform(new)))


@dataclass(frozen=True)
class SplitClusters:
    """One vector's clusters on the split they were found on and carried over to another."""

    select: VectorClusters
    evaluate: VectorClusters


def cluster_both(
    select: Float[Tensor, "T K M"],
    evaluate: Float[Tensor, "T K E"],
    settings: ClusterSettings,
    *,
    method: Method = "hdbscan",
    count: int = 8,
    seed: int = 0,
) -> list[SplitClusters]:
    """Cluster every vector's trajectories on select and carry the clusters over to evaluate.

    The filters are the paper's: a vector whose mean projected loss rises on select is dropped, and so
    is, per vector and split, every token whose own projected loss rises.
    """
    result = []
    for vector in range(select.shape[1]):
        paths = [split[:, vector].T for split in (select, evaluate)]
        filters = [rising_filter(p, settings) for p in paths]
        kept, dropped = filters[0][0], [gone for _, gone in filters]
        labels = [torch.full((len(p),), OUTLIER) for p in paths]
        if kept:
            inputs = [shaped(p[~d], settings.scaled) for p, d in zip(paths, dropped, strict=True)]
            fitted = fit_clustering(
                inputs[0], method, tokens=len(paths[0]), settings=settings, count=count, seed=seed
            )
            labels[0][~dropped[0]] = fitted.labels
            labels[1][~dropped[1]] = fitted.assign(inputs[1])
        both = [VectorClusters(vector, kept, own, gone) for own, gone in zip(labels, dropped, strict=True)]
        result.append(SplitClusters(*both))
    return result


# -- trust ----------------------------------------------------------------------------------------


def bootstrap_stability(
    paths: Float[Tensor, "m T"],
    documents: Int[Tensor, " m"],
    labels: Int[Tensor, " m"],
    cluster: Callable[[Tensor], Tensor],
    *,
    draws: int,
    generator: torch.Generator,
) -> float:
    """Mean adjusted Rand index between a clustering and itself on resampled sequences.

    Whole documents are drawn with replacement; the drawn trajectories are clustered anew and
    compared with the first labels of the same tokens. Outliers count as one more cluster. A copy of
    a token adds density but is compared once.

    Args:
        paths: shaped trajectories.
        documents: document of each.
        labels: the clustering to test.
        cluster: trajectories -> labels.
        draws: bootstrap samples.
        generator: draws the documents.
    """
    names = documents.unique()
    scores = []
    for _ in range(draws):
        drawn = names[torch.randint(len(names), (len(names),), generator=generator)]
        rows = torch.cat([(documents == name).nonzero()[:, 0] for name in drawn])
        again = cluster(paths[rows])
        first = np.unique(rows.numpy(), return_index=True)[1]
        scores.append(metrics.adjusted_rand_score(labels[rows[first]].numpy(), again[first].numpy()))
    return float(np.mean(scores))


def density_validity(paths: Float[Tensor, "m T"], labels: Int[Tensor, " m"]) -> float | None:
    """Density-based validity index (Moulavi et al. 2014) in [-1, 1]; None without two clusters.

    A cluster of one token has no density, it counts as an outlier.
    """
    found, counts = np.unique(labels.numpy(), return_counts=True)
    single = np.isin(labels.numpy(), found[counts < 2])
    kept = np.where(single, OUTLIER, labels.numpy())
    if len(np.unique(kept[kept != OUTLIER])) < 2:
        return None
    with np.errstate(all="ignore"):
        value = float(validity_index(paths.double().numpy(), kept, d=min(paths.shape[1], 10)))
    return value if np.isfinite(value) else None


def success_rate(clusters: Sequence[VectorClusters]) -> float:
    """Share of the kept vectors along which at least one cluster was found."""
    kept = [c for c in clusters if c.kept]
    return sum(c.count > 0 for c in kept) / len(kept) if kept else 0.0


def outlier_share(clusters: Sequence[VectorClusters]) -> float:
    """Mean outlier share of the kept vectors."""
    kept = [c.outlier_share for c in clusters if c.kept]
    return sum(kept) / len(kept) if kept else 1.0
