"""When an axis moves and where in the model its effect sits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interventions.causal.statistics import Array, Bits, Interval, Units, draw_units
from interventions.damage import EvaluatedSplit
from interventions.discovery.windows import Window, equal_windows, reached
from interventions.edits import Movement, rollback
from interventions.localise import Component, localise
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import coordinates


@dataclass(frozen=True)
class WhenWhere:
    """An axis over training and over the parts of the model.

    Attributes:
        steps: (T,) optimiser steps.
        coordinate: (T,) <u, theta_t - theta_start>, weight units.
        losses: (T,) mean loss of the target, nats per token.
        moved_at: step at which half of the net movement along the axis is done.
        learned_at: step at which half of the target's fall is done, over resampled documents.
        lag: moved_at less learned_at, steps; positive where the axis moves after the skill is learned.
        windows: window -> share of the target lost when only that window's movement along the axis is undone.
        parts: (layer, component) -> its damage over the sum of all parts' positive damages.
        additive_gap: damage of the whole edit less the sum over the parts, nats.
    """

    steps: tuple[int, ...]
    coordinate: tuple[float, ...]
    losses: tuple[float, ...]
    moved_at: int | None
    learned_at: Interval
    lag: Interval
    windows: Mapping[str, float]
    parts: Mapping[str, float]
    additive_gap: float

    @property
    def peak(self) -> str:
        """The window that takes most of the target along the axis; empty without windows."""
        return max(self.windows, key=lambda name: self.windows[name], default="")

    @property
    def place(self) -> str:
        """The part of the model that holds most of the effect; empty without parts."""
        return max(self.parts, key=lambda name: self.parts[name], default="")


def paths(series: Checkpoints, rows: Float[Tensor, "k N"]) -> Float[Tensor, "T k"]:
    """Coordinates along several axes at every checkpoint, which is read once."""
    return torch.stack([coordinates(rows, series[index]) for index in range(len(series))])


def half_way(steps: Sequence[int], path: Array) -> int | None:
    """First step at which half of a path's net change is done; None where there is none.

    >>> half_way([0, 10, 20], np.array([0.0, -3.0, -4.0]))
    10
    """
    net = float(path[-1] - path[0])
    if net == 0:
        return None
    return int(steps[int(np.flatnonzero((path - path[0]) / net >= 0.5)[0])])


def when_and_where(
    split: EvaluatedSplit,
    row: Float[Tensor, " N"],
    members: Bool[Tensor, " M"],
    parts: Sequence[Component] = (),
    *,
    losses: Float[Tensor, "T M"] | None = None,
    path: Float[Tensor, " T"] | None = None,
    windows: int = 10,
    resamples: int = 400,
) -> WhenWhere:
    """Follow an axis through training, and cut its edit by time and by place.

    Args:
        split: final model and tokens.
        row: (N,) unit vector.
        members: (M,) target.
        parts: disjoint parts of the parameters (:func:`interventions.localise.components`, or heads).
        losses: exact losses at every checkpoint where they are known; else one forward pass each.
        path: coordinate along the axis at every checkpoint (:func:`paths`) where it is known.
        windows: equal pieces of training whose movement along the axis is undone alone.
        resamples: document bootstrap of the step at which the target is learned.
    """
    series, rows = split.series, row[None]
    if path is None:
        path = paths(series, rows)[:, 0]
    if losses is None:
        losses = torch.stack([split.loss.losses(series[i], split.tokens) for i in range(len(series))])
    table, along = losses.double().numpy(), path.double().numpy()
    along = along - along[0]
    mask = members.numpy().astype(bool)
    tokens = split.tokens
    units = draw_units(tokens.documents[tokens.sequence_of].numpy(), resamples, 0)
    learned = _learned_draws(series.steps, table, mask, units)
    moved = half_way(series.steps, along)
    lag = float("nan") if moved is None else moved - learned
    edit = rollback(split, rows)
    place = localise(split, edit, mask, parts) if len(parts) else None
    return WhenWhere(
        tuple(series.steps),
        tuple(along.tolist()),
        tuple(table[:, mask].mean(1).tolist()),
        moved,
        units.interval(learned),
        units.interval(np.broadcast_to(lag, learned.shape)),
        {str(w): _window_share(split, rows, members, w) for w in equal_windows(series.steps, windows)},
        {} if place is None else {_named(*key): value for key, value in place.shares().items()},
        0.0 if place is None else place.additive_gap,
    )


def _named(layer: int, name: str) -> str:
    return name if layer < 0 else f"{layer} {name}"


def _learned_draws(steps: Sequence[int], table: Array, mask: Bits, units: Units) -> Array:
    """(R + 1,) half-fall step of the target in the sample and every resample."""
    sums = np.stack([units.totals(losses, mask[None])[:, 0] for losses in table])
    counts = units.totals(np.ones(table.shape[1]), mask[None])[:, 0]
    curves = (sums / np.maximum(counts, 1e-12)).T
    found = [reached(curve, 0.5) for curve in curves]
    return np.array([float("nan") if index is None else steps[index] for index in found], dtype=np.float64)


def _window_share(split: EvaluatedSplit, rows: Tensor, members: Tensor, window: Window) -> float:
    """Share of the target lost when one window's movement along the axis is undone in the final model."""
    series = split.series
    at = series.steps.index
    movement = Movement(split.theta, series[at(window.start)], series[at(window.end)])
    return split.damage(rollback(movement, rows)).share_by({"target": members})["target"]
