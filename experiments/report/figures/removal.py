"""Figures of the removal study: Pareto fronts over doses, and relearning curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.report.style import (
    GREY,
    PALE,
    Drawing,
    colours,
    new_figure,
    panels,
    shared_legend,
    styled,
)

OURS = ("span optimised", "tensor span optimised")
#: Lowest share that the log axis shows.
FLOOR = 1e-4


@dataclass(frozen=True)
class ParetoPoint:
    """One dose: damage on the skill and on the worst other group, as shares of headroom."""

    target_share: float | None
    worst_positive_share: float | None


@dataclass(frozen=True)
class ParetoCurve:
    """One method's edits of one skill and seed over doses."""

    skill: str
    method: str
    points: tuple[ParetoPoint, ...]


@dataclass(frozen=True)
class RelearningPoint:
    """Accuracy on the removed skill after some fine-tuning steps."""

    step: int
    accuracy: float | None


@dataclass(frozen=True)
class RelearningCurve:
    """One method's edited model while it is trained on again.

    Attributes:
        skill: what was removed.
        method: how.
        data: what data comes back.
        points: by step.
    """

    skill: str
    method: str
    data: str
    points: tuple[RelearningPoint, ...]


@dataclass(frozen=True)
class Bound:
    """What a removal must reach, as shares of headroom: at least on the skill, at most elsewhere."""

    target: float
    off: float


@dataclass(frozen=True)
class RemovalCurves:
    """What the figures need of a study's result file; its other keys are ignored."""

    pareto: tuple[ParetoCurve, ...]
    required: dict[str, Bound]
    relearning: tuple[RelearningCurve, ...]


@styled()
def pareto_figure(pareto: Sequence[ParetoCurve], required: dict[str, Bound]) -> Figure:
    """Target share against the worst other group, one line per method and seed; shaded: the bounds.

    The positive part is drawn on a log axis: a signed mean can be below zero.
    """
    skills = list(dict.fromkeys(curve.skill for curve in pareto))
    figure, grid = panels(len(skills), 3.7, 3.1, most=3)
    methods = list(dict.fromkeys(curve.method for curve in pareto if curve.points))
    hues = colours(methods)
    # More methods than colours: the second and third round are dashed and dotted.
    lines = {name: ("-", "--", ":")[index // 10 % 3] for index, name in enumerate(methods)}
    for axes, skill in zip(grid, skills, strict=True):
        axes.axvspan(required[skill].target, 1.02, color=PALE, alpha=0.4, zorder=0)
        axes.axhline(2 * required[skill].off, color=GREY, linewidth=0.8, linestyle=":")
        for curve in (c for c in pareto if c.skill == skill and c.points):
            # More damage than the headroom is drawn at the headroom.
            x = np.minimum([_known(point.target_share) for point in curve.points], 1.0)
            y = np.array([_known(point.worst_positive_share) for point in curve.points])
            axes.plot(
                x,
                np.maximum(y, FLOOR),
                marker="o",
                markersize=2.5,
                linewidth=2.0 if curve.method in OURS else 1.0,
                color=hues[curve.method],
                linestyle=lines[curve.method],
                label=curve.method,
            )
        axes.set(yscale="log", xlim=(-0.1, 1.02), title=skill)
        axes.set(xlabel="damage on the skill, share of headroom", ylabel="worst other group, positive part")
    shared_legend(figure, grid, 5)
    return figure


def _known(value: float | None) -> float:
    return float("nan") if value is None else value


@styled()
def relearning_figure(curves: Sequence[RelearningCurve]) -> Figure:
    """Accuracy on the removed skill while fine-tuning; rows: skills, columns: what data comes back."""
    skills = list(dict.fromkeys(curve.skill for curve in curves))
    kinds = list(dict.fromkeys(curve.data for curve in curves))
    hues = colours(list(dict.fromkeys(curve.method for curve in curves)))
    figure = new_figure(2.3 * len(skills), 3.4 * len(kinds))
    grid = figure.subplots(len(skills), len(kinds), squeeze=False, sharey=True)
    for curve in curves:
        axes = grid[skills.index(curve.skill)][kinds.index(curve.data)]
        accuracy = [_known(point.accuracy) for point in curve.points]
        steps = [point.step for point in curve.points]
        axes.plot(steps, accuracy, color=hues[curve.method], label=curve.method, marker=".")
    for line, skill in zip(grid, skills, strict=True):
        line[0].set_ylabel(f"{skill}\naccuracy")
    for axes, kind in zip(grid[0], kinds, strict=True):
        axes.set_title(kind)
    for axes in grid[-1]:
        axes.set_xlabel("fine-tuning steps")
    grid[0][0].set_ylim(-0.02, 1.02)
    shared_legend(figure, list(grid.flat), 4)
    return figure


def draw_removal(result: RemovalCurves, folder: Path) -> list[Path]:
    """Write ``pareto.png`` and, where relearning was measured, ``relearning.png``; returns the files."""
    drawings = [
        Drawing("pareto", "damage on the skill and elsewhere", pareto_figure(result.pareto, result.required))
    ]
    if result.relearning:
        drawings.append(
            Drawing("relearning", "accuracy while training goes on", relearning_figure(result.relearning))
        )
    paths = [folder / f"{drawing.name}.png" for drawing in drawings]
    for drawing, path in zip(drawings, paths, strict=True):
        drawing.write_png(path)
    return paths
