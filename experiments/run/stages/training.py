"""Stage ``train``: recorded weights, resumed where a stopped run left off."""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.config import RunConfig
from experiments.run.run import Run
from polca_edit.allocation.progress import progress as progress_of
from polca_edit.checkpoints.files import SeriesFolder, write_json
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.checkpoints.spacing import Adaptive, Probe
from polca_edit.tokens import TokenSet
from polca_edit.training import SeriesWriter, TrainingSettings, train

#: Sequences whose losses adaptive recording looks at.
PROBED = 64


def training_settings(config: RunConfig) -> TrainingSettings:
    """The optimisation settings of a config."""
    t = config.training
    return TrainingSettings(t.steps, t.learning_rate, t.weight_decay, t.betas, t.warmup, t.decay, config.seed)


def recorder_of(run: Run) -> SeriesWriter:
    """Where and when the run's weights are kept."""
    t = run.config.training
    folder = SeriesFolder(run.directory.checkpoints)
    adaptive = Adaptive(t.kept, probe_of(run)) if t.record == "adaptive" else None
    return SeriesWriter(
        folder, run.task.space, t.candidates, t.state_every, run.task.data_order, adaptive=adaptive
    )


def probed(run: Run) -> TokenSet:
    """The first curvature sequences, which training may see: neither select nor evaluate."""
    tokens = run.task.splits.curvature
    return tokens.select(torch.arange(min(PROBED, tokens.sequences)))


def probe_of(run: Run) -> Probe:
    """Losses of :func:`probed`."""
    few = probed(run)

    def probe(module: nn.Module) -> Tensor:
        device = next(module.parameters()).device
        return run.task.token_loss(module, few.inputs.to(device))[few.scored.to(device)]

    return probe


def trained_series(run: Run) -> Checkpoints:
    """The run's checkpoints; it is trained (or goes on) first where its weights are not yet there.

    Raises:
        ValueError: for a task without training data, or checkpoints that cannot be opened.
    """
    if run.config.checkpoints is None and not run.directory.finished("train", run.key("train")):
        started = time.perf_counter()
        run_training(run, "train")
        run.say(f"  {'train':<24} {time.perf_counter() - started:7.1f} s")
    return run.checkpoints()


def run_training(run: Run, stage: str) -> None:
    """Train, or go on training, with the weights of another key thrown away.

    Raises:
        ValueError: for a task without training data.
    """
    if run.task.batch_loss is None:
        raise ValueError(
            f"task '{run.task.name}' has no training data; set 'checkpoints' to open existing ones"
        )
    settings, recorder = training_settings(run.config), recorder_of(run)
    folder, key = run.directory.checkpoints, run.key(stage)
    _clear_other(folder, key)
    run.directory.stage_file(stage).unlink(missing_ok=True)
    bar = progress_of(None, "training", total=settings.steps, unit="step")

    def progress(step: int, loss: float) -> None:
        bar.n = step
        if loss == loss:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update(0)

    # The module is trained on a copy: the objective's own module keeps its initial weights.
    module = copy.deepcopy(run.task.module)
    if run.config.precision == "float64":  # exact: these are the initial weights, widened
        module.to(run.task.trains_in)
    started = time.perf_counter()
    train(module, run.task.batch_loss, settings, recorder=recorder, progress=progress)
    bar.close()
    # Training may have been resumed; its cost in passes is that of all steps either way.
    work = float(settings.steps * run.config.training.batch_size)
    files = [p for p in sorted(folder.iterdir()) if p.suffix == ".safetensors"] + [folder / "series.json"]
    passes = {"forward": work, "backward": work, "tangent": 0.0, "hvp": 0.0}
    run.directory.note(stage, key, files, seconds=time.perf_counter() - started, passes=passes)


def _clear_other(folder: Path, key: str) -> None:
    """Throw recorded weights away that were made with another key, and mark the folder with this one."""
    marker = folder / "key.json"
    if folder.exists() and (not marker.exists() or json.loads(marker.read_text())["key"] != key):
        shutil.rmtree(folder)
    write_json(marker, {"key": key})
