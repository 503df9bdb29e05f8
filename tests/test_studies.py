"""The demo's table against a second reading of summary.json, and the result files of studies."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from experiments.application import settings_from
from experiments.config import load_config
from experiments.report.tables import table
from experiments.run.store import RunDirectory
from experiments.run.summary.records import DamageRow, read_summary
from experiments.study.demo_table import Fit, demo_row, demo_table, most_selective, reached
from experiments.study.paper_scale import stages_table
from experiments.study.results import publish


def test_reached_is_one_only_where_every_bound_is_met():
    assert reached(Fit(0.9, 0.3, 1.5), 0.05) == reached(Fit(1.0, 1.0, 4.0), 1.0) == 1.0
    assert reached(Fit(0.45, 0.3, 1.5), 0.05) == pytest.approx(0.5)
    assert reached(Fit(0.45, 0.15, 1.5), 0.025) == pytest.approx(0.125)


def test_demo_row_is_read_off_the_summary(smoke_run):
    summary = json.loads((smoke_run / "summary.json").read_text())
    row = demo_row(smoke_run)
    assert row.seconds == summary["cost"]["seconds"]
    assert set(row.explained_share) == set(summary["analyses"])
    change = summary["analyses"]["hessian"]["loss_change"]
    assert row.quadrature_share["hessian"] == change["quadrature_error"] / change["exact"]
    ranked = []
    for name, analysis in summary["analyses"].items():
        for c in analysis["clusters"]:
            for skill in set(c["homogeneity"]) - {"1000s"}:
                parts = [c["homogeneity"][skill] / 0.9, c["recall_all"][skill] / 0.3, c["lift"][skill] / 1.5]
                parts.append(c["tokens"] / summary["tokens"]["select"] / 0.05)
                product = math.prod(min(part, 1.0) for part in parts)
                ranked.append((product, name, c["vector"], c["cluster"], skill))
    best = row.cluster
    assert best is not None
    assert reached(best.select, best.share) == pytest.approx(max(ranked)[0])
    place = best.basis, best.vector, best.cluster, best.skill
    assert place in {entry[1:] for entry in ranked if entry[0] == pytest.approx(max(ranked)[0])}
    assert best.met == (max(ranked)[0] == 1.0)


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="finished run"):
        demo_row(tmp_path)


def _damaging(summary, damages):
    """The summary with whole-vector damage rows of the Hessian basis alone: (vector, split) -> groups."""
    rows = tuple(
        DamageRow(vector, None, "project_out", 1.0, split, 0.0, None, None, None, groups, {})
        for (vector, split), groups in damages.items()
    )
    return replace(summary, analyses={"hessian": replace(summary.analyses["hessian"], damage=rows)})


def test_the_selective_vector_is_chosen_on_select_and_measured_on_evaluate(smoke_run):
    summary = read_summary(smoke_run)
    damages = {
        (0, "select"): {"1000s": 3.0, "100s": 0.6, "10s": 0.0, "1s": 0.0},
        (0, "evaluate"): {"1000s": 3.0, "100s": 0.0, "10s": 0.0, "1s": 0.0},  # better, but not on select
        (1, "select"): {"1000s": 0.0, "100s": -0.1, "10s": 2.0, "1s": 0.1},
        (1, "evaluate"): {"1000s": 0.5, "100s": 0.0, "10s": 2.0, "1s": 0.1},
        (2, "select"): {"1000s": 0.0, "100s": 0.0, "10s": 0.9, "1s": 0.0},  # under 1 nat
        (2, "evaluate"): {"1000s": 0.0, "100s": 0.0, "10s": 0.9, "1s": 0.0},
    }
    found = most_selective(_damaging(summary, damages))
    assert found is not None
    assert (found.vector, found.skill, found.on, found.off, found.share) == (1, "10s", 2.0, 0.5, 0.25)
    assert most_selective(_damaging(summary, {(2, "select"): damages[2, "select"]})) is None


def test_demo_table_writes_what_it_prints(smoke_run, smoke_copy, tmp_path):
    file = tmp_path / "demo.json"
    demo_table([smoke_run, smoke_copy], file)
    written = json.loads(file.read_text())
    assert written["seeds"] == [0, 0]
    assert len(written["rows"]) == 2
    assert written["config"]["training"]["steps"] == 60
    lines = file.with_suffix(".md").read_text().splitlines()
    assert sum(line.startswith("| 0 |") for line in lines) == 2


def test_every_result_has_its_origin_and_its_tables(tmp_path):
    config = load_config("smoke", settings_from(["seed=4"]))
    record = Fit(0.5, 0.25, 2.0)
    made = table(["what", "number"], [["a", "1"]], "A table")
    publish(tmp_path / "a.json", "example/1", config, [4], record, [made])
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["schema"] == "polca-edit/example/1"
    assert written["config"]["seed"] == 4
    assert written["seeds"] == [4]
    assert {"versions", "hardware"} <= set(written)
    assert written["lift"] == 2.0
    assert (tmp_path / "a.md").read_text() == f"A table\n\n{made.markdown()}"
    publish(None, "example/1", config, [4], record, [made])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.md"]


def test_stage_times_are_those_of_the_stage_records(smoke_run):
    records = tuple(RunDirectory(smoke_run).stage_records())
    rows = stages_table(records).rows
    assert [row[0].text for row in rows] == [record.stage for record in records]
    assert {"train", "projections", "evaluate"} <= {record.stage for record in records}
    seconds = [float(row[1].text) for row in rows]
    assert seconds == pytest.approx([record.seconds for record in records], abs=0.051)
