"""Figures of the removal study: Pareto fronts over doses, and relearning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.figures import CYCLE, GREY, STYLE

OURS = ("span optimised", "tensor span optimised")
FLOOR = 1e-4


def _skills(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(row["skill"]) for row in rows))


def _grid(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(3, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.7 * columns, height * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def pareto_figure(pareto: Sequence[Mapping[str, Any]], required: Mapping[str, Mapping[str, float]]) -> Figure:
    """Target share against the worst other group, one line per method and seed; shaded: the bounds.

    The positive part is drawn on a log axis: a signed mean can be below zero.
    """
    with plt.rc_context(STYLE):
        skills = _skills(pareto)
        figure, axes = _grid(len(skills), 3.1)
        methods = list(dict.fromkeys(str(entry["method"]) for entry in pareto if entry["points"]))
        colours = {name: CYCLE[index % len(CYCLE)] for index, name in enumerate(methods)}
        # More methods than colours: the second and third round are dashed and dotted.
        lines = {name: ("-", "--", ":")[index // len(CYCLE) % 3] for index, name in enumerate(methods)}
        for axis, skill in zip(axes, skills, strict=True):
            bound = required[skill]
            axis.axvspan(bound["target"], 1.02, ymax=1.0, color="#EFEFEF", zorder=0)
            axis.axhline(2 * bound["off"], color=GREY, linewidth=0.8, linestyle=":")
            for entry in pareto:
                if entry["skill"] != skill or not entry["points"]:
                    continue
                name = str(entry["method"])
                x = np.array([_number(point["target_share"]) for point in entry["points"]])
                y = np.array([_number(point["worst_positive_share"]) for point in entry["points"]])
                axis.plot(
                    x,
                    np.maximum(y, FLOOR),
                    marker="o",
                    markersize=2.5,
                    linewidth=2.0 if name in OURS else 1.0,
                    color=colours[name],
                    linestyle=lines[name],
                    label=name,
                )
            axis.set_yscale("log")
            axis.set_xlim(-0.1, 1.02)
            axis.set_title(skill)
            axis.set_xlabel("damage on the skill, share of headroom")
            axis.set_ylabel("worst other group, positive part")
        handles, labels = axes[0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(list(unique.values()), list(unique), loc="outside lower center", ncols=5, frameon=False)
        return figure


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def relearning_figure(curves: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy on the removed skill while fine-tuning; rows: skills, columns: what data comes back."""
    with plt.rc_context(STYLE):
        skills, kinds = _skills(curves), list(dict.fromkeys(str(curve["data"]) for curve in curves))
        methods = list(dict.fromkeys(str(curve["method"]) for curve in curves))
        figure, axes = plt.subplots(
            len(skills),
            len(kinds),
            figsize=(3.4 * len(kinds), 2.3 * len(skills)),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for curve in curves:
            axis = axes[skills.index(str(curve["skill"]))][kinds.index(str(curve["data"]))]
            steps = [point["step"] for point in curve["points"]]
            accuracy = [_number(point["accuracy"]) for point in curve["points"]]
            name = str(curve["method"])
            axis.plot(steps, accuracy, color=CYCLE[methods.index(name) % len(CYCLE)], label=name, marker=".")
        for line, skill in zip(axes, skills, strict=True):
            line[0].set_ylabel(f"{skill}\naccuracy")
        for axis, kind in zip(axes[0], kinds, strict=True):
            axis.set_title(kind)
        for axis in axes[-1]:
            axis.set_xlabel("fine-tuning steps")
        axes[0][0].set_ylim(-0.02, 1.02)
        handles, labels = axes[0][0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(list(unique.values()), list(unique), loc="outside lower center", ncols=4, frameon=False)
        return figure


def draw_removal(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``pareto.png`` and ``relearning.png``; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"pareto": pareto_figure(result["pareto"], result["required"])}
    if result["relearning"]:
        figures["relearning"] = relearning_figure(result["relearning"])
    written = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
        written.append(path)
    return written
