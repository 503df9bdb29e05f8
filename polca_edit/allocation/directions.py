"""Directions that are wanted at a checkpoint: per basis its rows and the residuals of two intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from polca_edit.basis.record import Basis
from polca_edit.basis.subsets import Directions, Group, Subset, taken
from polca_edit.checkpoints.series import Checkpoints


def directions_at(
    checkpoints: Checkpoints,
    bases: Sequence[Basis],
    index: int,
    chosen: range | None = None,
    *,
    block: Subset | None = None,
    along: Sequence[Float[Tensor, "2 _"]] | None = None,
) -> tuple[Float[Tensor, " N"], Directions]:
    """Weights at one checkpoint and the directions wanted there: per basis its rows and two residuals.

    The rows of a basis are a group of their own and are not copied, unless they are cut off by a block or
    stored in fewer bits; memory is made for residuals.

    Args:
        checkpoints: the series.
        bases: whose directions.
        index: of the checkpoint.
        chosen: which of the directions; only those are made. Default all.
        block: entries beyond which directions are cut off, so that only their part of the rows is read.
        along: per basis the coordinates of the displacement that leads here and of the one that leads away,
            which give the residuals inside a block.

    Raises:
        ValueError: for a block without these coordinates: its part of the rows cannot give them.
    """
    if block is not None and along is None:
        raise ValueError(
            "directions in a block of parameters need the coordinates of the displacements; pass along="
        )
    theta = checkpoints[index]
    sources = [(number, own) for number, basis in enumerate(bases) for own in range(len(basis) + 2)]
    chosen = range(len(sources)) if chosen is None else chosen
    # One group of residuals, and one a basis: rows of several cannot be one table without a copy.
    members: dict[tuple[int | None, Subset | None], list[int]] = {}
    for place in chosen:
        number, own = sources[place]
        whose = number if own < len(bases[number]) else None
        members.setdefault((whose, _inside(bases[number], own, block)), []).append(place)
    groups = []
    for (whose, inside), own_places in members.items():
        if inside is not None and not inside.ranges:
            continue  # a basis without an entry in this block
        places = tuple(place - chosen.start for place in own_places)
        owns = [sources[place][1] for place in own_places]
        if whose is not None and block is None:
            rows = bases[whose].entries[owns[0] : owns[-1] + 1].to(theta.dtype)
            groups.append(Group(inside, places, rows))
            continue
        rows = theta.new_empty(len(owns), theta.numel() if inside is None else inside.count)
        for row, place in zip(rows, own_places, strict=True):
            number, own = sources[place]
            cut = None if block is None or along is None else (block, along[number])
            _copy_direction(row, bases[number], own, inside, partial(displacement, checkpoints, index), cut)
        groups.append(Group(inside, places, rows))
    if not groups:
        groups.append(Group(None, (), theta.new_empty(0, theta.numel())))
    return theta, Directions(len(chosen), tuple(groups))


def _inside(basis: Basis, own: int, block: Subset | None) -> Subset | None:
    """Entries in which a direction of a basis lies; a residual is cut off by the block alone."""
    if own >= len(basis) or basis.inside is None:
        return block
    return basis.inside.common(block)


def _entries(basis: Basis, own: int, inside: Subset | None) -> Float[Tensor, " n"]:
    """Entries of one row in a part of those that the basis holds."""
    row = basis.entries[own]
    return row if inside is None else inside.take(row, basis.inside)


def _copy_direction(
    row: Float[Tensor, " n"],
    basis: Basis,
    own: int,
    inside: Subset | None,
    moved: Callable[[int], Tensor],
    cut: tuple[Subset, Float[Tensor, "2 _"]] | None,
) -> None:
    """A direction of a basis inside some entries, written into ``row``.

    Args:
        row: where to.
        basis: whose.
        own: number of the vector, or of the residual behind them.
        inside: entries; None for all.
        moved: side -> displacement on that side of the checkpoint.
        cut: block of parameters and the displacements' coordinates, where there is one.
    """
    side = own - len(basis)
    if side < 0:
        row.copy_(_entries(basis, own, inside))
    elif cut is None:
        row.copy_(taken(basis.remainder(moved(side)), inside))
    else:
        _copy_remainder(row, basis, cut[0], cut[0].take(moved(side)), cut[1][side])


def _copy_remainder(
    row: Float[Tensor, " n"],
    basis: Basis,
    block: Subset,
    moved: Float[Tensor, " n"],
    along: Float[Tensor, " K"],
) -> None:
    """(I - B'B) moved inside a block, from the coordinates B moved, written into ``row``.

    Vector after vector and entry by entry, so that the bytes do not depend on how the rows lie in memory.
    """
    row.copy_(moved)
    common = _inside(basis, 0, block) if len(basis) else block
    assert common is not None
    for own, size in enumerate(along.to(row)):
        mine, first = _entries(basis, own, common).to(row), 0
        for start, stop in common.places(block):
            row[start:stop] -= size * mine[first : first + stop - start]
            first += stop - start


def displacement(checkpoints: Checkpoints, index: int, side: int) -> Float[Tensor, " N"]:
    """The displacement that leads to a checkpoint (side 0) or away from it (1); zero beyond the ends."""
    theta, other = checkpoints[index], index - 1 + 2 * side
    if not 0 <= other < len(checkpoints):
        return torch.zeros_like(theta)
    return theta - checkpoints[other] if side == 0 else checkpoints[other] - theta


def with_remainders(bases: Sequence[Basis], moved: Float[Tensor, " N"]) -> Directions:
    """The rows of every basis, each followed by what the basis leaves of a displacement."""
    groups, ends, first = [], [], 0
    for basis in bases:
        groups.append(Group(basis.inside, tuple(range(first, first + len(basis))), basis.wide()))
        first += len(basis) + 1
        ends.append(first - 1)
    groups.append(Group(None, tuple(ends), torch.stack([basis.remainder(moved) for basis in bases])))
    return Directions(first, tuple(groups))
