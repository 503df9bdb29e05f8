"""Controls keep what they promise to keep and change what they promise to change."""

import numpy as np
import pytest
import torch
from torch import nn

from interventions import controls, edits
from interventions.causal import measures
from interventions.causal.measures import Target
from polca_edit.derivatives.lanczos import orthonormalise
from polca_edit.parameters import ParameterSpace


@pytest.fixture
def net() -> tuple[nn.Module, ParameterSpace, torch.Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    space = ParameterSpace.from_module(module)
    return module, space, space.read(module)


def test_random_edits_match_in_size_and_placement(net) -> None:
    _, space, theta = net
    g = torch.Generator().manual_seed(1)
    rows = orthonormalise(torch.randn(6, space.size, generator=g, dtype=torch.float64))
    edit = edits.displace(theta, rows[:1], [0.7], "op")
    assert controls.isotropic(theta, 0.7, g).norm == pytest.approx(0.7)
    inside = controls.in_span(theta, rows, 0.7, g)
    assert inside.norm == pytest.approx(0.7)
    moved = inside.delta()
    torch.testing.assert_close(rows.T @ (rows @ moved), moved)
    placed = controls.same_placement(theta, edit, space, g).delta()
    same = controls.same_spectrum(theta, edit, space, g).delta()
    for start, stop in space.offsets.values():
        expected = edit.delta()[start:stop].norm()
        assert placed[start:stop].norm() == pytest.approx(expected)
        assert same[start:stop].norm() == pytest.approx(expected)
    drawn = space.unflatten(same)["0.weight"]
    wanted = space.unflatten(edit.delta())["0.weight"]
    torch.testing.assert_close(torch.linalg.svdvals(drawn), torch.linalg.svdvals(wanted))
    assert not torch.allclose(placed, edit.delta())


def test_own_movement_of_a_random_part(net) -> None:
    _, space, theta = net
    g = torch.Generator().manual_seed(2)
    rows = orthonormalise(torch.randn(6, space.size, generator=g, dtype=torch.float64))
    reference = theta - torch.randn(space.size, generator=g, dtype=torch.float64)
    edit = controls.in_span_own(theta, reference, rows, 2, g)
    part = edit.rows
    torch.testing.assert_close(part @ edit.apply(theta), part @ reference)
    with pytest.raises(ValueError, match="span of at least 7"):
        controls.random_frame(6, 3, g)


def test_gradient_control_climbs_its_own_set_and_refuses_a_minimum() -> None:
    theta = torch.tensor([1.0, 2.0], dtype=torch.float64)
    gradient = torch.tensor([3.0, 4.0], dtype=torch.float64)
    edit = controls.set_gradient(theta, gradient, 0.5)
    assert edit is not None
    torch.testing.assert_close(edit.delta(), torch.tensor([0.3, 0.4], dtype=torch.float64))
    assert controls.set_gradient(theta, torch.zeros(2, dtype=torch.float64), 0.5) is None


def test_matched_damage_on_a_quadratic_and_by_bisection() -> None:
    doses = np.array(controls.CURVE)
    curve = doses[:, None] ** 2 * np.array([[1.0, 3.0]])
    change, reached = controls.matched_damage(curve, 2.0)
    assert reached
    assert change.mean() == pytest.approx(2.0)
    assert controls.matched_damage(curve, 1e9)[1] is False
    dose = controls.scale_to_damage(lambda s: 2 * s**2, 5.0)
    assert 2 * dose**2 == pytest.approx(5.0, rel=0.01)


def test_sham_cluster_is_disjoint_equal_and_near() -> None:
    rng = np.random.default_rng(0)
    loss = rng.normal(size=200)
    members = (loss > 0.5) & (rng.random(200) < 0.5)
    sham = controls.sham_cluster(members, loss[:, None])
    assert sham.sum() == members.sum()
    assert not (sham & members).any()
    assert (
        abs(loss[sham].mean() - loss[members].mean()) < abs(loss[~members].mean() - loss[members].mean()) / 3
    )


def test_sham_windows_match_displacement_or_say_so() -> None:
    moved = np.array([1.0, 1.0, 3.0, 3.0, 1.0, 1.0])
    assert controls.sham_windows(moved, (0, 1)) == ([(1, 2), (4, 5), (5, 6)], True)
    found, alike = controls.sham_windows(moved, (2, 4))
    assert (found, alike) == ([(0, 2), (4, 6)], False)


def test_describable_sets_have_a_counterpart_by_the_same_rule() -> None:
    rng = np.random.default_rng(1)
    table = rng.normal(size=(100, 4))
    rule = controls.describable_set(table, 20, rng)
    assert rule(table).sum() == 20
    assert np.array_equal(rule(table[:50]), rule(table)[:50])


def test_selectivity_caps_and_leaves_overlap_out() -> None:
    members = np.array([True, True, False, False])
    room = np.ones(4)
    removed = np.array([1.0, 1.0, 0.0, 0.0])
    blown = np.array([9.0, 9.0, 0.0, 0.0])
    target = Target(members, {"other": np.array([False, True, True, False])})
    assert measures.selectivity(removed, room, target) == 1.0
    assert measures.selectivity(blown, room, target) == measures.selectivity(removed, room, target)
    assert target.apart()["other"].tolist() == [False, False, True, False]


def test_another_seeds_vectors_keep_the_coordinates_and_must_not_be_aligned():
    generator = torch.Generator().manual_seed(3)
    rows = orthonormalise(torch.randn(4, 30, generator=generator))
    theta = torch.randn(30, generator=generator)
    edit = edits.displace(theta, rows[:2], [0.5, -2.0], "own")
    move = controls.other_seed_move(theta, edit, rows[2:])
    assert move is not None
    torch.testing.assert_close(move.delta(), 0.5 * rows[2] - 2.0 * rows[3])
    turned = orthonormalise(torch.stack([rows[2], rows[3] + 0.2 * rows[0]]))
    assert controls.other_seed_move(theta, edit, turned) is None
    assert controls.other_seed_move(theta, edit, turned, largest_cosine=0.25) is not None
