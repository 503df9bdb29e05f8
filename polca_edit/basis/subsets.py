"""Some entries of the flat weight vector, stored and differentiated without the others.

A basis that is confined to a few tensors has n of N entries that are not zero: its rows are held as
(K, n), and derivatives along them go through those tensors alone. The same record cuts all weights into
blocks, one for each task of a cluster: <b, g> is the sum over blocks of their own products.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polca_edit.parameters import ParameterSpace

Range = tuple[int, int]


@dataclass(frozen=True)
class Subset:
    """Entries of a flat vector of N, in its order.

    >>> some = Subset(6, ((1, 3), (5, 6)))
    >>> some.count, some.take(torch.arange(6)).tolist(), some.spread(torch.ones(3)).tolist()
    (3, [1, 2, 5], [0.0, 1.0, 1.0, 0.0, 0.0, 1.0])

    Attributes:
        size: N.
        ranges: [start, stop) of each run of entries, ascending, with a gap between any two.
    """

    size: int
    ranges: tuple[Range, ...]

    @classmethod
    def of_mask(cls, mask: Bool[Tensor, " N"]) -> Subset:
        """The entries where a mask is true."""
        turns = torch.cat([mask.new_zeros(1), mask, mask.new_zeros(1)]).int().diff().nonzero()[:, 0]
        return cls(len(mask), tuple((int(a), int(b)) for a, b in turns.view(-1, 2)))

    @classmethod
    def of_tensor(cls, size: int, ranges: Int[Tensor, "r 2"]) -> Subset:
        """The record from its stored ranges.

        Raises:
            ValueError: for ranges that are empty, out of order or beyond N.
        """
        flat = ranges.flatten().tolist()
        if flat != sorted(set(flat)) or min(flat, default=0) < 0 or max(flat, default=0) > size:
            raise ValueError(
                f"ranges of entries must ascend within {size}, got {flat[:6]}; make the basis again"
            )
        return cls(size, tuple(zip(flat[::2], flat[1::2], strict=True)))

    @property
    def count(self) -> int:
        """n, how many entries."""
        return sum(stop - start for start, stop in self.ranges)

    def tensor(self) -> Int[Tensor, "r 2"]:
        """The ranges as they are stored."""
        return torch.tensor(self.ranges, dtype=torch.int64).view(-1, 2)

    def mask(self) -> Bool[Tensor, " N"]:
        """True on the entries."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        for start, stop in self.ranges:
            mask[start:stop] = True
        return mask

    def common(self, other: Subset | None) -> Subset:
        """Entries of both; None stands for all.

        >>> Subset(9, ((0, 4), (6, 9))).common(Subset(9, ((2, 7),))).ranges
        ((2, 4), (6, 7))
        """
        if other is None or other == self:
            return self
        found: list[Range] = []
        mine, theirs = list(self.ranges), list(other.ranges)
        while mine and theirs:
            start, stop = max(mine[0][0], theirs[0][0]), min(mine[0][1], theirs[0][1])
            if start < stop:
                found.append((start, stop))
            (mine if mine[0][1] <= theirs[0][1] else theirs).pop(0)
        return Subset(self.size, tuple(found))

    def places(self, outer: Subset | None = None) -> list[Range]:
        """Where the runs lie among the entries of a subset that holds them all, by default in the vector.

        >>> Subset(9, ((2, 4), (6, 7))).places(Subset(9, ((2, 7),)))
        [(0, 2), (4, 5)]
        """
        if outer is None:
            return list(self.ranges)
        found, first, rest = [], 0, iter(self.ranges)
        inner = next(rest, None)
        for start, stop in outer.ranges:
            while inner is not None and inner[1] <= stop:
                found.append((first + inner[0] - start, first + inner[1] - start))
                inner = next(rest, None)
            first += stop - start
        return found

    def take(self, values: Tensor, outer: Subset | None = None) -> Tensor:
        """(..., n) the entries of (..., N), or of what another subset holds of it; one run is a view."""
        parts = [values[..., start:stop] for start, stop in self.places(outer)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim=-1) if parts else values[..., :0]

    def spread(self, entries: Float[Tensor, "*lead n"]) -> Float[Tensor, "*lead N"]:
        """The same entries in whole vectors, zero elsewhere."""
        whole = entries.new_zeros(*entries.shape[:-1], self.size)
        first = 0
        for start, stop in self.ranges:
            whole[..., start:stop] = entries[..., first : first + stop - start]
            first += stop - start
        return whole


def taken(values: Tensor, subset: Subset | None) -> Tensor:
    """Entries of (..., N) that a subset holds; all of them, uncopied, for None."""
    return values if subset is None else subset.take(values)


def blocks_of(space: ParameterSpace, entries: int | None) -> list[Subset | None]:
    """All weights in blocks of whole tensors, each of at most ``entries`` unless one tensor has more.

    >>> space = ParameterSpace(("a", "b", "c"), ((3,), (2,), (4,)), ())
    >>> [block.ranges for block in blocks_of(space, 5)], blocks_of(space, None)
    ([((0, 5),), ((5, 9),)], [None])

    Raises:
        ValueError: for a size below one.
    """
    if entries is not None and entries < 1:
        raise ValueError(f"a block of parameters must have at least 1 entry, got {entries}")
    if entries is None or space.size <= entries:
        return [None]
    cuts = [0]
    for start, stop in space.offsets.values():
        if stop - cuts[-1] > entries and start > cuts[-1]:
            cuts.append(start)
    ends = [*cuts[1:], space.size]
    return [Subset(space.size, (pair,)) for pair in zip(cuts, ends, strict=True)]


# -- directions, and the tensors they move -----------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """Tensors in which a subset has entries: they are differentiated, the others are inputs like the tokens.

    Attributes:
        space: names and shapes.
        subset: the entries; None for all.
    """

    space: ParameterSpace
    subset: Subset | None = None

    @cached_property
    def runs(self) -> tuple[tuple[tuple[int, int, int], ...], ...]:
        """Per tensor its runs of entries: start and stop inside it, and place among the subset's."""
        found: list[list[tuple[int, int, int]]] = [[] for _ in self.space.names]
        bounds, first = list(self.space.offsets.values()), 0
        number = 0
        for start, stop in self.subset.ranges if self.subset is not None else ((0, self.space.size),):
            place = start
            while place < stop:
                while bounds[number][1] <= place:
                    number += 1
                end = min(stop, bounds[number][1])
                found[number].append((place - bounds[number][0], end - bounds[number][0], first))
                first += end - place
                place = end
        return tuple(tuple(runs) for runs in found)

    @cached_property
    def flags(self) -> tuple[bool, ...]:
        """Per tensor of the space, whether it is chosen."""
        return tuple(bool(runs) for runs in self.runs)

    @property
    def names(self) -> list[str]:
        """Names of the chosen tensors, in order."""
        return [name for name, flag in zip(self.space.names, self.flags, strict=True) if flag]

    @property
    def name(self) -> str:
        """Tells one choice of tensors from another, in a word; empty for all."""
        return "" if all(self.flags) else hashlib.sha256(bytes(self.flags)).hexdigest()[:16]

    def parted(self, parts: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(chosen tensors, the others), in order."""
        pairs = list(zip(parts, self.flags, strict=True))
        return [p for p, chosen in pairs if chosen], [p for p, chosen in pairs if not chosen]

    def merged(self, moving: Sequence[Tensor], fixed: Sequence[Tensor]) -> list[Tensor]:
        """All tensors in the space's order."""
        one, other = iter(moving), iter(fixed)
        return [next(one) if chosen else next(other) for chosen in self.flags]

    def _chosen(self) -> Iterator[tuple[tuple[tuple[int, int, int], ...], int, tuple[int, ...]]]:
        for runs, size, shape in zip(self.runs, self.space.sizes, self.space.shapes, strict=True):
            if runs:
                yield runs, size, shape

    def tangents(self, entries: Float[Tensor, "*lead n"], *, apart: bool = True) -> list[Tensor]:
        """Per chosen tensor (..., *shape) of the entries, zero where none is.

        Each is in its own storage, or with ``apart=False`` a view where the tensor has all its entries.
        """
        lead, found = entries.shape[:-1], []
        for runs, size, shape in self._chosen():
            if runs[0][:2] == (0, size):
                first = runs[0][2]
                part = entries[..., first : first + size]
                part = part.clone(memory_format=torch.contiguous_format) if apart else part
            else:
                part = entries.new_zeros(*lead, size)
                for start, stop, first in runs:
                    part[..., start:stop] = entries[..., first : first + stop - start]
            found.append(part.reshape(*lead, *shape))
        return found

    def entries(self, flat: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
        """The subset's entries of the chosen tensors, which come flat one after the other."""
        parts, first = [], 0
        for runs, size, _ in self._chosen():
            parts += [flat[first + start : first + stop] for start, stop, _ in runs]
            first += size
        return flat if sum(map(len, parts)) == len(flat) else torch.cat(parts)


@dataclass(frozen=True)
class Group:
    """Directions that lie in the same entries.

    Attributes:
        inside: those entries; None for all.
        places: number of each direction among all.
        rows: (k, n) their entries.
    """

    inside: Subset | None
    places: tuple[int, ...]
    rows: Float[Tensor, "k n"]


@dataclass(frozen=True)
class Directions:
    """Directions in weight space, grouped by the entries they lie in.

    Attributes:
        count: R, how many.
        groups: each direction is in one; those in none are zero.
    """

    count: int
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, rows: Float[Tensor, "R n"] | Directions, inside: Subset | None = None) -> Directions:
        """Rows of one group; directions stay what they are."""
        if isinstance(rows, Directions):
            return rows
        return cls(len(rows), (Group(inside, tuple(range(len(rows))), rows),))

    def __len__(self) -> int:
        return self.count

    @property
    def moving(self) -> int:
        """How many are in a group."""
        return sum(len(group.places) for group in self.groups)

    def joined(self, parts: Sequence[Tensor], like: Float[Tensor, " M"]) -> Float[Tensor, "R M"]:
        """What was found for every group (k, M), in the order of the directions."""
        if len(self.groups) == 1 and len(self.groups[0].places) == self.count:
            return parts[0]
        whole = like.new_zeros(self.count, len(like))
        for group, part in zip(self.groups, parts, strict=True):
            whole[list(group.places)] = part
        return whole

    def whole(self, size: int) -> Float[Tensor, "R N"]:
        """Every direction as a whole vector of N entries, for small problems and comparisons."""
        like = self.groups[0].rows
        found = like.new_zeros(self.count, size)
        for group in self.groups:
            rows = group.rows if group.inside is None else group.inside.spread(group.rows)
            found[list(group.places)] = rows
        return found


@dataclass(frozen=True)
class NamedDirections:
    """Directions tensor by tensor: each tensor has those that move it.

    Attributes:
        count: R, how many there are.
        rows: canonical name -> tables (k_i, *shape) of those that move the tensor, one a group, so that rows
            which lie apart are not copied together; tensors that none moves are absent.
        places: canonical name -> (k,) their numbers among all, group after group; None: all of them move
            every tensor, in order.
    """

    count: int
    rows: Mapping[str, tuple[Tensor, ...]]
    places: Mapping[str, Int[Tensor, " k"]] | None = None

    @classmethod
    def of(
        cls, given: Directions, space: ParameterSpace, placed: Callable[[Tensor], Tensor]
    ) -> NamedDirections:
        """From groups of rows, each moved to where it is wanted by ``placed``."""
        rows: dict[str, tuple[Tensor, ...]] = {}
        numbers: dict[str, tuple[int, ...]] = {}
        for group in given.groups:
            near = placed(group.rows)
            if group.inside is None:
                named = space.unflatten(near)
            else:
                chosen = Chosen(space, group.inside)
                named = dict(zip(chosen.names, chosen.tangents(near), strict=True))
            for name, part in named.items():
                rows[name] = (*rows.get(name, ()), part)
                numbers[name] = (*numbers.get(name, ()), *group.places)
        everything = tuple(range(given.count))
        if len(numbers) == len(space.names) and all(own == everything for own in numbers.values()):
            return cls(given.count, rows)
        device = next(part.device for parts in rows.values() for part in parts)
        return cls(
            given.count,
            rows,
            {name: torch.tensor(own, device=device) for name, own in numbers.items()},
        )
