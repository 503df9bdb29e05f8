"""``polca-edit test`` end to end on a small recorded run: plan, study, summary, report."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from experiments import causal_branches, causal_runs
from experiments.causal import plan_settings, verdict_table
from experiments.causal_listing import control_rows
from experiments.cli import app
from experiments.config import load_config
from experiments.pipeline import load_run, open_run, run_stages
from experiments.report_sections import causal_sections, extra_sections
from experiments.summary import write_summary
from interventions import edits
from interventions.evidence import PairEvidence, combine
from interventions.protocol import Subject, open_session, plan_digest
from interventions.statistics import Draws
from polca_edit.allocation import coordinates
from polca_edit.artifacts import RunDirectory
from polca_edit.curvature import orthonormalise

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
    assert ">rotated spans</th>" in page
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


def test_every_operator_and_control_is_listed(tested: tuple[Path, Path]) -> None:
    """None is left out in silence, and a family of reference bases that did not run forbids causal."""
    run, study = tested
    for row in json.loads((study / "study.json").read_text())["verdicts"]:
        numbers = [name.split()[0] for name in row["operators"]]
        assert sorted(numbers) == ["O1", "O2", "O3a", "O3b", "O3c", "O4", "O4'", "O5", "O5''", "O6"]
        assert set(row["controls"]) == {f"c{n}" for n in range(1, 11)}
        assert row["controls"]["c7"]["random"] == row["controls"]["c7"]["shuffled_hessian"] == "not_run"
        assert row["controls"]["c7"]["rotation"]["draws"] == 19
        assert row["clauses"]["gate:c7 random bases"] == "not_run"
        assert row["single_run_verdict"] != "causal"
        for control in ("c1", "c2", "c3", "c4", "c5"):
            assert 0 < row["controls"][control]["p_value"] <= 1
    page = (run / "report.html").read_text()
    assert "Positive control" in page
    assert "planted share" in page


def test_planted_skills_are_reported_at_every_share(tested: tuple[Path, Path]) -> None:
    record = json.loads((tested[1] / "study.json").read_text())
    (planted,) = record["planted"]
    assert [row["share"] for row in planted["by_share"]] == [0.5, 0.65, 0.8, 0.9, 1.0]
    powers = [row["power"] for row in planted["by_share"]]
    assert planted["power"] == powers[-1]
    assert planted["outcome"] == ("passed" if powers[-1] >= 0.8 else "failed")
    for row in record["verdicts"]:
        assert ("low_power" in row["flags"]) == (row["inputs"]["detectable_share"] in ("inf", 0.9, 1.0))


def test_several_bases_share_one_plan(tested: tuple[Path, Path], tmp_path: Path) -> None:
    """One hash, one opening of the evaluate split, a folder per basis; a rotated basis is one of them."""
    copied = tmp_path / "run"
    shutil.copytree(tested[0], copied)
    (copied / "run.json").unlink()
    bases = [{"kind": "trajectory", "vectors": 6}, {"kind": "trajectory", "rotation": "varimax"}]
    config = load_config(copied / "config.yaml", {"bases": bases})
    run = open_run(config, copied, say=lambda _: None)
    run_stages(run)
    few = [part for text in (*FEW, "resamples=50", "shuffle_draws=9") for part in ("--set", text)]
    names = ("trajectory", "trajectory_varimax")
    chosen = [part for name in names for part in ("--basis", name)]
    out = tmp_path / "study"
    result = CliRunner().invoke(app, ["test", str(copied), "--out", str(out), *chosen, *few])
    assert result.exit_code == 0, result.output
    plan = json.loads((out / "plan.json").read_text())
    assert list(plan["bases"]) == list(names)
    for name in names:
        record = json.loads((out / name / "study.json").read_text())
        assert (record["basis"], record["plan"], record["exploratory"]) == (name, plan["sha256"], [False])
        assert (copied / f"verdicts-{name}.json").exists()
    openings = json.loads((copied / "run.json").read_text())["evaluate_openings"]
    assert [o["plan"] for o in openings if o.get("by") == "study"] == [plan["sha256"]]
    titles = [s.title for s in causal_sections(RunDirectory(copied))]
    assert titles == [f"Causal test, {name} basis" for name in names]


def test_a_window_is_skipped_and_made_early(tested: tuple[Path, Path]) -> None:
    """O3c and O5'' on the smoke run: the free arm repeats the run, the edits start where they should."""
    run = load_run(tested[0], lambda _: None)
    settings = plan_settings([*FEW, "resamples=20"])
    test = causal_runs.choose_pairs(run, "trajectory", settings)
    splits = run.task.splits
    subject = Subject(run.objective, run.checkpoints(), test.basis.rows, splits.select, splits.evaluate)
    session = open_session(subject, test.settings)
    pair = replace(test.pairs[0], window=(1, 4))
    found = causal_branches.branch_pair(test, session, pair, steps=12)
    series = session.subject.checkpoints
    steps = {name: (part["step"], part["until"]) for name, part in found.items()}
    # States every 30 of 60 steps: the window (steps 6 to 24) ends before the first one.
    assert steps == {"branch_skip": (30, 42), "amplify": (30, 42)}
    theta = series[series.steps.index(30)]
    for name, edit in {
        "branch_skip": edits.rollback_rewind(theta, series[1], session.rows(pair.vectors)),
        "amplify": edits.displace(
            theta,
            session.rows(pair.vectors),
            coordinates(session.rows(pair.vectors), series[4] - series[1]),
            "by hand",
        ),
    }.items():
        members = pair.evaluate.members
        after = run.objective.losses(edit.apply(theta), splits.evaluate).double().numpy()[members].mean()
        before = run.objective.losses(theta, splits.evaluate).double().numpy()[members].mean()
        assert found[name]["edit"]["damage"]["target"] == pytest.approx(after - before, abs=1e-5)
        assert found[name]["edit"]["left"]["target"] != found[name]["edit"]["damage"]["target"]
    with pytest.raises(ValueError, match="no breakthrough window"):
        causal_branches.branch_pair(test, session, replace(pair, window=None))


def test_other_seeds_vectors_are_a_control(tested: tuple[Path, Path]) -> None:
    """T of the same coordinates along another run's rows, by hand from losses; aligned rows are counted."""
    test = causal_runs.choose_pairs(load_run(tested[0], lambda _: None), "trajectory", plan_settings(None))
    run, splits = test.run, test.run.task.splits
    rows = test.basis.rows
    subject = Subject(run.objective, run.checkpoints(), rows, splits.select, splits.evaluate)
    session = open_session(subject, replace(test.settings, resamples=20))
    pair = test.pairs[0]
    one = Draws(0.0, np.zeros(20))
    evidence = PairEvidence(pair.name, pair.vectors, one, one, one, 0.0, one, one)
    own = causal_runs.RunMeasurement(session, (evidence,), (), None, {}, {})  # type: ignore[arg-type]
    drawn = torch.randn(rows.shape, generator=torch.Generator().manual_seed(8))
    foreign = orthonormalise(drawn - drawn @ rows.T @ rows)
    here = replace(test, pairs=(pair,))
    other = replace(test, pairs=(), basis=replace(test.basis, rows=foreign))
    same = replace(test, pairs=(), basis=test.basis)
    empty = replace(own, pairs=())
    found = causal_runs.with_other_seeds([here, other, same], [own, empty, empty])[0].pairs[0].extras
    assert found["other_seeds_aligned"] == 1
    vectors = list(pair.vectors)
    moved = rows[vectors] @ (session.reference - session.theta)
    weights = session.theta + moved @ foreign[vectors]
    damage = run.objective.losses(weights, splits.evaluate) - run.objective.losses(
        session.theta, splits.evaluate
    )
    room = run.objective.losses(session.reference, splits.evaluate) - run.objective.losses(
        session.theta, splits.evaluate
    )

    def share(mask: np.ndarray) -> float:
        inside = torch.from_numpy(mask)
        return float(damage[inside].mean().clamp_max(room[inside].mean()) / room[inside].mean())

    expected = share(pair.evaluate.members) - share(pair.evaluate.rest)
    assert found["other_seed_effects"] == [pytest.approx(expected, abs=1e-4)]
    assert control_rows([replace(evidence, extras=found)], combine([evidence]))["c9"]["other_seed"] == {
        "effects": found["other_seed_effects"],
        "aligned": 1,
    }


def test_an_allocation_that_does_not_add_up_fails_its_gate(tested: tuple[Path, Path]) -> None:
    """By hand from the stored derivatives; losses recorded twice as far apart leave half unexplained."""
    test = causal_runs.choose_pairs(load_run(tested[0], lambda _: None), "trajectory", plan_settings(None))
    known = test.projections
    slopes = (known.gradients[1:] + known.gradients[:-1]).double().mean(2) / 2
    inside = float((slopes * known.displacements).sum())
    outside = float((known.residual_start + known.residual_end).double().mean(1).sum() / 2)
    exact = float((known.losses[-1] - known.losses[0]).double().mean())
    gap, outcome = causal_runs.completeness_gate(test)
    assert gap == pytest.approx(abs(1 - (inside + outside) / exact), abs=1e-5)
    assert outcome == ("passed" if gap <= 0.05 else "failed")
    twice = replace(test, projections=replace(known, losses=2 * known.losses))
    gap, outcome = causal_runs.completeness_gate(twice)
    assert gap == pytest.approx(abs(1 - (inside + outside) / (2 * exact)), abs=1e-5)
    assert outcome == "failed"
    lenient = replace(twice.settings, thresholds=replace(twice.settings.thresholds, completeness=0.9))
    assert causal_runs.completeness_gate(replace(twice, settings=lenient))[1] == "passed"


def test_clusters_too_rare_to_rank_are_not_chosen(tested: tuple[Path, Path]) -> None:
    """Twenty tokens are needed where effects are ranked: three sums have twelve, all have enough."""
    run = load_run(tested[0], lambda _: None)
    assert not causal_runs.choose_pairs(run, "trajectory", plan_settings(["ranked=3"])).pairs
    test = causal_runs.choose_pairs(run, "trajectory", plan_settings(["ranked=20"]))
    there = test.run.task.splits.evaluate.of_first_documents(20).numpy()
    assert there.sum() == 80
    assert [pair.evaluate.members[there].sum() >= 20 for pair in test.pairs] == [True] * len(test.pairs)
    whole = causal_runs.choose_pairs(run, "trajectory", plan_settings(None)).pairs
    assert any(pair.evaluate.members[there].sum() < 20 for pair in whole)
    with pytest.raises(ValueError, match="'ranked' must be at most the 40 documents of the evaluate split"):
        causal_runs.choose_pairs(run, "trajectory", plan_settings(["ranked=41"]))


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="KEY=VALUE"):
        plan_settings(["drows=3"])
    assert plan_settings(["draws=9", "thresholds.rule_auc=0.9"]).thresholds.rule_auc == 0.9


def test_an_empty_study_says_so() -> None:
    assert "no pair could be chosen" in verdict_table([])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("draws=abc", "plan setting 'draws' must be a valid integer"),
        ("draws=0", "plan setting 'draws' must be at least 1, got 0"),
        ("unseen=-4", "plan setting 'unseen' must be at least 0, got -4"),
        ("doses=[a]", "plan setting 'doses.0' must be a valid number"),
        ("thresholds.level=x", "plan setting 'thresholds.level' must be a valid number"),
    ],
)
def test_a_plan_of_wrong_values_is_refused_before_anything_is_written(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan_settings([given])
