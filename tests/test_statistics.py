"""Statistics against closed forms, hand tables and simulation."""

import numpy as np
import pytest
from scipy import stats

from interventions.causal import statistics as st


def test_bootstrap_error_matches_cluster_formula() -> None:
    rng = np.random.default_rng(0)
    sequences = np.repeat(np.arange(200), 4)
    values = rng.normal(size=200).repeat(4) + 0.1 * rng.normal(size=800)
    mask = np.ones(800, dtype=bool)
    sums = {
        "v": st.sequence_sums(values, mask, sequences, 200),
        "n": st.sequence_sums(np.ones(800), mask, sequences, 200),
    }
    found = st.bootstrap(sums, lambda t: t["v"] / t["n"], st.resampling_weights(200, 4000, rng))
    by_sequence = values.reshape(200, 4).mean(1)
    expected = by_sequence.std() / np.sqrt(200)
    assert found.estimate == pytest.approx(values.mean())
    assert found.interval().error == pytest.approx(expected, rel=0.05)
    assert found.interval().error > 1.8 * values.std() / np.sqrt(800)


def test_ratio_is_recomputed_inside_each_resample() -> None:
    rng = np.random.default_rng(1)
    top = np.array([1.0, 2.0, 3.0, 4.0])
    bottom = 2 * top
    found = st.bootstrap(
        {"a": top, "b": bottom}, lambda t: t["a"] / t["b"], st.resampling_weights(4, 50, rng)
    )
    assert np.allclose(found.draws, 0.5)


def test_multiplicity_against_hand_table() -> None:
    p = [0.01, 0.02, 0.03, 0.04, 0.05]
    assert st.holm(p) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert st.benjamini_hochberg(p) == pytest.approx([0.05] * 5)
    harmonic = sum(1 / k for k in range(1, 6))
    one_small = [0.01, 1.0, 1.0, 1.0, 1.0]
    assert st.benjamini_hochberg(one_small, dependent=True)[0] == pytest.approx(0.05 * harmonic)


def test_sign_flip_is_the_exact_distribution() -> None:
    assert st.sign_flip_p([0.3, 1.0, 0.2, 0.5, 0.7]) == 1 / 32
    assert st.sign_flip_p([1.0, 1.0, 1.0, 1.0, -1.0]) == pytest.approx(6 / 32)
    ours = st.sign_flip_p([0.5, -0.2, 0.9, 0.4, 0.1, -0.6])
    theirs = stats.permutation_test(
        (np.array([0.5, -0.2, 0.9, 0.4, 0.1, -0.6]),),
        np.mean,
        permutation_type="samples",
        alternative="greater",
        n_resamples=np.inf,
    ).pvalue
    assert ours == pytest.approx(theirs)


def test_equivalence_power_against_simulation() -> None:
    rng = np.random.default_rng(2)
    estimates = rng.normal(0, 0.5, size=20000)
    half = stats.norm.ppf(0.95) * 0.5
    simulated = np.mean(np.abs(estimates) + half < 1.3)
    assert st.equivalence_power(0.5, 1.3) == pytest.approx(simulated, abs=0.01)


def test_rank_and_sequential_stop() -> None:
    assert st.rank_p(5.0, np.zeros(199)) == 1 / 200
    drawn = st.sequential_null(lambda i: float(i % 2), 1.0, draws=199, stop_after=10)
    assert len(drawn) == 20
    assert st.rank_p(1.0, drawn, stopped_at=10) == 0.5


def test_max_t_uses_the_maximum_of_each_draw() -> None:
    null = np.array([[0.0, 5.0], [1.0, 2.0], [0.5, 0.1]])
    assert st.max_t_p(np.array([3.0]), null)[0] == pytest.approx(2 / 4)


def test_sequence_permutation_keeps_its_level_and_token_permutation_does_not() -> None:
    rng = np.random.default_rng(3)
    sequences = np.repeat(np.arange(30), 20)
    ours, naive = [], []
    for _ in range(120):
        values = 0.5 * rng.normal(size=30).repeat(20) + rng.normal(size=600)
        mask = (rng.random(30) < 0.5).repeat(20)
        ours.append(st.sequence_permutation_p(values, mask, sequences, rng, draws=59) <= 0.05)
        naive.append(st.token_permutation_p(values, mask, rng, draws=59) <= 0.05)
    assert np.mean(ours) <= st.binomial_bound(120, 0.05) / 120
    assert np.mean(naive) > 0.15


def test_seeds_are_resampled() -> None:
    runs = [st.Draws(float(v), np.full(500, float(v))) for v in (0, 1, 2, 3, 4)]
    found = st.over_seeds(runs, np.random.default_rng(0))
    assert found.estimate == 2.0
    assert found.interval().error == pytest.approx(np.std([0, 1, 2, 3, 4]) / np.sqrt(5), rel=0.15)
