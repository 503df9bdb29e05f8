"""The demo's light answers: measured on the evaluate split, marked, and left alone where a test was made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments.run.run import load_run
from experiments.run.run_record import read_run_record
from experiments.verbs import light
from experiments.verdicts.records import CausalResult
from polca_edit.artifacts import load_record


def test_light_answers_leave_fresh_sequences_unopened(smoke_copy: Path, monkeypatch) -> None:
    monkeypatch.setattr(light, "LIGHT", replace(light.LIGHT, rotations=0, least=10, null_documents=8))
    run = load_run(smoke_copy, say=lambda _: None)
    run = replace(run, task=replace(run.task, parents=("1000s",)))
    light.light_answers(run, workers=1)
    found = load_record(CausalResult, smoke_copy / "verdicts.json")
    assert (found.fresh, found.sequences, found.controls) == (False, 40, ())
    assert {row.family for row in found.rows} == {"polca", "interventional", "skill"}
    evaluate = run.task.splits.evaluate.fingerprint()
    openings = read_run_record(run.directory).evaluate_openings
    assert [one.by for one in openings] == ["run", "discover", "test"]
    assert {one.tokens for one in openings} == {evaluate}
    assert (smoke_copy / "discovery.json").exists()
