"""POLCA on quadratic losses, where every number is known, and on the planted model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import QuadraticProblem, orthogonal, quadratic_problem, two_skill_problem, walk

from polca_edit.allocation.allocate import (
    Allocation,
    Projections,
    allocate,
    explained_share,
    loss_change,
    project,
)
from polca_edit.allocation.terms import second_order_terms
from polca_edit.basis.record import Basis, random_basis, unlabelled
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import coordinates
from polca_edit.derivatives.objective import Objective

SPECTRUM = [4.0, 2.0, 1.0, 0.5, 0.0, -0.5, -1.0]


@pytest.fixture
def problem(generator) -> QuadraticProblem:
    return quadratic_problem(SPECTRUM, generator)


@pytest.fixture
def checkpoints(problem, generator) -> Checkpoints:
    return walk(problem.objective.space, 5, generator)


def eigenbasis(problem: QuadraticProblem) -> Basis:
    return unlabelled("eigen", problem.frame.T.contiguous())


def rotated_basis(generator: torch.Generator, count: int = 7) -> Basis:
    return unlabelled("rotated", orthogonal(7, generator)[:count].contiguous())


def measured(problem: QuadraticProblem, checkpoints: Checkpoints, basis: Basis, **options) -> Projections:
    return project(problem.objective, checkpoints, [basis], problem.tokens, **options)[0]


def with_second_order(problem: QuadraticProblem, checkpoints: Checkpoints, basis: Basis) -> Projections:
    gradients, curvatures = second_order_terms(problem.objective, checkpoints, basis, problem.tokens)
    return replace(measured(problem, checkpoints, basis), mean_gradients=gradients, curvatures=curvatures)


# -- stored derivatives against closed forms -------------------------------------------------------


def test_projections_are_the_closed_forms(problem, checkpoints, generator):
    basis = rotated_basis(generator, 3)
    p = measured(problem, checkpoints, basis)
    thetas = [checkpoints[t] for t in range(5)]
    moves = torch.stack([b - a for a, b in zip(thetas, thetas[1:], strict=False)])
    gradients = torch.stack([problem.module.gradients(theta) for theta in thetas])
    left = moves - moves @ basis.rows.T @ basis.rows
    assert p.steps.tolist() == [0, 10, 20, 30, 40]
    expected = {
        "losses": torch.stack([problem.module.closed_form(theta) for theta in thetas]),
        "gradients": torch.einsum("kn,tmn->tkm", basis.rows, gradients),
        "displacements": moves @ basis.rows.T,
        "residual_start": torch.einsum("tn,tmn->tm", left, gradients[:-1]),
        "residual_end": torch.einsum("tn,tmn->tm", left, gradients[1:]),
        "residual_norms": left.norm(dim=1),
        "step_norms": moves.norm(dim=1),
    }
    for name, value in expected.items():
        assert torch.allclose(getattr(p, name), value, rtol=0, atol=1e-12), name


@pytest.mark.parametrize(
    ("route", "batch_size"), [("jvp", 3), ("traced", 4), ("double_backward", 1), ("double_backward", 100)]
)
def test_unequal_last_batch_and_route_change_nothing(problem, checkpoints, generator, route, batch_size):
    """Seven sequences: batches of 3 and 4 leave a short last one."""
    basis = rotated_basis(generator, 3)
    expected = measured(problem, checkpoints, basis)
    objective = Objective(
        problem.module,
        problem.objective.token_loss,
        problem.objective.space,
        batch_size=batch_size,
        route=route,
    )
    found = project(objective, checkpoints, [basis], problem.tokens)[0]
    for name in ("losses", "gradients", "residual_start", "residual_end"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-12), name
    terms = second_order_terms(objective, checkpoints, basis, problem.tokens)
    wanted = second_order_terms(problem.objective, checkpoints, basis, problem.tokens)
    for mine, theirs in zip(terms, wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)


def test_second_order_terms_are_the_closed_forms(problem, checkpoints, generator):
    basis = rotated_basis(generator, 3)
    gradients, curvatures = second_order_terms(problem.objective, checkpoints, basis, problem.tokens)
    mean = torch.stack([problem.module.gradients(checkpoints[t]).mean(0) for t in range(5)])
    assert torch.allclose(gradients, mean @ basis.rows.T, rtol=0, atol=1e-12)
    bent = torch.einsum("kn,nm,km->k", basis.rows, problem.hessian, basis.rows)
    assert torch.allclose(curvatures, bent.expand(4, 3), rtol=0, atol=1e-12)


def test_unscored_slots_are_left_out(problem, checkpoints, generator):
    basis = rotated_basis(generator, 3)
    scored = problem.tokens.scored.clone()
    scored[1, 2] = scored[6, 0] = False
    fewer = replace(problem.tokens, scored=scored)
    whole, part = (
        project(problem.objective, checkpoints, [basis], tokens)[0] for tokens in (problem.tokens, fewer)
    )
    keep = scored.flatten()
    assert torch.allclose(part.gradients, whole.gradients[:, :, keep], rtol=0, atol=1e-13)
    assert torch.allclose(part.residual_end, whole.residual_end[:, keep], rtol=0, atol=1e-13)


def test_several_bases_at_once_give_what_each_gives_alone(problem, checkpoints, generator):
    bases = [rotated_basis(generator, 2), eigenbasis(problem), rotated_basis(generator, 4)]
    together = project(problem.objective, checkpoints, bases, problem.tokens)
    for basis, found in zip(bases, together, strict=True):
        alone = measured(problem, checkpoints, basis)
        assert torch.allclose(found.gradients, alone.gradients, rtol=0, atol=1e-13)
        assert torch.allclose(found.residual_start, alone.residual_start, rtol=0, atol=1e-13)
        assert torch.equal(found.displacements, alone.displacements)


def test_two_checkpoints_are_too_few(problem, checkpoints, generator):
    with pytest.raises(ValueError, match="at least 3 checkpoints"):
        measured(problem, checkpoints.subset([0, 1]), rotated_basis(generator))


# -- adding up -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [7, 3, 1])
def test_trapezoid_adds_up_in_any_basis(problem, checkpoints, generator, count):
    """Complete or not: the residual direction takes what the vectors leave."""
    allocation = allocate(measured(problem, checkpoints, rotated_basis(generator, count)))
    assert float(allocation.quadrature_error.abs().max()) < 1e-10
    if count == 7:
        assert float(allocation.residual.abs().max()) < 1e-10
    else:
        assert float(allocation.residual.abs().max()) > 0.1


def test_second_order_adds_up_in_the_eigenbasis_on_average(problem, checkpoints, generator):
    """Eq. 6 shares lambda d^2 out in proportion to each token's slope change: exact for the mean."""
    allocation = allocate(with_second_order(problem, checkpoints, eigenbasis(problem)), "second_order")
    assert allocation.guarded == 4  # the flat direction: no slope change, in each of four intervals
    assert float(allocation.quadrature_error.mean(1).abs().max()) < 1e-10
    trapezoid = allocate(measured(problem, checkpoints, eigenbasis(problem)))
    curved = [0, 1, 2, 3, 5, 6]
    assert torch.allclose(allocation.values[:, curved], trapezoid.values[:, curved], rtol=0, atol=1e-9)


def test_second_order_does_not_add_up_elsewhere(problem, checkpoints, generator):
    allocation = allocate(with_second_order(problem, checkpoints, rotated_basis(generator)), "second_order")
    assert float(allocation.quadrature_error.mean(1).abs().max()) > 0.02


def test_the_gap_of_the_second_order_rule(generator):
    """The missing cross terms are 1/2 sum_{b != b'} H_bb' d_b d_b', and nothing else.

    The example of paper.md, section 1, has exact .314, Eq. 6 -.804, trapezoid .314. Here the
    displacement is scaled along one line until the exact change is .314, in a frame where the
    gap is as large: 1.118 nats.
    """
    problem = quadratic_problem([3.0, 1.0], generator, sequences=1, slots=2, spread=0.0)
    # Along d = (cos a, sin a) in a frame turned by a quarter right angle the cross term is largest.
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / 2**0.5
    basis = unlabelled("turned", turn.T @ problem.frame.T)
    bent = basis.rows @ problem.hessian @ basis.rows.T
    assert float(bent[0, 1].abs()) == pytest.approx(1.0)
    # Cross term H_01 d_0 d_1 = 1.118 with d_0 = d_1 (up to sign), as the gap of the paper's example.
    size = 1.118**0.5
    moved = basis.rows.T @ torch.tensor([size, size * float(bent[0, 1].sign())], dtype=torch.float64)
    slope = problem.module.gradients(torch.zeros(2, dtype=torch.float64)).mean(0)
    own = 0.5 * moved @ problem.hessian @ moved
    # Slide the start along the movement so that the mean change is exactly .314.
    offset = (0.314 - own - slope @ moved) / (moved @ problem.hessian @ moved)
    start = offset * moved
    series = open_checkpoints([start, start + moved, start], problem.objective.space, steps=[0, 1, 2])
    p = with_second_order(problem, series, basis)
    rules = {rule: allocate(p, rule) for rule in ("trapezoid", "second_order", "first_order")}
    given = {rule: float(a.values[0].sum(0).mean()) for rule, a in rules.items()}
    exact = float(rules["trapezoid"].exact[0].mean())
    assert exact == pytest.approx(0.314, abs=1e-10)
    assert given["trapezoid"] == pytest.approx(0.314, abs=1e-10)
    assert given["second_order"] == pytest.approx(0.314 - 1.118, abs=1e-10)
    assert round(given["second_order"], 3) == -0.804
    assert given["first_order"] == pytest.approx(0.314 - float(own), abs=1e-10)


def test_gap_is_the_cross_terms_for_any_basis_and_walk(problem, checkpoints, generator):
    basis = rotated_basis(generator)
    allocation = allocate(with_second_order(problem, checkpoints, basis), "second_order")
    bent = basis.rows @ problem.hessian @ basis.rows.T
    cross = bent - torch.diag(bent.diag())
    moves = allocation_moves(checkpoints, basis)
    expected = 0.5 * torch.einsum("tk,kl,tl->t", moves, cross, moves)
    assert torch.allclose(allocation.quadrature_error.mean(1), expected, rtol=0, atol=1e-10)


def allocation_moves(checkpoints: Checkpoints, basis: Basis) -> torch.Tensor:
    moved = [checkpoints[t + 1] - checkpoints[t] for t in range(len(checkpoints) - 1)]
    return torch.stack([coordinates(basis.rows, m) for m in moved])


def test_first_order_misses_half_the_curvature(problem, checkpoints, generator):
    allocation = allocate(measured(problem, checkpoints, rotated_basis(generator)), "first_order")
    moved = torch.stack([checkpoints[t + 1] - checkpoints[t] for t in range(4)])
    missing = 0.5 * torch.einsum("ti,mij,tj->tm", moved, problem.module.curvatures, moved)
    assert torch.allclose(allocation.quadrature_error, missing, rtol=0, atol=1e-10)


# -- errors must show ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [7, 2])
def test_wrong_derivatives_surface_as_quadrature_error(problem, checkpoints, generator, count):
    """Slopes 10 % too large leave minus 10 % of the exact change; a residual by subtraction hides it."""
    p = measured(problem, checkpoints, rotated_basis(generator, count), derivative_scale=1.1)
    allocation = allocate(p)
    assert torch.allclose(allocation.quadrature_error, -0.1 * allocation.exact, rtol=0, atol=1e-10)
    totals = allocation.totals()
    assert totals["quadrature_error"] / totals["exact"] == pytest.approx(-0.1, abs=1e-9)


def test_residual_is_measured_not_subtracted(problem, checkpoints, generator):
    """Change the exact losses alone: the residual stays, the quadrature error takes the change."""
    p = measured(problem, checkpoints, rotated_basis(generator, 2))
    honest = allocate(p)
    shifted = allocate(replace(p, losses=p.losses + torch.arange(5.0, dtype=torch.float64)[:, None]))
    assert torch.equal(shifted.residual, honest.residual)
    assert torch.equal(shifted.values, honest.values)
    assert torch.allclose(shifted.quadrature_error, honest.quadrature_error + 1, rtol=0, atol=1e-12)


def test_residual_direction_is_orthogonal_and_completes(problem, checkpoints, generator):
    basis = rotated_basis(generator, 3)
    moved = checkpoints[2] - checkpoints[1]
    left = basis.remainder(moved)
    assert float((basis.rows @ left).abs().max()) < 1e-14
    assert torch.allclose(left + coordinates(basis.rows, moved) @ basis.rows, moved, rtol=0, atol=1e-14)


# -- invariances -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["first_order", "second_order", "trapezoid"])
def test_sign_of_a_vector_is_arbitrary(problem, checkpoints, generator, rule):
    basis = rotated_basis(generator, 4)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)[:, None]
    first, flipped = (
        allocate(with_second_order(problem, checkpoints, b), rule)
        for b in (basis, replace(basis, entries=basis.rows * signs))
    )
    assert torch.allclose(first.values, flipped.values, rtol=0, atol=1e-12)
    assert torch.allclose(first.residual, flipped.residual, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["first_order", "trapezoid"])
def test_rotated_projections_are_projections_of_the_rotated_basis(problem, checkpoints, generator, rule):
    basis = rotated_basis(generator, 4)
    turn = orthogonal(4, generator)
    stored = allocate(measured(problem, checkpoints, basis).rotated(turn), rule)
    measured_again = allocate(measured(problem, checkpoints, basis.rotated(turn, "turned")), rule)
    assert torch.allclose(stored.values, measured_again.values, rtol=0, atol=1e-12)
    assert torch.allclose(stored.residual, measured_again.residual, rtol=0, atol=1e-12)
    # A rotation inside the span moves loss change between vectors, never out of the span.
    plain = allocate(measured(problem, checkpoints, basis), rule)
    assert torch.allclose(stored.values.sum(1), plain.values.sum(1), rtol=0, atol=1e-12)
    assert not torch.allclose(stored.values, plain.values, atol=1e-3)


def test_order_of_the_tokens_does_not_matter(problem, checkpoints, generator):
    basis = rotated_basis(generator, 3)
    order = torch.randperm(problem.tokens.sequences, generator=generator)
    shuffled = project(problem.objective, checkpoints, [basis], problem.tokens.select(order))[0]
    plain = measured(problem, checkpoints, basis)
    expected = plain.gradients.view(5, 3, 7, 3)[:, :, order].flatten(2)
    assert torch.allclose(shuffled.gradients, expected, rtol=0, atol=1e-13)


# -- rules on hand-made records --------------------------------------------------------------------


def by_hand(**changes) -> Projections:
    """Two intervals, one vector, two tokens."""
    double = torch.float64
    record = {
        "steps": torch.tensor([0, 1, 2]),
        "losses": torch.tensor([[1.0, 2.0], [0.5, 2.5], [0.0, 1.0]], dtype=double),
        "gradients": torch.tensor([[[1.0, 2.0]], [[3.0, 1.0]], [[0.0, -1.0]]], dtype=double),
        "displacements": torch.tensor([[2.0], [-1.0]], dtype=double),
        "residual_start": torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=double),
        "residual_end": torch.tensor([[0.3, 0.4], [0.5, 0.6]], dtype=double),
        "residual_norms": torch.ones(2, dtype=double),
        "step_norms": torch.ones(2, dtype=double),
        "mean_gradients": torch.tensor([[1.5], [2.0], [-0.5]], dtype=double),
        "curvatures": torch.tensor([[0.25], [2.5]], dtype=double),
    }
    return Projections(**{**record, **changes})


def test_rules_by_hand():
    p = by_hand()
    first, trapezoid, second = (allocate(p, rule) for rule in ("first_order", "trapezoid", "second_order"))
    assert first.values[:, 0].tolist() == [[2.0, 4.0], [-3.0, -1.0]]
    assert first.residual.tolist() == p.residual_start.tolist()
    assert trapezoid.values[:, 0].tolist() == [[4.0, 3.0], [-1.5, 0.0]]
    assert torch.allclose(trapezoid.residual, torch.tensor([[0.2, 0.3], [0.4, 0.5]], dtype=torch.float64))
    # Eq. 6, interval 1: 1/2 * 0.25 * 2^2 * dg(x) / 0.5 = dg(x); interval 2: 1/2 * 2.5 * dg(x) / -2.5.
    assert torch.allclose(
        second.values[:, 0], torch.tensor([[4.0, 3.0], [-1.5, 0.0]], dtype=torch.float64), atol=1e-12
    )
    assert second.guarded == 0
    assert trapezoid.exact.tolist() == [[-0.5, 0.5], [-0.5, -1.5]]


def test_guarded_denominators_fall_back_to_first_order_and_are_counted():
    p = by_hand(mean_gradients=torch.tensor([[1.5], [1.5 + 1e-9], [-0.5]], dtype=torch.float64))
    guarded = allocate(p, "second_order")
    assert guarded.guarded == 1
    assert torch.equal(guarded.values[0], allocate(p, "first_order").values[0])
    assert bool(torch.isfinite(guarded.values).all())
    assert not torch.equal(guarded.values[1], allocate(p, "first_order").values[1])
    loose = allocate(p, "second_order", guard=0.0)
    assert loose.guarded == 0
    assert float(loose.values[0].abs().max()) > 1e6  # what the guard is for


def test_projected_loss_is_the_running_sum():
    allocation = allocate(by_hand())
    assert allocation.projected_loss()[:, 0].tolist() == [[0.0, 0.0], [4.0, 3.0], [2.5, 3.0]]


def test_rules_that_lack_their_numbers_are_refused():
    with pytest.raises(ValueError, match="second_order_terms first"):
        allocate(by_hand(mean_gradients=None), "second_order")
    with pytest.raises(ValueError, match="interior nodes"):
        allocate(by_hand(), "quadrature")


def test_simpson_from_stored_nodes_by_hand():
    """One interior node at the middle: weights 1/6, 4/6, 1/6."""
    double = torch.float64
    p = by_hand(
        interior_interval=torch.tensor([0, 1]),
        interior_position=torch.tensor([0.5, 0.5], dtype=double),
        interior_weight=torch.tensor([4 / 6, 4 / 6], dtype=double),
        end_weights=torch.full((2, 2), 1 / 6, dtype=double),
        interior_gradients=torch.tensor([[[2.0, 2.0]], [[1.0, 1.0]]], dtype=double),
        interior_residual=torch.tensor([[0.2, 0.3], [0.4, 0.5]], dtype=double),
    )
    values = allocate(p, "quadrature").values[:, 0]
    expected = torch.tensor([[(1 + 8 + 3) / 6 * 2, (2 + 8 + 1) / 6 * 2], [-(3 + 4) / 6, -(1 + 4 - 1) / 6]])
    assert torch.allclose(values, expected.double(), atol=1e-6)


# -- summaries -------------------------------------------------------------------------------------


def test_group_changes_pool_by_sum_and_count():
    """Groups of 3 and 1 tokens: the overall mean is 3:1 of the group means, not their average."""
    p = quadratic_like(4)
    allocation = allocate(p)
    masks = {"a": torch.tensor([True, True, True, False]), "b": torch.tensor([False, False, False, True])}
    entry = loss_change(allocation, {**masks, "empty": torch.zeros(4, dtype=torch.bool)})
    groups = entry["per_group"]
    assert set(groups) == {"a", "b"}
    for key in ("exact", "attributed", "residual", "quadrature_error"):
        pooled = (groups["a"][key] * 3 + groups["b"][key] * 1) / 4
        assert entry[key] == pytest.approx(pooled, abs=1e-12)
        assert entry[key] != pytest.approx((groups["a"][key] + groups["b"][key]) / 2, abs=1e-6)
    assert entry["exact"] == pytest.approx(
        entry["attributed"] + entry["residual"] + entry["quadrature_error"], abs=1e-12
    )
    assert entry["exact"] == pytest.approx(float((p.losses[-1] - p.losses[0]).mean()), abs=1e-12)


def quadratic_like(tokens: int) -> Projections:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Projections(
        torch.arange(4), draw(4, tokens), draw(4, 2, tokens), draw(3, 2), draw(3, tokens), draw(3, tokens),
        draw(3).abs(), draw(3).abs(),
    )  # fmt: skip


def test_explained_share():
    assert explained_share(-1.0, -2.0) == 0.5
    assert explained_share(0.5, -2.0) == -0.25
    assert explained_share(1.0, 0.009) is None
    assert explained_share(1.0, -0.0099) is None
    assert explained_share(1.0, 0.01) == pytest.approx(100.0)


def test_totals_of_an_allocation_with_many_float32_tokens_do_not_drift():
    count = 200_000
    values = torch.full((1, 1, count), 0.1)
    none = torch.zeros(1, count)
    allocation = Allocation("trapezoid", torch.arange(2), values, none, values[:, 0].clone())
    assert allocation.totals()["attributed"] == pytest.approx(float(values[0, 0, 0]), rel=1e-12)


# -- planted skills --------------------------------------------------------------------------------


def test_planted_vectors_get_the_change_of_their_own_skill(generator):
    planted = two_skill_problem(generator)
    basis = unlabelled("planted", planted.rows[:3])
    p = project(planted.objective, planted.checkpoints, [basis], planted.tokens)[0]
    allocation = allocate(p)
    given = allocation.values.sum(0)
    change = allocation.exact.sum(0)
    first, second = planted.tokens.skills["first"], planted.tokens.skills["second"]
    # A token's loss depends on one planted direction alone, so every other part is exactly nothing.
    assert float(given[0, second].abs().max()) < 1e-12
    assert float(given[1, first].abs().max()) < 1e-12
    assert float(given[2].abs().max()) < 1e-12
    assert float(allocation.residual.abs().max()) < 1e-12
    # The trapezoid's error on this smooth path: at most h^3/12 |f'''|-like, below 1 % of the change.
    assert float((given[0, first] - change[first]).abs().max()) < 0.01 * float(change[first].abs().min())
    assert float((given[1, second] - change[second]).abs().max()) < 0.01 * float(change[second].abs().min())


def test_random_vectors_leave_most_to_the_residual(generator):
    planted = two_skill_problem(generator)
    basis = random_basis(12, 2, generator, dtype=torch.float64)
    allocation = allocate(project(planted.objective, planted.checkpoints, [basis], planted.tokens)[0])
    totals = allocation.totals()
    assert totals["exact"] < -0.5
    share = explained_share(totals["attributed"], totals["exact"])
    assert share is not None
    assert share < 0.6
    assert abs(totals["quadrature_error"]) < 0.01 * abs(totals["exact"])
