"""Clusterings on planted trajectories; scores against hand counts and the paper's own F1."""

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from polca_edit.clusters.agreement import carry_scores, score_cluster
from polca_edit.clusters.comparators import (
    METHODS,
    bootstrap_stability,
    cluster_both,
    density_validity,
    fit_clustering,
    outlier_share,
    success_rate,
)
from polca_edit.clusters.density import OUTLIER, ClusterSettings, VectorClusters, cluster_trajectories

torch.set_num_threads(1)
SETTINGS = ClusterSettings(min_cluster_share=0.1, min_samples_share=0.02)


def _planted(seed, count=60, noise=0.02, steps=8):
    """Three kinds of falling trajectories, in known order."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.linspace(0, 1, steps, dtype=torch.float64)
    shapes = torch.stack([-time, -2 * (time > 0.5).double(), -3 * (time > 0.2).double() * time])
    kind = torch.arange(count) % 3
    paths = shapes[kind] + noise * torch.randn(count, steps, generator=generator, dtype=torch.float64)
    return paths, kind


@pytest.mark.parametrize("method", METHODS)
def test_planted_kinds_are_found_and_carry_over(method):
    paths, kind = _planted(0)
    fitted = fit_clustering(paths, method, tokens=60, settings=SETTINGS, count=3, seed=0)
    assert adjusted_rand_score(fitted.labels, kind) > 0.95
    other, other_kind = _planted(1, count=33)
    assert adjusted_rand_score(fitted.assign(other), other_kind) > 0.9


def test_cluster_both_agrees_with_the_papers_clustering_on_select():
    paths, _ = _planted(0)
    rising = -paths[:, None].permute(2, 1, 0)
    select = torch.cat([paths.T[:, None], rising], 1)
    select[:, 0, :5] *= -1
    found = cluster_both(select, select[:, :, :30], SETTINGS)
    reference = cluster_trajectories(select, SETTINGS)
    for mine, expected in zip(found, reference, strict=True):
        assert mine.select.kept == expected.kept
        assert bool((mine.select.labels == expected.labels).all())
        assert bool((mine.select.dropped == expected.dropped).all())
    assert not found[1].evaluate.kept
    assert found[0].evaluate.dropped[:5].all()
    # The same tokens again get the same clusters.
    assert adjusted_rand_score(found[0].evaluate.labels, found[0].select.labels[:30]) > 0.95


def test_stability_tells_structure_from_noise():
    paths, _ = _planted(0)
    noise = torch.randn(60, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    documents = torch.arange(60) // 2

    def measure(points):
        def cluster(rows):
            return fit_clustering(rows, "kmeans", tokens=60, settings=SETTINGS, count=3).labels

        generator = torch.Generator().manual_seed(0)
        return bootstrap_stability(points, documents, cluster(points), cluster, draws=8, generator=generator)

    assert measure(paths) > 0.99
    assert measure(noise) < 0.6


def test_validity_is_high_for_separated_clusters():
    paths, kind = _planted(0)
    good = density_validity(paths, kind)
    bad = density_validity(paths, kind[torch.randperm(60, generator=torch.Generator().manual_seed(0))])
    assert good is not None
    assert bad is not None
    assert good > 0.5
    assert bad < 0
    assert density_validity(paths, torch.zeros(60, dtype=torch.long)) is None
    # One token alone has no density: it is an outlier, and two such leave no two clusters.
    alone = kind.clone()
    alone[0] = 3
    outlier = kind.clone()
    outlier[0] = OUTLIER
    assert density_validity(paths, alone) == density_validity(paths, outlier)
    single = torch.zeros(60, dtype=torch.long)
    single[0] = 1
    assert density_validity(paths, single) is None


def _record(labels, dropped, vector=0):
    return VectorClusters(vector, True, torch.tensor(labels), torch.tensor(dropped, dtype=torch.bool))


def test_scores_against_hand_counts():
    # Ten tokens: cluster 0 holds 0-4, cluster 1 holds 5-6, 7 is an outlier, 8-9 were dropped.
    found = _record([0, 0, 0, 0, 0, 1, 1, -1, -1, -1], [0] * 8 + [1, 1])
    skill = torch.tensor([1, 1, 1, 1, 0, 1, 0, 1, 1, 0], dtype=torch.bool)
    score = score_cluster(found, 0, skill)
    assert score.homogeneity == pytest.approx(4 / 5)
    assert score.recall_all == pytest.approx(4 / 7)
    assert score.recall_paper == pytest.approx(4 / 5)
    assert score.f1 == pytest.approx(4 / 5)
    assert outlier_share([found]) == pytest.approx(1 / 8)
    empty = _record([-1] * 10, [0] * 10)
    assert success_rate([found, empty]) == 0.5


def test_f1_is_the_papers():
    # 973 carry tokens in a cluster of 1000, out of 1322 seen: the published 0.973, 0.736, 0.838.
    labels = [0] * 1000 + [1] * 349
    found = _record(labels, [0] * 1349)
    skill = torch.tensor([1] * 973 + [0] * 27 + [1] * 349, dtype=torch.bool)
    score = score_cluster(found, 0, skill)
    found_values = (score.homogeneity, score.recall_paper, score.f1)
    assert found_values == pytest.approx((0.973, 0.736, 0.838), abs=5e-4)


def test_the_85_percent_rule_and_the_size_rule():
    labels = [0] * 20 + [1] * 20 + [2] * 2 + [-1] * 38
    found = _record(labels, [0] * 80)
    carry = torch.zeros(80, dtype=torch.bool)
    carry[:40] = True
    carry[40:42] = True
    counted = torch.ones(80, dtype=torch.bool)
    counted[:3] = False  # 17 of 20 carry tokens of cluster 0 count: exactly 85 %, not over it
    scores = carry_scores([found], carry, counted, min_share=0.03)
    assert [s.cluster for s in scores] == [1]
    counted[2] = True
    assert {s.cluster for s in carry_scores([found], carry, counted)} == {0, 1}
    assert {s.cluster for s in carry_scores([found], carry, counted, min_share=0.02)} == {0, 1, 2}
