"""The questions asked of a pair, each with its own answer, and the one word of a row.

N: does the model need the movement for the group? S: and only for it? W: for the group rather than for the
rest of its parent? L: does the movement carry the learning? An answer is yes, no or unclear; a *no* names
the smallest effect it could have seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from interventions.causal.evidence import THERE_AND_BACK, Evidence
from interventions.causal.settings import TestSettings
from interventions.causal.statistics import (
    Interval,
    benjamini_hochberg,
    minimum_detectable,
    rank_p,
    rank_p_over_runs,
    t_interval,
)
from polca_edit.clusters.hypotheses import Hypothesis

Answer = Literal["yes", "no", "unclear", "not asked"]
Word = Literal["inert", "shared", "selective", "carrier", "unclear"]


@dataclass(frozen=True)
class Pooled:
    """One pair over its runs: intervals of one run over documents, of several over runs.

    Attributes:
        runs: evidence of each run.
        damage: D_C, nats per token.
        share: n_C.
        leakage: lambda.
        rest: n_C - n_rest, None where not every run has a rest.
        gain: Q, None where not every run could insert.
        gain_beyond: Q beyond other groups.
        delta: damage from which on the movement counts as needed, nats per token.
        p: of S before correction, None where no direction of the span reaches the same damage.
    """

    runs: tuple[Evidence, ...]
    damage: Interval
    share: Interval
    leakage: Interval
    rest: Interval | None
    gain: Interval | None
    gain_beyond: Interval | None
    delta: float
    p: float | None


def over_runs(intervals: Sequence[Interval]) -> Interval:
    """A run's own interval, or the t interval of several runs' estimates."""
    return intervals[0] if len(intervals) == 1 else t_interval([i.estimate for i in intervals])


def pool(runs: Sequence[Evidence], settings: TestSettings, searched_p: float | None = None) -> Pooled:
    """Evidence of the same pair in one or more runs, put together.

    Args:
        runs: at least one.
        settings: of the test.
        searched_p: p of the search that found the edit; it replaces that of equal-damage directions.
    """

    def every(values: Sequence[Interval | None]) -> Interval | None:
        known = [v for v in values if v is not None]
        return over_runs(known) if len(known) == len(values) else None

    nulls = [run.selectivity_null for run in runs]
    p = searched_p
    if p is None and all(len(null) for null in nulls):
        values = [run.selectivity for run in runs]
        p = rank_p(values[0], nulls[0]) if len(runs) == 1 else rank_p_over_runs(values, nulls)
    return Pooled(
        tuple(runs),
        over_runs([r.damage for r in runs]),
        over_runs([r.share for r in runs]),
        over_runs([r.leakage for r in runs]),
        every([r.rest for r in runs]),
        every([r.insertion.gain if r.insertion else None for r in runs]),
        every([r.insertion.beyond_others if r.insertion else None for r in runs]),
        max(settings.damage_floor, float(np.mean([r.random95 for r in runs]))),
        p,
    )


def _between(interval: Interval, bound: float, *, above: Answer, below: Answer) -> Answer:
    if interval.low > bound:
        return above
    return below if interval.high < bound else "unclear"


def needed(found: Pooled) -> Answer:
    """N: D_C above delta."""
    return _between(found.damage, found.delta, above="yes", below="no")


def only(found: Pooled, settings: TestSettings, adjusted_p: float | None) -> Answer:
    """S: leakage below a third, and no direction of the span is as selective at the same damage."""
    leaks = _between(found.leakage, settings.leakage, above="no", below="yes")
    hurt = []
    for run in found.runs:
        bound = max(found.delta, settings.leakage * run.damage.estimate)
        small = [other for other in run.others.values() if other.in_nats and not run.in_nats]
        hurt += [_between(other.damage, bound, above="no", below="yes") for other in small]
    if leaks == "no" or "no" in hurt:
        return "no"
    if leaks == "yes" and all(h == "yes" for h in hurt) and adjusted_p is not None:
        return "yes" if adjusted_p < settings.level else "unclear"
    return "unclear"


def within(found: Pooled, settings: TestSettings) -> Answer:
    """W: the group rather than the rest of its parent."""
    if found.rest is None:
        return "not asked"
    return _between(found.rest, settings.within, above="yes", below="no")


def carries(found: Pooled, settings: TestSettings) -> Answer:
    """L: inserted alone, the movement brings the group's skill, and no other group's as much."""
    if found.gain is None or found.gain_beyond is None:
        return "not asked"
    if found.gain.high < settings.carries_not:
        return "no"
    null = float(np.mean([r.insertion.null95 for r in found.runs if r.insertion]))
    if found.gain.low >= settings.carries and found.gain_beyond.low > 0 and found.gain.low > null:
        return "yes"
    return "unclear"


def word_of(answers: dict[str, Answer]) -> Word:
    """The word of a row, from N, S and L alone.

    >>> word_of({"N": "yes", "S": "yes", "L": "no"})
    'selective'
    """
    if answers["N"] == "no":
        return "inert"
    if answers["N"] != "yes" or answers["S"] not in ("yes", "no"):
        return "unclear"
    if answers["S"] == "no":
        return "shared"
    return "carrier" if answers["L"] == "yes" else "selective"


def size_of(share: float) -> str:
    """How much of its headroom the group loses: full, strong or weak."""
    if not share >= 0.5:
        return "weak"
    return "full" if share >= 0.9 else "strong"


def flags_of(found: Pooled, answers: dict[str, Answer], settings: TestSettings) -> tuple[str, ...]:
    """Facts a reader needs whatever the word."""
    flags = []
    if any(run.path_ratio > THERE_AND_BACK and run.halfway > found.delta for run in found.runs):
        flags.append("undone_later")
    joint = [run.joint_damage for run in found.runs if run.joint_damage is not None]
    if answers["N"] == "no" and joint and min(joint) > found.delta:
        flags.append("redundant")
    gains = [run.joint_gain for run in found.runs if run.joint_gain is not None]
    if answers["L"] == "no" and gains and min(gains) >= settings.carries:
        flags.append("synergy")
    if found.runs[0].in_nats:
        flags.append("judged_in_nats")
    if len(found.runs) == 1:
        flags.append("1 run")
    return tuple(flags)


@dataclass(frozen=True)
class Verdict:
    """One row of the table: answers, the word, and all that led to them.

    Attributes:
        name: of the pair.
        family: where it comes from.
        basis: name of its basis.
        vectors: indices of its rows there.
        cluster: identifier in ``clusters[]``.
        group: name of the token group.
        word: inert, shared, selective, carrier or unclear.
        size: full, strong or weak.
        answers: N, S, W, L (and D where training was repeated).
        grades: of S: ``clean`` (leakage at most .1), ``strict`` (no other group loses 2 % of its headroom).
        flags: redundant, synergy, undone_later, judged_in_nats, 1 run.
        pooled: intervals and the evidence of every run.
        adjusted_p: of S, over all pairs of the table.
        smallest_effect: damage that would have been seen where N is no, nats per token.
        sentence: in plain words.
        seeds: of the runs.
    """

    name: str
    family: str
    basis: str
    vectors: tuple[int, ...]
    cluster: int | None
    group: str
    word: Word
    size: str
    answers: dict[str, Answer]
    grades: tuple[str, ...]
    flags: tuple[str, ...]
    pooled: Pooled = field(repr=False)
    adjusted_p: float | None
    smallest_effect: float
    sentence: str
    seeds: tuple[int, ...] = (0,)


def grades_of(found: Pooled) -> tuple[str, ...]:
    """How clean a selective edit is."""
    shares = [o.share for run in found.runs for o in run.others.values() if not o.in_nats]
    grades = ["clean"] if found.leakage.high <= 0.1 else []
    return tuple([*grades, "strict"] if all(abs(s) <= 0.02 for s in shares) else grades)


def adjusted(found: Sequence[Pooled]) -> list[float | None]:
    """P of S over the table: false discoveries among the pairs that the model needs."""
    asked = [i for i, f in enumerate(found) if f.p is not None and needed(f) == "yes"]
    result: list[float | None] = [None] * len(found)
    for index, p in zip(asked, benjamini_hochberg([found[i].p or 0.0 for i in asked]), strict=True):
        result[index] = p
    return result


def sentence_of(pair: Hypothesis, found: Pooled, word: Word, smallest: float, floor: float) -> str:
    """One plain sentence a row."""
    name, group = pair.moved, pair.group.name
    damage, share = found.damage, found.share.estimate
    cost = f"Undoing {name} costs '{group}' {damage.estimate:.2g} nats"
    if not math.isnan(share) and not found.runs[0].in_nats:
        cost += " (all it learned)" if share >= 0.9 else f" ({share:.0%} of what it learned)"
    if word == "inert" and damage.estimate > floor:
        return f"{cost}, no more than random edits of its size do ({found.delta:.2g})."
    if word == "inert":
        return f"Undoing {name} costs '{group}' nothing; {smallest:.2g} nats would have been seen."
    if word in ("selective", "carrier"):
        most = max((o.damage.estimate for r in found.runs for o in r.others.values()), default=0.0)
        tail = "; inserted alone it brings the skill" if word == "carrier" else ""
        return f"{cost} and no other group more than {max(most, 0.0):.2g}{tail}."
    if word == "shared":
        worst = max(found.runs, key=lambda r: r.leakage.estimate)
        other = worst.others.get(worst.worst)
        besides = "others as well" if other is None else f"'{worst.worst}' {other.damage.estimate:.2g}"
        return f"{cost}, and {besides}."
    return f"{cost}, interval {damage.low:.2g} to {damage.high:.2g}: unclear."


def judge(
    pairs: Sequence[Hypothesis],
    found: Sequence[Pooled],
    settings: TestSettings,
    seeds: Sequence[tuple[int, ...]],
) -> list[Verdict]:
    """Verdicts of a table.

    Args:
        pairs: one per row (of the first run that has it).
        found: evidence over its runs.
        settings: of the test.
        seeds: of its runs.
    """
    rows = []
    for pair, pooled, p, own in zip(pairs, found, adjusted(found), seeds, strict=True):
        answers: dict[str, Answer] = {
            "N": needed(pooled),
            "S": only(pooled, settings, p),
            "W": within(pooled, settings),
            "L": carries(pooled, settings),
        }
        word = word_of(answers)
        smallest = pooled.delta + minimum_detectable(pooled.damage.error)
        rows.append(
            Verdict(
                pair.name,
                pair.family,
                pair.basis,
                pair.vectors,
                pair.cluster,
                pair.group.name,
                word,
                size_of(pooled.share.estimate),
                answers,
                grades_of(pooled) if answers["S"] == "yes" else (),
                flags_of(pooled, answers, settings),
                pooled,
                p,
                smallest,
                sentence_of(pair, pooled, word, smallest, settings.damage_floor),
                own,
            )
        )
    return rows
