"""Statistics against closed forms, hand tables and simulation on data drawn anew."""

import numpy as np
import pytest
from scipy import stats

from interventions.causal import statistics as st


def test_resampled_means_have_the_error_of_document_means() -> None:
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(200), 4)
    values = rng.normal(size=200).repeat(4) + 0.1 * rng.normal(size=800)
    units = st.draw_units(documents * 7 - 3, 4000, 1)
    masks = np.ones((1, 800), dtype=bool)
    means = units.totals(values, masks)[:, 0] / units.totals(np.ones(800), masks)[:, 0]
    assert means[0] == pytest.approx(values.mean())
    found = units.interval(means)
    assert found.error == pytest.approx(values.reshape(200, 4).mean(1).std() / np.sqrt(200), rel=0.06)
    assert found.error > 1.8 * values.std() / np.sqrt(800)
    assert found.units == 200


def test_shares_are_capped_per_token_by_hand() -> None:
    change = np.array([9.0, -1.0, 0.5, 2.0])
    room = np.array([1.0, 2.0, -3.0, 4.0])
    units = st.draw_units(np.arange(4), 50, 0)
    masks = np.array([[True, True, False, False], [True, True, True, True], [False, False, True, False]])
    found = st.shares_of(change, room, masks, units)
    # min(9, 1) + min(-1, 2) over 1 + 2; all: (1 - 1 + 0 + 2) over (1 + 2 + 0 + 4); no headroom: no share.
    assert found.share[0, :2].tolist() == pytest.approx([0.0, 2 / 7])
    assert np.isnan(found.share[0, 2])
    assert found.damage[0].tolist() == pytest.approx([4.0, 10.5 / 4, 0.5])
    assert found.room[0].tolist() == pytest.approx([1.5, 1.0, -3.0])
    # Capping a group instead of its tokens would say (9 - 1) / 3, capped to 1.
    assert found.share[0, 0] != 1.0


def test_ratios_are_recomputed_in_every_resample() -> None:
    top = np.array([1.0, 2.0, 3.0, 4.0])
    units = st.draw_units(np.arange(4), 200, 0)
    found = st.shares_of(top, 2 * top, np.ones((1, 4), dtype=bool), units)
    assert np.allclose(found.share, 0.5)
    assert np.std(found.damage[:, 0]) > 0.1


def test_groups_without_headroom_are_judged_in_nats() -> None:
    units = st.draw_units(np.arange(300), 300, 0)
    rng = np.random.default_rng(0)
    room = np.concatenate([np.full(100, 0.003), np.full(100, 1.0), rng.normal(0.3, 6.0, 100)])
    masks = np.repeat(np.eye(3, dtype=bool), 100, axis=1)
    found = st.shares_of(np.zeros(300), room, masks, units)
    # Too little; enough; more than the floor but not three standard errors (6 / 10 = .6) above zero.
    assert found.judged_in_nats(0.05).tolist() == [True, False, True]


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_intervals_over_runs_cover_on_data_drawn_anew(runs) -> None:
    rng = np.random.default_rng(runs)
    draws = 4000
    found = [st.t_interval(values.tolist()) for values in rng.normal(1.0, 0.7, (draws, runs))]
    inside = sum(i.low <= 1.0 <= i.high for i in found)
    assert 0.93 <= inside / draws <= 0.97
    # A percentile bootstrap over so few runs does not.
    covered = 0
    for _ in range(400):
        values = rng.normal(1.0, 0.7, runs)
        means = values[rng.integers(0, runs, (400, runs))].mean(1)
        low, high = np.percentile(means, [2.5, 97.5])
        covered += low <= 1.0 <= high
    assert covered / 400 < 0.93


def test_an_interval_over_one_run_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two runs"):
        st.t_interval([1.0])


def test_document_bootstrap_covers_on_data_drawn_anew() -> None:
    rng = np.random.default_rng(3)
    documents = np.repeat(np.arange(60), 5)
    masks = np.ones((1, 300), dtype=bool)
    inside = 0
    for draw in range(300):
        values = 0.5 + rng.normal(size=60).repeat(5) + rng.normal(size=300)
        units = st.draw_units(documents, 300, draw)
        found = units.interval(units.totals(values, masks)[:, 0] / units.totals(np.ones(300), masks)[:, 0])
        inside += found.low <= 0.5 <= found.high
    assert 0.90 <= inside / 300 <= 0.98


def test_ranks_over_runs_gain_power_with_runs() -> None:
    """A named pair with a fixed true effect: averaging it and its null over runs makes p smaller."""
    rng = np.random.default_rng(4)

    def power(runs: int) -> float:
        found = 0
        for _ in range(300):
            values = rng.normal(1.0, 1.0, runs)
            nulls = [rng.normal(0.0, 1.0, 199) for _ in range(runs)]
            found += st.rank_p_over_runs(list(values), nulls) < 0.05
        return found / 300

    one, three, five = power(1), power(3), power(5)
    assert one < three < five
    expected = [1 - stats.norm.cdf(1.645 - np.sqrt(n)) for n in (1, 3, 5)]
    assert [one, three, five] == pytest.approx(expected, abs=0.08)


def test_ranks_over_runs_keep_their_level() -> None:
    rng = np.random.default_rng(5)
    rejected = sum(
        st.rank_p_over_runs(list(rng.normal(size=3)), [rng.normal(size=99) for _ in range(3)]) <= 0.05
        for _ in range(1000)
    )
    assert rejected <= st.binomial_bound(1000, 0.05)
    assert rejected >= 25


def test_false_discoveries_against_a_hand_table() -> None:
    assert st.benjamini_hochberg([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05] * 5)
    assert st.benjamini_hochberg([0.01, 0.2]) == pytest.approx([0.02, 0.2])
    assert st.benjamini_hochberg([]) == []


def test_the_smallest_effect_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(6)
    effect = st.minimum_detectable(0.3)
    estimates = rng.normal(effect, 0.3, 20000)
    assert np.mean(estimates > 1.96 * 0.3) == pytest.approx(0.8, abs=0.01)
