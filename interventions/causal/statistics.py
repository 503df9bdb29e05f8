"""Inference over whole sequences: bootstrap, permutation, ranks, equivalence, power, seeds.

Sequences are the sampling unit inside a run, training seeds the unit of replication. Token-level
tests reject far too often where tokens of a sequence go together, so none is offered here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Bits = NDArray[np.bool_]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """An estimate with a percentile interval.

    Attributes:
        estimate: the value on all sequences.
        low: lower 95 % bound.
        high: upper 95 % bound.
        low90: lower bound of the 90 % interval (equivalence tests).
        high90: its upper bound.
        error: bootstrap standard error.
    """

    estimate: float
    low: float
    high: float
    low90: float
    high90: float
    error: float


@dataclass(frozen=True)
class Draws:
    """An estimate with its bootstrap draws, so that several seeds can be combined."""

    estimate: float
    draws: Array

    def interval(self) -> Interval:
        """Percentile intervals; NaN draws (empty denominators) make every bound NaN."""
        low, low90, high90, high = np.percentile(self.draws, [2.5, 5.0, 95.0, 97.5])
        return Interval(
            float(self.estimate),
            float(low),
            float(high),
            float(low90),
            float(high90),
            float(np.std(self.draws)),
        )


def sequence_sums(values: Array, mask: Bits, sequences: Labels, count: int) -> Array:
    """Sum of the masked values in each of ``count`` sequences.

    >>> mask = np.array([True, False, True])
    >>> sequence_sums(np.array([1.0, 2.0, 4.0]), mask, np.array([0, 0, 1]), 2).tolist()
    [1.0, 4.0]
    """
    return np.bincount(sequences[mask], weights=values[mask], minlength=count).astype(np.float64)


def resampling_weights(count: int, resamples: int, generator: np.random.Generator) -> Array:
    """(resamples, count) how often each sequence is drawn; every row sums to ``count``."""
    return generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)


def bootstrap(
    sums: Mapping[str, Array], statistic: Callable[[Mapping[str, Array]], Array], weights: Array
) -> Draws:
    """Cluster bootstrap over sequences; the statistic, ratios included, is recomputed in each resample.

    Args:
        sums: name -> (S,) per-sequence sums and counts.
        statistic: from totals (each an array over resamples) to the statistic, elementwise.
        weights: from :func:`resampling_weights`.
    """
    names = list(sums)
    table = np.stack([sums[name] for name in names], axis=1)
    totals = weights @ table
    whole = table.sum(0, keepdims=True)
    drawn = statistic({name: totals[:, i] for i, name in enumerate(names)})
    estimate = statistic({name: whole[:, i] for i, name in enumerate(names)})
    return Draws(float(estimate[0]), drawn)


def over_seeds(runs: Sequence[Draws], generator: np.random.Generator) -> Draws:
    """Mean over seeds with seeds resampled: draw r averages draw r of seeds drawn with replacement.

    With one run its own draws are returned unchanged.
    """
    if len(runs) == 1:
        return runs[0]
    table = np.stack([run.draws for run in runs])
    chosen = generator.integers(0, len(runs), size=table.shape)
    mixed = np.take_along_axis(table, chosen, axis=0).mean(0)
    return Draws(float(np.mean([run.estimate for run in runs])), mixed)


def rank_p(value: float, null: Array, *, stopped_at: int | None = None) -> float:
    """One-sided p of ``value`` among null draws, (1 + #{null >= value}) / (1 + R).

    Args:
        value: the statistic.
        null: draws under the null.
        stopped_at: exceedances at which drawing was stopped (Besag & Clifford 1991); then p is
            exceedances / draws.

    >>> rank_p(3.0, np.array([1.0, 2.0, 4.0]))
    0.5
    """
    exceed = int(np.sum(null >= value))
    if stopped_at is not None and exceed >= stopped_at:
        return exceed / len(null)
    return (1 + exceed) / (1 + len(null))


def sequential_null(draw: Callable[[int], float], value: float, *, draws: int, stop_after: int) -> Array:
    """Null draws until ``stop_after`` of them reach the value, else ``draws`` of them (Besag-Clifford)."""
    found: list[float] = []
    exceed = 0
    for index in range(draws):
        found.append(draw(index))
        exceed += found[-1] >= value
        if exceed >= stop_after:
            break
    return np.array(found)


def max_t_p(values: Array, null: NDArray[np.float64]) -> Array:
    """Family-wise p of each value against the per-draw maxima of a null (R, m) or (R,)."""
    maxima = null.max(1) if null.ndim == 2 else null
    return np.array([rank_p(float(value), maxima) for value in values])


def holm(p_values: Sequence[float]) -> Array:
    """Holm's adjusted p-values.

    >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def benjamini_hochberg(p_values: Sequence[float], *, dependent: bool = False) -> Array:
    """False-discovery adjusted p-values (Benjamini-Yekutieli where strongly dependent)."""
    adjusted = stats.false_discovery_control(np.asarray(p_values), method="by" if dependent else "bh")
    return np.asarray(adjusted, dtype=np.float64)


def equivalent(interval: Interval, margin: float) -> bool:
    """Two one-sided tests at 5 %: the 90 % interval lies inside (-margin, margin)."""
    return bool(-margin < interval.low90 and interval.high90 < margin)


def equivalence_power(error: float, margin: float) -> float:
    """Power of the equivalence test where the true effect is zero (normal approximation).

    >>> round(equivalence_power(1.0, 1.0), 3), round(equivalence_power(0.1, 1.0), 3)
    (0.0, 1.0)
    """
    if error <= 0:
        return 1.0
    return max(0.0, float(2 * stats.norm.cdf(margin / error - stats.norm.ppf(0.95)) - 1))


def minimum_detectable(error: float) -> float:
    """Smallest effect found with 80 % power at a two-sided 5 %: 2.8 standard errors."""
    return 2.8 * error


def sign_flip_p(values: Sequence[float]) -> float:
    """Exact one-sided sign-flip test over seeds: share of sign patterns with a mean at least this large.

    >>> sign_flip_p([1.0] * 5), sign_flip_p([1.0] * 3)
    (0.03125, 0.125)
    """
    v = np.asarray(values, dtype=np.float64)
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(v))))
    means = signs @ v
    return float(np.mean(means >= v.sum() * (1 - 1e-12) - 1e-300))


def sequence_permutation_p(
    values: Array,
    mask: Bits,
    sequences: Labels,
    generator: np.random.Generator,
    *,
    draws: int = 199,
    statistic: Callable[[Array, Bits], float] | None = None,
) -> float:
    """One-sided p where whole rows of labels move between sequences of equal length.

    The default statistic is mean inside minus mean outside. Labels keep their pattern inside a
    sequence, so tokens that go together stay together.
    """
    measure = statistic or mean_difference
    order = np.argsort(sequences, kind="stable")
    ordered, sizes = sequences[order], np.bincount(sequences)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    blocks = [order[starts[s] : starts[s] + sizes[s]] for s in np.unique(ordered)]
    # Sequences of one length form a table of token indices, whose rows are dealt anew.
    tables = [
        np.stack([block for block in blocks if len(block) == size])
        for size in sorted({len(block) for block in blocks})
    ]
    observed = measure(values, mask)
    null = np.empty(draws)
    for draw in range(draws):
        moved = np.empty_like(mask)
        for table in tables:
            moved[table] = mask[table[generator.permutation(len(table))]]
        null[draw] = measure(values, moved)
    return rank_p(observed, null)


def token_permutation_p(
    values: Array, mask: Bits, generator: np.random.Generator, *, draws: int = 199
) -> float:
    """The invalid test that ignores sequences; kept to show how wrong it is (testbed T10)."""
    observed = mean_difference(values, mask)
    return rank_p(
        observed, np.array([mean_difference(values, generator.permutation(mask)) for _ in range(draws)])
    )


def mean_difference(values: Array, mask: Bits) -> float:
    """Mean inside minus mean outside; zero where either is empty."""
    if not mask.any() or mask.all():
        return 0.0
    return float(values[mask].mean() - values[~mask].mean())


def binomial_bound(trials: int, rate: float, level: float = 0.975) -> int:
    """Largest count still compatible with a true rate: P[X <= bound] >= level.

    >>> binomial_bound(200, 0.05)
    16
    """
    return int(stats.binom.ppf(level, trials, rate))


def finite(values: Iterable[float]) -> list[float]:
    """The finite ones."""
    return [v for v in values if np.isfinite(v)]
