"""``polca-edit remove --method return|rollback|axis``: what is said first, the edit, bounds, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments.application import single
from experiments.removal.apply import apply
from experiments.removal.undo.records import RemovalFile
from experiments.removal.undo.remove import UndoOptions, adapted, repair_batches, undo_of, windows_of
from experiments.removal.verb import logits_of, remove
from experiments.run.run import load_run
from experiments.verbs.targets import fit_stream, skill_groups
from interventions.damage import EvaluatedSplit
from interventions.edit_files import load_edit
from interventions.edits import from_delta, weights_fingerprint
from interventions.removal.grouped import GroupedSplit, GroupRule, Predictor
from polca_edit.artifacts import load_record
from polca_edit.checkpoints.files import SeriesFolder, read_weights

ANYTHING = ["--target", "0", "--off", "100", "--kl", "100"]


def invoke(run: Path, *given: str):
    return CliRunner().invoke(single(remove), [str(run), "--skill", "1000s", *given])


def test_return_says_first_what_falls_and_saves_both_parts(smoke_copy: Path, tmp_path: Path) -> None:
    given = ["--method", "return", "--repair", "4", "--relearn", "4", "--lora", "2", *ANYTHING]
    found = invoke(smoke_copy, *given)
    assert found.exit_code == 0, found.output
    said = found.output.splitlines()
    assert said[0].strip().startswith("1000s was learned in steps ")
    assert "training steps, " in found.output.split("undone: steps")[0]
    (removal,) = load_record(RemovalFile, smoke_copy / "edits" / "1000s.result.json").removals
    assert removal.undone is not None
    assert removal.returned is not None
    assert removal.adapter is not None
    assert removal.returned.steps == (0, 1, 2, 3, 4)
    assert removal.undone.forecast.fraction > 0.5
    plan = json.loads(next((smoke_copy / "plans").glob("remove-*.json")).read_text())
    assert (plan["method"], plan["repair_steps"]) == ("return", 4)
    # The saved edit leads to the weights it is said to lead to, in the file that apply writes.
    run = load_run(smoke_copy, lambda _: None)
    theta, edit = run.checkpoints()[-1], load_edit(smoke_copy / "edits" / "1000s").edit
    assert edit.provenance["method"] == "return"
    assert edit.provenance["parts"][0]["operator"] == "rollback_rewind"
    weights = SeriesFolder(run.directory.checkpoints).weights(run.config.training.steps)
    edited = ["edits/1000s.json", str(weights), "--out"]
    put = [str(smoke_copy / edited[0]), *edited[1:]]
    assert CliRunner().invoke(single(apply), [*put, str(tmp_path / "half"), "--dose", "0.5"]).exit_code == 0
    half = run.task.space.flatten(read_weights(tmp_path / "half" / weights.name))
    torch.testing.assert_close(half, theta + 0.5 * edit.delta())
    back = [put[0], str(tmp_path / "half"), "--undo", "--out", str(tmp_path / "back")]
    assert CliRunner().invoke(single(apply), back).exit_code == 0
    assert (tmp_path / "back" / weights.name).read_bytes() == weights.read_bytes()


def test_a_missed_bound_of_undoing_ends_with_one(smoke_copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "undone"  # not in the run, so that no report is drawn
    given = [
        "--out",
        str(out),
        "--method",
        "rollback",
        "--repair",
        "0",
        "--window",
        "54:60",
        "--target",
        "1",
        "--off",
        "0",
    ]
    found = invoke(smoke_copy, *given)
    assert found.exit_code == 1
    assert "no repair was asked for: what falls stays fallen" in found.output
    assert "polca-edit: 1000s: damage must reach 100.0% of the headroom" in found.output
    assert load_edit(out).edit.operator == "rollback"
    (removal,) = load_record(RemovalFile, tmp_path / "undone.result.json").removals
    assert removal.undone is not None
    assert [str(w) for w in removal.undone.windows] == ["54:60"]
    assert removal.undone.repair_norm == 0.0


def test_only_movement_along_the_axis_is_undone(smoke_copy: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "axis")]
    found = invoke(smoke_copy, *out, "--method", "axis", "--basis", "trajectory", "--repair", "0", *ANYTHING)
    assert found.exit_code == 0, found.output
    edit = load_edit(tmp_path / "axis").edit
    run = load_run(smoke_copy, lambda _: None)
    series = run.checkpoints()
    assert edit.rank == 1
    along = float(edit.rows[0].double() @ (series[-1] - series[0]).double())
    assert float(edit.coordinates[0]) == pytest.approx(-along, rel=1e-4)


def test_what_cannot_be_undone_is_refused_before_anything_is_opened(smoke_copy: Path) -> None:
    for given, words in (
        (["--method", "rewind"], "--method must be one of span, axis, rollback, return"),
        (["--method", "return", "--skill", "1s"], "takes out one skill at a time, got 2"),
        (["--method", "return", "--window", "7"], "must be two steps START:END"),
        (["--method", "return", "--window", "60:54"], "must end after it starts"),
        (["--method", "return", "--window", "1:60"], "both at recorded steps"),
        (["--relearn", "4"], "belong to undoing"),
        (["--window", "6:60", "--window", "6:54"], "both say where to search"),
    ):
        found = invoke(smoke_copy, *given)
        assert found.exit_code != 0
        assert words in str(found.exception)
    assert not (smoke_copy / "edits").exists()
    assert not (smoke_copy / "plans").exists()


def test_repair_never_sees_select_or_labels_it_does_not_have(smoke_run: Path) -> None:
    run = load_run(smoke_run, lambda _: None)
    rule = skill_groups(run, "1000s")
    fresh = fit_stream(run, 8)
    assert repair_batches(run, rule, fresh, 8) is fresh
    text = replace(run, task=replace(run.task, fresh=None))
    batch = repair_batches(text, rule, fresh, 8)
    assert batch is not None
    rows = {tuple(row.tolist()) for row in run.task.splits.curvature.inputs}
    assert {tuple(row.tolist()) for row in batch(3).inputs} <= rows
    assert torch.equal(batch(3).inputs, batch(3).inputs)

    def unknown(tokens):
        return tokens.skills["only where it was tagged"]

    assert repair_batches(text, GroupRule(("a", "b"), (True, False), unknown), fresh, 8) is None


def test_settings_come_from_the_run(smoke_run: Path) -> None:
    run = load_run(smoke_run, lambda _: None)
    undo = undo_of(run, UndoOptions("axis", ("6:12",), 7))
    assert (undo.method, undo.training.steps) == ("rollback", 7)
    assert undo.training.learning_rate == 1.5 * run.config.training.learning_rate
    assert undo.training.warmup == 0
    assert windows_of(["6:12"]) == undo.windows
    # A tenth of the sixty recorded steps is too few to anneal over.
    assert undo_of(run, UndoOptions("return")).training.steps == 20


def test_an_adapter_of_full_rank_does_what_its_matrices_do(smoke_run: Path) -> None:
    run = load_run(smoke_run, lambda _: None)
    theta, space = run.checkpoints()[-1], run.task.space
    split = EvaluatedSplit(run.objective, run.checkpoints(), run.task.splits.select)
    judged = GroupedSplit(split, Predictor(run.objective, logits_of(run)), skill_groups(run, "1000s"))
    moved = (run.checkpoints()[0] - theta) * space.mask(["blocks.*.mlp.*.weight"])
    edit = from_delta(weights_fingerprint(theta), moved, "any")
    whole, kept = adapted(run, judged, edit, 64)
    torch.testing.assert_close(whole.delta(), edit.delta(), atol=1e-5, rtol=1e-4)
    assert kept.norm_share == pytest.approx(1.0, abs=1e-5)
    assert kept.target_share == pytest.approx(judged.shares_at(theta + moved).target, abs=1e-4)
    _, less = adapted(run, judged, edit, 1)
    values = [torch.linalg.svdvals(part) for part in space.unflatten(moved).values() if part.ndim == 2]
    first = sum(float(v[0] ** 2) for v in values) / sum(float(v.square().sum()) for v in values)
    assert less.norm_share == pytest.approx(first, rel=1e-3)
