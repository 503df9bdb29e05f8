"""The one way to a series of checkpoints: :func:`open_checkpoints`.

At opening only names, headers and indexes are read, and every incomplete checkpoint is named;
weights are read one checkpoint at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from polca_edit.checkpoints.agreement import Agreement, comparable, compare, library_loss, own_loss
from polca_edit.checkpoints.files import SeriesFolder, read_weights
from polca_edit.checkpoints.huggingface import (
    AdapterStart,
    HubRevisions,
    adapter_reference,
    is_adapter,
    logged_rates,
)
from polca_edit.checkpoints.huggingface_models import load_causal_lm
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.checkpoints.step_names import step_of
from polca_edit.checkpoints.survey import Revision, by_step, find_revisions, whole_revisions
from polca_edit.checkpoints.tensor_names import stored_names
from polca_edit.parameters import ParameterSpace, parameter_slots, saved_buffers

#: Weights already in memory: a state dict, or a flat vector (N,).
Weights = Mapping[str, Tensor] | Tensor
#: What holds a series:
#:
#: - a directory: our own recording (``series.json``), a Trainer's output, one folder per revision,
#:   adapters (PEFT), a hub cache of one model, or weight files named by step;
#: - :class:`~polca_edit.checkpoints.huggingface.HubRevisions`, fetched one at a time;
#: - a list of files or folders, whose steps are in their names or given;
#: - a mapping step -> file, folder, state dict or flat vector (N,), or a list of state dicts or flat
#:   vectors with the steps given.
Source = (
    Path | str | HubRevisions | Mapping[int, Path | str | Weights] | Sequence[Path | str | Weights] | Tensor
)


def open_checkpoints(
    source: Source,
    model: nn.Module | ParameterSpace,
    *,
    steps: Sequence[int] | None = None,
    names: str = "*",
    step_pattern: str | None = None,
    reference: Path | str | None = None,
    skip_damaged: bool = False,
    load: Callable[[Path], nn.Module] | None = None,
) -> Checkpoints:
    """A lazy series of weights from whatever holds them.

    >>> model = nn.Linear(2, 1)
    >>> start = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    >>> series = open_checkpoints({0: start, 10: {n: v + 1 for n, v in start.items()}}, model)
    >>> series.steps, series[1].tolist()
    ((0, 10), [1.0, 1.0, 1.0])

    Args:
        source: see :data:`Source`. Weights in memory are not copied.
        model: the module, or its parameter space.
        steps: for a list, the step of each entry; otherwise the steps to take (default all).
        names: shell pattern that file and folder names must match.
        step_pattern: regular expression whose first group is the step, where names say it otherwise
            than :data:`~polca_edit.checkpoints.step_names.STEP_PATTERNS`.
        reference: the pretrained model of a fine-tuning run; becomes step 0. Adapters need none where the
            model is that of :func:`~polca_edit.checkpoints.huggingface_models.load_adapted`.
        skip_damaged: leave incomplete checkpoints out instead of refusing.
        load: builds the module of a folder, where parameters are named otherwise than in the files
            (a TransformerLens bridge). By default tensors are read from the files by name, and where
            transformers renames them on loading, from the model it builds.

    The loss of a folder with a config.json is compared with transformers' own when it is read first, where
    the model is given and not only its space (:mod:`polca_edit.checkpoints.agreement`).

    Returns:
        the series, ordered by step; files are upcast to float32, flat vectors keep their dtype.

    Raises:
        ValueError: for a missing or damaged checkpoint, a name without a step, a step that occurs
            twice, a recording of another model, or a reference beside a checkpoint of step 0; and, when a
            checkpoint is read, for a parameter that is missing, unknown or quantised, buffers that are not
            the model's, or a loss that is not its library's.
    """
    opened = _Opened.of(model, load)
    if isinstance(source, HubRevisions):
        return _taken(_from_hub(source, opened), steps)
    files = partial(_from_files, opened=opened, reference=reference, skip_damaged=skip_damaged)
    if isinstance(source, str | Path):
        if SeriesFolder(Path(source)).index.exists():
            return _taken(_recorded(Path(source), opened, skip_damaged), steps)
        return _taken(files(find_revisions(source, names=names, step_pattern=step_pattern)), steps)
    if isinstance(source, Mapping):
        return _taken(_listed(list(source), list(source.values()), opened, files), steps)
    entries = list(source)
    return _listed(_steps_of(entries, steps, step_pattern), entries, opened, files)


def _listed(
    given: Sequence[int],
    entries: Sequence[Path | str | Weights],
    opened: _Opened,
    files: Callable[[Sequence[Revision]], Checkpoints],
) -> Checkpoints:
    """A series of entries with their steps."""
    given = [int(step) for step in given]
    paths = [Path(entry) for entry in entries if isinstance(entry, str | Path)]
    if not paths:
        return _in_memory(given, entries, opened)
    if len(paths) != len(entries):
        raise ValueError("checkpoints must be all on disk or all in memory, got both; read the files first")
    found = [Revision(path.name, step, path) for step, path in zip(given, paths, strict=True)]
    return files(by_step(found))


@dataclass(frozen=True, eq=False)
class _Opened:
    """What the readers of one series share.

    Attributes:
        space: parameters.
        module: the model they belong to, None where only the space is known.
        buffers: what stands beside the parameters in the model's state dict.
        load: see :func:`open_checkpoints`.
        start: where an adapter began.
        compared: names of checkpoints whose loss was found to be their own library's.
    """

    space: ParameterSpace
    module: nn.Module | None
    buffers: Mapping[str, Tensor]
    load: Callable[[Path], nn.Module] | None
    start: AdapterStart | None
    compared: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls, model: nn.Module | ParameterSpace, load: Callable[[Path], nn.Module] | None = None
    ) -> _Opened:
        if isinstance(model, ParameterSpace):
            return cls(model, None, {}, load, None)
        space, start = ParameterSpace.from_module(model), getattr(model, "adapter_start", None)
        return cls(space, model, saved_buffers(model), load, start)

    def refuse_other_buffers(self, tensors: Mapping[str, Tensor]) -> None:
        """An error for a stored buffer that is not the model's: losses would be of neither checkpoint."""
        for name, tensor in tensors.items():
            own = self.buffers.get(name)
            if own is not None and not torch.equal(own.cpu(), tensor.cpu().to(own.dtype)):
                raise ValueError(
                    f"buffers must be the same at every checkpoint, '{name}' is not the model's (running "
                    "statistics move the loss without any parameter); freeze them in training, or leave the "
                    "buffer out of the state dicts to hold it at the model's value"
                )

    def compare(self, name: str, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Once per checkpoint: its loss here beside that of the library whose format the folder has."""
        owned = path.is_dir() and ((path / "config.json").exists() or (self.start and is_adapter(path)))
        if name in self.compared or not owned or not comparable(self.module):
            return
        assert self.module is not None
        compare(name, path, self.module, self.space, tensors, self.start).require()
        self.compared.add(name)


# -- steps ------------------------------------------------------------------------------------------


def _steps_of(entries: Sequence[object], steps: Sequence[int] | None, pattern: str | None) -> list[int]:
    """The step of each entry of a list: as given, or read off its name."""
    if steps is not None:
        if len(steps) != len(entries):
            raise ValueError(
                f"every checkpoint needs one step, got {len(entries)} checkpoints and {len(steps)} steps; "
                "give as many"
            )
        return [int(step) for step in steps]
    known = []
    for entry in entries:
        if not isinstance(entry, str | Path):
            raise ValueError(
                "weights in memory have no step in a name; pass steps, or a mapping step -> weights"
            )
        step = step_of(str(entry), pattern)
        if step is None:
            raise ValueError(f"a checkpoint name must hold its step, '{entry}' does not; pass steps")
        known.append(step)
    return known


def _taken(series: Checkpoints, steps: Sequence[int] | None) -> Checkpoints:
    if steps is None:
        return series
    absent = sorted(set(steps) - set(series.steps))
    if absent:
        raise ValueError(
            f"every step asked for must be there, {absent[:5]} are not in {series.source}; see its steps"
        )
    wanted = set(steps)
    return series.subset([index for index, step in enumerate(series.steps) if step in wanted])


# -- sources ----------------------------------------------------------------------------------------


def _in_memory(steps: Sequence[int], weights: Sequence[Path | str | Weights], opened: _Opened) -> Checkpoints:
    space = opened.space
    order = sorted(range(len(steps)), key=lambda index: steps[index])
    kept = [entry for index in order if not isinstance(entry := weights[index], str | Path)]
    _refuse_live_weights([entry for entry in kept if isinstance(entry, Mapping)], space)
    flat = [entry for entry in kept if isinstance(entry, Tensor)]
    dtype = flat[0].dtype if flat else torch.float32

    def read(index: int) -> Mapping[str, Tensor]:
        entry = kept[index]
        if isinstance(entry, Tensor):
            return space.unflatten(entry)
        opened.refuse_other_buffers(entry)
        return entry

    return Checkpoints(space, tuple(steps[index] for index in order), read, dtype=dtype)


def _refuse_live_weights(states: Sequence[Mapping[str, Tensor]], space: ParameterSpace) -> None:
    """``module.state_dict()`` is a view of the module: kept without a copy, every step is the last one."""
    name = space.names[0]
    held = [state[name].data_ptr() for state in states if name in state]
    if len(set(held)) < len(held):
        raise ValueError(
            "state dicts of different steps must not share memory, some do; keep copies, "
            "{n: v.clone() for n, v in model.state_dict().items()}"
        )


def _recorded(directory: Path, opened: _Opened, skip_damaged: bool) -> Checkpoints:
    space = opened.space
    folder = SeriesFolder(directory)
    index = folder.read_index()
    if index.fingerprint not in (None, space.fingerprint()):
        raise ValueError(
            f"the series in '{directory}' is of another model (parameter names or shapes differ); "
            "build the model it was recorded from"
        )
    every = [Revision(folder.weights(step).name, step, folder.weights(step)) for step in index.steps]
    missing = [revision.step for revision in every if not revision.path.exists()]
    if missing and not skip_damaged:
        raise ValueError(
            f"'{directory}' must hold every step of its index, {missing[:5]} are missing; copy it again"
        )
    kept = whole_revisions(every, skip_damaged=skip_damaged)

    def read(number: int) -> Mapping[str, Tensor]:
        tensors = read_weights(kept[number].path)
        opened.refuse_other_buffers(tensors)
        return tensors

    rates = None
    if index.learning_rates is not None:
        rate_at = dict(zip(index.steps, index.learning_rates, strict=True))
        rates = tuple(rate_at[revision.step] for revision in kept)
    return Checkpoints(
        space,
        tuple(revision.step for revision in kept),
        read,
        rates,
        index.weight_decay,
        str(directory),
    )


def _from_files(
    revisions: Sequence[Revision],
    opened: _Opened,
    *,
    reference: Path | str | None,
    skip_damaged: bool,
) -> Checkpoints:
    chosen = whole_revisions(revisions, skip_damaged=skip_damaged)
    if reference is not None:
        if chosen and chosen[0].step == 0:
            raise ValueError(
                f"the reference becomes step 0, but '{chosen[0].name}' is step 0 already; drop one"
            )
        chosen = [*whole_revisions([Revision("reference", 0, Path(reference))]), *chosen]

    def read(index: int) -> Mapping[str, Tensor]:
        try:
            return _read_checked(chosen[index].name, chosen[index].path, opened)
        except ValueError as error:
            raise ValueError(f"checkpoint '{chosen[index].name}': {error}") from error

    steps = tuple(revision.step for revision in chosen)
    rates = None
    if opened.load is None and chosen:
        logged = {**({0: 0.0} if 0 in steps else {}), **logged_rates(chosen[-1].path)}
        rates = tuple(logged[step] for step in steps) if set(steps) <= set(logged) else None
    series = Checkpoints(
        opened.space, steps, read, rates, None, str(chosen[-1].path.parent) if chosen else "no files"
    )
    if chosen and steps[0] > 0 and is_adapter(chosen[-1].path):
        return _with_pretrained(series, opened)
    return series


def _with_pretrained(series: Checkpoints, opened: _Opened) -> Checkpoints:
    """An adapter's folder holds the movement alone; where its start is known, step 0 is the base."""
    start = opened.start
    if start is None and not all("lora_" in name for name in opened.space.names):
        return series
    first = adapter_reference(opened.space, series[0], start)
    if start is not None and opened.module is not None and comparable(opened.module):
        ours = own_loss(opened.module, opened.space, first)
        Agreement("step 0, the pretrained model", ours, library_loss(start.base)).require()
    return _with_first(series, first)


def _from_hub(hub: HubRevisions, opened: _Opened) -> Checkpoints:
    ordered = sorted(hub.revisions.items(), key=lambda item: item[1])

    def read(index: int) -> Mapping[str, Tensor]:
        name = ordered[index][0]
        return _read_checked(name, hub.fetch(name), opened)

    return Checkpoints(opened.space, tuple(step for _, step in ordered), read, source=hub.repository)


def _read_checked(name: str, path: Path, opened: _Opened) -> Mapping[str, Tensor]:
    tensors = _named_weights(path, opened)
    opened.compare(name, path, tensors)
    return tensors


def read_checkpoint(path: Path | str, model: nn.Module | ParameterSpace) -> Mapping[str, Tensor]:
    """One checkpoint's tensors under the names of a model, as every series reads them; no loss is compared.

    Raises:
        ValueError: for a parameter that is missing, unknown or quantised, or other buffers than the model's.
    """
    return _named_weights(Path(path), _Opened.of(model))


def _named_weights(path: Path, opened: _Opened) -> Mapping[str, Tensor]:
    """A checkpoint's tensors under the names of the space."""
    if opened.load is not None:
        return dict(parameter_slots(opened.load(path)))
    stored = read_weights(path)
    found = stored_names({name: tuple(tensor.shape) for name, tensor in stored.items()}, opened.space)
    if found.complete:
        opened.refuse_other_buffers({name: stored[held] for held, name in found.others.items()})
        return found.renamed(stored)
    if (path / "config.json").exists():
        # Releases of transformers rename parameters (embed_out, lm_head); its own loader knows how.
        return dict(parameter_slots(load_causal_lm(path)))
    raise ValueError(f"{found.problem()}; is this another model?")


def _with_first(checkpoints: Checkpoints, theta: Tensor) -> Checkpoints:
    """The series with one more checkpoint in front, at step 0."""
    first = theta.clone()

    def read(index: int) -> Mapping[str, Tensor]:
        return checkpoints.space.unflatten(first) if index == 0 else checkpoints.read(index - 1)

    rates = None if checkpoints.learning_rates is None else (0.0, *checkpoints.learning_rates)
    return replace(checkpoints, steps=(0, *checkpoints.steps), read=read, learning_rates=rates)
