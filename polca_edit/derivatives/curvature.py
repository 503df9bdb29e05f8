"""Hessian-vector products over batches, with as many linearised batches kept as fit a budget."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polca_edit.derivatives.tracing import PointLinearization
from polca_edit.parameters import ParameterSpace


class BatchedProducts:
    """The sum over batches of linear maps (tangents -> one tensor per parameter).

    The first batch says what one linearisation keeps; of the others as many are kept as fit, and the rest
    are linearised anew for every product (streamed). The sum is the same in either case.

    Attributes:
        kept_bytes: what one linearised batch holds, as far as it can be counted.
        streamed: batches that are linearised for every product.
    """

    def __init__(self, linearise: Sequence[Callable[[], PointLinearization]], budget: int) -> None:
        """``budget`` is in bytes; one batch is always kept while it is used."""
        first = linearise[0]()
        self.kept_bytes = first.kept_bytes
        room = len(linearise) if not first.kept_bytes else max(0, budget // first.kept_bytes)
        # A streamed batch needs the room of one while it lives.
        keep = len(linearise) if room >= len(linearise) else max(0, room - 1)
        self.streamed = len(linearise) - keep
        self._kept = [first, *(make() for make in linearise[1:keep])] if keep else []
        self._rest = linearise[keep:]

    def __call__(self, tangents: Sequence[Tensor]) -> Tensor:
        """(N,) the flat sum over batches."""
        total: Tensor | None = None
        for linear in self._maps():
            part = torch.cat([each.reshape(-1) for each in linear(tangents)])
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _maps(self) -> Iterator[PointLinearization]:
        yield from self._kept
        for make in self._rest:
            yield make()


@dataclass(frozen=True)
class Chosen:
    """Parameters that are differentiated; the others are inputs like the tokens.

    Attributes:
        flags: per parameter of the space, whether it is chosen.
    """

    flags: tuple[bool, ...]

    @classmethod
    def of(cls, space: ParameterSpace, mask: Bool[Tensor, " N"] | None) -> Chosen:
        """Parameters of which the mask takes at least an entry; all without a mask."""
        if mask is None:
            return cls((True,) * len(space.names))
        return cls(tuple(bool(part.any()) for part in mask.split(list(space.sizes))))

    @property
    def name(self) -> str:
        """Tells one choice from another, in a word; empty for all."""
        if all(self.flags):
            return ""
        return hashlib.sha256(bytes(self.flags)).hexdigest()[:16]

    def parted(self, parts: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(chosen tensors, the others), in order."""
        pairs = list(zip(parts, self.flags, strict=True))
        return [p for p, chosen in pairs if chosen], [p for p, chosen in pairs if not chosen]

    def merged(self, moving: Sequence[Tensor], fixed: Sequence[Tensor]) -> list[Tensor]:
        """All tensors in the space's order."""
        one, other = iter(moving), iter(fixed)
        return [next(one) if chosen else next(other) for chosen in self.flags]

    def spread(self, flat: Float[Tensor, " n"], space: ParameterSpace) -> Float[Tensor, " N"]:
        """A flat vector of the chosen tensors as one of all, zero elsewhere."""
        if all(self.flags):
            return flat
        full, first = flat.new_zeros(space.size), 0
        for (start, stop), chosen in zip(space.offsets.values(), self.flags, strict=True):
            if chosen:
                full[start:stop] = flat[first : first + stop - start]
                first += stop - start
        return full
