"""Recording the series this toolkit reads from other people's training loops.

Three ways: :class:`Recorder` in a loop of one's own (three lines), a ``transformers``
TrainerCallback, a Lightning callback (package ``lightning``, optional). All write what
:mod:`polca_edit.training` writes: ``step-*.safetensors``, ``state-*.safetensors`` and
``series.json``, which ``polca_edit.open_checkpoints`` opens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polca_edit.checkpoints.files import SeriesFolder, SeriesIndex, write_tensors
from polca_edit.checkpoints.spacing import Adaptive, Thinning
from polca_edit.parameters import ParameterSpace, saved_buffers
from polca_edit.training import optimiser_tensors


class Recorder:
    """Records a plain loop.

    ::

        recorder = Recorder("run/checkpoints", model, optimiser, every=20)
        for batch in loader:
            ...                      # forward, backward, optimiser.step()
            recorder.step()
        recorder.finish(data_seed=0)

    The initial weights are written at once, weights after every ``every`` calls of :meth:`step`,
    optimiser state after every ``state_every``. ``series.json`` is rewritten after each weight
    file, so a run that is stopped leaves a series that opens.

    With ``schedule=Adaptive(51, probe)`` the weights after every ``every`` steps are candidates, of which 51
    stay on disk: those between which the losses of ``probe(model)``, a small fixed batch, move
    (:mod:`polca_edit.checkpoints.spacing`). Few files then miss less of the loss change than in equal steps.
    """

    def __init__(
        self,
        directory: Path | str,
        module: nn.Module,
        optimiser: torch.optim.Optimizer | None = None,
        *,
        every: int = 20,
        state_every: int | None = None,
        schedule: Sequence[int] | Adaptive | None = None,
        include: Sequence[str] = ("*",),
        first_step: int = 0,
    ) -> None:
        """Prepare the directory and write the weights as they are.

        Args:
            directory: a new or empty directory.
            module: the model being trained.
            optimiser: for learning rate, weight decay and state; may come later (see ``optimiser``).
            every: steps between recorded weights.
            state_every: steps between recorded optimiser states; default ten times ``every``.
            schedule: record weights at exactly these steps instead, or keep only some of the recorded ones;
                None keeps all.
            include: patterns of parameter names (adapters only: ``("*lora_*",)``).
            first_step: steps the model has behind it.

        Raises:
            ValueError: for a directory that holds a series already, or a spacing below one.
        """
        if every < 1 or (state_every is not None and state_every < 1):
            raise ValueError(f"recording spacings must be at least 1, got {every} and {state_every}")
        self.folder = SeriesFolder(Path(directory))
        if self.folder.index.exists():
            raise ValueError(f"'{directory}' holds a recorded series already; choose another directory")
        self.module = module
        self.optimiser = optimiser
        self.space = ParameterSpace.from_module(module, include)
        self.every = every
        self.state_every = state_every or 10 * every
        self.adaptive = schedule if isinstance(schedule, Adaptive) else None
        self.wanted = None if schedule is None or isinstance(schedule, Adaptive) else set(schedule)
        self._thinning = None if self.adaptive is None else Thinning(self.adaptive.count)
        self.count = first_step
        self.recorded: list[int] = []
        self.rates: list[float] = []
        self.rate: float | None = None
        self.data_order: dict[str, object] = {}
        self._held: tuple[int, Tensor, Tensor | None] | None = None
        self._write_weights()
        self._marks = self._marked()

    def step(self) -> None:
        """Note one optimiser step; call it after ``optimiser.step()``."""
        self.reached(self.count + 1)

    def note_rate(self) -> None:
        """Keep the rate of the update at hand, for loops whose scheduler moves before we are told."""
        self.rate = self._group("lr")

    def reached(self, step: int, *, rate_is_current: bool = True) -> None:
        """Note that the model is now after ``step`` optimiser steps (for loops that count themselves).

        Args:
            step: steps done.
            rate_is_current: the optimiser still shows the rate of this update; otherwise
                :meth:`note_rate` was called before it changed.

        Raises:
            ValueError: if the step does not increase.
        """
        if step <= self.count:
            raise ValueError(f"steps must increase, got {step} after {self.count}")
        self.count = step
        self._marks = self._marked()
        if rate_is_current:
            self.note_rate()
        due = step % self.every == 0 if self.wanted is None else step in self.wanted
        if due:
            self._write_weights()
        if step % self.state_every == 0:
            self._write_state()

    def hold(self) -> None:
        """Keep a copy of the weights in memory where this may be the last step and it is not recorded.

        For loops whose end is told only after something else has changed the weights: the best checkpoint
        loaded back, an average taken.
        """
        if self.count not in self.recorded and self._marks == self._marked():
            self._held = self.count, self.space.read(self.module), self._probed()

    def finish(self, **data_order: object) -> None:
        """Write the weights and state of the last step, and how the data were drawn (seed, sampler, batch).

        Weights that were changed after the last step (the best checkpoint loaded back, an average) are not
        those of any step: they are never written. Where the last step's are gone the series ends before it,
        with a warning.
        """
        self.data_order = dict(data_order)
        held = self._held is not None and self._held[0] == self.count
        if self.count in self.recorded:
            self._write_index()
        elif held or self._marks == self._marked():
            self._write_weights()
        else:
            self._write_index()
            warnings.warn(
                f"the weights were changed after step {self.count}, so the series ends at step "
                f"{self.recorded[-1]}; call finish() before loading or averaging weights",
                stacklevel=2,
            )
        if self.count and self._marks == self._marked():
            self._write_state()

    def _marked(self) -> tuple[tuple[int, int], ...]:
        """Where each parameter's values lie and how often they were changed in place."""
        return tuple((p.data_ptr(), p._version) for p in self.module.parameters())

    def _group(self, key: str) -> float | None:
        if self.optimiser is None:
            return None
        value = self.optimiser.param_groups[0].get(key)
        return None if value is None else float(value)

    def _write_weights(self) -> None:
        held = self._held
        if held is None or held[0] != self.count:
            held = self.count, self.space.read(self.module), self._probed()
        _, theta, losses = held
        self._held = None
        beside = saved_buffers(self.module)
        write_tensors(self.folder.weights(self.count), {**self.space.unflatten(theta), **beside})
        self.recorded.append(self.count)
        self.rates.append(math.nan if self.rate is None else self.rate)
        dropped = () if self._thinning is None or losses is None else self._thinning.offer(self.count, losses)
        for step in dropped:
            place = self.recorded.index(step)
            del self.recorded[place], self.rates[place]
        self._write_index()
        self.folder.drop_weights(dropped)

    def _probed(self) -> Tensor | None:
        return None if self.adaptive is None else self.adaptive.measured(self.module)

    def _write_state(self) -> None:
        if self.optimiser is not None and not self.folder.state(self.count).exists():
            tensors = optimiser_tensors(self.module, self.optimiser)
            write_tensors(self.folder.state(self.count), tensors)

    def _write_index(self) -> None:
        # At step 0 no update has been made.
        rates = [0.0 if step == 0 else rate for step, rate in zip(self.recorded, self.rates, strict=True)]
        known = all(math.isfinite(rate) for rate in rates)
        index = SeriesIndex(
            tuple(self.recorded),
            self.space.fingerprint(),
            tuple(rates) if known else None,
            self._group("weight_decay"),
        )
        self.folder.write_index(index, data_order=self.data_order)


def trainer_callback(directory: Path | str, **settings: Any) -> Any:
    """A ``transformers.TrainerCallback`` that records a Trainer run.

    ::

        trainer = Trainer(model, args, ..., callbacks=[trainer_callback("run/checkpoints", every=50)])

    Args:
        directory: where the series goes.
        **settings: as for :class:`Recorder` (``every``, ``state_every``, ``schedule``, ``include``).
    """
    from transformers import TrainerCallback

    class Recording(TrainerCallback):  # type: ignore[misc]
        """Weights after optimiser steps; data order from the training arguments."""

        recorder: Recorder | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.recorder = Recorder(
                directory, given["model"], given.get("optimizer"), first_step=state.global_step, **settings
            )

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            # Called after the update and before the scheduler and the counter move on.
            assert self.recorder is not None
            if self.recorder.optimiser is None:
                self.recorder.optimiser = given.get("optimizer")
            self.recorder.reached(state.global_step + 1)

        # The trainer may load the best checkpoint back before it says that training has ended. By then one
        # of these has been called after the last step.
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if control.should_training_stop and self.recorder is not None:
                self.recorder.hold()

        def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if self.recorder is not None:
                self.recorder.hold()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if self.recorder is not None:
                self.recorder.hold()

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            assert self.recorder is not None
            seed = args.data_seed if args.data_seed is not None else args.seed
            self.recorder.finish(seed=seed, batch_size=args.train_batch_size, rule="transformers.Trainer")

    return Recording()


def lightning_callback(directory: Path | str, **settings: Any) -> Any:
    """A Lightning callback that records a ``Trainer.fit``.

    Args:
        directory: where the series goes.
        **settings: as for :class:`Recorder`.

    Raises:
        ValueError: without the package ``lightning``.
    """
    callback = _lightning_base()

    class Recording(callback):  # type: ignore[misc, valid-type]
        """Weights after optimiser steps of the wrapped module."""

        recorder: Recorder | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            optimiser = trainer.optimizers[0] if trainer.optimizers else None
            self.recorder = Recorder(
                directory, pl_module, optimiser, first_step=trainer.global_step, **settings
            )

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            assert self.recorder is not None
            self.recorder.note_rate()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            # With gradient accumulation most batches make no optimiser step.
            assert self.recorder is not None
            if trainer.global_step > self.recorder.count:
                self.recorder.reached(trainer.global_step, rate_is_current=False)
                # Other callbacks (weight averaging) may change the weights before the end is told.
                if trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps:
                    self.recorder.hold()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            assert self.recorder is not None
            self.recorder.finish(rule="lightning.Trainer")

    return Recording()


def _lightning_base() -> Callable[..., Any]:
    try:
        from lightning.pytorch.callbacks import Callback
    except ImportError:
        try:
            from pytorch_lightning.callbacks import Callback
        except ImportError as error:
            raise ValueError("a Lightning callback needs the package 'lightning'; pip install it") from error
    base: Callable[..., Any] = Callback
    return base
