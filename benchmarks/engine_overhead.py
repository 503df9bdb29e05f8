"""``python -m benchmarks.engine_overhead``: what the Ray engine costs beside the local one.

Both compute the same projections stage of the same recorded run in turn: one local process with one
thread, and one Ray worker of one thread per core. Without overhead the ratio would be one over the
number of cores. Files are compared by checksum; starting the cluster is timed apart.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.config import load_config
from experiments.run.driver import run_stages
from experiments.run.engines import ray_session
from experiments.run.machine import hardware, versions
from experiments.run.run import Run, open_run
from polca_edit.artifacts import checksum
from polca_edit.checkpoints.files import write_json

SCHEMA = "polca-edit/engine-overhead/1"


def recorded_run(folder: Path, steps: int) -> Run:
    """A small arithmetic run with all its stages finished."""
    changes: dict[str, Any] = {
        "training.steps": steps,
        "training.record_every": 20,
        "training.state_every": steps,
        "bases": [{"kind": "random", "vectors": 12}, {"kind": "random", "vectors": 12, "name": "other"}],
        "vector_block": 14,
        "token_shard": 125,
        "batch_size": 125,
        "threads": 1,
    }
    run = open_run(load_config("demo", changes), folder, lambda text: None)
    run_stages(run)
    return run


def projections_again(folder: Path, engine: str) -> tuple[float, dict[str, str]]:
    """Seconds of the projections stage with an engine, and checksums of what it wrote."""
    shutil.rmtree(folder / "projections")
    (folder / "stages" / "projections.json").unlink()
    config = load_config(folder / "config.yaml", {"engine": engine})
    run = open_run(config, folder, lambda text: None)
    started = time.perf_counter()
    run_stages(run)
    seconds = time.perf_counter() - started
    return seconds, {p.name: checksum(p) for p in sorted((folder / "projections").glob("*.safetensors"))}


def compare(pairs: int, steps: int) -> dict[str, Any]:
    """Interleaved pairs of both engines."""
    local, distributed, same = [], [], True
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        recorded_run(folder, steps)
        started = time.perf_counter()
        with ray_session(None):
            opening = time.perf_counter() - started
            projections_again(folder, "ray")  # the first call traces the model once per worker
            for _ in range(pairs):
                mine, files = projections_again(folder, "local")
                theirs, others = projections_again(folder, "ray")
                local.append(mine)
                distributed.append(theirs)
                same = same and files == others
    ratios = [b / a for a, b in zip(local, distributed, strict=True)]
    return {
        "schema": SCHEMA,
        "local_one_thread_seconds": statistics.median(local),
        "ray_seconds": statistics.median(distributed),
        "ray_over_local": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "workers": os.cpu_count(),
        "identical_files": same,
        "cluster_start_seconds": opening,
        "pairs": pairs,
        "checkpoints": steps // 20 + 1,
        "versions": versions(),
        "hardware": hardware(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_overhead", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=240, help="training steps, a multiple of 20")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result = compare(given.pairs, given.steps)
    ratio = result["ray_over_local"]
    print(
        f"ray with {result['workers']} one-thread workers over local with one thread: {ratio['median']:.2f} "
        f"({ratio['min']:.2f} to {ratio['max']:.2f}), files identical: {result['identical_files']}, "
        f"cluster started in {result['cluster_start_seconds']:.1f} s"
    )
    if given.json is not None:
        write_json(given.json, result)


if __name__ == "__main__":
    main()
