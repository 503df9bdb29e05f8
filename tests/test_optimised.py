"""The optimised edit against closed forms and a grid, and its control spans where the skill is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.planted_base import landscape_subject, make_pair, sequences_of, slot_groups
from interventions.measures import Target
from interventions.optimised import optimise, optimised_effect
from interventions.protocol import PlanSettings, Session, open_session

SIZE = 12


def opened(inside, outside, end: torch.Tensor) -> Session:
    """Two kinds of tokens with losses written down as functions of the weights."""

    def losses(theta: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([inside(theta), outside(theta)]).expand(len(inputs), 2)

    select, evaluate = sequences_of(5, 2), sequences_of(5, 2, first=5)
    rows = torch.eye(SIZE, dtype=torch.float64)[:10]
    subject = landscape_subject(losses, [end * t / 4 for t in range(5)], rows, select, evaluate)
    return open_session(subject, PlanSettings(resamples=20))


def end_at(*values: float) -> torch.Tensor:
    end = torch.full((SIZE,), 0.2, dtype=torch.float64)
    end[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return end


def bowls() -> Session:
    return opened(lambda t: 2 * (t[0] - 1) ** 2, lambda t: 0.5 * (t[1] - 1) ** 2, end_at(1.0, 1.0))


def test_the_steepest_axis_of_a_bowl_is_found_at_full_radius():
    session = bowls()
    target = Target(slot_groups(session.select.tokens, ("a", "b"))["a"])
    edit = optimise(session.select, target, session.subject.rows[:2], 0.5)
    moved = edit.delta()
    assert abs(float(moved[0])) == pytest.approx(0.5, rel=0.02)
    change = session.select.change(edit)[target.members].mean()
    assert change == pytest.approx(2 * 0.5**2, rel=0.03)
    assert edit.norm <= 0.5 * (1 + 1e-9)


def test_the_loss_outside_is_weighed_as_a_grid_says():
    def inside(t):
        return 1.5 * t[0] + torch.sin(3 * t[1])

    def outside(t):
        return 2 * t[0].clamp_min(0) + 0.3 * (t[1] + t[0]) ** 2

    session, radius = opened(inside, outside, end_at(0.0, 0.3)), 0.7
    rows = session.subject.rows[:2]
    target = Target(slot_groups(session.select.tokens, ("a", "b"))["a"])
    theta = session.theta

    def value(z: np.ndarray) -> float:
        moved = theta + torch.from_numpy(z) @ rows
        harm = float(outside(moved)) - float(outside(theta))
        return float(inside(moved)) - max(0.0, harm)

    angles, sizes = np.linspace(0, 2 * np.pi, 181), np.linspace(0, radius, 41)
    grid = max(value(r * np.array([np.cos(a), np.sin(a)])) for a in angles for r in sizes)
    edit = optimise(session.select, target, rows, radius, steps=40)
    reached = value((rows @ edit.delta()).numpy())
    assert reached == pytest.approx(grid, abs=0.01)
    free = optimise(session.select, target, rows, radius, steps=40, off_weight=0.0)
    assert value((rows @ free.delta()).numpy()) < reached - 0.05


def test_the_skills_own_axis_beats_other_spans_and_a_foreign_axis_does_not():
    session = bowls()
    groups = tuple(slot_groups(s.tokens, ("a", "b")) for s in (session.select, session.evaluate))
    own = optimised_effect(session, make_pair("own", (0,), "a", *groups), draws=19)
    foreign = optimised_effect(session, make_pair("foreign", (5,), "a", *groups), draws=19)
    assert own is not None
    assert foreign is not None
    # Undoing the whole movement takes the loss back to 2; the search goes no less far.
    assert own.damage == pytest.approx(2.0, rel=1e-6)
    assert own.effect == pytest.approx(1.0)
    assert own.rotated_p == own.random_p == pytest.approx(1 / 20)
    assert foreign.effect == pytest.approx(0.0)
    assert foreign.rotated_p is not None
    assert foreign.rotated_p > 0.5
    assert len(own.rotated) == len(own.random) == 19


def test_a_pair_that_moves_nothing_has_no_optimised_edit():
    session = opened(lambda t: t[0] ** 2, lambda t: t[1] ** 2, end_at(0.0, 1.0))
    groups = tuple(slot_groups(s.tokens, ("a", "b")) for s in (session.select, session.evaluate))
    assert optimised_effect(session, make_pair("still", (0,), "a", *groups), draws=2) is None
    with pytest.raises(ValueError, match="tokens in the cluster and outside"):
        optimise(session.select, Target(np.ones(10, bool)), session.subject.rows[:1], 1.0)
