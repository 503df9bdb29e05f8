"""The one way to a series of checkpoints: :func:`open_checkpoints`.

At opening only names, headers and indexes are read, and every incomplete checkpoint is named;
weights are read one checkpoint at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from polca_edit.checkpoints.files import WEIGHT_SUFFIXES, SeriesFolder, damage_of, read_weights, step_of
from polca_edit.checkpoints.huggingface import (
    HubRevisions,
    adapter_reference,
    is_adapter,
    logged_rates,
    spellings,
)
from polca_edit.checkpoints.huggingface_models import load_causal_lm
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.parameters import ParameterSpace, parameter_slots

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


@dataclass(frozen=True)
class Revision:
    """One checkpoint on disk.

    Attributes:
        name: file, folder or revision name.
        step: optimiser steps.
        path: file or folder that holds the weights.
    """

    name: str
    step: int
    path: Path


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
            than :data:`~polca_edit.checkpoints.files.STEP_PATTERNS`.
        reference: the pretrained model of a fine-tuning run; becomes step 0. LoRA adapters need
            none: their step 0 has every B matrix zero.
        skip_damaged: leave incomplete checkpoints out instead of refusing.
        load: builds the module of a folder, where parameters are named otherwise than in the files
            (a TransformerLens bridge). By default tensors are read from the files by name, and where
            transformers renames them on loading, from the model it builds.

    Returns:
        the series, ordered by step; files are upcast to float32, flat vectors keep their dtype.

    Raises:
        ValueError: for a missing or damaged checkpoint, a name without a step, a step that occurs
            twice, a recording of another model, or a reference beside a checkpoint of step 0.
    """
    space = model if isinstance(model, ParameterSpace) else ParameterSpace.from_module(model)
    if isinstance(source, HubRevisions):
        return _taken(_from_hub(source, space, load), steps)
    files = partial(_from_files, space=space, reference=reference, skip_damaged=skip_damaged, load=load)
    if isinstance(source, str | Path):
        if SeriesFolder(Path(source)).index.exists():
            return _taken(_recorded(Path(source), space, skip_damaged), steps)
        return _taken(files(find_revisions(source, names=names, step_pattern=step_pattern)), steps)
    if isinstance(source, Mapping):
        given, entries = [int(step) for step in source], list(source.values())
    else:
        entries = list(source)
        given, steps = _steps_of(entries, steps, step_pattern), None
    paths = [Path(entry) for entry in entries if isinstance(entry, str | Path)]
    if not paths:
        return _taken(_in_memory(given, entries, space), steps)
    if len(paths) != len(entries):
        raise ValueError("checkpoints must be all on disk or all in memory, got both; read the files first")
    found = [Revision(path.name, step, path) for step, path in zip(given, paths, strict=True)]
    return _taken(files(_by_step(found)), steps)


def find_revisions(
    directory: Path | str, *, names: str = "*", step_pattern: str | None = None
) -> list[Revision]:
    """Checkpoints under a directory, ordered by step.

    Understood are a folder per checkpoint (Trainer output, local revisions), a hub cache of one
    model (``refs/`` with one file per revision, ``snapshots/`` with the folders they name), and, where
    no folder is named by step, weight files named by step.

    Args:
        directory: where to look.
        names: shell pattern the names must match.
        step_pattern: see :func:`~polca_edit.checkpoints.files.step_of`.

    Raises:
        ValueError: if nothing is there, or two checkpoints have the same step.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"a checkpoint directory must exist, '{directory}' does not; check the path")
    if (directory / "key.json").exists():
        raise ValueError(
            f"a recording must have its series.json, that in '{directory}' was stopped early; "
            "run it again to finish it"
        )
    named: list[tuple[str, Path]] = []
    if (directory / "refs").is_dir() and (directory / "snapshots").is_dir():
        for ref in sorted((directory / "refs").rglob(names)):
            if ref.is_file():
                named.append((ref.name, directory / "snapshots" / ref.read_text().strip()))
    else:
        named = [(path.name, path) for path in sorted(directory.glob(names))]
    found = [
        Revision(name, step, path)
        for name, path in named
        if (path.is_dir() or path.suffix in WEIGHT_SUFFIXES or not path.exists())
        and (step := step_of(name, step_pattern)) is not None
    ]
    folders = [revision for revision in found if not revision.path.is_file()]
    if not found:
        raise ValueError(
            f"'{directory}' must hold checkpoints named by step, found none matching '{names}'; "
            "give the folder that contains them, or a pattern"
        )
    return _by_step(folders or found)


def whole_revisions(revisions: Sequence[Revision], *, skip_damaged: bool = False) -> list[Revision]:
    """The readable ones.

    Args:
        revisions: candidates.
        skip_damaged: leave damaged ones out instead of refusing.

    Raises:
        ValueError: naming every damaged checkpoint and what is wrong with it.
    """
    problems = {r.name: problem for r in revisions if (problem := damage_of(r.path)) is not None}
    if problems and not skip_damaged:
        listed = "; ".join(f"'{name}': {problem}" for name, problem in list(problems.items())[:5])
        raise ValueError(
            f"every checkpoint must be whole, {len(problems)} of {len(revisions)} are not ({listed}); "
            "copy them again or leave them out with skip_damaged"
        )
    return [r for r in revisions if r.name not in problems]


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


def _by_step(revisions: Sequence[Revision]) -> list[Revision]:
    ordered = sorted(revisions, key=lambda revision: revision.step)
    for one, other in zip(ordered, ordered[1:], strict=False):
        if one.step == other.step:
            raise ValueError(
                f"every checkpoint needs its own step, '{one.name}' and '{other.name}' both say {one.step}; "
                "narrow the name pattern or give a step pattern"
            )
    return ordered


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


def _in_memory(
    steps: Sequence[int], weights: Sequence[Path | str | Weights], space: ParameterSpace
) -> Checkpoints:
    order = sorted(range(len(steps)), key=lambda index: steps[index])
    kept = [entry for index in order if not isinstance(entry := weights[index], str | Path)]
    _refuse_live_weights([entry for entry in kept if isinstance(entry, Mapping)], space)
    flat = [entry for entry in kept if isinstance(entry, Tensor)]
    dtype = flat[0].dtype if flat else torch.float32

    def read(index: int) -> Mapping[str, Tensor]:
        entry = kept[index]
        return space.unflatten(entry) if isinstance(entry, Tensor) else entry

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


def _recorded(directory: Path, space: ParameterSpace, skip_damaged: bool) -> Checkpoints:
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
    rates = None
    if index.learning_rates is not None:
        rate_at = dict(zip(index.steps, index.learning_rates, strict=True))
        rates = tuple(rate_at[revision.step] for revision in kept)
    return Checkpoints(
        space,
        tuple(revision.step for revision in kept),
        lambda i: read_weights(kept[i].path),
        rates,
        index.weight_decay,
        str(directory),
    )


def _from_files(
    revisions: Sequence[Revision],
    space: ParameterSpace,
    *,
    reference: Path | str | None,
    skip_damaged: bool,
    load: Callable[[Path], nn.Module] | None,
) -> Checkpoints:
    chosen = whole_revisions(revisions, skip_damaged=skip_damaged)
    if reference is not None:
        if chosen and chosen[0].step == 0:
            raise ValueError(
                f"the reference becomes step 0, but '{chosen[0].name}' is step 0 already; drop one"
            )
        chosen = [*whole_revisions([Revision("reference", 0, Path(reference))]), *chosen]
    spelled = spellings(space)

    def read(index: int) -> Mapping[str, Tensor]:
        try:
            return _named_weights(chosen[index].path, space, spelled, load)
        except ValueError as error:
            raise ValueError(f"checkpoint '{chosen[index].name}': {error}") from error

    steps = tuple(revision.step for revision in chosen)
    rates = None
    if load is None and chosen:
        logged = {**({0: 0.0} if 0 in steps else {}), **logged_rates(chosen[-1].path)}
        rates = tuple(logged[step] for step in steps) if set(steps) <= set(logged) else None
    series = Checkpoints(
        space, steps, read, rates, None, str(chosen[-1].path.parent) if chosen else "no files"
    )
    # An adapter's folder holds the movement alone; where all of it is LoRA the pretrained model is known.
    lora = all("lora_" in name for name in space.names)
    if chosen and steps[0] > 0 and lora and is_adapter(chosen[-1].path):
        return _with_first(series, adapter_reference(space, series[0]))
    return series


def _from_hub(
    hub: HubRevisions, space: ParameterSpace, load: Callable[[Path], nn.Module] | None
) -> Checkpoints:
    ordered = sorted(hub.revisions.items(), key=lambda item: item[1])
    spelled = spellings(space)

    def read(index: int) -> Mapping[str, Tensor]:
        return _named_weights(hub.fetch(ordered[index][0]), space, spelled, load)

    return Checkpoints(space, tuple(step for _, step in ordered), read, source=hub.repository)


def _named_weights(
    path: Path,
    space: ParameterSpace,
    spelled: Mapping[str, str],
    load: Callable[[Path], nn.Module] | None,
) -> Mapping[str, Tensor]:
    """A checkpoint's tensors under the names of the space."""
    if load is not None:
        return dict(parameter_slots(load(path)))
    tensors = {spelled.get(name, name): tensor for name, tensor in read_weights(path).items()}
    present = {name for slot, name in space.aliases if slot in tensors}
    if len(present) == len(space.names) or not (path / "config.json").exists():
        return tensors
    # Releases of transformers rename parameters (embed_out, lm_head); its own loader knows how.
    return dict(parameter_slots(load_causal_lm(path)))


def _with_first(checkpoints: Checkpoints, theta: Tensor) -> Checkpoints:
    """The series with one more checkpoint in front, at step 0."""
    first = theta.clone()

    def read(index: int) -> Mapping[str, Tensor]:
        return checkpoints.space.unflatten(first) if index == 0 else checkpoints.read(index - 1)

    rates = None if checkpoints.learning_rates is None else (0.0, *checkpoints.learning_rates)
    return replace(checkpoints, steps=(0, *checkpoints.steps), read=read, learning_rates=rates)
