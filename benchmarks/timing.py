"""Interleaved timing: ours and the other, in turn, so that drift of the machine hits both alike."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments.run.machine import peak_rss_bytes

Clock = Literal["wall", "cpu"]


def seconds(clock: Clock) -> float:
    """A clock reading: wall time, or this process's processor time (steadier on a shared machine)."""
    return time.perf_counter() if clock == "wall" else time.process_time()


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the comparison.
        ours: median of our figure, in ``unit``.
        rival: median of the other's figure.
        ratio_median: rival over ours, median over pairs; above one we are cheaper.
        ratio_min: smallest pair.
        ratio_max: largest pair.
        pairs: number of pairs.
        unit: of ours and rival.
        notes: what else belongs to the figures: set-up, products, result quality, floor multiples.
    """

    name: str
    ours: float
    rival: float
    ratio_median: float
    ratio_min: float
    ratio_max: float
    pairs: int
    unit: str = "s"
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A comparison that could not be made, and why."""

    name: str
    reason: str


def time_once(work: Callable[[], object], clock: Clock) -> float:
    """Seconds of one call."""
    started = seconds(clock)
    work()
    return seconds(clock) - started


class PeakMemory:
    """Peak resident memory of single pieces of work, and of the process (Linux; None elsewhere).

    The kernel keeps one high-water mark per process; it is reset before each piece.
    """

    highest = 0

    @classmethod
    def of(cls, work: Callable[[], object]) -> int | None:
        """Bytes by which one call raised the resident memory above what was held before it."""
        reset = Path("/proc/self/clear_refs")
        if sys.platform != "linux" or not reset.exists():
            work()
            return None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed must not hide what this call needs
        cls.highest = cls.so_far()
        reset.write_text("5")
        before = peak_rss_bytes()
        work()
        return peak_rss_bytes() - before

    @classmethod
    def so_far(cls) -> int:
        """Largest resident memory of the process, the times before a reset included."""
        return max(cls.highest, peak_rss_bytes())


def interleaved(
    name: str,
    ours: Callable[[], object],
    rival: Callable[[], object],
    *,
    pairs: int,
    clock: Clock,
    scale_ours: float = 1.0,
    scale_rival: float = 1.0,
    unit: str = "s",
    floor: Callable[[], object] | None = None,
    **notes: Any,
) -> Row:
    """Time ``pairs`` pairs, the order swapped from pair to pair; with ``floor``, in multiples of it too.

    One more call of each side, not timed, gives its peak memory.

    Args:
        name: of the row.
        ours: our work; the caller has warmed both up.
        rival: the other's.
        pairs: how many.
        clock: which seconds.
        scale_ours: factor on our seconds, for figures per vector or per pass.
        scale_rival: factor on the other's.
        unit: of the figures.
        floor: one plain no-grad forward pass over the same tokens; timed in every pair.
        **notes: kept with the row.
    """
    mine: list[float] = []
    other: list[float] = []
    base: list[float] = []
    for pair in range(pairs):
        order = [(ours, mine, scale_ours), (rival, other, scale_rival)]
        for work, kept, scale in order if pair % 2 == 0 else order[::-1]:
            kept.append(time_once(work, clock) * scale)
        if floor is not None:
            base.append(min(time_once(floor, clock) for _ in range(3)))
    if floor is not None:
        notes["ours_in_forward_passes"] = statistics.median(a / b for a, b in zip(mine, base, strict=True))
        notes["rival_in_forward_passes"] = statistics.median(a / b for a, b in zip(other, base, strict=True))
    notes["ours_peak_bytes"], notes["rival_peak_bytes"] = PeakMemory.of(ours), PeakMemory.of(rival)
    ratios = [b / a for a, b in zip(mine, other, strict=True)]
    return Row(
        name,
        statistics.median(mine),
        statistics.median(other),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        pairs,
        unit,
        notes,
    )
