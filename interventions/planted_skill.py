"""The positive control (c10): a skill routed into a known block of the same run.

One coordinate is added to the weights; it moves from 0 to its end value over training, and a set of
tokens with a rule over input features loses that much more of its loss as it moves. Undoing it must
be found by the same statistic, against the same nulls, in the noise of the run itself.

What can be found depends on the share of its tokens' headroom that the coordinate carries. Undoing it
gives T = share, and the primary null is the largest T over all pairs of a rotated basis (max-T): where
those maxima reach 0.85, a skill with a share of 0.8 is lost among them by construction, for every
token set alike, so that power at one share is close to 0 or 1. So skills are planted at several
shares. The gate asks for the fully routed one (share 1: all the tokens learn rides on the block, as in
testbed T8), without which the assay finds nothing at all; the smallest share found with a power of
0.8 is the run's sensitivity and stands beside every verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from interventions import controls, measures
from interventions.detection import ENOUGH, PlantedDraws, detectable_share, powers
from interventions.edits import displace
from interventions.measures import Target
from interventions.protocol import Session
from interventions.statistics import Array, Bits
from interventions.verdict import Outcome

#: Shares of their tokens' headroom that planted skills carry; the gate is the last.
SHARES = (0.5, 0.65, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class PlantedShare:
    """Planted skills of one share.

    Attributes:
        share: part of the planted tokens' headroom that the planted coordinate carries.
        power: share of planted skills found.
        effect: mean T of undoing them.
        p_values: per planted skill the largest of its p against each pipeline family and against rotations.
    """

    share: float
    power: float
    effect: float
    p_values: tuple[float, ...]


@dataclass(frozen=True)
class PlantedPower:
    """How many planted skills were found.

    Attributes:
        outcome: passed where at least 80 % of the fully routed ones were found.
        power: share of those found.
        detectable_share: smallest share found with a power of 0.8; inf if none was.
        by_share: power and p-values at every share.
    """

    outcome: Outcome
    power: float
    detectable_share: float
    by_share: tuple[PlantedShare, ...]


def planted_draws(session: Session, *, draws: int = 59) -> PlantedDraws | None:
    """Plant skills on random describable token sets, at every share, and undo each.

    None where no token set has anything to lose.

    Args:
        session: the open run.
        draws: rotations inside the span with the planted coordinate added.
    """
    settings, bench = session.settings, session.ranked
    rng = np.random.default_rng(settings.seed + 23)
    generator = torch.Generator().manual_seed(settings.seed + 29)
    rows = session.subject.rows
    features = session.select.tokens.features
    here = controls.feature_table(features, features)
    there = controls.feature_table(bench.tokens.features, features)
    size = float(np.median(np.abs(session.path[-1])))
    mixes = [controls.random_frame(len(rows) + 1, 1, generator)[0] for _ in range(draws)]
    moves = np.stack(
        [bench.change(displace(session.theta, rows, mix[:-1] * size, "planted rotation")) for mix in mixes]
    )
    along = np.array([float(mix[-1]) for mix in mixes])
    effects, rotations = [], []
    for _ in range(settings.planted):
        count = int(len(here) * rng.uniform(0.05, 0.25))
        members = controls.describable_set(here, max(count, 20), rng)(there)
        if not members.any() or members.all() or float(bench.headroom[members].mean()) <= 0:
            continue
        found = [_planted(session, members, moves, along, share) for share in SHARES]
        effects.append([value for value, _ in found])
        rotations.append([null for _, null in found])
    if not effects:
        return None
    return PlantedDraws(SHARES, np.array(effects).T, np.swapaxes(np.array(rotations), 0, 1))


def _planted(
    session: Session, members: Bits, moves: Array, along: Array, share: float
) -> tuple[float, Array]:
    """T of one planted skill, and of each rotation."""
    bench, target = session.ranked, Target(members)
    # Tokens differ in how much of the planted skill they use, so that the assay meets noise.
    noise = np.random.default_rng(int(members.sum())).lognormal(-0.125, 0.5, size=len(bench.before))
    planted = share * float(bench.headroom[members].mean()) * noise * members
    # The planted part takes the place of what these tokens lose otherwise.
    own = np.where(members, 1 - share, 1.0)
    room = own * bench.headroom + planted
    value = float(measures.selectivity(planted, room, target))
    # A rotation moves the planted coordinate by its own part: moving back raises the planted loss.
    null = measures.selectivity(own * moves - along[:, None] * planted, room, target)
    return value, null


def planted_power(
    draws: PlantedDraws | None, maxima: Mapping[str, Array], level: float = 0.05
) -> PlantedPower:
    """Power at every share against one run's own nulls.

    Args:
        draws: planted skills, None where none could be planted.
        maxima: family -> largest T per reference basis (pipeline null), all that pairs are judged by.
        level: of each test.
    """
    if draws is None:
        return PlantedPower("not_run", float("nan"), float("inf"), ())
    found = powers([draws], [maxima], level)
    means = draws.effects.mean(1)
    rows = tuple(
        PlantedShare(share, power, float(mean), p)
        for (share, (power, p)), mean in zip(found.items(), means, strict=True)
    )
    smallest = detectable_share({row.share: row.power for row in rows})
    full = rows[-1].power
    return PlantedPower("passed" if full >= ENOUGH else "failed", full, smallest, rows)
