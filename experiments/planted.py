"""The ten testbeds whose answers are known by construction, and their scorecard."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

import torch

from experiments.mistakes import switched_in
from experiments.planted_base import BedResult
from experiments.planted_harness import bed_t10
from experiments.planted_models import bed_t8, bed_t9
from experiments.planted_quadratic import bed_t1, bed_t2, bed_t3, bed_t4, bed_t5, bed_t6
from experiments.planted_softmax import bed_t7
from interventions.protocol import PlanSettings

#: Longest first, so that two workers end at about the same time.
BEDS: dict[str, Callable[[PlanSettings], list[BedResult]]] = {
    "T9": bed_t9,
    "T8": bed_t8,
    "T7": bed_t7,
    "T1": bed_t1,
    "T5": bed_t5,
    "T3": bed_t3,
    "T4": bed_t4,
    "T6": bed_t6,
    "T10": bed_t10,
    "T2": bed_t2,
}
#: Draws that fit two cores and a few minutes; the counts of A2 (199 rotations, 39 random bases) are kept.
QUICK = PlanSettings(
    draws=199,
    gradient_draws=59,
    transplant_draws=59,
    shuffle_draws=19,
    resamples=400,
    rotations=199,
    random_bases=39,
)
FULL = PlanSettings(gradient_draws=199, transplant_draws=199, shuffle_draws=199, resamples=2000)


def settings_for(full: bool, seed: int = 0) -> PlanSettings:
    """Plan of a self-test."""
    return PlanSettings(**{**(FULL if full else QUICK).__dict__, "seed": seed})


def run_bed(name: str, settings: PlanSettings, mistake: str | None = None) -> tuple[list[BedResult], float]:
    """One bed and its seconds, with a known mistake switched in or not."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    with switched_in(mistake):
        results = BEDS[name](settings)
    return results, time.perf_counter() - started


def run_beds(
    names: Sequence[str],
    settings: PlanSettings,
    *,
    mistake: str | None = None,
    workers: int = 1,
    say: Callable[[str], None] = print,
) -> list[BedResult]:
    """Run beds, in separate processes where ``workers`` is above one; results in the beds' own order."""
    found: dict[str, list[BedResult]] = {}

    def note(name: str, outcome: tuple[list[BedResult], float]) -> None:
        found[name] = outcome[0]
        bad = sum(not r.passed for r in outcome[0])
        verdict = "passed" if not bad else f"{bad} of {len(outcome[0])} failed"
        say(f"  {name:<4} {outcome[1]:6.1f} s  {verdict}")

    if workers <= 1:
        for name in names:
            note(name, run_bed(name, settings, mistake))
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            waiting = {name: pool.submit(run_bed, name, settings, mistake) for name in names}
            for name, future in waiting.items():
                note(name, future.result())
    return [result for name in sorted(names, key=lambda n: int(n[1:])) for result in found[name]]


def confusion(results: Sequence[BedResult]) -> dict[str, dict[str, int]]:
    """Expected -> observed -> count, over the beds that end in a verdict."""
    table: dict[str, dict[str, int]] = {}
    for result in results:
        row = table.setdefault(result.expected, {})
        row[result.observed] = row.get(result.observed, 0) + 1
    return table


def release_gate(results: Sequence[BedResult]) -> bool:
    """No false ``causal`` where none may be, ``causal`` wherever it must be, T7 within its bound."""
    for result in results:
        if result.gate == "never_causal" and result.observed == "causal":
            return False
        if result.gate == "always_causal" and result.observed != "causal":
            return False
        if result.gate == "bounded" and not result.passed:
            return False
    return True


def as_json(result: BedResult) -> dict[str, Any]:
    """One row of ``beds[]``."""
    return {**asdict(result), "passed": result.passed}
