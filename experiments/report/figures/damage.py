"""Figures of damage: signed maps and dose curves. Nats per token unless stated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.report.formats import decimal, nats
from experiments.report.style import (
    FIXED_INK,
    GREY,
    INK,
    PAIRED,
    PALE,
    SLATE,
    WIDTH,
    new_figure,
    panels,
    shared_legend,
    styled,
    wrapped,
)
from experiments.report.view import AnalysisView, ClusterView
from experiments.run.summary.records import ControlRow

#: Half the height of a dose panel at least, so that noise does not fill it.
SMALLEST_SCALE = 0.1
#: Cells that still have room for their number.
MOST_NUMBERS = 400
#: What random directions cost.
BAND = "#a9a9a9"

OVERVIEW_CAPTION = (
    "What undoing each vector costs each skill on the evaluate tokens: mean loss change in nats per token. "
    "Red: the loss rises. A row with a single red cell is a vector that takes one skill and leaves the rest."
)
CLUSTER_DOSE_CAPTION = (
    "Damage when a part of the movement along the cluster's own vector is undone: dose 0 leaves the model "
    "as it is, 1 undoes the movement, beyond 1 goes past the reference. Grey at dose 1: displacements of "
    "the same size in random directions, from their mean to the largest. Dotted: the headroom of the "
    "cluster's tokens."
)
VECTOR_DOSE_CAPTION = (
    "Damage on every skill when a part of the movement along one vector is undone, for the {count} vectors "
    "of this basis with the largest damage on a skill. Dose 1 undoes the movement. Grey: random directions "
    "of the same size, over all tokens. A large damage alone says little: along sharp directions any "
    "displacement hurts."
)


@styled()
def damage_map(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], hues: Mapping[str, str]
) -> Figure:
    """Signed map of (K, C) damage of vectors on groups of tokens, as wide as its columns need."""
    width = max(PAIRED, 1.1 + 0.44 * len(columns))
    figure = new_figure(min(1.2 + 0.19 * len(rows), 12.0), width)
    axes = figure.subplots()
    # The largest size sets the scale: both signs share it, so that white is always zero.
    largest = largest_of(values)
    shades = matplotlib.colormaps["RdBu_r"].with_extremes(bad=PALE)
    scale = Normalize(-largest, largest)
    edges = [np.arange(count + 1) - 0.5 for count in (len(columns), len(rows))]
    mesh = axes.pcolormesh(
        *edges, np.ma.masked_invalid(values), cmap=shades, norm=scale, edgecolors=PALE, linewidth=0.4
    )
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if values.size <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            ink = "white" if np.isfinite(value) and abs(value) > 0.6 * largest else FIXED_INK
            told = cell_text(value)
            axes.text(column, row, told, ha="center", va="center", fontsize=7.5, color=ink)
    else:
        figure.colorbar(mesh, ax=axes, shrink=0.8, pad=0.02, aspect=max(20.0, 1.2 * len(values)))
    axes.set_xticks(range(len(columns)), columns, rotation=50, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    for place, name in enumerate(columns):
        # Letters keep the page's ink, a bar over the column has the skill's colour.
        bar = Rectangle((place - 0.46, -0.5), 0.92, -0.32, color=hues.get(name, PALE), clip_on=False, lw=0)
        axes.add_patch(bar)
    axes.tick_params(axis="x", pad=7)
    axes.set_yticks(range(len(rows)), rows)
    return figure


def largest_of(values: np.ndarray) -> float:
    """The largest size in a map, the scale of its shades."""
    return max(float(np.nanmax(np.abs(values), initial=0.0)), 1e-6)


def cell_text(value: float) -> str:
    """A map's number: two decimals, "0" where that is nothing.

    >>> cell_text(0.004), cell_text(-1.25), cell_text(float("nan"))
    ('0', '−1.25', '–')
    """
    text = decimal(float(value) if np.isfinite(value) else None)
    return "0" if text == "0.00" else text


@dataclass(frozen=True)
class DosePanel:
    """One panel of dose curves.

    Attributes:
        title: above the panel.
        doses: (D,) share of the movement undone, 1 for all of it.
        lines: name -> (D,) damage in nats.
        hues: name -> colour.
        headroom: loss that undoing all learning would cost, None where unknown.
        controls: random directions, measured on the same tokens.
    """

    title: str
    doses: Sequence[float]
    lines: Mapping[str, Sequence[float | None]]
    hues: Mapping[str, str]
    headroom: float | None
    controls: Sequence[ControlRow]


@styled()
def dose_curves(shown: Sequence[DosePanel]) -> Figure:
    """Damage over dose, with random directions of the same norm in grey."""
    figure, grid = panels(len(shown), WIDTH / 4, 2.5, most=4)
    for index, (axes, panel) in enumerate(zip(grid, shown, strict=True)):
        _dose_panel(axes, panel)
        axes.set_xlabel("dose" if index + 4 >= len(shown) else "")
        axes.set_ylabel("damage (nats)" if index % 4 == 0 else "")
    shared_legend(figure, grid, min(5, 2 * len(shown)))
    return figure


def _dose_panel(axes: Axes, panel: DosePanel) -> None:
    axes.axhline(0, color=PALE, linewidth=1)
    axes.axvline(1.0, color=PALE, linewidth=1)
    # Measured at one norm only: the band must not suggest other doses.
    means = [c.on_target_mean for c in panel.controls if c.on_target_mean is not None]
    largest = [c.on_target_max for c in panel.controls if c.on_target_max is not None]
    if means and largest:
        band = axes.fill_between((0.82, 1.18), min(means), max(largest), color=BAND, zorder=1.5)
        band.set(linewidth=3, label="random directions, same norm")
    for name, values in panel.lines.items():
        known = [np.nan if value is None else value for value in values]
        line, hue = "--" if name.startswith("all other") else "-", panel.hues.get(name, INK)
        axes.plot(panel.doses, known, line, color=hue, marker="o", markersize=2.8, lw=1.4, label=name)
    # Noise must not fill a panel, and a headroom far above must not flatten the curves.
    bottom, top = min(axes.get_ylim()[0], -SMALLEST_SCALE / 4), max(axes.get_ylim()[1], SMALLEST_SCALE)
    if panel.headroom is not None and panel.headroom < 2.5 * top:
        axes.axhline(panel.headroom, color=GREY, linestyle=":", linewidth=1.2, label="headroom")
        top = max(top, 1.08 * panel.headroom)
    elif panel.headroom is not None:
        told = f"headroom {nats(panel.headroom, 2)}"
        axes.text(0.03, 0.97, told, transform=axes.transAxes, va="top", color=GREY, fontsize=8)
    axes.set_ylim(bottom, top)
    axes.locator_params(nbins=5)
    axes.set_title(wrapped(panel.title), fontsize=8.5)


def cluster_doses(view: ClusterView) -> DosePanel:
    """The dose curve of one cluster under its own vector."""
    row = view.at_one
    lines: dict[str, list[float | None]] = {
        "the cluster's tokens": [r.on_target for r in view.damage],
        "all other tokens": [r.off_target for r in view.damage],
    }
    hues = {"the cluster's tokens": SLATE, "all other tokens": GREY}
    room = None if row is None else row.headroom
    return with_zero(DosePanel(view.title, [r.dose for r in view.damage], lines, hues, room, view.controls))


def vector_doses(
    analysis: AnalysisView, vector: int, title: str, skills: Sequence[str], hues: Mapping[str, str]
) -> DosePanel:
    """The dose curves of every skill under one vector."""
    rows = analysis.entry.damage_rows(vector, None, "select")
    lines: dict[str, list[float | None]] = {skill: [r.groups.get(skill) for r in rows] for skill in skills}
    lines["all tokens"] = [r.on_target for r in rows]
    controls = analysis.entry.random_controls(vector, None)
    return with_zero(DosePanel(title, [r.dose for r in rows], lines, hues, None, controls))


def with_zero(panel: DosePanel) -> DosePanel:
    """The same with the dose that is known without measuring: nothing undone, nothing lost.

    Example:
        >>> panel = with_zero(DosePanel("v0", [-1.0, 1.0], {"10s": [0.5, 2.0]}, {}, None, []))
        >>> panel.doses, panel.lines
        ((-1.0, 0.0, 1.0), {'10s': [0.5, 0.0, 2.0]})
    """
    if 0.0 in panel.doses or not panel.doses:
        return panel
    order = np.argsort([*panel.doses, 0.0], kind="stable")
    lines = {name: [[*values, 0.0][i] for i in order] for name, values in panel.lines.items()}
    return replace(panel, doses=tuple([*panel.doses, 0.0][i] for i in order), lines=lines)
