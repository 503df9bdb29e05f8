"""Hessian-vector products over batches, with as many linearised batches kept as fit a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polca_edit.basis.subsets import Chosen
from polca_edit.derivatives.batches import Batch
from polca_edit.derivatives.routes import Routes
from polca_edit.derivatives.tracing import PointLinearization

#: What a traced batch holds, in multiples of what reverse mode keeps of it (3.3 to 4.9 at Pythia shapes of 14
#: and 70 million), and what a product under way takes beside the linearised batches, in batches (0 to 0.9).
TRACED_BYTES, UNDER_WAY = 4, 1


@dataclass(frozen=True)
class CurvatureWork:
    """How a sample is cut up for products with a Hessian.

    Attributes:
        size: sequences of a batch.
        batches: how many.
        fits: whether all of them may stay linearised by a trace. Where they may not, a trace saves nothing:
            it would be run anew for every product (Pythia shapes: as long as reverse mode or longer).
        sequence_bytes: what reverse mode keeps of a sequence.
    """

    size: int
    batches: int
    fits: bool
    sequence_bytes: float

    @classmethod
    def of(
        cls, sequences: int, most: int, sequence_bytes: float, budget: int, traced: bool = False
    ) -> CurvatureWork:
        """The largest batches that keep to a budget.

        Args:
            sequences: of the sample.
            most: sequences of a batch at most.
            sequence_bytes: what reverse mode keeps of one, 0 where nothing is known.
            budget: bytes for linearised batches and the product under way; one sequence is taken in any case.
            traced: whether a trace is asked for, fit or not.

        >>> CurvatureWork.of(sequences=96, most=32, sequence_bytes=1e8, budget=10**9)
        CurvatureWork(size=5, batches=20, fits=False, sequence_bytes=100000000.0)
        >>> CurvatureWork.of(sequences=96, most=32, sequence_bytes=1e6, budget=10**9)
        CurvatureWork(size=32, batches=3, fits=True, sequence_bytes=1000000.0)
        """
        size = min(most, sequences)
        if sequence_bytes:
            each = sequence_bytes * (TRACED_BYTES if traced else 1)
            size = max(1, min(size, int(budget // ((1 + UNDER_WAY) * each))))
        batches = -(-sequences // size)
        held = (batches + UNDER_WAY) * size * TRACED_BYTES * sequence_bytes
        return cls(size, batches, held <= budget, sequence_bytes)

    def passes(self, expected: int) -> int:
        """Batches that a trace would serve through ``expected`` products; none where they cannot stay."""
        return expected * self.batches if self.fits else 0


def linearised_batches(
    losses: Callable[..., Tensor],
    routes: Routes,
    chosen: Chosen,
    at: Callable[..., list[Tensor]],
    passes: int,
) -> Callable[[Batch, Tensor], PointLinearization]:
    """(batch, weights of its slots' losses) -> tangents of the chosen tensors -> Hessian times tangents.

    Args:
        losses: (weights, *given) -> losses of a batch's slots.
        routes: by which they are differentiated.
        chosen: the tensors that are.
        at: the weights of all tensors, with storages of their own or, for ``apart=False``, views.
        passes: as in :meth:`~polca_edit.derivatives.routes.Routes.for_curvature`.
    """
    # Reverse mode can do with views of theta; forward mode would make tangents of its length.
    moving, fixed = chosen.parted(at(apart=routes.for_curvature(passes) != "double_backward"))

    def loss(point: Sequence[Tensor], given: Sequence[Tensor]) -> Tensor:
        whole = chosen.merged(point, given[: len(fixed)])
        return (losses(whole, *given[len(fixed) : -1]) * given[-1]).sum()

    def linearise(batch: Batch, each: Tensor) -> PointLinearization:
        with torch.no_grad():
            return routes.curvature(loss, passes, moving, [*fixed, *batch.given, each], chosen.name)

    return linearise


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
        room = len(linearise)
        if first.kept_bytes:
            room = max(0, budget // first.kept_bytes - UNDER_WAY)
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
