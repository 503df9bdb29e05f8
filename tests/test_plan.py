"""The plan against runs that were really made, counted by a hook on the model and by the file system."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import polca_edit.checkpoints.files as files
from experiments.cli import app
from experiments.config import RunConfig, parse_config
from experiments.run.cost import plan as planning
from experiments.run.cost import sizes as costs
from experiments.run.cost import speeds
from experiments.run.cost.rates import Rate, Speeds
from experiments.run.cost.stages import linearised, stage_costs
from experiments.run.driver import run_stages
from experiments.run.run import open_run
from experiments.run.summary.write import write_summary

#: d_model and layers: about 14,000, 54,000 and 160,000 parameters.
SHAPES = {"small": (32, 1), "middle": (64, 1), "large": (80, 2)}
#: Rows of half the bytes that lie in the MLP alone.
SLIM = {
    "basis_storage": "bfloat16",
    "bases": [
        {"kind": "hessian", "vectors": 4, "include": ["*mlp*"]},
        {"kind": "trajectory", "vectors": 4, "include": ["*mlp*"]},
    ],
}


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
            settings = config(32, 1, **SLIM) if size == "slim" else config(*SHAPES[size])
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
                "basis_bytes": sum(f.stat().st_size for f in files if f.parent.name == "basis"),
                "seconds": summary["cost"]["seconds"],
                "curvature_route": run.objective.curvature_route,
            }
            done[size] = found, measured
        return done[size]

    return of


@pytest.mark.parametrize("size", ["small", "slim", pytest.param("large", marks=pytest.mark.timing)])
def test_passes_products_and_bytes_of_a_real_run(size, compared):
    found, measured = compared(size)
    for key in ("forward_sequences", "hvps", "bytes_read", "bytes_written"):
        assert getattr(found, key) == pytest.approx(measured[key], rel=0.25), key
    written = sum(stage.bytes_written for stage in found.stages if stage.stage.startswith("basis:"))
    assert written == pytest.approx(measured["basis_bytes"], rel=0.25)
    assert found.peak_bytes > found.parameters * 4 * 10
    assert found.curvature_route == measured["curvature_route"]


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
    bases = (costs.BasisSize("hessian", 10, 10), costs.BasisSize("trajectory", 10, 0))
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
    promised = {"forward_passes", "transient_bytes", "bytes_read", "bytes_written", "peak_bytes", "seconds"}
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


@pytest.mark.parametrize(("taken", "forward"), [(10, 50), (2, 2 * 50)])
def test_a_trace_goes_through_the_model_once_and_reverse_mode_at_every_basis_checkpoint(taken, forward):
    """Eighty batches are expected, or sixteen; no linearised batch is made anew."""
    given = replace(sizes(), bases=(costs.BasisSize("hessian", taken, taken), sizes().bases[1]))
    stages = {s.stage: s for s in stage_costs(given, SPEEDS, config(32, 1))}
    assert stages["basis:hessian"].forward == forward


def test_the_plan_foresees_reverse_mode_where_traces_do_not_fit():
    from polca_edit.derivatives.curvature import CurvatureWork

    given = replace(sizes(), bases=(costs.BasisSize("hessian", 10, 10), sizes().bases[1]))
    large = replace(SPEEDS, sequence_bytes=2e9, batch_bytes=Rate(0.0, 2e9))
    stages = {s.stage: s for s in stage_costs(given, large, config(32, 1))}
    work = costs.curvature_work(given, 2e9, 4 << 30)
    assert work == CurvatureWork(size=1, batches=50, fits=False, sequence_bytes=2e9)
    # Every sequence is linearised at each of ten basis checkpoints, and again for every product.
    assert stages["basis:hessian"].forward == 50 * (10 + stages["basis:hessian"].hvps)


def test_a_memory_budget_is_shared_out_and_what_exceeds_it_is_said():
    from experiments.run.cost.memory import memory_warnings, needs, peak_bytes, transient_bytes
    from experiments.run.memory.budget import memory_shares, parse_memory

    large = costs.Sizes(50_000_000, 20, 0, 8, 50, 200, 50, 50, 50, 0, sizes().bases, 3, 2, "jvp", False)
    free, vector = config(32, 1), 200_000_000
    tight = free.model_copy(update={"memory_gb": parse_memory("5GB")})
    assert memory_shares(tight, 50_000_000).rows == 1_600_000_000
    assert memory_shares(tight, 50_000_000).displacements == 5  # a gigabyte
    least = tight.model_copy(update={"memory_gb": 2.3})
    assert memory_shares(least, 50_000_000).displacements == 2
    with pytest.raises(
        ValueError, match=r"11 vectors of 50,000,000 weights, 2.2 GB, got 2 GB; raise --memory"
    ):
        memory_shares(free.model_copy(update={"memory_gb": 2.0}), 50_000_000)
    with pytest.raises(ValueError, match="16GB or 800MB, got 'much'"):
        parse_memory("much")
    # Sixteen Krylov vectors and images, and two of ten rows, lie in files; slopes stream checkpoints, hold
    # four residuals and a third of what is left.
    (whole, *_), (mapped, *_, slopes) = needs(large, SPEEDS, free), needs(large, SPEEDS, tight)
    assert whole.mapped == 0
    assert whole.held - mapped.held == mapped.mapped == (16 + 2) * vector
    assert 1_600_000_000 + 8 * vector < slopes.held < 1_600_000_000 + 8 * vector + (1 << 30) + 10**6
    assert slopes.mapped == 2 * 10 * vector - 1_600_000_000
    assert SPEEDS.base_bytes + max(n.held for n in needs(large, SPEEDS, tight)) < 5_000_000_000
    # Pages of files stay where there is room: the budget is full, and no more.
    assert peak_bytes(large, SPEEDS, tight) == 5_000_000_000 < peak_bytes(large, SPEEDS, free)
    assert transient_bytes(large, tight) > transient_bytes(large, free)
    assert memory_warnings(large, SPEEDS, tight) == []
    assert memory_warnings(large, SPEEDS, free) == []


def test_what_fits_a_budget_is_said_and_fits():
    from experiments.run.cost.memory import fewer_vectors, memory_warnings

    large = costs.Sizes(50_000_000, 20, 0, 8, 50, 200, 50, 50, 64, 0, sizes().bases, 3, 2, "jvp", False)
    tight = config(32, 1).model_copy(update={"memory_gb": 8.0, "batch_size": 64})
    # A batch of 50 sequences would hold 5 GB; it is made to fit.
    heavy = replace(SPEEDS, batch_bytes=Rate(0.0, 1e8), sequence_bytes=1e8)
    assert memory_warnings(large, heavy, tight) == []
    # A sequence that is too large alone: fewer vectors; with no vector to spare: more memory.
    [said] = memory_warnings(large, replace(SPEEDS, batch_bytes=Rate(2.4e9, 0.0)), tight)
    assert "above the budget of 8 GB; set vectors to {'hessian': " in said
    [said] = memory_warnings(large, replace(SPEEDS, batch_bytes=Rate(5e9, 0.0)), tight)
    assert said.endswith("raise --memory")
    assert fewer_vectors(large).bases == (
        costs.BasisSize("hessian", 5, 5),
        costs.BasisSize("trajectory", 5, 0),
    )


def test_batches_that_a_budget_cannot_hold_are_priced_for_every_product():
    from polca_edit.derivatives.curvature import BatchedProducts
    from polca_edit.derivatives.tracing import PointLinearization

    def one() -> PointLinearization:
        return PointLinearization((), (), lambda *_: (torch.zeros(1),), 100)

    for budget in (0, 99, 250, 499, 500, 900):
        maps = BatchedProducts([one] * 5, budget)
        held, streamed = linearised(replace(sizes(), derivative_batch=10), TRACED, budget)
        assert (held, streamed) == (5 - maps.streamed, maps.streamed), budget


TRACED = replace(SPEEDS, batch_bytes=Rate(0.0, 10.0))


@pytest.mark.parametrize("checkpoints", [2, 5, 6, 20])
def test_reads_of_a_streamed_basis(checkpoints, tmp_path):
    """Against a series that counts: the Gram matrix passes over it several times, three are kept."""
    from polca_edit.basis.path import trajectory_basis
    from polca_edit.checkpoints.series import Checkpoints
    from polca_edit.parameters import ParameterSpace

    read: list[int] = []

    def weights(index: int) -> dict[str, torch.Tensor]:
        read.append(index)
        return {"w": torch.randn(40, generator=torch.Generator().manual_seed(index))}

    space = ParameterSpace(("w",), ((40,),), (("w", "w"),))
    trajectory_basis(Checkpoints(space, tuple(range(checkpoints)), weights), 1)
    assert len(read) == costs.reads_of(costs.streamed_order(checkpoints))


def test_what_is_done_once_is_not_charged_to_sequences():
    """An objective whose first linearisation and first product take long, as tracing and compiling do."""
    import time

    from experiments.run.cost.speeds import _line, _Products
    from experiments.tasks.task import build_task

    class Slow:
        batch_bytes, made, taken = 7, 0, 0

        def hessian(self, theta, tokens, expected):
            time.sleep(0.2 if self.made == 0 else 0.002)
            self.made += 1

            def product(row):
                time.sleep(0.3 if self.taken == 0 else 0.01 + 0.001 * tokens.sequences)
                self.taken += 1

            return product

    tokens = build_task(config(32, 1)).splits.curvature
    products = _Products(Slow(), torch.zeros(1), torch.zeros(1), 8)
    rate = _line(tokens, 20, lambda some: products.cost(some)[1])
    assert products.setup > 0.4
    assert rate.batch(20) == pytest.approx(0.03, abs=0.02)
    assert rate.total(100, 20) < 0.3  # five batches, not a hundred times the first call


TEXT = {"text.select_sequences": 4, "text.curvature_sequences": 4, "text.evaluate_sequences": 4}


@pytest.fixture(scope="module")
def outlined(tmp_path_factory):
    """Twelve checkpoints of a GPTNeoX of 230,000 parameters: headers and holes, no weights."""
    from transformers import GPTNeoXConfig

    from experiments.study.pythia.shapes import write_outline, write_text

    folder = tmp_path_factory.mktemp("outline")
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}
    neox = GPTNeoXConfig(vocab_size=3000, max_position_embeddings=128, **shape)
    write_outline(neox, folder, range(0, 12))
    write_text(folder, 60)
    return folder


def opened_config(folder):
    from experiments.config import load_config
    from experiments.verbs.pipeline import open_overrides

    overrides = open_overrides(folder, str(folder / "text.npy"), names="checkpoint-*") | TEXT
    overrides |= {"text.separator": 0, "text.scored_per_sequence": 4, "batch_size": 2}
    overrides["bases"] = [{"kind": "trajectory", "vectors": 3}]  # nothing is traced
    return load_config("huggingface", overrides)


def test_a_large_model_is_planned_without_its_weights(outlined, tmp_path, monkeypatch):
    from experiments.tasks import stand_in, text

    settings = opened_config(outlined)
    monkeypatch.setattr(speeds, "resident_bytes", lambda: 10**8)  # whatever this process did before
    whole = planning.make_plan(settings, tmp_path)
    monkeypatch.setattr(stand_in, "LARGE_FOR_A_PLAN", 100_000)
    monkeypatch.setattr(text, "load_causal_lm", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr(files, "load_file", lambda path: _refused_checkpoint(path))
    small = planning.make_plan(settings, tmp_path)
    for name in (
        "parameters",
        "checkpoints",
        "transient_bytes",
        "bytes_read",
        "bytes_written",
        "forward_sequences",
    ):
        assert getattr(small, name) == getattr(whole, name), name
    assert small.parameters == 32 * (2 * 3000 + 3 * 12 * 32 + 3 * 13 + 2)
    assert (small.route, small.curvature_route) == (whole.route, whole.curvature_route)
    assert small.smallest_effect.documents == whole.smallest_effect.documents
    assert small.smallest_effect.nats_per_token is None
    assert small.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.25)


def _refused_checkpoint(path):
    assert "checkpoint-" not in str(path), "weights were read"
    return safetensors.torch.load_file(path)


def test_work_of_the_stand_in_is_scaled_by_multiplications(outlined):
    """Against torch's own count of both models' matrix products."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    from experiments.tasks.stand_in import StandIn, smaller
    from polca_edit.parameters import ParameterSpace
    from polca_edit.tokens import next_token_loss

    given = AutoConfig.from_pretrained(outlined / "checkpoint-0")
    models = [
        AutoModelForCausalLM.from_config(c, attn_implementation="eager") for c in (given, smaller(given))
    ]
    found = StandIn(models[1], models[0], ParameterSpace.from_module(models[0]))
    assert (found.layers, models[1].config.vocab_size) == (1.5, 2000)
    counted = []
    for model in models:
        ids, slots = torch.ones(1, 64, dtype=torch.long), torch.arange(4)[None]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            next_token_loss(model, ids, slots)
        counted.append(counter.get_total_flops())
    assert found.work(64, 4) == pytest.approx(counted[0] / counted[1], rel=0.1)
    assert found.weights == pytest.approx(1.5, rel=0.02)


def test_the_verb_plans_what_open_would_do(outlined, monkeypatch):
    planned: list[RunConfig] = []

    def noted(settings, folder, budget):
        planned.append(settings)
        return planning.SmallestEffect(1, 0.0, None)

    monkeypatch.setattr(planning, "make_plan", noted)
    words = ["plan", "huggingface", "--checkpoints", str(outlined), "--names", "checkpoint-*"]
    text = ["--text", str(outlined / "text.npy")]
    found = CliRunner().invoke(app, [*words, *text, "--engine", "ray", "--memory", "4GB", "--json", "-"])
    assert found.exit_code == 0, found.output
    [settings] = planned
    assert settings.checkpoints.directory == settings.model.path[: len(str(outlined))] == str(outlined)
    assert (settings.engine, settings.memory_gb) == ("ray", 4.0)
    assert [spec.vectors for spec in settings.bases] == [8, 8]
    refused = CliRunner().invoke(app, words)
    assert "pass --text FILE" in str(refused.exception) + refused.output
    named = CliRunner().invoke(app, ["plan", "smoke", "--names", "x*"])
    assert "--names goes with --checkpoints" in str(named.exception) + named.output


def test_more_vectors_than_every_second_checkpoint_gives_are_refused(tmp_path):
    settings = config(32, 1, bases=[{"kind": "fisher", "vectors": 7}])
    with pytest.raises(ValueError, match="7 checkpoints must be taken from a series of 6"):
        planning.make_plan(settings, tmp_path)
