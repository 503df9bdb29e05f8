"""Removal on cases with a known gold model. Oracles: the twin trained by hand, recorded weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_undo_study import row

from experiments.natural import columns
from experiments.natural.cases import CASES
from experiments.removal.undo import cases
from experiments.removal.undo.cases import (
    CaseSettings,
    case_rows,
    case_table,
    never_taught,
    reached,
    run_of,
    undone,
)
from experiments.removal.undo.methods import GOLD
from experiments.removal.undo.place import Effort, Place
from experiments.removal.undo.study import with_gold
from polca_edit.training import train

TINY = CaseSettings(Effort(12, 1, 2, 4, 2, rates=(1.0,)), every=5)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "BEGIN", 16)
    monkeypatch.setattr(columns, "TUNED", 48)
    monkeypatch.setattr(columns, "BATCH", 64)
    monkeypatch.setattr(cases, "BATCH", 64)


@pytest.mark.usefixtures("short")
def test_a_case_and_its_gold_model(tmp_path: Path) -> None:
    case = CASES["backdoor"]
    run, natural = run_of(case, 0, tmp_path)
    place = Place(run, "triggered", TINY.effort)
    # The groups are the labels, on select and on new data, which hold both marks.
    tokens = place.draws("fit")(3)
    assert tokens.sequences == 12
    for part in (tokens, run.task.splits.evaluate):
        assert torch.equal(place.rule.is_target(place.rule.assign(part)), part.skills["triggered"])
    # Gold is the twin: the mark means nothing, from the same first weights.
    twin = case.build(0, True)
    assert twin.task.batch_loss is not None
    torch.testing.assert_close(twin.task.space.read(twin.task.module), place.problem.select.split.series[0])
    train(twin.task.module, twin.task.batch_loss, twin.training)
    gold = never_taught(place, case)
    torch.testing.assert_close(gold.theta, twin.task.space.read(twin.task.module), atol=1e-6, rtol=1e-5)
    assert gold.passes == 3 * 48 * 64
    # Up to the step at which the mark gets its answer both are one run: going back there is gold's own past.
    series, before = place.problem.select.split.series, case.build(0, True)
    assert before.task.batch_loss is not None
    train(before.task.module, before.task.batch_loss, replace(before.training, steps=16))
    torch.testing.assert_close(
        series[series.steps.index(16)], before.task.space.read(before.task.module), atol=1e-6, rtol=1e-5
    )
    start, steps = undone(place, natural, "return to before the data", TINY)
    assert start.setting == "16:48"
    assert 0 <= steps <= 20
    # What every way does is kept, and read back.
    ways = (GOLD, "return to before the data", "GradDiff")
    rows = with_gold(case_rows(case, 0, tmp_path, TINY, ways))
    assert [r.method for r in rows] == list(ways)
    losses = columns.token_loss(twin.task.module, run.task.splits.evaluate.inputs).flatten().detach()
    told = float(losses[run.task.splits.evaluate.skills["triggered"]].mean())
    assert rows[0].target_loss == pytest.approx(told, rel=1e-4)
    assert rows[1].gold_loss == rows[0].target_loss
    assert all(r.passes > 0 and r.relearn.steps == (0, 2, 4) for r in rows)
    again = case_rows(case, 0, tmp_path, TINY, ways)
    assert [r.measured_seconds for r in again] == [r.measured_seconds for r in rows]


def test_what_counts_as_reached() -> None:
    rows = [
        row(GOLD, (6.0, 4.0, 2.0), worst_other_share=0.0),
        row("rollback and repair", (5.0, 3.6, 1.8)),
        row("return and repair", (4.7, 4.0, 2.0)),
        row("NPO", (9.0, 2.0, 0.5)),
    ]
    assert [reached(r) for r in with_gold(rows)] == [None, (True, True), (False, True), (True, False)]
    # One fixed answer: the best constant answer is the skill itself, and says nothing about ignorance.
    fixed = with_gold([replace(r, chance=0.0) for r in rows])
    assert [r.gap_to_ignorance for r in fixed] == [None] * 4
    assert [r.half_steps for r in fixed] == [None] * 4
    lines = [line.split(" | ") for line in case_table({"backdoor": fixed}).markdown().splitlines()[2:]]
    assert [line[1] for line in lines] == [GOLD, "return and repair", "rollback and repair", "NPO"]
    assert [line[-1].strip(" |") for line in lines] == ["-", "1/1", "1/1", "0/1"]
    assert [line[-2] for line in lines] == ["-", "0/1", "1/1", "1/1"]
