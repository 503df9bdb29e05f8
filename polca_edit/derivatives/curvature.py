"""Hessian-vector products over batches, with as many linearised batches kept as fit a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from polca_edit.derivatives.tracing import PointLinearization


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
            parts = linear(tangents)
            if total is None:
                total = torch.cat([each.reshape(-1) for each in parts])
            else:
                sizes = [each.numel() for each in parts]
                for mine, each in zip(total.split(sizes), parts, strict=True):
                    mine.add_(each.reshape(-1))
            del parts  # gradients of this batch do not lie beside those of the next
        assert total is not None
        return total

    def _maps(self) -> Iterator[PointLinearization]:
        yield from self._kept
        for make in self._rest:
            yield make()
