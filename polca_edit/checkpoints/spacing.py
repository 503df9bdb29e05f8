"""Which checkpoints of a training run to keep: close together where losses move, else far apart.

A quadrature over the straight line between two checkpoints errs where losses change much on the way, which in
training is a few short stretches. :class:`Thinning` sees one candidate after the other, never the future, and
keeps a fixed number: whenever there is one too many, the one goes across whose gap least would change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

#: ``probe(module)`` -> losses of a small fixed batch in nats, of any shape, one number per token.
Probe = Callable[[nn.Module], Tensor]
#: Names under which a state file holds what thinning has kept.
STEPS, LOSSES = "recording//steps", "recording//losses"
#: Power of a gap's steps in what leaving a checkpoint out costs. With none, quiet stretches end in one long
#: interval that holds the beginning of the next fall; with one, they keep as many checkpoints as in equal
#: steps. Chosen on demo seeds 0 and 1, measured on others (docs/results/recording-demo.md).
WIDTH_POWER = 0.25
#: Fewest checkpoints that thinning leaves: both ends and one between.
FEWEST = 3


@dataclass(frozen=True)
class Adaptive:
    """Adaptive recording: of all candidates, so many are kept, where the losses of a probe move.

    Attributes:
        count: checkpoints kept, the first and the last included.
        probe: losses of a small fixed batch, from the training text; it runs without gradient.
    """

    count: int
    probe: Probe

    def __post_init__(self) -> None:
        require_count(self.count)

    def measured(self, module: nn.Module) -> Tensor:
        """The probe's losses in evaluation mode; modes, gradients and generators stay as they were."""
        modes = [(part, part.training) for part in module.modules()]
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        module.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                return self.probe(module).detach().reshape(-1).float().cpu()
        finally:
            for part, mode in modes:
                part.training = mode


def require_count(count: int) -> None:
    """Whether so many checkpoints can be kept.

    Raises:
        ValueError: for fewer than three.
    """
    if count < FEWEST:
        raise ValueError(f"adaptive recording keeps at least {FEWEST} checkpoints, got {count}; keep more")


@dataclass
class Thinning:
    """At most ``count`` of the candidates offered so far, chosen without knowledge of the next.

    The first candidate and the newest are always kept. Of the others the one is dropped that costs least, by
    :func:`merging_costs`. So the intervals that are left come to hold about equally much change, and none of
    them is long beside one in which the loss moves.

    >>> thinning = Thinning(3)
    >>> curve = {0: 4.0, 10: 3.9, 20: 1.0, 30: 0.5}
    >>> [thinning.offer(step, torch.tensor([loss])) for step, loss in curve.items()]
    [(), (), (), (10,)]
    >>> thinning.steps
    [0, 20, 30]

    Attributes:
        count: candidates kept.
        steps: their optimiser steps.
        losses: (M,) probe losses at each, nats.
    """

    count: int
    steps: list[int] = field(default_factory=list)
    losses: list[Float[Tensor, " M"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_count(self.count)

    def offer(self, step: int, losses: Tensor) -> tuple[int, ...]:
        """Take a candidate in.

        Args:
            step: of the candidate, later than all before.
            losses: probe losses there, of any shape.

        Returns:
            the steps that are to be dropped for it.

        Raises:
            ValueError: for a step that does not increase, or a probe of another size than before.
        """
        found = losses.detach().reshape(-1).float().cpu()
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"candidates must come in order, got step {step} after {self.steps[-1]}")
        if self.losses and len(found) != len(self.losses[0]):
            raise ValueError(
                f"a probe must give the same tokens every time, got {len(found)} losses after "
                f"{len(self.losses[0])}; use one fixed batch"
            )
        self.steps.append(step)
        self.losses.append(found)
        dropped = []
        while len(self.steps) > self.count:
            least = 1 + int(merging_costs(self.steps, torch.stack(self.losses)).argmin())
            dropped.append(self.steps.pop(least))
            self.losses.pop(least)
        return tuple(dropped)

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored for :meth:`take_up`."""
        return {STEPS: torch.tensor(self.steps, dtype=torch.long), LOSSES: torch.stack(self.losses)}

    def take_up(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`tensors` gave; from nothing where the keys are missing."""
        known = STEPS in tensors and LOSSES in tensors
        self.steps = tensors[STEPS].tolist() if known else []
        self.losses = list(tensors[LOSSES].unbind()) if known else []


def merging_costs(steps: Sequence[int], losses: Float[Tensor, "T M"]) -> Float[Tensor, " Tm2"]:
    """What leaving out each inner checkpoint would cost, mean over the probe's tokens.

    The size of the loss change from the checkpoint before to the one after, in nats, times a small power of
    the steps between them. Losses that are not finite cost infinitely much, so that they hide no others.

    >>> merging_costs([0, 8, 16, 24], torch.tensor([[3.0], [2.0], [1.0], [0.0]])).tolist()
    [4.0, 4.0]

    Args:
        steps: (T,) of the checkpoints, increasing.
        losses: probe losses at each, nats.
    """
    values, places = losses.double(), torch.tensor([float(step) for step in steps], dtype=torch.float64)
    moved = (values[2:] - values[:-2]).abs().mean(1)
    return (moved * (places[2:] - places[:-2]) ** WIDTH_POWER).nan_to_num(nan=torch.inf, posinf=torch.inf)


def steps_to_keep(steps: Sequence[int], losses: Float[Tensor, "T M"], count: int) -> list[int]:
    """The same choice from a finished dense series or a rehearsal, all candidates known at once.

    Args:
        steps: of the candidates, increasing.
        losses: probe losses at each, nats.
        count: how many to keep, both ends included.

    Returns:
        Their steps; all of them where there are no more.

    >>> steps_to_keep([0, 10, 20, 30, 40], torch.tensor([[4.0], [4.0], [3.0], [1.0], [1.0]]), 4)
    [0, 20, 30, 40]

    Raises:
        ValueError: for fewer than three, or losses that do not belong to the steps.
    """
    require_count(count)
    if len(steps) != len(losses):
        raise ValueError(f"losses must have a row per step, got {len(losses)} for {len(steps)} steps")
    left = list(range(len(steps)))
    while len(left) > count:
        left.pop(1 + int(merging_costs([steps[i] for i in left], losses[left]).argmin()))
    return [int(steps[i]) for i in left]
