"""What a run is about: a model, its data, and how it is trained or opened."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor, nn

from experiments.config import RunConfig
from experiments.run.memory.budget import memory_shares
from experiments.tasks import TASKS, own_task
from interventions.causal.control import Plant
from interventions.removal.grouped import GroupRule, LogitFunction
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.seeds import generator_for
from polca_edit.text.conllu import GoldTags
from polca_edit.tokens import Splits, TokenLossFunction, TokenSet

#: Mean loss of one training step's batch: (module, step) -> nats; steps count from 1.
BatchLoss = Callable[[nn.Module, int], Tensor]
#: How batches are drawn, for the index of a recorded series.
DATA_ORDER = (
    "generator seeded with seed * 1000003 + step; branches: SeedSequence(seed) children (branch, step)"
)


class Unseen(Protocol):
    """Draws tokens that nothing has used."""

    def __call__(self, sequences: int, seed: int, branches: Mapping[int, range] | None = None) -> TokenSet:
        """Tokens that no split holds and no training step showed.

        Args:
            sequences: how many.
            seed: of the draw.
            branches: number of each training branch -> the steps it trains on, left out too.
        """


def training_generator(seed: int, step: int, branch: int = 0) -> torch.Generator:
    """The generator of one training batch, a pure function of (seed, branch, step).

    Branch 0 is the recorded run's own stream, whose formula stays as it is so that recorded runs can be
    repeated; every other branch has a stream that is no shift of another's.
    """
    if branch == 0:
        return torch.Generator().manual_seed(seed * 1_000_003 + step)
    return generator_for(seed, "branch", branch, step)


@dataclass(frozen=True)
class Partition:
    """Groups that share every token out among them, finer than skills, for the bounds of a removal.

    Attributes:
        names: of the groups.
        assign: token set -> (M,) index of each token's group, from inputs alone.
        skills: skill -> the groups it is made of.
    """

    names: tuple[str, ...]
    assign: Callable[[TokenSet], Int[Tensor, " M"]]
    skills: Mapping[str, tuple[str, ...]]

    def rule(self, skill: str) -> GroupRule:
        """The groups with those of one skill as target.

        Raises:
            ValueError: for an unknown skill.
        """
        if skill not in self.skills:
            raise ValueError(f"a skill must be one of {sorted(self.skills)}, got '{skill}'")
        return GroupRule(
            self.names, tuple(name in self.skills[skill] for name in self.names), self.assign, skill
        )


@dataclass(frozen=True)
class Task:
    """Model, data and loss of a run: what ``build(config, tokenizer)`` of every task returns.

    The first seven are needed. What else a task has opens verbs: ``training`` lets ``run`` train and
    ``blocking`` train again, ``unseen`` and ``plant`` give a causal test new tokens and its positive
    control, ``logits`` gives removal its KL and accuracy. A verb whose part is missing says so.

    Attributes:
        name: task name.
        module: model at its initial weights.
        space: parameters.
        token_loss: (module, inputs) -> (B, P) nats.
        splits: curvature, select, evaluate.
        training: branch number -> loss of its training batches, None where checkpoints are opened.
        data_order: how batches are drawn.
        open_checkpoints: opens the series of a run that trains nothing, where plain folders of state
            dicts are not enough (Hugging Face models); None leaves it to the run.
        unseen: draws tokens that neither training nor a split has used; None where the task cannot know
            (opened checkpoints) or has no more to draw (texts).
        parents: names of skills that partition the tokens (digits); empty where there are none.
        plant: changes the targets of some tokens by a rule, for the positive control of a
            causal test; None where the task does not know how.
        tags: gold part-of-speech tags of the select tokens, where the text has them.
        tokenizer: what was trained on the text, None where there is none of its own.
        logits: (module, inputs) -> (B, P, V) logits of every slot; the token loss is their cross-entropy on
            ``outputs`` of the tokens.
        partition: groups of the tokens for the bounds of a removal; None takes the skills.
        fresh: (count, generator) -> labelled sequences that training may see, for the fits of a removal;
            None draws from the curvature and select splits.
        fingerprint: hash of data and initial weights, where code and settings do not decide them.
        notes: sentences for whoever starts a run: order of checkpoints, text kept, training rows left out.
        trains_in: precision of the recorded training, whatever that of the derivatives.
    """

    name: str
    module: nn.Module
    space: ParameterSpace
    token_loss: TokenLossFunction
    splits: Splits
    training: Callable[[int], BatchLoss] | None
    data_order: dict[str, object]
    open_checkpoints: Callable[[], Checkpoints] | None = None
    unseen: Unseen | None = None
    parents: tuple[str, ...] = ()
    plant: Plant | None = None
    tags: GoldTags | None = None
    tokenizer: Tokenizer | None = None
    logits: LogitFunction | None = None
    partition: Partition | None = None
    fresh: Callable[[int, torch.Generator], TokenSet] | None = None
    fingerprint: str | None = None
    notes: tuple[str, ...] = ()
    trains_in: torch.dtype = torch.float32

    @property
    def batch_loss(self) -> BatchLoss | None:
        """Loss of the recorded run's own training batches."""
        return None if self.training is None else self.training(0)

    def given_checkpoints(self, config: RunConfig) -> Checkpoints | None:
        """The series the config names, None for a run that trains its own."""
        given = config.checkpoints
        if self.open_checkpoints is not None:
            return self.open_checkpoints()
        if given is None:
            return None
        return open_checkpoints(
            given.directory,
            self.module,
            names=given.pattern,
            step_pattern=given.step_pattern,
            reference=given.reference,
            skip_damaged=given.skip_damaged,
        )

    def objective(self, config: RunConfig) -> Objective:
        """The derivatives of this task's loss."""
        shares = memory_shares(config, self.space.size)
        return Objective(
            self.module,
            self.token_loss,
            self.space,
            batch_size=config.batch_size,
            compiled=config.compiled,
            memory_budget=shares.slopes,
            curvature_budget=shares.curvature,
        )


def build_task(config: RunConfig, tokenizer: Tokenizer | None = None) -> Task:
    """Model and data of a config, made by the module or the file that the task's name says.

    Args:
        config: the run.
        tokenizer: trained before on the same text; None trains it where the task has one.

    Raises:
        ValueError: for data that cannot be read or is too small.
    """
    module = "tasks.own" if own_task(config.task) else TASKS[config.task].module
    task: Task = importlib.import_module(f"experiments.{module}").build(config, tokenizer)
    return placed(task, config)


def placed(task: Task, config: RunConfig) -> Task:
    """The task with its model on the config's device and in its precision."""
    task.module.to(device_of(config))
    if config.precision == "float64":
        task = replace(task, trains_in=next(task.module.parameters()).dtype)
        task.module.double()
    return task


def device_of(config: RunConfig) -> torch.device:
    """The device a config asks for.

    Raises:
        ValueError: if there is none of that name here.
    """
    name = config.device
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu' or 'cuda', got '{name}'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device 'cuda' needs a CUDA GPU and a CUDA build of torch, none is here; use --device cpu"
        )
    return device
