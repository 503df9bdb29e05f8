"""The shipped chooser and test on one run of a case: pairs from select, evidence from unseen tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from experiments.natural.case import Case, Natural, Recording, agrees
from experiments.natural.ladder import crossover, ladder_rungs
from experiments.natural.records import CaseRow, Rung, RunRows
from interventions.causal.hypotheses import hardest_hit
from interventions.causal.questions import Verdict
from interventions.causal.settings import TestSettings
from interventions.causal.test import Measured, judge_runs, measure_run
from interventions.damage import EvaluatedSplit
from interventions.discovery.axes import AxisSettings, skill_axis
from interventions.discovery.search import SearchSettings
from interventions.discovery.signatures import interventional_clusters, vector_shares
from interventions.edits import project_out
from polca_edit.basis.build import BasisInputs, build_basis
from polca_edit.basis.record import Basis
from polca_edit.clusters.hypotheses import Hypothesis, TokenGroup
from polca_edit.derivatives.objective import Objective
from polca_edit.observation import observe


@dataclass(frozen=True)
class MeasureSettings:
    """How much of a run is measured.

    Attributes:
        test: draws and thresholds of the causal test.
        bases: kinds beside the declared one.
        vectors: of each of them.
        discovery: also POLCA's clusters, interventional clusters and the target's skill axis.
    """

    test: TestSettings = TestSettings()
    bases: tuple[str, ...] = ("hessian", "trajectory")
    vectors: int = 8
    discovery: bool = True


@dataclass(frozen=True)
class Opened:
    """A trained run with its splits and bases."""

    case: Case
    natural: Natural
    select: EvaluatedSplit
    unseen: EvaluatedSplit
    bases: Mapping[str, Basis]

    @property
    def parents(self) -> dict[str, torch.Tensor]:
        """The partition of the unseen tokens, without groups that build on the target."""
        names = [name for name in self.natural.task.parents if name not in self.case.exempt]
        return {name: self.unseen.tokens.skills[name] for name in names}


def open_case(case: Case, natural: Natural, recording: Recording, settings: MeasureSettings) -> Opened:
    """Bases from the series and the curvature split; nothing of the unseen tokens is looked at."""
    task = natural.task
    loss = Objective(task.module, task.token_loss, task.space)
    series = recording.series(task.space)
    inputs = BasisInputs(loss, series, task.splits.curvature)
    bases = {"declared": natural.declared(series)}
    bases.update({kind: build_basis(kind, inputs, settings.vectors) for kind in settings.bases})
    select, unseen = (
        EvaluatedSplit(loss, series, tokens, natural.window)
        for tokens in (task.splits.select, task.splits.evaluate)
    )
    return Opened(case, natural, select, unseen, bases)


def chosen_pairs(opened: Opened, name: str, settings: MeasureSettings, seed: int) -> list[Hypothesis]:
    """Known skills with the vector that costs them most on select; elsewhere POLCA's own clusters too."""
    basis, tokens = opened.bases[name], opened.select.tokens
    least = settings.test.least
    skills = {
        skill: mask
        for skill, mask in tokens.skills.items()
        if skill not in opened.case.exempt and least <= int(mask.sum()) < tokens.count
    }
    lost = vector_shares(opened.select, {name: basis}, skills)
    shares = {skill: [lost[name, vector][skill] for vector in range(len(basis))] for skill in skills}
    groups = {skill: TokenGroup(skill, skill=skill) for skill in skills}
    pairs = hardest_hit(shares, groups, basis, basis_name=name, family="skill")
    if name == "declared" or not settings.discovery:
        return pairs
    seen = observe(opened.select.loss, opened.select.series, basis, tokens)
    return [*seen.hypotheses(name, least=least, seed=seed), *pairs]


def found_pairs(opened: Opened, settings: MeasureSettings, seed: int) -> list[Hypothesis]:
    """Interventional clusters of all bases, and the target's own axis in the trajectory's span."""
    bases = {name: basis for name, basis in opened.bases.items() if name != "declared"}
    found = interventional_clusters(opened.select, bases)
    pairs = found.hypotheses(seed=seed)
    target = opened.case.target
    room = opened.select.headroom[opened.select.tokens.skills[target]].double()
    if "trajectory" not in bases or not float(room.clamp_min(0).mean()) > settings.test.headroom_floor:
        return pairs
    names = [name for name in opened.natural.task.parents if name not in (target, *opened.case.exempt)]
    groups = {name: opened.select.tokens.skills[name] for name in names}
    axis = skill_axis(
        opened.select,
        bases["trajectory"],
        target,
        groups or None,
        AxisSettings(search=SearchSettings(directions=96, rounds=2, seed=seed), further=2),
    )
    own = Hypothesis(
        f"trajectory axis | {target}",
        axis.basis.rows[:1],
        TokenGroup(target, skill=target),
        "axis",
        "trajectory",
        span=bases["trajectory"].rows,
        supervised=True,
        why="the span's own axis of the group, searched on select",
    )
    return [*pairs, own]


def measure_case(
    opened: Opened, settings: MeasureSettings, seed: int, twin: bool, train_seconds: float
) -> RunRows:
    """One run through chooser and test.

    Args:
        opened: bases and splits.
        settings: how much.
        seed: of the run.
        twin: whether it is the twin.
        train_seconds: for the record.
    """
    started = time.perf_counter()
    pairs = {name: chosen_pairs(opened, name, settings, seed) for name in opened.bases}
    pairs["declared"] += declared_pair(opened, pairs["declared"])
    if settings.discovery:
        for pair in found_pairs(opened, settings, seed):
            pairs[pair.basis].append(pair)
    measured: list[Measured] = [
        measure_run(opened.unseen, own, settings.test, parents=opened.parents or None, seed=seed)
        for own in pairs.values()
    ]
    # Each basis is a table of its own, so that the declared row does not depend on how many others are made.
    rows = [row for one in measured for row in judge_runs([one], settings.test).rows]
    made = [case_row(opened.case, row, seed, twin) for row in rows]
    declared = judged([row for row in made if row.truth != "unknown"], twin)
    others = tuple(row for row in made if row is not declared)
    natural = opened.natural
    rungs: tuple[Rung, ...] = ()
    if natural.mixed:
        rows_of = opened.bases["declared"].rows
        rungs = ladder_rungs(opened.unseen, rows_of, natural.mixed, opened.parents, settings.test)
    spent = time.perf_counter() - started
    return RunRows(declared, others, rungs, further(opened, settings, twin), train_seconds, spent)


def further(opened: Opened, settings: MeasureSettings, twin: bool) -> dict[str, float]:
    """Numbers of single cases: a crossover of two stretches, and what exempt groups lose."""
    found: dict[str, float] = {}
    if opened.natural.earlier is not None and not twin:
        window, group = opened.natural.earlier
        both = crossover(opened.unseen, window, (group, opened.case.target), settings.test)
        found.update(crossover=both.estimate, crossover_low=both.low, crossover_high=both.high)
    if opened.case.exempt:
        skills = opened.unseen.tokens.skills
        edit = project_out(opened.unseen, opened.bases["declared"].rows[:1])
        lost = opened.unseen.damage(edit).share_by({name: skills[name] for name in opened.case.exempt})
        found.update({f"share lost by exempt '{name}'": value for name, value in lost.items()})
    return found


def declared_pair(opened: Opened, chosen: Sequence[Hypothesis]) -> list[Hypothesis]:
    """The declared movement with the case's group, where the chooser took another vector for it."""
    basis, target = opened.bases["declared"], opened.case.target
    if any(pair.group.name == target and pair.vectors == (0,) for pair in chosen):
        return []
    group = TokenGroup(target, skill=target)
    name = f"declared 0 | {target}"
    return [Hypothesis(name, basis.rows[:1], group, "own", "declared", (0,), span=basis.rows)]


def judged(rows: Sequence[CaseRow], twin: bool) -> CaseRow:
    """The row that is compared with the truth: the chooser's own.

    In a twin the declared movement must not be selective either, whatever the chooser took: the row that
    says yes where there is one.
    """
    chosen = next(row for row in rows if row.family == "skill")
    return next((row for row in rows if twin and not row.passed), chosen)


def case_row(case: Case, row: Verdict, seed: int, twin: bool) -> CaseRow:
    """A verdict beside the truth; only rows of the declared movement and target have one."""
    evidence = row.pooled.runs[0]
    known = row.basis == "declared" and row.group == case.target
    truth = case.truth_of(twin)
    return CaseRow(
        case.name,
        twin,
        seed,
        row.basis,
        row.family,
        row.name,
        truth if known else "unknown",
        row.word,
        {**row.answers, "D": row.answers.get("D", "not asked")},
        row.pooled.share.estimate,
        row.pooled.leakage.estimate,
        row.pooled.damage.estimate,
        row.adjusted_p,
        evidence.selectivity,
        row.sentence,
        agrees(truth, row.word) if known else True,
    )
