"""Hugging Face models and their checkpoints as :class:`~polca_edit.checkpoints.series.Checkpoints`.

The second half of ``checkpoints``: Trainer folders (``checkpoint-*``), lists of model folders,
revisions (one folder each, or a hub cache), adapters. Weights are read one checkpoint at a time;
at opening only headers and indexes are read, and every incomplete checkpoint is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from polca_edit.checkpoints.series import Checkpoints, read_weights
from polca_edit.parameters import ParameterSpace, parameter_slots

#: The 154 revisions of every Pythia model (Biderman et al. 2023).
PYTHIA_STEPS = (0, *(2**i for i in range(10)), *range(1000, 144_000, 1000))

#: How a step is written in checkpoint and revision names, most specific first.
STEP_PATTERNS = (
    r"checkpoint[-_](\d+)",
    r"(?:global[-_]?)?step[-_=]?(\d+)",
    r"iter(?:ation)?[-_]?(\d+)",
    r"ckpt[-_]?(\d+)",
    r"(\d+)(?!.*\d)",
)

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Revision:
    """One checkpoint on disk.

    Attributes:
        name: folder or revision name.
        step: optimiser steps.
        path: folder that holds the weights.
    """

    name: str
    step: int
    path: Path


def step_of_revision(name: str, pattern: str | None = None) -> int | None:
    """Optimiser steps named by a checkpoint or revision.

    >>> [step_of_revision(n) for n in ("checkpoint-500", "step1000-tokens4B", "stage1-step20-tokens1B")]
    [500, 1000, 20]

    Args:
        name: for example ``checkpoint-500`` or ``step1000-tokens4B``.
        pattern: regular expression whose first group is the step; default :data:`STEP_PATTERNS`.
    """
    for candidate in (pattern,) if pattern is not None else STEP_PATTERNS:
        found = re.search(candidate, name)
        if found:
            return int(found.group(1))
    return None


def find_revisions(
    directory: Path | str, *, names: str = "*", step_pattern: str | None = None
) -> list[Revision]:
    """Checkpoints under a directory, ordered by step.

    Understood are a folder per checkpoint (Trainer output, local revisions) and a hub cache of one
    model (``refs/`` with one file per revision, ``snapshots/`` with the folders they name).

    Args:
        directory: where to look.
        names: shell pattern the names must match.
        step_pattern: see :func:`step_of_revision`.

    Raises:
        ValueError: if nothing is there, or two checkpoints have the same step.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"a checkpoint directory must exist, '{directory}' does not; check the path")
    named: list[tuple[str, Path]] = []
    if (directory / "refs").is_dir() and (directory / "snapshots").is_dir():
        for ref in sorted((directory / "refs").rglob(names)):
            if ref.is_file():
                named.append((ref.name, directory / "snapshots" / ref.read_text().strip()))
    else:
        named = [(path.name, path) for path in sorted(directory.glob(names)) if path.is_dir()]
    found = [
        Revision(name, step, path)
        for name, path in named
        if (step := step_of_revision(name, step_pattern)) is not None
    ]
    if not found:
        raise ValueError(
            f"'{directory}' must hold checkpoint folders named by step, found none matching '{names}'; "
            "give the folder that contains them, or a pattern"
        )
    found.sort(key=lambda revision: revision.step)
    for one, other in zip(found, found[1:], strict=False):
        if one.step == other.step:
            raise ValueError(
                f"every checkpoint needs its own step, '{one.name}' and '{other.name}' both say {one.step}; "
                "narrow the name pattern or give a step pattern"
            )
    return found


# -- what is wrong with a folder -----------------------------------------------------------------


def damage_of(path: Path) -> str | None:
    """Why a checkpoint folder cannot be read, from headers alone; None if it looks whole.

    A safetensors file is whole when its header parses and its length is what the header says;
    of torch files only presence is checked.
    """
    if not path.is_dir():
        return "the folder is missing"
    for name in INDEX_FILES:
        if (path / name).exists():
            try:
                shards = sorted(set(json.loads((path / name).read_text())["weight_map"].values()))
            except (json.JSONDecodeError, KeyError, AttributeError) as error:
                return f"{name} is not a weight index ({error})"
            return next((problem for shard in shards if (problem := _damaged_file(path / shard))), None)
    files = [path / name for name in WEIGHT_FILES if (path / name).exists()]
    if not files:
        files = [p for p in path.iterdir() if p.suffix in {".safetensors", ".pt", ".pth", ".bin"}]
        files = [p for p in files if p.stem not in {"optimizer", "scheduler", "training_args", "rng_state"}]
    if len(files) != 1:
        return f"it must hold one set of weights, found {sorted(p.name for p in files) or 'none'}"
    return _damaged_file(files[0])


def _damaged_file(path: Path) -> str | None:
    if not path.exists():
        return f"{path.name} is missing"
    if path.suffix != ".safetensors":
        return f"{path.name} is empty" if path.stat().st_size == 0 else None
    try:
        with safe_open(path, framework="pt") as handle:
            handle.keys()
    except (SafetensorError, OSError) as error:
        return f"{path.name} is incomplete ({error})"
    return None


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


def load_causal_lm(folder: Path | str) -> nn.Module:
    """``AutoModelForCausalLM`` from a local folder, in float32, with eager attention, no cache.

    Raises:
        ValueError: if the folder holds no model that transformers can build.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"a model folder must hold a config.json, '{folder}' does not; check the path")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"'{folder}' must be a causal language model for transformers ({first})") from error
    model.config.use_cache = False
    result: nn.Module = model.eval()
    return result


# -- opening --------------------------------------------------------------------------------------


def open_revisions(
    space: ParameterSpace,
    revisions: Sequence[Revision],
    *,
    reference: Path | str | None = None,
    skip_damaged: bool = False,
    load: Callable[[Path], nn.Module] | None = None,
) -> Checkpoints:
    """A series from checkpoint folders, read one at a time and upcast to float32.

    Args:
        space: the chosen parameters of the model.
        revisions: from :func:`find_revisions`, or made by hand.
        reference: folder of the pretrained model of a fine-tuning run; becomes step 0. For adapters
            leave it out, see :func:`adapter_reference`.
        skip_damaged: leave incomplete checkpoints out instead of refusing.
        load: builds the module of a folder, where parameters are named otherwise than in the files
            (a TransformerLens bridge). By default tensors are read from the files by name, and where
            transformers renames them on loading, from the model it builds.

    Raises:
        ValueError: for damaged checkpoints, or a reference beside a checkpoint of step 0.
    """
    chosen = whole_revisions(revisions, skip_damaged=skip_damaged)
    if reference is not None:
        if chosen and chosen[0].step == 0:
            raise ValueError(
                f"the reference becomes step 0, but '{chosen[0].name}' is step 0 already; drop one"
            )
        chosen = [*whole_revisions([Revision("reference", 0, Path(reference))]), *chosen]
    spelled = spellings(space)

    def read(index: int) -> Mapping[str, Tensor]:
        path = chosen[index].path
        try:
            if load is not None:
                return dict(parameter_slots(load(path)))
            return _named_weights(path, space, spelled)
        except ValueError as error:
            raise ValueError(f"checkpoint '{chosen[index].name}': {error}") from error

    rates = learning_rates_of(chosen) if load is None else None
    source = str(chosen[-1].path.parent) if chosen else "an empty list"
    return Checkpoints(space, tuple(r.step for r in chosen), read, rates, None, source)


def _named_weights(path: Path, space: ParameterSpace, spelled: Mapping[str, str]) -> Mapping[str, Tensor]:
    """A folder's tensors under the names of the space."""
    tensors = {spelled.get(name, name): tensor for name, tensor in read_weights(path).items()}
    present = {name for slot, name in space.aliases if slot in tensors}
    if len(present) == len(space.names) or not (path / "config.json").exists():
        return tensors
    # Releases of transformers rename parameters (embed_out, lm_head); its own loader knows how.
    return dict(parameter_slots(load_causal_lm(path)))


def open_folder(
    space: ParameterSpace,
    directory: Path | str,
    *,
    names: str = "*",
    step_pattern: str | None = None,
    reference: Path | str | None = None,
    skip_damaged: bool = False,
    load: Callable[[Path], nn.Module] | None = None,
) -> Checkpoints:
    """:func:`find_revisions`, then :func:`open_revisions`."""
    revisions = find_revisions(directory, names=names, step_pattern=step_pattern)
    return open_revisions(space, revisions, reference=reference, skip_damaged=skip_damaged, load=load)


def open_model_folders(
    space: ParameterSpace, folders: Sequence[Path | str], steps: Sequence[int] | None = None
) -> Checkpoints:
    """A series from a list of model folders in any place.

    Args:
        space: the chosen parameters.
        folders: one per checkpoint.
        steps: their steps; read off the folder names where absent.

    Raises:
        ValueError: for a folder whose step is unknown, or as :func:`open_revisions`.
    """
    paths = [Path(folder) for folder in folders]
    known = list(steps) if steps is not None else [step_of_revision(path.name) for path in paths]
    if len(known) != len(paths):
        raise ValueError(f"every folder needs one step, got {len(paths)} folders and {len(known)} steps")
    revisions = []
    for path, step in zip(paths, known, strict=True):
        if step is None:
            raise ValueError(f"a folder name must hold its step, '{path.name}' does not; pass steps")
        revisions.append(Revision(path.name, step, path))
    return open_revisions(space, sorted(revisions, key=lambda r: r.step))


def open_hub(
    space: ParameterSpace,
    repository: str,
    revisions: Mapping[str, int],
    *,
    cache: Path | str | None = None,
    offline: bool = False,
) -> Checkpoints:
    """A series from revisions on the hub, each downloaded when it is first read.

    Args:
        space: the chosen parameters.
        repository: for example ``EleutherAI/pythia-14m``.
        revisions: revision name -> step, for Pythia ``{f"step{s}": s for s in PYTHIA_STEPS}``.
        cache: hub cache; default the user's.
        offline: use only what the cache holds.
    """
    from huggingface_hub import snapshot_download

    ordered = sorted(revisions.items(), key=lambda item: item[1])
    spelled = spellings(space)

    def read(index: int) -> Mapping[str, Tensor]:
        name = ordered[index][0]
        try:
            folder = snapshot_download(
                repository,
                revision=name,
                cache_dir=cache,
                local_files_only=offline,
                allow_patterns=["*.safetensors", "*.bin", "*.index.json", "config.json"],
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"revision '{name}' of '{repository}' cannot be fetched ({type(error).__name__}); "
                "check the name and the network, or download it beforehand"
            ) from error
        return _named_weights(Path(folder), space, spelled)

    return Checkpoints(space, tuple(step for _, step in ordered), read, source=repository)


def spellings(space: ParameterSpace) -> dict[str, str]:
    """Other names that files use for a parameter -> its slot name.

    Files of base models leave out the first component (``transformer.``, ``gpt_neox.``), adapter
    files leave out the adapter's name (``.default``). A spelling that two slots share is dropped.
    """
    table: dict[str, str | None] = {}
    for slot, _ in space.aliases:
        for other in {slot.partition(".")[2], slot.replace(".default.", "."), slot.replace(".default", "")}:
            if other and other != slot:
                table[other] = None if other in table and table[other] != slot else slot
    slots = {slot for slot, _ in space.aliases}
    return {other: slot for other, slot in table.items() if slot is not None and other not in slots}


def learning_rates_of(revisions: Sequence[Revision]) -> tuple[float, ...] | None:
    """Learning rate at each checkpoint from the Trainer's log, None unless every step was logged."""
    if not revisions or not (revisions[-1].path / "trainer_state.json").exists():
        return None
    try:
        state = json.loads((revisions[-1].path / "trainer_state.json").read_text())
        rows = [row for row in state["log_history"] if "learning_rate" in row]
        logged = {int(row["step"]): float(row["learning_rate"]) for row in rows}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return None
    if 0 in {r.step for r in revisions}:
        logged.setdefault(0, 0.0)
    if not all(r.step in logged for r in revisions):
        return None
    return tuple(logged[r.step] for r in revisions)


def without(checkpoints: Checkpoints, steps: Sequence[int]) -> Checkpoints:
    """The series without the given steps."""
    return checkpoints.subset([i for i, step in enumerate(checkpoints.steps) if step not in set(steps)])


def with_first(checkpoints: Checkpoints, theta: Tensor, step: int = 0) -> Checkpoints:
    """The series with one more checkpoint in front, for example the reference of an adapter run.

    Raises:
        ValueError: if the series already begins at or before that step.
    """
    if checkpoints.steps and checkpoints.steps[0] <= step:
        raise ValueError(f"the series must begin after step {step}, it begins at {checkpoints.steps[0]}")
    space = checkpoints.space
    first = theta.clone()

    def read(index: int) -> Mapping[str, Tensor]:
        return space.unflatten(first) if index == 0 else checkpoints.read(index - 1)

    rates = None if checkpoints.learning_rates is None else (0.0, *checkpoints.learning_rates)
    return replace(checkpoints, steps=(step, *checkpoints.steps), read=read, learning_rates=rates, _cache={})
