"""What a folder of checkpoints holds, checkpoint by checkpoint; nothing found wrong stops the others.

Every fact comes from the readers that a run uses: the survey of names, the headers, the matching of tensor
names, the loader of the model, and the comparison of its loss with the owning library's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from polca_edit.checkpoints.agreement import comparable, compare, library_loss, own_loss
from polca_edit.checkpoints.files import SeriesFolder, damage_of, read_weights, stored_header, weight_files
from polca_edit.checkpoints.huggingface import adapter_reference, base_of_adapter, is_adapter
from polca_edit.checkpoints.huggingface_models import load_adapted, load_causal_lm, vocabulary_and_context
from polca_edit.checkpoints.opening import open_checkpoints, read_checkpoint
from polca_edit.checkpoints.survey import Revision, Survey, survey
from polca_edit.checkpoints.tensor_names import MARKS, stored_names
from polca_edit.checkpoints.tokenizer_files import load_tokenizer
from polca_edit.derivatives.settled import unsettled_part
from polca_edit.parameters import ParameterSpace


@dataclass(frozen=True)
class Checked:
    """One checkpoint.

    Attributes:
        name: of file, folder or revision.
        step: optimiser steps.
        files: that hold its weights.
        dtypes: stored dtype -> tensors.
        prefixes: of wrappers, stripped.
        respelled: tensors under an older or shorter name.
        ignored: buffers of older releases.
        missing: parameters that no stored name stands for, before transformers' own renaming.
        unknown: stored names that stand for nothing, before transformers' own renaming.
        ours: mean loss here, nats per token; None where nothing is compared.
        library: mean loss in transformers.
        problem: why it cannot be used, None if it can.
    """

    name: str
    step: int
    files: tuple[str, ...] = ()
    dtypes: Mapping[str, int] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    respelled: int = 0
    ignored: int = 0
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    ours: float | None = None
    library: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Model:
    """The model at the last checkpoint.

    Attributes:
        name: class.
        parameters: N.
        tied: groups of names that share one tensor.
        tied_by_config: what config.json says of embedding and head, None where it says nothing.
        vocabulary: token ids.
        context: longest sequence, None where there is no limit.
        ready: what stands in the way of derivatives, ``ready`` if nothing does.
        tokenizer: what was found.
    """

    name: str
    parameters: int
    tied: tuple[tuple[str, ...], ...]
    tied_by_config: bool | None
    vocabulary: int
    context: int | None
    ready: str
    tokenizer: str


@dataclass(frozen=True)
class Diagnosis:
    """What was found in a folder.

    Attributes:
        folder: looked at.
        kind: ``recorded series``, ``model folders``, ``adapters``, ``hub cache``, ``weight files`` or
            ``one checkpoint``.
        order: the sentence of the survey.
        left_out: names that say no step.
        checkpoints: by step.
        model: at the last checkpoint; None where the folder has none that transformers can build.
        problems: sentences; empty where the folder opens rightly.
        plan: what would run, and how long, as sentences.
        schema: of this record.
    """

    folder: str
    kind: str
    order: str
    left_out: tuple[str, ...]
    checkpoints: tuple[Checked, ...]
    model: Model | None
    problems: tuple[str, ...]
    plan: tuple[str, ...] = ()
    schema: str = "polca-edit/doctor/1"

    @property
    def gaps(self) -> list[int]:
        """Steps between neighbouring checkpoints."""
        steps = [checked.step for checked in self.checkpoints]
        return [b - a for a, b in zip(steps, steps[1:], strict=False)]


@dataclass(frozen=True)
class Question:
    """What is asked about.

    Attributes:
        folder: of checkpoints.
        base: pretrained model of a tuning run or of adapters.
        names: shell pattern of checkpoint names.
        step_pattern: regular expression whose first group is the step.
    """

    folder: Path
    base: Path | None = None
    names: str = "*"
    step_pattern: str | None = None


def surveyed(asked: Question) -> Survey:
    """The checkpoints of a folder of any kind; a folder that is one checkpoint counts as one.

    Raises:
        ValueError: if nothing is there.
    """
    folder = asked.folder
    recording = SeriesFolder(folder)
    if recording.index.exists():
        steps = recording.read_index().steps
        return Survey(
            "recorded series",
            tuple(Revision(recording.weights(s).name, s, recording.weights(s)) for s in steps),
        )
    try:
        return survey(folder, names=asked.names, step_pattern=asked.step_pattern)
    except ValueError:
        if not folder.is_dir() or damage_of(folder) is not None:
            raise
        return Survey("one checkpoint", (Revision(folder.resolve().name, 0, folder),))


def examine(asked: Question) -> Diagnosis:
    """Look at every checkpoint of a folder.

    Raises:
        ValueError: if the folder holds no checkpoint at all.
    """
    found = surveyed(asked)
    problems: list[str] = []
    last = next((r.path for r in reversed(found.revisions) if damage_of(r.path) is None), None)
    adapted = last is not None and is_adapter(last)
    module = None if last is None else _attempt(problems, lambda: _module(asked, last))
    space = None if module is None else ParameterSpace.from_module(module)
    checked = tuple(_checked(revision, module, space) for revision in found.revisions)
    problems += [f"{one.name}: {one.problem}" for one in checked if one.problem]
    if module is None:
        problems += _unlike(found.revisions)
    elif adapted:
        _attempt(problems, lambda: _start(module, found.revisions[0].path))
    elif asked.base is not None:
        base = asked.base
        _attempt(problems, lambda: open_checkpoints({0: base}, module)[0])
    kinds = {"folders": "adapters" if adapted else "model folders", "files": "weight files"}
    model = None
    if module is not None and space is not None and last is not None:
        model = _model(module, space, last, asked.base)
        if model.ready != "ready":
            problems.append(model.ready)
    return Diagnosis(
        str(asked.folder),
        kinds.get(found.kind, found.kind),
        found.sentence(),
        found.left_out,
        checked,
        model,
        tuple(dict.fromkeys(problems)),
    )


def _attempt(problems: list[str], look: Callable[[], Any]) -> Any:
    """What a look finds; a user's error is noted and gives None."""
    try:
        return look()
    except (ValueError, OSError) as error:
        problems.append(" ".join(str(error).split()))
        return None


def _module(asked: Question, last: Path) -> nn.Module | None:
    """The model at a checkpoint, None where it is weights alone."""
    if is_adapter(last):
        base = asked.base or base_of_adapter(last)
        if base is None:
            raise ValueError(f"'{last}' holds an adapter, its pretrained model is needed; pass --base FOLDER")
        return load_adapted(base, last)
    return load_causal_lm(last) if (last / "config.json").exists() else None


def _start(module: nn.Module, first: Path) -> None:
    """Whether an adapter's step 0 is the pretrained model."""
    start: Any = module.adapter_start
    space = ParameterSpace.from_module(module)
    theta = space.flatten(stored_names(_shapes(first), space).renamed(read_weights(first)))
    ours = own_loss(module, space, adapter_reference(space, theta, start))
    library = library_loss(start.base)
    if not abs(ours - library) <= 1e-4:
        raise ValueError(
            f"step 0 must be the pretrained model, it has {ours:.6f} nats per token and the model "
            f"{library:.6f}; save the adapter again as plain LoRA"
        )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in stored_header(path).items()}


def _checked(revision: Revision, module: nn.Module | None, space: ParameterSpace | None) -> Checked:
    """Headers, names and losses of one checkpoint."""
    path = revision.path
    if (damage := damage_of(path)) is not None:
        return Checked(revision.name, revision.step, problem=damage)
    problems: list[str] = []
    header = _attempt(problems, lambda: stored_header(path)) or {}
    files = tuple(file.name for file in weight_files(path))
    dtypes = Counter(dtype for dtype, _ in header.values())
    told: dict[str, Any] = {"prefixes": tuple(mark for mark in MARKS if any(mark in n for n in header))}
    if module is not None and space is not None and header:
        names = stored_names({name: shape for name, (_, shape) in header.items()}, space)
        told = {
            "prefixes": names.prefixes,
            "respelled": len(names.respelled),
            "ignored": len(names.ignored),
            "missing": names.missing,
            "unknown": names.unknown,
        }
        if comparable(module):
            told |= _attempt(problems, lambda: _losses(revision, module, space, problems)) or {}
    problem = problems[0] if problems else None
    return Checked(revision.name, revision.step, files, dict(dtypes), problem=problem, **told)


def _losses(
    revision: Revision, module: nn.Module, space: ParameterSpace, problems: list[str]
) -> dict[str, float]:
    """Both losses, whether or not they agree; a disagreement is the checkpoint's problem."""
    tensors = read_checkpoint(revision.path, module)
    start = getattr(module, "adapter_start", None)
    found = compare(revision.name, revision.path, module, space, tensors, start)
    _attempt(problems, found.require)
    return {"ours": found.ours, "library": found.library}


def _unlike(revisions: tuple[Revision, ...]) -> list[str]:
    """Weights without a model: every checkpoint must at least hold the same tensors."""
    first: dict[str, tuple[int, ...]] | None = None
    for revision in revisions:
        if damage_of(revision.path) is not None:
            continue
        shapes = _shapes(revision.path)
        if first is None:
            first = shapes
        elif shapes != first:
            odd = sorted(first.keys() ^ shapes.keys()) or [n for n in first if first[n] != shapes[n]]
            return [f"{revision.name}: '{odd[0]}' is not as in '{revisions[0].name}'; is it another model?"]
    return []


def _model(module: nn.Module, space: ParameterSpace, last: Path, base: Path | None) -> Model:
    groups: dict[str, list[str]] = {}
    for slot, name in space.aliases:
        groups.setdefault(name, []).append(slot)
    config: Any = getattr(module, "config", None)
    vocabulary, context = vocabulary_and_context(module)
    part = unsettled_part(module)
    folder = load_tokenizer(last) or (load_tokenizer(base) if base is not None else None)
    said = "none (give token ids as .npy)" if folder is None else "found"
    if folder is not None:
        end = "no end-of-text id" if folder.separator is None else f"end of text is id {folder.separator}"
        said = "; ".join([f"{folder.tokenizer.get_vocab_size():,} tokens, {end}", *folder.notes])
    return Model(
        type(module).__name__,
        space.size,
        tuple(tuple(slots) for slots in groups.values() if len(slots) > 1),
        getattr(config, "tie_word_embeddings", None),
        vocabulary,
        context,
        "ready" if part is None else f"the model is not ready: {part} is on",
        said,
    )
