"""Methods beside each other: our best edit against the best rival, and counts over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.removal.rows import Row
from experiments.removal.skills import REQUIRED

#: Rivals that are tuned like our edits and may use all weights or a span of equal rank.
TUNED = ("gradient ascent", "GradDiff", "NPO", "task vector", "random span")


@dataclass(frozen=True)
class Match:
    """Our best edit of a skill beside the best tuned rival at the same target damage.

    Attributes:
        seed: of the model.
        skill: what was removed.
        goal: target share that both had to reach.
        ours: method of our best edit, None if none reached the goal.
        rival: method of the best rival, None if none did.
        rival_removing: the best rival whose damage also lasts: accuracy near chance, and 90 % of what
            relabelling leaves of an untrained model's damage. Confidently wrong answers reach any
            target share at little cost to others.
        ratio: our worst positive part over the rival's.
        ratio_signed: the same of the signed shares.
        one_fifth: whether ours costs at most a fifth.
    """

    seed: int
    skill: str
    goal: float
    ours: str | None
    rival: str | None
    rival_removing: str | None
    ratio: float | None = None
    ratio_signed: float | None = None
    one_fifth: bool | None = None


def matched_damage(rows: Sequence[Row]) -> list[Match]:
    """Per skill and seed: our best edit beside the best tuned rival at the same target damage.

    Only edits that reach the required target share are compared; the positive part decides, as a
    signed mean can be bought with gains elsewhere.
    """
    table = []
    for seed, skill in sorted({(row.seed, row.skill) for row in rows}):
        here = [row for row in rows if (row.seed, row.skill) == (seed, skill)]
        goal = REQUIRED[skill].target
        theirs = [row for row in here if row.method in TUNED and row.target_share >= goal]
        ours = _least([row for row in here if row.ours and row.target_share >= goal])
        rival, removing = _least(theirs), _least([row for row in theirs if lasts(row)])
        names = [None if row is None else row.method for row in (ours, rival, removing)]
        ratio = signed = None
        if ours is not None and rival is not None:
            ratio = ours.worst_positive_share / max(rival.worst_positive_share, 1e-9)
            signed = max(ours.worst_off_share, 0) / max(rival.worst_off_share, 1e-9)
        table.append(Match(seed, skill, goal, *names, ratio, signed, None if ratio is None else ratio <= 0.2))
    return table


def _least(rows: Sequence[Row]) -> Row | None:
    return min(rows, key=lambda row: row.worst_positive_share, default=None)


def lasts(row: Row) -> bool:
    """Whether a row's skill is gone rather than turned into wrong answers."""
    return row.checks["accuracy"] and row.refit.kept >= 0.9 * min(1.0, row.refit.kept_of_untrained)


@dataclass(frozen=True)
class OverSeeds:
    """One method on one skill over seeds.

    Attributes:
        skill: what was removed.
        method: how.
        seeds: how many.
        reached: of them reach the goal.
        selective: of those stay within the bound on the worst other group.
        met: seeds that meet every bound.
        worst_off_median: of the seeds that reach the goal, since a small edit harms nobody.
        worst_off_max: of the same seeds.
        refit_kept_median: of the same seeds.
    """

    skill: str
    method: str
    seeds: int
    reached: int
    selective: int
    met: int
    worst_off_median: float | None
    worst_off_max: float | None
    refit_kept_median: float | None


def over_seeds(rows: Sequence[Row]) -> list[OverSeeds]:
    """Per skill and method: how many seeds reach the goal, and what that costs the worst other group."""
    table = []
    for skill in REQUIRED:
        for method in dict.fromkeys(row.method for row in rows):
            here = [row for row in rows if (row.skill, row.method) == (skill, method)]
            if not here:
                continue
            reached = [row for row in here if row.checks["target_share"]]
            costs = [row.worst_off_share for row in reached]
            table.append(
                OverSeeds(
                    skill,
                    method,
                    len(here),
                    len(reached),
                    sum(row.checks["worst_off_share"] for row in reached),
                    sum(row.met for row in here),
                    _of(statistics.median, costs),
                    _of(max, costs),
                    _of(statistics.median, [row.refit.kept for row in reached]),
                )
            )
    return table


def _of(summary: Callable[[list[float]], float], values: list[float]) -> float | None:
    return summary(values) if values else None
