"""What a run is about: a model, its data, and how it is trained or opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from experiments.config import RunConfig
from experiments.tasks import arithmetic
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.models import TransformerShape, build_native_bridge, build_small_transformer
from polca_edit.parameters import ParameterSpace
from polca_edit.text.conllu import GoldTags
from polca_edit.tokens import Splits, TokenLossFunction, TokenSet


@dataclass(frozen=True)
class Task:
    """Model, data and loss of a run.

    Attributes:
        name: task name.
        module: model at its initial weights.
        space: parameters.
        token_loss: (module, inputs) -> (B, P) nats.
        splits: curvature, select, evaluate.
        batch_loss: training loss of a step, None where checkpoints are opened.
        data_order: how batches are drawn.
        partition: skills that partition the tokens (digits), for the worst other group.
        open_checkpoints: opens the series of a run that trains nothing, where plain folders of state
            dicts are not enough (Hugging Face models); None leaves it to the run.
        unseen: (sequences, seed) -> tokens that neither training nor a split has used; None where the task
            cannot know (opened checkpoints) or has no more to draw (texts).
        tags: gold part-of-speech tags of the select tokens, where the text has them.
    """

    name: str
    module: nn.Module
    space: ParameterSpace
    token_loss: TokenLossFunction
    splits: Splits
    batch_loss: Callable[[nn.Module, int], Tensor] | None
    data_order: dict[str, object]
    partition: tuple[str, ...] = ()
    open_checkpoints: Callable[[], Checkpoints] | None = None
    unseen: Callable[[int, int], TokenSet] | None = None
    tags: GoldTags | None = None

    def given_checkpoints(self, config: RunConfig) -> Checkpoints | None:
        """The series the config names, None for a run that trains its own."""
        given = config.checkpoints
        if self.open_checkpoints is not None:
            return self.open_checkpoints()
        if given is None:
            return None
        return open_checkpoints(
            given.directory,
            self.space,
            names=given.pattern,
            step_pattern=given.step_pattern,
            reference=given.reference,
            skip_damaged=given.skip_damaged,
        )

    def objective(self, config: RunConfig) -> Objective:
        """The derivatives of this task's loss."""
        return Objective(
            self.module, self.token_loss, self.space, batch_size=config.batch_size, compiled=config.compiled
        )


def build_task(config: RunConfig) -> Task:
    """Model and data of a config.

    Raises:
        ValueError: for data that cannot be read or is too small.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    task = _arithmetic(config) if config.task == "arithmetic" else _text(config)
    task.module.to(_device(config.device))
    return task


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu' or 'cuda', got '{name}'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device 'cuda' needs a CUDA GPU and a CUDA build of torch, none is here; use --device cpu"
        )
    return device


def _arithmetic(config: RunConfig) -> Task:
    sizes = config.arithmetic
    data = arithmetic.make_data(
        sizes.select_sums, sizes.curvature_sums, sizes.evaluate_sums, config.training.batch_size, config.seed
    )
    m = config.model
    if m.kind == "huggingface":
        raise ValueError("task 'arithmetic' builds its own model, got kind 'huggingface'; use kind plain")
    shape = arithmetic_shape(config)
    build = build_small_transformer if m.kind == "plain" else build_native_bridge
    module = build(shape, config.seed)
    device = _device(config.device)
    return Task(
        "arithmetic",
        module,
        ParameterSpace.from_module(module),
        arithmetic.token_loss,
        data.splits,
        lambda model, step: arithmetic.token_loss(model, data.batch(step).to(device)).mean(),
        {
            "seed": config.seed,
            "rule": "generator seeded with seed * 1000003 + step",
            "batch_size": data.batch_size,
        },
        arithmetic.PLACES,
        unseen=None
        if config.checkpoints
        else lambda sums, seed: data.unseen(sums, config.training.steps, seed),
    )


def arithmetic_shape(config: RunConfig) -> TransformerShape:
    """The small transformer an arithmetic config asks for (12 symbols in, 10 digits out)."""
    m = config.model
    outputs = 10 if m.kind == "plain" else None
    return TransformerShape(m.layers, m.d_model, m.heads, m.d_mlp, 12, arithmetic.LENGTH, outputs, m.init_std)


def _text(config: RunConfig) -> Task:
    from experiments.tasks import text as english

    return english.build_text_task(config)


def with_features_only(tokens: TokenSet) -> TokenSet:
    """The same tokens without skill labels, for rules that must not see them."""
    return replace(tokens, skills={})
