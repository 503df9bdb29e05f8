"""Removal: spans, optimiser, dose, searches, closed form. Oracles: closed forms and dense algebra."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from interventions.damage import EvaluatedSplit
from interventions.edits import from_delta
from interventions.removal.grouped import (
    GroupedSplit,
    GroupRule,
    Predictor,
    Shares,
    at_weights,
    labelled,
    mean_by_group,
    token_kl,
    token_nll,
)
from interventions.removal.optimise import (
    ConstrainedLoss,
    FitSettings,
    Multipliers,
    batch_at,
    constrained,
    edit_of,
    fit,
)
from interventions.removal.problem import Limits, RemovalProblem, score
from interventions.removal.relabelling import Refit
from interventions.removal.remove import (
    BUDGETS,
    Budget,
    RemovalResult,
    judged_edit,
    missed_bounds,
    remove_in_order,
    remove_skill,
)
from interventions.removal.searches import (
    GroupCurvature,
    best_single,
    closed_form,
    greedy_set,
    group_curvature,
    match_dose,
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
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet
from tests.oracles import tiny_gpt2


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


def table_logits(module: nn.Module, inputs: Tensor) -> Tensor:
    result: Tensor = module(inputs)
    return result


def table_loss(module: nn.Module, inputs: Tensor) -> Tensor:
    return token_nll(module(inputs).flatten(0, 1), answers_of(inputs).flatten()).view(inputs.shape)


def stated(problem: RemovalProblem, theta: Tensor, reference: Tensor) -> RemovalProblem:
    """The problem at other weights and another reference, in their precision."""
    split = problem.select.split
    ends = open_checkpoints({0: reference, 1: theta}, split.loss.space)
    return replace(problem, select=replace(problem.select, split=replace(split, series=ends)))


@pytest.fixture
def problem() -> RemovalProblem:
    """Both tables know their answers (margin 4); the skill is the first table."""
    module = TwoTables()
    loss = Objective(module, table_loss)
    x = torch.arange(10)
    table = 4.0 * nn.functional.one_hot(answers_of(x), 4).float()
    theta = loss.space.flatten({"first": table[:5], "second": table[5:]})
    rule = GroupRule(("a", "b"), (True, False), lambda t: t.inputs[t.scored.any(1)][:, 0] // 5, "first table")

    def batch(step: int) -> TokenSet:
        return tokens_of(torch.randint(0, 10, (40,), generator=torch.Generator().manual_seed(step)))

    series = open_checkpoints({0: torch.zeros_like(theta), 1: theta}, loss.space)
    split = EvaluatedSplit(loss, series, tokens_of(torch.arange(10).repeat(3)))
    return RemovalProblem(GroupedSplit(split, Predictor(loss, table_logits), rule), batch)


def dense_rows(span: Span) -> Tensor:
    """(k, N) the span's rows with their zeros."""
    return torch.stack([span.move(row) for row in torch.eye(span.rank, dtype=span.rows[0].dtype)])


def assert_inside(span: Span, moved: Tensor) -> None:
    """The movement is its own projection onto the span, by dense algebra."""
    dense = dense_rows(span)
    torch.testing.assert_close((moved @ dense.T) @ dense, moved, atol=1e-4, rtol=1e-3)


def test_a_span_has_orthonormal_rows_and_holds_what_was_recorded() -> None:
    space = ParameterSpace(("a", "b"), ((3, 2), (4,)), (("a", "a"), ("b", "b")))
    vectors = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    span = span_by_tensor(vectors, space, "test")
    dense = dense_rows(span)
    torch.testing.assert_close(dense @ dense.T, torch.eye(span.rank), atol=1e-5, rtol=0)
    # Every recorded vector, and every part of one, is inside the span; other vectors are not.
    cut = vectors.clone()
    cut[:, 6:] = 0
    for inside in (*vectors, *cut):
        assert_inside(span, inside)
    other = torch.randn(10, generator=torch.Generator().manual_seed(1))
    assert float(((other @ dense.T) @ dense - other).norm()) > 0.1


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
    assert_inside(wide, moved)
    with pytest.raises(ValueError, match="wider"):
        rotated_within(wide, narrow, generator)
    with pytest.raises(ValueError, match="disjoint"):
        Span("bad", 4, ((0, 3), (2, 4)), (torch.eye(3), torch.eye(2)))


class Given(nn.Module):
    """Logits of numbered tokens, one table a checkpoint: the weights are the logits."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(count, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[x]


def given_split(
    before: Tensor, untrained: Tensor, answers: Tensor, groups: Tensor, targets: tuple[bool, ...]
) -> GroupedSplit:
    """A split whose logits at its two ends are the given ones."""
    module = Given(len(answers))
    loss = Objective(
        module,
        lambda m, x: token_nll(m(x).flatten(0, 1), answers[x].flatten()).view(x.shape),
    )
    x = torch.arange(len(answers))
    scored = torch.ones(len(x), 1, dtype=torch.bool)
    tokens = TokenSet(x[:, None], scored, x, {}, answers[:, None])
    series = open_checkpoints({0: untrained.flatten(), 1: before.flatten()}, loss.space)
    rule = GroupRule(tuple("abc"[: len(targets)]), targets, lambda t: groups[t.inputs[:, 0]])
    return GroupedSplit(EvaluatedSplit(loss, series, tokens), Predictor(loss, table_logits), rule)


def test_shares_agree_with_a_loop() -> None:
    generator = torch.Generator().manual_seed(5)
    answers = torch.randint(0, 4, (12,), generator=generator)
    after = torch.randn(12, 4, generator=generator)
    # Trained logits favour the answers, untrained ones do not, so that every group has headroom.
    before = torch.randn(12, 4, generator=generator) + 3 * nn.functional.one_hot(answers, 4)
    untrained = torch.randn(12, 4, generator=generator)
    groups = torch.tensor([0, 1, 2, -1] * 3)
    split = given_split(before, untrained, answers, groups, (True, False, True))
    shares = split.shares(after)
    change = token_nll(after, answers) - token_nll(before, answers)
    room = token_nll(untrained, answers) - token_nll(before, answers)
    for g, name in enumerate("abc"):
        here = groups == g
        assert shares.raw[name] == pytest.approx(float(change[here].mean() / room[here].mean()), rel=1e-5)
        positive = float(change[here].clamp_min(0).mean() / room[here].mean())
        assert shares.positive[name] == pytest.approx(positive, rel=1e-5)
        right = (after.argmax(-1) == answers)[here].float()
        assert shares.accuracy[name] == pytest.approx(float(right.mean()))
    skill = (groups == 0) | (groups == 2)
    assert shares.target == pytest.approx(float(change[skill].sum() / room[skill].sum()), rel=1e-5)
    lost = sum(min(float(d), max(float(g), 0.0)) for d, g in zip(change[skill], room[skill], strict=True))
    assert shares.target_capped == pytest.approx(lost / float(room[skill].clamp_min(0).sum()), rel=1e-5)
    assert shares.worst_off == shares.raw["b"]
    kl = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(token_kl(before, after), kl)
    assert shares.worst_kl == pytest.approx(float(kl[groups == 1].mean()), rel=1e-5)


def test_empty_and_unlearned_groups_are_left_out(problem: RemovalProblem) -> None:
    answers, groups = torch.zeros(4).long(), torch.tensor([0, 0, 1, 1])
    known, barely = torch.tensor([[4.0, 0, 0, 0]]), torch.tensor([[0.01, 0, 0, 0]])
    before = torch.cat([known, known, barely, barely])
    split = given_split(before, torch.zeros(4, 4), answers, groups, (True, False, False))
    shares = split.shares(torch.zeros(4, 4))
    assert shares.raw["a"] == pytest.approx(1.0, abs=1e-6)
    assert math.isnan(shares.raw["b"])  # headroom of 0.0075 nats
    assert math.isnan(shares.raw["c"])  # no tokens
    assert shares.worst_off == 0.0  # nobody is left to hurt
    assert mean_by_group(torch.ones(4), groups, 3).tolist() == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="learned"):
        _ = stated(problem, problem.theta, problem.theta).headroom
    with pytest.raises(ValueError, match="target groups and other groups"):
        GroupRule(("a", "b"), (True, True), problem.rule.assign)


def test_logits_that_are_not_those_of_the_loss_are_refused(problem: RemovalProblem) -> None:
    wrong = Predictor(problem.predictor.loss, lambda module, x: 2.0 * module(x))
    with pytest.raises(ValueError, match="cross-entropy of the logits"):
        _ = replace(problem.select, predictor=wrong).before


def test_labels_become_groups_in_order() -> None:
    skills = {"x": torch.tensor([1, 1, 0, 0]).bool(), "y": torch.tensor([0, 1, 1, 0]).bool()}
    tokens = replace(tokens_of(torch.arange(4)), skills=skills)
    assert labelled("x", ["y"]).assign(tokens).tolist() == [0, 0, 1, 2]
    assert labelled("y", ["x"]).assign(tokens).tolist() == [1, 0, 0, 2]
    assert labelled("y").names == ("y", "(rest)")


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
    shares = problem.select.shares_at(problem.theta + found.delta)
    assert shares.target > 0.9
    assert shares.worst_off < 0.01
    assert_inside(span, found.delta)
    # Without retain term and constraints the same span takes the other table along.
    free = ConstrainedLoss(replace(settings, retain=0.0), Limits(), 100, others_weight=1e-6)
    careless = fit(problem, span, free, settings, 100)
    assert problem.select.shares_at(problem.theta + careless.delta).worst_off > 0.05


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
    exact = stated(problem, theta, torch.zeros_like(theta))
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
    assert problem.select.shares_at(problem.theta + (dose - 1e-4) * delta).target < 0.5
    whole, _ = match_dose(problem, delta, 0.9999, evaluations=20)
    assert whole == pytest.approx(1.0, abs=1e-2)
    # A goal above one is a margin: shares are capped for judging, not for choosing the dose.
    past, over = match_dose(problem, 1.4 * delta, 1.02, evaluations=20)
    assert past < 1.0
    assert over.target == pytest.approx(1.02, abs=1e-2)
    # A movement that cannot reach the goal keeps its best score.
    weak, reached = match_dose(problem, 0.01 * delta, 0.9)
    assert reached.target < 0.9
    assert weak == 1.5


class Harmful(GroupedSplit):
    """Half of an edit reaches the goal too, but breaks another group that the whole edit keeps."""

    def shares_at(self, theta: Tensor) -> Shares:
        dose = float((theta - self.split.theta)[0])
        raw = {"a": 1.0 if dose > 0.3 else 0.2, "b": 0.4 if dose < 1 else 0.01}
        return Shares(raw, raw, raw, raw, ("b",), raw["a"], raw["a"], 0.0)


def test_dose_is_not_lowered_into_harm(problem: RemovalProblem) -> None:
    harmful = Harmful(problem.select.split, problem.predictor, problem.rule)
    dose, shares = match_dose(replace(problem, select=harmful), torch.ones(40), 0.9)
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


def test_targets_in_order_start_where_the_last_one_ended(problem: RemovalProblem) -> None:
    split = problem.select.split
    other = GroupRule(("a", "b"), (False, True), problem.rule.assign, "second table")
    seen = []

    def wipe(place: EvaluatedSplit, rule: GroupRule) -> RemovalResult:
        at = GroupedSplit(place, problem.predictor, rule)
        seen.append((place.theta.clone(), replace(problem, select=at).off_groups))
        part = slice(0, 20) if rule.targets[0] else slice(20, 40)
        moved = torch.zeros(40)
        moved[part] = -place.theta[part]
        edit = from_delta(place.movement.base, moved, "wipe")
        settings = FitSettings()
        return RemovalResult(edit, rule.skill, "all", 40, settings, 1.0, at.shares_at(place.theta), 0.0)

    edit, results = remove_in_order(split, [problem.rule, other], wipe)
    torch.testing.assert_close(edit.apply(problem.theta), torch.zeros(40))
    assert [result.skill for result in results] == ["first table", "second table"]
    assert seen[0][1] == [1]
    assert seen[1][1] == []  # the first table has nothing left to protect
    torch.testing.assert_close(seen[1][0][:20], torch.zeros(20))
    torch.testing.assert_close(at_weights(split, seen[1][0]).reference_loss, split.reference_loss)


def test_edit_record_is_made_for_these_weights(problem: RemovalProblem) -> None:
    delta = torch.zeros(40)
    delta[3] = 2.0
    edit = edit_of(problem, delta, "test", span="all")
    torch.testing.assert_close(edit.apply(problem.theta), problem.theta + delta)
    assert edit.provenance["skill"] == "first table"
    with pytest.raises(ValueError, match="made for"):
        edit.apply(problem.theta + 1)


# -- the library call --------------------------------------------------------------------------------


def test_remove_skill_needs_no_run_and_takes_a_label_a_mask_or_a_rule(problem: RemovalProblem) -> None:
    """The skill is one of two tables, and the span holds a row for each: the answer is known."""
    rows = torch.stack([problem.theta[:20].repeat(2), problem.theta[20:].repeat(2)])
    rows[0, 20:], rows[1, :20] = 0, 0
    rows[1, 20:] = problem.theta[20:]
    span = span_of_rows(rows / rows.norm(dim=1, keepdim=True), "tables")
    mask = problem.select.target
    plain = problem.select.split
    split = plain.on(replace(plain.tokens, skills={"first": mask, "second": ~mask}))
    budget = Budget(60, 6, 30, (0.3,))
    given = {"logits": table_logits, "limits": Limits(0.9, 0.05), "budget": budget}
    by_label = remove_skill(split, "first", span, **given)
    by_mask = remove_skill(plain, mask, span, **given)
    by_rule = remove_skill(split, problem.rule, span, unseen=tokens_of(torch.arange(10)), **given)
    for found in (by_label, by_mask, by_rule):
        assert found.shares.target > 0.9
        assert found.shares.worst_off < 0.05
        moved = found.edit.delta()
        assert float(moved[:20].norm()) > 2.0
        assert float(moved[20:].abs().max()) < 0.05
        # The damage stack of the causal test sees the same edit alike.
        change = split.damage(found.edit).by({"skill": mask})["skill"]
        room = float(split.headroom[mask].mean())
        assert change / room == pytest.approx(found.shares.target, rel=1e-4)
    assert by_label.judged is None
    assert by_rule.judged is not None
    assert by_rule.judged.target_share == pytest.approx(by_rule.shares.target, rel=1e-4)
    assert missed_bounds("first", by_rule.judged, Limits(0.9, 0.05, 1.0)) == ()


def test_remove_skill_works_on_a_hugging_face_model_with_its_defaults() -> None:
    from polca_edit.tokens import next_token_loss

    model = tiny_gpt2()
    space = ParameterSpace.from_module(model)
    start = space.read(model)
    inputs = torch.arange(12).repeat(4, 1).view(8, 6) % 6
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        optimiser.zero_grad()
        next_token_loss(model, inputs).mean().backward()
        optimiser.step()
    theta = space.read(model)
    outputs = inputs[:, 1:].clone()
    scored = torch.ones_like(outputs, dtype=torch.bool)
    tokens = TokenSet(inputs, scored, torch.arange(8), {"threes": outputs.flatten() == 3}, outputs)
    loss = Objective(model, next_token_loss, space)
    split = EvaluatedSplit(loss, open_checkpoints({0: start, 30: theta}, space), tokens)
    span = span_by_tensor((theta - start)[None], space, "movement", block=16)
    found = remove_skill(split, "threes", span, budget=Budget(20, 2, 8, (0.02,)), unseen=tokens)
    assert found.judged is not None
    assert found.judged.target_share > 0.3
    assert_inside(span, found.edit.delta())
    assert torch.equal(space.read(model), theta)  # the module itself is as it was


def test_what_remove_skill_cannot_do_is_said(problem: RemovalProblem) -> None:
    split, span = problem.select.split, whole_space(40)
    with pytest.raises(ValueError, match="labelled with"):
        remove_skill(split, "third", span, logits=table_logits)
    with pytest.raises(ValueError, match="mask names tokens"):
        remove_skill(split, problem.select.target, span, unseen=split.tokens, logits=table_logits)
    assert set(BUDGETS) == {"small", "medium", "large"}


def test_missed_bounds_are_named(problem: RemovalProblem) -> None:
    nothing = from_delta(problem.select.split.movement.base, torch.zeros(40), "nothing")
    judged = judged_edit(problem, nothing, problem.select.tokens)
    (sentence,) = missed_bounds("first", judged, Limits(0.9))
    assert "must reach 90.0%" in sentence
    everything = from_delta(problem.select.split.movement.base, -problem.theta, "everything")
    sentences = missed_bounds("first", judged_edit(problem, everything, problem.select.tokens), Limits(0.9))
    assert ["headroom, the worst loses" in sentences[0], "(KL)" in sentences[1]] == [True, True]
