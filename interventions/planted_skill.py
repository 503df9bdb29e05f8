"""The positive control (c10): a skill routed into a known block of the same run.

One coordinate is added to the weights; it moves from 0 to its end value over training, and a set of
tokens with a rule over input features gets an extra loss that falls as it moves. Undoing it must be
found by the same statistic, against the same nulls, in the noise of the run itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from interventions import controls, measures
from interventions.edits import displace
from interventions.measures import Target
from interventions.protocol import Session
from interventions.statistics import Array, Bits, rank_p, sequence_sums
from interventions.verdict import Outcome


@dataclass(frozen=True)
class PlantedPower:
    """How many planted skills were found.

    Attributes:
        outcome: passed where at least 80 % were found.
        power: share found.
        share: share of the planted tokens' headroom that the planted coordinate carries.
        p_values: per planted skill the larger of its p against the pipeline null and against rotations.
    """

    outcome: Outcome
    power: float
    share: float
    p_values: tuple[float, ...]


def planted_power(session: Session, maxima: Array, *, share: float = 0.8, draws: int = 59) -> PlantedPower:
    """Plant skills on random describable token sets and test each.

    Args:
        session: the open run.
        maxima: largest T per reference basis (pipeline null).
        share: planted part of the tokens' headroom.
        draws: rotations inside the span with the planted coordinate added.
    """
    settings, bench = session.settings, session.evaluate
    rng = np.random.default_rng(settings.seed + 23)
    generator = torch.Generator().manual_seed(settings.seed + 29)
    rows = session.subject.rows
    features = session.select.tokens.features
    here = controls.feature_table(features, features)
    there = controls.feature_table(bench.tokens.features, features)
    size = float(np.median(np.abs(session.path[-1])))
    mixes = [controls.random_frame(len(rows) + 1, 1, generator)[0] for _ in range(draws)]
    moves = [
        bench.change(displace(session.theta, rows, mix[:-1] * size, "planted rotation")) for mix in mixes
    ]
    along = np.array([float(mix[-1]) for mix in mixes])
    found = []
    for _ in range(settings.planted):
        count = int(len(here) * rng.uniform(0.05, 0.25))
        members = controls.describable_set(here, max(count, 20), rng)(there)
        if not members.any() or members.all():
            continue
        found.append(_p_value(session, members, moves, along, maxima, share))
    if not found:
        return PlantedPower("not_run", float("nan"), share, ())
    power = float(np.mean([p < settings.thresholds.level for p in found]))
    return PlantedPower("passed" if power >= 0.8 else "failed", power, share, tuple(found))


def _p_value(
    session: Session, members: Bits, moves: list[Array], along: Array, maxima: Array, share: float
) -> float:
    """The larger p of one planted skill, 1 where its damage is not above zero."""
    bench, target = session.evaluate, Target(members)
    strength = share / (1 - share) * float(bench.headroom[target.members].mean())
    if strength <= 0:
        return 1.0
    # Tokens differ in how much of the planted skill they use, so that the assay meets noise.
    noise = np.random.default_rng(int(target.members.sum())).lognormal(-0.125, 0.5, size=len(bench.before))
    planted = strength * noise * target.members
    room = bench.headroom + planted
    value = float(measures.selectivity(planted, room, target))
    # A rotation moves the planted coordinate by its own part: moving back raises the planted loss.
    null = [
        float(measures.selectivity(m - part * planted, room, target))
        for m, part in zip(moves, along, strict=True)
    ]
    sums = sequence_sums(planted, target.members, bench.documents, bench.units)
    spread = (bench.weights @ sums).min()
    return max(rank_p(value, maxima), rank_p(value, np.array(null))) if spread > 0 else 1.0
