"""Local and Ray engines: same pieces, same bytes, also when a worker is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from oracles import quadratic_problem, walk

from experiments.config import load_config
from experiments.run.driver import run_stages
from experiments.run.engines import Blocks, local_slopes
from experiments.run.run import open_run
from polca_edit.allocation.allocate import slopes_at
from polca_edit.artifacts import checksum
from polca_edit.basis.record import random_basis

BASES = [{"kind": "trajectory", "vectors": 3}, {"kind": "random", "vectors": 2}]


@pytest.mark.parametrize("blocks", [Blocks(), Blocks(vectors=3), Blocks(sequences=3), Blocks(2, 5)])
def test_pieces_make_the_whole(blocks, generator):
    problem = quadratic_problem([3.0, 1.0, -0.5, 0.2, 0.1], generator)
    checkpoints = walk(problem.objective.space, 4, generator)
    bases = [random_basis(5, count, generator, dtype=torch.float64) for count in (2, 1)]
    given = problem.objective, checkpoints, bases, problem.tokens, 1
    cut, whole = local_slopes(*given, blocks), slopes_at(*given)
    assert torch.allclose(cut.losses, whole.losses, rtol=1e-13)
    for name in ("gradients", "before", "after"):
        for mine, other in zip(getattr(cut, name), getattr(whole, name), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)


def test_block_sizes_are_checked():
    with pytest.raises(ValueError, match="at least 1"):
        Blocks(0).tasks(3, 3)


def projected(out: Path, **overrides: object) -> tuple[dict[str, str], dict[str, float]]:
    """Checksums of the projections of a smoke run in ``out``, and their passes."""
    values = {
        "bases": BASES,
        "threads": 1,
        "vector_block": 2,
        "token_shard": 25,
        "batch_size": 25,
        **overrides,
    }
    run = open_run(load_config("smoke", values), out, lambda text: None)
    stages = ["train", "basis:trajectory", "basis:random", "projections"]
    run_stages(run, stages=stages)
    record = json.loads((out / "stages" / "projections.json").read_text())
    return {p.name: checksum(p) for p in sorted((out / "projections").glob("*.safetensors"))}, record[
        "passes"
    ]


def without_projections(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    shutil.rmtree(target / "projections")
    (target / "stages" / "projections.json").unlink()
    return target


def test_local_run_resumes_inside_projections(smoke_run, tmp_path, monkeypatch):
    whole = projected(without_projections(smoke_run, tmp_path / "whole"))
    again = without_projections(tmp_path / "whole", tmp_path / "again")
    import experiments.run.engines as engines

    calls, compute = [], engines.compute_piece

    def failing(*given: object) -> object:
        calls.append(given[4])
        if len(calls) == 40:
            raise KeyboardInterrupt
        return compute(*given)

    monkeypatch.setattr(engines, "compute_piece", failing)
    with pytest.raises(KeyboardInterrupt):
        projected(again)
    done = len(list((again / "projections" / "parts").glob("part-*")))
    assert 0 < done < 11
    calls.clear()
    calls.extend([0] * 40)
    assert projected(again) == whole
    assert set(calls[40:]) == set(range(done, 11))


def kill_workers(journal: Path, stop: threading.Event, killed: list[int]) -> None:
    """SIGKILL the second worker inside its first task, and one more once ten tasks were begun."""
    while not stop.is_set():
        entries = sorted(journal.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        pids = list(dict.fromkeys(int(path.name.rsplit("-", 1)[1]) for path in entries))
        if not killed and len(pids) >= 2:
            os.kill(pids[1], signal.SIGKILL)
            killed.append(pids[1])
        elif len(killed) == 1 and len(entries) >= 10:
            last = int(entries[-1].name.rsplit("-", 1)[1])
            if last != killed[0]:
                os.kill(last, signal.SIGKILL)
                killed.append(last)
        time.sleep(0.002)


@pytest.mark.timeout(300)
def test_ray_writes_the_same_bytes_though_workers_are_killed(smoke_run, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="the optional extra 'ray' is not installed")
    from ray.cluster_utils import Cluster

    local = projected(without_projections(smoke_run, tmp_path / "local"))
    again = without_projections(tmp_path / "local", tmp_path / "ray")
    journal = tmp_path / "journal"
    journal.mkdir()
    monkeypatch.setenv("POLCA_EDIT_JOURNAL", str(journal))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    stop, killed = threading.Event(), []
    killer = threading.Thread(target=kill_workers, args=(journal, stop, killed))
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        killer.start()
        distributed = projected(again, engine="ray")
    finally:
        stop.set()
        killer.join(5) if killer.ident else None
        ray.shutdown()
        cluster.shutdown()
    assert distributed == local
    names = [path.name.rsplit("-", 1) for path in journal.iterdir()]
    tasks = [task for task, _ in names]
    # 11 checkpoints, 9 directions in blocks of 2, 50 sequences in shards of 25.
    assert len(set(tasks)) == 11 * 5 * 2
    assert len(killed) == 2
    lost = {task for task, pid in names if int(pid) == killed[0]}
    assert lost
    assert all(tasks.count(task) >= 2 for task in lost)
