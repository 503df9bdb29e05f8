"""The plan against runs that were really made, counted by a hook on the model and by the file system."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import polca_edit.checkpoints.files as files
from experiments.cli import app
from experiments.config import RunConfig, parse_config
from experiments.run.cost import plan as planning
from experiments.run.cost import sizes as costs
from experiments.run.cost.rates import Rate, Speeds
from experiments.run.cost.stages import linearised, stage_costs
from experiments.run.driver import run_stages
from experiments.run.run import open_run
from experiments.run.summary.write import write_summary

#: d_model and layers: about 14,000, 54,000 and 160,000 parameters.
SHAPES = {"small": (32, 1), "middle": (64, 1), "large": (80, 2)}


def config(width: int, layers: int, **more: object) -> RunConfig:
    sums = {"select_sums": 30, "curvature_sums": 24, "evaluate_sums": 20}
    settings = {
        "model": {"layers": layers, "d_model": width, "heads": 2, "d_mlp": 4 * width},
        "arithmetic": sums,
        "training": {
            "steps": 80,
            "batch_size": 32,
            "learning_rate": 1e-3,
            "warmup": 10,
            "record_every": 8,
            "state_every": 40,
        },
        "bases": [{"kind": "hessian", "vectors": 4}, {"kind": "trajectory", "vectors": 4}],
        "damage": {"random_draws": 1, "doses": [0.5]},
        # Discovery ends early where its halves agree; the plan is its upper bound and is not compared here.
        "discover": {"edits": 0},
        "breakthrough_delta": 16,
        **more,
    }
    return parse_config(settings)


class Counter:
    """Sequences through a module's forward, bytes of weight files read: nobody's own bookkeeping."""

    def __init__(self, module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[int] = []
        self.bytes_read = 0
        seen = self.seen

        def count(module: torch.nn.Module, given: tuple[torch.Tensor, ...], result: object) -> None:
            # A plain function: a copy of the module (training works on one) keeps counting here.
            seen.append(given[0].shape[0])

        module.register_forward_hook(count)
        real = files.load_file

        def counted(path: Path) -> dict[str, torch.Tensor]:
            self.bytes_read += os.path.getsize(path)
            return real(path)

        monkeypatch.setattr(files, "load_file", counted)

    @property
    def sequences(self) -> int:
        return sum(self.seen)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Size -> (plan, what a real run of it took), each made once."""
    done: dict[str, tuple[planning.CostPlan, dict]] = {}

    def of(size: str) -> tuple[planning.CostPlan, dict]:
        if size not in done:
            folder = tmp_path_factory.mktemp(size)
            settings = config(*SHAPES[size])
            found = planning.make_plan(settings, folder)
            run = open_run(settings, folder / "run", say=lambda _: None)
            with pytest.MonkeyPatch.context() as patch:
                counter = Counter(run.task.module, patch)
                run_stages(run)
                summary = write_summary(run)
            files = [f for f in (folder / "run").rglob("*.safetensors") if ".part" not in f.name]
            measured = {
                "forward_sequences": counter.sequences,
                "hvps": summary["analyses"]["hessian"]["basis"]["hvps"],
                "bytes_read": counter.bytes_read,
                "bytes_written": sum(f.stat().st_size for f in files),
                "seconds": summary["cost"]["seconds"],
            }
            done[size] = found, measured
        return done[size]

    return of


@pytest.mark.parametrize("size", ["small", "large"])
def test_passes_products_and_bytes_of_a_real_run(size, compared):
    found, measured = compared(size)
    for key in ("forward_sequences", "hvps", "bytes_read", "bytes_written"):
        assert getattr(found, key) == pytest.approx(measured[key], rel=0.25), key
    assert found.peak_bytes > found.parameters * 4 * 10
    assert found.curvature_route == "traced"


@pytest.mark.timing
@pytest.mark.parametrize("size", list(SHAPES))
def test_time_of_a_real_run(size, compared):
    found, measured = compared(size)
    ratio = found.seconds / measured["seconds"]
    print(f"{size}: planned over measured time {ratio:.2f}")
    assert 1 / 1.5 < ratio < 1.5


def test_a_wide_spacing_is_warned_of_and_a_fine_one_is_not():
    fine = config(32, 1)
    assert planning.gap_warnings(fine, fine.training.recorded) == [
        "learning rate x spacing is 8.0e-03, above 6.0e-03 rule 'trapezoid' misses much of the loss change; "
        "set training.record_every to 6 or less, or rule to simpson"
    ]
    slow = fine.model_copy(update={"training": fine.training.model_copy(update={"learning_rate": 1e-4})})
    assert planning.gap_warnings(slow, slow.training.recorded) == []


def test_pythias_early_steps_are_named():
    from polca_edit.checkpoints.huggingface import PYTHIA_STEPS

    opened = config(32, 1, checkpoints={"directory": "x"})
    (said,) = planning.gap_warnings(opened, PYTHIA_STEPS)
    for gap in ("2-4", "256-512", "512-1000", "1000-2000"):
        assert gap in said
    assert "2000-3000" not in said
    assert planning.gap_warnings(opened, range(0, 1000, 10)) != []
    assert planning.gap_warnings(opened, range(1000, 2000, 10)) == []


@pytest.mark.parametrize(
    ("sequences", "batch", "expected"), [(10, 4, 12), (8, 4, 8), (3, 100, 3), (101, 100, 200)]
)
def test_padding(sequences, batch, expected):
    assert costs.padded(sequences, batch) == expected


def sizes() -> costs.Sizes:
    bases = (("hessian", 10, 10), ("trajectory", 10, 0))
    return costs.Sizes(1000, 20, 100, 8, 50, 200, 50, 50, 50, 2, bases, 3, 2, "jvp", False)


SPEEDS = Speeds(
    0.01,
    Rate(0.0, 0.001),
    Rate(0.2, 0.01),
    Rate(0.0, 0.001),
    Rate(0.5, 0.005),
    Rate(0.0, 0.001),
    slopes_setup=3.0,
    product_setup=7.0,
    read=0.0,
    write=0.0,
    vector=0.0,
    base_bytes=0,
)


def test_the_cost_of_forward_passes_by_hand():
    stages = {s.stage: s for s in stage_costs(sizes(), SPEEDS, config(32, 1))}
    # Two bases: 20 vectors and 4 residual directions; every direction and the losses at 20 checkpoints.
    assert stages["projections"].forward == 20 * 50 * (1 + 24)
    assert stages["damage:hessian"].forward == 50 * (2 + 10 * (3 + 2))
    assert stages["train"].forward == 800
    assert stages["basis:hessian"].hvps == 8 * 10 - 7
    # A batch holds all 50 sequences: what it costs of itself comes once a checkpoint, not once a sequence.
    assert stages["projections"].seconds == pytest.approx(20 * (0.2 + 50 * 0.01 + 24 * 50 * 0.001) + 3.0)
    assert stages["basis:hessian"].seconds == pytest.approx(73 * (0.5 + 50 * 0.005) + 10 * 50 * 0.001 + 7.0)


def test_a_budget_is_kept_and_a_larger_one_buys_more():
    settings = config(32, 1)
    full = sum(s.seconds for s in stage_costs(sizes(), SPEEDS, settings))
    everything = planning.fit_budget(sizes(), SPEEDS, settings, full * 1.01)
    half = planning.fit_budget(sizes(), SPEEDS, settings, full / 2)
    assert everything.share == 1.0
    assert half.fits
    assert half.seconds <= full / 2
    assert half.select_sequences < 50
    assert not planning.fit_budget(sizes(), SPEEDS, settings, 0.5).fits


def test_more_documents_find_smaller_effects():
    from experiments.tasks.task import build_task

    few = config(32, 1)
    many = few.model_copy(update={"arithmetic": few.arithmetic.model_copy(update={"evaluate_sums": 80})})
    one = planning.smallest_effect(build_task(few), few)
    other = planning.smallest_effect(build_task(many), many)
    assert (one.documents, other.documents) == (20, 80)
    assert one.in_standard_deviations == pytest.approx(2 * other.in_standard_deviations)
    # 2.8 standard errors of a mean of 20.
    assert one.in_standard_deviations == pytest.approx(2.8 / 20**0.5)


def test_the_verb_prints_json_with_the_promised_keys():
    result = CliRunner().invoke(app, ["plan", "smoke", "--json", "-", "--budget-minutes", "1"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    promised = {"forward_passes", "hvps", "bytes_read", "bytes_written", "peak_bytes", "seconds"}
    assert promised <= found.keys()
    assert all(found[key] > 0 for key in promised)
    assert found["budget"]["fits"]


def test_the_rehearsal_draws_few_directions_however_many_a_run_has(tmp_path, monkeypatch):
    from polca_edit.derivatives.objective import Objective

    settings, drawn = config(32, 1, bases=[{"kind": "trajectory", "vectors": 9}]), []
    real = Objective.directional

    def noted(self, theta, rows, *given, **named):
        drawn.append(len(rows))
        return real(self, theta, rows, *given, **named)

    monkeypatch.setattr(Objective, "directional", noted)
    assert planning.make_plan(settings, tmp_path).curvature_route is None
    assert max(drawn) == 4


def test_more_vectors_than_checkpoints_are_refused_as_a_run_refuses_them(tmp_path):
    settings = config(32, 1, bases=[{"kind": "hessian", "vectors": 11}])
    with pytest.raises(ValueError, match="'hessian' wants 11 checkpoints, only 10 are recorded"):
        planning.make_plan(settings, tmp_path)


def test_a_memory_budget_is_shared_out_and_what_exceeds_it_is_said():
    from experiments.run.cost.memory import memory_warnings, peak_bytes, transient_bytes
    from experiments.run.memory import memory_shares, parse_memory

    large = costs.Sizes(50_000_000, 20, 0, 8, 50, 200, 50, 50, 50, 0, sizes().bases, 3, 2, "jvp", False)
    free, vector = config(32, 1), 200_000_000
    tight = free.model_copy(update={"memory_gb": parse_memory("5GB")})
    assert memory_shares(tight, 50_000_000).directions == 6  # half of what is left after 12 vectors
    assert memory_shares(tight, 50_000_000).rows == 1_300_000_000
    assert memory_shares(free, 50_000_000).directions is None
    with pytest.raises(
        ValueError, match=r"16 vectors of 50,000,000 weights, 3.2 GB, got 3 GB; raise --memory"
    ):
        memory_shares(free.model_copy(update={"memory_gb": 3.0}), 50_000_000)
    with pytest.raises(ValueError, match="16GB or 800MB, got 'much'"):
        parse_memory("much")
    # Twenty rows and twenty-four directions at once, against six directions and the rows' share.
    saved = peak_bytes(large, SPEEDS, free) - peak_bytes(large, SPEEDS, tight)
    assert saved == 44 * vector - (6 * vector + 1_300_000_000)
    assert peak_bytes(large, SPEEDS, tight) < 5_000_000_000 < peak_bytes(large, SPEEDS, free)
    assert transient_bytes(large, tight) > transient_bytes(large, free)
    assert memory_warnings(tight, 6_000_000_000)
    assert memory_warnings(tight, 4_000_000_000) == []
    assert memory_warnings(free, 6_000_000_000) == []
