"""End to end on the smoke preset: all stages, same bytes, resume after a kill in any stage, bad input."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from experiments.application import explain
from experiments.cli import app
from experiments.config import RunConfig, load_config, preset_names
from experiments.run import engines, parts
from experiments.run.driver import run_stages
from experiments.run.keys import stage_names
from experiments.run.run import open_run
from experiments.run.stages import clusters as clusters_stage
from experiments.run.stages import evaluate as evaluate_stage
from experiments.run.summary.write import summary_schema, summary_values, write_summary
from interventions.damage import EvaluatedSplit
from polca_edit import artifacts, training
from polca_edit.checkpoints import files as checkpoint_files


def quiet(_: str) -> None:
    """Swallow progress lines."""


def run_smoke(out: Path, **overrides: object) -> dict:
    """All stages and the summary of the smoke preset."""
    run = open_run(load_config("smoke", {"threads": 1, **overrides}), out, quiet)
    run_stages(run)
    return write_summary(run)


def without_clock(summary: dict) -> dict:
    """A summary without what may differ between two equal runs."""
    copy = json.loads(json.dumps(summary))
    del copy["cost"]["seconds"], copy["cost"]["peak_rss_bytes"]
    return copy


@pytest.fixture
def finished(smoke_run: Path) -> tuple[Path, dict]:
    return smoke_run, summary_values(smoke_run)


def test_the_summary_adds_up(finished: tuple[Path, dict]) -> None:
    _, summary = finished
    for analysis in summary["analyses"].values():
        change = analysis["loss_change"]
        parts = change["attributed"] + change["residual"] + change["quadrature_error"]
        assert parts == pytest.approx(change["exact"], abs=1e-6)
        share = analysis["basis"]["explained_share"]
        assert share == pytest.approx(change["attributed"] / change["exact"])


def test_the_trajectory_basis_explains_more_than_the_hessian(finished: tuple[Path, dict]) -> None:
    _, summary = finished
    shares = {name: a["basis"]["explained_share"] for name, a in summary["analyses"].items()}
    assert shares["trajectory"] > 0.5 > abs(shares["hessian"])


def test_damage_rows_agree_with_the_token_table(finished: tuple[Path, dict]) -> None:
    out, summary = finished
    table = pd.read_parquet(out / "tokens.parquet")
    row = next(
        r
        for r in summary["analyses"]["trajectory"]["damage"]
        if r["vector"] == 0 and r["cluster"] is None and r["dose"] == 1.0 and r["split"] == "select"
    )
    assert row["on_target"] == pytest.approx(table["damage:trajectory:0"].mean(), abs=1e-6)
    tens = table[table["skills"].str.split(",").map(lambda names: "10s" in names)]
    assert row["groups"]["10s"] == pytest.approx(tens["damage:trajectory:0"].mean(), abs=1e-6)


def test_schema_refuses_a_missing_key(finished: tuple[Path, dict]) -> None:
    import jsonschema

    _, summary = finished
    broken = json.loads(json.dumps(summary))
    del broken["analyses"]["hessian"]["loss_change"]["residual"]
    with pytest.raises(jsonschema.ValidationError, match="residual"):
        jsonschema.validate(broken, summary_schema())


def test_same_seed_same_summary_after_a_kill_in_every_stage(
    finished: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is broken off once inside each stage; what was finished is not done again."""
    out = tmp_path / "killed"
    config = load_config("smoke", {"threads": 1})

    class Killed(BaseException):
        pass

    def break_after(patch: pytest.MonkeyPatch, target: object, name: str, calls: int) -> None:
        original = getattr(target, name)
        count = 0

        def counted(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count > calls:
                raise Killed
            return original(*args, **kwargs)

        patch.setattr(target, name, counted)

    stops = [
        (training, "write_tensors", 5),
        (artifacts, "write_tensors", 3),
        (parts, "save_record", 2),
        (engines, "local_slopes", 4),
        (clusters_stage, "load_observation", 1),
        (EvaluatedSplit, "damage", 3),
        (evaluate_stage, "fit_rule", 1),
    ]
    for target, name, calls in stops:
        with monkeypatch.context() as patch:
            break_after(patch, target, name, calls)
            with pytest.raises(Killed):
                run_smoke(out)
    done_before: list[str] = []
    resumed = open_run(config, out, done_before.append)
    run_stages(resumed)
    summary = write_summary(resumed)
    assert without_clock(summary) == without_clock(finished[1])
    assert any("train" in line and "kept" in line for line in done_before)
    assert not list(out.rglob("*.part"))


def test_new_cluster_settings_keep_the_expensive_stages(smoke_copy: Path) -> None:
    lines: list[str] = []
    config = load_config("smoke", {"threads": 1, "clusters.min_cluster_share": 0.1})
    run_stages(open_run(config, smoke_copy, lines.append))
    kept = [line.split()[0] for line in lines if "kept" in line]
    assert kept[:4] == ["train", "basis:hessian", "basis:trajectory", "projections"]
    # Discovery stands on bases and tokens; no clustering of trajectories goes into it.
    assert set(kept[4:]) == {
        "signatures:hessian",
        "signatures:trajectory",
        "signatures:hessian+trajectory",
        "timeline",
    }
    record = json.loads((smoke_copy / "run.json").read_text())
    assert [opening["exploratory"] for opening in record["evaluate_openings"]][0] is False


def test_a_damaged_stage_file_is_found_and_done_again(finished: tuple[Path, dict], smoke_copy: Path) -> None:
    (smoke_copy / "basis" / "trajectory.safetensors").write_bytes(b"nothing")
    lines: list[str] = []
    run = open_run(load_config("smoke", {"threads": 1}), smoke_copy, lines.append)
    run_stages(run)
    assert not any("basis:trajectory" in line and "kept" in line for line in lines)
    assert without_clock(write_summary(run)) == without_clock(finished[1])


def test_evaluate_is_opened_once_and_after_the_plan(finished: tuple[Path, dict]) -> None:
    import hashlib

    out, summary = finished
    plan = json.loads((out / "plan.json").read_text())
    digest = plan.pop("sha256")
    text = json.dumps(plan, indent=1, sort_keys=True) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == digest == summary["evaluate"]["plan"]
    openings = json.loads((out / "run.json").read_text())["evaluate_openings"]
    own = {"plan": digest, "exploratory": False, "by": "run", "times": 1, "tokens": plan["evaluate_tokens"]}
    assert openings == [own]


def test_passes_are_those_of_the_stage_records(finished: tuple[Path, dict]) -> None:
    out, summary = finished
    records = [json.loads(p.read_text()) for p in (out / "stages").glob("*.json")]
    config = load_config("smoke")
    unit = config.arithmetic.select_sums
    assert summary["cost"]["passes"]["hvp"] == pytest.approx(
        sum(r["passes"]["hvp"] for r in records) / unit, abs=1e-5
    )
    train = next(r for r in records if r["stage"] == "train")
    assert train["passes"]["forward"] == config.training.steps * config.training.batch_size


# -- bad input: exit code, one sentence, nothing half-written -----------------------------------


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit code and the error as the entry point prints it."""
    result = CliRunner().invoke(app, list(arguments))
    error = result.exception
    if error is None or isinstance(error, SystemExit):
        return result.exit_code, result.output
    assert isinstance(error, (ValueError, OSError)), error
    return 1, explain(error)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere.yaml"], "must be a file or one of the presets"),
        (["run", "smoke", "--set", "training.stepz=5"], "unknown key 'training.stepz'"),
        (["run", "smoke", "--set", "training.steps=4"], "at least 3 checkpoints"),
        (["run", "smoke", "--set", "nonsense"], "KEY=VALUE"),
        (["run", "smoke", "--set", "bases=[{kind: hessian, vectors: 99}]"], "ask for fewer"),
        (["run", "smoke", "--device", "tpu9"], "device"),
        (["run", "smoke", "--redo", "train2"], "one of"),
        (["run", "smoke", "--checkpoints", "missing-folder"], "does not"),
        (["inspect", "missing-run"], "finished run"),
        (["report", "missing-run"], "must be a run directory"),
        (["run", "english-demo", "--text", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_input_is_one_clear_sentence(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, message = invoke(*arguments)
    assert code != 0
    assert words in " ".join(message.split())
    assert "Traceback" not in message


def test_invalid_yaml_and_foreign_directories_are_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1, 2")
    assert invoke("run", str(bad))[1].startswith(f"'{bad}' must be valid YAML")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    code, message = invoke("run", "smoke", "--out", str(tmp_path / "mine"))
    assert (code, "must be new, empty or an earlier run" in message) == (1, True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep me"


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "save_file", full)
    code, message = invoke("run", "smoke", "--out", str(tmp_path / "full"))
    assert code == 1
    assert "disk is full" in message
    assert not list((tmp_path / "full").rglob("*.safetensors"))
    assert not list((tmp_path / "full").rglob("*.part"))


def test_opening_foreign_checkpoints(finished: tuple[Path, dict], tmp_path: Path) -> None:
    """A run on existing checkpoints trains nothing; another model's are refused."""
    series = finished[0] / "checkpoints"
    config = load_config("smoke", {"threads": 1, "checkpoints.directory": str(series)})
    assert "train" not in stage_names(config)
    run = open_run(config, tmp_path / "opened", quiet)
    assert len(run.checkpoints()) == 11
    other = load_config("smoke", {"model.d_model": 16, "checkpoints.directory": str(series)})
    with pytest.raises(ValueError, match="another model"):
        open_run(other, tmp_path / "other", quiet).checkpoints()


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = invoke("demo", "--dry-run")
    assert code == 0
    assert "would run train, basis:hessian" in " ".join(output.split())
    assert list(tmp_path.iterdir()) == []


def test_every_preset_is_valid() -> None:
    assert {"demo", "mini", "paper", "smoke"} <= set(preset_names())
    for name in preset_names():
        assert isinstance(load_config(name), RunConfig)


def test_inspect_prints_a_table_and_json(finished: tuple[Path, dict]) -> None:
    code, output = invoke("inspect", str(finished[0]))
    assert code == 0
    assert "How much of the loss change each basis accounts for" in output
    result = CliRunner().invoke(app, ["inspect", str(finished[0]), "--json", "-"])
    assert json.loads(result.stdout) == summary_values(finished[0])
    assert "next: polca-edit" in result.stderr


def test_read_back_records_are_the_ones_written(finished: tuple[Path, dict]) -> None:
    from polca_edit.artifacts import load_record
    from polca_edit.basis.record import Basis, gram_error

    basis = load_record(Basis, finished[0] / "basis" / "hessian.safetensors")
    assert gram_error(basis.rows) < 1e-5
    assert basis.kind == "hessian"
    assert bool((torch.diff(basis.origins) > 0).all())
