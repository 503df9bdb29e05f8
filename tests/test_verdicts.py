"""The verb ``test`` on a recorded run: plan, openings, rows, resume; and pairs over several runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.config import load_config, parse_window
from experiments.discover.stages import load_found
from experiments.run.driver import run_stages
from experiments.run.keys import discovery_stages, signature_names
from experiments.run.run import load_run, open_run
from experiments.run.run_record import read_run_record
from experiments.run.summary.write import write_summary
from experiments.verdicts import study
from experiments.verdicts.choose import choose, clusters_stage, jaccard, select_shares, unseen_tokens
from experiments.verdicts.records import CausalResult
from experiments.verdicts.study import StudySettings, run_study, write_result
from interventions.causal.settings import TestSettings
from interventions.damage import EvaluatedSplit
from interventions.edits import project_out
from polca_edit.artifacts import load_record, to_plain
from polca_edit.basis.record import Basis
from polca_edit.derivatives.objective import Objective

FEW = TestSettings(
    resamples=200,
    null_documents=20,
    random_draws=19,
    rotations=0,
    observed_rotations=0,
    transplants=0,
    least=10,
)
ONE = StudySettings(("trajectory",), unseen=60, test=FEW, control=False)


@pytest.fixture
def tested(smoke_copy: Path) -> tuple[Path, CausalResult]:
    result = run_study([smoke_copy], ONE, say=lambda _: None)
    write_result(result, smoke_copy)
    return smoke_copy, result


def test_a_run_gets_a_row_per_pair_and_keeps_what_it_measured(tested) -> None:
    place, result = tested
    run = load_run(place, say=lambda _: None)
    families = {row.family for row in result.rows}
    assert families == {"polca", "interventional", "skill"}
    found = load_found(run, signature_names(run.config)[-1])
    assert {r.cluster for r in result.rows if r.family == "interventional"} <= set(range(found.count))
    # Every group is a row or has a reason.
    named = [row.name for row in result.rows] + [left.name for left in result.untested]
    count = len(load_record(Basis, run.directory.basis("trajectory")).rows)
    for vector in range(count):
        assert any(re.match(rf"trajectory {vector}(:| \||$)", name) for name in named)
    [basis] = {row.basis for row in result.rows}
    assert basis == "trajectory"
    skills = {row.group: row for row in result.rows if row.family == "skill"}
    assert {"1000s", "100s", "10s", "1s"} <= set(skills)
    # The row's damage is that of the vector undone on the unseen tokens, by another path.
    tokens = unseen_tokens(run, 60)
    split = EvaluatedSplit(run.objective, run.checkpoints(), tokens)
    rows = load_record(Basis, run.directory.basis("trajectory")).rows
    row = skills["1000s"]
    expected = split.damage(project_out(split, rows[row.vector])).by(tokens.skills)["1000s"]
    assert row.damage == pytest.approx(expected, rel=1e-5)
    assert row.sentence.startswith(f"Undoing trajectory {row.vector} costs '1000s'")
    opening = read_run_record(run.directory).evaluate_openings[-1]
    assert opening.by == "test"
    assert opening.plan == result.plan
    # Run again it reads back what it kept: the same rows, and no model pass for them.
    again = run_study(
        [place], StudySettings(("trajectory",), 60, test=FEW, control=False), say=lambda _: None
    )
    assert to_plain(again.rows) == to_plain(result.rows)
    assert load_record(CausalResult, place / "verdicts.json").rows == result.rows


def test_the_summary_joins_verdicts_to_clusters_and_drops_those_of_other_clusters(tested) -> None:
    place, result = tested
    run = load_run(place, say=lambda _: None)
    entry = write_summary(run)["analyses"]["trajectory"]
    assert len(entry["verdicts"]) == len(result.rows)
    known = {(c["vector"], c["cluster"]) for c in entry["clusters"]}
    own = {(v["vector"], v["cluster"]) for v in entry["verdicts"] if v["family"] == "polca"}
    assert own <= known
    assert set(entry["answers"]) == {"A", "P"}
    write_result(replace(result, clusters={"trajectory": "another"}), place)
    assert write_summary(run)["analyses"]["trajectory"]["verdicts"] == []


def test_skills_take_the_vector_that_costs_them_most_on_select(tested) -> None:
    place, _ = tested
    run = load_run(place, say=lambda _: None)
    chosen = choose(run, "trajectory", least=10)
    basis = load_record(Basis, run.directory.basis("trajectory"))
    skills = run.task.splits.select.skills
    shares = select_shares(run, "trajectory", basis, dict(skills), None)
    split = EvaluatedSplit(run.objective, run.checkpoints(), run.task.splits.select)
    left = {one.name: one.reason for one in choose(run, "trajectory", least=10_000).left}
    assert left["trajectory | 1000s"] == "fewer than 10000 select tokens"
    for pair in (p for p in chosen.pairs if p.family == "skill"):
        by_hand = [
            split.damage(project_out(split, row)).share_by(skills)[pair.group.name] for row in basis.rows
        ]
        assert shares[pair.group.name] == pytest.approx(by_hand, rel=1e-4, abs=1e-6)
        assert pair.vectors == (max(range(len(by_hand)), key=lambda k: by_hand[k]),)


def test_bad_input_is_a_sentence(tested) -> None:
    place, _ = tested
    with pytest.raises(ValueError, match="--basis must be one of"):
        run_study([place], StudySettings(("nothing",), 60, test=FEW), say=lambda _: None)
    for text in ("600", "a:b", "1:", ":"):
        with pytest.raises(ValueError, match="START:END"):
            parse_window(text)
    assert parse_window("600:720") == (600, 720)
    with pytest.raises(ValueError, match="at least 19"):
        TestSettings(random_draws=3)


def test_overlap_of_groups_is_the_jaccard_index() -> None:
    a, b = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    assert jaccard(a, b) == pytest.approx(1 / 3)
    assert jaccard(a & ~a, b & ~b) == 0.0


def test_results_are_plain_json(tested) -> None:
    _, result = tested
    text = json.dumps(to_plain(result), allow_nan=False)
    assert {"rows", "bases"} <= set(json.loads(text))


def test_a_test_with_other_settings_measures_nothing_twice(tested) -> None:
    place, result = tested
    run = load_run(place, say=lambda _: None)
    blocks = sorted(run.directory.damage_matrix.iterdir())
    assert blocks
    before = [block.read_bytes() for block in blocks]
    again = replace(ONE, test=replace(FEW, resamples=300))
    other = run_study([place], again, say=lambda _: None)
    assert [row.damage for row in other.rows] == [row.damage for row in result.rows]
    assert [block.read_bytes() for block in sorted(run.directory.damage_matrix.iterdir())] == before


def test_a_control_that_cannot_be_planted_leaves_the_table(smoke_copy: Path, monkeypatch) -> None:
    def unlearned(*_: object) -> None:
        raise ValueError("the rule was not learned")

    monkeypatch.setattr(study, "positive_control", unlearned)
    result = run_study([smoke_copy], replace(ONE, control=True), say=lambda _: None)
    assert result.rows
    [control] = result.controls
    assert (control.planted, control.passed) == ("missed", False)
    assert control.sentence == "the rule was not learned"


def test_a_log_gets_a_line_now_and_then_and_not_for_every_step(smoke_copy: Path, capfd) -> None:
    run_study([smoke_copy], ONE, say=lambda _: None)
    assert " gone" not in capfd.readouterr().err


def test_a_trajectory_is_tested_by_forward_passes_alone(tmp_path, monkeypatch):
    """No Hessian basis, no projections, and nothing that differentiates once the run is trained."""
    small = {"discover.edits": 6, "discover.windows": 3, "training.steps": 40, "training.record_every": 8}
    opened = open_run(load_config("smoke", small), tmp_path / "run", lambda _: None)
    run_stages(opened, stages=["train"])

    def refuse(*given: object, **named: object) -> None:
        raise AssertionError("a derivative was asked for")

    for place, names in (
        (Objective, ("hessian", "directional", "mean_gradient", "token_gradients")),
        (torch.autograd, ("grad", "backward")),
        (torch.func, ("grad", "jvp", "vjp", "jacrev", "linearize")),
    ):
        for name in names:
            monkeypatch.setattr(place, name, refuse)
    run_stages(opened, stages=["basis:trajectory", *discovery_stages(opened.config, None, ("trajectory",))])
    result = run_study([tmp_path / "run"], ONE, say=lambda _: None)
    assert {row.family for row in result.rows} == {"interventional", "skill"}
    assert any("no projections" in left.reason for left in result.untested)
    run = load_run(tmp_path / "run", say=lambda _: None)
    assert not run.directory.basis("hessian").exists()
    assert not run.directory.projections("trajectory").exists()
    assert sum(record.passes.get("hvp", 0.0) for record in run.directory.stage_records()) == 0.0
    with pytest.raises(AssertionError, match="a derivative"):
        run_stages(opened, stages=["basis:hessian"])


def test_clusters_of_one_basis_are_tested_where_those_of_all_are_missing(smoke_copy):
    run = load_run(smoke_copy, say=lambda _: None)
    every = clusters_stage(run, "trajectory", None)
    assert every == f"signatures:{signature_names(run.config)[-1]}"
    run.directory.stage_file(every).unlink()
    assert clusters_stage(run, "trajectory", None) == "signatures:trajectory"
    run.directory.stage_file("signatures:trajectory").unlink()
    with pytest.raises(ValueError, match="must be found before they are tested; run polca-edit discover"):
        choose(run, "trajectory", least=10)
