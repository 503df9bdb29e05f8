"""Controls keep what they promise to keep and change what they promise to change."""

import numpy as np
import pytest
import torch
from torch import nn

from interventions import controls, edits
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
    place = edits.Movement(theta, theta - rows[0])
    edit = edits.displace(place, rows[:1], [0.7], "op")
    assert controls.random_like(place, edit, g, kind="isotropic").norm == pytest.approx(0.7)
    inside = controls.random_like(place, edit, g, kind="span", rows=rows)
    assert inside.norm == pytest.approx(0.7)
    moved = inside.delta()
    torch.testing.assert_close(rows.T @ (rows @ moved), moved)
    placed = controls.random_like(place, edit, g, kind="placement", space=space).delta()
    same = controls.random_like(place, edit, g, kind="spectrum", space=space).delta()
    for start, stop in space.offsets.values():
        expected = edit.delta()[start:stop].norm()
        assert placed[start:stop].norm() == pytest.approx(expected)
        assert same[start:stop].norm() == pytest.approx(expected)
    drawn = space.unflatten(same)["0.weight"]
    wanted = space.unflatten(edit.delta())["0.weight"]
    torch.testing.assert_close(torch.linalg.svdvals(drawn), torch.linalg.svdvals(wanted))
    assert not torch.allclose(placed, edit.delta())
    for kind, words in (("span", "span's rows"), ("placement", "parameter space")):
        with pytest.raises(ValueError, match=words):
            controls.random_like(place, edit, g, kind=kind)


def test_own_movement_of_a_random_part(net) -> None:
    _, space, theta = net
    g = torch.Generator().manual_seed(2)
    rows = orthonormalise(torch.randn(6, space.size, generator=g, dtype=torch.float64))
    reference = theta - torch.randn(space.size, generator=g, dtype=torch.float64)
    edit = controls.own_movement_in_span(edits.Movement(theta, reference), rows, 2, g)
    part = edit.rows
    torch.testing.assert_close(part @ edit.apply(theta), part @ reference)
    with pytest.raises(ValueError, match="span of at least 7"):
        controls.random_frame(6, 3, g)


def test_directions_beside_a_span_carry_as_much_of_a_movement() -> None:
    g = torch.Generator().manual_seed(4)
    rows = orthonormalise(torch.randn(3, 40, generator=g, dtype=torch.float64))
    movement = 2 * rows[0] - rows[1] + 10 * torch.randn(40, generator=g, dtype=torch.float64)
    movement -= (rows @ movement - torch.tensor([2.0, -1.0, 0.0])) @ rows
    frame = controls.carrying_frame(rows, movement, g)
    torch.testing.assert_close(frame @ frame.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(frame @ movement, torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(frame @ rows.T, torch.zeros(3, 3, dtype=torch.float64))
    # A movement that lies almost wholly inside: the frame takes all that is left outside.
    inside = 3 * rows[0] + 0.1 * frame[0]
    least = controls.carrying_frame(rows, inside, g)
    assert float((least @ inside).norm()) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="at least 7 weights, got 6"):
        controls.carrying_frame(rows[:, :6], movement[:6], g)


def test_a_damage_is_matched_by_bisection_or_refused() -> None:
    dose = controls.scale_to_damage(lambda s: 2 * s**2, 5.0)
    assert 2 * dose**2 == pytest.approx(5.0, rel=0.01)
    with pytest.raises(ValueError, match="must be reachable"):
        controls.scale_to_damage(lambda s: min(s, 1.0), 5.0)


def test_describable_sets_have_the_size_and_stay_inside() -> None:
    rng = np.random.default_rng(1)
    features = {
        "digit": rng.integers(0, 10, 300),
        "sum": rng.normal(size=300),
        "word": rng.choice(["a", "b"], 300),
    }
    table = controls.feature_table(features)
    assert table.shape == (300, 10 + 1 + 2)
    within = features["digit"] < 5
    drawn = controls.describable_set(table, 40, np.random.default_rng(2), within)
    assert drawn.sum() == 40
    assert not (drawn & ~within).any()
    again = controls.describable_set(table, 40, np.random.default_rng(2), within)
    other = controls.describable_set(table, 40, np.random.default_rng(3), within)
    assert np.array_equal(drawn, again)
    assert not np.array_equal(drawn, other)
