"""Skill axes on planted skills: the axis is found, its twin is not, and only recorded movement is undone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import orthogonal, two_skill_problem

from interventions.damage import EvaluatedSplit
from interventions.discovery.axes import (
    AxisSettings,
    axis_target,
    find_axes,
    measured,
    score_gradient,
    searched,
    skill_axis,
)
from interventions.discovery.axis_nulls import free_edit, null_sets, null_span, ranked, statistic
from interventions.discovery.search import (
    AxisTarget,
    DirectionLibrary,
    Scores,
    ScoreSettings,
    SearchSettings,
    fit_surrogate,
)
from interventions.discovery.when_where import when_and_where
from interventions.edits import Movement, project_out
from interventions.localise import Component
from polca_edit.basis.record import unlabelled

QUICK = AxisSettings(SearchSettings(directions=48, rounds=3, climb=30), further=2, refine=25)


@pytest.fixture(scope="module")
def problem():
    return two_skill_problem(torch.Generator().manual_seed(3), sequences=40)


@pytest.fixture(scope="module")
def split(problem) -> EvaluatedSplit:
    return EvaluatedSplit(problem.objective, problem.checkpoints, problem.tokens)


@pytest.fixture(scope="module")
def basis(problem):
    """Six planted directions, two of which are skills, mixed so that no vector is one."""
    turn = orthogonal(6, torch.Generator().manual_seed(5)).to(problem.rows)
    return unlabelled("mixed", turn @ problem.rows[:6])


# -- what undoing own movement can do ----------------------------------------------------------------


def test_undoing_several_directions_at_once_is_undoing_one(split, basis, generator):
    """P m = a <a, m> with a = P m / |P m|: rank one is all there is to search."""
    frame = orthogonal(6, generator)[:3].to(basis.rows)
    joint = project_out(split, frame @ basis.rows)
    along = split.movement.along(basis.rows)
    inside = frame.double().T @ (frame.double() @ along)
    axis = (inside / inside.norm()).to(basis.rows)
    single = project_out(split, axis @ basis.rows)
    assert torch.allclose(joint.delta(), single.delta(), rtol=0, atol=1e-9)


def test_the_places_that_undoing_reaches_lie_on_a_sphere_through_nothing_and_everything(split, basis):
    library = DirectionLibrary(split, basis.rows)
    library.fill(20, torch.Generator().manual_seed(0))
    places = library.points(library.units) * library.along.norm()
    centre = library.along / 2
    assert torch.allclose((places - centre).norm(dim=1), centre.norm().expand(len(places)), rtol=0, atol=1e-9)


def test_measured_directions_are_the_operators_own_edits(split, basis):
    library = DirectionLibrary(split, basis.rows)
    library.fill(9, torch.Generator().manual_seed(0))
    for unit, capped in zip(library.units, library.capped, strict=True):
        edit = project_out(split, unit.to(basis.rows) @ basis.rows)
        change = split.damage(edit).change.double()
        assert torch.allclose(torch.minimum(change, library.room), capped, rtol=0, atol=1e-9)


# -- the score and its surrogate ---------------------------------------------------------------------


def test_the_score_by_hand():
    members = [np.array(m, dtype=bool) for m in ([1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0])]
    rest = np.array([0, 0, 0, 0, 1], dtype=bool)
    target = AxisTarget("c", members[0], {"one": members[1], "two": members[2]}, rest)
    room = np.array([1.0, 3.0, 1.0, 2.0, 1.0])
    scores = Scores([target], room, ScoreSettings(leak=1.0, tolerated=0.05, excess=1.0, rest=0.35))
    capped = torch.tensor([[1.0, 1.0, 0.2, -0.4, 0.5]], dtype=torch.float64)
    # n_C = 2/4; others .2 and -.2: mean of the positive parts .1, worst .2; rest .5.
    value = float(scores.of(scores.shares(capped), torch.zeros(1, dtype=torch.long))[0])
    assert value == pytest.approx(0.5 - 0.1 - (0.2 - 0.05) - 0.35 * 0.5, abs=1e-12)


def test_the_gradient_of_the_score_agrees_with_finite_differences(split, basis, generator):
    target = axis_target(split, "first", split.tokens.skills)
    scores = Scores([target], split.headroom.clamp_min(0).numpy(), ScoreSettings())
    theta = project_out(split, basis.rows[:2]).moved(split.theta)
    _, gradient = score_gradient(split, scores, theta)
    for _ in range(4):
        step = torch.randn(len(theta), generator=generator, dtype=theta.dtype)
        ahead, _ = score_gradient(split, scores, theta + 1e-6 * step)
        behind, _ = score_gradient(split, scores, theta - 1e-6 * step)
        assert float(gradient @ step) == pytest.approx((ahead - behind) / 2e-6, rel=1e-4, abs=1e-8)


def test_the_surrogate_predicts_directions_that_were_left_out(split, basis):
    library = DirectionLibrary(split, basis.rows)
    library.fill(150, torch.Generator().manual_seed(1))
    scores = Scores(
        [axis_target(split, name, split.tokens.skills) for name in ("first", "second")],
        library.room.numpy(),
        ScoreSettings(),
    )
    shares = scores.shares(library.capped)
    places = library.points(library.units)
    fitted = fit_surrogate(places[:100], shares[:100])
    error = (fitted(places[100:]) - shares[100:]).square().mean(0)
    own = 1 - error / (shares[100:] - shares[100:].mean(0)).square().mean(0)
    assert float(own.min()) > 0.9
    # What it says of itself, leaving each direction out, is what new directions show.
    assert float((fitted.explained - own).abs().max()) < 0.1


# -- the planted axis ----------------------------------------------------------------------------------


@pytest.mark.parametrize("skill", [0, 1])
def test_the_planted_axis_is_found_and_takes_its_skill_alone(problem, split, basis, skill):
    name, other = ("first", "second")[skill], ("second", "first")[skill]
    axis = skill_axis(split, basis, name, problem.tokens.skills, QUICK)
    # Undoing u takes u <u, m>: both skills' coordinates must be as planted, the drift is free.
    movement = split.movement.displacement.double()
    undone = -(problem.rows.double() @ axis.edit.delta().double())
    wanted = problem.rows.double() @ movement
    assert float(undone[skill]) == pytest.approx(float(wanted[skill]), rel=0.15)
    assert abs(float(undone[1 - skill])) < 0.1 * float(wanted[1 - skill])
    shares = split.damage(axis.edit).share_by(problem.tokens.skills)
    assert shares[name] > 0.85
    assert abs(shares[other]) < 0.1
    assert axis.basis.supervised
    assert axis.shares[name] == pytest.approx(shares[name], abs=1e-9)


def test_an_axis_is_an_ordinary_edit_and_basis(split, basis):
    axis = skill_axis(split, basis, "first", settings=QUICK)
    assert len(axis.basis) == 1
    again = project_out(split, axis.basis)
    assert torch.allclose(again.delta(), axis.edit.delta(), rtol=0, atol=1e-9)
    axis.edit.require_base(split.movement.base)
    assert float((axis.basis.rows @ axis.basis.rows.T - 1).abs().max()) < 1e-9
    inside = axis.basis.rows @ basis.rows.T @ basis.rows
    assert torch.allclose(inside, axis.basis.rows, rtol=0, atol=1e-9)


def test_finishing_on_true_losses_never_lowers_the_score(split, basis):
    aim = axis_target(split, "second", split.tokens.skills)
    rough = find_axes(DirectionLibrary(split, basis.rows), [aim], replace(QUICK, refine=0))[0]
    fine = find_axes(DirectionLibrary(split, basis.rows), [aim], QUICK)[0]
    assert fine.score >= rough.score - 1e-12
    assert torch.equal(fine.searched, rough.searched)


def test_further_axes_are_orthogonal_to_those_before(split, basis):
    axis = skill_axis(split, basis, "first", settings=replace(QUICK, rank=3, refine=5))
    gram = axis.basis.rows @ axis.basis.rows.T
    assert float((gram - torch.eye(3, dtype=gram.dtype)).abs().max()) < 1e-6
    assert axis.joint(split).rank == 3


def test_a_limit_on_what_others_may_lose_is_kept(problem, split, basis):
    axis = skill_axis(split, basis, "first", problem.tokens.skills, replace(QUICK, limit=0.01, refine=40))
    shares = split.damage(axis.edit).share_by(problem.tokens.skills)
    assert shares["second"] < 0.015
    assert shares["first"] > 0.7


def test_an_axis_of_crossed_halves_is_judged_where_it_was_not_searched(problem, split, basis):
    axis = skill_axis(split, basis, "first", problem.tokens.skills, replace(QUICK, crossed=True))
    assert axis.crossed == pytest.approx(
        split.damage(axis.edit).share_by(problem.tokens.skills)["first"], abs=0.1
    )
    assert axis.crossed > 0.8


def test_a_window_limits_what_is_undone(problem, split, basis):
    """Before the second skill is learned there is next to nothing of it to undo.

    Not nothing: along a direction that is oblique to what training moved, taking its movement back moves
    coordinates that training left alone.
    """
    early = EvaluatedSplit(problem.objective, problem.checkpoints, problem.tokens, window=(0, 200))
    axis = skill_axis(early, basis, "second", problem.tokens.skills, QUICK)
    assert axis.shares["second"] < 0.2
    axis = skill_axis(early, basis, "first", problem.tokens.skills, QUICK)
    assert axis.shares["first"] > 0.8


# -- nulls -------------------------------------------------------------------------------------------


def halves(problem) -> tuple[EvaluatedSplit, EvaluatedSplit]:
    """Search and unseen tokens, with features that say nothing and the skill itself."""
    tokens = problem.tokens
    generator = np.random.default_rng(0)
    features = {
        "skill": tokens.skills["second"].numpy().astype(np.int64),
        "strength": tokens.inputs[..., 1].flatten().numpy(),
        "noise": generator.normal(size=tokens.count),
        "more": generator.normal(size=tokens.count),
    }
    given = replace(tokens, features=features)
    whole = EvaluatedSplit(problem.objective, problem.checkpoints, given)
    return whole.on(given.select(torch.arange(20))), whole.on(given.select(torch.arange(20, 40)))


def searched_p(problem, basis, target: str | torch.Tensor, seed: int = 0):
    search, unseen = halves(problem)
    aims = []
    for side, rows in ((search, slice(0, 20)), (unseen, slice(20, 40))):
        mask = target if isinstance(target, str) else target.view(40, 8)[rows].flatten()
        aims.append(axis_target(side, mask, side.tokens.skills))
    parents = {
        name: (search.tokens.skills[name].numpy(), unseen.tokens.skills[name].numpy())
        for name in ("first", "second")
    }
    nulls = null_sets(search, unseen, (aims[0], aims[1]), parents, 39, seed=seed)
    library = DirectionLibrary(search, basis.rows)
    settings = replace(QUICK, refine=0)
    axis = find_axes(library, [aims[0]], settings, [near for near, _ in nulls])[0]
    units = torch.cat([axis.searched[None], searched(library, [n for n, _ in nulls], settings.weights)])
    values = statistic([aims[1], *(far for _, far in nulls)], units, DirectionLibrary(unseen, basis.rows))
    return ranked(values[0], values[1:]), nulls, aims


def test_a_planted_skill_beats_the_same_search_for_random_sets(problem, basis):
    found, nulls, aims = searched_p(problem, basis, "second")
    assert len(found.null) == 39
    assert found.p < 0.05
    sizes = [near.members.sum() for near, _ in nulls]
    assert np.mean(sizes) == pytest.approx(aims[0].members.sum(), rel=0.2)


def test_a_target_that_means_nothing_does_not(problem, basis):
    """The twin: a random half of all tokens."""
    values = []
    for draw in range(5):
        dealt = torch.rand(320, generator=torch.Generator().manual_seed(draw)) < 0.5
        values.append(searched_p(problem, basis, dealt, seed=draw)[0].p)
    assert min(values) > 0.05


def test_null_sets_inside_a_parent_stay_inside_it(problem):
    search, unseen = halves(problem)
    strong = [s.tokens.skills["first"] & (s.tokens.inputs[..., 1].flatten() > 1.1) for s in (search, unseen)]
    aims = [
        axis_target(s, m, s.tokens.skills, name="strong", parent=s.tokens.skills["first"])
        for s, m in zip((search, unseen), strong, strict=True)
    ]
    assert set(aims[0].others) == {"second"}
    for near, far in null_sets(search, unseen, (aims[0], aims[1]), {}, 10):
        for side, made in ((search, near), (unseen, far)):
            parent = side.tokens.skills["first"].numpy()
            assert not (made.members & ~parent).any()
            assert np.array_equal(made.members | made.rest, parent)


def test_a_free_edit_of_the_same_norm_works_where_there_is_nothing_to_undo(problem, split):
    """In a span that training never moved along, only the free edit hurts the skill."""
    aim = axis_target(split, "second", problem.tokens.skills)
    moved = float(problem.rows[1] @ split.movement.displacement)
    edit = free_edit(split, aim, moved)
    assert edit.norm == pytest.approx(moved, rel=1e-6)
    shares = split.damage(edit).share_by(problem.tokens.skills)
    assert shares["second"] > 0.8
    assert shares["first"] < 0.15
    drawn = torch.Generator().manual_seed(2)
    random = null_span(split, unlabelled("r", problem.rows[:3]), drawn, rotated=False, space=split.loss.space)
    assert len(random) == 3
    rotated = null_span(split, unlabelled("r", problem.rows[:3]), drawn, rotated=True, space=split.loss.space)
    assert float((rotated.rows @ rotated.rows.T - torch.eye(3)).abs().max()) < 1e-9


# -- what is measured and refused ---------------------------------------------------------------------


def test_the_worst_other_group_is_taken_anew_in_every_resample(problem, split, basis):
    axis = skill_axis(split, basis, "first", problem.tokens.skills, QUICK)
    strong = problem.tokens.inputs[..., 1].flatten() > 1.1
    second = problem.tokens.skills["second"]
    others = {"strong": second & strong, "weak": second & ~strong}
    effect = measured(axis, split, axis_target(split, "first", others), resamples=200)
    assert effect.share.estimate == pytest.approx(axis.shares["first"], abs=1e-9)
    assert effect.share.low <= effect.share.estimate <= effect.share.high
    assert effect.damage.low < effect.damage.estimate < effect.damage.high
    assert effect.worst_other.estimate == pytest.approx(max(effect.groups.values()), abs=1e-12)
    assert effect.groups[effect.worst] == max(effect.groups.values())
    assert effect.worst_other.low >= min(effect.groups.values()) - 0.05


@pytest.mark.parametrize(
    ("target", "match"),
    [("third", "known skill"), (torch.ones(320, dtype=torch.bool), "some tokens and not all")],
)
def test_a_target_that_cannot_be_one_is_refused(split, basis, target, match):
    with pytest.raises(ValueError, match=match):
        skill_axis(split, basis, target, settings=QUICK)


def test_a_target_without_headroom_is_refused(problem, basis):
    late = EvaluatedSplit(problem.objective, problem.checkpoints, problem.tokens, reference=400)
    with pytest.raises(ValueError, match="headroom"):
        skill_axis(late, basis, "first", settings=QUICK)


def test_a_span_without_movement_is_refused(problem):
    start = problem.checkpoints[0].clone()
    split = EvaluatedSplit(problem.objective, problem.checkpoints, problem.tokens)
    across = orthogonal(12, torch.Generator().manual_seed(1)).to(start)
    moved = Movement(split.theta, start).displacement
    rows = torch.linalg.qr(torch.stack([moved, *across[:3]]).T)[0].T[1:].contiguous()
    with pytest.raises(ValueError, match="movement inside the span"):
        skill_axis(split, unlabelled("still", rows), "first", settings=QUICK)


# -- when and where -----------------------------------------------------------------------------------


def test_an_axis_moves_when_its_skill_is_learned(problem, split):
    """Planted: the coordinate of skill ``second`` is half way at step 300, the loss falls a little before."""
    row = problem.rows[1]
    found = when_and_where(split, row, problem.tokens.skills["second"], windows=8)
    assert found.moved_at == 300
    assert found.coordinate[-1] == pytest.approx(float(row @ split.movement.displacement), rel=1e-9)
    assert found.learned_at.low <= found.learned_at.estimate <= found.learned_at.high < 300
    assert found.lag.estimate == 300 - found.learned_at.estimate
    assert found.losses[0] == pytest.approx(
        float(split.reference_loss[problem.tokens.skills["second"]].mean())
    )
    assert found.peak == "300:350"
    others = [share for name, share in found.windows.items() if name not in ("250:300", "300:350")]
    assert max(others) < 0.05


def test_the_parts_of_an_axis_hold_all_of_its_effect(problem, split):
    halves = [torch.arange(12) < 6, torch.arange(12) >= 6]
    parts = [Component(-1, name, mask) for name, mask in zip(("low", "high"), halves, strict=True)]
    found = when_and_where(split, problem.rows[0], problem.tokens.skills["first"], parts)
    assert set(found.parts) == {"low", "high"}
    assert sum(found.parts.values()) == pytest.approx(1.0)
    weight = problem.rows[0].square()
    heavier = "low" if float(weight[halves[0]].sum()) > 0.5 else "high"
    assert found.place == heavier
