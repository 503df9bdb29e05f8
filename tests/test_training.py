"""Training: closed-form updates, same bytes for the same seed, and after a kill the same bytes again."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from polca_edit import training as module_under_test
from polca_edit.checkpoints.files import SeriesFolder, read_weights
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.parameters import ParameterSpace
from polca_edit.training import SeriesWriter, TrainingSettings, TrainingSpan, train

SETTINGS = TrainingSettings(steps=40, learning_rate=1e-2, warmup=10, seed=7)
WEIGHT_STEPS = tuple(range(0, 41, 5))


class Noisy(nn.Module):
    """Dropout makes every step draw from the generator, so a resume has to bring its state back."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 1)
        self.drop = nn.Dropout(0.3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.3, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.drop(torch.tanh(self.first(x))))


def batch_loss(module: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return (module(x)[:, 0] - x.sum(1).sin()).square().mean()


def recorder(directory: Path, module: nn.Module) -> SeriesWriter:
    return SeriesWriter(
        SeriesFolder(directory), ParameterSpace.from_module(module), WEIGHT_STEPS, 10, {"seed": 1}
    )


def run(directory: Path, loss=batch_loss, **options) -> nn.Module:
    module = Noisy()
    kept = recorder(directory, module)
    return train(module, loss, SETTINGS, recorder=kept, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run from start to end with nothing in its way."""
    directory = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    run(directory)
    return directory


# -- the update ------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_update_against_the_closed_form(decay):
    """With a constant gradient AdamW's normalised step is the gradient's sign, up to epsilon."""
    settings = TrainingSettings(12, learning_rate=0.05, weight_decay=0.3, warmup=4, decay=decay)
    module = nn.Linear(2, 1, bias=False).double()
    theta = module.weight.detach().clone()
    signs = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    train(module, lambda m, step: (m.weight * signs * 3.0).sum(), settings)
    for step in range(1, 13):
        rate = 0.05 * min(step / 4, 1)
        if decay == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / 12))
        theta = theta * (1 - rate * 0.3) - rate * signs
    assert torch.allclose(module.weight, theta, rtol=0, atol=1e-8)


def test_steps_count_from_one_and_the_module_ends_in_evaluation_mode():
    seen = []

    def loss(module, step):
        assert module.training
        seen.append(step)
        return batch_loss(module, step)

    done = []
    module = Noisy().eval()
    settings = TrainingSettings(5)
    train(module, loss, settings, after_step=lambda step, m, o: done.append((step, o.param_groups[0]["lr"])))
    assert seen == [1, 2, 3, 4, 5]
    assert done == [(step, settings.rate(step)) for step in seen]
    assert not module.training


# -- the record ------------------------------------------------------------------------------------


def test_record_holds_the_initial_weights_the_wanted_steps_and_the_settings(whole):
    space = ParameterSpace.from_module(Noisy())
    series = open_checkpoints(whole, space)
    assert series.steps == WEIGHT_STEPS
    assert torch.equal(series[0], space.read(Noisy()))
    assert series.learning_rates == tuple(1e-2 * min(step / 10, 1) for step in WEIGHT_STEPS)
    assert series.weight_decay == 0.1
    index = json.loads((whole / "series.json").read_text())
    assert index["data_order"] == {"seed": 1}
    assert index["training"]["learning_rate"] == 1e-2
    assert index["training"]["betas"] == [0.9, 0.95]
    assert SeriesFolder(whole).state_steps() == [10, 20, 30, 40]


def test_recorded_weights_are_those_after_the_step(whole):
    space, seen = ParameterSpace.from_module(Noisy()), {}
    train(Noisy(), batch_loss, SETTINGS, after_step=lambda s, m, o: seen.update({s: space.read(m)}))
    series = open_checkpoints(whole, space)
    assert all(torch.equal(series[i], seen[step]) for i, step in enumerate(WEIGHT_STEPS) if step)


def test_same_seed_same_bytes_and_another_seed_other_bytes(whole, tmp_path):
    torch.rand(13)  # what happened before in the process has no say
    run(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(whole)
    module = Noisy()
    other = TrainingSettings(steps=40, learning_rate=1e-2, warmup=10, seed=8)
    train(module, batch_loss, other, recorder=recorder(tmp_path / "other", module))
    last = "step-00000040.safetensors"
    assert contents(tmp_path / "other")[last] != contents(whole)[last]


# -- resume ----------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [1, 10, 11, 23, 40])
def test_exception_in_a_step_and_resume_gives_the_same_bytes(whole, tmp_path, at):
    steps = []

    def stops(module, step):
        if step == at and not steps.count("stopped"):
            steps.append("stopped")
            raise Stopped
        steps.append(step)
        return batch_loss(module, step)

    with pytest.raises(Stopped):
        run(tmp_path, stops)
    assert not (tmp_path / "series.json").exists()
    del steps[:-1]
    run(tmp_path, stops)
    assert contents(tmp_path) == contents(whole)
    # Nothing before the last state is computed again.
    assert steps[1] == (at - 1) // 10 * 10 + 1


@pytest.mark.parametrize("call", [1, 2, 4, 5, 8])
def test_interrupted_write_and_resume_gives_the_same_bytes(whole, tmp_path, monkeypatch, call):
    original, calls = module_under_test.write_tensors, []

    def full_disk(path, tensors, metadata=None):
        calls.append(path.name)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        original(path, tensors, metadata)

    monkeypatch.setattr(module_under_test, "write_tensors", full_disk)
    with pytest.raises(OSError):
        run(tmp_path)
    assert calls[-1] not in contents(tmp_path)
    run(tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_lost_weights_are_made_again(whole, tmp_path):
    run(tmp_path)
    (tmp_path / "step-00000015.safetensors").unlink()
    (tmp_path / "series.json").unlink()
    run(tmp_path)
    assert contents(tmp_path) == contents(whole)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
import test_training as t

def loss(module, step):
    if step == 27:
        os.kill(os.getpid(), signal.SIGKILL)
    return t.batch_loss(module, step)

t.run(Path({directory!r}), loss)
"""


def test_killed_process_and_resume_gives_the_same_bytes(whole, tmp_path):
    here = Path(__file__).parent
    source = textwrap.dedent(KILLED).format(tests=str(here), directory=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", source], cwd=here.parent, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    files = set(contents(tmp_path))
    assert "step-00000025.safetensors" in files
    assert not files & {"series.json", "step-00000030.safetensors"}
    run(tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_finished_run_is_not_trained_again(whole, tmp_path):
    run(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    run(tmp_path, lambda module, step: pytest.fail("a finished run took a step"))
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == before


def test_stopping_early_leaves_no_index_and_can_go_on(whole, tmp_path):
    run(tmp_path, span=TrainingSpan(stop=20))
    assert not (tmp_path / "series.json").exists()
    run(tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_branch_from_a_recorded_state_repeats_the_run(whole):
    """Blocking needs this: weights and state of step 20 and the same batches give the same step 40."""
    module = Noisy()
    space = ParameterSpace.from_module(module)
    folder = SeriesFolder(whole)
    space.write(module, space.flatten(read_weights(folder.weights(20))))
    span = TrainingSpan(start=20, optimiser_state=read_weights(folder.state(20)))
    train(module, batch_loss, SETTINGS, span=span)
    assert torch.equal(space.read(module), space.flatten(read_weights(folder.weights(40))))


# -- a transformer on the arithmetic task ----------------------------------------------------------


def test_transformer_learns_and_repeats_itself():
    from experiments.tasks.arithmetic import make_data  # here, to keep the killed process light
    from polca_edit.models import TransformerShape, build_small_transformer

    data = make_data(20, 10, 20, 16, 0)
    settings = TrainingSettings(steps=25, learning_rate=3e-3, warmup=5)
    shape = TransformerShape(1, 16, 2, 32, 12, 12, 10)

    def trained() -> nn.Module:
        return train(build_small_transformer(shape, 0), data.batch_loss, settings)

    first, second = trained(), trained()
    space = ParameterSpace.from_module(first)
    assert torch.equal(space.read(first), space.read(second))
    fresh = build_small_transformer(shape, 0)
    with torch.no_grad():
        assert float(data.batch_loss(first, 99)) < 0.9 * float(data.batch_loss(fresh, 99))


def test_batches_depend_on_step_and_seed_alone_and_avoid_held_out_sums():
    from experiments.tasks.arithmetic import first_and_second, make_data

    data, other = make_data(3000, 100, 3000, 32, 0), make_data(3000, 100, 3000, 32, 1)
    held = set()
    for split in (data.splits.select, data.splits.evaluate):
        first, second = first_and_second(split)
        pairs = list(zip(first.tolist(), second.tolist(), strict=True))
        held |= set(pairs) | {(b, a) for a, b in pairs}
    seen = set()
    for step in range(1, 400):
        batch = data.batch(step)
        assert batch.shape == (32, 12)
        digits = batch[:, :8].tolist()
        seen |= {(100 * a + 10 * b + c, 100 * d + 10 * e + f) for a, b, c, _, d, e, f, _ in digits}
    assert len(seen) > 10_000
    assert not seen & held
    assert torch.equal(data.batch(5), data.batch(5))
    assert not torch.equal(data.batch(5), data.batch(6))
    assert not torch.equal(data.batch(5), other.batch(5))
