"""Verb ``selftest``: does the causal test find what is planted, and nothing else?"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments import planted
from experiments.mistakes import MISTAKES
from polca_edit.artifacts import hardware, peak_rss_bytes, versions
from polca_edit.checkpoints import write_json


def selftest(
    full: Annotated[
        bool, typer.Option("--full", help="all draws of the protocol (minutes to an hour)")
    ] = False,
    break_: Annotated[
        str | None, typer.Option("--break", help=f"switch in a known mistake: {', '.join(MISTAKES)}")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results to this file")] = None,
    bed: Annotated[
        list[str] | None, typer.Option("--bed", help="only these beds, e.g. T1 (repeatable)")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", help="processes; default one per core, at most 4")
    ] = None,
) -> None:
    """Run the ten testbeds with known answers and print the confusion matrix of verdicts.

    With --break NAME the beds named by that mistake run with it, and the self-test must fail.
    """
    if break_ is not None and break_ not in MISTAKES:
        raise ValueError(f"--break must be one of {sorted(MISTAKES)}, got '{break_}'")
    unknown = sorted(set(bed or ()) - set(planted.BEDS))
    if unknown:
        raise ValueError(f"--bed must be one of {list(planted.BEDS)}, got {unknown}")
    names = [n for n in planted.BEDS if n in bed] if bed else list(planted.BEDS)
    if break_ is not None and not bed:
        names = list(MISTAKES[break_].beds)
    started = time.perf_counter()
    settings = planted.settings_for(full)
    results = planted.run_beds(
        names, settings, mistake=break_, workers=workers or min(4, os.cpu_count() or 1, len(names))
    )
    passed = all(result.passed for result in results) and planted.release_gate(results)
    summary = summarise(results, passed, full=full, mistake=break_, seconds=time.perf_counter() - started)
    print_results(results)
    if json_file is not None:
        write_json(json_file, summary)
    typer.echo(f"{'PASSED' if passed else 'FAILED'} in {summary['seconds']:.0f} s")
    if not passed:
        raise typer.Exit(1)


def summarise(
    results: list[planted.BedResult], passed: bool, *, full: bool, mistake: str | None, seconds: float
) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "schema": "polca-edit/selftest/1",
        "passed": passed,
        "release_gate": planted.release_gate(results),
        "full": full,
        "mistake": mistake,
        "seconds": seconds,
        "settings": planted.settings_for(full).__dict__ | {"thresholds": planted.QUICK.thresholds.__dict__},
        "confusion": planted.confusion(results),
        "beds": [planted.as_json(result) for result in results],
        "versions": versions(),
        "hardware": hardware(),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def print_results(results: list[planted.BedResult]) -> None:
    """Table of beds, failed checks, and the confusion matrix."""
    typer.echo(f"\n{'bed':<5}{'variant':<28}{'expected':<22}{'observed':<20}checks")
    for r in results:
        good = sum(c.passed for c in r.checks)
        expected = r.expected if len(r.expected) < 22 else "not causal"
        mark = "" if r.passed else "  <-- FAILED"
        typer.echo(
            f"{r.bed:<5}{r.variant[:27]:<28}{expected:<22}{r.observed:<20}{good}/{len(r.checks)}{mark}"
        )
        for c in r.checks:
            if not c.passed:
                typer.echo(f"       {c.name}: {c.value:.6g}, must be {c.bound}")
    typer.echo("\nconfusion (expected -> observed: count)")
    for expected, row in planted.confusion(results).items():
        typer.echo(f"  {expected}: " + ", ".join(f"{name} {count}" for name, count in sorted(row.items())))
