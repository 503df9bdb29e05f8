"""Pieces of work, each in a process of its own and kept on disk once it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from experiments.application import say
from experiments.run.machine import peak_rss_bytes, resident_bytes
from polca_edit.artifacts import load_record, save_record

#: Notes of a piece by name: counts, bytes, routes.
Notes = dict[str, float | str | None]


@dataclass(frozen=True)
class Cost:
    """What one piece of work took in its own process.

    Attributes:
        bytes: peak memory beyond what was resident before it began.
        peak_bytes: peak memory of the process, libraries included.
        seconds: by the wall clock.
        processor_seconds: of all its threads.
        threads: it could use.
        notes: what it counted.
    """

    bytes: int
    peak_bytes: int
    seconds: float
    processor_seconds: float
    threads: int
    notes: Notes = field(default_factory=dict)


def measured(work: Callable[[], Notes]) -> Cost:
    """Run it and measure; the process should have done nothing heavy before."""
    import torch

    before, started, wall = resident_bytes(), time.process_time(), time.perf_counter()
    notes = work()
    peak = peak_rss_bytes()
    spent = time.process_time() - started
    seconds = time.perf_counter() - wall
    return Cost(max(0, peak - before), peak, seconds, spent, torch.get_num_threads(), notes)


def apart(work: Callable[..., Any], *given: object) -> Any:
    """One piece of work in a process of its own, forked so that libraries are loaded once.

    Autograd starts threads that a fork does not copy, so nothing may be differentiated before the last fork.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(work, *given).result()


def piece_path(place: Path, name: str) -> Path:
    """File of a finished piece."""
    return place / f"{name.replace(' ', '-').replace(',', '').replace(':', '-').replace('/', '-')}.json"


def kept(place: Path, name: str, work: Callable[..., Cost], *given: object) -> Cost:
    """The cost of a piece, read back where it was finished before.

    Args:
        place: folder of finished pieces.
        name: of the piece.
        work: does it, in a process of its own.
        *given: its arguments.
    """
    path = piece_path(place, name)
    if path.exists():
        return load_record(Cost, path)
    found: Cost = apart(work, *given)
    place.mkdir(parents=True, exist_ok=True)
    save_record(path, found)
    say(
        f"  {name}: {found.seconds:.1f} s, {found.processor_seconds:.1f} s of processors, "
        f"peak {found.peak_bytes / 1e9:.2f} GB, {found.notes}"
    )
    return found
