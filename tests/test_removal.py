"""Removal: spans, optimiser, dose, searches, closed form. Oracles: closed forms and dense algebra."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from interventions.removal import searches as removal_searches
from interventions.removal.optimise import (
    ConstrainedLoss,
    FitSettings,
    Multipliers,
    batch_at,
    constrained,
    edit_of,
    fit,
)
from interventions.removal.problem import (
    GroupRule,
    Limits,
    Predictor,
    RemovalProblem,
    Shares,
    mean_by_group,
    score,
    select_shares,
    shares_of,
    token_kl,
    token_nll,
)
from interventions.removal.relabelling import Refit
from interventions.removal.searches import (
    GroupCurvature,
    best_single,
    closed_form,
    greedy_set,
    group_curvature,
    match_dose,
    remove_in_sequence,
)
from interventions.removal.spans import (
    Span,
    leading_rows,
    random_like,
    rotated_within,
    span_by_tensor,
    span_of_rows,
    whole_space,
)
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet


class TwoTables(nn.Module):
    """Two lookup tables: input x = task * 5 + item; task 0 reads ``first``, task 1 ``second``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(5, 4))
        self.second = nn.Parameter(torch.zeros(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first, self.second])[x]


def answers_of(x: Tensor) -> Tensor:
    return (x % 5 + x // 5) % 4


def tokens_of(x: Tensor) -> TokenSet:
    count = len(x)
    return TokenSet(
        x[:, None], torch.ones(count, 1, dtype=torch.bool), torch.arange(count), {}, answers_of(x)[:, None]
    )


@pytest.fixture
def problem() -> RemovalProblem:
    """Both tables know their answers (margin 4); the skill is the first table."""
    module = TwoTables()
    space = ParameterSpace.from_module(module)
    x = torch.arange(10)
    table = 4.0 * nn.functional.one_hot(answers_of(x), 4).float()
    theta = space.flatten({"first": table[:5], "second": table[5:]})
    predictor = Predictor(module, space, lambda m, inputs: m(inputs))
    rule = GroupRule(("a", "b"), (True, False), lambda t: t.inputs[t.scored.any(1)][:, 0] // 5)

    def batch(step: int) -> TokenSet:
        return tokens_of(torch.randint(0, 10, (40,), generator=torch.Generator().manual_seed(step)))

    select = tokens_of(torch.arange(10).repeat(3))
    return RemovalProblem(
        predictor, theta, torch.zeros_like(theta), rule, batch, select, Limits(), "first table"
    )


def test_span_moves_and_pulls_are_transposes() -> None:
    space = ParameterSpace(("a", "b"), ((3, 2), (4,)), (("a", "a"), ("b", "b")))
    vectors = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    span = span_by_tensor(vectors, space, "test")
    dense = torch.stack([span.move(row) for row in torch.eye(span.rank)])
    torch.testing.assert_close(dense @ dense.T, torch.eye(span.rank), atol=1e-5, rtol=0)
    v = torch.randn(10, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(span.pull(v), dense @ v)
    # Every recorded vector, and every part of one, is inside the span.
    cut = vectors.clone()
    cut[:, 6:] = 0
    for inside in (*vectors, *cut):
        torch.testing.assert_close(span.move(span.pull(inside)), inside, atol=1e-4, rtol=0)


def test_leading_rows_are_singular_vectors_and_drop_dependent_ones() -> None:
    draw = torch.randn(3, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    vectors = torch.cat([draw, draw[:1] + draw[1:2]])
    rows = leading_rows(vectors)
    assert rows.shape == (3, 20)
    _, _, right = torch.linalg.svd(vectors, full_matrices=False)
    torch.testing.assert_close(
        (rows @ right[:3].T).abs(), torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_control_spans_keep_shape_and_stay_where_they_should() -> None:
    space = ParameterSpace(("a", "b"), ((6,), (8,)), (("a", "a"), ("b", "b")))
    vectors = torch.randn(5, 14, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wide, narrow = span_by_tensor(vectors, space, "w"), span_by_tensor(vectors, space, "n", per_block=2)
    generator = torch.Generator().manual_seed(0)
    for control in (random_like(narrow, generator), rotated_within(narrow, wide, generator)):
        assert control.rank == narrow.rank
        for rows in control.rows:
            torch.testing.assert_close(rows @ rows.T, torch.eye(2, dtype=torch.float64), atol=1e-9, rtol=0)
    turned = rotated_within(narrow, wide, generator)
    z = torch.randn(turned.rank, generator=generator, dtype=torch.float64)
    moved = turned.move(z)
    torch.testing.assert_close(wide.move(wide.pull(moved)), moved)
    with pytest.raises(ValueError, match="wider"):
        rotated_within(wide, narrow, generator)
    with pytest.raises(ValueError, match="disjoint"):
        Span("bad", 4, ((0, 3), (2, 4)), (torch.eye(3), torch.eye(2)))


def test_shares_agree_with_a_loop(problem: RemovalProblem) -> None:
    generator = torch.Generator().manual_seed(5)
    before, after = (torch.randn(12, 4, generator=generator) for _ in range(2))
    answers = torch.randint(0, 4, (12,), generator=generator)
    groups = torch.tensor([0, 1, 2, -1] * 3)
    rooms = torch.tensor([1.0, 2.0, 0.5])
    shares = shares_of(before, after, answers, groups, rooms, (True, False, True))
    change = token_nll(after, answers) - token_nll(before, answers)
    for g in range(3):
        mine = change[groups == g]
        assert float(shares.raw[g]) == pytest.approx(float(mine.mean() / rooms[g]), abs=1e-6)
        assert float(shares.positive[g]) == pytest.approx(
            float(mine.clamp_min(0).mean() / rooms[g]), abs=1e-6
        )
    skill = change[(groups == 0) | (groups == 2)]
    assert shares.target_raw == pytest.approx(float(skill.mean() / 0.75), abs=1e-6)
    assert shares.target <= 1.0
    assert shares.worst_off == pytest.approx(float(shares.raw[1]))
    kl = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(token_kl(before, after), kl)


def test_empty_and_unlearned_groups_are_left_out(problem: RemovalProblem) -> None:
    logits = torch.zeros(4, 4)
    groups = torch.tensor([0, 0, 1, 1])
    shares = shares_of(
        logits, logits, torch.zeros(4).long(), groups, torch.tensor([1.0, 0.01, 1.0]), (True, False, False)
    )
    assert shares.raw[1:].isnan().all()
    assert mean_by_group(torch.ones(4), groups, 3).tolist() == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="learned"):
        _ = replace(problem, reference=problem.theta).headroom
    with pytest.raises(ValueError, match="target groups and other groups"):
        GroupRule(("a", "b"), (True, True), problem.rule.assign)


def test_constrained_edit_removes_one_table_and_leaves_the_other(problem: RemovalProblem) -> None:
    # Two rows at an angle to the tables: Adam's first steps along them hurt both tables alike.
    a, b = torch.zeros(40), torch.zeros(40)
    a[:20], b[20:] = (
        problem.theta[:20] / problem.theta[:20].norm(),
        problem.theta[20:] / problem.theta[20:].norm(),
    )
    turn = math.radians(25)
    span = span_of_rows(
        torch.stack([math.cos(turn) * a - math.sin(turn) * b, math.sin(turn) * a + math.cos(turn) * b]),
        "mixed",
    )
    settings = FitSettings(learning_rate=0.3)
    found = constrained(problem, span, settings, 100)
    shares = select_shares(problem, problem.theta + found.delta)
    assert shares.target_raw > 0.9
    assert shares.worst_off < 0.01
    torch.testing.assert_close(span.move(span.pull(found.delta)), found.delta, atol=1e-4, rtol=0)
    # Without retain term and constraints the same span takes the other table along.
    free = ConstrainedLoss(replace(settings, retain=0.0), Limits(), 100, others_weight=1e-6)
    careless = fit(problem, span, free, settings, 100)
    assert select_shares(problem, problem.theta + careless.delta).worst_off > 0.05


def test_augmented_lagrangian_solves_a_known_program() -> None:
    # minimise x^2 subject to 1 - x <= 0: x = 1, multiplier 2.
    x = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    state = Multipliers(torch.zeros(1, dtype=torch.float64), weight=2.0, rate=0.5)
    optimiser = torch.optim.SGD([x], lr=0.1)
    for _ in range(400):
        optimiser.zero_grad()
        (x.square().sum() + state.term(1 - x)).backward()
        optimiser.step()
        state = state.updated(1 - x)
    assert float(x.detach()) == pytest.approx(1.0, abs=1e-6)
    assert float(state.values) == pytest.approx(2.0, abs=1e-5)
    # An inactive constraint pushes nothing.
    idle = Multipliers(torch.zeros(1), weight=2.0)
    assert float(idle.term(torch.tensor([-0.3]))) == 0.0


def test_gradient_of_the_fit_matches_finite_differences(problem: RemovalProblem) -> None:
    theta = problem.theta.double()
    exact = replace(problem, theta=theta, reference=torch.zeros_like(theta))
    span = whole_space(40)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(40, generator=generator, dtype=torch.float64)
    direction = torch.randn(40, generator=generator, dtype=torch.float64)

    def value(at: Tensor) -> Tensor:
        # The relabelling is a constant of the derivative (it is refitted between steps), so it is held.
        loss = ConstrainedLoss(FitSettings(), Limits(), 1, confusion_first=0.0)
        loss._relabel, loss._calls = Refit(torch.tensor([1, 0, 3, 2]), 0.1 * torch.arange(4.0)), 1
        return loss(batch_at(exact, 0, exact.theta + span.move(at)))

    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), [leaf])
    step = 1e-6
    numeric = (value(z + step * direction) - value(z - step * direction)) / (2 * step)
    assert float(gradient @ direction) == pytest.approx(float(numeric.detach()), rel=1e-5)


def test_dose_is_the_smallest_that_reaches_the_goal(problem: RemovalProblem) -> None:
    delta = torch.cat([-problem.theta[:20], torch.zeros(20)])
    dose, shares = match_dose(problem, delta, 0.5, evaluations=20)
    assert shares.target >= 0.5
    assert select_shares(problem, problem.theta + (dose - 1e-4) * delta).target < 0.5
    whole, _ = match_dose(problem, delta, 0.9999, evaluations=20)
    assert whole == pytest.approx(1.0, abs=1e-2)
    # A goal above one is a margin: shares are capped for judging, not for choosing the dose.
    past, over = match_dose(problem, 1.4 * delta, 1.02, evaluations=20)
    assert past < 1.0
    assert over.target_raw == pytest.approx(1.02, abs=1e-2)
    # A movement that cannot reach the goal keeps its best score.
    weak, reached = match_dose(problem, 0.01 * delta, 0.9)
    assert reached.target < 0.9
    assert weak == 1.5


def test_dose_is_not_lowered_into_harm(problem: RemovalProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of this edit reaches the goal too, but breaks another group that the whole edit keeps."""

    def fake(given: RemovalProblem, theta: Tensor) -> Shares:
        dose = float((theta - given.theta)[0])
        harm = 0.4 if dose < 1 else 0.01
        raw = torch.tensor([1.0 if dose > 0.3 else 0.2, harm])
        return Shares(raw, raw.clamp_min(0), raw, raw, (True, False), float(raw[0]), 0.0)

    monkeypatch.setattr(removal_searches, "select_shares", fake)
    dose, shares = match_dose(problem, torch.ones(40), 0.9)
    assert dose == 1.0
    assert shares.worst_positive == pytest.approx(0.01)


def test_searches_find_the_planted_vector(problem: RemovalProblem) -> None:
    clean = torch.cat([problem.theta[:20], torch.zeros(20)])
    dirty = torch.cat([torch.zeros(20), problem.theta[20:]])
    rows = torch.stack([dirty / dirty.norm(), clean / clean.norm()])
    scales = [float(clean.norm())] * 2
    index, shift, shares = best_single(problem, rows, scales)
    assert (index, shift) == (1, pytest.approx(-scales[1]))
    assert shares.target == pytest.approx(1.0, abs=1e-5)
    halves = torch.stack([torch.cat([clean[:8], torch.zeros(32)]), torch.cat([torch.zeros(8), clean[8:]])])
    halves = halves / halves.norm(dim=1, keepdim=True)
    z, reached = greedy_set(problem, torch.cat([rows[:1], halves]), [8.0, *(clean @ halves.T).tolist()])
    assert z[0] == 0
    assert (z[1:] < 0).all()
    assert reached.target == pytest.approx(1.0, abs=1e-5)
    assert score(reached, problem.limits) < 0.01


def test_closed_form_solves_the_generalised_eigenproblem() -> None:
    generator = torch.Generator().manual_seed(1)
    draw = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    hessians = draw @ draw.transpose(1, 2)
    rooms = torch.tensor([2.0, 1.0, 4.0])
    curvature = GroupCurvature(torch.zeros(3, 6, dtype=torch.float64), hessians)
    found = closed_form(curvature, (True, False, False), rooms, ridge=1e-9)
    top, bottom = hessians[0] / 2, hessians[1] / 1 + hessians[2] / 4
    values = torch.linalg.eigvals(torch.linalg.solve(bottom, top)).real.sort(descending=True).values
    for vector, value in zip(found, values, strict=False):
        assert float(vector @ top @ vector) == pytest.approx(2.0, rel=1e-9)
        assert float(vector @ top @ vector / (vector @ bottom @ vector)) == pytest.approx(
            float(value), rel=1e-5
        )


def test_group_curvature_is_the_dense_block() -> None:
    generator = torch.Generator().manual_seed(2)
    draw = torch.randn(2, 7, 7, generator=generator, dtype=torch.float64)
    matrices = draw + draw.transpose(1, 2)
    slopes = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    rows = torch.linalg.qr(torch.randn(7, 3, generator=generator, dtype=torch.float64))[0].T
    found = group_curvature(lambda g, v: matrices[g] @ v, lambda g: slopes[g], rows, 2)
    torch.testing.assert_close(found.hessians, rows @ matrices @ rows.T)
    torch.testing.assert_close(found.gradients, slopes @ rows.T)


def test_sequence_states_each_problem_at_the_weights_left_by_the_last(problem: RemovalProblem) -> None:
    other = replace(problem, rule=GroupRule(("a", "b"), (False, True), problem.rule.assign))
    seen = []

    def wipe(now: RemovalProblem) -> Tensor:
        seen.append((now.theta.clone(), list(now.off_groups)))
        target = torch.zeros(40)
        part = slice(0, 20) if now.rule.targets[0] else slice(20, 40)
        target[part] = -now.theta[part]
        return target

    steps = remove_in_sequence([problem, other], wipe)
    torch.testing.assert_close(sum(steps, torch.zeros(40)), -problem.theta)
    assert seen[0][1] == [1]
    assert seen[1][1] == []  # the first table has nothing left to protect
    torch.testing.assert_close(seen[1][0][:20], torch.zeros(20))


def test_edit_record_is_made_for_these_weights(problem: RemovalProblem) -> None:
    delta = torch.zeros(40)
    delta[3] = 2.0
    edit = edit_of(problem, delta, "test", span="all")
    torch.testing.assert_close(edit.apply(problem.theta), problem.theta + delta)
    assert edit.provenance["skill"] == "first table"
    with pytest.raises(ValueError, match="made for"):
        edit.apply(problem.theta + 1)
