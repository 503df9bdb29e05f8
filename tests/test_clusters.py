"""Clusters of planted trajectories, filters and scores by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import two_skill_problem
from sklearn.cluster import HDBSCAN
from sklearn.metrics import adjusted_rand_score

from polca_edit.basis.record import unlabelled
from polca_edit.clusters.agreement import skill_scores
from polca_edit.clusters.comparators import cluster_both
from polca_edit.clusters.density import OUTLIER, ClusterSettings, VectorClusters, cluster_trajectories, shaped
from polca_edit.observation import ObserveSettings, analyse, observe

TIME = torch.linspace(0, 1, 30, dtype=torch.float64)
SETTINGS = ClusterSettings(min_cluster_share=0.05, min_samples_share=0.02)


def early(count: int, generator: torch.Generator, depth: float = -2.0) -> torch.Tensor:
    return noisy(depth * torch.sigmoid((TIME - 0.25) * 30), count, generator)


def late(count: int, generator: torch.Generator, depth: float = -2.0) -> torch.Tensor:
    return noisy(depth * torch.sigmoid((TIME - 0.75) * 30), count, generator)


def noisy(path: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    return path + 0.02 * torch.randn(count, len(TIME), generator=generator, dtype=torch.float64)


def stack(*groups: torch.Tensor) -> torch.Tensor:
    """(T, 1, M) projected loss of one vector from groups of (m, T) paths."""
    return torch.cat(groups).T[:, None]


# -- planted groups --------------------------------------------------------------------------------


def test_planted_groups_are_recovered(generator):
    found = cluster_trajectories(stack(early(80, generator), late(60, generator)), SETTINGS)[0]
    planted = [0] * 80 + [1] * 60
    assert found.kept
    assert found.count == 2
    clustered = (found.labels != OUTLIER).numpy()
    assert clustered.mean() > 0.95
    assert adjusted_rand_score(np.array(planted)[clustered], found.labels.numpy()[clustered]) == 1.0


def test_scattered_tokens_are_outliers_and_counted(generator):
    scattered = -20 * torch.rand(20, 1, generator=generator, dtype=torch.float64) - 5
    paths = scattered * torch.rand(20, len(TIME), generator=generator, dtype=torch.float64)
    paths[:, 0] = 0  # as every projected loss begins
    found = cluster_trajectories(stack(early(80, generator), late(60, generator), paths), SETTINGS)[0]
    assert bool((found.labels[140:] == OUTLIER).all())
    left_out = int((found.labels == OUTLIER).sum())
    assert found.outlier_share == pytest.approx(left_out / 160)
    assert 20 <= left_out < 28


def test_same_labels_as_another_implementation(generator):
    """scikit-learn's HDBSCAN counts the point itself in min_samples, hdbscan does not."""
    paths = torch.cat([early(80, generator), late(60, generator), early(40, generator, -4.0)])
    found = cluster_trajectories(stack(paths), SETTINGS)[0].labels.numpy()
    size, samples = round(0.05 * 180), round(0.02 * 180)
    other = HDBSCAN(min_cluster_size=size, min_samples=samples + 1, copy=True).fit_predict(paths.numpy())
    assert adjusted_rand_score(other, found) > 0.97


def test_vectors_are_clustered_apart(generator):
    first = stack(early(70, generator), late(70, generator))
    second = stack(early(35, generator), late(35, generator), early(35, generator), late(35, generator))
    both = cluster_trajectories(torch.cat([first, second], dim=1), SETTINGS)
    assert [c.vector for c in both] == [0, 1]
    for single, found in zip((first, second), both, strict=True):
        assert torch.equal(cluster_trajectories(single, SETTINGS)[0].labels, found.labels)
    assert not torch.equal(both[0].labels, both[1].labels)


def test_same_input_same_labels(generator):
    paths = stack(early(80, generator), late(60, generator))
    assert torch.equal(
        cluster_trajectories(paths, SETTINGS)[0].labels, cluster_trajectories(paths, SETTINGS)[0].labels
    )


# -- filters ---------------------------------------------------------------------------------------


def test_rising_tokens_are_dropped_before_clustering(generator):
    rising = early(40, generator, depth=+1.0)
    paths = stack(early(80, generator), late(60, generator), rising)
    found = cluster_trajectories(paths, SETTINGS)[0]
    assert found.dropped.tolist() == [False] * 140 + [True] * 40
    assert bool((found.labels[140:] == OUTLIER).all())
    # Dropped tokens are no outliers of the clustering.
    assert found.outlier_share == pytest.approx(float((found.labels[:140] == OUTLIER).sum()) / 140)
    everything = ClusterSettings(0.05, 0.02, drop_rising_tokens=False)
    kept = cluster_trajectories(paths, everything)[0]
    assert not bool(kept.dropped.any())
    assert kept.count == 3


def test_an_exact_loss_falls_though_it_stays_above_zero(generator):
    change = stack(early(80, generator), late(60, generator), early(40, generator, depth=+1.0))
    loss = change + 5.0
    mine, expected = (cluster_trajectories(p, SETTINGS)[0] for p in (loss, change))
    assert expected.count == 2
    assert mine.kept
    assert mine.dropped.tolist() == expected.dropped.tolist()
    assert mine.labels.tolist() == expected.labels.tolist()
    again = cluster_both(loss, loss[:, :, :90], SETTINGS)[0]
    assert again.select.labels.tolist() == expected.labels.tolist()
    assert not bool(again.evaluate.dropped.any())


def test_rising_vectors_are_dropped_whole(generator):
    rising = stack(early(60, generator, +1.0), late(40, generator, -0.5))
    falling = stack(early(100, generator))
    found = cluster_trajectories(torch.cat([rising, falling], dim=1), SETTINGS)
    assert [c.kept for c in found] == [False, True]
    assert bool((found[0].labels == OUTLIER).all())
    assert found[0].count == 0
    assert found[0].outlier_share == 0.0
    everything = ClusterSettings(0.05, 0.02, drop_rising_vectors=False)
    kept = cluster_trajectories(rising, everything)[0]
    assert kept.kept
    assert bool((kept.labels[60:] != OUTLIER).any())


def test_a_vector_whose_mean_does_not_move_is_kept():
    """The rule drops vectors that RISE; zero is no rise."""
    assert cluster_trajectories(torch.zeros(5, 1, 12), SETTINGS)[0].kept


def test_sizes_are_shares_of_all_tokens_before_any_filter(generator):
    """Eight tokens of 200 are 4 %: below 5 % of all, above 5 % of the 100 that are left."""
    paths = stack(early(92, generator), late(8, generator), early(100, generator, +1.0))
    alone = {}
    for share in (0.05, 0.03):
        settings = ClusterSettings(share, 0.01, drop_rising_vectors=False)
        found = cluster_trajectories(paths, settings)[0]
        members = [found.members(c).nonzero()[:, 0].tolist() for c in range(found.count)]
        alone[share] = any(set(m) <= set(range(92, 100)) for m in members)
    assert alone == {0.05: False, 0.03: True}


def test_too_few_tokens_are_all_outliers(generator):
    settings = ClusterSettings(min_cluster_share=0.5, min_samples_share=0.9)
    found = cluster_trajectories(stack(early(20, generator), early(5, generator, +1.0)), settings)[0]
    assert found.count == 0
    assert found.outlier_share == 1.0


# -- shape and output ------------------------------------------------------------------------------


def test_scaling_compares_shapes_and_not_depths(generator):
    depths = torch.rand(150, 1, generator=generator, dtype=torch.float64) * 5 + 0.5
    paths = stack(torch.cat([early(75, generator), late(75, generator)]) * depths)
    scaled = cluster_trajectories(paths, ClusterSettings(0.05, 0.02, scaled=True))[0]
    assert scaled.count == 2
    planted = torch.arange(150) // 75
    clustered = scaled.labels != OUTLIER
    assert float(clustered.double().mean()) > 0.9
    assert adjusted_rand_score(planted[clustered], scaled.labels[clustered]) == 1.0


def test_shaped_by_hand():
    paths = torch.tensor([[0.0, -1.0, -4.0], [0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
    assert shaped(paths, True).tolist() == [[0.0, -0.25, -1.0], [0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]
    assert shaped(paths, False) is paths


def test_by_output_never_mixes_outputs(generator):
    """The two outputs interleave and follow the same two paths: four clusters, none across outputs."""
    paths = stack(early(100, generator), late(100, generator))
    outputs = torch.arange(200) % 2 + 5
    settings = ClusterSettings(0.05, 0.02, by_output=True)
    found = cluster_trajectories(paths, settings, outputs)[0]
    assert found.count == 4
    for cluster in range(4):
        members = found.members(cluster)
        assert int(members.sum()) > 40
        assert len(outputs[members].unique()) == 1
        assert len((torch.arange(200)[members] // 100).unique()) == 1
    assert cluster_trajectories(paths, SETTINGS, outputs)[0].count == 2


# -- scores ----------------------------------------------------------------------------------------


def test_scores_by_hand():
    """Ten tokens; 0-4 in cluster 0, 5-6 in cluster 1, 7 an outlier, 8-9 dropped by the filter."""
    clusters = VectorClusters(
        0,
        True,
        torch.tensor([0, 0, 0, 0, 0, 1, 1, -1, -1, -1]),
        torch.tensor([False] * 8 + [True] * 2),
    )
    skill = torch.tensor([True, True, True, True, False, True, False, True, True, False])
    scores = skill_scores(clusters, 0, {"carry": skill, "never": torch.zeros(10, dtype=torch.bool)})
    carry = scores["carry"]
    assert carry.homogeneity == pytest.approx(4 / 5)
    assert carry.recall_all == pytest.approx(4 / 7)
    assert carry.recall_paper == pytest.approx(4 / 5)  # tokens 7 (outlier) and 8 (filtered) do not count
    assert carry.lift == pytest.approx((4 / 5) / (7 / 10))
    never = scores["never"]
    assert (never.homogeneity, never.recall_all, never.recall_paper, never.lift) == (0.0, 0.0, 0.0, 0.0)
    assert clusters.outlier_share == pytest.approx(1 / 8)
    assert skill_scores(clusters, 1, {"carry": skill})["carry"].homogeneity == pytest.approx(1 / 2)


# -- the whole observation -------------------------------------------------------------------------


def test_observing_one_basis_finds_the_planted_skills_and_keeps_what_it_was_made_of(generator):
    problem = two_skill_problem(generator)
    basis = unlabelled("planted", problem.rows[:2])
    settings = ObserveSettings(clusters=SETTINGS, breakthrough_delta=40)
    seen = observe(problem.objective, problem.checkpoints, basis, problem.tokens, settings)
    assert seen.basis is basis
    assert seen.tokens is problem.tokens
    # Skill j moves along row j and nowhere else, so tokens of the other skill lie still (at zero) there.
    for vector, skill in enumerate(("first", "second")):
        masks = seen.clusters[vector].masks()
        assert list(masks) == [f"{vector}:{c}" for c in range(seen.clusters[vector].count)]
        moved = seen.allocation.values.sum(0)[vector]
        mine = problem.tokens.skills[skill]
        # log(1 + exp(-s z)) from z = 0 to z = 4: all of ln 2 but exp(-4).
        assert bool((moved[mine] < -0.6).all())
        assert float(moved[~mine].abs().max()) < 1e-9
        assert max(float(mine[mask].double().mean()) for mask in masks.values()) == 1.0
    again = analyse(seen.projections, problem.tokens, settings)
    assert again.basis is None
    assert again.hidden == seen.hidden
    assert again.tau == seen.tau
    for one, other in zip(again.clusters, seen.clusters, strict=True):
        assert torch.equal(one.labels, other.labels)


def test_masks_are_named_by_vector_and_cluster():
    labels = torch.tensor([0, 1, OUTLIER, 1])
    masks = VectorClusters(3, True, labels, torch.zeros(4, dtype=torch.bool)).masks()
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "3:0": [True, False, False, False],
        "3:1": [False, True, False, True],
    }
    assert VectorClusters(0, False, torch.full((4,), OUTLIER), torch.ones(4, dtype=torch.bool)).masks() == {}
