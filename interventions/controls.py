"""Controls: edits matched to another in norm, rank, placement, spectrum or damage, of the wrong direction.

Each takes away another explanation: size (isotropic), where in the network (placement), the spectrum of
the weight matrices, the training subspace (span), total damage. Every control is an :class:`Edit`, so it
goes through the same code as what it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from interventions.edits import Edit, Place, Rows, displace, from_delta, movement_of, project_out, rows_of
from polca_edit.derivatives.lanczos import lengths, orthonormalise
from polca_edit.parameters import ParameterSpace

#: Dimensions that a span needs beyond its rank for a rotation inside it to be a control.
ROOM = 4

Kind = Literal["isotropic", "placement", "spectrum", "span"]


def random_like(
    place: Place,
    edit: Edit,
    generator: torch.Generator,
    *,
    kind: Kind = "spectrum",
    space: ParameterSpace | None = None,
    rows: Rows | None = None,
) -> Edit:
    """A random edit of the same weights with the norm of ``edit``.

    Args:
        place: whose weights are edited.
        edit: what is matched.
        generator: of the draws.
        kind: ``isotropic`` (any direction of weight space), ``placement`` (the norm in every tensor is kept),
            ``spectrum`` (of every matrix the singular values too), ``span`` (inside the rows given).
        space: parameters, for placement and spectrum.
        rows: (K, N) orthonormal, for the span.

    Raises:
        ValueError: where the kind needs a space or rows that were not given.

    >>> import torch
    >>> from interventions.edits import Movement
    >>> movement = Movement(torch.ones(3), torch.zeros(3))
    >>> edit = project_out(movement, torch.tensor([[1.0, 0.0, 0.0]]))
    >>> drawn = random_like(movement, edit, torch.Generator().manual_seed(0), kind="isotropic")
    >>> round(drawn.norm, 6)
    1.0
    """
    movement = movement_of(place)
    if kind == "isotropic":
        row = torch.randn(1, movement.theta.shape[0], generator=generator, dtype=movement.theta.dtype)
        return displace(movement, orthonormalise(row), [edit.norm], "isotropic")
    if kind == "span":
        if rows is None:
            raise ValueError("a random edit inside a span needs the span's rows, got none; pass rows=basis")
        inside = rows_of(rows)
        frame = random_frame(len(inside), 1, generator).to(inside)
        return displace(movement, frame @ inside, [edit.norm], "in_span")
    if space is None:
        raise ValueError(
            f"a random edit of kind '{kind}' needs the parameter space, got none; pass space=loss.space"
        )
    draw = _placed if kind == "placement" else _with_spectrum
    moved = edit.delta().to(movement.theta)
    return from_delta(edit.base, draw(moved, space, generator), f"same_{kind}")


def _placed(moved: Tensor, space: ParameterSpace, generator: torch.Generator) -> Float[Tensor, " N"]:
    drawn = torch.randn(moved.shape[0], generator=generator, dtype=moved.dtype)
    for start, stop in space.offsets.values():
        part = drawn[start:stop]
        part.mul_(_ratio(moved[start:stop], part))
    return drawn


def _ratio(wanted: Tensor, drawn: Tensor) -> float:
    """What drawn entries are multiplied with to get a wanted norm."""
    size, own = (float(lengths(each.reshape(1, -1))) for each in (wanted, drawn))
    return size / max(own, 1e-30)


def _with_spectrum(moved: Tensor, space: ParameterSpace, generator: torch.Generator) -> Float[Tensor, " N"]:
    """Every matrix block U S V with random orthogonal U, V; other blocks keep their norm alone."""

    def rotation(size: int, rank: int) -> Tensor:
        drawn = torch.randn(size, rank, generator=generator, dtype=moved.dtype)
        found: Tensor = torch.linalg.qr(drawn)[0]
        return found

    pieces = []
    for block in space.unflatten(moved).values():
        if block.ndim != 2:
            drawn = torch.randn(block.shape, generator=generator, dtype=moved.dtype)
            pieces.append((drawn * _ratio(block, drawn)).reshape(-1))
            continue
        values = torch.linalg.svdvals(block)
        left, right = rotation(block.shape[0], len(values)), rotation(block.shape[1], len(values))
        pieces.append(((left * values) @ right.T).reshape(-1))
    return torch.cat(pieces)


def carrying_frame(
    rows: Float[Tensor, "r N"], movement: Float[Tensor, " N"], generator: torch.Generator
) -> Float[Tensor, "r N"]:
    """Random orthonormal directions outside a span along which a movement has the coordinates it has inside.

    A direction drawn in weight space carries next to nothing of training, so that holding it still says
    little. These carry as much of the movement as the directions they stand for, row by row, and share
    none of them. Where more than half of the squared movement lies in the span, what is left outside
    cannot carry as much; they carry all of it then.

    Args:
        rows: (r, N) orthonormal: what the frame is matched to.
        movement: of the whole training, or of a window.
        generator: of the draws.

    Raises:
        ValueError: for a span that leaves no room for as many directions beside it.

    >>> import torch
    >>> rows, movement = torch.eye(6)[:2], torch.tensor([3.0, 4.0, 9.0, 9.0, 9.0, 9.0])
    >>> frame = carrying_frame(rows, movement, torch.Generator().manual_seed(0))
    >>> [round(float(x), 4) for x in frame @ movement]
    [3.0, 4.0]
    """
    rank, size = rows.shape
    if size < 2 * rank + 1:
        raise ValueError(
            f"a frame beside {rank} directions needs at least {2 * rank + 1} weights, got {size}; "
            "hold fewer directions"
        )
    exact = rows.double()
    inside = exact @ movement.double()
    outside = movement.double() - inside @ exact
    moved, left = float(inside.norm()), float(outside.norm())
    drawn = torch.randn(rank, size, generator=generator, dtype=torch.float64)
    beside = torch.cat([exact, outside[None]]) if left > 0 else exact
    frame = orthonormalise(torch.cat([beside, drawn]))[-rank:]
    if moved == 0 or left == 0:
        return frame.to(rows)
    # The frame's own direction of the wanted coordinates is tilted towards the movement outside the span.
    wanted, cosine = inside / moved, min(1.0, moved / left)
    own = wanted @ frame
    tilted = cosine * outside / left + (1 - cosine**2) ** 0.5 * own
    return (frame + torch.outer(wanted, tilted - own)).to(rows)


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


def own_movement_in_span(place: Place, rows: Rows, rank: int, generator: torch.Generator) -> Edit:
    """A random ``rank``-dimensional part of a span, its own recorded movement undone."""
    inside = rows_of(rows)
    frame = random_frame(len(inside), rank, generator).to(inside)
    return project_out(place, frame @ inside, control="own_movement_in_span")


def scale_to_damage(
    damage: Callable[[float], float], wanted: float, *, start: float = 1.0, tolerance: float = 0.01
) -> float:
    """Dose at which a damage is ``wanted`` within a relative tolerance, by doubling and bisection.

    Args:
        damage: dose -> damage, zero at dose zero.
        wanted: positive.
        start: first dose tried.
        tolerance: relative.

    Raises:
        ValueError: if no dose up to 1000 times the start gets there.
    """
    low, high = 0.0, start
    while damage(high) < wanted:
        low, high = high, 2 * high
        if high > 1000 * start:
            raise ValueError(f"a damage of {wanted:.3g} nats must be reachable, it is not; ask for less")
    for _ in range(60):
        middle = (low + high) / 2
        value = damage(middle)
        if abs(value - wanted) <= tolerance * wanted:
            return middle
        low, high = (middle, high) if value < wanted else (low, middle)
    return (low + high) / 2


def describable_set(
    table: NDArray[np.float64],
    size: int,
    generator: np.random.Generator,
    within: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """A random token set with a rule: the top of a random mixture of input features.

    Args:
        table: (M, c) standardised features (:func:`feature_table`).
        size: tokens wanted.
        generator: decides the mixture.
        within: (M,) tokens that the set is taken from; all by default.
    """
    weights = generator.normal(size=table.shape[1])
    tie = generator.normal(size=len(table)) * 1e-6
    score = table @ weights + tie
    if within is not None:
        score = np.where(within, score, -np.inf)
    cut = np.partition(score, -size)[-size]
    return np.asarray(score >= cut)


def feature_table(features: Mapping[str, NDArray[np.generic]]) -> NDArray[np.float64]:
    """Input features as standardised columns; a category becomes a column of its own.

    Args:
        features: name -> (M,) values that no loss went into.

    Raises:
        ValueError: if there are none.
    """
    if not features:
        raise ValueError("describable token sets need token features, got none; fill TokenSet.features")
    columns = []
    for known in features.values():
        levels, counts = np.unique(known, return_counts=True)
        if len(levels) <= 12 or known.dtype.kind in "USO":
            common = levels[np.argsort(-counts, kind="stable")[:40]]
            columns.extend([(known == level).astype(np.float64) for level in common])
        else:
            scale = known.astype(np.float64)
            columns.append((scale - scale.mean()) / max(float(scale.std()), 1e-12))
    return np.stack(columns, axis=1)


def mask_of(mask: NDArray[np.bool_]) -> Bool[Tensor, " M"]:
    """A torch mask of a numpy one."""
    return torch.from_numpy(np.ascontiguousarray(mask))
