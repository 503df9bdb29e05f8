"""Key ``precision``: the same weights; derivatives in float64 agree with float32 and conserve far better."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.config import load_config
from experiments.run.driver import run_stages
from experiments.run.run import Run, open_run
from experiments.run.run_record import read_run_record
from experiments.run.stages.clusters import load_observation
from polca_edit.allocation.progress import progress
from polca_edit.artifacts import load_record
from polca_edit.basis.record import Basis

LABEL = "trajectory"


def observed(out: Path, precision: str) -> Run:
    bases = [{"kind": "trajectory", "vectors": 3}]
    config = load_config(out / "config.yaml", {"precision": precision, "bases": bases, "discover.edits": 0})
    run = open_run(config, out, lambda _: None)
    run_stages(run, stages=["train", f"basis:{LABEL}", "projections", f"clusters:{LABEL}", f"damage:{LABEL}"])
    return run


def conservation_error(run: Run, interval: int) -> float:
    """Largest gap between a token's derivative along a displacement and the sum of its parts, nats."""
    series, p = run.observed(), load_observation(run, LABEL).projections
    moved = series[interval + 1] - series[interval]
    whole = run.objective.directional(series[interval], moved[None], run.task.splits.select)[1][0]
    parts = (p.gradients[interval] * p.displacements[interval][:, None]).sum(0) + p.residual_start[interval]
    return float((whole - parts).abs().max())


def test_a_run_in_float64(smoke_copy: Path) -> None:
    single = observed(smoke_copy, "float32")
    before, error = load_observation(single, LABEL).allocation, conservation_error(single, 3)
    weights = single.checkpoints()[-1]
    double = observed(smoke_copy, "float64")
    after = load_observation(double, LABEL)
    assert torch.equal(double.checkpoints()[-1].float(), weights)  # not trained anew
    assert after.allocation.values.dtype == torch.float64
    assert load_record(Basis, double.directory.basis(LABEL)).rows.dtype == torch.float64
    assert read_run_record(double.directory).precision == "float64"
    assert float((after.allocation.values - before.values).abs().max()) < 1e-5
    assert conservation_error(double, 3) < 1e-13
    assert 1e-8 < error < 1e-5


def test_progress_is_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polca_edit.allocation.progress.LINES_EVERY", 0.0)
    assert list(progress(range(3), "counting")) == [0, 1, 2]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert any(line.strip().startswith("counting: ") and " of 3, " in line for line in lines)
    assert all("\r" not in line for line in lines)
