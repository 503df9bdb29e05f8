"""Planted skills: effects in closed form, the max-T null that hides them, and power over runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.planted_base import landscape_subject, sequences_of
from interventions.detection import PlantedDraws, detectable_share, planted_p, powers
from interventions.measures import selectivity
from interventions.planted_skill import SHARES, planted_draws, planted_power
from interventions.protocol import PlanSettings, Session, open_session

COUNT, SLOTS = 40, 4


def session_of(learned: float = 2.0) -> Session:
    """Every token loses the same, ``learned`` nats, half of it along the first of ten axes."""
    end = torch.zeros(12, dtype=torch.float64)
    end[0] = end[11] = 1.0

    def losses(theta: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        value = learned * (1 - (theta[0] + theta[11]) / 2)
        return value.expand(len(inputs), SLOTS) + 0 * inputs

    generator = np.random.default_rng(0)

    def tokens(first: int):
        made = sequences_of(COUNT, SLOTS, first=first)
        features = {name: generator.normal(size=made.count) for name in ("u", "v", "w")}
        return replace(made, features=features)

    subject = landscape_subject(
        losses,
        [end * t / 4 for t in range(5)],
        torch.eye(12, dtype=torch.float64)[:10],
        tokens(0),
        tokens(COUNT),
    )
    return open_session(subject, PlanSettings(resamples=50, planted=10))


def test_planted_effects_are_the_shares() -> None:
    """Undoing moves only planted tokens: T = s m / (1 - s + s m), m the mean of the planted noise."""
    session = session_of()
    found = planted_draws(session, draws=9)
    assert found is not None
    assert found.shares == SHARES
    assert found.effects.shape == (len(SHARES), 10)
    assert found.rotations.shape == (len(SHARES), 10, 9)
    # The fully routed skill is all its tokens ever learnt, whatever the noise.
    np.testing.assert_allclose(found.effects[-1], 1.0, atol=1e-12)
    mean = found.effects[0] / (1 - found.effects[0])  # share 1/2: T / (1 - T) = m
    for share, effects in zip(found.shares, found.effects, strict=True):
        np.testing.assert_allclose(effects, share * mean / (1 - share + share * mean), atol=1e-12)
    assert np.abs(mean - 1).max() < 0.5
    assert np.abs(mean - 1).max() > 1e-3


def test_the_share_is_the_old_one_with_the_skill_added_on_top() -> None:
    """Up to share 1 this is a planted part s / (1 - s) of the headroom on top of what was there."""
    session = session_of()
    bench = session.evaluate
    found = planted_draws(session, draws=1)
    assert found is not None
    change = np.random.default_rng(1).normal(size=len(bench.before))
    members = np.arange(len(bench.before)) % 5 == 0
    from interventions.measures import Target

    target, share, noise = Target(members), 0.8, np.exp(np.sin(np.arange(len(change))))
    added = share / (1 - share) * bench.headroom[members].mean() * noise * members
    on_top = selectivity(change - 0.3 * added, bench.headroom + added, target)
    own = np.where(members, 1 - share, 1.0)
    instead = share * bench.headroom[members].mean() * noise * members
    replaced = selectivity(own * change - 0.3 * instead, own * bench.headroom + instead, target)
    assert float(replaced) == pytest.approx(float(on_top))


def test_max_t_null_hides_a_large_skill_and_not_a_routed_one() -> None:
    """Reference maxima spread up to .89, as on the demo runs: 80 % is lost, the whole skill is found."""
    maxima = np.linspace(0.2, 0.89, 199)
    effects = np.array(SHARES)[:, None].repeat(20, 1)
    draws = PlantedDraws(SHARES, effects, np.zeros((len(SHARES), 20, 59)))
    power = planted_power(draws, {"rotation": maxima})
    by_share = {row.share: row for row in power.by_share}
    # 26 of 199 maxima reach .8.
    assert by_share[0.8].p_values[0] == pytest.approx((1 + np.sum(maxima >= 0.8)) / 200)
    assert by_share[0.8].power == 0.0
    assert (by_share[0.9].power, by_share[1.0].power) == (1.0, 1.0)
    assert (power.outcome, power.power, power.detectable_share) == ("passed", 1.0, 0.9)
    assert planted_power(draws, {"rotation": np.full(199, 1.0)}).outcome == "failed"
    assert planted_power(draws, {"rotation": np.full(199, 1.0)}).detectable_share == float("inf")
    assert planted_power(None, {"rotation": maxima}).outcome == "not_run"


def test_rotations_that_move_the_planted_block_hide_it_too() -> None:
    effects = np.array(SHARES)[:, None].repeat(20, 1)
    strong = PlantedDraws(SHARES, effects, np.full((len(SHARES), 20, 59), 0.85))
    assert planted_power(strong, {"rotation": np.zeros(199)}).detectable_share == 0.9


def test_runs_together_find_smaller_skills() -> None:
    """Maxima are averaged draw by draw, so five runs have a narrower null than each alone."""
    rng = np.random.default_rng(0)
    shares = (0.5, 0.65, 0.8, 0.9, 1.0)
    effects = np.array(shares)[:, None].repeat(20, 1)
    runs = [PlantedDraws(shares, effects, np.zeros((5, 20, 59))) for _ in range(5)]
    maxima = [rng.uniform(0.2, 0.89, size=199) for _ in range(5)]

    def smallest(chosen: list[int]) -> float:
        found = powers([runs[i] for i in chosen], [{"rotation": maxima[i]} for i in chosen], 0.05)
        return detectable_share({share: power for share, (power, _) in found.items()})

    assert all(smallest([i]) == 0.9 for i in range(5))
    # The mean of five uniforms on [.2, .89] has a standard deviation of .69 / sqrt(60) = .09.
    assert smallest([0, 1, 2, 3, 4]) == 0.8
    with_gap = {0.5: 0.9, 0.65: 0.1, 0.8: 0.85, 0.9: 0.8, 1.0: 1.0}
    assert detectable_share(with_gap) == 0.8


def test_p_is_the_larger_of_the_two_nulls() -> None:
    draws = PlantedDraws((1.0,), np.array([[0.7]]), np.array([[[0.9, 0.1, 0.2]]]))
    assert planted_p([draws], [{"rotation": np.zeros(99)}])[0, 0] == pytest.approx(2 / 4)
    assert planted_p([draws], [{"rotation": np.full(99, 0.8)}])[0, 0] == 1.0
    # A skill must beat every family that pairs are judged by, over all runs that have it.
    two = {"rotation": np.zeros(99), "shuffled_hessian": np.array([0.95, *np.zeros(38)])}
    low = PlantedDraws((1.0,), np.array([[0.9]]), np.zeros((1, 1, 59)))
    assert planted_p([low], [two])[0, 0] == pytest.approx(2 / 40)
    assert planted_p([low, low], [two, {"rotation": np.zeros(99)}])[0, 0] == pytest.approx(1 / 60)


def test_no_token_with_headroom_means_not_run() -> None:
    assert planted_draws(session_of(learned=-1.0), draws=2) is None
