"""Adaptive recording in a run: settings, keys, stage, and the studies that stand on it or beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.config import load_config
from experiments.run.cost.plan import recording_advice
from experiments.run.keys import data_key
from experiments.run.run import load_run, open_run
from experiments.run.stages.projections import gap_lines
from experiments.run.stages.training import probed, trained_series
from experiments.study.reproduce.english_labels import label_row
from experiments.study.reproduce.recording import equally_spaced, equivalent, recording
from polca_edit.allocation.allocate import Allocation, allocate, project
from polca_edit.basis.record import unlabelled
from polca_edit.checkpoints.spacing import Thinning

ADAPTIVE = {
    "threads": 1,
    "training.steps": 24,
    "training.record_every": 2,
    "training.state_every": 12,
    "training.record": "adaptive",
    "training.record_count": 5,
}


# -- settings ----------------------------------------------------------------------------------------


def test_settings_that_cannot_be_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="record_count is of adaptive recording, got 9"):
        load_config("smoke", {"training.record_count": 9})
    with pytest.raises(ValueError, match="at most the 11 candidates, got 12"):
        load_config("smoke", {"training.record": "adaptive", "training.record_count": 12})
    with pytest.raises(ValueError, match="greater than or equal to 3"):
        load_config("smoke", {"training.record": "adaptive", "training.record_count": 2})
    with pytest.raises(ValueError, match="at most 4 vectors from 5 checkpoints"):
        load_config("smoke", {**ADAPTIVE, "bases": [{"kind": "trajectory", "vectors": 6}]})


def test_what_is_counted_on_is_what_is_kept():
    training = load_config("smoke", ADAPTIVE).training
    assert (len(training.candidates), training.kept) == (13, 5)
    assert training.recorded == [0, 6, 12, 18, 24]
    equal = load_config("smoke").training
    assert equal.recorded == equal.candidates == list(range(0, 61, 6))
    most = load_config("smoke", {"training.record": "adaptive", "training.record_every": 1}).training
    assert (len(most.candidates), most.kept) == (61, 15)


def test_keys_of_runs_that_were_recorded_before_stay_as_they_are():
    assert data_key(load_config("smoke"), "x") == (
        "087960d0a638ef174678fd17545c15b97bde382f69b2efff0afb47b353f7df09"
    )
    found = {data_key(load_config("smoke", {**ADAPTIVE, "training.record_count": n}), "x") for n in (4, 5)}
    assert len(found) == 2
    given = {key: value for key, value in ADAPTIVE.items() if "record_count" not in key}
    assert data_key(load_config("smoke", {**given, "training.record": "equal"}), "x") not in found


# -- the stage ---------------------------------------------------------------------------------------


def test_a_run_keeps_what_the_curvature_tokens_ask_for(tmp_path: Path):
    run = open_run(load_config("smoke", ADAPTIVE), tmp_path / "adaptive", lambda _: None)
    kept = trained_series(run)
    dense = open_run(
        load_config("smoke", {**ADAPTIVE, "training.record": "equal", "training.record_count": None}),
        tmp_path / "dense",
        lambda _: None,
    )
    series, thinning = trained_series(dense), Thinning(5)
    for index, step in enumerate(series.steps):
        thinning.offer(step, run.objective.losses(series[index], probed(run)))
    assert list(kept.steps) == thinning.steps
    for index, step in enumerate(kept.steps):
        assert torch.equal(kept[index], series[series.steps.index(step)])
    # The probe is of tokens that training may see.
    rows = {tuple(row) for row in run.task.splits.curvature.inputs.tolist()}
    assert {tuple(row) for row in probed(run).inputs.tolist()} <= rows


# -- the study ---------------------------------------------------------------------------------------


def test_equivalent_counts_lie_between_what_was_measured():
    assert equivalent(0.2, {10: 0.2, 20: 0.05}) == pytest.approx(10)
    assert equivalent(0.1, {10: 0.2, 20: 0.05}) == pytest.approx(200**0.5)
    assert equivalent(0.3, {10: 0.2, 20: 0.05}) is None
    assert equivalent(0.01, {10: 0.2, 20: 0.05}) is None


def test_the_study_measures_what_a_run_with_these_checkpoints_would_report(smoke_copy: Path, tmp_path: Path):
    file = tmp_path / "recording.json"
    recording([smoke_copy], counts=[4, 6, 999], sequences=20, json_=file)
    written = json.loads(file.read_text())
    run = load_run(smoke_copy, lambda _: None)
    series, tokens = run.checkpoints(), run.task.splits.evaluate.select(torch.arange(20))
    nothing = unlabelled("path", torch.zeros(0, run.objective.space.size))
    for row in written["rows"]:
        chosen = [series.steps.index(step) for step in row["steps"]]
        if row["way"] == "equal":
            assert chosen == equally_spaced(len(series), row["found"]["checkpoints"])
        assert len(chosen) == row["found"]["checkpoints"]
        if row["found"]["checkpoints"] == 4:
            own = allocate(project(run.objective, series.subset(chosen), [nothing], tokens)[0], "trapezoid")
            size = own.quadrature_error.double().sum(0).abs().mean() / own.exact.double().sum(0).abs().mean()
            assert row["found"]["per_token"] == pytest.approx(float(size), rel=1e-3)
            total = own.totals()
            assert row["found"]["total"] == pytest.approx(
                total["quadrature_error"] / total["exact"], rel=1e-2, abs=1e-4
            )
    assert {(row["way"], row["found"]["checkpoints"]) for row in written["rows"]} == {
        (way, count) for way in ("equal", "adaptive", "planned") for count in (4, 6)
    }
    assert sum(found["share"] for found in written["sparse"][0]["intervals"]) >= 0.5
    assert file.with_suffix(".md").exists()
    assert file.with_suffix(".png").stat().st_size > 1000
    with pytest.raises(ValueError, match="--count must be at most the 11"):
        recording([smoke_copy], counts=[999])


# -- labels of English clusters ----------------------------------------------------------------------


def test_a_planted_label_counts_and_chance_stands_beside_it():
    draw = np.random.default_rng(0)
    grams = np.array(["NOUN", "VERB", "DET", "ADJ", "ADP", "PRON"])[draw.integers(0, 6, (600, 4))]
    grams[:80, 2] = "DET"
    members = {0: [np.arange(100), np.arange(300, 340)], 3: [np.arange(100, 200)], 5: []}
    row = label_row(0, "planted", grams, members, 50)
    assert (row.clusters, row.labelled, row.vectors, row.vectors_labelled) == (3, 1, 3, 1)
    assert row.labels == {"0:0": "1 before: DET"}
    assert row.chance < 0.2
    assert row.p == pytest.approx((1 + row.chance * 50) / 51)
    everywhere = label_row(0, "one tag", np.full((600, 4), "N"), members, 20)
    assert (everywhere.labelled, everywhere.chance, everywhere.p) == (3, 3.0, 1.0)
    assert (everywhere.vectors_labelled, everywhere.vectors_chance) == (2, 2.0)
    assert label_row(0, "nothing", grams, {}, 5).clusters == 0


# -- gaps --------------------------------------------------------------------------------------------


def test_a_run_names_the_intervals_that_hold_its_error():
    exact = torch.full((3, 1, 2), -1.0)
    values = exact.clone()
    values[1] = -0.4  # 0.6 nats of the second interval are missed
    allocation = Allocation("trapezoid", torch.tensor([0, 5, 25, 30]), values, torch.zeros(3, 2), exact[:, 0])
    (line,) = gap_lines(allocation)
    assert "misses 20.0%" in line
    assert "half of that in 1 of 3 intervals: 5-25 (100%);" in line
    assert gap_lines(replace(allocation, values=exact)) == []
    assert "record_count=6" in str(recording_advice(load_config("smoke")))
    assert recording_advice(load_config("smoke", ADAPTIVE)) is None
