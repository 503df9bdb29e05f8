"""A case: a task with a declared stretch of training, the group that stretch must carry, and a twin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experiments.tasks.task import Task
from polca_edit.basis.record import Basis, unlabelled
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import orthonormalise
from polca_edit.parameters import ParameterSpace
from polca_edit.training import TrainingSettings, train

#: ``carrier``: needed, selective, and it brings the skill alone; ``no``: neither selective nor carrier.
Truth = Literal["carrier", "selective", "no"]


@dataclass(frozen=True)
class Recording:
    """Weights of one trained run.

    Attributes:
        thetas: (T, N) recorded weights.
        steps: (T,) optimiser steps.
    """

    thetas: Float[Tensor, "T N"]
    steps: tuple[int, ...]

    def series(self, space: ParameterSpace) -> Checkpoints:
        """The run as checkpoints of a model."""
        return open_checkpoints(dict(zip(self.steps, self.thetas, strict=True)), space)


@dataclass(frozen=True)
class Natural:
    """One run of a case: a task, how it is trained, and which stretch is declared.

    Attributes:
        task: model, data, loss, parents.
        training: optimisation.
        stretches: recorded steps that cut training into stretches; the declared movement is one of them.
        window: (first, last) step of the declared movement.
        every: steps between recorded weights.
        rows: makes the declared basis of a series where stretches are not what is declared.
        mixed: pairs of declared rows, numbered like ``task.parents``, that a mixing ladder turns together.
        earlier: (window, group) of an earlier declared movement, for a crossover with the target's.
        record: trains in another way than by the task's batches (adapters); None: the ordinary loop.
    """

    task: Task
    training: TrainingSettings
    stretches: tuple[int, ...]
    window: tuple[int, int]
    every: int
    rows: Callable[[Checkpoints], Float[Tensor, "K N"]] | None = None
    mixed: tuple[tuple[int, int], ...] = ()
    earlier: tuple[tuple[int, int], str] | None = None
    record: Callable[[Natural], Recording] | None = None

    def declared(self, series: Checkpoints) -> Basis:
        """The declared movement first, then the other stretches of training, orthonormal."""
        made = stretch_rows(series, self.stretches, self.window) if self.rows is None else self.rows(series)
        return unlabelled("declared", made)

    def recorded(self) -> Recording:
        """Train from the first step and keep the weights."""
        return record_training(self) if self.record is None else self.record(self)


@dataclass(frozen=True)
class Case:
    """A claim whose answer is known before anything is measured.

    Attributes:
        name: of the case.
        about: one line.
        build: (seed, twin) -> the run.
        target: group that the declared movement must carry, and must not in the twin.
        truth: of the case.
        exempt: groups that build on the target, so that losing them is no leak.
        source: where the kind of task comes from.
        minutes: training of case and twin on two idle cores, stated.
    """

    name: str
    about: str
    build: Callable[[int, bool], Natural]
    target: str
    truth: Truth
    exempt: tuple[str, ...] = ()
    source: str = ""
    minutes: float = 1.0

    def truth_of(self, twin: bool) -> Truth:
        """What must be found."""
        return "no" if twin else self.truth


def agrees(truth: Truth, word: str) -> bool:
    """Whether a word is right.

    >>> agrees("no", "shared"), agrees("carrier", "selective"), agrees("selective", "carrier")
    (True, False, True)
    """
    if truth == "no":
        return word not in ("selective", "carrier")
    return word == "carrier" or (truth == "selective" and word == "selective")


def recorded_steps(natural: Natural) -> tuple[int, ...]:
    """Every few steps, and wherever a stretch begins or ends."""
    last = natural.training.steps
    return tuple(sorted({*range(0, last + 1, natural.every), *natural.stretches, *natural.window, last}))


def record_training(natural: Natural) -> Recording:
    """The ordinary loop over the task's batches.

    Raises:
        ValueError: for a task that opens checkpoints.
    """
    task, wanted = natural.task, recorded_steps(natural)
    if task.batch_loss is None:
        raise ValueError(f"task '{task.name}' trains nothing; a case needs a task with batches")
    thetas = [task.space.read(task.module).clone()]

    def keep(step: int, module: nn.Module, _: torch.optim.Optimizer) -> None:
        if step in wanted:
            thetas.append(task.space.read(module).clone())

    train(task.module, task.batch_loss, natural.training, after_step=keep)
    return Recording(torch.stack(thetas), wanted)


def stretch_rows(
    series: Checkpoints, stretches: Sequence[int], window: tuple[int, int]
) -> Float[Tensor, "K N"]:
    """Unit movement of the window, then of every other stretch, each without what came before it.

    Undoing the first row over the window is going back to its start; the others hold none of it.

    Args:
        series: recorded weights.
        stretches: recorded steps that cut training.
        window: (first, last) step of the declared movement.
    """
    at: Mapping[int, int] = {step: index for index, step in enumerate(series.steps)}

    def moved(first: int, last: int) -> Tensor:
        return (series[at[last]] - series[at[first]]).clone()

    cuts = sorted({*stretches, *window})
    parts = list(zip(cuts[:-1], cuts[1:], strict=True))
    inside = [part for part in parts if window[0] <= part[0] and part[1] <= window[1]]
    # The last part inside the window is the window less the others: it adds no direction.
    others = [part for part in parts if part not in inside] + inside[:-1]
    return orthonormalise(torch.stack([moved(*window), *(moved(*part) for part in others)]))
