"""Figures of studies: conclusions under other settings, and accuracy by arm of a training study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

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


#: Steps and accuracies of one seed.
Course = tuple[Sequence[int], Sequence[float]]


@styled()
def arms_figure(arms: Mapping[str, Sequence[Course]], branch: int) -> Figure:
    """One panel an arm, one line a seed, the free arm pale behind each."""
    figure = new_figure(2.6, 11)
    panels = figure.subplots(1, len(arms), sharey=True, sharex=True)
    hues = colours(list(arms))
    free = next(iter(arms.values()))
    for axes, (name, courses) in zip(panels, arms.items(), strict=True):
        for steps, hidden in free:
            axes.plot(steps, hidden, color="0.8", lw=0.8, zorder=1)
        for steps, hidden in courses:
            axes.plot(steps, hidden, color=hues[name], lw=1.1, zorder=2)
        axes.axvline(branch, color="0.6", lw=0.6, ls=":")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("optimiser step")
    panels[0].set_ylabel("accuracy on hidden sums")
    return figure


def draw_arms(arms: Mapping[str, Sequence[Course]], branch: int, path: Path) -> None:
    """Write the figure as PNG."""
    Drawing("grokking", "accuracy on hidden sums by arm", arms_figure(arms, branch)).write_png(path)


#: (way, seed, checkpoints, error) of one point.
Recorded = tuple[str, int, int, float]


@styled()
def recording_figure(points: Sequence[Recorded]) -> Figure:
    """Error per token against the number of checkpoints: a pale line a way and seed, their mean strong."""
    figure = new_figure(3.4, 6)
    axes = figure.subplots()
    hues = colours(list(dict.fromkeys(way for way, *_ in points)))
    seeds = sorted({seed for _, seed, *_ in points})
    counts = sorted({count for _, _, count, _ in points})
    for way, hue in hues.items():
        errors = {(seed, count): error for name, seed, count, error in points if name == way}
        if len(seeds) > 1:
            for seed in seeds:
                own = [count for count in counts if (seed, count) in errors]
                axes.plot(own, [errors[seed, count] for count in own], color=hue, lw=0.7, alpha=0.4)
        measured = [[errors[seed, count] for seed in seeds if (seed, count) in errors] for count in counts]
        axes.plot(
            [count for count, some in zip(counts, measured, strict=True) if some],
            [statistics.fmean(some) for some in measured if some],
            "o-",
            color=hue,
            label=way if len(seeds) == 1 else f"{way}, mean of {len(seeds)} seeds",
            markersize=4,
            lw=1.6,
        )
    axes.set(xscale="log", xlabel="checkpoints kept", ylabel="quadrature error per token")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend()
    return figure


def draw_recording(points: Sequence[Recorded], path: Path) -> None:
    """Write the figure as PNG."""
    title = "quadrature error against the number of checkpoints"
    Drawing("recording", title, recording_figure(points)).write_png(path)
