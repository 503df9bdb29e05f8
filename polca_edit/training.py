"""The training loop, its recorder and resume, and how a run is branched.

The batch of each step is a pure function of the step, so data order needs no state: a resumed or
branched run sees the same batches. Weights are recorded after the wanted numbers of optimiser
steps, step 0 included, or after those of them that :mod:`polca_edit.checkpoints.spacing` chooses;
optimiser and generator state at a coarser spacing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from polca_edit.checkpoints.files import SeriesFolder, SeriesIndex, read_weights, write_tensors
from polca_edit.checkpoints.spacing import Adaptive, Thinning
from polca_edit.parameters import ParameterSpace, saved_buffers

#: ``after_step(step, module, optimiser)`` runs after every optimiser step.
AfterStep = Callable[[int, nn.Module, torch.optim.Optimizer], None]


@contextmanager
def callers_generators() -> Iterator[None]:
    """Within the block the global generators may be seeded and used; afterwards they are as they were.

    >>> before = torch.get_rng_state()
    >>> with callers_generators():
    ...     _ = torch.manual_seed(1)
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """
    plain, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)


@dataclass(frozen=True)
class TrainingSettings:
    """Optimisation settings (defaults: arXiv 2506.15872, Table 3).

    Attributes:
        steps: optimiser steps.
        learning_rate: peak rate.
        weight_decay: decoupled (AdamW).
        betas: AdamW momentum terms.
        warmup: steps of linear warm-up, rate(i) = peak * min(i / warmup, 1).
        decay: ``constant`` after warm-up, or ``cosine`` to zero at the last step.
        seed: of the generator state a module may draw from (dropout).
    """

    steps: int
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: int = 100
    decay: str = "constant"
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of update number ``step`` (1-based)."""
        import math

        factor = min(step / self.warmup, 1.0) if self.warmup else 1.0
        if self.decay == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return self.learning_rate * factor


def build_optimiser(module: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW over all trainable parameters."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        foreach=True,
    )


def optimiser_tensors(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimiser state by parameter name, plus the global generator state."""
    names = {id(p): name for name, p in module.named_parameters()}
    tensors = {"generator": torch.get_rng_state()}
    for parameter, state in optimiser.state.items():
        for key, value in state.items():
            tensors[f"{names[id(parameter)]}//{key}"] = torch.as_tensor(value).detach().cpu()
    return tensors


def restore_optimiser(
    module: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put saved state back into an optimiser over the same module, and the generator state too."""
    torch.set_rng_state(tensors["generator"])
    for name, parameter in module.named_parameters():
        entries = {k.split("//")[1]: v for k, v in tensors.items() if k.startswith(f"{name}//")}
        if entries:
            optimiser.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter.device).clone()
                for key, value in entries.items()
            }


@dataclass(frozen=True)
class SeriesWriter:
    """What to keep of a run, and where.

    Attributes:
        folder: where files go.
        space: parameters that are recorded.
        weight_steps: steps at which weights are kept (0 is the initial model); with ``adaptive`` those it
            chooses from.
        state_every: spacing of optimiser state, a multiple of which must be saved to branch there.
        data_order: how batches are drawn, for the index.
        adaptive: which of the steps are kept; None keeps all.
    """

    folder: SeriesFolder
    space: ParameterSpace
    weight_steps: Sequence[int]
    state_every: int
    data_order: Mapping[str, object] = field(default_factory=dict)
    adaptive: Adaptive | None = None
    _thinning: Thinning | None = field(default=None, init=False, repr=False, compare=False)
    # Files of dropped steps, which go when the next state is there: a run resumed before it needs them.
    _dropped: list[int] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.adaptive is not None:
            object.__setattr__(self, "_thinning", Thinning(self.adaptive.count))

    def resume_step(self) -> int | None:
        """Latest step from which the run can go on with nothing missing before it, if any.

        What adaptive recording had kept until then is taken up again.
        """
        for step in reversed(self.folder.state_steps()):
            needed = [s for s in self.weight_steps if s <= step]
            if self._thinning is not None:
                self._thinning.take_up(read_weights(self.folder.state(step)))
                needed = self._thinning.steps
            if needed and self.folder.has_weights([*needed, step]):
                return step
        if self._thinning is not None:
            self._thinning.take_up({})
        return None

    def after(self, step: int, module: nn.Module, optimiser: torch.optim.Optimizer, last: bool) -> None:
        """Record what is due after ``step``; weights first, so that a state always has its weights."""
        state_due = step > 0 and (step % self.state_every == 0 or last)
        due = step in set(self.weight_steps)
        if due or state_due:
            values = self.space.unflatten(self.space.read(module))
            write_tensors(self.folder.weights(step), {**values, **saved_buffers(module)})
        if due and self._thinning is not None and self.adaptive is not None:
            self._dropped.extend(self._thinning.offer(step, self.adaptive.measured(module)))
        if state_due:
            kept = {} if self._thinning is None else self._thinning.tensors()
            write_tensors(self.folder.state(step), {**optimiser_tensors(module, optimiser), **kept})
            self.folder.drop_weights(self._dropped)
            self._dropped.clear()

    def finish(self, settings: TrainingSettings) -> None:
        """Write the index if every wanted step is there; its presence says that the series is complete."""
        steps = sorted(self.weight_steps if self._thinning is None else self._thinning.steps)
        if not self.folder.has_weights(steps):
            return
        self.folder.drop_weights(set(self.weight_steps) - set(steps))
        rates = tuple(settings.rate(step) if step else 0.0 for step in steps)
        index = SeriesIndex(tuple(steps), self.space.fingerprint(), rates, settings.weight_decay)
        self.folder.write_index(index, training=asdict(settings), data_order=dict(self.data_order))


@dataclass(frozen=True)
class TrainingSpan:
    """Where a training run sets in, and how far it goes.

    Attributes:
        start: steps already done; the module is at its weights after them.
        stop: last step; None for all.
        optimiser_state: state after ``start`` steps, as read from a state file.
    """

    start: int = 0
    stop: int | None = None
    optimiser_state: Mapping[str, Tensor] | None = None


def train(
    module: nn.Module,
    batch_loss: Callable[[nn.Module, int], Tensor],
    settings: TrainingSettings,
    *,
    recorder: SeriesWriter | None = None,
    span: TrainingSpan | None = None,
    after_step: AfterStep | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Train in place to the last step; the caller's generators are left as they were.

    Args:
        module: the model, at its weights after ``span.start`` steps.
        batch_loss: ``batch_loss(module, step)`` -> mean loss of that step's batch (steps count from 1).
        settings: optimisation.
        recorder: keeps weights and state; resumes by itself when files are there and nothing is branched.
        span: start somewhere else than at the first step, or stop early.
        after_step: called after every update, e.g. to hold a direction still.
        progress: called with (step, loss).
    """
    with callers_generators():
        return _train(module, batch_loss, settings, recorder, span or TrainingSpan(), after_step, progress)


def _train(
    module: nn.Module,
    batch_loss: Callable[[nn.Module, int], Tensor],
    settings: TrainingSettings,
    recorder: SeriesWriter | None,
    span: TrainingSpan,
    after_step: AfterStep | None,
    progress: Callable[[int, float], None] | None,
) -> nn.Module:
    start, stop = span.start, settings.steps if span.stop is None else span.stop
    torch.manual_seed(settings.seed)
    optimiser = build_optimiser(module, settings)
    if span.optimiser_state:
        restore_optimiser(module, optimiser, span.optimiser_state)
    if recorder is not None and start == 0:
        start = _resume(module, optimiser, recorder)
        if start == 0:
            recorder.after(0, module, optimiser, last=False)
    module.train()
    for step in range(start + 1, stop + 1):
        for group in optimiser.param_groups:
            group["lr"] = settings.rate(step)
        optimiser.zero_grad(set_to_none=True)
        loss = batch_loss(module, step)
        loss.backward()
        optimiser.step()
        if after_step is not None:
            after_step(step, module, optimiser)
        if recorder is not None:
            recorder.after(step, module, optimiser, last=step == stop)
        if progress is not None:
            progress(step, loss.item() if step % 20 == 0 or step == stop else float("nan"))
    module.eval()
    if recorder is not None:
        recorder.finish(settings)
    return module


def _resume(module: nn.Module, optimiser: torch.optim.Optimizer, recorder: SeriesWriter) -> int:
    step = recorder.resume_step()
    if step is None:
        return 0
    recorder.space.write(module, recorder.space.flatten(read_weights(recorder.folder.weights(step))))
    restore_optimiser(module, optimiser, read_weights(recorder.folder.state(step)))
    return step
