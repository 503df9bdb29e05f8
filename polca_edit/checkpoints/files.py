"""Files of weights: which ones hold a checkpoint, how they are read, and atomic writes.

A recorded series is a directory of ``step-XXXXXXXX.safetensors`` (weights) with ``series.json``
beside them, and ``state-XXXXXXXX.safetensors`` (optimiser and generator state) at a coarser
spacing. Nothing here unpickles: torch files are read with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from polca_edit.checkpoints.step_names import WEIGHT_SUFFIXES, step_of

#: Key of the metadata of safetensors files written here.
DIGEST = "polca_edit_sha256"

SERIES_SCHEMA = "polca-edit/series/1"

#: Names under which one file holds all weights of a folder, in the order in which transformers takes
#: them: an adapter where there is one, then one file before its shards, safetensors before torch files.
MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
#: Beginnings of names of torch files that lie beside the weights in a Trainer's folder.
OTHER_STEMS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")
#: Keys under which training loops keep the state dict of the model.
STATE_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "module", "network", "net", "weights")


# -- reading ---------------------------------------------------------------------------------------


def is_weight_file(path: Path) -> bool:
    """Whether a file may hold a model's weights, by its name."""
    return path.is_file() and path.suffix in WEIGHT_SUFFIXES and not path.stem.startswith(OTHER_STEMS)


def weight_files(path: Path | str) -> list[Path]:
    """Files that hold the weights at a path: the file itself, or those of a folder, shards included.

    Raises:
        ValueError: if nothing is there, an index is damaged, a shard is missing, or several files
            could be meant.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"a checkpoint must exist, '{path}' does not; check the path")
    adapted = (path / "adapter_config.json").exists()
    order = (*ADAPTER_FILES, *MODEL_FILES) if adapted else (*MODEL_FILES, *ADAPTER_FILES)
    for name in (*order, "model.pt"):
        if (path / name).exists():
            return _shards(path / name) if name.endswith(".index.json") else [path / name]
    found = sorted(p for p in path.iterdir() if is_weight_file(p))
    if len(found) != 1:
        raise ValueError(
            f"'{path}' must hold model.safetensors, pytorch_model.bin, their shards or exactly one weight "
            f"file, found {[p.name for p in found][:4] or 'none'}; point at the file that is meant"
        )
    return found


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(finite_json(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(
            f"'{index}' must be a shard index with a weight map ({error!r}); download again"
        ) from error
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise ValueError(
            f"'{index.parent}' must hold every shard its index names, {missing} are missing; download again"
        )
    return [index.parent / name for name in names]


def damage_of(path: Path | str) -> str | None:
    """Why a checkpoint file or folder cannot be read, from headers alone; None if it looks whole.

    A safetensors file is whole when its header parses and its length is what the header says;
    of torch files only presence and length above zero are checked.
    """
    try:
        files = weight_files(path)
    except ValueError as error:
        return str(error)
    return next((problem for file in files if (problem := _damaged_file(file))), None)


def _damaged_file(path: Path) -> str | None:
    if path.suffix != ".safetensors":
        return f"{path.name} is empty" if path.stat().st_size == 0 else None
    try:
        with safe_open(path, framework="pt") as handle:
            handle.keys()
    except (SafetensorError, OSError) as error:
        return f"{path.name} is incomplete ({error})"
    return None


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Named tensors of one checkpoint: a safetensors file, a torch file, or a folder of either.

    A folder may hold one weight file or a sharded set with its index.

    Raises:
        ValueError: if nothing readable is there.
    """
    merged: dict[str, Tensor] = {}
    for file in weight_files(path):
        merged.update(_read_file(file))
    return merged


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            weights: dict[str, Tensor] = load_file(path)
            require_digest(path, weights)
            return weights
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"'{path}' cannot be read ({error}); it may be truncated, copy it again") from error
    except Exception as error:  # torch raises pickle errors for files that hold more than tensors
        raise ValueError(
            f"'{path}' must hold tensors only (weights_only), got {type(error).__name__}; "
            "save model.state_dict()"
        ) from error
    return inner_state(state, path)


def inner_state(state: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside whatever a training loop saved: the very dictionary, so that it can be edited.

    Dictionaries are entered by :data:`STATE_KEYS`, at any depth, while exactly one of the keys is there.

    Raises:
        ValueError: if there is none, or more than one could be meant.
    """
    where: list[str] = []
    while isinstance(state, dict):
        held = [key for key in STATE_KEYS if isinstance(state.get(key), dict)]
        if not held:
            break
        if len(held) > 1:
            raise ValueError(
                f"'{path}' must hold one state dict, got {held}{_inside(where)}; save the one that is "
                "meant alone"
            )
        where.append(held[0])
        state = state[held[0]]
    if isinstance(state, dict):
        for name in [name for name in state if str(name).endswith("_extra_state")]:
            del state[name]
    odd = [name for name, v in state.items() if not isinstance(v, Tensor)] if isinstance(state, dict) else []
    if not isinstance(state, dict) or odd or not state:
        found = f"'{odd[0]}' is a {type(state[odd[0]]).__name__}" if odd else "it holds no tensor"
        raise ValueError(
            f"'{path}' must be a state dict of tensors, {found}{_inside(where)}; save model.state_dict()"
        )
    return state


def _inside(keys: list[str]) -> str:
    return f" inside '{'/'.join(keys)}'" if keys else ""


def stored_header(path: Path | str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every stored tensor, from headers alone where the format has them.

    Dtypes are written as torch writes them (``float32``, ``bfloat16``, ``int8``).

    Raises:
        ValueError: if nothing readable is there.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in weight_files(path):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118
                        part = handle.get_slice(name)
                        kind = part.get_dtype()
                        found[name] = (_NAMES.get(kind, kind), tuple(part.get_shape()))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"'{file}' cannot be read ({error}); copy it again") from error
        else:
            for name, tensor in _read_file(file).items():
                found[name] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    return found


#: safetensors' names of dtypes -> torch's.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {name: str(dtype).removeprefix("torch.") for name, dtype in DTYPES.items()}


# -- writing ---------------------------------------------------------------------------------------


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


def finite_json(text: str) -> Any:
    """A value from JSON; ``ValueError`` if it is none or holds ``NaN`` or ``1e999``."""
    value = json.loads(text)
    json.dumps(value, allow_nan=False)
    return value


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_digest(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Compare tensors with the hash that :func:`write_tensors` left in their file, where it has one.

    Raises:
        ValueError: if they are not what was written.
    """
    with safe_open(path, framework="pt") as handle:
        noted = (handle.metadata() or {}).get(DIGEST)
    if noted is not None and noted != digest_of(tensors):
        raise ValueError(f"'{path}' is damaged: its tensors are not what was written; make or copy it again")


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
    """Atomically write a safetensors file, with a hash of its tensors among the metadata."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    noted = {**(metadata or {}), DIGEST: digest_of(plain)}

    def write(part: Path) -> None:
        save_file(plain, part, metadata=noted)
        if len(noted) > 1:
            _order_header(part)

    write_atomically(path, write)


# -- a recorded series -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeriesIndex:
    """What a recorded series says of itself.

    Attributes:
        steps: optimiser steps of the weight files.
        fingerprint: of the parameter space, None where unknown.
        learning_rates: one per step, None where unknown.
        weight_decay: decoupled weight decay, None where unknown.
    """

    steps: tuple[int, ...]
    fingerprint: str | None = None
    learning_rates: tuple[float, ...] | None = None
    weight_decay: float | None = None


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

    def has_weights(self, steps: Iterable[int]) -> bool:
        """Whether the weights after every one of these steps are there."""
        return all(self.weights(step).exists() for step in steps)

    def drop_weights(self, steps: Iterable[int]) -> None:
        """Delete the weights after these steps, but those of a state, from which training may be branched."""
        for step in set(steps) - set(self.state_steps()):
            self.weights(step).unlink(missing_ok=True)

    def state_steps(self) -> list[int]:
        """Steps at which a state was saved, ascending."""
        return sorted(
            s for p in self.directory.glob("state-*.safetensors") if (s := step_of(p.name)) is not None
        )

    def write_index(self, index: SeriesIndex, **more: object) -> None:
        """Write ``series.json``.

        Args:
            index: what a reader needs.
            **more: plain values kept beside it (training settings, data order).
        """
        write_json(self.index, {"schema": SERIES_SCHEMA, **asdict(index), **more})

    def read_index(self) -> SeriesIndex:
        """What ``series.json`` says.

        Raises:
            ValueError: if it is damaged.
        """
        try:
            values = finite_json(self.index.read_text())
            rates = values.get("learning_rates")
            return SeriesIndex(
                tuple(int(step) for step in values["steps"]),
                values.get("fingerprint"),
                tuple(float(rate) for rate in rates) if rates else None,
                values.get("weight_decay"),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(
                f"'{self.index}' must be a series index ({error}); record the run again"
            ) from error
