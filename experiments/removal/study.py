"""Skill removal on the arithmetic task: our edits against what people use today.

``polca-edit remove-skill --preset demo --seeds 1 --json FILE`` trains the model, removes every
skill with every method, and judges all of them on the evaluate split. Settings and doses are
chosen on select. Every method is scaled on select to the same target damage, so that a row's
``worst_off_share`` compares methods at matched damage; shares over doses give the Pareto front.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer

from experiments.application import json_result, run_application, say
from experiments.removal.bed import BedSettings, open_bed, preset_bed
from experiments.removal.found import Effort
from experiments.removal.methods import OUR_METHODS, RIVALS, iterative_methods, run_method
from experiments.removal.results import Log, Part, StudyResult
from experiments.removal.rows import Place
from experiments.removal.skills import REQUIRED, SKILL_GROUPS
from experiments.run.machine import hardware, versions
from experiments.study.results import to_terminal
from interventions.removal.problem import Limits
from polca_edit.artifacts import from_plain, to_plain
from polca_edit.checkpoints.files import write_json

RELEARNERS = ("span optimised", "GradDiff", "NPO", "retrained without")


@dataclass(frozen=True)
class Study:
    """What one call of the study does.

    Attributes:
        preset: name, for records.
        bed: run to train, and sample sizes.
        effort: passes of every iterative method.
        relearning_steps: fine-tuning steps of a relearning curve.
        skills: skills to remove.
        methods: methods to compare.
    """

    preset: str
    bed: BedSettings
    effort: Effort = Effort()
    relearning_steps: int = 40
    skills: tuple[str, ...] = tuple(SKILL_GROUPS)
    methods: tuple[str, ...] = tuple(m for m in OUR_METHODS + RIVALS if m != "tensor span optimised")


def _smoke() -> Study:
    sizes = {
        "training.steps": 400,
        "training.warmup": 20,
        "training.record_every": 40,
        "training.state_every": 400,
        "arithmetic.select_sums": 150,
        "arithmetic.curvature_sums": 60,
        "arithmetic.evaluate_sums": 150,
    }
    bed = replace(
        preset_bed("smoke", hessian_vectors=2, overrides=sizes),
        fit_sums=64,
        trajectory_vectors=4,
        curvature_sample=40,
    )
    return Study("smoke", bed, Effort(2, 30, 60), 4, ("1s",))


PRESETS: dict[str, Callable[[], Study]] = {
    "smoke": _smoke,
    "demo": lambda: Study("demo", preset_bed("demo")),
    "mini": lambda: Study("mini", preset_bed("mini", select_sums=500, hessian_vectors=8)),
}


@dataclass(frozen=True)
class Job:
    """One skill of one seed, run in its own process."""

    study: Study
    seed: int
    skill: str
    folder: Path


def run_job(job: Job) -> Part:
    """Every method on one skill."""
    torch.set_num_threads(1)
    bed = open_bed(job.seed, job.study.bed, job.folder)
    required = REQUIRED[job.skill]
    # The fit aims at the strict bounds for every skill; the required ones are only judged.
    aims = Limits(max(required.target, 0.99), min(required.off, 0.005))
    place = Place(bed, bed.problem(job.skill, aims))
    known = iterative_methods(bed)
    part = Part()
    for method in job.study.methods:
        started = time.process_time()
        found = run_method(method, place.problem, bed, job.study.effort, known)
        row, curve = place.row(found), place.doses(found)
        relearned = place.relearning(found, job.study.relearning_steps) if method in RELEARNERS else []
        row = replace(row, cpu_seconds=time.process_time() - started)
        log = Log(job.skill, method, job.seed, found.setting, found.log)
        part = part + Part((row,), (curve,), tuple(relearned), (log,))
        say(
            f"  seed {job.seed} {job.skill:<11} {method:<20} target {row.target_share:.3f}  "
            f"worst off {row.worst_off_share:+.4f}  accuracy {row.accuracy:.2f}  "
            f"refit keeps {row.refit.kept:.2f}  {found.seconds:.0f} s"
        )
    return part


def run_study(
    study: Study,
    seeds: Sequence[int],
    *,
    workers: int,
    folder: Path | None = None,
    save: Callable[[StudyResult], None] = lambda result: None,
) -> StudyResult:
    """All seeds and skills.

    Args:
        study: what to do.
        seeds: one model each.
        workers: processes.
        folder: where trained runs are kept; a temporary folder by default.
        save: given the result so far after every finished skill.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        place = folder or Path(temporary)
        for seed in seeds:
            open_bed(seed, study.bed, place, say)
        jobs = [Job(study, seed, skill, place) for seed in seeds for skill in study.skills]
        mapped: Iterable[Part] = map(run_job, jobs)
        if workers > 1 and len(jobs) > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            submitted = [pool.submit(run_job, job) for job in jobs]
            mapped = (future.result() for future in as_completed(submitted))
        whole = Part()
        result = _result(study, seeds, whole, workers, began)
        for part in mapped:
            whole = whole + part
            result = _result(study, seeds, whole, workers, began)
            save(result)
    return result


def _result(study: Study, seeds: Sequence[int], part: Part, workers: int, began: float) -> StudyResult:
    return StudyResult.of(
        part,
        preset=study.preset,
        effort=study.effort,
        config=study.bed.config.model_dump(mode="json"),
        seeds=tuple(seeds),
        versions=versions(),
        hardware=hardware(),
        workers=workers,
        wall_seconds=time.perf_counter() - began,
    )


def restricted_to(study: Study, skills: str | None, methods: str | None) -> Study:
    """The study with other skills or methods, given comma-separated.

    Raises:
        ValueError: for an unknown name.
    """
    for given, known in ((skills, tuple(SKILL_GROUPS)), (methods, OUR_METHODS + RIVALS)):
        unknown = [name for name in (given or "").split(",") if given and name not in known]
        if unknown:
            raise ValueError(f"'{unknown[0]}' is not one of {', '.join(known)}; check the spelling")
    return replace(
        study,
        skills=tuple(skills.split(",")) if skills else study.skills,
        methods=tuple(methods.split(",")) if methods else study.methods,
    )


def remove_skill_study(
    json_: Annotated[
        Path,
        typer.Option("--json", metavar="FILE|-", help="The result as JSON, to FILE or to the terminal (-)."),
    ],
    preset: Annotated[str, typer.Option(help="demo, mini or smoke.")] = "demo",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    skills: Annotated[str | None, typer.Option(help="Comma-separated; default all.")] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated; default all.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps of every iterative method (demo: 320).")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; one skill each.")] = 2,
    keep: Annotated[Path | None, typer.Option(help="Folder for trained runs, found again there.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for Pareto and relearning figures.")] = None,
) -> None:
    """Skill removal on sums: our edits and today's rivals at matched damage."""
    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(sorted(PRESETS))}, got '{preset}'")
    study = restricted_to(PRESETS[preset](), skills, methods)
    if steps is not None:
        study = replace(study, effort=replace(study.effort, steps=steps))
    chosen = list(range(first_seed, first_seed + seeds))
    asked = to_terminal(json_)
    result = run_study(
        study,
        chosen,
        workers=workers,
        folder=keep,
        save=lambda found: None if asked else write_json(json_, to_plain(found)),
    )
    if asked:
        json_result(result, "-")
    if figures is not None:
        from experiments.report.figures.removal import RemovalCurves, draw_removal

        draw_removal(from_plain(RemovalCurves, to_plain(result)), figures)
    met = {(row.seed, row.skill) for row in result.rows if row.ours and row.met}
    say(
        f"{json_}: {len(result.rows)} rows, all bounds met for {len(met)} of "
        f"{len(chosen) * len(study.skills)} skills, {result.wall_seconds:.0f} s"
    )


if __name__ == "__main__":
    run_application(remove_skill_study)
