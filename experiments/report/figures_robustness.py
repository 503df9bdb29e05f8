"""The figure of the multiverse: which conclusions survive other settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from experiments.report.style import PALE, Drawing, colours, new_figure, styled


@dataclass(frozen=True)
class Survival:
    """How often one conclusion holds.

    Attributes:
        share: of all branches.
        branches: how many there are.
        levels: factor -> level -> share of the branches at that level.
    """

    share: float
    branches: int
    levels: dict[str, dict[str, float]]


@styled()
def survival_figure(table: Mapping[str, Survival]) -> Figure:
    """One row per conclusion, one dot per level of each factor, a bar for all branches together."""
    factors = list(next(iter(table.values())).levels)
    figure = new_figure(1.2 + 0.62 * len(table), 9)
    axes = figure.subplots()
    hues = colours(factors)
    for row, entry in enumerate(list(table.values())[::-1]):
        axes.barh(row, entry.share, height=0.66, color=PALE, zorder=1)
        for index, factor in enumerate(factors):
            height = row + 0.27 - 0.54 * index / max(1, len(factors) - 1)
            shares = list(entry.levels[factor].values())
            label = factor if row == 0 else None
            at = [height] * len(shares)
            axes.plot(shares, at, "o-", label=label, color=hues[factor], markersize=3.5, lw=0.8, zorder=2)
    axes.set_yticks(range(len(table)), list(table)[::-1])
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of branches in which the conclusion holds (bar: all; dots: levels of one factor)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def draw_survival(table: Mapping[str, Survival], path: Path) -> None:
    """Write the figure as PNG."""
    Drawing("survival", "which conclusions survive other settings", survival_figure(table)).write_png(path)
