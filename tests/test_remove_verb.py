"""``polca-edit remove``: openings of the evaluate split, bounds and exit codes, targets that do not exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments.application import single
from experiments.removal.undo.records import RemovalFile
from experiments.removal.verb import remove
from experiments.run.run import load_run
from experiments.run.run_record import read_run_record
from experiments.run.stages.clusters import ClusterRecord
from experiments.run.store import RunDirectory
from experiments.tasks.arithmetic import first_and_second
from experiments.verbs.targets import cluster_groups, fit_stream, skill_groups
from interventions.edit_files import load_edit
from polca_edit.artifacts import load_record

ANYTHING = ["--target", "0", "--off", "100", "--kl", "100"]


def invoke(run: Path, *given: str):
    return CliRunner().invoke(single(remove), [str(run), "--budget", "small", *given])


def test_every_look_at_the_evaluate_split_is_counted_and_later_plans_are_marked(smoke_copy: Path) -> None:
    """The run itself opened the split first; a removal is another plan, and the same one counts on."""
    before = read_run_record(RunDirectory(smoke_copy)).evaluate_openings
    given = ["--skill", "1000s", *ANYTHING]
    for times in (1, 2):
        assert invoke(smoke_copy, *given).exit_code == 0
        openings = read_run_record(RunDirectory(smoke_copy)).evaluate_openings
        assert openings[:-1] == before
        assert (openings[-1].by, openings[-1].exploratory, openings[-1].times) == ("remove", True, times)
    (plan,) = (smoke_copy / "plans").glob("remove-*.json")
    assert json.loads(plan.read_text())["targets"] == ["1000s"]
    assert json.loads(plan.read_text())["sha256"] == openings[-1].plan
    assert load_record(RemovalFile, smoke_copy / "edits" / "1000s.result.json").exploratory
    invoke(smoke_copy, "--skill", "1s", *ANYTHING)
    assert len(read_run_record(RunDirectory(smoke_copy)).evaluate_openings) == len(before) + 2


def test_a_missed_bound_ends_with_one_and_a_sentence_but_the_edit_is_kept(smoke_copy: Path) -> None:
    found = invoke(smoke_copy, "--skill", "10s", "--skill", "1000s", "--target", "1")
    assert found.exit_code == 1
    assert "polca-edit: 10s: another group may lose 0.50% of its headroom, the worst loses" in found.output
    record = load_record(RemovalFile, smoke_copy / "edits" / "10s+1000s.result.json")
    assert [removal.skill for removal in record.removals] == ["10s", "1000s"]
    assert record.missed[0] in found.output
    for removal in record.removals:
        assert removal.together is not None
        named = [sentence for sentence in record.missed if sentence.startswith(f"{removal.skill}: ")]
        assert any("damage must reach" in sentence for sentence in named) == (
            removal.together.target_share < 1
        )
        assert any("another group" in sentence for sentence in named) == (
            removal.together.worst_off_share > 0.005
        )
    # One edit holds both movements, made for the weights of the run.
    file = load_edit(smoke_copy / "edits" / "10s+1000s")
    run = load_run(smoke_copy, lambda _: None)
    theta = run.checkpoints()[-1]
    moved = file.edit.apply(theta) - theta
    assert float(moved.norm()) == pytest.approx(file.edit.norm, rel=1e-3)
    assert file.edit.provenance["skills"] == ["10s", "1000s"]


def test_targets_that_do_not_exist_are_refused(smoke_copy: Path) -> None:
    for given, words in (
        (["--skill", "12s"], "known are"),
        (["--cluster", "hessian:1"], "needs BASIS:VECTOR:CLUSTER"),
        (["--cluster", "hessian:99:0"], "does not exist in this run"),
        (["--skill", "1s", "--budget", "huge"], "--budget must be one of"),
        ([], "give either --skill"),
    ):
        found = invoke(smoke_copy, *given)
        assert found.exit_code != 0
        assert words in str(found.exception)
    assert not (smoke_copy / "edits").exists()
    assert not (smoke_copy / "plans").exists()


def test_groups_of_a_run(smoke_run: Path) -> None:
    run = load_run(smoke_run, lambda _: None)
    select = run.task.splits.select
    rule = skill_groups(run, "carry@10s")
    assert torch.equal(rule.is_target(rule.assign(select)), select.skills["carry@10s"])
    # A label that is no group of digits stands against all other labels.
    labels = skill_groups(run, "carry")
    assert torch.equal(labels.is_target(labels.assign(select)), select.skills["carry"])
    for basis in ("hessian", "trajectory"):
        found = load_record(ClusterRecord, run.directory.clusters(basis)).labels
        vector, cluster = next(
            (v, c) for v in range(len(found)) for c in found[v].unique().tolist() if c >= 0
        )
        groups = cluster_groups(run, f"{basis}:{vector}:{cluster}")
        mine = groups.is_target(groups.assign(select))
        assert 0 < int(mine.sum()) < select.count
        assert groups.skill == f"{basis}:{vector}:{cluster}"


def test_fit_batches_of_a_run_stay_off_select_and_evaluate(smoke_run: Path) -> None:
    run = load_run(smoke_run, lambda _: None)
    held = {
        pair
        for part in (run.task.splits.select, run.task.splits.evaluate)
        for a, b in zip(*(t.tolist() for t in first_and_second(part)), strict=True)
        for pair in ((a, b), (b, a))
    }
    batch = fit_stream(run, 96)
    drawn = [batch(step) for step in range(8)]
    for tokens in drawn:
        assert tokens.sequences == 96
        assert not held & set(zip(*(t.tolist() for t in first_and_second(tokens)), strict=True))
    assert torch.equal(drawn[3].inputs, batch(3).inputs)
    assert not torch.equal(drawn[3].inputs, drawn[4].inputs)
