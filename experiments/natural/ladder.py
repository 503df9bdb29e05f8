"""Known impurity: movements of two blocks turned into each other, and a crossover of two stretches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from experiments.natural.records import Rung
from interventions.causal.settings import TestSettings
from interventions.causal.statistics import Interval, draw_units, shares_of
from interventions.causal.test import judge_runs, measure_run
from interventions.damage import EvaluatedSplit
from interventions.edits import project_out
from polca_edit.clusters.hypotheses import Hypothesis, TokenGroup
from polca_edit.derivatives.lanczos import orthonormalise

#: Angles between an axis and the block it is tested for; half-mixed counts as neither side of the ROC.
DEGREES = (0.0, 7.5, 15.0, 22.5, 30.0, 37.5, 45.0)


def mixed_axis(own: Tensor, other: Tensor, degrees: float) -> Tensor:
    """(N,) unit vector at an angle from one of two orthogonal ones, in their plane.

    >>> import torch
    >>> [round(float(v), 3) for v in mixed_axis(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 30.0)]
    [0.866, 0.5]
    """
    turned = math.radians(degrees)
    return math.cos(turned) * own + math.sin(turned) * other


def ladder_rungs(
    split: EvaluatedSplit,
    rows: Tensor,
    mixed: Sequence[tuple[int, int]],
    parents: Mapping[str, Tensor],
    settings: TestSettings,
) -> tuple[Rung, ...]:
    """Every pair of blocks, either way round, at every angle, through the causal test.

    Args:
        split: unseen tokens.
        rows: (K, N) declared rows, block by block in the order of ``parents``.
        mixed: numbers of the blocks that are turned into each other.
        parents: name of a block's group -> members.
        settings: of the test.
    """
    names, pairs, places = list(parents), [], []
    for one, two in [pair for i, j in mixed for pair in ((i, j), (j, i))]:
        for degrees in DEGREES:
            name = f"{names[one]} towards {names[two]} {degrees:g}"
            axis = mixed_axis(rows[one], rows[two], degrees)[None]
            group = TokenGroup(names[one], skill=names[one])
            pairs.append(Hypothesis(name, axis, group, "own", "ladder", span=rows))
            places.append((degrees, names[two]))
    # What an axis carries alone (L) and a finer N say nothing about its purity.
    quick = replace(settings, transplants=0, random_draws=19)
    table = judge_runs([measure_run(split, pairs, quick, parents=parents)], quick)
    found = {row.name: row for row in table.rows}
    return tuple(
        Rung(
            degrees,
            other,
            found[pair.name].pooled.runs[0].selectivity,
            found[pair.name].pooled.leakage.estimate,
            found[pair.name].word,
        )
        for pair, (degrees, other) in zip(pairs, places, strict=True)
        if pair.name in found
    )


def crossover(
    late: EvaluatedSplit, window: tuple[int, int], groups: tuple[str, str], settings: TestSettings
) -> Interval:
    """How much each of two stretches takes of its own group beyond the other's, summed; shares, 0 to 2.

    Args:
        late: unseen tokens, its window the later stretch.
        window: the earlier stretch.
        groups: learned in the earlier and in the later stretch.
        settings: for the resampling of documents.
    """
    early = EvaluatedSplit(late.loss, late.series, late.tokens, window, late.reference)
    tokens = late.tokens
    masks = np.stack([tokens.skills[name].numpy() for name in groups])
    units = draw_units(tokens.documents[tokens.sequence_of].numpy(), settings.resamples, settings.seed)
    room = late.headroom.double().numpy()
    shares = []
    for split in (early, late):
        row = orthonormalise(split.movement.displacement[None])
        change = split.damage(project_out(split, row)).change.double().numpy()
        shares.append(shares_of(change, room, masks, units).share)
    own = (shares[0][:, 0] - shares[0][:, 1]) + (shares[1][:, 1] - shares[1][:, 0])
    return units.interval(own)
