"""A lazy series of (step, weights). Files are read in :mod:`polca_edit.checkpoints.files`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from polca_edit.parameters import ParameterSpace


@dataclass(frozen=True)
class Checkpoints:
    """Weights after given numbers of optimiser steps, read one at a time.

    Attributes:
        space: parameters and their order.
        steps: optimiser steps, strictly increasing.
        read: index -> named tensors of that checkpoint.
        learning_rates: per checkpoint, or None where unknown.
        weight_decay: decoupled weight decay, or None where unknown.
        source: where it came from, for records and messages.
        dtype: of the flat vectors.
    """

    space: ParameterSpace
    steps: tuple[int, ...]
    read: Callable[[int], Mapping[str, Tensor]]
    learning_rates: tuple[float, ...] | None = None
    weight_decay: float | None = None
    source: str = "memory"
    dtype: torch.dtype = torch.float32
    _cache: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"checkpoint steps must be strictly increasing, got {list(self.steps)[:8]}")

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Float[Tensor, " N"]:
        """Weights at one checkpoint as a flat vector (the last three read are kept).

        Raises:
            ValueError: for weights that are not finite or belong to another model.
        """
        index = range(len(self.steps))[index]
        if index not in self._cache:
            while len(self._cache) >= 3:  # before there is a fourth
                self._cache.pop(next(iter(self._cache)))
            theta = self.space.flatten(self.read(index), dtype=self.dtype)
            # NaN and infinity reach every sum, which may overflow without them: only then all are asked.
            if not math.isfinite(float(theta.sum())) and not torch.isfinite(theta).all():
                raise ValueError(
                    f"weights must be finite, checkpoint at step {self.steps[index]} of {self.source} "
                    "holds NaN or infinity; leave it out or retrain"
                )
            self._cache[index] = theta
        return self._cache[index]

    def forget(self) -> None:
        """Let go of the weights that were read last; they are read anew where they are asked for."""
        self._cache.clear()

    def subset(self, indices: Sequence[int]) -> Checkpoints:
        """The checkpoints at the given increasing indices."""
        chosen = list(indices)
        return Checkpoints(
            self.space,
            tuple(self.steps[i] for i in chosen),
            lambda i: self.read(chosen[i]),
            None if self.learning_rates is None else tuple(self.learning_rates[i] for i in chosen),
            self.weight_decay,
            self.source,
            self.dtype,
        )

    def within(self, window: tuple[int, int] | None) -> Checkpoints:
        """The checkpoints from one step to another, both included; all of them without a window.

        >>> space = ParameterSpace(("w",), ((1,),), (("w", "w"),))
        >>> Checkpoints(space, (0, 10, 20, 30, 40), lambda i: {}).within((10, 30)).steps
        (10, 20, 30)

        Raises:
            ValueError: for ends that were not recorded, in the wrong order, or fewer than three checkpoints.
        """
        if window is None:
            return self
        start, end = window
        missing = [step for step in window if step not in self.steps]
        if missing:
            near = [min(self.steps, key=lambda step: abs(step - wanted)) for wanted in missing]
            raise ValueError(
                f"a window must start and end at recorded steps, {missing} are not; the nearest are {near}"
            )
        if start >= end:
            raise ValueError(f"a window must end after it starts, got {start}:{end}; swap them")
        chosen = [index for index, step in enumerate(self.steps) if start <= step <= end]
        if len(chosen) < 3:
            raise ValueError(
                f"a window must hold at least three checkpoints, {start}:{end} holds {len(chosen)}; widen it"
            )
        return self.subset(chosen)

    def spaced(self, count: int) -> Checkpoints:
        """``count`` equally spaced checkpoints, the last one included and the first only among all.

        >>> space = ParameterSpace(("w",), ((1,),), (("w", "w"),))
        >>> Checkpoints(space, (0, 10, 20, 30, 40), lambda i: {}).spaced(2).steps
        (20, 40)

        Raises:
            ValueError: for more checkpoints than there are.
        """
        last = len(self) - 1
        if count == len(self):
            return self
        if not 0 <= count <= last:
            raise ValueError(
                f"{count} checkpoints must be taken from a series of {len(self)}, the first apart; "
                "ask for fewer or record more"
            )
        return self.subset([round((i + 1) * last / count) for i in range(count)])

    def require(self, minimum: int = 3) -> Checkpoints:
        """Itself.

        Raises:
            ValueError: with fewer checkpoints than a trajectory needs.
        """
        if len(self) < minimum:
            raise ValueError(
                f"a run needs at least {minimum} checkpoints, got {len(self)} in {self.source}; "
                "record more steps"
            )
        return self
