"""Runs of cases on disk: trained once, measured once, found again by the content they depend on."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import torch

import interventions
from experiments.natural import case as case_module
from experiments.natural import measure as measure_module
from experiments.natural.case import Recording
from experiments.natural.cases import CASES
from experiments.natural.measure import MeasureSettings, measure_case, open_case
from experiments.natural.records import SCHEMA, RunRows
from experiments.run.machine import versions
from experiments.run.store import RunDirectory
from polca_edit.artifacts import checksum, key_of

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One run of one case.

    Attributes:
        case: name.
        twin: whether it is the twin.
        seed: of the run.
        out: folder that runs are kept in.
        settings: how much is measured.
    """

    case: str
    twin: bool
    seed: int
    out: Path
    settings: MeasureSettings

    @property
    def name(self) -> str:
        """Case, half and seed."""
        return f"{self.case}/{'twin' if self.twin else 'case'}-{self.seed}"


def source_of(*modules: object) -> list[str]:
    """SHA-256 of the source files of modules or functions."""
    return [checksum(Path(inspect.getfile(m))) for m in modules]  # type: ignore[arg-type]


def package_source(package: ModuleType) -> str:
    """One key of a package: numbers that another version of it measured are not read back."""
    folder = Path(inspect.getfile(package)).parent
    return key_of([(str(p.relative_to(folder)), checksum(p)) for p in sorted(folder.rglob("*.py"))])


def recording_of(name: str, twin: bool, seed: int, out: Path) -> Recording:
    """Weights of one run of a case, trained or read back.

    Args:
        name: of the case.
        twin: whether it is the twin.
        seed: of the run.
        out: folder that runs are kept in.
    """
    case = CASES[name]
    job = Job(name, twin, seed, out, MeasureSettings())

    def train() -> Recording:
        return case.build(seed, twin).recorded()

    return RunDirectory(out).kept(f"{job.name}/weights", recording_key(job), Recording, train)


def recording_key(job: Job) -> str:
    """What the weights of a run depend on."""
    return key_of(SCHEMA, job.name, source_of(CASES[job.case].build, case_module), versions()["torch"])


def run_job(job: Job) -> RunRows:
    """Train and measure one run, or read back what was kept."""
    case, store = CASES[job.case], RunDirectory(job.out)

    def measure() -> RunRows:
        started = time.perf_counter()
        recording = recording_of(job.case, job.twin, job.seed, job.out)
        seconds = time.perf_counter() - started
        opened = open_case(case, case.build(job.seed, job.twin), recording, job.settings)
        return measure_case(opened, job.settings, job.seed, job.twin, seconds)

    measuring = source_of(measure_module), package_source(interventions)
    key = key_of(recording_key(job), job.settings, *measuring, case.truth, case.target, case.exempt)
    return store.kept(f"{job.name}/rows.json", key, RunRows, measure)


def run_jobs(jobs: Sequence[Job], workers: int, say: Say) -> list[RunRows]:
    """Every job in this process or in several; lines are said in the order of the jobs."""
    if workers <= 1:
        return [_told(job, run_job(job), say) for job in jobs]
    # One thread a process: together they fill the cores, and sums come out in the same order.
    with ProcessPoolExecutor(
        min(workers, len(jobs)), get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        waiting = [pool.submit(run_job, job) for job in jobs]
        return [_told(job, future.result(), say) for job, future in zip(jobs, waiting, strict=True)]


def _told(job: Job, rows: RunRows, say: Say) -> RunRows:
    row = rows.declared
    seconds = rows.train_seconds + rows.test_seconds
    mark = "" if row.passed else "  <-- not as it should be"
    say(f"  {job.name:<28}{row.truth:<10}{row.word:<11}share {row.share:6.2f}  {seconds:4.0f} s{mark}")
    return rows
