"""The causal timeline on planted skills: what was learned when, and what falls with what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from oracles import orthogonal, two_skill_problem
from torch import Tensor, nn

from interventions.damage import EvaluatedSplit
from interventions.discovery.timeline import TimelineSettings, causal_timeline
from interventions.discovery.windows import doubling_windows, equal_windows, proposed_windows
from interventions.edits import Movement, rollback
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet

STEPS = 41
SETTINGS = TimelineSettings(resamples=200, shuffles=199)


class Ladder(nn.Module):
    """Skill k has its own direction; where ``builds`` it also needs those of all skills before."""

    def __init__(self, frame: Tensor, builds: bool) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(len(frame), dtype=frame.dtype))
        self.register_buffer("frame", frame)
        self.builds = builds


def ladder_loss(module: Ladder, inputs: Tensor) -> Tensor:
    """Softplus of minus the strength times the skill's own coordinate, or the least one up to it."""
    z = module.frame.T @ module.theta
    z = torch.cummin(z, 0).values if module.builds else z
    return nn.functional.softplus(-z[inputs[..., 0].long()] * inputs[..., 1])


@dataclass(frozen=True)
class Planted:
    split: EvaluatedSplit
    learned: list[int]


def ladder(skills: int, generator: torch.Generator, *, builds: bool) -> Planted:
    """Skill k is learned in one jump around its own step."""
    frame = orthogonal(skills + 3, generator)
    module = Ladder(frame, builds)
    which = torch.arange(skills).repeat(40, 2)
    strength = 1 + 0.2 * torch.rand(which.shape, generator=generator, dtype=torch.float64)
    flat = which.flatten()
    tokens = TokenSet(
        torch.stack([which.double(), strength], dim=-1),
        torch.ones(which.shape, dtype=torch.bool),
        torch.arange(40),
        {f"skill {k}": flat == k for k in range(skills)},
    )
    time = torch.arange(STEPS, dtype=torch.float64)
    middle = [3 + (STEPS - 8) * k / max(1, skills - 1) for k in range(skills)]
    z = torch.zeros(STEPS, skills + 3, dtype=torch.float64)
    for k, at in enumerate(middle):
        z[:, k] = 5 * torch.sigmoid(time - at) - 3
    space = ParameterSpace.from_module(module)
    series = open_checkpoints(z @ frame.T, space, steps=[10 * i for i in range(STEPS)])
    objective = Objective(module, ladder_loss, space, batch_size=16)
    return Planted(EvaluatedSplit(objective, series, tokens), [round(10 * at) for at in middle])


@pytest.mark.parametrize("steps", [[0, 10], list(range(0, 110, 10)), [0, 1, 2, 4, 8, 100]])
def test_windows_cover_the_whole_of_training_without_a_gap(steps):
    for windows in (equal_windows(steps, 4), doubling_windows(steps)):
        assert (windows[0].start, windows[-1].end) == (steps[0], steps[-1])
        assert all(a.end == b.start for a, b in zip(windows, windows[1:], strict=False))


def test_a_window_is_proposed_where_the_loss_falls_and_nowhere_else():
    steps = list(range(0, 100, 10))
    early = np.array([4, 4, 1, 0, 0, 0, 0, 0, 0, 0.0])
    late = np.array([4, 4, 4, 4, 4, 4, 3, 1, 0, 0.0])
    found = proposed_windows(steps, {"early": early, "late": late, "rises": -early, "flat": early * 0})
    assert {name: str(window) for name, window in found.items()} == {"early": "10:30", "late": "50:80"}


def test_undoing_every_window_once_undoes_the_whole_movement(generator):
    """Windows are a partition: their movements add up, at full rank."""
    split = ladder(3, generator, builds=False).split
    series = split.series
    at = series.steps.index
    windows = equal_windows(series.steps, 7)
    moved = sum(
        rollback(Movement(split.theta, series[at(w.start)], series[at(w.end)])).delta() for w in windows
    )
    assert torch.allclose(split.theta + moved, series[0], rtol=0, atol=1e-12)


def test_a_window_takes_its_skill_with_the_share_of_the_closed_form(generator):
    planted = ladder(3, generator, builds=False)
    found = causal_timeline(planted.split, None, planted.split.tokens.skills, SETTINGS)
    for k in range(3):
        name = f"skill {k}"
        effect = found.own(name)
        assert effect.window.start < planted.learned[k] < effect.window.end
        own = planted.split.tokens.skills[name]
        strength = planted.split.tokens.inputs[..., 1].flatten()[own]
        series = planted.split.series
        at = series.steps.index
        z = [
            float(planted.split.loss.module.frame[:, k] @ series[at(s)])
            for s in (0, effect.window.start, effect.window.end, series.steps[-1])
        ]
        loss = [nn.functional.softplus(-strength * value) for value in (z[3] - (z[2] - z[1]), z[3], z[0])]
        share = float(torch.minimum(loss[0] - loss[1], loss[2] - loss[1]).sum() / (loss[2] - loss[1]).sum())
        assert effect.shares[name] == pytest.approx(share, abs=1e-9)
        assert share > 0.5
        assert all(abs(effect.shares[other]) < 1e-6 for other in found.curves if other != name)


def test_skills_that_build_on_one_another_fall_with_the_earlier_windows_only(generator):
    planted = ladder(5, generator, builds=True)
    found = causal_timeline(planted.split, None, planted.split.tokens.skills, SETTINGS)
    held = {(d.skill, d.on) for d in found.dependences if d.holds}
    wanted = {(f"skill {later}", f"skill {earlier}") for later in range(5) for earlier in range(later)}
    assert held == wanted
    assert found.order() == [f"skill {k}" for k in range(5)]
    assert found.p <= 0.05
    assert found.alignment is not None
    assert found.alignment.low > 0


def test_skills_that_do_not_build_on_one_another_show_no_dependence(generator):
    """The twin: learned at the same steps, one after the other, but each alone."""
    planted = ladder(4, generator, builds=False)
    found = causal_timeline(planted.split, None, planted.split.tokens.skills, SETTINGS)
    assert not any(dependence.holds for dependence in found.dependences)


def test_groups_that_mean_nothing_are_not_aligned_with_anything(generator):
    """The shuffled twin: the same tokens dealt at random; p is small for as many draws as chance allows."""
    split = ladder(4, generator, builds=True).split
    values = []
    for draw in range(20):
        dealt = torch.randint(0, 6, (split.tokens.count,), generator=torch.Generator().manual_seed(draw))
        settings = TimelineSettings(
            resamples=2, shuffles=99, random_draws=0, doubling=False, proposed=False, seed=draw
        )
        values.append(
            causal_timeline(split, None, {str(g): dealt == g for g in range(6)}, settings, losses=None).p
        )
    assert sum(p <= 0.05 for p in values) <= 4


def test_random_movements_have_the_windows_norm_and_are_reported_beside_it(generator):
    problem = two_skill_problem(generator)
    split = EvaluatedSplit(problem.objective, problem.checkpoints, problem.tokens)
    found = causal_timeline(split, None, problem.tokens.skills, SETTINGS)
    for effect in found.effects:
        series = problem.checkpoints
        moved = (
            series[series.steps.index(effect.window.end)] - series[series.steps.index(effect.window.start)]
        )
        assert effect.norm == pytest.approx(float(moved.norm()), rel=1e-9)
        assert set(effect.random_shares) == set(problem.tokens.skills)
    assert abs(found.own("second").shares["first"]) < 0.05 < found.own("second").shares["second"]


def test_known_losses_are_used_instead_of_passes(generator):
    split = ladder(3, generator, builds=True).split
    skills = split.tokens.skills
    settings = TimelineSettings(resamples=20, shuffles=19, curve_points=STEPS)
    measured = causal_timeline(split, None, skills, settings)
    known = torch.stack([split.loss.losses(split.series[i], split.tokens) for i in range(STEPS)])
    before = split.loss.passes.forward
    found = causal_timeline(split, None, skills, settings, losses=known)
    assert found == measured
    windows = len(found.effects)
    assert split.loss.passes.forward - before == 2 * windows * split.tokens.sequences


def test_two_checkpoints_are_in_memory_at_a_time(generator, monkeypatch):
    """Only the series' own small cache may hold weights: read in order, two a window, none kept."""
    split = ladder(3, generator, builds=True).split
    read: list[int] = []
    whole = split.series

    def counted(index: int):
        read.append(index)
        return whole.read(index)

    series = Checkpoints(whole.space, whole.steps, counted, dtype=whole.dtype)
    settings = TimelineSettings(
        resamples=2, shuffles=9, doubling=False, proposed=False, curve_points=2, random_draws=0
    )
    found = causal_timeline(split, series, split.tokens.skills, settings)
    assert len(read) <= 2 + 2 * len(found.effects)


def test_no_group_is_refused(generator):
    split = ladder(2, generator, builds=False).split
    with pytest.raises(ValueError, match="at least one group"):
        causal_timeline(split, None, {}, SETTINGS)
