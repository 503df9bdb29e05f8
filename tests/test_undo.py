"""Removal by undoing. Oracle: tables whose movement is written down, so that what falls is known exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from interventions.damage import EvaluatedSplit
from interventions.discovery.windows import Window
from interventions.edit_files import load_edit, save_edit
from interventions.removal.grouped import GroupedSplit, GroupRule, Predictor
from interventions.removal.measures import chance_loss
from interventions.removal.problem import RemovalProblem
from interventions.removal.remove import remove_skill
from interventions.removal.tuning import label_loss, masked_batches, tuned
from interventions.removal.undo import (
    UNDO_LIMITS,
    Undo,
    interpolated,
    repair_settings,
    repaired,
    replayed,
    undo_skill,
)
from interventions.removal.windows import (
    candidate_windows,
    forecast,
    merged,
    movement_rows,
    recommended,
    skill_timeline,
    undoing,
    with_descendants,
)
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet
from polca_edit.training import TrainingSettings
from tests.test_removal import TwoTables, answers_of, table_logits, table_loss, tokens_of

#: step -> (how much of the skill's table is learned, how much of the other's).
LEARNED = {0: (0, 0), 10: (0, 2), 20: (0, 3), 30: (2, 3), 40: (4, 3), 50: (4, 4)}
RULE = GroupRule(("skill", "other"), (True, False), lambda t: t.inputs[t.scored.any(1)][:, 0] // 5, "skill")
REPAIR = TrainingSettings(40, 0.1, weight_decay=0.0, warmup=0)


def batch(step: int) -> TokenSet:
    return tokens_of(torch.randint(0, 10, (40,), generator=torch.Generator().manual_seed(step)))


@pytest.fixture
def problem() -> RemovalProblem:
    return problem_of(LEARNED)


def problem_of(learned: dict[int, tuple[float, float]]) -> RemovalProblem:
    loss = Objective(TwoTables(), table_loss)
    right = nn.functional.one_hot(answers_of(torch.arange(10)), 4).float()
    series = open_checkpoints(
        {
            step: loss.space.flatten({"first": a * right[:5], "second": b * right[5:]})
            for step, (a, b) in learned.items()
        },
        loss.space,
    )
    split = EvaluatedSplit(loss, series, tokens_of(torch.arange(10).repeat(3)))
    return RemovalProblem(GroupedSplit(split, Predictor(loss, table_logits), RULE), batch, UNDO_LIMITS)


def test_rollback_takes_the_window_and_leaves_the_rest(problem: RemovalProblem) -> None:
    series, theta = problem.select.split.series, problem.theta
    moved = undoing(series, (Window(20, 40),), "rollback").moved(theta)
    assert float(moved[:20].abs().max()) < 1e-6
    torch.testing.assert_close(moved[20:], theta[20:])
    # The window's halves undone one after the other are the same movement, overlapping ones not twice.
    halves = undoing(series, (Window(30, 40), Window(20, 30), Window(20, 40)), "rollback")
    torch.testing.assert_close(halves.moved(theta), moved, atol=1e-6, rtol=0)
    back = undoing(series, (Window(20, 40),), "return").moved(theta)
    torch.testing.assert_close(back, series[2], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="both at recorded steps, got 21:40"):
        undoing(series, (Window(21, 40),), "rollback")


def test_only_movement_along_given_rows_is_undone(problem: RemovalProblem) -> None:
    series, theta = problem.select.split.series, problem.theta
    row = torch.zeros(1, 40)
    row[0, :4] = theta[:4] / theta[:4].norm()
    moved = undoing(series, (Window(20, 40),), "rollback", row).moved(theta)
    assert float(moved[:4].abs().max()) < 1e-6
    assert torch.equal(moved[4:], theta[4:])


def test_the_forecast_names_the_window_and_what_falls(problem: RemovalProblem) -> None:
    timeline = skill_timeline(problem.select)
    said = forecast(timeline, "skill")
    assert (said.window.start, said.window.end) == (20, 40)
    assert said.share == pytest.approx(1.0, abs=1e-4)
    assert said.falls["other"] == pytest.approx(0.0, abs=1e-6)
    assert said.fraction == 0.6
    assert "and no other group" in said.sentences()[0]
    # Undoing the other's own window (0:20) in the final model takes the other alone.
    other = forecast(timeline, "other")
    assert other.falls["skill"] == pytest.approx(0.0, abs=1e-6)
    assert with_descendants(timeline, "skill") == [timeline.own("skill").window]
    windows = candidate_windows(timeline, "skill")
    assert [(w.start, w.end) for w in windows] == [(20, 40), (10, 40), (0, 40)]
    assert merged([Window(0, 20), Window(20, 40)]) == [Window(0, 40)]
    # A skill without a fall is refused.
    unknown = replace(timeline, effects=())
    with pytest.raises(ValueError, match="must be learned in the recorded steps"):
        forecast(unknown, "skill")


def test_a_skill_that_is_deepened_after_its_fall_is_undone_to_the_end_of_that() -> None:
    # Its loss is down to .05 nats at step 30, its logits go on growing; the other is learned before.
    deep = problem_of({0: (0, 0), 10: (0, 3), 20: (0, 4), 30: (4, 4), 40: (12, 4), 50: (20, 4)})
    timeline = skill_timeline(deep.select)
    own = timeline.own("skill").window
    assert (own.start, own.end) == (20, 30)
    window = recommended(deep.select, own, "rollback", UNDO_LIMITS)
    assert (window.start, window.end) == (10, 50)
    assert recommended(deep.select, own, "return", UNDO_LIMITS).end == 30
    edit, done, shares = undo_skill(deep, Undo("rollback", training=replace(REPAIR, steps=0)))
    assert done.windows == (window,)
    assert shares.target == pytest.approx(1.0, abs=0.01)
    assert abs(shares.worst_off) < 0.2
    # Undoing its fall alone would have left what it needs.
    left = undoing(deep.select.split.series, (own,), "rollback").moved(deep.theta)
    assert deep.select.shares_at(left).target < 0.01
    # What is as good with the shorter window keeps it.
    short = problem_of(LEARNED)
    first = skill_timeline(short.select).own("skill").window
    assert recommended(short.select, first, "rollback", UNDO_LIMITS).end == first.end


def test_repair_mends_the_others_and_never_the_skill(problem: RemovalProblem) -> None:
    start = problem.select.split.series[1]
    found = repaired(problem, start, REPAIR, every=10)
    assert 0 < found.steps <= 40  # of looks that lose nothing the first one is kept
    # The skill's table got no gradient at all, its tokens were masked.
    assert torch.equal(found.theta[:20], start[:20])
    assert found.shares.worst_off < problem.select.shares_at(start).worst_off / 2
    # With every label given back the skill is learned too.
    given = label_loss(problem.predictor, masked_batches(batch, RULE, 1.0))
    assert float(tuned(problem.predictor, start, given, REPAIR)[:20].abs().sum()) > 1.0
    none = masked_batches(batch, RULE, 0.0)(3)
    assert not bool((none[1] & RULE.is_target(RULE.assign(none[0]))).any())
    # Held directions stay where they were.
    rows = movement_rows(problem.select, Window(0, 10), 1)
    held = repaired(problem, start, REPAIR, every=40, hold=rows)
    assert float((rows @ (held.theta - start)).abs().max()) < 1e-5
    assert float((rows @ (found.theta - start)).abs().max()) > 0.1


def test_repair_keeps_the_best_look(problem: RemovalProblem) -> None:
    # The decay takes everything away at every step, so the start is the best there is.
    wild = TrainingSettings(20, 0.5, weight_decay=2.0, warmup=0)
    found = repaired(problem, problem.select.split.series[2], wild, every=5)
    looked = problem.select.shares_at(found.theta)
    assert looked.raw == found.shares.raw
    assert found.steps == 0


@pytest.mark.parametrize("method", ["rollback", "return"])
def test_remove_skill_by_undoing(problem: RemovalProblem, method: str, tmp_path) -> None:
    split, unseen = problem.select.split, tokens_of(torch.arange(10))
    undo = Undo(method, training=REPAIR, probe=4, compare=True)
    found = remove_skill(split, RULE, undo, logits=table_logits, batch=batch, unseen=unseen)
    assert found.judged is not None
    assert found.judged.target_share == pytest.approx(1.0, abs=1e-3)
    assert found.judged.worst_off_share < 0.02
    assert found.undone is not None
    assert len(found.undone.tried) == 3
    # Both parts are in the edit: where undoing alone ends is found again from its coordinates.
    edit = found.edit
    back = undoing(split.series, found.undone.windows, method)
    first = torch.tensor(edit.provenance["coordinates_of_undoing"], dtype=torch.float64) @ edit.rows.double()
    torch.testing.assert_close(first.float(), back.delta(), atol=1e-5, rtol=0)
    assert [part["operator"] for part in edit.provenance["parts"]][-1] in ("repair", back.operator)
    save_edit(tmp_path / "edit", edit, split.loss.space)
    again = load_edit(tmp_path / "edit").edit
    assert torch.equal(again.apply(split.theta), edit.apply(split.theta))
    assert again.provenance["windows"] == [str(w) for w in found.undone.windows]


def test_without_data_nothing_is_repaired(problem: RemovalProblem) -> None:
    found = remove_skill(problem.select.split, RULE, Undo("return"), logits=table_logits)
    assert found.undone is not None
    assert found.undone.repair_steps == 0
    assert found.undone.repair_norm == 0.0
    assert found.edit.operator == "return"
    # Going back also loses what came later: the other table was finished after the window.
    assert found.shares.worst_off > 0.02
    with pytest.raises(ValueError, match="'rollback' or 'return'"):
        Undo("rewind")


def test_windows_that_are_given_are_not_chosen(problem: RemovalProblem) -> None:
    undo = Undo("rollback", (Window(30, 40),), training=replace(REPAIR, steps=0))
    edit, record, shares = undo_skill(problem, undo)
    assert record.tried == ()
    assert record.windows == (Window(30, 40),)
    assert 0.0 < shares.target < 0.9
    assert edit.norm == pytest.approx(record.undone_norm)


def test_replay_and_interpolation_are_what_they_say(problem: RemovalProblem) -> None:
    series, theta = problem.select.split.series, problem.theta
    axis = torch.zeros(1, 40)
    axis[0, 20:] = theta[20:] / theta[20:].norm()
    moved = replayed(series, Window(20, 30), axis).moved(theta)
    # theta_s + (I - P)(theta_T - theta_e): the skill's later half is replayed, the other's later part is not.
    torch.testing.assert_close(moved[:20], theta[:20] / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[20:], series[3][20:], atol=1e-5, rtol=0)
    first, second = (undoing(series, (Window(a, b),), "rollback") for a, b in ((20, 40), (0, 20)))
    half = interpolated(first, second, 0.25).moved(theta)
    torch.testing.assert_close(half, theta + 0.75 * first.delta() + 0.25 * second.delta())


def test_chance_is_the_entropy_of_the_answers() -> None:
    assert chance_loss(torch.tensor([3, 3, 3])) == 0.0
    assert chance_loss(torch.arange(10)) == pytest.approx(2.302585, abs=1e-6)


def test_by_default_undoing_begins_half_a_window_before_the_fall(problem: RemovalProblem) -> None:
    _, record, _ = undo_skill(problem, Undo("rollback", training=replace(REPAIR, steps=0)))
    assert record.tried == ()
    assert [(w.start, w.end) for w in record.windows] == [(10, 40)]


def test_repair_anneals_from_above_trainings_rate_to_nothing() -> None:
    settings = repair_settings(10, 1e-3)
    rates = [settings.rate(step) for step in range(1, 11)]
    assert rates[0] < 1.5e-3
    assert rates == sorted(rates, reverse=True)
    assert rates[4] == pytest.approx(0.75e-3)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
