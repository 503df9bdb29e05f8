"""Parts of a stage that survive an interruption, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.run.memory.allocator import trim_memory
from polca_edit.artifacts import load_record, save_record
from polca_edit.checkpoints.files import read_weights, write_tensors
from polca_edit.derivatives.objective import PassCount

Record = TypeVar("Record")


@dataclass(frozen=True)
class Spent:
    """What parts cost: passes by kind, and wall-clock seconds."""

    passes: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Noted:
    """What was spent when a part was about to be written.

    Attributes:
        part: file of that part, relative to the folder.
        now: with it.
        before: without it, which holds where the process was killed before the file was there.
    """

    part: str
    now: Spent
    before: Spent


class Ledger:
    """What a stage's finished parts cost, kept beside them so that a resumed run adds up the same.

    Cost noted by an interrupted try becomes the carried cost of this one; what is spent between making
    the ledger and a note belongs to the parts noted. A part is noted before it is written.
    """

    def __init__(self, parts: Path, passes: PassCount) -> None:
        if (parts / "spent.json").exists():
            noted = load_record(Noted, parts / "spent.json")
            save_record(parts / "cost.json", noted.now if (parts / noted.part).exists() else noted.before)
            (parts / "spent.json").unlink()
        self._parts, self._passes = parts, passes
        self._carried = carried_cost(parts) or Spent()
        self._first, self._started = passes.as_dict(), time.perf_counter()
        self._before = self._carried

    def note(self, part: Path) -> None:
        """Write down all that was spent so far, before the part that it was spent for is written."""
        now, carried = self._passes.as_dict(), self._carried
        passes = {kind: carried.passes.get(kind, 0.0) + now[kind] - self._first[kind] for kind in now}
        seconds = carried.seconds + time.perf_counter() - self._started
        spent = Spent(passes, seconds)
        save_record(
            self._parts / "spent.json", Noted(str(part.relative_to(self._parts)), spent, self._before)
        )
        self._before = spent


def carried_cost(parts: Path) -> Spent | None:
    """What earlier tries of a stage cost, None if nothing was noted by them."""
    path = parts / "cost.json"
    return load_record(Spent, path) if path.exists() else None


def part_path(parts: Path, index: int) -> Path:
    """File of a finished part."""
    return parts / f"part-{index:05d}.safetensors"


def mapped_rows(
    path: Path, count: int, size: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "K N"]:
    """An empty table that lives in a file; the system writes pages back when memory is short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return torch.from_file(str(path), shared=True, size=count * size, dtype=dtype).view(count, size)


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
            trim_memory()  # holes of one item do not add to those of the next
            result = function(index)
            ledger.note(path)
            save_record(path, result)
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
            stored = read_weights(path)["image"]
            # A copy: sums over memory that is aligned otherwise differ in the last digit.
            return stored.to(vector).clone()
        image = product(vector)
        ledger.note(path)
        write_tensors(path, {"image": image})
        return image

    return kept
