"""How large a planted skill must be to be found: power by share, in one run or over several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from interventions.statistics import Array, rank_p

#: Power from which on a share counts as detected.
ENOUGH = 0.8


@dataclass(frozen=True)
class PlantedDraws:
    """Effects of planted skills and of rotations that mix the planted coordinate in, for one run.

    Attributes:
        shares: (S,) part of their tokens' headroom that planted skills carry, ascending.
        effects: (S, P) T of every planted skill undone.
        rotations: (S, P, R) T of random directions of the span with the planted coordinate added.
    """

    shares: tuple[float, ...]
    effects: NDArray[np.float64]
    rotations: NDArray[np.float64]


def planted_p(runs: Sequence[PlantedDraws], maxima: Sequence[Mapping[str, Array]]) -> NDArray[np.float64]:
    """(S, P) the largest p of each planted skill: against every pipeline family, and against rotations.

    Only families that every run has count. Over runs T is averaged, and draw r of one run with draw r of
    the next, as for pairs.

    >>> one = PlantedDraws((1.0,), np.array([[0.9]]), np.array([[[0.1, 0.2, 0.95]]]))
    >>> planted_p([one], [{"rotation": np.array([0.5, 0.6, 0.7])}]).tolist()
    [[0.5]]
    """
    skills = min(run.effects.shape[1] for run in runs)
    families = sorted(set.intersection(*(set(one) for one in maxima)))
    reference = [_averaged([one[family] for one in maxima]) for family in families]
    effects = np.mean([run.effects[:, :skills] for run in runs], axis=0)
    rotations = np.mean([run.rotations[:, :skills] for run in runs], axis=0)
    return np.array(
        [
            [
                max(rank_p(float(value), other) for other in (*reference, null))
                for value, null in zip(values, nulls, strict=True)
            ]
            for values, nulls in zip(effects, rotations, strict=True)
        ]
    )


def _averaged(nulls: Sequence[Array]) -> Array:
    """Draw r of one run averaged with draw r of the next."""
    shortest = min(len(null) for null in nulls)
    return np.asarray(np.mean([null[:shortest] for null in nulls], axis=0))


def powers(
    runs: Sequence[PlantedDraws], maxima: Sequence[Mapping[str, Array]], level: float
) -> dict[float, tuple[float, tuple[float, ...]]]:
    """Share -> (power, p of every planted skill)."""
    table = planted_p(runs, maxima)
    return {
        share: (float(np.mean(row < level)), tuple(float(p) for p in row))
        for share, row in zip(runs[0].shares, table, strict=True)
    }


def detectable_share(power: Mapping[float, float]) -> float:
    """Smallest share from which on power is at least 0.8 at every share; inf if at none.

    >>> detectable_share({0.5: 0.9, 0.8: 0.3, 0.9: 0.85, 1.0: 1.0})
    0.9
    """
    found = float("inf")
    for share in sorted(power, reverse=True):
        if not power[share] >= ENOUGH:
            break
        found = share
    return found
