"""Figures of discovery: the causal timeline, and one axis over training and over the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from experiments.report.formats import decimal
from experiments.report.style import FIXED_INK, GREY, PALE, WIDTH, new_figure, styled
from interventions.discovery.timeline import Timeline, WindowEffect
from interventions.discovery.when_where import WhenWhere

TIMELINE_CAPTION = (
    "Which stretch of training each skill needs. Above: mean loss of each group, in nats. Below: the "
    "movement of each stretch undone in the final model, and the share of its headroom that each group "
    "loses; it takes what was learned in the stretch and what builds on it. Small numbers: random movements "
    'of the same norm. "found 0" is interventional cluster i0 of all bases together.'
)
AXES_CAPTION = (
    "When the axes of the {basis} span move: coordinate of the weights along each skill's axis over "
    "training, as a share of its net movement (0 before, 1 at the end)."
)


@styled()
def timeline_figure(timeline: Timeline, hues: Mapping[str, str], kind: str = "equal") -> Figure:
    """Loss curves over a map of windows and groups, one above the other on the same steps.

    Args:
        timeline: of a run.
        hues: group -> colour; others are grey.
        kind: of the windows that are shown.
    """
    effects = timeline.of_kind(kind)
    names = [name for name in timeline.order() if all(name in e.shares for e in effects)]
    figure = new_figure(2.6 + 0.26 * len(names), WIDTH)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.0, max(1.0, 0.24 * len(names))])
    for name in names:
        colour = hues.get(name, GREY)
        style = "-" if name in hues else ":"
        above.plot(timeline.steps, timeline.curves[name], style, color=colour, linewidth=1.2, label=name)
    above.set_ylabel("loss (nats)")
    figure.legend(*above.get_legend_handles_labels(), ncols=9, loc="outside upper center")
    _window_map(below, effects, names)
    below.set_xlabel("optimiser step of the stretch that is undone")
    return figure


def _window_map(axes: Axes, effects: Sequence[WindowEffect], names: Sequence[str]) -> None:
    edges = [effects[0].window.start, *(e.window.end for e in effects)]
    values = np.array([[e.shares[name] for e in effects] for name in names])
    scale = Normalize(0, 1)
    axes.pcolormesh(
        edges, np.arange(len(names) + 1), np.clip(values, 0, 1), cmap="Reds", norm=scale, edgecolors=PALE
    )
    for row, name in enumerate(names):
        for effect in effects:
            middle = (effect.window.start + effect.window.end) / 2
            value = effect.shares[name]
            dark = "white" if value > 0.6 else FIXED_INK
            axes.text(middle, row + 0.42, decimal(value), ha="center", va="center", fontsize=8, color=dark)
            random = effect.random_shares.get(name)
            if random is not None:
                axes.text(
                    middle, row + 0.8, decimal(random), ha="center", va="center", fontsize=5.5, color=dark
                )
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.invert_yaxis()
    axes.tick_params(length=0)


@styled()
def axes_figure(axes: Mapping[str, WhenWhere], hues: Mapping[str, str]) -> Figure:
    """Coordinates along several axes over training; targets without a colour are grey."""
    figure = new_figure(3.0, WIDTH)
    plot = figure.subplots()
    for name, when in axes.items():
        net = when.coordinate[-1] or 1.0
        path = np.array(when.coordinate) / net
        plot.plot(when.steps, path, color=hues.get(name, GREY), linewidth=1.5, label=name)
    plot.axhline(0, color=PALE, linewidth=0.8)
    plot.axhline(1, color=PALE, linewidth=0.8)
    plot.set(xlabel="optimiser step", ylabel="coordinate (share of net)")
    figure.legend(loc="outside lower center", ncols=8)
    return figure
