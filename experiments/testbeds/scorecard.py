"""The ten testbeds, run side by side, and their scorecard: confusion matrix and release gate."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

from experiments.testbeds.base import BedResult, BedSettings
from experiments.testbeds.harness import bed_t10
from experiments.testbeds.mistakes import switched_in
from experiments.testbeds.networks import bed_t8
from experiments.testbeds.parity import bed_t9
from experiments.testbeds.paths import bed_t3, bed_t4, bed_t5, bed_t6
from experiments.testbeds.quadratic import bed_t1, bed_t2
from experiments.testbeds.softmax import bed_t7
from interventions.causal.settings import TestSettings

#: Longest first, so that two workers end at about the same time.
BEDS: dict[str, Callable[[BedSettings], list[BedResult]]] = {
    "T7": bed_t7,
    "T10": bed_t10,
    "T1": bed_t1,
    "T9": bed_t9,
    "T8": bed_t8,
    "T5": bed_t5,
    "T3": bed_t3,
    "T4": bed_t4,
    "T6": bed_t6,
    "T2": bed_t2,
}
_FEW = TestSettings(
    resamples=300, null_documents=50, random_draws=19, rotations=20, transplants=19, observed_rotations=19
)
#: Draws that fit two cores and two minutes, and those of the protocol. Fewer rotations than 20 could not
#: reach p < .05, and an interval over two seeds excludes next to nothing.
QUICK = BedSettings(_FEW, seeds=3, directions=40, draws=100, observed=19)
FULL = BedSettings(TestSettings(null_documents=50), seeds=5, directions=200, draws=400, observed=19)

#: Words that claim a cause.
CLAIMS = ("selective", "carrier")


def run_bed(name: str, settings: BedSettings, mistake: str | None = None) -> tuple[list[BedResult], float]:
    """One bed and its seconds, with a known mistake switched in or not."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    with switched_in(mistake):
        results = BEDS[name](settings)
    return results, time.perf_counter() - started


def run_beds(
    names: Sequence[str],
    settings: BedSettings,
    *,
    mistake: str | None = None,
    workers: int = 1,
    say: Callable[[str], None] = print,
) -> tuple[list[BedResult], dict[str, float]]:
    """Run beds, in processes of their own where ``workers`` is above one.

    Returns:
        results in the beds' own order, and seconds per bed.
    """
    found: dict[str, list[BedResult]] = {}
    seconds: dict[str, float] = {}

    def note(name: str, outcome: tuple[list[BedResult], float]) -> None:
        found[name], seconds[name] = outcome
        bad = sum(not r.passed for r in outcome[0])
        say(f"  {name:<4} {outcome[1]:6.1f} s  {f'{bad} of {len(outcome[0])} failed' if bad else 'passed'}")

    if workers <= 1:
        for name in names:
            note(name, run_bed(name, settings, mistake))
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            waiting: dict[Future[tuple[list[BedResult], float]], str] = {
                pool.submit(run_bed, name, settings, mistake): name for name in names
            }
            for future in as_completed(waiting):
                note(waiting[future], future.result())
    ordered = sorted(names, key=lambda name: int(name[1:]))
    return [result for name in ordered for result in found[name]], seconds


def confusion(results: Sequence[BedResult]) -> Mapping[str, Mapping[str, int]]:
    """Expected -> observed -> count."""
    table: dict[str, dict[str, int]] = {}
    for result in results:
        row = table.setdefault(result.expected, {})
        row[result.observed] = row.get(result.observed, 0) + 1
    return table


def release_gate(results: Sequence[BedResult]) -> bool:
    """No claim where none may be made, ``carrier`` wherever it must be, chance within its bound."""
    for result in results:
        claimed = result.observed in CLAIMS or result.observed == "yes"
        if result.gate == "never" and claimed:
            return False
        if result.gate == "always" and result.observed != "carrier":
            return False
    return True
