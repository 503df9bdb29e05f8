"""``python -m benchmarks --quick --json FILE``: the table of ratios, with the hardware it ran on."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparisons import allocation_rows, arithmetic_shape, basis_rows, pipeline_row
from benchmarks.growth import float64_errors, growth_rows
from benchmarks.problems import trained_arithmetic
from benchmarks.timing import Clock, PeakMemory, Row, Skipped
from experiments.run.machine import hardware, versions
from polca_edit.checkpoints.files import write_json

QUICK = {"checkpoints": 3, "sums": 32, "d_model": 64, "allocation_d_model": 128, "vectors": 32, "pairs": 5}
FULL = {"checkpoints": 20, "sums": 128, "d_model": 128, "allocation_d_model": 256, "vectors": 32, "pairs": 5}
RIVALS = ("curvlinops-for-pytorch", "hessian-eigenthings")


def run(sizes: dict[str, int], clock: Clock, say: Any) -> dict[str, Any]:
    """All rows, said as they come."""
    torch.manual_seed(0)
    rows: list[Row] = []
    skipped: list[Skipped] = []
    started = time.perf_counter()

    def keep(found: Row | Skipped) -> None:
        say(line(found))
        rows.append(found) if isinstance(found, Row) else skipped.append(found)

    a, pairs = sizes, sizes["pairs"]
    for found in allocation_rows(a["sums"], a["allocation_d_model"], a["vectors"], pairs, clock):
        keep(found)
    for found in basis_rows(a["checkpoints"], a["sums"], a["d_model"], pairs, clock):
        keep(found)
    keep(pipeline_row(a["checkpoints"], a["sums"], a["d_model"], pairs, clock))
    problem = trained_arithmetic(arithmetic_shape(64), checkpoints=16, spacing=2, sums=256, curvature=8)
    growth = growth_rows(problem, clock)
    for each in growth:
        say(f"growth with {each.quantity}: exponent {each.exponent:.2f} over {each.sizes}")
    errors = float64_errors(problem)
    for name, value in errors.items():
        say(f"error against float64, {name}: {value:.1e}")
    installed = {}
    for name in RIVALS:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return {
        "rows": [dataclasses.asdict(row) for row in rows],
        "skipped": [dataclasses.asdict(each) for each in skipped],
        "growth": [dataclasses.asdict(each) for each in growth],
        "errors_against_float64": errors,
        "config": {**sizes, "clock": clock, "threads": torch.get_num_threads(), "seed": 0},
        "versions": {**versions(), **installed},
        "hardware": hardware(),
        "peak_rss_bytes": PeakMemory.so_far(),
        "seconds": time.perf_counter() - started,
    }


def line(found: Row | Skipped) -> str:
    """One row as text."""
    if isinstance(found, Skipped):
        return f"{found.name:<40} SKIPPED: {found.reason}"
    passes = f"  {megabytes(found.notes)} MB" if found.notes.get("ours_peak_bytes") is not None else ""
    if "ours_in_forward_passes" in found.notes:
        passes += (
            f"  [{found.notes['ours_in_forward_passes']:.0f} against "
            f"{found.notes['rival_in_forward_passes']:.0f} forward passes]"
        )
    return (
        f"{found.name:<40} ours {found.ours:8.3f}  other {found.rival:8.3f} {found.unit:<15} "
        f"ratio {found.ratio_median:6.2f} ({found.ratio_min:.2f} to {found.ratio_max:.2f}, "
        f"{found.pairs} pairs){passes}"
    )


def megabytes(notes: dict[str, Any]) -> str:
    """Peak memory of both sides beyond what was held before, where it was measured."""
    sides = (notes.get("ours_peak_bytes"), notes.get("rival_peak_bytes"))
    return ", ".join("-" if side is None else f"{side / 1e6:.0f}" for side in sides)


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown page."""
    c, h = result["config"], result["hardware"]
    text = [
        "# Benchmarks",
        "",
        f"`python -m benchmarks`, {c['pairs']} interleaved pairs, {c['clock']} seconds, "
        f"{c['threads']} torch thread(s), on {h['processor']} ({h['cores']} cores), "
        f"accelerator: {h['accelerator'] or 'none'}. "
        f"Versions: {', '.join(f'{k} {v}' for k, v in sorted(result['versions'].items()))}. "
        f"Peak resident memory {result['peak_rss_bytes'] / 1e9:.2f} GB, {result['seconds']:.0f} s in all.",
        "",
        "| row | ours | other | ratio: median (min to max) | ours, other in forward passes | "
        "peak memory of ours, other (MB) |",
        "|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        n = r["notes"]
        passes = (
            f"{n['ours_in_forward_passes']:.1f}, {n['rival_in_forward_passes']:.1f}"
            if "ours_in_forward_passes" in n
            else "-"
        )
        text.append(
            f"| {r['name']} | {r['ours']:.3f} {r['unit']} | {r['rival']:.3f} | "
            f"{r['ratio_median']:.2f} ({r['ratio_min']:.2f} to {r['ratio_max']:.2f}) | {passes} | "
            f"{megabytes(n)} |"
        )
    text += [f"| {s['name']} | - | - | skipped: {s['reason']} | - | - |" for s in result["skipped"]]
    text += ["", "## What belongs to each row", ""]
    for r in result["rows"]:
        shown = {k: (round(v, 6) if isinstance(v, float) else v) for k, v in r["notes"].items()}
        text.append(f"- **{r['name']}**: " + ", ".join(f"{k} {v}" for k, v in shown.items()))
    text += ["", "## Growth of time", "", "| with | sizes | seconds | exponent |", "|---|---|---|---|"]
    for g in result["growth"]:
        seconds = ", ".join(f"{s:.3f}" for s in g["seconds"])
        text.append(f"| {g['quantity']} | {g['sizes']} | {seconds} | {g['exponent']:.2f} |")
    text += ["", "## Largest error against float64", "", "| what | relative error |", "|---|---|"]
    text += [f"| {name} | {value:.1e} |" for name, value in result["errors_against_float64"].items()]
    return "\n".join(text) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="3 checkpoints and a small model: under five minutes"
    )
    parser.add_argument("--checkpoints", type=int, help="basis checkpoints (default: 3 or 20)")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, steadier on a busy machine",
    )
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    sizes = dict(QUICK if given.quick else FULL)
    if given.checkpoints is not None:
        if given.checkpoints < 3:
            parser.error(
                f"--checkpoints must be at least 3, got {given.checkpoints}; leave it out for the preset"
            )
        sizes["checkpoints"] = given.checkpoints
    result = run(sizes, given.clock, lambda text: print(text, flush=True))
    if given.json:
        write_json(given.json, result)
    if given.markdown:
        given.markdown.parent.mkdir(parents=True, exist_ok=True)
        given.markdown.write_text(table(result))


if __name__ == "__main__":
    main()
