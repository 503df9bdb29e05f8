"""Arms of the grokking study: training with gradients projected, or coordinates held after each step.

All arms of a seed branch from one state of the free run and see the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from experiments.natural.grokking import (
    CLIP,
    GrokkingData,
    accuracy,
    grokking_data,
    grokking_module,
    settings,
)
from interventions.blocking import Hold
from polca_edit.basis.path import principal_rows
from polca_edit.derivatives.lanczos import orthonormalise, remove_rows
from polca_edit.parameters import ParameterSpace
from polca_edit.seeds import generator_for
from polca_edit.training import TrainingSpan, optimiser_tensors, train

#: Changes a flat gradient in place of the optimiser's.
Change = Callable[[Tensor], Tensor]
#: Attention matrices whose trajectories the paper takes two principal components of.
MATRICES = ("query.weight", "key.weight", "value.weight", "out.weight")
#: Hidden sums on which accuracy is followed, and steps between measurements.
FOLLOWED, EVERY = 1000, 20


@dataclass(frozen=True)
class Start:
    """Where arms branch.

    Attributes:
        step: optimiser steps done.
        theta: (N,) weights.
        state: of the optimiser.
    """

    step: int
    theta: Tensor
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Arm:
    """One arm's course.

    Attributes:
        steps: where accuracy was measured.
        hidden: accuracy on sums that training never shows.
        moved: length of the movement along the span since the branch, weight units.
        total: length of the whole movement since the branch.
        theta: (N,) last weights.
    """

    steps: tuple[int, ...]
    hidden: tuple[float, ...]
    moved: tuple[float, ...]
    total: tuple[float, ...]
    theta: Tensor


@contextmanager
def changed_gradients(module: nn.Module, change: Change | None) -> Iterator[None]:
    """Inside, gradients are clipped and then changed before every optimiser step, as in the paper's code."""
    parameters = [p for p in module.parameters() if p.requires_grad]

    def before(optimiser: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        if optimiser.param_groups[0]["params"][0] is not parameters[0]:
            return
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        if change is None:
            return
        flat = change(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    handle = register_optimizer_step_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Runner:
    """The model, data and measurements that all arms of one seed share.

    Attributes:
        seed: of weights, table and batches.
        limit: last step of any arm.
        solved: accuracy at which an arm stops.
    """

    seed: int
    limit: int
    solved: float = 0.98

    def __post_init__(self) -> None:
        self.data: GrokkingData = grokking_data(self.seed)
        self.module = grokking_module(self.seed)
        self.space = ParameterSpace.from_module(self.module)
        self.first = self.space.read(self.module).clone()

    def prefix(self, step: int, keep: Callable[[int, Tensor], None]) -> Start:
        """The first steps, with nothing changed."""
        kept: dict[str, Tensor] = {}

        def after(done: int, module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
            if done % EVERY == 0:
                keep(done, self.space.read(module).clone())
            if done == step:
                kept.update({k: v.clone() for k, v in optimiser_tensors(module, optimiser).items()})

        with changed_gradients(self.module, None):
            train(
                self.module,
                self.data.batch_loss,
                settings(self.limit),
                span=TrainingSpan(0, step),
                after_step=after,
            )
        return Start(step, self.space.read(self.module).clone(), kept)

    def run(
        self,
        start: Start,
        rows: Float[Tensor, "k N"],
        *,
        change: Change | None = None,
        hold: Hold | None = None,
        keep: Callable[[int, Tensor], None] | None = None,
    ) -> Arm:
        """One arm until it has solved the hidden sums, or to the limit.

        Args:
            start: where it branches.
            rows: span along which its movement is followed.
            change: of gradients before the optimiser step.
            hold: puts coordinates back after it.
            keep: given the weights wherever accuracy is measured.
        """
        self.space.write(self.module, start.theta)
        steps, hidden, moved, total = [start.step], [self.solved_share()], [0.0], [0.0]
        state = start.state
        while steps[-1] < self.limit and hidden[-1] < self.solved:
            stop = min(steps[-1] + EVERY, self.limit)
            state = self._chunk(steps[-1], stop, state, change, hold)
            theta = self.space.read(self.module)
            away = theta - start.theta
            steps.append(stop)
            hidden.append(self.solved_share())
            moved.append(float((rows @ away).norm()))
            total.append(float(away.norm()))
            if keep is not None:
                keep(stop, theta.clone())
        return Arm(
            tuple(steps), tuple(hidden), tuple(moved), tuple(total), self.space.read(self.module).clone()
        )

    def _chunk(
        self,
        begin: int,
        stop: int,
        state: dict[str, Tensor],
        change: Change | None,
        hold: Hold | None,
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def after(done: int, module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
            if hold is not None:
                hold(done, module, optimiser)
            if done == stop:
                found.update({k: v.clone() for k, v in optimiser_tensors(module, optimiser).items()})

        with changed_gradients(self.module, change) if change or CLIP else nullcontext():
            train(
                self.module,
                self.data.batch_loss,
                settings(self.limit),
                span=TrainingSpan(begin, stop, state),
                after_step=after,
            )
        return found

    def solved_share(self) -> float:
        """Accuracy on the first hidden sums."""
        return accuracy(self.module.eval(), self.data.hidden[:FOLLOWED])


def trajectory_rows(thetas: Sequence[Tensor], space: ParameterSpace) -> Float[Tensor, "16 N"]:
    """Two principal components of the centred trajectory of every attention matrix: the paper's 16."""
    path = torch.stack(list(thetas))
    found = []
    for name, (begin, end) in space.offsets.items():
        if name.endswith(MATRICES):
            part = path[:, begin:end]
            leading, _ = principal_rows(part - part.mean(0), 2)
            rows = torch.zeros(2, space.size)
            rows[:, begin:end] = leading
            found.append(rows)
    return torch.cat(found)


def random_rows(count: int, size: int, seed: int) -> Float[Tensor, "k N"]:
    """The paper's control: random orthonormal rows of the whole weight space."""
    return orthonormalise(torch.randn(count, size, generator=generator_for(seed, "random rows")))


def sham_rows(
    thetas: Sequence[Tensor], rows: Float[Tensor, "k N"], carried: float, seed: int
) -> Float[Tensor, "k N"]:
    """As many rows of the free run's own path, off the given ones, that carry a net movement of one length.

    Args:
        thetas: weights of the free run from the branch on.
        rows: the span whose sham this is.
        carried: length of net movement that the sham's rows must hold, weight units.
        seed: of the draw.

    Raises:
        ValueError: where the path off the rows does not move that far, or has too few points.
    """
    if len(thetas) < len(rows) + 3:
        raise ValueError(
            f"a sham of {len(rows)} rows needs {len(rows) + 3} recorded points, got {len(thetas)}; "
            "let arms run longer"
        )
    net = remove_rows((thetas[-1] - thetas[0])[None], rows)
    length = float(net.norm())
    if carried > length:
        raise ValueError(
            f"a sham must carry {carried:.3g}, the path off the rows moves {length:.3g}; take fewer rows"
        )
    path = torch.stack([theta - thetas[0] for theta in thetas[1:]])
    off = remove_rows(remove_rows(path, rows), net / length)
    leading = principal_rows(off, min(len(rows) + 8, len(off) - 1))[0]
    mix = torch.randn(len(rows), len(leading), generator=generator_for(seed, "sham"))
    others = orthonormalise(mix @ leading)
    share = carried / length
    tilted = share * net[0] / length + np.sqrt(1 - share**2) * others[0]
    return orthonormalise(torch.cat([tilted[None], others[1:]]))
