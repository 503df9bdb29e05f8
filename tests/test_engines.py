"""Local and Ray engines: same pieces, same bytes, also when a worker is killed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import quadratic_problem, walk
from torch import nn

from experiments.config import load_config
from experiments.run.driver import run_stages
from experiments.run.engines import TaskQueue, WorkerCall, local_slopes, stored_rows
from experiments.run.pieces import Blocks, Measured, Piece, compute_piece
from experiments.run.run import load_run, open_run
from experiments.run.stages.projections import SlopeRounding
from polca_edit.allocation.allocate import CheckpointSlopes, Projections, slopes_at
from polca_edit.artifacts import checksum, load_record, save_record
from polca_edit.basis.record import Basis, random_basis, unlabelled
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet

BASES = [{"kind": "trajectory", "vectors": 3}, {"kind": "random", "vectors": 2}]


CUTS = [Blocks(), Blocks(vectors=3), Blocks(sequences=3), Blocks(2, 5), Blocks(parameters=2), Blocks(2, 5, 3)]


@pytest.mark.parametrize("blocks", CUTS)
def test_pieces_make_the_whole(blocks, generator):
    problem = quadratic_problem([3.0, 1.0, -0.5, 0.2, 0.1], generator)
    checkpoints = walk(problem.objective.space, 4, generator)
    bases = [random_basis(5, count, generator, dtype=torch.float64) for count in (2, 1)]
    mask = torch.tensor([False, False, True, True, False])
    bases.append(random_basis(5, 1, generator, dtype=torch.float64, mask=mask))
    given = problem.objective, checkpoints, bases, problem.tokens
    cut, whole = local_slopes(Measured(*given), 1, blocks), slopes_at(*given, 1)
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
        "vector_block": 5,
        "token_shard": 25,
        "parameter_block": 8000,
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
        calls.append(given[1])
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
    """SIGKILL the second worker inside its first task."""
    while not stop.is_set() and not killed:
        entries = sorted(journal.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        pids = list(dict.fromkeys(int(path.name.rsplit("-", 1)[1]) for path in entries))
        if len(pids) >= 2:
            os.kill(pids[1], signal.SIGKILL)
            killed.append(pids[1])
        time.sleep(0.002)


@pytest.mark.timeout(300)
def test_ray_writes_the_same_bytes_though_a_worker_is_killed(smoke_run, tmp_path, monkeypatch):
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
    # 11 checkpoints, 9 directions in blocks of 5, 50 sequences in shards of 25, blocks of whole tensors.
    blocks = len(Blocks(parameters=8000).of(load_run(again, lambda text: None).task.space))
    assert blocks > 1
    assert len(set(tasks)) == 11 * 2 * 2 * blocks
    assert len(killed) == 1
    lost = {task for task, pid in names if int(pid) == killed[0]}
    assert lost
    assert all(tasks.count(task) >= 2 for task in lost)


# -- nodes that are too small for all rows -------------------------------------------------------------


class Wide(nn.Module):
    """Four tensors of 128,000 weights, all of which the loss of every sequence depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(500, 256, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(torch.tanh(layer(x)).mean(-1, keepdim=True) for layer in self.layers)


class SmallNodes:
    """Stands in for a cluster: two nodes, each a process with a bound on its address space.

    A node's process may be killed once its result is due; the task is then started again, as Ray does it.
    """

    cores = 2

    def __init__(
        self, compute: Callable[[WorkerCall], Piece], place: Path, room: int, kill: int = -1
    ) -> None:
        self.compute, self.place, self.room, self.kill = compute, place, room, kill
        self.started: list[tuple[int, WorkerCall]] = []

    def submit(self, call: WorkerCall) -> tuple[int, WorkerCall, Path]:
        number = len(self.started)
        path = self.place / f"{number}.safetensors"
        process = os.fork()
        if process == 0:
            try:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                bound = pages * resource.getpagesize() + self.room
                resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
                piece = self.compute(call)
                if number == self.kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                save_record(path, piece)
                os._exit(0)
            except (MemoryError, RuntimeError):  # torch says it in either way
                os._exit(3)
            finally:
                os._exit(4)
        self.started.append((process, call))
        return process, call, path

    def get(self, handle: tuple[int, WorkerCall, Path]) -> Piece:
        process, call, path = handle
        ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if ended == -signal.SIGKILL:
            return self.get(self.submit(call))
        if ended:
            raise ValueError(f"a node ended with {ended}")
        return load_record(Piece, path)

    def cancel(self, handle: tuple[int, WorkerCall, Path]) -> None:
        os.kill(handle[0], signal.SIGKILL)
        os.waitpid(handle[0], 0)


def test_two_small_nodes_finish_what_one_cannot_hold(tmp_path, generator):
    module, count, megabyte = Wide(), 24, 10**6
    loss = Objective(module, lambda m, x: m(x), route="jvp")
    size = loss.space.size
    scored = torch.ones(3, 1, dtype=torch.bool)
    tokens = TokenSet(torch.randn(3, 500, generator=generator), scored, torch.arange(3))
    thetas = 0.02 * torch.randn(3, size, generator=generator)
    series = open_checkpoints(thetas, loss.space, steps=[0, 1, 2])
    basis = unlabelled("rows", torch.randn(count, size, generator=generator) / size**0.5)
    save_record(tmp_path / "basis.safetensors", basis)
    whole = Measured(loss, series, (basis,), tokens)

    def node(call: WorkerCall) -> Piece:
        block = Blocks(parameters=call.parameters).of(loss.space)[call.task.block]
        rows = stored_rows(tmp_path / "basis.safetensors", block)
        return compute_piece(
            Measured(loss, series, (rows,), tokens), call.index, call.task, block, call.along
        )

    def run(blocks: Blocks, kill: int = -1) -> tuple[CheckpointSlopes, SmallNodes]:
        nodes = SmallNodes(node, tmp_path, 70 * megabyte, kill)
        queue = TaskQueue(nodes, whole, [1], blocks)
        try:
            return queue.result(1), nodes
        finally:
            queue.cancel()

    assert basis.rows.nbytes > 49 * megabyte
    with pytest.raises(ValueError, match="ended with 3"):
        run(Blocks())
    blocks = Blocks(sequences=2, parameters=128_000)
    found, nodes = run(blocks, kill=2)
    assert len(nodes.started) == 2 * 4 + 1  # two shards of four blocks, and the one that was killed
    expected = local_slopes(whole, 1, blocks)
    assert torch.equal(found.gradients[0], expected.gradients[0])
    assert torch.equal(found.before[0], expected.before[0])
    assert torch.equal(found.after[0], expected.after[0])
    uncut = local_slopes(whole, 1, Blocks())
    torch.testing.assert_close(found.gradients[0], uncut.gradients[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.after[0], uncut.after[0], rtol=1e-4, atol=1e-6)


def test_a_run_of_rounded_rows_in_blocks_of_parameters(smoke_run, tmp_path):
    """Entries of some tensors in bfloat16, tasks of some of the weights: as the whole to rounding."""
    bases = [
        {"kind": "trajectory", "vectors": 3, "include": ["*mlp*"]},
        {"kind": "random", "vectors": 2},
    ]
    lines: list[str] = []
    values = {"bases": bases, "threads": 1, "basis_storage": "bfloat16"}
    found = []
    for name, block in (("whole", None), ("cut", 4000)):
        out = shutil.copytree(smoke_run, tmp_path / name)
        run = open_run(load_config("smoke", {**values, "parameter_block": block}), out, lines.append)
        run_stages(run, stages=["train", "basis:trajectory", "basis:random", "projections"])
        found.append(load_record(Projections, run.directory.projections("trajectory")))
    basis = load_record(Basis, run.directory.basis("trajectory"))
    assert basis.entries.dtype == torch.bfloat16
    assert basis.entries.shape[1] < run.task.space.size / 2
    assert len(Blocks(parameters=4000).of(run.task.space)) > 1
    assert any("basis trajectory: rows in bfloat16: |B B' - I| at most" in line for line in lines)
    for name in ("gradients", "residual_start", "residual_end"):
        mine, other = (getattr(each, name) for each in found)
        assert float((mine - other).norm()) < 1e-5 * float(mine.norm())
    assert torch.equal(found[0].displacements, found[1].displacements)


def test_a_run_whose_slopes_are_taken_in_fewer_bits_says_what_that_costs(smoke_run, tmp_path):
    lines: list[str] = []
    values = {"bases": [{"kind": "random", "vectors": 12}], "threads": 1}
    found = []
    for products in ("float32", "bfloat16"):
        out = shutil.copytree(smoke_run, tmp_path / products)
        run = open_run(load_config("smoke", {**values, "slope_products": products}), out, lines.append)
        run_stages(run, stages=["train", "basis:random", "projections"])
        found.append(load_record(Projections, run.directory.projections("random")))
        assert (out / "projections" / "rounding.json").exists() == (products == "bfloat16")
    rounding = load_record(SlopeRounding, tmp_path / "bfloat16" / "projections" / "rounding.json")
    error = float((found[1].gradients - found[0].gradients).norm() / found[0].gradients.norm())
    assert 1e-4 < error < 1e-2
    assert len(rounding.errors) == 3
    assert all(1e-4 < each < 2e-2 for each in rounding.errors)
    assert any("slopes by products in bfloat16: off by" in line for line in lines)
    assert torch.equal(found[0].losses, found[1].losses)
    assert torch.equal(found[0].displacements, found[1].displacements)
