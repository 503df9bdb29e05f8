"""What a causal test of runs leaves behind: its plan, one row per pair, one answer per basis and run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from interventions.causal.bases import BasisAnswer
from interventions.causal.evidence import Evidence
from interventions.causal.questions import Verdict
from interventions.causal.settings import TestSettings
from interventions.causal.statistics import Interval

SCHEMA = 4
#: From here on a leakage stands for a target that lost nothing.
NO_LEAK = 1e5


def known(value: float | None) -> float | None:
    """The number, None where it is not one."""
    return None if value is None or not math.isfinite(value) else float(value)


def leak(value: float) -> float | None:
    """A leakage; None where the target lost nothing, so that there is nothing to compare with."""
    return known(value) if value < NO_LEAK else None


def bounds(interval: Interval | None) -> tuple[float | None, float | None] | None:
    """Lower and upper bound."""
    return None if interval is None else (known(interval.low), known(interval.high))


@dataclass(frozen=True)
class PlannedPair:
    """A pair as it was fixed before the unseen tokens were opened."""

    name: str
    family: str
    basis: str
    vectors: tuple[int, ...]
    cluster: int | None
    group: str
    why: str


@dataclass(frozen=True)
class TestPlan:
    """Everything that is decided on select.

    Attributes:
        bases: that are tested.
        pairs: of every family.
        unseen: sequences drawn anew; zero takes the evaluate split.
        window: (first, last) step of the movement that is undone, None for the whole run.
        settings: draws and thresholds.
        tokens: fingerprint of the unseen tokens.
    """

    __test__ = False

    bases: tuple[str, ...]
    pairs: tuple[PlannedPair, ...]
    unseen: int
    window: tuple[int, int] | None
    settings: TestSettings
    tokens: str


@dataclass(frozen=True)
class KeptEvidence:
    """One basis of one run, measured; judging takes no model."""

    evidence: Mapping[str, Evidence]
    bases: tuple[BasisAnswer, ...]
    untested: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class OtherRow:
    """What one other group loses."""

    share: float | None
    damage: float | None


@dataclass(frozen=True)
class VerdictRow:
    """``rows[]``: one pair. Losses in nats per token, shares of headroom.

    Attributes:
        name: of the pair.
        basis: name of its basis.
        vector: index of its vector, None where the edit is no single vector.
        cluster: as in ``clusters[]`` of the summary, None for a skill or a group of the user's.
        group: name of the tokens.
        family: polca, interventional, skill or own.
        word: inert, shared, selective, carrier or unclear.
        size: full, strong or weak.
        answers: N, S, W, L.
        grades: clean, strict.
        flags: redundant, synergy, undone_later, judged_in_nats, 1 run.
        tokens: of the group, mean over runs.
        damage: D_C.
        damage_interval: its bounds.
        delta: damage from which on it counts as needed.
        share: n_C.
        leakage: lambda.
        leakage_interval: its bounds.
        worst: group that loses most besides.
        others: other group -> what it loses.
        rest_of_parent: n_C - n_rest.
        rest_interval: its bounds.
        gain: Q, share of headroom brought when inserted alone.
        gain_interval: its bounds.
        p_values: S before and after correction over the table.
        smallest_effect: damage that would have been seen.
        displacement: length of the movement, weight units.
        sentence: in plain words.
        seeds: of the runs.
        why: the pair was chosen.
    """

    name: str
    basis: str
    vector: int | None
    cluster: int | None
    group: str
    family: str
    word: str
    size: str
    answers: Mapping[str, str]
    grades: tuple[str, ...]
    flags: tuple[str, ...]
    tokens: int
    damage: float | None
    damage_interval: tuple[float | None, float | None] | None
    delta: float
    share: float | None
    leakage: float | None
    leakage_interval: tuple[float | None, float | None] | None
    worst: str
    others: Mapping[str, OtherRow]
    rest_of_parent: float | None
    rest_interval: tuple[float | None, float | None] | None
    gain: float | None
    gain_interval: tuple[float | None, float | None] | None
    p_values: Mapping[str, float | None]
    smallest_effect: float | None
    displacement: float
    sentence: str
    seeds: tuple[int, ...]
    why: str = ""


@dataclass(frozen=True)
class BasisRow:
    """``bases[]``: the answers about one basis in one run."""

    basis: str
    seed: int
    A: str
    A_statistic: float | None
    A_p: float | None
    A_rotated_median: float | None
    A_rotated_p: float | None
    auc: Mapping[str, float | None]
    P: str
    P_statistic: float | None
    P_p: float | None
    P_null_median: float | None


@dataclass(frozen=True)
class Untested:
    """A pair that was not tested, and why."""

    name: str
    reason: str


#: Word of a positive control that could not be planted or was not found; the sentence says why.
MISSED = "missed"


@dataclass(frozen=True)
class ControlRow:
    """The planted rule and its twin with shuffled labels, put through the same test (one run)."""

    seed: int
    planted: str
    twin: str
    sentence: str
    passed: bool


@dataclass(frozen=True)
class CausalResult:
    """``verdicts.json`` and what ``--json`` writes.

    Attributes:
        schema: rises when a key changes.
        plan: hash of the plan, written before the unseen tokens were opened.
        exploratory: another plan came first in some run.
        rows: one per pair.
        bases: answers A and P, per basis and run.
        untested: pairs left out.
        controls: planted rules and their twins.
        settings: of the test.
        clusters: basis -> key of the clusters that were tested (first run).
        seeds: of the runs.
        sequences: unseen sequences.
        fresh: whether they were drawn anew, so that nothing had used them; else they are the evaluate split.
        seconds: wall-clock time.
        versions: of packages.
        hardware: it ran on.
    """

    schema: int
    plan: str
    exploratory: bool
    rows: tuple[VerdictRow, ...]
    bases: tuple[BasisRow, ...]
    untested: tuple[Untested, ...]
    controls: tuple[ControlRow, ...]
    settings: TestSettings
    clusters: Mapping[str, str]
    seeds: tuple[int, ...]
    sequences: int
    fresh: bool
    seconds: float
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, object] = field(default_factory=dict)


def verdict_row(verdict: Verdict, why: str) -> VerdictRow:
    """One row of a verdict."""
    pooled, runs = verdict.pooled, verdict.pooled.runs
    first = runs[0]

    def mean(values: list[float]) -> float | None:
        return known(sum(values) / len(values)) if values else None

    names = [name for name in first.others if all(name in run.others for run in runs)]
    return VerdictRow(
        verdict.name,
        verdict.basis,
        verdict.vectors[0] if len(verdict.vectors) == 1 else None,
        verdict.cluster,
        verdict.group,
        verdict.family,
        verdict.word,
        verdict.size,
        dict(verdict.answers),
        verdict.grades,
        verdict.flags,
        round(sum(run.tokens for run in runs) / len(runs)),
        known(pooled.damage.estimate),
        bounds(pooled.damage),
        pooled.delta,
        known(pooled.share.estimate),
        leak(pooled.leakage.estimate),
        (leak(pooled.leakage.low), leak(pooled.leakage.high)),
        first.worst,
        {
            name: OtherRow(
                mean([run.others[name].share for run in runs]),
                mean([run.others[name].damage.estimate for run in runs]),
            )
            for name in names
        },
        None if pooled.rest is None else known(pooled.rest.estimate),
        bounds(pooled.rest),
        None if pooled.gain is None else known(pooled.gain.estimate),
        bounds(pooled.gain),
        {"S": known(pooled.p), "S_adjusted": known(verdict.adjusted_p)},
        known(verdict.smallest_effect),
        sum(run.displacement for run in runs) / len(runs),
        verdict.sentence,
        verdict.seeds,
        why,
    )


def basis_row(answer: BasisAnswer, seed: int) -> BasisRow:
    """One row of a basis's answers."""
    aligned, special = answer.aligned, answer.special

    def median(values: tuple[float, ...]) -> float | None:
        return sorted(values)[len(values) // 2] if values else None

    return BasisRow(
        answer.basis,
        seed,
        aligned.answer,
        known(aligned.statistic),
        aligned.p,
        median(aligned.rotated),
        aligned.rotated_p,
        {str(vector): known(value) for vector, value in aligned.auc.items()},
        special.answer,
        known(special.statistic),
        special.p,
        median(special.null),
    )
