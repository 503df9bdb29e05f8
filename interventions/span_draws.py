"""Random directions of a span, drawn once and shared by every vector set that is compared with them.

A control draw does not depend on the pair: what depends on it is the size of the displacement (c3a),
read from one more forward pass, and the damage to be matched (c4), read from a curve over sizes. So
draw r is the same direction for all pairs of a run, and its dose curve is measured once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from interventions import controls
from interventions.edits import displace
from interventions.evidence import Bench
from interventions.statistics import Array


@dataclass
class SpanDraws:
    """Damage of random in-span edits, measured when first asked for.

    Attributes:
        bench: the split they are measured on.
        rows: (K, N) the span.
        sizes: displacements of the dose curves, ascending, weight units.
        seed: of the draws.
    """

    bench: Bench
    rows: Tensor
    sizes: Sequence[float]
    seed: int
    _mixes: list[Tensor] = field(default_factory=list, repr=False)
    _curves: dict[int, Array] = field(default_factory=dict, repr=False)
    _own: dict[tuple[int, int], Array] = field(default_factory=dict, repr=False)

    def _generator(self, draw: int, kind: int) -> torch.Generator:
        """Every draw has its own stream, so that it does not depend on which were asked for before."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + 2 * draw + kind)

    def direction(self, draw: int) -> Tensor:
        """(K,) unit coefficients of a uniformly random direction."""
        while len(self._mixes) <= draw:
            frame = controls.random_frame(len(self.rows), 1, self._generator(len(self._mixes), 0))
            self._mixes.append(frame[0])
        return self._mixes[draw]

    def at(self, draw: int, size: float) -> Array:
        """c3a: (M,) damage of the draw's direction displaced by ``size``."""
        mix = self.direction(draw)
        return self.bench.change(displace(self.bench.theta, self.rows, mix * size, "in_span"))

    def curve(self, draw: int) -> Array:
        """c4: (sizes, M) damage of the draw's direction at every size."""
        if draw not in self._curves:
            self._curves[draw] = np.stack([self.at(draw, size) for size in self.sizes])
        return self._curves[draw]

    def own(self, draw: int, rank: int) -> Array:
        """c3b: (M,) damage of undoing the own net movement of a random part of the span."""
        if (draw, rank) not in self._own:
            edit = controls.in_span_own(
                self.bench.theta, self.bench.reference, self.rows, rank, self._generator(draw, 1)
            )
            self._own[draw, rank] = self.bench.change(edit)
        return self._own[draw, rank]


def curve_sizes(sizes: Sequence[float]) -> tuple[float, ...]:
    """Doubling sizes from a quarter of the smallest displacement to at least four times the largest.

    For one displacement these are the doses of :data:`interventions.controls.CURVE`.

    >>> curve_sizes([2.0])
    (0.5, 1.0, 2.0, 4.0, 8.0)
    >>> curve_sizes([1.0, 3.0])
    (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    """
    moving = [size for size in sizes if size > 0] or [1.0]
    found = [min(moving) * controls.CURVE[0]]
    while found[-1] < max(moving) * controls.CURVE[-1] * (1 - 1e-9):
        found.append(2 * found[-1])
    return tuple(found)
