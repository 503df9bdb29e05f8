"""Edits of the planted two-skill model: the right vector damages the right skill and nothing else."""

from __future__ import annotations

import pytest
import torch
from oracles import TwoSkillProblem, orthogonal, tiny_bridge, tiny_gpt2, two_skill_problem

from experiments.run.stages.damage_rows import damage_row
from interventions.damage import Damage, EvaluatedSplit
from interventions.edits import Edit, Movement, applied, displace, project_out, reverse, rollback
from polca_edit.allocation.allocate import allocate, project
from polca_edit.basis.hessian import EigenSettings, hessian_basis
from polca_edit.basis.path import trajectory_basis
from polca_edit.basis.record import unlabelled
from polca_edit.derivatives.lanczos import coordinates
from polca_edit.parameters import ParameterSpace, parameter_slots


@pytest.fixture
def planted(generator) -> TwoSkillProblem:
    return two_skill_problem(generator)


def ends(problem: TwoSkillProblem) -> tuple[torch.Tensor, torch.Tensor]:
    return problem.checkpoints[-1], problem.checkpoints[0]


def split_of(problem: TwoSkillProblem) -> EvaluatedSplit:
    return EvaluatedSplit(problem.objective, problem.checkpoints, problem.tokens)


def softplus_change(problem: TwoSkillProblem, skill: int, move: float) -> torch.Tensor:
    """Closed form: loss change of each token of a skill when its z moves."""
    z = float(problem.rows[skill] @ problem.checkpoints[-1])
    strength = problem.tokens.inputs[..., 1].flatten()[problem.tokens.skills[("first", "second")[skill]]]
    return torch.log1p(torch.exp(-strength * (z + move))) - torch.log1p(torch.exp(-strength * z))


# -- the planted answer ----------------------------------------------------------------------------


@pytest.mark.parametrize("skill", [0, 1])
@pytest.mark.parametrize("dose", [0.5, 1.0, 2.0])
def test_the_right_vector_damages_the_right_skill_and_nothing_else(planted, skill, dose):
    theta, start = ends(planted)
    edit = reverse(Movement(theta, start), planted.rows[skill : skill + 1], dose)
    change = split_of(planted).damage(edit).change
    own = planted.tokens.skills[("first", "second")[skill]]
    moved = float(planted.rows[skill] @ (theta - start))
    assert torch.allclose(change[own], softplus_change(planted, skill, -dose * moved), rtol=0, atol=1e-12)
    assert float(change[own].min()) > (0.5 if dose >= 1 else 0.05)
    assert float(change[~own].abs().max()) < 1e-12


def test_other_vectors_damage_nothing(planted):
    theta, start = ends(planted)
    edit = project_out(Movement(theta, start), planted.rows[2:])
    assert edit.norm > 0.1
    assert float(split_of(planted).damage(edit).change.abs().max()) < 1e-12


def test_both_vectors_at_once_damage_both(planted):
    theta, start = ends(planted)
    both = split_of(planted).damage(project_out(Movement(theta, start), planted.rows[:2]))
    single = [
        split_of(planted).damage(project_out(Movement(theta, start), planted.rows[i : i + 1])) for i in (0, 1)
    ]
    assert torch.allclose(both.change, single[0].change + single[1].change, rtol=0, atol=1e-12)


def test_attribution_and_damage_agree_on_the_planted_model(planted):
    """Where each token depends on one direction, undoing a vector gives back what it was given."""
    theta, start = ends(planted)
    basis = unlabelled("planted", planted.rows[:2])
    p = project(planted.objective, planted.checkpoints, [basis], planted.tokens)[0]
    given = allocate(p).values.sum(0)
    for skill, name in enumerate(("first", "second")):
        edit = project_out(Movement(theta, start), planted.rows[skill : skill + 1])
        change = split_of(planted).damage(edit).change
        own = planted.tokens.skills[name]
        assert torch.allclose(change[own], -given[skill, own], rtol=0, atol=0.02)


def test_the_method_finds_the_planted_directions(planted, generator):
    """Hessian vectors at the two breakthroughs point to the planted directions."""
    series = planted.checkpoints
    settings = EigenSettings(tolerance=1e-9)
    basis = hessian_basis(planted.objective, series.subset([10, 30]), planted.tokens, 2, settings)
    overlap = (basis.rows @ planted.rows[:2].T).abs()
    assert float(overlap.max(0).values.min()) > 0.999
    span = trajectory_basis(series, 2).rows
    inside = (planted.rows[:2] @ span.T).square().sum(1)
    assert float(inside.min()) > 0.8


# -- operators -------------------------------------------------------------------------------------


def test_projecting_out_is_idempotent(planted, generator):
    theta, start = ends(planted)
    rows = orthogonal(12, generator)[:4].contiguous()
    once = project_out(Movement(theta, start), rows).apply(theta)
    again = project_out(Movement(once, start), rows)
    assert float(again.coordinates.abs().max()) < 1e-14
    assert torch.allclose(again.apply(once), once, rtol=0, atol=1e-14)
    # Exactly the movement along the rows is gone, and everything across them is kept.
    assert float(coordinates(rows, once - start).abs().max()) < 1e-14
    across = torch.eye(12, dtype=torch.float64) - rows.T @ rows
    assert torch.allclose(across @ once, across @ theta, rtol=0, atol=1e-13)


def test_dose_zero_is_the_identity_to_the_byte(planted):
    theta, start = ends(planted)
    edit = reverse(Movement(theta, start), planted.rows[:3], 0.0)
    assert edit.apply(theta).numpy().tobytes() == theta.numpy().tobytes()
    assert torch.equal(
        split_of(planted).damage(edit).change,
        torch.zeros(planted.tokens.count, dtype=torch.float64),
    )


def test_dose_two_reflects_and_undoes_itself(planted):
    theta, start = ends(planted)
    rows = planted.rows[:3]
    once = reverse(Movement(theta, start), rows, 2.0).apply(theta)
    assert torch.allclose(coordinates(rows, once - start), -coordinates(rows, theta - start), atol=1e-13)
    assert torch.allclose(reverse(Movement(once, start), rows, 2.0).apply(once), theta, rtol=0, atol=1e-13)


def test_sign_of_the_rows_does_not_matter(planted):
    theta, start = ends(planted)
    first, flipped = (
        project_out(Movement(theta, start), rows) for rows in (planted.rows[:2], -planted.rows[:2])
    )
    assert torch.allclose(first.apply(theta), flipped.apply(theta), rtol=0, atol=1e-15)


# -- restore ---------------------------------------------------------------------------------------


def bytes_of(module: torch.nn.Module) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in parameter_slots(module)}


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_bridge])
@pytest.mark.parametrize("fails", [False, True])
def test_applied_restores_bit_for_bit(build, fails, generator):
    module = build()
    space = ParameterSpace.from_module(module)
    theta = space.read(module)
    reference = theta + 0.1 * torch.randn(theta.shape, generator=generator)
    rows = torch.linalg.qr(torch.randn(space.size, 3, generator=generator))[0].T.contiguous()
    edit = project_out(Movement(theta, reference), rows)
    tokens = torch.randint(0, 13, (2, 5), generator=generator)

    def logits() -> torch.Tensor:
        output = module(tokens)
        return output.logits if hasattr(output, "logits") else output

    before, plain = bytes_of(module), logits()
    try:
        with applied(module, edit, space):
            assert torch.equal(space.read(module), edit.apply(theta))
            assert not torch.allclose(logits(), plain, atol=1e-5)
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert bytes_of(module) == before
    assert torch.equal(logits(), plain)


def test_measuring_leaves_the_module_alone(planted):
    theta, start = ends(planted)
    before = bytes_of(planted.module)
    split_of(planted).damage(project_out(Movement(theta, start), planted.rows[:2]))
    assert bytes_of(planted.module) == before


def test_applied_refuses_a_module_with_other_weights(planted):
    theta, start = ends(planted)
    edit = project_out(Movement(theta, start), planted.rows[:1])
    space = planted.checkpoints.space
    with torch.no_grad():
        planted.module.theta[0] += 1e-9
    before = bytes_of(planted.module)
    with pytest.raises(ValueError, match="the weights it was made for"), applied(planted.module, edit, space):
        pass
    assert bytes_of(planted.module) == before


# -- records ---------------------------------------------------------------------------------------


def test_headroom_is_the_loss_at_the_reference_minus_the_loss_now(planted):
    split = split_of(planted)
    # Undoing both planted directions undoes everything: damage reaches the headroom.
    damage = split.damage(project_out(split, planted.rows[:2]))
    assert torch.allclose(damage.change, damage.headroom, rtol=0, atol=1e-12)
    expected = planted.objective.losses(planted.checkpoints[0], planted.tokens) - damage.before
    assert torch.equal(damage.headroom, expected)


def test_every_loss_is_computed_once(planted):
    split = split_of(planted)
    planted.objective.passes.forward = 0.0
    first = split.damage(project_out(split, planted.rows[:1]))
    assert planted.objective.passes.forward == 3 * planted.tokens.sequences  # before, reference, after
    again = split.damage(project_out(split, planted.rows[:1].clone()))
    assert planted.objective.passes.forward == 3 * planted.tokens.sequences
    assert torch.equal(first.after, again.after)
    split.damage(reverse(split, planted.rows[:1], 0.5))
    assert planted.objective.passes.forward == 4 * planted.tokens.sequences


def test_weights_are_hashed_once_however_many_edits_are_drawn(planted, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "interventions.edits.weights_fingerprint", lambda theta: calls.append(1) or "fingerprint"
    )
    split = split_of(planted)
    split.changes(reverse(split, planted.rows[:2], dose / 10) for dose in range(10))
    assert len(calls) == 1


def test_a_window_undoes_its_own_movement_and_headroom_has_its_own_reference(planted):
    series = planted.checkpoints
    steps = series.steps
    split = EvaluatedSplit(planted.objective, series, planted.tokens, (steps[2], steps[5]), steps[1])
    moved = series[5] - series[2]
    expected = series[-1] - planted.rows[:2].T @ (planted.rows[:2] @ moved)
    torch.testing.assert_close(project_out(split, planted.rows[:2]).apply(split.theta), expected)
    torch.testing.assert_close(rollback(split).apply(split.theta), series[-1] - moved)
    room = planted.objective.losses(series[1], planted.tokens) - split.before
    assert torch.equal(split.headroom, room)
    for wrong, words in (((steps[5], steps[2]), "end after"), ((steps[2], steps[-1] + 1), "recorded steps")):
        with pytest.raises(ValueError, match=words):
            EvaluatedSplit(planted.objective, series, planted.tokens, wrong)


def test_an_edit_of_other_weights_is_refused(planted):
    split = split_of(planted)
    other = Movement(planted.checkpoints[3], planted.checkpoints[0])
    with pytest.raises(ValueError, match="weights it was made for"):
        split.damage(project_out(other, planted.rows[:1]))


def by_hand() -> Damage:
    before = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    after = torch.tensor([3.0, 5.0, 1.0, 2.0, 1.5, 0.0])
    return Damage("reverse", 1.5, before, after, torch.tensor([2.0, 4.0, 0.0, 0.0, 1.0, 1.0]))


def test_groups_are_sums_and_counts():
    masks = {"a": torch.tensor([True, True, True, False, False, False]), "b": torch.arange(6) == 5}
    assert by_hand().sums(masks) == {"a": (6.0, 3), "b": (-1.0, 1)}
    assert by_hand().by(masks) == {"a": 2.0, "b": -1.0}
    # Capped per token: min(2, 2) + min(4, 4) + min(0, 0) over 2 + 4 + 0; negative damage counts.
    assert by_hand().share_by(masks) == {"a": 1.0, "b": -1.0}
    with pytest.raises(ValueError, match="6 booleans"):
        by_hand().by({"short": torch.ones(5, dtype=torch.bool)})
    with pytest.raises(ValueError, match="6 booleans"):
        by_hand().by({"integers": torch.ones(6, dtype=torch.long)})


def test_damage_row_by_hand():
    target = torch.tensor([True, True, False, False, False, False])
    overlapping = torch.tensor([True, False, True, True, False, False])
    small = torch.tensor([False, False, False, False, True, False])
    row = damage_row(
        by_hand(),
        vector=4,
        cluster=1,
        split="select",
        target=target,
        others=[overlapping, small, target],
        groups={"carry": overlapping, "never": torch.zeros(6, dtype=torch.bool)},
    )
    assert (row.vector, row.cluster, row.operator, row.dose, row.split) == (4, 1, "reverse", 1.5, "select")
    assert row.on_target == pytest.approx((2 + 4) / 2)
    assert row.off_target == pytest.approx((0 + 1 + 0.5 - 1) / 4)
    # Tokens shared with the target are left out of each other group: (0 + 1) / 2 and 0.5.
    assert row.off_target_worst == pytest.approx(0.5)
    assert row.headroom == pytest.approx(3.0)
    assert row.groups == {"carry": pytest.approx(1.0)}
    assert row.group_headroom == {"carry": pytest.approx(2 / 3)}


def test_damage_row_of_a_whole_vector_has_no_off_target():
    everything = torch.ones(6, dtype=torch.bool)
    row = damage_row(
        by_hand(), vector=0, cluster=None, split="select", target=everything, others=[everything], groups={}
    )
    assert row.on_target == pytest.approx(6.5 / 6)
    assert row.off_target is None
    assert row.off_target_worst is None


def test_displacement_moves_by_its_coordinates(planted):
    theta, _ = ends(planted)
    edit: Edit = displace(Movement(theta, theta), planted.rows[:2], [0.5, -0.25], "random")
    moved = edit.apply(theta) - theta
    assert torch.allclose(coordinates(planted.rows, moved)[:2], torch.tensor([0.5, -0.25]).double())
    assert edit.norm == pytest.approx((0.5**2 + 0.25**2) ** 0.5)
    assert float(moved.norm()) == pytest.approx(edit.norm)
