"""Operators against their formulas, on dense float64 vectors."""

import pytest
import torch

from interventions import edits
from polca_edit.artifacts import load_record, save_record
from polca_edit.derivatives.lanczos import orthonormalise


@pytest.fixture
def world() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    rows = orthonormalise(torch.randn(3, 12, generator=g, dtype=torch.float64))
    draw = [torch.randn(12, generator=g, dtype=torch.float64) for _ in range(4)]
    return {"rows": rows, "start": draw[0], "early": draw[1], "late": draw[2], "theta": draw[3]}


def projector(rows: torch.Tensor) -> torch.Tensor:
    return rows.T @ rows


def test_every_operator_has_its_formula(world: dict[str, torch.Tensor]) -> None:
    rows, start, early, late, theta = (world[k] for k in ("rows", "start", "early", "late", "theta"))
    p, eye = projector(rows), torch.eye(12, dtype=torch.float64)
    whole, window = edits.Movement(theta, start), edits.Movement(theta, early, late)
    cases = [
        (edits.project_out(whole, rows), theta, theta - p @ (theta - start)),
        (edits.reverse(whole, rows, 0.25), theta, theta - 0.25 * p @ (theta - start)),
        (edits.reverse(whole, rows, -0.5), theta, theta + 0.5 * p @ (theta - start)),
        (edits.project_out(window, rows), theta, theta - p @ (late - early)),
        (edits.rollback(window, rows), theta, theta - p @ (late - early)),
        (edits.rollback(window, rows, rewind=True), theta, theta - p @ (theta - early)),
        (edits.rollback(window), theta, theta - (late - early)),
        (edits.rollback(window, rewind=True), theta, early),
        (edits.transplant(whole, rows), start, start + p @ (theta - start)),
        (edits.transplant(window, rows), early, early + p @ (late - early)),
        (edits.transplant(whole, rows, outside=True), start, start + (eye - p) @ (theta - start)),
        (edits.displace(whole, rows, [1.0, 0.0, -2.0], "any"), theta, theta + rows[0] - 2 * rows[2]),
    ]
    for edit, base, expected in cases:
        torch.testing.assert_close(edit.apply(base), expected, rtol=0, atol=1e-12)


def test_windows_add_up_to_the_whole(world: dict[str, torch.Tensor]) -> None:
    rows, start, early, late, theta = (world[k] for k in ("rows", "start", "early", "late", "theta"))
    parts = [
        edits.rollback(edits.Movement(theta, a, b), rows)
        for a, b in ((start, early), (early, late), (late, theta))
    ]
    whole = edits.project_out(edits.Movement(theta, start), rows)
    torch.testing.assert_close(edits.composed(parts).delta(), whole.delta(), rtol=0, atol=1e-12)


def test_zero_dose_double_application_order_and_sign(world: dict[str, torch.Tensor]) -> None:
    rows, start, theta = world["rows"], world["start"], world["theta"]
    assert torch.equal(edits.reverse(edits.Movement(theta, start), rows, 0.0).apply(theta), theta)
    once = edits.project_out(edits.Movement(theta, start), rows).apply(theta)
    twice = edits.project_out(edits.Movement(once, start), rows).apply(once)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-12)
    flipped = edits.project_out(edits.Movement(theta, start), -rows[[2, 0, 1]]).apply(theta)
    torch.testing.assert_close(flipped, once, rtol=0, atol=1e-12)


def test_an_edit_refuses_other_weights(world: dict[str, torch.Tensor]) -> None:
    edit = edits.project_out(edits.Movement(world["theta"], world["start"]), world["rows"])
    with pytest.raises(ValueError, match="weights it was made for"):
        edit.apply(world["late"])
    with pytest.raises(ValueError, match="12 parameters"):
        edit.apply(world["theta"][:-1])
    other = edits.project_out(edits.Movement(world["late"], world["start"]), world["rows"])
    with pytest.raises(ValueError, match="same base"):
        edit.then(other)


def test_composition_keeps_both_movements_even_where_rows_overlap(world: dict[str, torch.Tensor]) -> None:
    theta, start, rows = world["theta"], world["start"], world["rows"]
    first = edits.project_out(edits.Movement(theta, start), rows[:2])
    second = edits.displace(edits.Movement(theta, start), rows[1:2], [0.3], "shift")
    both = first.then(second)
    torch.testing.assert_close(both.delta(), first.delta() + second.delta(), rtol=0, atol=1e-12)
    assert both.rank == 2


def test_saved_edit_comes_back_and_still_refuses(tmp_path, world: dict[str, torch.Tensor]) -> None:
    edit = edits.project_out(edits.Movement(world["theta"], world["start"]), world["rows"], vectors=[0, 1, 2])
    save_record(tmp_path / "edit.safetensors", edit)
    back = load_record(edits.Edit, tmp_path / "edit.safetensors")
    assert torch.equal(back.apply(world["theta"]), edit.apply(world["theta"]))
    assert back.provenance == {"vectors": [0, 1, 2]}
    with pytest.raises(ValueError, match="weights it was made for"):
        back.apply(world["late"])


def test_restricting_to_disjoint_masks_adds_up(world: dict[str, torch.Tensor]) -> None:
    edit = edits.project_out(edits.Movement(world["theta"], world["start"]), world["rows"])
    mask = torch.arange(12) < 5
    parts = edit.restricted(mask).delta() + edit.restricted(~mask).delta()
    torch.testing.assert_close(parts, edit.delta(), rtol=0, atol=1e-12)


def test_a_zero_movement_is_an_edit_of_rank_zero_without_nan() -> None:
    theta = torch.ones(5)
    for edit in (
        edits.from_delta("base", torch.zeros(5), "none"),
        edits.project_out(edits.Movement(theta, theta), torch.eye(5)[:1]).restricted(torch.zeros(5).bool()),
    ):
        assert edit.rank == 0
        assert edit.norm == 0.0
        assert torch.equal(edit.delta(), torch.zeros(5))
        assert torch.equal(edit.moved(theta), theta)
    tiny = edits.from_delta("base", torch.full((4,), 1e-40), "tiny")
    assert torch.isfinite(tiny.rows).all()
    assert float(tiny.rows.norm()) == pytest.approx(1.0, abs=1e-3)
    # The smallest numbers of float32, whose length it can only round by a third.
    tiny = edits.from_delta("base", torch.full((2,), 1e-45), "tiny")
    assert float(tiny.rows.norm()) == pytest.approx(1.0, rel=1e-6)


def test_rows_that_are_not_orthonormal_are_refused() -> None:
    movement = edits.Movement(torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match="orthonormal"):
        edits.project_out(movement, torch.tensor([[2.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="orthonormal"):
        edits.project_out(movement, torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))


def test_edits_of_models_with_many_parameters_compose() -> None:
    """Sums are taken in blocks of 4096 entries: a model larger than one block is another code path."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(3 * 4096 + 5, generator=generator)
    first, second = (
        edits.from_delta(
            edits.weights_fingerprint(theta), torch.randn(len(theta), generator=generator), "any"
        )
        for _ in range(2)
    )
    both = first.then(second)
    torch.testing.assert_close(both.delta(), first.delta() + second.delta(), atol=1e-4, rtol=0)
    torch.testing.assert_close(both.apply(theta), theta + both.delta(), atol=1e-5, rtol=0)


def test_a_movement_whose_squares_are_zero_in_float32_is_an_edit_of_rank_one():
    moved = 1e-30 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    assert float((moved * moved).sum()) == 0.0
    edit = edits.from_delta("base", moved, "tiny")
    assert edit.rank == 1
    assert float(edit.rows.double().norm()) == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close(
        edit.coordinates.double() @ edit.rows.double(), moved.double(), rtol=1e-6, atol=0
    )
