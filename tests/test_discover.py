"""Discovery in a run: stages, result file, resume, report and the verbs' JSON."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.config import load_config
from experiments.discover.axes import axis_basis, measure_span
from experiments.discover.blocking import BlockingSettings, arm_plans, held_rows
from experiments.discover.discover import discover
from experiments.discover.records import (
    AxisRow,
    ClusterFile,
    DiscoverSettings,
    SignatureRecord,
    cluster_file,
    load_discovery,
)
from experiments.discover.stages import (
    cluster_row,
    load_found,
    load_timeline,
    signatures_file,
    token_groups,
)
from experiments.discover.targets import aims_of, null_pools
from experiments.report.chapters.discovery import discovery_section
from experiments.run.driver import run_stages
from experiments.run.keys import discovery_stages, signature_names, stage_names
from experiments.run.run import Run, open_run
from experiments.run.run_record import read_run_record
from experiments.tasks.arithmetic import token_set
from experiments.verbs.targets import cluster_groups
from experiments.verdicts.choose import split_of, unseen_tokens
from interventions.discovery.axes import AxisSettings
from interventions.discovery.search import SearchSettings
from polca_edit.artifacts import load_record, to_plain
from polca_edit.derivatives.objective import Objective

QUICK = DiscoverSettings(
    ("hessian",),
    unseen=60,
    null_unseen=40,
    nulls=5,
    axis=AxisSettings(SearchSettings(directions=12, rounds=1, starts=1, climb=5), further=1, refine=1),
    part=20,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("discover") / "smoke"
    opened = open_run(load_config("smoke"), place, lambda _: None)
    wanted = ("train", "basis", "signatures", "timeline")
    run_stages(opened, stages=[s for s in stage_names(opened.config) if s.partition(":")[0] in wanted])
    return opened


def test_discovery_is_a_part_of_every_run():
    config = load_config("smoke")
    assert signature_names(config) == ["hessian", "trajectory", "hessian+trajectory"]
    names = stage_names(config)
    assert names.index("signatures:hessian") < names.index("timeline") < names.index("evaluate")
    without = load_config("smoke", {"discover.edits": 0})
    assert not any(name.startswith(("signatures", "timeline")) for name in stage_names(without))


def test_signatures_of_several_bases_are_those_of_each_side_by_side(run):
    one, two, both = (
        load_record(SignatureRecord, signatures_file(run, name)) for name in signature_names(run.config)
    )
    assert torch.equal(both.changes, torch.cat([one.changes, two.changes]))
    assert both.sources == ("hessian",) * 20 + ("trajectory",) * 20
    assert one.changes.shape == (20, run.task.splits.select.count)
    # An edit of the stage, made anew: the damage must be the stored one.
    split = split_of(run, run.task.splits.select)
    found = load_found(run, "hessian", split)
    assert set(found.bases) == {"hessian"}
    assert found.split is split
    written = load_record(ClusterFile, cluster_file(run.directory.path, "hessian"))
    assert len(written.clusters) == found.count
    assert written.outliers == pytest.approx(found.outlier_share)


def test_the_timeline_shows_every_skill_and_every_interventional_cluster(run):
    timeline = load_timeline(run)
    found = load_found(run, "hessian+trajectory")
    groups = [*run.task.splits.select.skills, *(f"found {name}" for name in found.clusters)]
    assert list(timeline.curves) == groups
    assert [e.window.kind for e in timeline.effects].count("equal") == run.config.discover.windows
    # Curves begin and end where the split's own losses do.
    whole = split_of(run, run.task.splits.select)
    mask = run.task.splits.select.skills["10s"]
    assert timeline.curves["10s"][0] == pytest.approx(float(whole.reference_loss[mask].mean()), abs=1e-5)
    assert timeline.curves["10s"][-1] == pytest.approx(float(whole.before[mask].mean()), abs=1e-5)


def test_rows_of_a_cluster_by_hand():
    tokens = token_set(torch.tensor([123, 456, 789]), torch.tensor([321, 654, 987]))
    place = torch.arange(4).repeat(3)
    members = (place == 1) | (torch.arange(12) == 2)
    row = cluster_row(tokens, "hessian", 0, members)
    assert row.homogeneity["100s"] == pytest.approx(3 / 4)
    assert row.recall["100s"] == 1.0
    assert row.f1["100s"] == pytest.approx(2 * 3 / (4 + 3))
    assert row.homogeneity["10s"] == pytest.approx(1 / 4)
    assert row.recall["1s"] == 0.0


def test_tokens_without_skills_are_grouped_by_a_simple_class():
    tokens = token_set(torch.tensor([123, 456]), torch.tensor([321, 654]))
    shaped = replace(tokens, skills={}, features={"shape": np.array(["word", "number"] * 4)})
    groups = token_groups(shaped)
    assert set(groups) == {"word", "number"}
    assert int(groups["word"].sum()) == 4
    bare = token_groups(replace(tokens, skills={}, features={}))
    assert list(bare) == ["all tokens"]


@pytest.fixture(scope="module")
def result(run):
    return discover(run, QUICK)


def test_every_promised_key_is_written_and_nothing_more(run, result):
    values = json.loads((run.directory.path / "discovery.json").read_text())
    assert set(values["axes"][0]) == {
        "basis", "target", "rank", "share", "worst_other", "rest_of_parent", "null_p", "null_p95",
        "free_share", "free_worst_other", "seconds",
    }  # fmt: skip
    assert set(values["timeline"][0]) == {"start", "end", "norm", "shares", "random_shares"}
    for cluster in values["clusters"]:
        assert set(cluster) == {"basis", "cluster", "tokens", "name", "homogeneity", "recall", "f1"}
    assert load_discovery(run.directory.path) == result
    json.dumps(to_plain(result), allow_nan=False)


def test_an_axis_row_is_what_its_edit_does_to_unseen_tokens(run, result):
    record = measure_span(run.directory.path, "hessian", QUICK, None)
    unseen = split_of(run, unseen_tokens(run, QUICK.unseen))
    from interventions.edits import project_out

    for row in result.axes:
        basis = axis_basis(run, "hessian", record, row.target)
        assert basis.supervised
        share = unseen.damage(project_out(unseen, basis)).share_by(unseen.tokens.skills)
        if row.target in share:
            assert row.share == pytest.approx(share[row.target], abs=1e-4)
    inside = {row.target: row.rest_of_parent for row in result.axes}
    assert inside["10s"] is None
    assert inside["carry@10s"] is not None
    assert {full.parent for full in record.axes if full.row.target == "carry@10s"} == {"10s"}


def test_the_unseen_tokens_are_opened_under_a_plan(run, result):
    openings = read_run_record(run.directory).evaluate_openings
    assert [opening.by for opening in openings] == ["discover"]
    plans = list((run.directory.path / "plans").glob("discover-*.json"))
    assert len(plans) == 1
    assert json.loads(plans[0].read_text())["settings"]["nulls"] == 5


def test_a_second_call_measures_nothing_again(run, result):
    before = run.objective.passes.forward
    kept = (run.directory.path / "kept" / "discover" / "axes-hessian.safetensors").stat().st_mtime_ns
    again = discover(run, QUICK)
    assert run.objective.passes.forward == before
    assert (run.directory.path / "kept" / "discover" / "axes-hessian.safetensors").stat().st_mtime_ns == kept
    assert again.axes == result.axes


def test_shams_of_blocking_move_as_far_as_what_they_stand_for(run, result):
    target = result.axes[0].target
    settings = BlockingSettings("hessian", (target,), begin="start")
    plans = {plan.name: plan for plan in arm_plans(run, settings)}
    assert set(plans) == {"free", f"axis {target}", f"sham axis {target}", f"matched axis {target}"} | {
        "span",
        "matched span",
    }
    moved = run.checkpoints()[-1] - run.checkpoints()[0].clone()
    for name in (f"axis {target}", "span"):
        own = held_rows(run, settings, plans[name], 0)
        sham = held_rows(run, settings, plans[f"matched {name}"], 1)
        torch.testing.assert_close(sham @ sham.T, torch.eye(len(own)), atol=1e-4, rtol=0)
        assert float((sham @ own.T).abs().max()) < 1e-4
        assert float((sham @ moved).norm()) == pytest.approx(float((own @ moved).norm()), rel=1e-3)
    later = [plan for plan in arm_plans(run, replace(settings, begin="window")) if plan.start > 0]
    assert all(plan.target == target for plan in later)
    with pytest.raises(ValueError, match="--begin must be one of"):
        arm_plans(run, replace(settings, begin="never"))


def test_a_found_cluster_is_a_target_of_removal(run):
    name = next(iter(load_found(run, "hessian+trajectory").clusters))
    rule = cluster_groups(run, f"found {name}")
    groups = rule.assign(run.task.splits.select)
    members = load_found(run, "hessian+trajectory").clusters[name]
    hit = float((groups == 0)[members].double().mean())
    assert rule.names[0] == f"found {name}"
    assert hit > 0.6
    with pytest.raises(ValueError, match=r"must be one of .*found"):
        cluster_groups(run, "found 999")


def test_targets_of_one_size_share_null_sets_and_parts_of_a_digit_have_their_own(run):
    search = split_of(run, run.task.splits.select)
    unseen = split_of(run, unseen_tokens(run, QUICK.unseen))
    aims, skipped = aims_of(run, search, unseen, None, None)
    names = [aim.search.name for aim in aims]
    assert set(names) | set(skipped) == set(run.task.splits.select.skills)
    pools = null_pools(aims, search, unseen, 3, seed=0)
    together = [{names[i] for i in pool} for pool, _ in pools]
    digits = {"1000s", "100s", "10s", "1s"} & set(names)
    assert any(digits <= pool for pool in together)
    assert all(len(pool) == 1 for pool in together if any("@" in name for name in pool))
    for pool, sets in pools:
        for near, _ in sets:
            assert (near.rest is not None) == any("@" in names[i] for i in pool)


def test_the_report_shows_discovery_from_records_alone(run, result):
    section = discovery_section(run.directory)
    page = "".join(block.__html__() for block in section.blocks)
    for title in ("Timeline", "Skill axes"):
        assert title in page
    assert {d.title for d in section.drawings} >= {"causal timeline", "axes in hessian"}
    assert "carry@10s" in page


def test_an_unknown_basis_or_target_is_refused(run):
    with pytest.raises(ValueError, match="--basis must be one of"):
        discover(run, replace(QUICK, bases=("fisher",)))
    with pytest.raises(ValueError, match="--target must be one of"):
        discover(run, replace(QUICK, targets=("1000000s",)))


def test_the_axis_verb_saves_an_edit_that_applies(run, tmp_path):
    from experiments.discover.verb import axis
    from interventions.edit_files import load_edit

    file = tmp_path / "axis.json"
    axis(run.directory.path, "10s", ["hessian"], refine=1, unseen=60, nulls=0, json_=str(file))
    (row,) = json.loads(file.read_text())["axes"]
    assert set(row) == {field.name for field in fields(AxisRow)}
    assert row["null_p"] is None
    kept = load_edit(Path(run.directory.path) / "edits" / "axis-hessian-10s")
    split = split_of(run, unseen_tokens(run, 60))
    share = split.damage(kept.edit).share_by(split.tokens.skills)["10s"]
    assert row["share"] == pytest.approx(share, abs=1e-4)


def test_discovery_on_a_trajectory_builds_nothing_else_and_takes_no_derivative(tmp_path, monkeypatch):
    small = {"discover.edits": 6, "discover.windows": 3, "training.steps": 40, "training.record_every": 8}
    opened = open_run(load_config("smoke", small), tmp_path / "run", lambda _: None)

    def refuse(*given: object, **named: object) -> None:
        raise AssertionError("a derivative was asked for")

    for name in ("hessian", "directional", "mean_gradient"):
        monkeypatch.setattr(Objective, name, refuse)
    stages = discovery_stages(opened.config, None, ("trajectory",))
    assert stages == ["signatures:trajectory", "timeline:trajectory"]
    run_stages(opened, stages=["train", "basis:trajectory", *stages])
    assert not opened.directory.basis("hessian").exists()
    timeline = load_timeline(opened, None, ("trajectory",))
    assert set(opened.task.splits.select.skills) <= set(timeline.curves)
    with pytest.raises(AssertionError, match="a derivative"):
        run_stages(opened, stages=["basis:hessian"])
    # All bases by name are those of no name, whatever their order.
    assert discovery_stages(opened.config, None, ("trajectory", "hessian")) == discovery_stages(opened.config)
