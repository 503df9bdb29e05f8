"""A lazy series of (step, weights), and the files it is read from and written to.

A recorded series is a directory of ``step-XXXXXXXX.safetensors`` (weights) with ``series.json``
beside them, and ``state-XXXXXXXX.safetensors`` (optimiser and generator state) at a coarser
spacing. Nothing here unpickles: torch files are read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from polca_edit.parameters import ParameterSpace

SERIES_SCHEMA = "polca-edit/series/1"


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
    """

    space: ParameterSpace
    steps: tuple[int, ...]
    read: Callable[[int], Mapping[str, Tensor]]
    learning_rates: tuple[float, ...] | None = None
    weight_decay: float | None = None
    source: str = "memory"
    dtype: torch.dtype = torch.float32
    _cache: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

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
            theta = self.space.flatten(self.read(index), dtype=self.dtype)
            if not torch.isfinite(theta).all():
                raise ValueError(
                    f"weights must be finite, checkpoint at step {self.steps[index]} of {self.source} "
                    "holds NaN or infinity; leave it out or retrain"
                )
            while len(self._cache) >= 3:
                self._cache.pop(next(iter(self._cache)))
            self._cache[index] = theta
        return self._cache[index]

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

    @classmethod
    def in_memory(
        cls, space: ParameterSpace, steps: Sequence[int], thetas: Sequence[Tensor] | Float[Tensor, "T N"]
    ) -> Checkpoints:
        """A series from flat vectors."""
        stack = list(thetas)
        return cls(space, tuple(steps), lambda i: space.unflatten(stack[i]), dtype=stack[0].dtype)

    @classmethod
    def from_state_dicts(
        cls, space: ParameterSpace, steps: Sequence[int], states: Sequence[Mapping[str, Tensor]]
    ) -> Checkpoints:
        """A series from state dicts already in memory."""
        kept = list(states)
        return cls(space, tuple(steps), lambda i: kept[i])


def read_weights(path: Path) -> dict[str, Tensor]:
    """Named tensors of one checkpoint: a safetensors file, a torch file, or a folder of either.

    A folder may hold one weight file or a sharded set with its index.

    Raises:
        ValueError: if nothing readable is there.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise ValueError(f"a checkpoint must exist, '{path}' does not; check the path")
    try:
        if path.suffix == ".safetensors":
            weights: dict[str, Tensor] = load_file(path)
            return weights
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"'{path}' cannot be read ({error}); it may be truncated, copy it again") from error
    except Exception as error:  # torch raises pickle errors for files that hold more than tensors
        raise ValueError(
            f"'{path}' must hold tensors only (weights_only), got {type(error).__name__}; "
            "save model.state_dict()"
        ) from error
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"'{path}' must be a state dict of tensors; save model.state_dict()")
    return state


def _read_folder(path: Path) -> dict[str, Tensor]:
    for index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = path / index_name
        if index.exists():
            try:
                files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                raise ValueError(
                    f"'{index}' must be a shard index with a weight map ({error!r}); download again"
                ) from error
            missing = [name for name in files if not (path / name).exists()]
            if missing:
                raise ValueError(
                    f"'{path}' must hold every shard its index names, {missing} are missing; download again"
                )
            merged: dict[str, Tensor] = {}
            for name in files:
                merged.update(read_weights(path / name))
            return merged
    for name in ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "model.pt"):
        if (path / name).exists():
            return read_weights(path / name)
    candidates = sorted(p for p in path.iterdir() if p.suffix in {".safetensors", ".pt", ".pth", ".bin"})
    if len(candidates) == 1:
        return read_weights(candidates[0])
    raise ValueError(
        f"'{path}' must hold model.safetensors, pytorch_model.bin, their shards or exactly one weight file, "
        f"got {[c.name for c in candidates][:4]}"
    )


def step_of(name: str) -> int | None:
    """The last run of digits in a file or folder name, e.g. 'checkpoint-500' or 'step1000.pt'."""
    stem = Path(name).name
    for suffix in (".safetensors", ".pth", ".pt", ".bin"):
        stem = stem.removesuffix(suffix)
    found = re.findall(r"\d+", stem)
    return int(found[-1]) if found else None


def open_paths(
    space: ParameterSpace, paths: Sequence[Path | str], steps: Sequence[int] | None = None
) -> Checkpoints:
    """A series from files or folders, one per checkpoint, ordered by step.

    Args:
        space: parameters expected in each.
        paths: safetensors or torch files, or folders.
        steps: their steps; read off the names where absent.

    Raises:
        ValueError: for a path without a step, a step that occurs twice, or a missing path.
    """
    known = list(steps) if steps is not None else [step_of(str(p)) for p in paths]
    if len(known) != len(paths):
        raise ValueError(f"every path needs one step, got {len(paths)} paths and {len(known)} steps")
    unnamed = [str(p) for p, s in zip(paths, known, strict=True) if s is None]
    if unnamed:
        raise ValueError(f"a checkpoint name must hold its step, '{unnamed[0]}' does not; pass steps")
    pairs = sorted((int(s), Path(p)) for p, s in zip(paths, known, strict=True) if s is not None)
    absent = [str(p) for _, p in pairs if not p.exists()]
    if absent:
        raise ValueError(f"every checkpoint must exist, missing: {', '.join(absent[:5])}; check the paths")
    return Checkpoints(
        space,
        tuple(step for step, _ in pairs),
        lambda i: read_weights(pairs[i][1]),
        source=str(Path(paths[0]).parent),
    )


def open_directory(space: ParameterSpace, directory: Path | str, pattern: str = "*") -> Checkpoints:
    """A series from a directory: our own recording, or files or folders whose names hold a step.

    Raises:
        ValueError: if the directory is missing or holds no checkpoint.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"a checkpoint directory must exist, '{directory}' does not; check the path")
    if (directory / "series.json").exists():
        return open_series(space, directory)
    if (directory / "key.json").exists():
        raise ValueError(
            f"the recording in '{directory}' has no series.json, it was stopped early; "
            "run it again to finish it"
        )
    found = [
        p
        for p in sorted(directory.glob(pattern))
        if step_of(p.name) is not None and (p.is_dir() or p.suffix in {".safetensors", ".pt", ".pth", ".bin"})
    ]
    if not found:
        raise ValueError(
            f"'{directory}' must hold checkpoints named by step, found none matching '{pattern}'"
        )
    return open_paths(space, found)


# -- our own recordings ------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary sibling, flush to disk, then rename: the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with open(part, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Atomically write JSON with sorted keys, no NaN."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(path, lambda part: part.write_text(text))


def _order_header(path: Path) -> None:
    """Sort the metadata of a safetensors file in place: the library writes its keys in random order."""
    with open(path, "r+b") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(
                f"the header of '{path}' must fit its {size} bytes, got {len(text)}; report this"
            )
        handle.seek(8)
        handle.write(text.ljust(size))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Atomically write a safetensors file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(part: Path) -> None:
        save_file(plain, part, metadata=dict(metadata) if metadata else None)
        if metadata and len(metadata) > 1:
            _order_header(part)

    write_atomically(path, write)


@dataclass(frozen=True)
class SeriesFolder:
    """Files of a recorded series."""

    directory: Path

    def weights(self, step: int) -> Path:
        """Weights after ``step`` optimiser steps."""
        return self.directory / f"step-{step:08d}.safetensors"

    def state(self, step: int) -> Path:
        """Optimiser and generator state after ``step`` steps."""
        return self.directory / f"state-{step:08d}.safetensors"

    @property
    def index(self) -> Path:
        """The series description; written when the series is complete."""
        return self.directory / "series.json"

    def state_steps(self) -> list[int]:
        """Steps at which a state was saved, ascending."""
        return sorted(
            s for p in self.directory.glob("state-*.safetensors") if (s := step_of(p.name)) is not None
        )


def open_series(space: ParameterSpace, directory: Path) -> Checkpoints:
    """Open a recorded series.

    Raises:
        ValueError: if the index is damaged, of another model, or a file is missing.
    """
    folder = SeriesFolder(Path(directory))
    try:
        index = json.loads(folder.index.read_text())
        steps = [int(s) for s in index["steps"]]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"'{folder.index}' must be a series index ({error}); record the run again"
        ) from error
    if index.get("fingerprint") not in (None, space.fingerprint()):
        raise ValueError(
            f"the series in '{directory}' is of another model (parameter names or shapes differ)"
        )
    missing = [s for s in steps if not folder.weights(s).exists()]
    if missing:
        raise ValueError(
            f"'{directory}' must hold every step of its index, {missing[:5]} are missing; copy it again"
        )
    return Checkpoints(
        space,
        tuple(steps),
        lambda i: read_weights(folder.weights(steps[i])),
        tuple(index["learning_rates"]) if index.get("learning_rates") else None,
        index.get("weight_decay"),
        str(directory),
    )
