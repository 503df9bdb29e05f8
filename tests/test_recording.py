"""Recorders of other people's loops: what is on disk is what the model was, step by step."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from polca_edit.checkpoints.files import SeriesFolder, read_weights
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.parameters import ParameterSpace
from polca_edit.recording import Recorder, lightning_callback, trainer_callback
from polca_edit.training import restore_optimiser


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def update(module: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, generator=draw)
    optimiser.zero_grad()
    (module(x) - x.sum(1, keepdim=True)).square().mean().backward()
    optimiser.step()


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


class TestPlainLoop:
    def run(self, directory, steps=25, every=5, **settings):
        module = model()
        optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.3)
        recorder = Recorder(directory, module, optimiser, every=every, **settings)
        seen = [flat(module).clone()]
        for step in range(1, steps + 1):
            update(module, optimiser, step)
            recorder.step()
            seen.append(flat(module).clone())
        recorder.finish(seed=7)
        return module, optimiser, seen

    def test_the_series_holds_the_weights_of_each_step(self, tmp_path):
        module, _, seen = self.run(tmp_path / "c", steps=23)
        series = open_checkpoints(tmp_path / "c", ParameterSpace.from_module(module))
        assert series.steps == (0, 5, 10, 15, 20, 23)
        for index, step in enumerate(series.steps):
            assert torch.equal(series[index], seen[step])
        assert series.learning_rates == pytest.approx((0.0, *[1e-2] * 5))
        assert series.weight_decay == pytest.approx(0.3)
        assert json.loads((tmp_path / "c" / "series.json").read_text())["data_order"] == {"seed": 7}

    def test_training_goes_on_from_a_recorded_state_as_if_never_stopped(self, tmp_path):
        _, _, seen = self.run(tmp_path / "c", steps=25, state_every=10)
        folder = SeriesFolder(tmp_path / "c")
        assert folder.state_steps() == [10, 20, 25]
        module = model(9)
        optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.3)
        space = ParameterSpace.from_module(module)
        space.write(module, space.flatten(read_weights(folder.weights(10))))
        restore_optimiser(module, optimiser, read_weights(folder.state(10)))
        for step in range(11, 26):
            update(module, optimiser, step)
        assert torch.equal(flat(module), seen[25])

    def test_a_stopped_run_leaves_a_series_that_opens(self, tmp_path):
        module = model()
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        recorder = Recorder(tmp_path / "c", module, optimiser, every=2)
        for step in range(1, 6):
            update(module, optimiser, step)
            recorder.step()
        assert open_checkpoints(tmp_path / "c", ParameterSpace.from_module(module)).steps == (0, 2, 4)

    def test_chosen_steps_and_chosen_parameters(self, tmp_path):
        module = model()
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        recorder = Recorder(tmp_path / "c", module, optimiser, schedule=[1, 4], include=("2.*",))
        for step in range(1, 6):
            update(module, optimiser, step)
            recorder.step()
        recorder.finish()
        space = ParameterSpace.from_module(module, ("2.*",))
        series = open_checkpoints(tmp_path / "c", space)
        assert series.steps == (0, 1, 4, 5)
        assert series.space.size == 5

    def test_misuse_is_refused(self, tmp_path):
        self.run(tmp_path / "c")
        with pytest.raises(ValueError, match="already"):
            Recorder(tmp_path / "c", model())
        with pytest.raises(ValueError, match="at least 1"):
            Recorder(tmp_path / "d", model(), every=0)
        recorder = Recorder(tmp_path / "e", model())
        recorder.reached(3)
        with pytest.raises(ValueError, match="increase"):
            recorder.reached(3)

    def test_weights_changed_after_the_last_step_are_not_those_of_a_step(self, tmp_path):
        module = model()
        recorder = Recorder(tmp_path / "c", module, every=2)
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        for step in range(1, 4):
            update(module, optimiser, step)
            recorder.step()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.5)  # an average, or another checkpoint
        with pytest.warns(UserWarning, match="changed after step 3.*ends at step 2"):
            recorder.finish()
        assert open_checkpoints(tmp_path / "c", recorder.space).steps == (0, 2)

    def test_running_statistics_are_kept_and_a_model_with_others_is_refused(self, tmp_path):
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        recorder = Recorder(tmp_path / "c", module, every=1)
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        for step in range(1, 3):
            update(module, optimiser, step)
            recorder.step()
        recorder.finish()
        series = open_checkpoints(tmp_path / "c", module)
        series[2]  # the model's own statistics
        with pytest.raises(ValueError, match=r"1\.running_mean"):
            series[0]

    def test_an_unknown_learning_rate_is_unknown(self, tmp_path):
        module = model()
        recorder = Recorder(tmp_path / "c", module, every=1)
        recorder.step()
        series = open_checkpoints(tmp_path / "c", recorder.space)
        assert series.learning_rates is None
        assert series.weight_decay is None


class Weights:
    """What a test notes of a training run, to compare with the recording."""

    def __init__(self) -> None:
        self.at: dict[int, torch.Tensor] = {}


class TestTransformersTrainer:
    def test_a_real_trainer_run(self, tmp_path):
        pytest.importorskip("accelerate", reason="transformers.Trainer needs the package 'accelerate'")
        from oracles import tiny_gpt2
        from transformers import Trainer, TrainerCallback, TrainingArguments

        noted = Weights()

        class Note(TrainerCallback):
            """Keeps the weights after each step, independently of the recorder."""

            def on_step_end(self, args, state, control, model=None, **_):
                noted.at[state.global_step] = flat(model).clone()

        module = tiny_gpt2()
        start = flat(module).clone()
        draw = torch.Generator().manual_seed(0)
        rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 13, (24, 6), generator=draw)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=7,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            weight_decay=0.1,
            lr_scheduler_type="linear",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            data_seed=5,
        )
        recording = trainer_callback(tmp_path / "series", every=3, state_every=3)
        Trainer(module, arguments, train_dataset=rows, callbacks=[recording, Note()]).train()
        series = open_checkpoints(tmp_path / "series", ParameterSpace.from_module(module))
        assert series.steps == (0, 3, 6, 7)
        assert torch.equal(series[0], start)
        for index in (1, 2, 3):
            assert torch.equal(series[index], noted.at[series.steps[index]])
        assert not torch.equal(series[1], series[2])
        # Linear decay from 1e-2 over 7 steps: update i runs at 1e-2 * (8 - i) / 7.
        assert series.learning_rates == pytest.approx([0.0, *(1e-2 * (8 - i) / 7 for i in (3, 6, 7))])
        index = json.loads((tmp_path / "series" / "series.json").read_text())
        assert index["data_order"]["seed"] == 5
        assert SeriesFolder(tmp_path / "series").state_steps() == [3, 6, 7]

    @pytest.mark.parametrize("stop", ["steps", "early"])
    def test_the_best_checkpoint_loaded_back_is_not_the_last_step(self, stop, tmp_path):
        pytest.importorskip("accelerate", reason="transformers.Trainer needs the package 'accelerate'")
        from oracles import tiny_gpt2
        from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

        module = tiny_gpt2()
        draw = torch.Generator().manual_seed(0)
        rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 13, (8, 6), generator=draw)]
        early = {"num_train_epochs": 9} if stop == "early" else {"max_steps": 5}
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # so that the best is the first
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **early,
        )
        callbacks = [trainer_callback(tmp_path / "series", every=3)]
        callbacks += [EarlyStoppingCallback(3)] if stop == "early" else []
        trainer = Trainer(module, arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)
        trainer.train()
        last = trainer.state.global_step
        assert last == (4 if stop == "early" else 5)
        series = open_checkpoints(tmp_path / "series", ParameterSpace.from_module(module))
        assert series.steps[-1] == last
        saved = {step: read_weights(tmp_path / "out" / f"checkpoint-{step}") for step in (1, last)}
        assert torch.equal(series[-1], series.space.flatten(saved[last]))
        assert torch.equal(flat(module), series.space.flatten(saved[1]))  # the best was loaded back


class TestLightning:
    def test_a_real_fit_with_accumulation(self, tmp_path):
        lightning = pytest.importorskip("lightning", reason="package 'lightning' is not installed")
        noted = Weights()

        class Net(lightning.LightningModule):
            """A linear fit; weights are noted after every optimiser step."""

            def __init__(self):
                super().__init__()
                self.net = model()

            def training_step(self, batch, index):
                (x,) = batch
                return (self.net(x) - x.sum(1, keepdim=True)).square().mean()

            def configure_optimizers(self):
                optimiser = torch.optim.AdamW(self.parameters(), lr=1e-2)
                halved = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.5)
                return [optimiser], [{"scheduler": halved, "interval": "step"}]

            def on_train_batch_end(self, *_):
                noted.at[self.trainer.global_step] = flat(self).clone()

        data = torch.utils.data.TensorDataset(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)))
        net = Net()
        start = copy.deepcopy(flat(net))
        trainer = lightning.Trainer(
            max_epochs=1,
            accumulate_grad_batches=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[lightning_callback(tmp_path / "series", every=2)],
        )
        trainer.fit(net, torch.utils.data.DataLoader(data, batch_size=4))
        series = open_checkpoints(tmp_path / "series", ParameterSpace.from_module(net))
        # 40 rows in batches of 4, two batches a step: 5 optimiser steps.
        assert series.steps == (0, 2, 4, 5)
        assert series.learning_rates == pytest.approx([0.0, *(1e-2 * 0.5 ** (i - 1) for i in (2, 4, 5))])
        assert torch.equal(series[0], start)
        for index in (1, 2, 3):
            assert torch.equal(series[index], noted.at[series.steps[index]])

    def test_without_the_package_the_remedy_is_named(self, monkeypatch, tmp_path):
        import builtins

        real = builtins.__import__

        def absent(name, *rest, **more):
            if name.startswith(("lightning", "pytorch_lightning")):
                raise ImportError(name)
            return real(name, *rest, **more)

        monkeypatch.setattr(builtins, "__import__", absent)
        with pytest.raises(ValueError, match="package 'lightning'"):
            lightning_callback(tmp_path)
