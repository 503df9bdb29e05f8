"""The control ladder c1-c6 and c9: every control is an :class:`Edit` through the same code path.

Each rung takes away another explanation: size (c1), placement (c2), the training subspace (c3),
total damage (c4), other vectors (c5), being a gradient of some tokens (c6), tokens that merely look
alike (c9). The pipeline null (c7) is in :mod:`interventions.nulls`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from interventions.causal.statistics import Array, Bits
from interventions.edits import Edit, displace, from_delta, project_out, weights_fingerprint
from polca_edit.derivatives.lanczos import orthonormalise
from polca_edit.parameters import ParameterSpace

#: Doses of the random in-span curve from which matched damage is read off, in matched displacements.
CURVE = (0.25, 0.5, 1.0, 2.0, 4.0)


def isotropic(theta: Float[Tensor, " N"], size: float, generator: torch.Generator) -> Edit:
    """c1: a uniformly random direction of all weight space, displaced by ``size``."""
    row = torch.randn(1, theta.shape[0], generator=generator, dtype=theta.dtype)
    return displace(theta, orthonormalise(row), [size], "isotropic")


def same_placement(
    theta: Float[Tensor, " N"], edit: Edit, space: ParameterSpace, generator: torch.Generator
) -> Edit:
    """c2: random inside every tensor, with the norm the edit has in that tensor."""
    moved = edit.delta().to(theta)
    drawn = torch.randn(theta.shape[0], generator=generator, dtype=theta.dtype)
    for start, stop in space.offsets.values():
        part = drawn[start:stop]
        part.mul_(moved[start:stop].norm() / part.norm().clamp_min(1e-30))
    return from_delta(edit.base, drawn, "same_placement")


def same_spectrum(
    theta: Float[Tensor, " N"], edit: Edit, space: ParameterSpace, generator: torch.Generator
) -> Edit:
    """c2, stronger: every matrix block U W V with random orthogonal U, V, so singular values stay."""
    pieces = []
    for name, block in space.unflatten(edit.delta().to(theta)).items():
        del name
        if block.ndim != 2:
            drawn = torch.randn(block.shape, generator=generator, dtype=theta.dtype)
            pieces.append((drawn * block.norm() / drawn.norm().clamp_min(1e-30)).reshape(-1))
            continue
        values = torch.linalg.svdvals(block)
        left = torch.linalg.qr(
            torch.randn(block.shape[0], len(values), generator=generator, dtype=theta.dtype)
        )[0]
        right = torch.linalg.qr(
            torch.randn(block.shape[1], len(values), generator=generator, dtype=theta.dtype)
        )[0]
        pieces.append(((left * values) @ right.T).reshape(-1))
    return from_delta(edit.base, torch.cat(pieces), "same_spectrum")


#: Dimensions that a span needs beyond its rank for a rotation inside it to be a control (c3).
ROOM = 4


def random_frame(count: int, rank: int, generator: torch.Generator) -> Float[Tensor, "r K"]:
    """Orthonormal rows of coefficients: a uniformly random ``rank``-dimensional part of a span.

    Raises:
        ValueError: if the span leaves no room to rotate in (K >= rank + ROOM is asked for).
    """
    least = rank + ROOM
    if count < least:
        raise ValueError(
            f"rotations of {rank} vectors need a span of at least {least}, got {count}; use more vectors"
        )
    return orthonormalise(torch.randn(rank, count, generator=generator, dtype=torch.float64))


def in_span(
    theta: Float[Tensor, " N"], rows: Float[Tensor, "K N"], size: float, generator: torch.Generator
) -> Edit:
    """c3a: a uniformly random direction inside span(B), displaced by ``size``."""
    mix = random_frame(len(rows), 1, generator)[0]
    return displace(theta, rows, mix * size, "in_span")


def in_span_own(
    theta: Float[Tensor, " N"],
    reference: Float[Tensor, " N"],
    rows: Float[Tensor, "K N"],
    rank: int,
    generator: torch.Generator,
) -> Edit:
    """c3b: a random ``rank``-dimensional part of span(B), its own net movement undone."""
    frame = random_frame(len(rows), rank, generator).to(rows)
    return project_out(theta, reference, frame @ rows, control="in_span_own")


def set_gradient(theta: Float[Tensor, " N"], gradient: Float[Tensor, " N"], size: float) -> Edit | None:
    """c6: ascent along the unit gradient of a token set by ``size``; None at an exact minimum."""
    length = gradient.double().norm()
    if float(length) < 1e-12:
        return None
    unit = (gradient.double() / length).to(theta)
    return Edit(
        weights_fingerprint(theta), unit[None], torch.tensor([size], dtype=torch.float64), "set_gradient"
    )


def other_vectors(
    theta: Float[Tensor, " N"],
    reference: Float[Tensor, " N"],
    rows: Float[Tensor, "K N"],
    leave_out: Sequence[int],
) -> list[tuple[int, Edit]]:
    """c5: the net movement along every other basis vector undone, one at a time."""
    return [
        (index, project_out(theta, reference, rows[index : index + 1], vector=index))
        for index in range(len(rows))
        if index not in leave_out
    ]


def matched_damage(curve: NDArray[np.float64], wanted: float) -> tuple[Array, bool]:
    """c4: per-token damage of a dose curve where its mean over all tokens is ``wanted``.

    Linear between doses, zero at dose zero; the first crossing counts. If the curve never gets
    there, its largest mean is used and False is returned beside it.

    Args:
        curve: (doses, M) damage at :data:`CURVE` or other rising doses.
        wanted: mean damage over all M tokens, nats.
    """
    table = np.concatenate([np.zeros((1, curve.shape[1])), curve])
    means = table.mean(1)
    if wanted <= 0:
        return table[0], True
    above = np.flatnonzero(means >= wanted)
    if not len(above):
        return table[int(means.argmax())], False
    right = int(above[0])
    low, high = means[right - 1], means[right]
    part = (wanted - low) / (high - low)
    return table[right - 1] + part * (table[right] - table[right - 1]), True


def scale_to_damage(
    mean_damage: Callable[[float], float], wanted: float, *, start: float = 1.0, tolerance: float = 0.01
) -> float:
    """Dose at which the mean damage is ``wanted`` within a relative tolerance, by bisection.

    Raises:
        ValueError: if no dose up to 1000 times the start gets there.
    """
    low, high = 0.0, start
    while mean_damage(high) < wanted:
        low, high = high, 2 * high
        if high > 1000 * start:
            raise ValueError(f"a damage of {wanted:.3g} nats must be reachable, it is not; ask for less")
    for _ in range(60):
        middle = (low + high) / 2
        value = mean_damage(middle)
        if abs(value - wanted) <= tolerance * wanted:
            return middle
        low, high = (middle, high) if value < wanted else (low, middle)
    return (low + high) / 2


def sham_cluster(members: Bits, confounders: NDArray[np.float64]) -> Bits:
    """c9: as many tokens outside C as there are in C (or fewer), nearest in the confounders.

    Each sham token is used once. Columns are standardised.

    Args:
        members: (M,) C.
        confounders: (M, c) for example loss, position, frequency.
    """
    scaled = (confounders - confounders.mean(0)) / np.maximum(confounders.std(0), 1e-12)
    inside, outside = np.flatnonzero(members), np.flatnonzero(~members)
    sham = np.zeros_like(members)
    if not len(inside) or not len(outside):
        return sham
    near = min(len(outside), 50)
    order = (
        NearestNeighbors(n_neighbors=near)
        .fit(scaled[outside])
        .kneighbors(scaled[inside], return_distance=False)
    )
    for row in order:
        free = [outside[i] for i in row if not sham[outside[i]]]
        if free:
            sham[free[0]] = True
    return sham


def other_seed_move(
    theta: Float[Tensor, " N"], edit: Edit, foreign: Float[Tensor, "k N"], largest_cosine: float = 0.1
) -> Edit | None:
    """c9: the edit's coordinates along the vectors that another seed's run has in its place.

    Undoing this run's own movement along them would move hardly anything, so the coordinates are
    kept. Vectors that point the same way are no control.

    Args:
        theta: final weights.
        edit: made of this run's vectors.
        foreign: orthonormal rows from another run, one per coordinate.
        largest_cosine: between the two sets of rows.

    Returns:
        The control, or None where the two seeds' vectors are aligned.
    """
    if float((edit.rows.double() @ foreign.to(edit.rows).double().T).abs().max()) > largest_cosine:
        return None
    return displace(theta, foreign.to(edit.rows), edit.coordinates, "other_seed")


def sham_windows(
    moved: Array, window: tuple[int, int], acceleration: Array | None = None, tolerance: float = 0.1
) -> tuple[list[tuple[int, int]], bool]:
    """Windows of the same length, disjoint from the given one, with a like displacement.

    Args:
        moved: (T-1, k) or (T-1,) displacement along the rows in each interval.
        window: (first, last) checkpoint of the breakthrough window.
        acceleration: (T-1,) acceleration of the cluster; shams lie below its median.
        tolerance: relative difference of displacement allowed.

    Returns:
        The windows, and True if displacement matches within the tolerance; if none does, all
        disjoint windows are returned for rescaling and the flag is False.
    """
    steps = moved.reshape(len(moved), -1)
    first, last = window
    length = last - first
    size = float(np.linalg.norm(steps[first:last].sum(0)))
    candidates = [
        (s, s + length)
        for s in range(len(steps) - length + 1)
        if (s + length <= first or s >= last)
        and (acceleration is None or acceleration[s : s + length].mean() <= np.median(acceleration))
    ]
    alike = [
        (s, e)
        for s, e in candidates
        if abs(float(np.linalg.norm(steps[s:e].sum(0))) - size) <= tolerance * size
    ]
    return (alike, True) if alike else (candidates, False)


def describable_set(
    table: NDArray[np.float64], size: int, generator: np.random.Generator
) -> Callable[[NDArray[np.float64]], Bits]:
    """A random token set with a rule: the top share of a random mixture of input features.

    Args:
        table: (M, c) standardised features of the split the set is made on.
        size: tokens wanted there.
        generator: decides the mixture.

    Returns:
        Membership for any feature table, so that the set has a held-out counterpart (A9).
    """
    weights = generator.normal(size=table.shape[1])
    tie = generator.normal(size=table.shape[1]) * 1e-6
    cut = np.partition(table @ (weights + tie), -size)[-size]
    return lambda other: np.asarray(other @ (weights + tie) >= cut)


def feature_table(
    features: Mapping[str, NDArray[np.generic]], reference: Mapping[str, NDArray[np.generic]]
) -> NDArray[np.float64]:
    """Input features as standardised columns; categories of the reference become columns of their own."""
    columns = []
    for name, known in reference.items():
        values = features[name]
        levels = np.unique(known)
        if len(levels) <= 12 or known.dtype.kind in "USO":
            columns.extend([(values == level).astype(np.float64) for level in levels[:40]])
        else:
            scale = known.astype(np.float64)
            columns.append((values.astype(np.float64) - scale.mean()) / max(float(scale.std()), 1e-12))
    return np.stack(columns, axis=1)
