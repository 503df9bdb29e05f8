"""Clustering at size: reduction error, planted clusters, agreement with exact HDBSCAN."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from polca_edit.clusters import ClusterSettings, density_clusters
from polca_edit.clusters_at_size import clusters_at_size, reduce_paths


def planted(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(m, 30) sigmoid falls at three times of training, with smooth and white noise; (m,) which fall."""
    time = torch.arange(30.0)
    which = torch.randint(0, 3, (count,), generator=generator)
    start = torch.tensor([5.0, 14.0, 23.0])[which] + 0.4 * torch.randn(count, generator=generator)
    depth = torch.tensor([1.0, 2.0, 1.5])[which] * (1 + 0.05 * torch.randn(count, generator=generator))
    paths = -depth[:, None] * torch.sigmoid(time - start[:, None])
    return paths + 0.01 * torch.randn(count, 30, generator=generator), which


def test_reduction_error_is_what_is_left_out(generator):
    paths = planted(500, generator)[0].double()
    reduced = reduce_paths(paths, variance_error=1e-2)
    back = reduced.scores @ reduced.components + reduced.centre
    scale = (paths - paths.mean(0)).square().sum(1).mean()
    assert reduced.variance_error <= 1e-2
    assert abs(float((paths - back).square().sum(1).mean() / scale) - reduced.variance_error) < 1e-10
    assert abs(float((paths - back).norm(dim=1).max() / scale.sqrt()) - reduced.largest_error) < 1e-10
    fewer = reduce_paths(paths, variance_error=1e-2, most=1)
    assert fewer.scores.shape == (500, 1)
    assert fewer.variance_error > reduced.variance_error
    assert reduce_paths(torch.zeros(5, 3)).variance_error == 0.0


def test_planted_clusters_and_agreement_with_exact(generator):
    pytest.importorskip("fast_hdbscan", reason="the optional extra 'size' is not installed")
    paths, which = planted(3000, generator)
    settings = ClusterSettings(min_cluster_share=0.05, min_samples_share=0.01)
    report = clusters_at_size(paths, settings, generator=generator, check_sample=1500)
    inside = report.labels >= 0
    assert float(inside.double().mean()) > 0.9
    assert adjusted_rand_score(which[inside].numpy(), report.labels[inside].numpy()) > 0.99
    assert report.agreement > 0.9
    assert report.variance_error <= 1e-3
    exact = density_clusters(paths, 3000, settings)
    both = inside & (exact >= 0)
    assert adjusted_rand_score(exact[both].numpy(), report.labels[both].numpy()) > 0.99


def test_too_few_points_are_outliers(generator):
    pytest.importorskip("fast_hdbscan", reason="the optional extra 'size' is not installed")
    report = clusters_at_size(torch.randn(2, 4, generator=generator), ClusterSettings(), generator=generator)
    assert report.labels.tolist() == [-1, -1]
