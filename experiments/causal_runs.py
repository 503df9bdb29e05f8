"""A recorded run under the causal test: choose on select, plan, measure on evaluate, block, localise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from experiments.causal_pairs import ChoiceSettings, as_pairs, cluster_chooser, declared_nulls
from experiments.pipeline import Run
from experiments.reference_bases import family_gates, reference_maxima
from interventions import edits, localise
from interventions.controls import other_seed_move
from interventions.evidence import PairEvidence, effect_draws
from interventions.label_tests import LabelTest, label_test
from interventions.nulls import Chooser
from interventions.optimised import optimised_effect
from interventions.planted_skill import PlantedPower, planted_draws, planted_power
from interventions.protocol import (
    ControlBank,
    Pair,
    PlanSettings,
    Session,
    Subject,
    attributed_losses,
    fill_bank,
    mark_crossovers,
    measure_pair,
    open_session,
    open_span_draws,
)
from interventions.statistics import Array, Bits
from interventions.verdict import Outcome
from polca_edit.allocation import Projections, allocate
from polca_edit.artifacts import load_record
from polca_edit.basis import Basis, capture

#: Up to this many select tokens, the run's basis and all reference bases are clustered from all
#: pairwise distances, the fastest way there.
DENSE_TOKENS = 4000

#: Unseen sequences must not follow the seed that drew the splits.
UNSEEN_SEED = 86_028_121


@dataclass(frozen=True)
class RunTest:
    """One run with its basis and the pairs chosen on its select split.

    Attributes:
        run: the open run.
        basis: what is tested.
        projections: its stored derivatives on the select split.
        pairs: chosen pairs.
        nulls: declared null pairs.
        choose: the pipeline that chose them.
        settings: the plan with this run's seed.
    """

    run: Run
    basis: Basis
    projections: Projections
    pairs: tuple[Pair, ...]
    nulls: tuple[Pair, ...]
    choose: Chooser
    settings: PlanSettings


def with_unseen(run: Run, sequences: int) -> Run:
    """The run with a new evaluate split of that many sequences; none asked for, the run as it is.

    Raises:
        ValueError: if its task cannot draw any.
    """
    if not sequences:
        return run
    if run.task.unseen is None:
        raise ValueError(
            f"'unseen' must be 0 for opened checkpoints and texts, got {sequences} "
            f"for '{run.directory.path}'; run with a larger evaluate split"
        )
    evaluate = run.task.unseen(sequences, UNSEEN_SEED + run.config.seed)
    splits = replace(run.task.splits, evaluate=evaluate)
    return replace(run, task=replace(run.task, splits=splits))


def choose_pairs(run: Run, label: str, settings: PlanSettings) -> RunTest:
    """Everything that may be decided before the evaluate split is opened.

    Raises:
        ValueError: if the run has no such basis, or cannot draw the unseen sequences asked for.
    """
    run = with_unseen(run, settings.unseen)
    labels = [b.label for b in run.config.bases]
    if label not in labels or not run.directory.basis(label).exists():
        raise ValueError(
            f"'{run.directory.path}' has no finished basis '{label}', it has {labels}; run it first"
        )
    basis = load_record(Basis, run.directory.basis(label))
    projections = load_record(Projections, run.directory.projections(label))
    select, evaluate = run.task.splits.select, run.task.splits.evaluate
    documents = len(evaluate.documents.unique())
    if settings.ranked > documents:
        raise ValueError(
            f"plan setting 'ranked' must be at most the {documents} documents of the evaluate split of "
            f"'{run.directory.path}', got {settings.ranked}; lower it or raise 'unseen'"
        )
    own = replace(
        settings, seed=settings.seed + 1000 * run.config.seed, reference=run.config.damage.reference
    )
    observe = run.settings()
    if select.count <= DENSE_TOKENS:
        observe = replace(observe, clusters=replace(observe.clusters, algorithm="generic"))
    chosen = ChoiceSettings(
        observe, settings.pairs, settings.thresholds.rule_auc, run.config.seed, ranked=settings.ranked
    )
    choose = cluster_chooser(select, evaluate, chosen)
    pairs = as_pairs(
        choose(projections),
        projections,
        select,
        evaluate,
        run.task.partition,
        supervised=basis.supervised,
        delta=run.config.breakthrough_delta,
    )
    null_pairs = declared_nulls(pairs, settings.nulls, len(basis), own.seed)
    return RunTest(run, basis, projections, tuple(pairs), tuple(null_pairs), choose, own)


def pair_plan(test: RunTest) -> dict[str, Any]:
    """The run's part of plan.json."""

    def row(pair: Pair) -> dict[str, Any]:
        return {
            "name": pair.name,
            "vectors": list(pair.vectors),
            "rule_auc": pair.rule_auc,
            "rule": None if pair.rule is None else pair.rule.description,
            "tokens": int(pair.evaluate.members.sum()),
            "partners": list(pair.partners),
            "window": None if pair.window is None else list(pair.window),
            "others": sorted(pair.evaluate.others),
        }

    return {
        "seed": test.run.config.seed,
        "reference": test.settings.reference,
        "evaluate_tokens": test.run.task.splits.evaluate.fingerprint(),
        "pairs": [row(pair) for pair in test.pairs],
        "nulls": [row(pair) for pair in test.nulls],
    }


@dataclass(frozen=True)
class RunMeasurement:
    """Evidence of one run.

    Attributes:
        session: open benches, for later edits.
        pairs: evidence per chosen pair.
        nulls: evidence per declared null pair.
        planted: positive control.
        maxima: family -> largest T per reference basis.
        span: gate G0b: damage of undoing all movement in the span and all outside it, nats.
    """

    session: Session
    pairs: tuple[PairEvidence, ...]
    nulls: tuple[PairEvidence, ...]
    planted: PlantedPower
    maxima: Mapping[str, Array]
    span: dict[str, float]


def session_of(test: RunTest) -> Session:
    """Open both splits of a run."""
    run = test.run
    subject = Subject(
        run.objective, run.checkpoints(), test.basis.rows, run.task.splits.select, run.task.splits.evaluate
    )
    return open_session(subject, test.settings)


def measure_run(test: RunTest) -> RunMeasurement:
    """Open the evaluate split and measure every pair, control and reference basis of one run."""
    session, settings = session_of(test), test.settings
    maxima = reference_maxima(test, session)
    draws = planted_draws(session)
    planted = planted_power(draws, maxima, settings.thresholds.level)
    span, gate = span_gate(session)
    gap, complete = completeness_gate(test)
    everything = (*test.pairs, *test.nulls)
    vectors = sorted({v for pair in everything for v in pair.vectors})
    allocated = attributed_losses(session, vectors, session.ranked.tokens) if vectors else np.zeros((0, 0))
    banks: dict[tuple[int, ...], ControlBank] = {}
    shared = open_span_draws(session, [pair.vectors for pair in everything])
    found: list[PairEvidence] = []
    for number, pair in enumerate(everything):
        tested = number < len(test.pairs)
        if pair.vectors not in banks:
            same = [p.evaluate for p in everything if p.vectors == pair.vectors]
            banks[pair.vectors] = fill_bank(session, pair.vectors, same, shared, reported=tested)
        own = allocated[[vectors.index(v) for v in pair.vectors]]
        evidence = measure_pair(session, pair, banks[pair.vectors], own, maxima, reported=tested)
        extras = dict(evidence.extras)
        if tested and settings.optimised_draws:
            best = optimised_effect(session, pair, draws=settings.optimised_draws, seed=settings.seed)
            extras["optimised"] = None if best is None else asdict(best)
        gates: dict[str, Outcome] = {
            **evidence.gates,
            "the span carries movement": gate,
            f"the allocation adds up within {settings.thresholds.completeness:.0%}": complete,
            **family_gates(list(maxima)),
        }
        found.append(
            replace(evidence, gates=gates, positive_control=planted.outcome, planted=draws, extras=extras)
        )
    crossed = mark_crossovers(session, test.pairs, found[: len(test.pairs)])
    return RunMeasurement(
        session,
        tuple(crossed),
        tuple(found[len(test.pairs) :]),
        planted,
        maxima,
        {**span, "allocation gap": gap},
    )


def with_other_seeds(tests: Sequence[RunTest], measured: Sequence[RunMeasurement]) -> list[RunMeasurement]:
    """c9 across seeds: T of every pair's edit made along the vectors of the other runs of the study.

    From a run that has the same pair its vectors are taken, from another those of the same number.
    Effects go to ``extras['other_seed_effects']``; aligned vectors are left out and counted.
    """
    result = []
    for number, (test, one) in enumerate(zip(tests, measured, strict=True)):
        pairs = []
        for pair, evidence in zip(test.pairs, one.pairs, strict=True):
            effects, aligned = [], 0
            edit, bench = one.session.undo(pair.vectors), one.session.ranked
            target = one.session.on_ranked(pair.evaluate)
            for other, foreign in enumerate(tests):
                if other == number:
                    continue
                own = next((p.vectors for p in foreign.pairs if p.name == pair.name), pair.vectors)
                if len(own) != len(pair.vectors) or max(own) >= len(foreign.basis):
                    continue
                move = other_seed_move(one.session.theta, edit, foreign.basis.rows[list(own)])
                if move is None:
                    aligned += 1
                    continue
                effects.append(float(effect_draws(bench, bench.change(move), target).estimate))
            extras = {**evidence.extras, "other_seed_effects": effects, "other_seeds_aligned": aligned}
            pairs.append(replace(evidence, extras=extras))
        result.append(replace(one, pairs=tuple(pairs)))
    return result


def span_gate(session: Session) -> tuple[dict[str, float], Outcome]:
    """G0b: does the span of the basis matter at all?"""
    bench, rows = session.evaluate, session.subject.rows
    inside = session.undo(range(len(rows)))
    damage = bench.mean(bench.change(inside), np.ones(len(bench.before), dtype=bool)).interval()
    net, path = capture(rows, session.subject.checkpoints)
    inserted = edits.transplant(session.reference, session.theta, rows)
    numbers = {
        "damage of undoing the span": damage.estimate,
        "gain of the span alone": float(bench.gain(inserted).mean()),
        "headroom": float(bench.headroom.mean()),
        "captured net": net,
        "captured path": path,
    }
    return numbers, "passed" if damage.high > session.settings.thresholds.effect_floor else "failed"


def completeness_gate(test: RunTest) -> tuple[float, Outcome]:
    """G0d: share of the mean loss change on select that span and residual miss (quadrature error)."""
    totals = allocate(test.projections, test.run.settings().rule).totals()
    gap = abs(totals["quadrature_error"] / totals["exact"]) if totals["exact"] else float("inf")
    return gap, "passed" if gap <= test.settings.thresholds.completeness else "failed"


# -- where the effect sits, and what a label says ---------------------------------------------------------


def localise_pair(test: RunTest, session: Session, pair: Pair) -> dict[str, Any]:
    """Maps by layer and kind and by head, and activation patching where the model has hooks."""
    bench, edit = session.ranked, session.undo(pair.vectors)
    members = session.on_ranked(pair.evaluate).members
    space = test.run.task.space
    found = localise.localise(bench, edit, members, localise.components(space))
    result: dict[str, Any] = {
        "whole": found.whole,
        "additive_gap": found.additive_gap,
        "covered": found.covered,
        "parts": [p.__dict__ for p in found.parts],
    }
    try:
        by_head = localise.localise(bench, edit, members, localise.heads(space, test.run.config.model.heads))
        result["heads"] = [p.__dict__ for p in by_head.parts]
        result["patching"] = localise.patch_activations(bench, edit, members)
    except ValueError as reason:
        result["not_run"] = str(reason)
    return result


def label_pair(session: Session, pair: Pair, name: str, label: Bits) -> LabelTest:
    """A user's label against one pair on the evaluate split."""
    change = session.evaluate.change(session.undo(pair.vectors))
    return label_test(session.evaluate, change, pair.evaluate.members, label, name=name)
