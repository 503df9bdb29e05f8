"""One plan, one or more runs, one table: pairs fixed on select, measured on unseen tokens, then judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from experiments.run import keys
from experiments.run.keys import signature_names
from experiments.run.machine import hardware, versions
from experiments.run.run import Run, load_run
from experiments.run.run_record import open_evaluate, plan_hash
from experiments.verbs.groups import with_groups
from experiments.verdicts.choose import (
    Chosen,
    choose,
    clusters_stage,
    has_projections,
    parents_of,
    same_pairs,
    split_of,
    unseen_tokens,
)
from experiments.verdicts.matrix import DamageMatrix
from experiments.verdicts.records import (
    MISSED,
    SCHEMA,
    CausalResult,
    ControlRow,
    KeptEvidence,
    PlannedPair,
    TestPlan,
    Untested,
    basis_row,
    verdict_row,
)
from interventions.causal.control import positive_control
from interventions.causal.cost import causal_cost
from interventions.causal.settings import TestSettings
from interventions.causal.test import Measured, judge_runs, measure_run
from polca_edit.allocation.progress import progress as progress_of
from polca_edit.artifacts import key_of, load_record, save_record, to_plain
from polca_edit.basis.record import Basis
from polca_edit.clusters.hypotheses import Unchosen

Say = Callable[[str], None]
#: Unseen sequences on which the positive control is judged.
CONTROL_SEQUENCES = 250


@dataclass(frozen=True)
class StudySettings:
    """What a study tests.

    Attributes:
        bases: names; every run must have them.
        unseen: sequences drawn anew; zero takes the evaluate split.
        window: (first, last) step of the movement that is undone.
        groups: file of token groups that join the labels.
        test: draws and thresholds.
        control: plant a rule and its twin in every run.
    """

    bases: tuple[str, ...]
    unseen: int = 1000
    window: tuple[int, int] | None = None
    test: TestSettings = TestSettings()
    control: bool = True
    groups: str | None = None


def run_study(
    places: Sequence[Path], settings: StudySettings, *, workers: int = 1, say: Say = print
) -> CausalResult:
    """Choose pairs, freeze the plan, open the unseen tokens, measure, judge.

    Every basis of every run is kept in that run once it is measured, so a stopped study goes on.

    Args:
        places: run directories, several seeds of one config.
        settings: what is tested.
        workers: processes; a basis of a run is the unit of work.
        say: told what is done.

    Raises:
        ValueError: for runs of different configs, or a basis that a run does not have.
    """
    started = time.perf_counter()
    runs = [with_groups(load_run(place, say=lambda _: None), settings.groups, say) for place in places]
    _same_config(runs)
    seeds = tuple(run.config.seed for run in runs)
    chosen = [_chosen(run, settings) for run in runs]
    plans = [_plan(run, found, settings) for run, found in zip(runs, chosen, strict=True)]
    exploratory = False
    for run, plan in zip(runs, plans, strict=True):
        exploratory = open_evaluate(run, plan, by="test").exploratory or exploratory
    jobs = [(place, label, settings) for place in places for label in settings.bases]
    say(f"  {_counted(runs, chosen)}: {stated_cost(runs, chosen, settings, workers)}")
    kept, controls = _measure(jobs, [(place, settings) for place in places], workers)
    measured = _measured(runs, chosen, kept, settings)
    table = judge_runs(measured, settings.test)
    why = {pair.name: pair.why for one in measured for pair in one.pairs}
    answers = [(a, one.seed) for one in measured for a in one.bases]
    return CausalResult(
        SCHEMA,
        plan_hash(to_plain(plans[0])),
        exploratory,
        tuple(verdict_row(row, why.get(row.name, "")) for row in table.rows),
        tuple(basis_row(answer, seed) for answer, seed in answers),
        tuple(
            Untested(left.name, left.reason)
            for left in (*(left for found in chosen for one in found for left in one.left), *table.untested)
        ),
        tuple(control for control in controls if control is not None),
        settings.test,
        {label: runs[0].key(f"clusters:{label}") for label in settings.bases},
        seeds,
        unseen_tokens(runs[0], settings.unseen).sequences,
        settings.unseen > 0,
        time.perf_counter() - started,
        versions(),
        hardware(),
    )


def planned_study(places: Sequence[Path], settings: StudySettings, workers: int = 1) -> str:
    """What :func:`run_study` would measure and what that would take; nothing is written.

    Raises:
        ValueError: where :func:`run_study` refuses.
    """
    runs = [with_groups(load_run(place, say=lambda _: None), settings.groups) for place in places]
    _same_config(runs)
    chosen = [_chosen(run, settings) for run in runs]
    return f"{_counted(runs, chosen)}: {stated_cost(runs, chosen, settings, workers)}"


def _counted(runs: Sequence[Run], chosen: Sequence[Sequence[Chosen]]) -> str:
    bases, pairs = sum(map(len, chosen)), sum(len(one.pairs) for found in chosen for one in found)
    return f"{bases} bases of {len(runs)} runs, {pairs} pairs"


def stated_cost(
    runs: Sequence[Run], chosen: Sequence[Sequence[Chosen]], settings: StudySettings, workers: int
) -> str:
    """Forward passes and minutes of what is not measured yet, from one timed pass of the first run."""
    total, first = 0, runs[0]
    tokens = unseen_tokens(first, settings.unseen)
    kept = tokens.of_first_documents(settings.test.null_documents)
    null_rows = torch.unique(tokens.sequence_of[kept])
    passes = 0
    for run, bases in zip(runs, chosen, strict=True):
        for one in bases:
            if run.directory.finished(*_place(run, one.label, settings)):
                continue
            cost = causal_cost(one.pairs, settings.test)
            passes += cost.directions + cost.random + cost.observed + cost.effects
            total += cost.sequences(len(null_rows), tokens.sequences)
    if not passes:
        return "all measured already"
    part = tokens.select(null_rows)
    theta = first.checkpoints()[-1]
    first.objective.losses(theta, part)
    started = time.perf_counter()
    first.objective.losses(theta, part)
    seconds = (time.perf_counter() - started) * total / len(null_rows) / max(1, min(workers, len(runs) * 2))
    return f"{passes:,} forward passes to do, about {max(1, round(seconds / 60))} min beside controls"


def _place(run: Run, label: str, settings: StudySettings) -> tuple[str, str]:
    """Name and key under which the evidence of a basis is kept."""
    found = [run.key(f"signatures:{n}") for n in signature_names(run.config, settings.window)]
    clusters = run.key(f"clusters:{label}")
    depends = [settings.unseen, settings.window, settings.test, clusters, found, SCHEMA]
    # Only where something is missing that a whole run has: keys of whole runs stay as they are.
    if not has_projections(run, label):
        depends.append("no projections")
    stage = clusters_stage(run, label, settings.window)
    if stage is not None and stage.partition(":")[2] != signature_names(run.config, settings.window)[-1]:
        depends.append(stage)
    name = f"verdicts/{label}"
    return name, run.key_for(name, *depends)


def _same_config(runs: Sequence[Run]) -> None:
    first = runs[0].config.model_copy(update={"seed": 0})
    for run in runs[1:]:
        if run.config.model_copy(update={"seed": 0}) != first:
            raise ValueError(
                f"a study is several seeds of one config, '{run.directory.path}' has another; test it alone"
            )


def _chosen(run: Run, settings: StudySettings) -> list[Chosen]:
    run.require_bases(settings.bases)
    return [choose(run, label, least=settings.test.least, window=settings.window) for label in settings.bases]


def _plan(run: Run, chosen: Sequence[Chosen], settings: StudySettings) -> TestPlan:
    pairs = [
        PlannedPair(p.name, p.family, p.basis, p.vectors, p.cluster, p.group.name, p.why)
        for one in chosen
        for p in one.pairs
    ]
    tokens = unseen_tokens(run, settings.unseen).fingerprint()
    return TestPlan(settings.bases, tuple(pairs), settings.unseen, settings.window, settings.test, tokens)


def measure_basis(place: Path, label: str, settings: StudySettings) -> KeptEvidence:
    """One basis of one run, read back where it was measured before with the same key."""
    run = with_groups(load_run(place, say=lambda _: None), settings.groups)
    name, key = _place(run, label, settings)

    def compute() -> KeptEvidence:
        chosen = choose(run, label, least=settings.test.least, window=settings.window)
        tokens = unseen_tokens(run, settings.unseen)
        with (
            open_matrix(run) as matrix,
            progress_of(None, f"{run.directory.path.name} {label}", total=0) as bar,
        ):

            def told(name: str, done: int, total: int) -> None:
                bar.total = total
                bar.set_postfix_str(name, refresh=False)
                # Draws only when it is due; setting n and refreshing writes a line for every step into a log.
                bar.update(done - bar.n)

            found = measure_run(
                replace(split_of(run, tokens, settings.window), matrix=matrix),
                chosen.pairs,
                settings.test,
                parents=parents_of(run, tokens) or None,
                observations={} if chosen.observation is None else {label: chosen.observation},
                progress=told,
                seed=run.config.seed,
            )
        left = tuple((u.name, u.reason) for u in found.untested)
        return KeptEvidence(found.evidence, found.bases, left)

    return run.directory.kept(name, key, KeptEvidence, compute, run.objective.passes)


def open_matrix(run: Run) -> DamageMatrix:
    """The run's damage matrix: every basis and every test of the run reads and adds rows."""
    context = key_of(keys.SCHEMA, "damage", keys.data_key(run.config, run.contents))
    return DamageMatrix(run.directory.damage_matrix, context)


def _measure(
    jobs: Sequence[tuple[Path, str, StudySettings]],
    controls: Sequence[tuple[Path, StudySettings]],
    workers: int,
) -> tuple[list[KeptEvidence], list[ControlRow | None]]:
    """Every basis and every control, in this process or in several."""
    if workers <= 1 or len(jobs) + len(controls) == 1:
        return [measure_basis(*job) for job in jobs], [measure_control(*job) for job in controls]
    count, spawn = min(workers, len(jobs) + len(controls)), get_context("spawn")
    # One thread a process: together they fill the cores, and sums come out in the same order.
    with ProcessPoolExecutor(count, spawn, torch.set_num_threads, (1,)) as pool:
        bases = [pool.submit(measure_basis, *job) for job in jobs]
        planted = [pool.submit(measure_control, *job) for job in controls]
        return [future.result() for future in bases], [future.result() for future in planted]


def measure_control(place: Path, settings: StudySettings) -> ControlRow | None:
    """A planted rule and its twin in a run's final model; None where the task cannot plant one."""
    run = with_groups(load_run(place, say=lambda _: None), settings.groups)
    if run.task.plant is None or settings.unseen == 0 or not settings.control:
        return None
    key = run.key_for(
        "verdicts/control", settings.unseen, settings.test, run.key(f"basis:{settings.bases[0]}")
    )

    def compute() -> ControlRow:
        tokens = unseen_tokens(run, settings.unseen)
        # The control is judged on the first unseen sequences; a copy of the model is trained on the others.
        cut = min(CONTROL_SEQUENCES, tokens.sequences // 2)
        part, rest = (tokens.select(rows) for rows in torch.arange(tokens.sequences).tensor_split([cut]))
        basis = load_record(Basis, run.directory.basis(settings.bases[0]))
        assert run.task.plant is not None
        light = replace(
            settings.test, rotations=min(settings.test.rotations, 20), null_documents=40, transplants=0
        )
        given = (rest, run.task.splits.select, part)
        try:
            found = positive_control(run.objective, run.checkpoints(), basis, given, run.task.plant, light)
        except ValueError as error:
            # The model could not learn the rule, or its movement was not found: no reason to lose the table.
            return ControlRow(run.config.seed, MISSED, MISSED, str(error), False)
        return ControlRow(
            run.config.seed, found.planted.word, found.twin.word, found.planted.sentence, found.passed
        )

    return run.directory.kept("verdicts/control.json", key, ControlRow, compute, run.objective.passes)


def _measured(
    runs: Sequence[Run],
    chosen: Sequence[Sequence[Chosen]],
    kept: Sequence[KeptEvidence],
    settings: StudySettings,
) -> list[Measured]:
    """Kept evidence under the names that pairs have over runs."""
    count = len(settings.bases)
    flat = [(run, one) for run, found in zip(runs, chosen, strict=True) for one in found]
    by_basis: dict[tuple[int, str], str] = {}
    for offset in range(count):
        part = flat[offset::count]
        for (number, name), over in same_pairs(part).items():
            by_basis[number * count + offset, name] = over if len(runs) > 1 else name
    result = []
    for index, ((run, one), found) in enumerate(zip(flat, kept, strict=True)):
        tested = [pair for pair in one.pairs if pair.name in found.evidence]
        names = {pair.name: by_basis[index, pair.name] for pair in tested}
        result.append(
            Measured(
                tuple(replace(pair, name=names[pair.name]) for pair in tested),
                {names[pair.name]: found.evidence[pair.name] for pair in tested},
                found.bases,
                tuple(Unchosen(name, reason) for name, reason in found.untested),
                run.config.seed,
            )
        )
    return result


def write_result(result: CausalResult, place: Path) -> None:
    """``verdicts.json`` of a run or of a study's folder."""
    save_record(place / "verdicts.json", result)
