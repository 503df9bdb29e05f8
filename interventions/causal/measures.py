"""What is read off an edit's per-token damage: shares, selectivity, detection, dose, dissociation.

Damage is in nats per token; a share n divides by the headroom G, the loss that undoing everything
since the reference would cost. Shares are capped at one (n = min(D, G) / G), so that blowing a
skill up never scores better than removing it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LinearRegression

from interventions.causal.statistics import Array, Bits, Labels


def capped_share(damage: Array | float, headroom: Array | float) -> Array:
    """Share n = min(D, G) / G; NaN where there is no headroom.

    >>> capped_share(np.array([0.5, 3.0, -1.0]), np.array([1.0, 1.0, 2.0])).tolist()
    [0.5, 1.0, -0.5]
    """
    room = np.where(np.asarray(headroom) > 0, headroom, np.nan)
    return np.asarray(np.minimum(damage, room) / room, dtype=np.float64)


def group_mean(values: NDArray[np.float64], mask: Bits) -> Array:
    """Mean over the last axis inside a mask, NaN for an empty one."""
    if not mask.any():
        return np.full(values.shape[:-1], np.nan)
    return np.asarray(values[..., mask].mean(-1), dtype=np.float64)


@dataclass(frozen=True)
class Target:
    """Tokens a pair is about, on one split.

    Attributes:
        members: (M,) the target cluster C, decided without any loss of this split.
        others: name -> (M,) other groups U_j.
    """

    members: Bits
    others: Mapping[str, Bits] = field(default_factory=dict)

    @property
    def rest(self) -> Bits:
        """U: every token outside C. Tokens in C and another group are not in it."""
        return np.asarray(~self.members)

    def among(self, tokens: Bits) -> Target:
        """The same target where only the tokens of a mask (M,) are looked at."""
        return Target(self.members[tokens], {name: mask[tokens] for name, mask in self.others.items()})

    def apart(self) -> dict[str, Bits]:
        """The other groups without tokens that are in C too; empty ones are left out."""
        cut = {name: mask & ~self.members for name, mask in self.others.items()}
        return {name: mask for name, mask in cut.items() if mask.any()}


def selectivity(change: NDArray[np.float64], headroom: Array, target: Target) -> Array:
    """T = n_C - n_U over the last axis of ``change`` (..., M)."""
    inside = capped_share(group_mean(change, target.members), group_mean(headroom, target.members))
    outside = capped_share(group_mean(change, target.rest), group_mean(headroom, target.rest))
    return np.asarray(inside - outside)


def selectivity_index(share: float, other: float, floor: float = 0.02) -> float:
    """SI = (n_C - n_U) / (|n_C| + |n_U|), NaN where the sum is below the floor.

    >>> selectivity_index(0.5, 0.0), selectivity_index(0.3, 0.3)
    (1.0, 0.0)
    """
    total = abs(share) + abs(other)
    return (share - other) / total if total >= floor else float("nan")


def interaction_index(necessity: float, sufficiency: float) -> float:
    """J = (Q - E) / 2: positive for redundancy, negative for synergy."""
    return (sufficiency - necessity) / 2


def detector_auc(change: Array, members: Bits) -> float:
    """AUC of the damage for membership, NaN where one class is empty."""
    if not members.any() or members.all():
        return float("nan")
    # Mann-Whitney: mean rank of the members, ties sharing theirs.
    inside = int(members.sum())
    ranks = rankdata(change)[members].sum()
    return float((ranks - inside * (inside + 1) / 2) / (inside * (len(members) - inside)))


def within_sequence_auc(change: Array, members: Bits, sequences: Labels) -> float:
    """Detector AUC averaged over the sequences that hold both classes."""
    found = [
        detector_auc(change[sequences == s], members[sequences == s])
        for s in np.unique(sequences[members])
        if not members[sequences == s].all()
    ]
    return float(np.mean(found)) if found else float("nan")


def residual_auc(change: Array, members: Bits, confounders: NDArray[np.float64]) -> float:
    """Detector AUC after the damage is regressed on confounders (M, c), e.g. loss and position."""
    fitted = LinearRegression().fit(confounders, change).predict(confounders)
    return detector_auc(change - fitted, members)


def calibration(change: Array, attributed: Array) -> tuple[float, float]:
    """Slope and R^2 of damage on minus attribution, over tokens (circular by construction)."""
    x, y = -attributed - np.mean(-attributed), change - change.mean()
    variance = float(x @ x)
    if variance == 0 or float(y @ y) == 0:
        return float("nan"), float("nan")
    slope = float(x @ y) / variance
    return slope, float(x @ y) ** 2 / (variance * float(y @ y))


@dataclass(frozen=True)
class DoseCurve:
    """Damage over doses with its isotonic fit on [0, 1].

    Attributes:
        doses: alpha, ascending.
        damage: D_C at each, nats.
        isotonic_share: share of the variance on [0, 1] that a rising curve explains.
        half_dose: alpha where the damage is half of that at 1, NaN if never.
        asymmetry: D(1) - D(-1), NaN where -1 was not measured.
        curvature: D(1) - 2 D(1/2), nats: negative for concave, positive for convex.
    """

    doses: tuple[float, ...]
    damage: tuple[float, ...]
    isotonic_share: float
    half_dose: float
    asymmetry: float
    curvature: float


def dose_curve(doses: Sequence[float], damage: Sequence[float]) -> DoseCurve:
    """Summarise a dose curve.

    >>> curve = dose_curve([0, 0.25, 0.5, 0.75, 1], [0, 1 / 16, 0.25, 9 / 16, 1.0])
    >>> curve.isotonic_share, round(curve.half_dose, 2), curve.curvature
    (1.0, 0.7, 0.5)
    """
    order = np.argsort(doses)
    x, y = np.asarray(doses, dtype=float)[order], np.asarray(damage, dtype=float)[order]
    inside = (x >= 0) & (x <= 1)
    rising = IsotonicRegression().fit_transform(x[inside], y[inside])
    spread = float(np.sum((y[inside] - y[inside].mean()) ** 2))
    share = 1.0 if spread == 0 else 1 - float(np.sum((y[inside] - rising) ** 2)) / spread
    at = {round(float(a), 6): float(b) for a, b in zip(x, y, strict=True)}
    full, half = at.get(1.0, float("nan")), at.get(0.5, float("nan"))
    reached = np.flatnonzero(rising >= full / 2) if full > 0 else np.array([], dtype=int)
    half_dose = float("nan")
    if len(reached):
        right = max(int(reached[0]), 1)
        grid = x[inside]
        low, high = rising[right - 1], rising[right]
        part = (full / 2 - low) / (high - low) if high > low else 1.0
        half_dose = float(grid[right - 1] + part * (grid[right] - grid[right - 1]))
    asymmetry = full - at.get(-1.0, float("nan"))
    return DoseCurve(tuple(x.tolist()), tuple(y.tolist()), share, half_dose, asymmetry, full - 2 * half)


@dataclass(frozen=True)
class Dissociation:
    """Double dissociation over a matrix M[j, k] = n of cluster k under the edit of vector j.

    Attributes:
        mean: mean over j != k of (M_jj + M_kk - M_jk - M_kj) / 2.
        crossovers: pairs with M_jj > M_kj and M_kk > M_jk, both within one cluster's column.
    """

    mean: float
    crossovers: tuple[tuple[int, int], ...]


def double_dissociation(matrix: NDArray[np.float64]) -> Dissociation:
    """Statistic and strict crossovers of a square matrix (edits x clusters).

    >>> double_dissociation(np.array([[1.0, 0.0], [0.2, 0.8]]))
    Dissociation(mean=0.8, crossovers=((0, 1),))
    """
    size = len(matrix)
    pairs = [(j, k) for j in range(size) for k in range(j + 1, size)]
    if not pairs:
        return Dissociation(float("nan"), ())
    values = [(matrix[j, j] + matrix[k, k] - matrix[j, k] - matrix[k, j]) / 2 for j, k in pairs]
    crossed = tuple((j, k) for j, k in pairs if matrix[j, j] > matrix[k, j] and matrix[k, k] > matrix[j, k])
    return Dissociation(float(np.mean(values)), crossed)


def dissociation_matrix(
    changes: Sequence[Array], headroom: Array, clusters: Sequence[Bits]
) -> NDArray[np.float64]:
    """M[j, k]: capped share of cluster k under edit j; tokens of both clusters j and k are left out."""
    size = len(clusters)
    matrix = np.full((size, size), np.nan)
    for j in range(size):
        for k in range(size):
            mask = clusters[k] if j == k else clusters[k] & ~clusters[j]
            if mask.any():
                matrix[j, k] = capped_share(group_mean(changes[j], mask), group_mean(headroom, mask))
    return matrix


def there_and_back(path: Sequence[Array] | NDArray[np.float64]) -> float:
    """Path length over net displacement of the coordinates (T, k) along the rows; inf if they return.

    >>> there_and_back(np.array([[0.0], [2.0], [1.0]]))
    3.0
    """
    points = np.asarray(path, dtype=np.float64)
    length = float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())
    net = float(np.linalg.norm(points[-1] - points[0]))
    # A loop that closes up to rounding has no net displacement to speak of.
    if net <= 1e-12 * length:
        return 1.0 if length == 0 else float("inf")
    return length / net


def decay_part(coordinates_along: Array, learning_rates: Array, weight_decay: float) -> float:
    """Displacement along a row due to decoupled weight decay: -sum_t eta_t lambda <b, theta_t>.

    Args:
        coordinates_along: (T,) <b, theta_t> before each update.
        learning_rates: (T,) eta_t of that update.
        weight_decay: lambda.
    """
    return float(-weight_decay * np.sum(learning_rates * coordinates_along))


@dataclass(frozen=True)
class DamageSummary:
    """Distribution of a damage: mean, median, 10 % trimmed mean, share above zero, largest."""

    mean: float
    median: float
    trimmed: float
    positive: float
    largest: float


def describe(change: Array) -> DamageSummary:
    """Summary of per-token damage (heavy tails are expected)."""
    ordered = np.sort(change)
    cut = int(0.1 * len(ordered))
    inner = ordered[cut : len(ordered) - cut] if cut else ordered
    return DamageSummary(
        float(change.mean()),
        float(np.median(change)),
        float(inner.mean()),
        float(np.mean(change > 0)),
        float(change.max()),
    )
