"""``polca-edit test`` end to end on a small recorded run: plan, study, summary, report."""

from __future__ import annotations

import json
import shutil
from html import escape
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.causal import plan_settings, verdict_table
from experiments.cli import app
from experiments.config import load_config
from experiments.pipeline import open_run, run_stages
from experiments.report_sections import causal_sections, extra_sections
from experiments.summary import write_summary
from interventions.protocol import plan_digest
from polca_edit.artifacts import RunDirectory

FEW = (
    "draws=19",
    "rotations=19",
    "random_bases=0",
    "shuffled_bases=0",
    "gradient_draws=19",
    "transplant_draws=9",
    "planted=3",
)
WORDS = {"causal", "not_selective", "observational_only", "inconclusive"}


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("causal")
    settings = {"bases": [{"kind": "trajectory", "vectors": 6}], "threads": 1, "clusters.scaled": True}
    run = open_run(load_config("smoke", settings), place / "run", say=lambda _: None)
    run_stages(run)
    write_summary(run)
    few = [part for text in (*FEW, "resamples=200", "shuffle_draws=19") for part in ("--set", text)]
    result = CliRunner().invoke(
        app, ["test", str(place / "run"), "--out", str(place / "study"), *few, "--label", "carry"]
    )
    assert result.exit_code == 0, result.output
    return place / "run", place / "study"


def test_the_plan_was_hashed_and_kept(tested: tuple[Path, Path]) -> None:
    run, study = tested
    plan = json.loads((study / "plan.json").read_text())
    digest = plan.pop("sha256")
    record = json.loads((study / "study.json").read_text())
    assert plan_digest(plan) == digest == record["plan"]
    openings = json.loads((run / "run.json").read_text())["evaluate_openings"]
    assert [o["plan"] for o in openings if o.get("by") == "study"] == [digest]
    assert record["exploratory"] == [False]


def test_every_pair_has_a_verdict_with_its_reason(tested: tuple[Path, Path]) -> None:
    run, study = tested
    record = json.loads((study / "study.json").read_text())
    assert record["verdicts"]
    for row in record["verdicts"]:
        assert row["verdict"] in WORDS
        assert row["reason"]
        assert row["inputs"]["seeds"] == 1
        # One seed cannot carry a verdict over seeds.
        assert row["verdict"] != "causal"
    summary = json.loads((run / "summary.json").read_text())
    kept = summary["analyses"]["trajectory"]["verdicts"]
    assert [v["cluster"] for v in kept] == [row["name"] for row in record["verdicts"]]


def test_the_report_shows_them(tested: tuple[Path, Path]) -> None:
    run, study = tested
    sections = causal_sections(RunDirectory(run))
    assert [s.title for s in sections] == ["Causal test, trajectory basis"]
    page = (run / "report.html").read_text()
    for row in json.loads((study / "study.json").read_text())["verdicts"]:
        assert escape(row["reason"]) in page
    for drawing in sections[0].figures:
        assert (run / "figures" / f"{drawing.name}.png").exists()
    assert (study / "figures" / "dissociation.png").exists()


def test_new_clusters_drop_old_verdicts(tested: tuple[Path, Path], tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(tested[0], copied)
    config = load_config(copied / "config.yaml", {"clusters.min_cluster_share": 0.2})
    run = open_run(config, copied, say=lambda _: None)
    run_stages(run)
    assert write_summary(run)["analyses"]["trajectory"]["verdicts"] == []
    assert extra_sections(RunDirectory(copied)) == []


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="KEY=VALUE"):
        plan_settings(["drows=3"])
    assert plan_settings(["draws=9", "thresholds.rule_auc=0.9"]).thresholds.rule_auc == 0.9


def test_an_empty_study_says_so() -> None:
    assert "no pair could be chosen" in verdict_table([])
