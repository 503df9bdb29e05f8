"""What an edit is compared with: random edits of its size, and directions of its span at its damage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from interventions.causal.statistics import Array, capped
from interventions.controls import ROOM, random_like
from interventions.damage import EvaluatedSplit
from interventions.edits import Edit
from polca_edit.derivatives.lanczos import orthonormalise

#: Step between two doses of a curve, and how many are tried at the most.
FACTOR, MOST = 2.0, 14


def total_share(change: Array, headroom: Array) -> float:
    """Share of all headroom that an edit takes, capped per token: what total damage means here."""
    return float(capped(change, headroom).sum() / np.maximum(headroom, 0.0).sum())


def matched_level(change: Array, headroom: Array) -> float:
    """Total share at which directions are compared with an edit.

    Where undoing a movement helps the other tokens on balance, its total says nothing about its size;
    what the losing tokens lose is matched instead.
    """
    total = total_share(change, headroom)
    return total if total > 0 else total_share(np.maximum(change, 0.0), headroom)


def random_changes(split: EvaluatedSplit, edit: Edit, draws: int, seed: int) -> NDArray[np.float64]:
    """(draws, M) damage of random edits with the norm, placement and spectrum of ``edit``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (random_like(split, edit, generator, space=split.loss.space) for _ in range(draws))
    found: NDArray[np.float64] = split.changes(drawn).numpy()
    return found


@dataclass(frozen=True)
class Curve:
    """Damage along one direction at rising doses.

    Attributes:
        doses: (D,) displacements, weight units.
        totals: (D,) total shares, made to rise.
        changes: (D, M) per-token damage, capped at each token's headroom, nats.
    """

    doses: Array
    totals: Array
    changes: NDArray[np.float64]

    def at(self, level: float) -> Array | None:
        """(M,) capped damage where the total share first is ``level``; None if it never is.

        Linear between doses and from nothing at dose zero; capped first, so that the total is met exactly.
        """
        reached = np.flatnonzero(self.totals >= level)
        if not len(reached):
            return None
        right = int(reached[0])
        low = 0.0 if right == 0 else float(self.totals[right - 1])
        before = np.zeros_like(self.changes[0]) if right == 0 else self.changes[right - 1]
        part = (level - low) / (float(self.totals[right]) - low)
        return np.asarray(before + part * (self.changes[right] - before))


@dataclass
class SpanPool:
    """Directions of one span: the axes of random rotations, each with its curve of damage.

    One pool serves every pair of a basis (S: directions of the same total damage) and the basis itself
    (P: rotated axes at the damages of its own axes).

    Attributes:
        split: tokens on which the pool is measured.
        rows: (K, N) orthonormal.
        rotations: how many are drawn.
        seed: of the draws.
        lowest: total share from which curves are measured; below it they are straight lines.
        highest: total share up to which they are measured.
        axes: (K, N) the basis's own axes where ``rows`` are others of the same span.
    """

    split: EvaluatedSplit
    rows: Float[Tensor, "K N"]
    rotations: int
    seed: int
    lowest: float = 0.01
    highest: float = 0.5
    axes: Float[Tensor, "K N"] | None = None
    frames: list[Tensor] = field(default_factory=list, repr=False)
    curves: list[list[Curve]] = field(default_factory=list, repr=False)

    @property
    def possible(self) -> bool:
        """Whether the span has room to rotate in."""
        return len(self.rows) >= 1 + ROOM and self.rotations > 0

    def fill(self, progress: Callable[[int], None] | None = None) -> None:
        """Measure every curve once; ``progress`` is told how many rotations are done."""
        if self.curves or not self.possible:
            return
        generator = torch.Generator().manual_seed(self.seed)
        count = len(self.rows)
        headroom = self.split.headroom.double().numpy()
        along = self.split.movement.along(self.rows)
        # A root mean square: the median is zero where most rows of a span never moved.
        start = max(float(along.norm()) / math.sqrt(count), 1e-12)
        for _ in range(self.rotations):
            frame = orthonormalise(torch.randn(count, count, generator=generator, dtype=torch.float64))
            # A frame that lost a row to rounding would be no rotation.
            assert len(frame) == count
            self.frames.append(frame)
            found = []
            for axis in frame:
                curve = self._curve(axis, float(torch.sign(axis @ along) or 1.0), start, headroom)
                start = float(curve.doses[0])
                found.append(curve)
            self.curves.append(found)
            if progress is not None:
                progress(len(self.curves))

    def _curve(self, axis: Tensor, sign: float, start: float, headroom: Array) -> Curve:
        """Doses from the last one below ``lowest`` to the first one above ``highest``."""
        row = (axis.to(self.rows) @ self.rows)[None]
        base = self.split.movement.base
        known: dict[float, tuple[float, Array]] = {}

        def measured(dose: float) -> float:
            edit = Edit(base, row, torch.tensor([-sign * dose], dtype=torch.float64), "in_span")
            change = self.split.changes([edit])[0].numpy()
            known[dose] = total_share(change, headroom), capped(change, headroom)
            return known[dose][0]

        dose = start
        level = measured(dose)
        while level > self.lowest and len(known) < MOST:
            dose /= FACTOR
            level = measured(dose)
        dose = max(known)
        level = known[dose][0]
        while level < self.highest and len(known) < MOST:
            dose *= FACTOR
            level = measured(dose)
        doses = sorted(known)
        totals = np.maximum.accumulate([known[d][0] for d in doses])
        return Curve(np.array(doses), totals, np.stack([known[d][1] for d in doses]))

    def matched(self, level: float) -> list[Array]:
        """Per-token damage of every direction of the pool at one total share; those that reach it."""
        found = (curve.at(level) for curves in self.curves for curve in curves)
        return [change for change in found if change is not None]

    def rotated(self, levels: Sequence[float]) -> list[list[Array]]:
        """Per rotation, the damage of each axis at the total share of the basis's own axis of that number."""
        result = []
        for curves in self.curves:
            changes = (c.at(level) for c, level in zip(curves, levels, strict=True) if level > 0)
            result.append([change for change in changes if change is not None])
        return result
