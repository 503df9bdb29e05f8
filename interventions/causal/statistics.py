"""Inference over whole documents and over runs: resampled group totals, intervals, ranks.

Documents are the sampling unit inside a run, training runs (seeds) the unit of replication. Token-level
tests reject far too often where tokens of a document go together, so none is offered here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Bits = NDArray[np.bool_]
Labels = NDArray[np.int64]

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval.

    Attributes:
        estimate: the value.
        low: lower bound; NaN where it cannot be given.
        high: upper bound.
        units: what was resampled or averaged over (documents of one run, or runs).
    """

    estimate: float
    low: float
    high: float
    units: int = 1

    @property
    def error(self) -> float:
        """Standard error that the interval implies under a normal distribution."""
        return (self.high - self.low) / (2 * float(stats.norm.ppf((1 + LEVEL) / 2)))


def percentile_interval(draws: Array, estimate: float, units: int) -> Interval:
    """Percentile interval of bootstrap draws; NaN draws (empty denominators) make the bounds NaN."""
    low, high = np.percentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(estimate), float(low), float(high), units)


def t_interval(values: Sequence[float]) -> Interval:
    """Student interval of a mean over runs; a bootstrap over two to five runs covers far too little.

    >>> found = t_interval([1.0, 2.0, 3.0])
    >>> round(found.low, 3), found.estimate, round(found.high, 3)
    (-0.484, 2.0, 4.484)

    Raises:
        ValueError: for fewer than two runs.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over runs needs at least two runs, got {len(values)}; add a seed")
    v = np.asarray(values, dtype=np.float64)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(v) - 1) * v.std(ddof=1) / math.sqrt(len(v)))
    return Interval(float(v.mean()), float(v.mean()) - half, float(v.mean()) + half, len(v))


def rank_p(value: float, null: Array | Sequence[float]) -> float:
    """One-sided p of ``value`` among null draws, (1 + #{null >= value}) / (1 + R).

    >>> rank_p(3.0, np.array([1.0, 2.0, 4.0]))
    0.5
    """
    return (1 + int(np.sum(np.asarray(null) >= value))) / (1 + len(null))


def rank_p_over_runs(values: Sequence[float], nulls: Sequence[Array | Sequence[float]]) -> float:
    """P of a mean over runs: draw r of one run is averaged with draw r of the next, as the value is.

    The null of a named pair averaged like the pair itself, so power rises with the number of runs.
    """
    shortest = min(len(null) for null in nulls)
    mean = np.mean([np.asarray(null)[:shortest] for null in nulls], axis=0)
    return rank_p(float(np.mean(values)), mean)


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """False-discovery adjusted p-values.

    >>> [round(p, 3) for p in benjamini_hochberg([0.01, 0.04, 0.03])]
    [0.03, 0.04, 0.04]
    """
    if not len(p_values):
        return []
    return [float(p) for p in stats.false_discovery_control(np.asarray(p_values), method="bh")]


def binomial_bound(trials: int, rate: float, level: float = 0.975) -> int:
    """Largest count still compatible with a true rate: P[X <= bound] >= level.

    >>> binomial_bound(200, 0.05)
    16
    """
    return int(stats.binom.ppf(level, trials, rate))


def resampling_weights(count: int, resamples: int, generator: np.random.Generator) -> Array:
    """(resamples + 1, count) multiplicities of the documents; row 0 is the sample itself, all ones."""
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.concatenate([np.ones((1, count)), drawn]).astype(np.float64)


@dataclass(frozen=True)
class Units:
    """Documents of a split and how often each is drawn.

    Attributes:
        of_token: (M,) document of each token, 0 .. count - 1.
        weights: (R + 1, count) multiplicities, row 0 all ones.
    """

    of_token: Labels
    weights: Array

    @property
    def count(self) -> int:
        """Number of documents."""
        return int(self.weights.shape[1])

    def totals(self, values: Array, masks: NDArray[np.bool_]) -> Array:
        """(R + 1, G) sum of the values in each group, for the sample and every resample.

        Args:
            values: (M,) per token.
            masks: (G, M) groups.
        """
        table = np.stack(
            [np.bincount(self.of_token[m], weights=values[m], minlength=self.count) for m in masks], axis=1
        )
        return np.asarray(self.weights @ table)

    def interval(self, draws: Array) -> Interval:
        """Interval of a statistic given for the sample (row 0) and its resamples."""
        return percentile_interval(draws[1:], float(draws[0]), self.count)


def draw_units(documents: Labels, resamples: int, seed: int) -> Units:
    """Resampling of the documents that tokens belong to.

    Args:
        documents: (M,) any ids.
        resamples: R.
        seed: of the draws.
    """
    _, units = np.unique(documents, return_inverse=True)
    units = units.astype(np.int64).reshape(-1)
    weights = resampling_weights(int(units.max()) + 1, resamples, np.random.default_rng(seed))
    return Units(units, weights)


def capped(change: Array, headroom: Array) -> Array:
    """Loss that counts as taken, per token: min(D, G+); negative damage counts.

    >>> capped(np.array([3.0, -1.0, 0.5]), np.array([1.0, 2.0, -4.0])).tolist()
    [1.0, -1.0, 0.0]
    """
    return np.asarray(np.minimum(change, np.maximum(headroom, 0.0)))


@dataclass(frozen=True)
class Shares:
    """What groups of tokens lose under one edit, in the sample (row 0) and in every resample.

    Attributes:
        share: (R + 1, G) n = sum min(D, G+) / sum G+; NaN without headroom.
        damage: (R + 1, G) mean D, nats.
        room: (R + 1, G) mean headroom G, nats (not cut at zero).
        tokens: (G,) tokens in the sample.
    """

    share: Array
    damage: Array
    room: Array
    tokens: NDArray[np.int64]

    def judged_in_nats(self, floor: float) -> NDArray[np.bool_]:
        """(G,) groups whose headroom is below max(floor, 3 standard errors): a share says nothing there."""
        with np.errstate(invalid="ignore"):
            error = np.nanstd(self.room[1:], axis=0)
            return np.asarray(~(self.room[0] >= np.maximum(floor, 3 * error)))


def shares_of(change: Array, headroom: Array, masks: NDArray[np.bool_], units: Units) -> Shares:
    """Shares and damages of groups, ratios of sums recomputed in every resample.

    Args:
        change: (M,) D, nats.
        headroom: (M,) G, nats.
        masks: (G, M).
        units: resampling.
    """
    lost = units.totals(capped(change, headroom), masks)
    room = units.totals(np.maximum(headroom, 0.0), masks)
    count = units.totals(np.ones_like(change), masks)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Shares(
            np.where(room > 0, lost / np.where(room > 0, room, 1.0), np.nan),
            units.totals(change, masks) / count,
            units.totals(headroom, masks) / count,
            masks.sum(1).astype(np.int64),
        )


def minimum_detectable(error: float) -> float:
    """Smallest effect found with 80 % power at a two-sided 5 %: 2.8 standard errors."""
    return 2.8 * error
