"""Verb ``selftest``: does the causal test find what is planted, and nothing else?"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import typer

from experiments.application import json_result, say
from experiments.run.machine import hardware, peak_rss_bytes, versions
from experiments.testbeds.base import BedResult, BedSettings
from experiments.testbeds.mistakes import MISTAKES
from experiments.testbeds.scorecard import BEDS, FULL, QUICK, confusion, release_gate, run_beds
from experiments.verbs.options import Json, Workers
from polca_edit.artifacts import to_plain


@dataclass(frozen=True)
class SelftestRecord:
    """What ``--json`` writes beside ``beds[]`` (:func:`bed_row`).

    Attributes:
        passed: every bed as expected, and the gate open.
        gate: no claim where none may be made, ``carrier`` wherever it must be.
        full: draws of the protocol.
        mistake: known mistake that was switched in.
        seconds: of the whole self-test.
        bed_seconds: per bed.
        settings: draws and thresholds.
        confusion: expected -> observed -> count.
        versions: of the software.
        hardware: of the machine.
        peak_rss_bytes: of the main process.
    """

    passed: bool
    gate: bool
    full: bool
    mistake: str | None
    seconds: float
    bed_seconds: Mapping[str, float]
    settings: BedSettings
    confusion: Mapping[str, Mapping[str, int]]
    versions: Mapping[str, str]
    hardware: Mapping[str, object]
    peak_rss_bytes: int
    schema: str = "polca-edit/selftest/2"


def selftest(
    full: Annotated[bool, typer.Option("--full", help="all draws of the protocol (minutes)")] = False,
    break_: Annotated[
        str | None, typer.Option("--break", help="switch in a known mistake; any other name lists them")
    ] = None,
    json_: Json = None,
    bed: Annotated[
        list[str] | None, typer.Option("--bed", help="only these beds, e.g. T1 (repeatable)")
    ] = None,
    workers: Workers = None,
) -> None:
    """Run the ten testbeds with known answers and print the confusion matrix of words.

    With --break NAME the beds named by that mistake run with it, and the self-test must fail.
    """
    if break_ is not None and break_ not in MISTAKES:
        raise ValueError(f"--break must be one of {sorted(MISTAKES)}, got '{break_}'")
    unknown = sorted(set(bed or ()) - set(BEDS))
    if unknown:
        raise ValueError(f"--bed must be one of {list(BEDS)}, got {unknown}")
    wanted = bed or (MISTAKES[break_].beds if break_ is not None else tuple(BEDS))
    names = [name for name in BEDS if name in wanted]
    settings = FULL if full else QUICK
    started = time.perf_counter()
    results, bed_seconds = run_beds(
        names,
        settings,
        mistake=break_,
        workers=min(len(names), workers or min(4, os.cpu_count() or 1)),
        say=say,
    )
    gate = release_gate(results)
    passed = gate and all(result.passed for result in results)
    print_results(results)
    seconds = time.perf_counter() - started
    if json_ is not None:
        record = SelftestRecord(
            passed,
            gate,
            full,
            break_,
            seconds,
            bed_seconds,
            settings,
            confusion(results),
            versions(),
            hardware(),
            peak_rss_bytes(),
        )
        json_result({**to_plain(record), "beds": [bed_row(result) for result in results]}, json_)
    say(f"{'PASSED' if passed else 'FAILED'} in {seconds:.0f} s")
    if not passed:
        raise typer.Exit(1)


def bed_row(result: BedResult) -> dict[str, object]:
    """One row of ``beds[]``."""
    return {**to_plain(result), "passed": result.passed}


def print_results(results: list[BedResult]) -> None:
    """Table of beds, failed checks, and the confusion matrix."""
    say(f"\n{'bed':<5}{'variant':<28}{'expected':<13}{'observed':<13}checks")
    for r in results:
        good = sum(c.passed for c in r.checks)
        mark = "" if r.passed else "  <-- FAILED"
        say(f"{r.bed:<5}{r.variant[:27]:<28}{r.expected:<13}{r.observed:<13}{good}/{len(r.checks)}{mark}")
        for c in r.checks:
            if not c.passed:
                say(f"       {c.name}: {c.value:.6g}, must be {c.bound}")
    say("\nconfusion (expected -> observed: count)")
    for expected, row in confusion(results).items():
        say(f"  {expected}: " + ", ".join(f"{name} {count}" for name, count in sorted(row.items())))
