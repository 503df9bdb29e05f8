"""The numbers of a figure, read off the figure itself: what its lines, bars and cells show.

They become the CSV beside every figure, and what the page says where the pointer or the keyboard stands.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

#: Significant digits of a written number.
DIGITS = 6
Value = float | str | None


@dataclass(frozen=True)
class Series:
    """One line, one set of bars, or one row of a map.

    Attributes:
        name: as in the legend, or the row's label.
        x: (n,) steps, doses, or names of bars and columns.
        y: (n,) values; None where there is none.
    """

    name: str
    x: tuple[Value, ...]
    y: tuple[float | None, ...]


@dataclass(frozen=True)
class PanelData:
    """One pair of axes.

    Attributes:
        name: its title, else the label of its values.
        kind: lines, bars, columns or map.
        box: (left, top, width, height) in the figure, shares of its size.
        x: limits, left to right.
        y: limits, bottom to top.
        xlabel: of the axis.
        rows: edges of a map's rows, of bars their places; empty for lines.
        columns: edges of a map's columns; empty elsewhere.
        series: what is shown.
    """

    name: str
    kind: str
    box: tuple[float, float, float, float]
    x: tuple[float, float]
    y: tuple[float, float]
    xlabel: str
    rows: tuple[float, ...]
    columns: tuple[float, ...]
    series: tuple[Series, ...]


def figure_data(figure: Figure) -> tuple[PanelData, ...]:
    """Every panel with numbers; the figure must have been laid out.

    Example:
        >>> figure = Figure()
        >>> _ = figure.subplots().plot([0, 10], [2.0, 0.5], label="10s")
        >>> figure_data(figure)[0].series
        (Series(name='10s', x=(0.0, 10.0), y=(2.0, 0.5)),)
    """
    return tuple(panel for axes in figure.axes if (panel := _panel(axes)) is not None)


def csv_of(panels: Sequence[PanelData]) -> str:
    """One line a number: panel, series, x, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("panel", "series", "x", "value"))
    for panel in panels:
        for series in panel.series:
            writer.writerows((panel.name, series.name, x, y) for x, y in zip(series.x, series.y, strict=True))
    return text.getvalue()


def _panel(axes: Axes) -> PanelData | None:
    if axes.get_label() == "<colorbar>" or not axes.axison:
        return None
    kind, rows, columns, series = _content(axes)
    if not series:
        return None
    place = axes.get_position()
    box = (place.x0, 1 - place.y1, place.width, place.height)
    name = (axes.get_title() or axes.get_ylabel() or axes.get_xlabel()).replace("\n", " ")
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    return PanelData(
        name,
        kind,
        (_short(box[0]), _short(box[1]), _short(box[2]), _short(box[3])),
        (_short(left), _short(right)),
        (_short(bottom), _short(top)),
        axes.get_xlabel().replace("\n", " "),
        tuple(map(_short, rows)),
        tuple(map(_short, columns)),
        tuple(series),
    )


def _content(axes: Axes) -> tuple[str, Sequence[float], Sequence[float], list[Series]]:
    """Kind, places of rows and columns, and series of a panel."""
    for mesh in axes.collections:
        if isinstance(mesh, QuadMesh):
            return "map", *_map(axes, mesh)
    bars = [c for c in axes.containers if isinstance(c, BarContainer)]
    if bars:
        flat = bars[0].orientation == "horizontal"
        ticks, names = _ticks(axes.yaxis if flat else axes.xaxis)
        return ("bars" if flat else "columns"), ticks, (), [_bars(c, ticks, names, flat) for c in bars]
    # Lines across a whole axis mark a place; they are no data.
    lines = [line for line in axes.lines if line.get_transform() == axes.transData]
    named = [line for line in lines if not str(line.get_label()).startswith("_")]
    found = [
        Series(str(line.get_label()), _numbers(line.get_xdata()), _numbers(line.get_ydata()))
        for line in named
    ]
    return "lines", (), (), found


def _map(axes: Axes, mesh: QuadMesh) -> tuple[Sequence[float], Sequence[float], list[Series]]:
    corners = np.asarray(mesh.get_coordinates())
    across, down = corners[0, :, 0], corners[:, 0, 1]
    # Masked cells have no number.
    given: np.ndarray = np.ma.filled(np.ma.asarray(mesh.get_array(), dtype=float), np.nan)
    values = given.reshape(len(down) - 1, -1)
    names, heads = _labels(axes.yaxis, down), _labels(axes.xaxis, across)
    series = [Series(n, tuple(heads), _numbers(row)) for n, row in zip(names, values, strict=True)]
    return down.tolist(), across.tolist(), series


def _labels(axis: Axis, edges: np.ndarray) -> list[str]:
    """A label per cell: that of the tick inside it, else its two edges."""
    ticks, names = _ticks(axis)
    found = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = [n for t, n in zip(ticks, names, strict=True) if abs(t - (low + high) / 2) < 1e-6]
        found.append(inside[0] if inside and inside[0] else f"{low:g} to {high:g}")
    return found


def _ticks(axis: Axis) -> tuple[list[float], list[str]]:
    texts = [label.get_text().replace("\n", " ") for label in axis.get_ticklabels()]
    places = [float(place) for place in axis.get_ticklocs()]
    return places, (texts if len(texts) == len(places) else [""] * len(places))


def _bars(bars: BarContainer, ticks: Sequence[float], names: Sequence[str], flat: bool) -> Series:
    found: list[tuple[str, float]] = []
    for bar in bars.patches:
        middle = bar.get_y() + bar.get_height() / 2 if flat else bar.get_x() + bar.get_width() / 2
        near = int(np.argmin(np.abs(np.asarray(ticks) - middle))) if len(ticks) else 0
        size = bar.get_width() if flat else bar.get_height()
        found.append((names[near] if names else "", _short(size)))
    label = str(bars.get_label())
    name = "value" if label.startswith("_") else label
    return Series(name, tuple(n for n, _ in found), tuple(value for _, value in found))


def _numbers(values: object) -> tuple[float | None, ...]:
    return tuple(_short(v) if np.isfinite(v) else None for v in np.asarray(values, dtype=float).tolist())


def _short(value: float) -> float:
    """A few significant digits, so that pages stay small."""
    return float(f"{value:.{DIGITS}g}")
