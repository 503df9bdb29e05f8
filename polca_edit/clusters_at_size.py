"""Density clusters of a million trajectories: fewer coordinates with a stated error, a fast HDBSCAN.

Trajectories of training are smooth, so a few principal components hold nearly all of their
variance; what is left out is measured, not assumed. ``fast_hdbscan`` (optional extra ``size``)
builds the same tree as hdbscan in parallel, for the handful of dimensions that remain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from polca_edit.clusters import OUTLIER, ClusterSettings, density_clusters, shaped

#: Points at once in float64, so that memory stays that of the input.
BLOCK = 1 << 16


@dataclass(frozen=True)
class ReducedPaths:
    """Trajectories in principal components.

    Attributes:
        scores: (m, d) coordinates, centred.
        components: (d, T) orthonormal rows.
        centre: (T,) mean trajectory.
        variance_error: share of the total variance that is left out.
        largest_error: largest distance of a trajectory from its reduction, over the root mean square
            distance of trajectories from their mean.
    """

    scores: Float[Tensor, "m d"]
    components: Float[Tensor, "d T"]
    centre: Float[Tensor, " T"]
    variance_error: float
    largest_error: float


@dataclass(frozen=True)
class SizeReport:
    """Labels of many tokens, and how far they can be trusted.

    Attributes:
        labels: (m,) cluster of each trajectory, -1 outside.
        variance_error: see :class:`ReducedPaths`.
        largest_error: see :class:`ReducedPaths`.
        agreement: adjusted Rand index with exact HDBSCAN on full trajectories of a sample, outliers
            counted as a cluster; NaN where no sample was asked for.
        sample: trajectories in that sample.
    """

    labels: Int[Tensor, " m"]
    variance_error: float
    largest_error: float
    agreement: float
    sample: int


def reduce_paths(
    paths: Float[Tensor, "m T"], *, variance_error: float = 1e-3, most: int = 10
) -> ReducedPaths:
    """Principal components of trajectories, as few as keep the error, from the T x T covariance.

    Args:
        paths: trajectories.
        variance_error: share of the total variance that may be left out.
        most: components at most; the record says what error is left if these do not suffice.
    """
    centre = torch.stack([block.double().sum(0) for block in torch.split(paths, BLOCK)]).sum(0) / len(paths)
    covariance = torch.zeros(paths.shape[1], paths.shape[1], dtype=torch.float64)
    for block in torch.split(paths, BLOCK):
        moved = block.double() - centre
        covariance += moved.T @ moved
    values, vectors = torch.linalg.eigh(covariance / len(paths))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    total = float(values.sum())
    left = 1 - values.cumsum(0) / max(total, 1e-300)
    enough = int((left > variance_error).sum()) + 1
    kept = max(1, min(enough, most, paths.shape[1]))
    components = vectors[:, :kept].T
    scores, worst = [], 0.0
    for block in torch.split(paths, BLOCK):
        moved = block.double() - centre
        part = moved @ components.T
        worst = max(worst, float((moved - part @ components).norm(dim=1).max()))
        scores.append(part.to(paths.dtype))
    scale = max(total, 1e-300) ** 0.5
    error = max(0.0, float(left[kept - 1])) if total > 0 else 0.0
    return ReducedPaths(torch.cat(scores), components, centre, error, worst / scale)


def fast_density_clusters(
    scores: Float[Tensor, "m d"], size: int, samples: int, selection: str
) -> Int[Tensor, " m"]:
    """HDBSCAN by ``fast_hdbscan``.

    Raises:
        ValueError: if the package is not installed.
    """
    try:
        import fast_hdbscan
    except ImportError as error:
        raise ValueError(
            "clustering at size needs the package fast_hdbscan; install polca-edit[size]"
        ) from error
    if len(scores) <= max(size, samples):
        return torch.full((len(scores),), OUTLIER)
    # float64: with a million near neighbours, float32 distances tie and the tree depends on the order.
    points = np.ascontiguousarray(scores.double().numpy())
    found = fast_hdbscan.HDBSCAN(
        min_cluster_size=size, min_samples=samples, cluster_selection_method=selection
    )
    return torch.from_numpy(np.asarray(found.fit_predict(points), dtype=np.int64))


def clusters_at_size(
    paths: Float[Tensor, "m T"],
    settings: ClusterSettings,
    *,
    generator: torch.Generator,
    most_samples: int = 50,
    variance_error: float = 1e-3,
    check_sample: int = 5000,
) -> SizeReport:
    """Clusters of many trajectories along one vector, compared with exact HDBSCAN on a sample.

    ``min_samples`` as a share of a million tokens would ask for tens of thousands of neighbours per
    token; it smooths densities, for which a fixed number is enough, so it is capped.

    Args:
        paths: (m, T) trajectories.
        settings: as for exact clustering.
        generator: draws the sample.
        most_samples: cap on ``min_samples``.
        variance_error: share of variance the reduction may lose.
        check_sample: trajectories clustered exactly as well; 0 for none.
    """
    given = shaped(paths, settings.scaled)
    reduced = reduce_paths(given, variance_error=variance_error)
    size = max(2, round(settings.min_cluster_share * len(paths)))
    samples = max(1, min(most_samples, round(settings.min_samples_share * len(paths))))
    labels = fast_density_clusters(reduced.scores, size, samples, settings.selection)
    agreement, count = float("nan"), min(check_sample, len(paths))
    if count > 1:
        chosen = torch.randperm(len(paths), generator=generator)[:count]
        # The sample is thinner by this factor, and so is the number of neighbours at equal distance.
        share = max(samples * count / len(paths), 5.0) / count
        exact = density_clusters(
            given[chosen],
            count,
            ClusterSettings(settings.min_cluster_share, share, selection=settings.selection),
        )
        agreement = float(adjusted_rand_score(exact.numpy(), labels[chosen].numpy()))
    return SizeReport(labels, reduced.variance_error, reduced.largest_error, agreement, count)
