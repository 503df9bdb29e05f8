"""Clusters of projected-loss trajectories, one clustering per basis vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import hdbscan
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

OUTLIER = -1


@dataclass(frozen=True)
class ClusterSettings:
    """HDBSCAN settings as shares of the token count (paper: 150 and 5000/15 of 5000 tokens).

    Attributes:
        min_cluster_share: ``min_cluster_size`` over tokens.
        min_samples_share: ``min_samples`` over tokens.
        scaled: divide every trajectory by its own largest absolute value.
        drop_rising_tokens: leave out tokens that end above where they began (projected or exact loss).
        drop_rising_vectors: leave out vectors whose mean over tokens ends above where it began.
        by_output: cluster tokens of each output id apart.
        selection: HDBSCAN's cluster selection.
        algorithm: how HDBSCAN finds its spanning tree; ``generic`` holds all pairwise distances and is
            three to four times faster for up to a few thousand tokens. Distances differ in the last bit,
            which moved one token in 1 % of 452 clusterings of demo runs.
    """

    min_cluster_share: float = 0.03
    min_samples_share: float = 1 / 15
    scaled: bool = False
    drop_rising_tokens: bool = True
    drop_rising_vectors: bool = True
    by_output: bool = False
    selection: Literal["eom", "leaf"] = "eom"
    algorithm: Literal["best", "generic"] = "best"


@dataclass(frozen=True)
class VectorClusters:
    """Clusters along one vector.

    Attributes:
        vector: index in the basis.
        kept: False if the whole vector was dropped as oscillation.
        labels: (M,) cluster of each token, -1 for outliers and dropped tokens.
        dropped: (M,) tokens left out before clustering.
    """

    vector: int
    kept: bool
    labels: Int[Tensor, " M"]
    dropped: Bool[Tensor, " M"]

    @property
    def count(self) -> int:
        """Number of clusters."""
        return int(self.labels.max()) + 1 if self.labels.numel() else 0

    @property
    def outlier_share(self) -> float:
        """Share of the clustered (not dropped) tokens that HDBSCAN left out."""
        clustered = ~self.dropped
        total = int(clustered.sum())
        return float((self.labels[clustered] == OUTLIER).sum() / total) if total and self.kept else 0.0

    def members(self, cluster: int) -> Bool[Tensor, " M"]:
        """Mask of one cluster's tokens."""
        return self.labels == cluster

    def masks(self) -> dict[str, Bool[Tensor, " M"]]:
        """``"vector:cluster"`` -> mask of its tokens, for every cluster.

        >>> labels = torch.tensor([0, -1, 1])
        >>> VectorClusters(3, True, labels, labels < 0).masks()["3:1"].tolist()
        [False, False, True]
        """
        return {f"{self.vector}:{cluster}": self.members(cluster) for cluster in range(self.count)}


def cluster_trajectories(
    projected_loss: Float[Tensor, "T K M"],
    settings: ClusterSettings,
    outputs: Int[Tensor, " M"] | None = None,
) -> list[VectorClusters]:
    """Cluster every vector's trajectories (arXiv 2506.15872, sections 3.3 and 4.1).

    Vectors whose mean projected loss rises from the first to the last checkpoint are dropped, and
    so are, per vector, the tokens whose own projected loss rises.
    """
    result = []
    count = projected_loss.shape[2]
    for vector in range(projected_loss.shape[1]):
        paths = projected_loss[:, vector].T
        kept, dropped = rising_filter(paths, settings)
        labels = torch.full((count,), OUTLIER)
        if kept:
            chosen = (~dropped).nonzero()[:, 0]
            groups = [chosen]
            if settings.by_output and outputs is not None:
                groups = [chosen[outputs[chosen] == value] for value in outputs[chosen].unique()]
            for group in groups:
                found = density_clusters(shaped(paths[group], settings.scaled), count, settings)
                labels[group] = torch.where(found >= 0, found + int(labels.max()) + 1, found)
        result.append(VectorClusters(vector, kept, labels, dropped))
    return result


def rising_filter(paths: Float[Tensor, "m T"], settings: ClusterSettings) -> tuple[bool, Bool[Tensor, " m"]]:
    """The paper's filters: whether the vector is kept, and which of its tokens are dropped.

    Judged by the last value less the first one: a projected loss begins at zero, an exact loss does not.
    """
    rise = paths[:, -1] - paths[:, 0]
    kept = not settings.drop_rising_vectors or float(rise.double().mean()) <= 0
    dropped = rise > 0 if settings.drop_rising_tokens else torch.zeros(len(paths), dtype=torch.bool)
    return kept, dropped


def shaped(paths: Float[Tensor, "m T"], scaled: bool) -> Float[Tensor, "m T"]:
    """Trajectories as they are, or each divided by its own largest absolute value."""
    return paths / paths.abs().amax(1, keepdim=True).clamp_min(1e-12) if scaled else paths


def density_clusters(
    paths: Float[Tensor, "m T"], tokens: int, settings: ClusterSettings
) -> Int[Tensor, " m"]:
    """HDBSCAN labels; sizes are shares of ``tokens``, the count before any filter."""
    size = max(2, round(settings.min_cluster_share * tokens))
    samples = max(1, round(settings.min_samples_share * tokens))
    if len(paths) <= max(size, samples):
        return torch.full((len(paths),), OUTLIER)
    clusterer = hdbscan.HDBSCAN(
        min_cluster_size=size,
        min_samples=samples,
        cluster_selection_method=settings.selection,
        core_dist_n_jobs=1,
        algorithm=settings.algorithm,
    )
    return torch.from_numpy(np.asarray(clusterer.fit_predict(paths.double().numpy()), dtype=np.int64))
