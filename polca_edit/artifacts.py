"""The run directory: records as safetensors and JSON, stage records with checksums, resume.

A record (frozen dataclass) becomes one safetensors file: tensor fields are tensors, all other
fields are JSON in the header. Nothing is pickled, every write is atomic.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from polca_edit.checkpoints.files import write_json, write_tensors
from polca_edit.derivatives.objective import PassCount

Record = TypeVar("Record")
PACKAGES = (
    "torch",
    "transformer-lens",
    "numpy",
    "scipy",
    "scikit-learn",
    "hdbscan",
    "safetensors",
    "polca-edit",
)


def save_record(path: Path, record: Any) -> None:
    """Write a frozen dataclass of tensors, tuples of tensors and JSON values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            tensors[item.name] = value
        elif isinstance(value, tuple) and value and all(isinstance(v, Tensor) for v in value):
            tensors.update({f"{item.name}.{index}": v for index, v in enumerate(value)})
            plain[item.name] = {"tensors": len(value)}
        else:
            plain[item.name] = value
    write_tensors(path, tensors, {"record": type(record).__name__, "fields": json.dumps(plain)})


def load_record(kind: type[Record], path: Path) -> Record:
    """Read a record back.

    Raises:
        ValueError: if the file is missing, damaged or holds another kind of record.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"'{path}' must be a readable record ({error}); delete it and run that stage again"
        ) from error
    if metadata.get("record") != kind.__name__:
        raise ValueError(
            f"'{path}' must hold a {kind.__name__}, got {metadata.get('record')}; check the path"
        )
    values: dict[str, Any] = {}
    plain = json.loads(metadata["fields"])
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        stored = plain.get(item.name)
        if item.name in tensors:
            values[item.name] = tensors[item.name]
        elif isinstance(stored, dict) and set(stored) == {"tensors"}:
            values[item.name] = tuple(tensors[f"{item.name}.{i}"] for i in range(stored["tensors"]))
        elif item.name in plain:
            values[item.name] = tuple(stored) if isinstance(stored, list) else stored
    return kind(**values)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def key_of(*parts: object) -> str:
    """A stable hash of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Python and package versions that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> dict[str, object]:
    """Processor, cores, threads and accelerator of this machine."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count the peak of the process that started this one.
        line = next((n for n in status.read_text().splitlines() if n.startswith("VmHWM")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class StageRecord:
    """What one finished stage did and cost.

    Attributes:
        stage: its name.
        key: hash of its settings and of the stages it stands on.
        seconds: wall-clock time, summed over interrupted tries where parts were kept.
        passes: sequences through the model by kind.
        peak_rss_bytes: peak memory of the process when it ended.
        files: output path (relative) -> SHA-256.
    """

    stage: str
    key: str
    seconds: float = 0.0
    passes: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run, and the stage records that make it resumable."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def checkpoints(self) -> Path:
        """Recorded weights."""
        return self.path / "checkpoints"

    def basis(self, name: str) -> Path:
        """One basis."""
        return self.path / "basis" / f"{name}.safetensors"

    def projections(self, name: str) -> Path:
        """One basis's projections on the select split."""
        return self.path / "projections" / f"{name}.safetensors"

    def clusters(self, name: str) -> Path:
        """One basis's clusters."""
        return self.path / "clusters" / f"{name}.safetensors"

    def damage(self, name: str) -> Path:
        """One basis's damage rows."""
        return self.path / "damage" / f"{name}.json"

    def stage_file(self, stage: str) -> Path:
        """Record of a finished stage."""
        return self.path / "stages" / f"{stage.replace(':', '-')}.json"

    def stage_records(self) -> list[StageRecord]:
        """Records of all finished stages."""
        return [
            StageRecord(**json.loads(p.read_text())) for p in sorted((self.path / "stages").glob("*.json"))
        ]

    def finished(self, stage: str, key: str) -> bool:
        """Whether the stage ended with this key and its files are still what it wrote."""
        path = self.stage_file(stage)
        if not path.exists():
            return False
        try:
            record = StageRecord(**json.loads(path.read_text()))
        except (json.JSONDecodeError, TypeError):
            return False
        return record.key == key and all(
            (self.path / name).exists() and checksum(self.path / name) == value
            for name, value in record.files.items()
        )

    @contextmanager
    def stage(
        self, stage: str, key: str, outputs: Sequence[Path], passes: PassCount, *, parts: Path | None = None
    ) -> Iterator[None]:
        """Run a stage body; its record is written only if the body ends well.

        Outputs and parts left by a run with other settings are removed first. Seconds and passes
        of parts finished before an interruption are added through ``parts/cost.json``.

        Args:
            stage: name.
            key: hash of settings and upstream stages.
            outputs: files (or folders) the body writes.
            passes: the running count the body adds to.
            parts: folder of partial results that survive an interruption.
        """
        stale = self._stale(stage, key, parts)
        if stale:
            for path in [*outputs, *([parts] if parts else [])]:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        self.stage_file(stage).unlink(missing_ok=True)
        if parts is not None:
            parts.mkdir(parents=True, exist_ok=True)
            write_json(parts / "key.json", {"key": key})
        before, started = passes.as_dict(), time.perf_counter()
        yield
        spent = {kind: value - before[kind] for kind, value in passes.as_dict().items()}
        seconds = time.perf_counter() - started
        if parts is not None and (parts / "cost.json").exists():
            carried = json.loads((parts / "cost.json").read_text())
            spent = {kind: spent[kind] + carried["passes"].get(kind, 0.0) for kind in spent}
            seconds += carried["seconds"]
        files: dict[str, str] = {}
        for path in outputs:
            members = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            files.update({str(p.relative_to(self.path)): checksum(p) for p in members})
        record = StageRecord(stage, key, seconds, spent, peak_rss_bytes(), files)
        write_json(self.stage_file(stage), dataclasses.asdict(record))
        if parts is not None:
            shutil.rmtree(parts, ignore_errors=True)

    def _stale(self, stage: str, key: str, parts: Path | None) -> bool:
        if parts is not None and (parts / "key.json").exists():
            try:
                return bool(json.loads((parts / "key.json").read_text())["key"] != key)
            except (json.JSONDecodeError, KeyError):
                return True
        return self.stage_file(stage).exists() or parts is None


class Ledger:
    """What a stage's finished parts cost, kept beside them so that a resumed run adds up the same.

    Cost noted by an interrupted try becomes the carried cost of this one; what is spent between making
    the ledger and a note belongs to the parts noted.
    """

    def __init__(self, parts: Path, passes: PassCount) -> None:
        if (parts / "spent.json").exists():
            os.replace(parts / "spent.json", parts / "cost.json")
        carried: dict[str, Any] = {"passes": {}, "seconds": 0.0}
        if (parts / "cost.json").exists():
            carried = json.loads((parts / "cost.json").read_text())
        self._parts, self._passes = parts, passes
        self._base, self._seconds = dict(carried["passes"]), carried["seconds"]
        self._first, self._started = passes.as_dict(), time.perf_counter()

    def note(self) -> None:
        """Write down all that was spent so far."""
        now = self._passes.as_dict()
        spent = {kind: self._base.get(kind, 0.0) + now[kind] - self._first[kind] for kind in now}
        seconds = self._seconds + time.perf_counter() - self._started
        write_json(self._parts / "spent.json", {"passes": spent, "seconds": seconds})


def spent_on(parts: Path) -> dict[str, float]:
    """Passes of all tries of a stage together; empty if nothing was noted."""
    for name in ("spent.json", "cost.json"):
        if (parts / name).exists():
            passes: dict[str, float] = json.loads((parts / name).read_text())["passes"]
            return passes
    return {}


def part_path(parts: Path, index: int) -> Path:
    """File of a finished part."""
    return parts / f"part-{index:05d}.safetensors"


def mapped_rows(path: Path, count: int, size: int) -> Float[Tensor, "K N"]:
    """An empty float32 table that lives in a file; the system writes pages back when memory is short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return torch.from_file(str(path), shared=True, size=count * size, dtype=torch.float32).view(count, size)


def kept_parts(
    parts: Path, kind: type[Record], ledger: Ledger
) -> Callable[[Callable[[int], Record], Sequence[int]], Iterator[Record]]:
    """A map that keeps each finished item on disk and reads it back after an interruption."""

    def mapped(function: Callable[[int], Record], indices: Sequence[int]) -> Iterator[Record]:
        for index in indices:
            path = part_path(parts, index)
            if path.exists():
                yield load_record(kind, path)
                continue
            result = function(index)
            save_record(path, result)
            ledger.note()
            yield result

    return mapped


def kept_products(
    folder: Path, product: Callable[[Tensor], Tensor], ledger: Ledger
) -> Callable[[Tensor], Tensor]:
    """An operator whose results are kept in order and replayed after an interruption.

    It relies on the caller asking for the same products in the same order, as Lanczos from a seeded
    start does.
    """
    count = 0

    def kept(vector: Tensor) -> Tensor:
        nonlocal count
        path = folder / f"product-{count:05d}.safetensors"
        count += 1
        if path.exists():
            stored: Tensor = load_file(path)["image"]
            # A copy: sums over memory that is aligned otherwise differ in the last digit.
            return stored.to(vector).clone()
        image = product(vector)
        write_tensors(path, {"image": image})
        ledger.note()
        return image

    return kept
