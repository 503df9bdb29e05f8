"""``polca-edit study removal``: what a removal costs, and how long it lasts.

Every method takes one skill out of a trained run, is repaired by the same steps on everything else, and is
then trained on again with some of the skill's labels; the yardstick is the same training run without the
skill's labels (gold). Starts and rows are kept in the run by content: a study that was stopped goes on, and
methods share what they have in common.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer

from experiments.application import say
from experiments.config import RunConfig, load_config
from experiments.removal.undo.methods import (
    CHOSEN_AFTER_PROBES,
    DISTIL,
    GOLD,
    METHODS,
    NEEDS,
    PROBED,
    SETTINGS,
    SHARED,
    Start,
)
from experiments.removal.undo.place import Effort, Place
from experiments.removal.undo.rows import Row, agreement, best_attack, gap, half_lost, measured, repaired_at
from experiments.removal.undo.tables import study_tables
from experiments.run.run import Run, load_run, open_run
from experiments.run.stages.training import trained_series
from experiments.study.results import publish, show
from experiments.verbs.options import Result
from polca_edit.artifacts import from_plain, key_of, load_record, to_plain
from polca_edit.checkpoints.files import finite_json

#: Raised when a method or a measure changes so that kept rows no longer stand.
VERSION = 3
#: Efforts by preset; every preset not named here gets the default.
EFFORTS: Mapping[str, Effort] = {
    "smoke": Effort(32, 2, 6, 8, 4, axis_directions=16, noise=(0.1, 0.3)),
    "demo": Effort(),
    "mini": Effort(),
}


@dataclass(frozen=True)
class Job:
    """One method on one skill of one run, after some numbers of repair steps.

    Attributes:
        run: directory.
        skill: name.
        method: name.
        repairs: numbers of steps.
        effort: of everything.
        whole: false for one attack only.
        kept: nothing is computed, rows that are not there are left out.
    """

    run: Path
    skill: str
    method: str
    repairs: tuple[int, ...]
    effort: Effort
    whole: bool = True
    kept: bool = False


@lru_cache(maxsize=1)
def _opened(path: Path) -> Run:
    return load_run(path, say=lambda _: None)


@lru_cache(maxsize=2)
def _place(path: Path, skill: str, effort: Effort) -> Place:
    return Place(_opened(path), skill, effort)


def _slug(method: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in method)


def depends(method: str, effort: Effort) -> tuple[object, ...]:
    """What a method's rows depend on beside the run: effort, settings, and the methods it is made from."""
    needed = tuple(depends(other, effort) for other in NEEDS.get(method, ()))
    own = (SETTINGS.get(method),) if method in SETTINGS else ()
    chosen_after = (PROBED,) if method in CHOSEN_AFTER_PROBES else ()
    return VERSION, effort, *own, *chosen_after, *needed


def start_of(place: Place, method: str) -> Start:
    """A method's weights where repair sets in, made once for a run's content and kept."""
    run, name = place.run, f"removal-study/{place.skill}/start-{_slug(method)}"
    made = METHODS.get(method) or SHARED[method]
    needed = {other: start_of(place, other) for other in NEEDS.get(method, ())}
    key = run.key_for(name, *depends(method, place.effort))
    return run.directory.kept(name, key, Start, lambda: made(place, needed), run.objective.passes)


def rows_of(job: Job) -> list[Row]:
    """The rows of one method; those kept before are read back."""
    torch.set_num_threads(1)
    place = _place(job.run, job.skill, job.effort)
    run = place.run

    def key(name: str) -> str:
        return run.key_for(name, *depends(job.method, job.effort))

    def name(steps: int) -> str:
        """The full row, where it is wanted or there already; else that of the short one."""
        full = f"removal-study/{job.skill}/{_slug(job.method)}-{steps}.json"
        if job.whole or run.directory.finished(full, key(full)):
            return full
        return full.replace(".json", "-short.json")

    if job.kept:
        there = {
            name(steps)
            for steps in (0, *job.repairs)
            if run.directory.finished(name(steps), key(name(steps)))
        }
        return [load_record(Row, run.directory.path / "kept" / one) for one in sorted(there)]
    start: Start | None = None
    after: dict[int, tuple[torch.Tensor, float, float]] = {}
    missing = [s for s in job.repairs if not run.directory.finished(name(s), key(name(s)))]
    if missing:
        start = start_of(place, job.method)
        teacher = start_of(place, "GradDiff") if job.method == DISTIL else None
        after = repaired_at(place, job.method, start, missing, teacher)
    found = []
    for steps in job.repairs:
        if start is not None and start.finished:
            steps = 0

        def compute(steps: int = steps) -> Row:
            assert start is not None
            return measured(place, job.method, start, steps, after[steps], whole=job.whole)

        found.append(run.directory.kept(name(steps), key(name(steps)), Row, compute, run.objective.passes))
        if start is not None and start.finished:
            break
    return found


def with_gold(rows: Sequence[Row]) -> list[Row]:
    """Rows with what is counted from the gold model of their skill and seed, where it is there."""
    gold = {(row.skill, row.seed): row for row in rows if row.method == GOLD}
    trained = {(row.skill, row.seed): row.target_loss for row in rows if row.method == "untouched"}
    found = []
    for row in rows:
        where = row.skill, row.seed
        # The timeline speaks of the skill and of every group outside it; parts of the skill are not others.
        outside = set(row.predicted or row.group_shares) - {row.skill}
        others = {name: value for name, value in row.group_shares.items() if name in outside}
        row = replace(row, agreement=agreement(row.predicted, others))
        never = gold.get(where)
        if never is not None:
            row = replace(
                row,
                gold_loss=never.target_loss,
                gap=gap(row.relearn.loss, never.relearn.loss),
                beyond_gold=max(
                    (share - max(0.0, never.group_shares[name]) for name, share in others.items()),
                    default=None,
                ),
                gap_to_ignorance=(
                    gap(row.relearn.loss, never.relearn.loss, row.chance) if row.chance > 0 else None
                ),
            )
        # A skill with one answer is known by heart at chance: nothing lies between.
        if where in trained and row.chance > trained[where]:
            half = half_lost(row.relearn.steps, row.relearn.loss, row.chance, trained[where])
            row = replace(row, half_steps=half)
        found.append(row)
    return found


def jobs_of(
    runs: Sequence[Path],
    skills: Sequence[str],
    methods: Sequence[str],
    like: Job,
) -> list[Job]:
    """Gold first: everything else is read against it."""
    order = [name for name in METHODS if name in methods]
    return [replace(like, run=run, skill=skill, method=m) for m in order for run in runs for skill in skills]


def _done(jobs: Sequence[Job], workers: int) -> Iterator[list[Row]]:
    """Rows as they come; what methods share is made before they are handed out."""
    if workers < 2:
        for job in jobs:
            yield rows_of(job)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        shared = [job for job in jobs if job.method in ("GradDiff", "skill axes, rank 1")]
        for wave in (shared, [job for job in jobs if job not in shared]):
            waiting = [pool.submit(rows_of, job) for job in wave]
            for future in as_completed(waiting):
                yield future.result()


def prepared(preset: str, seed: int, folder: Path) -> tuple[Path, RunConfig]:
    """The run of a seed, trained where it is not there yet."""
    config = load_config(preset, {"seed": seed, "threads": 1})
    place = folder / f"{preset}-{seed}"
    run = open_run(config, place, say)
    trained_series(run)
    return place, config


def chosen(given: str | None, known: Sequence[str], what: str) -> tuple[str, ...]:
    """Names given with commas, all known ones by default.

    Raises:
        ValueError: for a name that is not known.
    """
    names = (
        tuple(name.strip() for name in given.split(";" if what == "method" else ","))
        if given
        else tuple(known)
    )
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"a {what} must be one of {'; '.join(known)}, got '{unknown[0]}'; check the spelling"
        )
    return names


def removal(
    preset: Annotated[str, typer.Option(help="demo, mini or smoke.")] = "demo",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    skills: Annotated[str | None, typer.Option(help="Comma-separated; default all digits.")] = None,
    methods: Annotated[str | None, typer.Option(help="Separated by semicolons; default all.")] = None,
    repair: Annotated[str, typer.Option(help="Numbers of repair steps, comma-separated.")] = "120",
    short: Annotated[bool, typer.Option("--short", help="Relearn with a tenth of the labels only.")] = False,
    kept: Annotated[bool, typer.Option("--kept", help="Only what was measured before.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    runs: Annotated[Path, typer.Option(help="Trained runs, PRESET-SEED.")] = Path("runs/removal"),
    json_: Result = None,
    figure: Annotated[Path | None, typer.Option(help="Picture of curves and frontier (.png).")] = None,
) -> None:
    """Take skills out in every way, repair all alike, and see how fast they come back.

    Example: `polca-edit study removal --preset demo --seeds 1 --skills 10s,1s --json removal.json`
    """
    digits = ("10s", "1s", "100s", "1000s")
    wanted = chosen(skills, digits, "skill")
    ways = chosen(methods, list(METHODS), "method")
    repairs = _whole_numbers(repair)
    effort = EFFORTS.get(preset, Effort())
    opened = [prepared(preset, seed, runs) for seed in range(first_seed, first_seed + seeds)]
    like = Job(opened[0][0], wanted[0], ways[0], repairs, effort, not short, kept)
    jobs = jobs_of([place for place, _ in opened], wanted, ways, like)
    rows: list[Row] = []
    for found in _done(jobs, workers):
        rows += [row for row in found if row not in rows]
        for row in found:
            say(_line(row))
        _written(json_, opened, effort, rows)
    if figure is not None:
        from experiments.report.figures.undo import UndoRow, draw

        draw(from_plain(list[UndoRow], to_plain(with_gold(rows))), figure)
    show(study_tables(with_gold(rows)))


def _line(row: Row) -> str:
    return (
        f"  seed {row.seed} {row.skill:<6} {row.method:<34} repair {row.repair_steps:>4}: loss "
        f"{row.target_loss:.2f} (chance {row.chance:.2f}), worst other {row.worst_other_share:+.3f}, after "
        f"{row.relearn.steps[-1]} steps on 10 % {row.relearn.loss[-1]:.2f}, best attack "
        f"{best_attack(row)[-1]:.2f}, {row.passes_share:.1%} of training's passes"
    )


def _whole_numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ValueError(
            f"--repair needs whole numbers separated by commas, got '{text}'; for example 0,60,180"
        )
    return tuple(sorted({int(part) for part in parts}))


def _written(
    file: Path | None, opened: Sequence[tuple[Path, RunConfig]], effort: Effort, rows: Sequence[Row]
) -> None:
    order = list(METHODS)
    done = sorted(with_gold(rows), key=lambda r: (r.seed, r.skill, order.index(r.method), r.repair_steps))
    contents = {"effort": asdict(effort), "version": VERSION, "rows": done, "key": key_of(VERSION, effort)}
    seeds = [config.seed for _, config in opened]
    publish(file, "removal-by-undoing/1", opened[0][1], seeds, contents, study_tables(done))


def read_rows(file: Path) -> list[Row]:
    """The rows of a result file.

    Raises:
        ValueError: for another file.
    """
    values = finite_json(file.read_text())
    if values.get("schema") != "polca-edit/removal-by-undoing/1":
        raise ValueError(f"'{file}' must be a result of polca-edit study removal, got {values.get('schema')}")
    rows: list[Row] = from_plain(list[Row], values["rows"])
    return rows
