"""The study of removal by undoing: retraining against the recorded run, rows kept, tables by hand."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments.cli import app
from experiments.removal.undo import study
from experiments.removal.undo.methods import GOLD, METHODS, NEEDS, SHARED, Start
from experiments.removal.undo.place import Effort, Place
from experiments.removal.undo.rows import Curve, Row, best_attack, gap, half_lost, repaired_at
from experiments.removal.undo.study import Job, chosen, rows_of, start_of, with_gold
from experiments.removal.undo.tables import study_tables
from experiments.report.figures.undo import UndoRow, draw
from experiments.run.run import load_run
from experiments.run.stages.training import training_settings
from experiments.tasks import arithmetic
from experiments.tasks.arithmetic import data_of
from interventions.removal.grouped import GroupRule
from polca_edit.artifacts import from_plain, to_plain
from polca_edit.training import train

EFFORT = Effort(12, 1, 2, 4, 2, rates=(1.0, 4.0), axis_directions=6, noise=(0.2,))


@pytest.fixture(scope="module")
def place(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    import shutil

    copied = shutil.copytree(smoke_run, tmp_path_factory.mktemp("study") / "smoke-0")
    torch.set_num_threads(1)
    return Place(load_run(copied, lambda _: None), "1000s", EFFORT)


def test_gold_is_training_without_the_skills_tokens(place: Place) -> None:
    """The same loop written out: the loss of the recorded batches over all slots but the first."""
    run = place.run
    data, module = data_of(run.config), copy.deepcopy(run.task.module)

    def loss(model: torch.nn.Module, step: int) -> torch.Tensor:
        return arithmetic.token_loss(model, data.batch(step))[:, 1:].mean()

    train(module, loss, training_settings(run.config))
    torch.testing.assert_close(place.trained_without(), run.task.space.read(module), atol=1e-5, rtol=1e-4)


def test_going_on_from_a_recorded_state_with_nothing_masked_is_the_recorded_run(place: Place) -> None:
    other = Place(place.run, "1000s", EFFORT)
    rule = GroupRule(("none", "all"), (True, False), lambda t: torch.ones(t.count, dtype=torch.long))
    # A cached value of a frozen record lives in its dictionary.
    other.__dict__["rule"] = rule
    other.__dict__["problem"] = replace(place.problem, select=replace(place.problem.select, rule=rule))
    last = place.run.checkpoints()[-1]
    torch.testing.assert_close(other.trained_without(30), last, atol=1e-5, rtol=1e-4)
    assert float((place.trained_without(30) - last).norm()) > 0.01


def test_every_method_moves_the_weights_and_says_what_it_cost(place: Place) -> None:
    theta, done = place.problem.theta, {}

    def made(name: str) -> Start:
        if name not in done:
            needed = {other: made(other) for other in NEEDS.get(name, ())}
            done[name] = {**SHARED, **METHODS}[name](place, needed)
        return done[name]

    for name in METHODS:
        start = made(name)
        assert torch.isfinite(start.theta).all(), name
        moved = float((start.theta - theta).norm())
        assert (moved == 0.0) == (name == "untouched"), name
        assert (start.passes > 0) == (name != "untouched"), name
    # A method that stands on another one pays for it too.
    for name, needed in NEEDS.items():
        assert done[name].passes >= sum(done[other].passes for other in needed)
    whole = place.training_passes
    assert done[GOLD].passes == whole
    # Both ways of putting all of it back are the checkpoint at the window's start.
    series = place.problem.select.split.series
    back = series[series.steps.index(place.own.start)]
    torch.testing.assert_close(done["return to the window"].theta, back, atol=1e-5, rtol=1e-4)


def test_repair_steps_lie_on_one_path(place: Place) -> None:
    start = start_of(place, "return to the window")
    found = repaired_at(place, "return to the window", start, [0, 2, 4], None)
    assert torch.equal(found[0][0], start.theta)
    assert found[0][1] < found[2][1] < found[4][1]
    alone = repaired_at(place, "return to the window", start, [2], None)
    torch.testing.assert_close(alone[2][0], found[2][0], atol=1e-6, rtol=0)
    # Six sequences of training per step: a forward with its backward counts three.
    assert found[4][1] == 4 * 3 * EFFORT.sums


def test_rows_are_kept_and_found_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(place.run.directory.path, "1000s", "return to the window", (0, 2), EFFORT)
    first = rows_of(job)
    assert [row.repair_steps for row in first] == [0, 2]
    assert first[1].passes == first[0].passes + 2 * 3 * EFFORT.sums
    assert {(c.fraction, c.rate) for c in first[0].relearning} == {
        (0.0, 1.0),
        (0.01, 1.0),
        (1.0, 1.0),
        (0.1, 4.0),
    }
    assert first[0].target_loss == first[0].relearn.loss[0]

    def never(*args: object, **more: object) -> Row:
        raise AssertionError("a kept row was measured again")

    monkeypatch.setattr(study, "measured", never)
    assert rows_of(job) == first
    # What was measured in full need not be measured again in short.
    assert rows_of(replace(job, whole=False)) == first
    assert rows_of(replace(job, repairs=(2, 4), kept=True)) == first
    with pytest.raises(AssertionError, match="measured again"):
        rows_of(replace(job, repairs=(4,)))


def row(method: str, losses: tuple[float, ...], **given: object) -> Row:
    curve = Curve(0.1, 1.0, tuple(range(0, 20 * len(losses), 20)), losses, tuple(0.1 for _ in losses))
    values: dict[str, object] = {
        "skill": "10s", "method": method, "seed": 0, "setting": "", "repair_steps": 60,
        "target_loss": losses[0], "target_accuracy": 0.1, "chance": 2.0, "gold_loss": None,
        "worst_other_share": 0.01, "group_shares": {}, "kept_after_relabelling": 1.0, "relearn": curve,
        "relearning": (), "passes": 10.0, "passes_share": 0.1, "seconds": 1.0, "measured_seconds": 1.0,
        "edit_norm": 1.0, "tried": (),
    }  # fmt: skip
    return Row(**{**values, **given})


def test_gaps_by_hand() -> None:
    rows = with_gold(
        [row(GOLD, (6.0, 4.0, 2.0)), row("GradDiff", (9.0, 2.0, 0.5)), row("untouched", (0.0, 0.0, 0.0))]
    )
    gold, pushed, trained = rows
    assert (gold.gap, gold.gap_to_ignorance) == (0.0, 0.0)
    assert pushed.gold_loss == 6.0
    assert pushed.gap == pytest.approx((0.5 + 0.75) / 2)
    # Chance is 2 nats: at the first step the model knows no more than one that was never taught.
    assert pushed.gap_to_ignorance == pytest.approx((0.0 + 0.75) / 2)
    assert (trained.gap, trained.half_steps) == (1.0, 0)
    assert (gold.half_steps, pushed.half_steps) == (None, 40)
    assert half_lost((0, 20), (2.0, 1.0), 2.0, 0.0) == 20
    # What the model that was never taught lacks too is no damage; a gain of it is not counted against others.
    lost, lacking = {"1s": 0.5, "100s": 0.1, "10s": 1.0}, {"1s": 0.4, "100s": -0.2, "10s": 1.0}
    beside = with_gold(
        [row(GOLD, (6.0, 4.0), group_shares=lacking), row("NPO", (6.0, 4.0), group_shares=lost)]
    )
    assert beside[1].beyond_gold == pytest.approx(0.1)
    assert beside[0].beyond_gold == pytest.approx(0.0)
    # Parts of the skill are no others: the timeline predicts for others alone.
    parts = {**lost, "10s": 2.0, "10s+carry": 3.0}, {**lacking, "10s+carry": 1.0}
    split = [
        row(method, (6.0, 4.0), group_shares=shares, predicted={"10s": 1.0, "1s": 0.3, "100s": 0.0})
        for method, shares in (("NPO", parts[0]), (GOLD, parts[1]))
    ]
    assert with_gold(split)[0].beyond_gold == pytest.approx(0.1)
    # Without gold nothing is said about it; more than the gold's loss is no negative gap.
    assert with_gold([row("NPO", (1.0, 1.0))])[0].gap is None
    assert gap((0.0, 9.0), (0.0, 3.0)) == 0.0
    fast = replace(row("NPO", (3.0, 1.0)), relearning=(Curve(0.1, 4.0, (0, 20), (3.0, 0.2), (0.1, 0.1)),))
    assert best_attack(fast) == pytest.approx((3.0, 0.2))


def test_table_and_figure(tmp_path: Path) -> None:
    rows = with_gold([row("NPO", (2.0, 0.5, 0.1)), row(GOLD, (6.0, 4.0, 2.0)), row("CIR", (2.0, 2.0, 1.9))])
    (table,) = study_tables([*rows, replace(rows[0], seed=1, gap_to_ignorance=0.9)])
    lines = [line.split(" | ")[1] for line in table.markdown().splitlines()[2:]]
    assert lines == [GOLD, "CIR", "NPO"]  # by how long the removal lasts
    npo = table.markdown().splitlines()[-1].replace("\u00a0", " ")
    assert npo.startswith("| 10s | NPO | 2 | 60 |")
    draw(from_plain(list[UndoRow], to_plain(rows)), tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 5000
    by_method = sorted(rows, key=lambda r: list(METHODS).index(r.method))
    assert study.read_rows(written(tmp_path, rows)) == by_method
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a result of polca-edit study removal"):
        study.read_rows(tmp_path / "other.json")


def written(folder: Path, rows: list[Row]) -> Path:
    from experiments.config import load_config

    file = folder / "result.json"
    study._written(file, [(folder, load_config("smoke"))], EFFORT, rows)
    return file


def test_the_verb_writes_what_it_promises(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(study.EFFORTS, "smoke", EFFORT)
    file = tmp_path / "result.json"
    given = ["--preset", "smoke", "--skills", "1000s", "--methods", "untouched;return to the window"]
    runs = ["--runs", str(place.run.directory.path.parent), "--workers", "1", "--repair", "0,2"]
    ran = CliRunner().invoke(app, ["study", "removal", *given, *runs, "--json", str(file)])
    assert ran.exit_code == 0, ran.output
    values = json.loads(file.read_text())
    assert {"config", "seeds", "versions", "hardware", "rows", "effort"} <= set(values)
    wanted = {"skill", "method", "seed", "target_loss", "chance", "gold_loss", "worst_other_share", "relearn"}
    for line in values["rows"]:
        assert wanted | {"passes", "seconds"} <= set(line)
        assert {"fraction", "steps", "loss"} <= set(line["relearn"])
    assert [(r["method"], r["repair_steps"]) for r in values["rows"]] == [
        ("untouched", 0), ("return to the window", 0), ("return to the window", 2),
    ]  # fmt: skip
    for wrong, words in (
        (["--skills", "12s"], "a skill must be one of"),
        (["--methods", "magic"], "a method must be one of"),
        (["--repair", "some"], "whole numbers"),
    ):
        refused = CliRunner().invoke(app, ["study", "removal", "--preset", "smoke", *runs[:2], *wrong])
        assert words in str(refused.exception)
    assert chosen("10s, 1s", ("1s", "10s"), "skill") == ("10s", "1s")
