"""Figures of damage: signed heat maps and dose curves. Nats per token unless stated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.report.figures import GREY, INK, PALE, STYLE, WIDTH, colours, new_figure
from experiments.report.formats import brief
from experiments.report.records import AnalysisView, ClusterView

SMALLEST_SCALE = 0.1

CLUSTER_DAMAGE_CAPTION = (
    "Damage: mean loss change of the cluster's tokens (columns) when the whole movement along a vector "
    "(rows) is undone in the trained model. Red: the loss rises. Left in nats per token; right as a share "
    "of the headroom, the loss that going back to the reference checkpoint would cost those tokens (grey "
    "where it is below 0.05 nats). Framed: the cluster's own vector."
)
SKILL_DAMAGE_CAPTION = (
    "Damage of every vector (rows) on all tokens of a skill (columns): mean loss change when the whole "
    "movement along the vector is undone in the trained model. Red: the loss rises. Left in nats per token, "
    "right as a share of the skill's headroom."
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


def damage_matrix(
    raw: np.ndarray,
    relative: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    own: Sequence[tuple[int, int]] = (),
) -> Figure:
    """(K, C) damage as a signed heat map, nats on the left and over the headroom on the right."""
    with matplotlib.rc_context(STYLE):
        written = max(len(rows), len(columns)) <= 20 and len(columns) <= 12
        figure = new_figure(min(1.6 + 0.27 * len(rows), 14.0))
        left, right = figure.subplots(1, 2, sharey=True)
        # The largest size sets the scale: both signs share it, so that white is always zero.
        largest = max(float(np.nanmax(np.abs(raw), initial=0.0)), 1e-6)
        _heat(figure, left, raw, largest, "damage (nats per token)", written, own, False)
        _heat(figure, right, relative, 1.0, "damage over headroom", written, own, True)
        for axes in (left, right):
            axes.set_xticks(range(len(columns)), columns, rotation=50, ha="right", rotation_mode="anchor")
        left.set_yticks(range(len(rows)), rows)
        left.set_ylabel("vector undone")
    return figure


def _heat(
    figure: Figure,
    axes: Axes,
    values: np.ndarray,
    largest: float,
    title: str,
    written: bool,
    own: Sequence[tuple[int, int]],
    clipped: bool,
) -> None:
    shades = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#EEEEEE")
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=shades, norm=Normalize(-largest, largest), aspect="auto"
    )
    figure.colorbar(
        image,
        ax=axes,
        shrink=0.8,
        pad=0.02,
        aspect=max(20, 1.2 * len(values)),
        extend="both" if clipped else "neither",
    )
    axes.set_title(title)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if written:
        for (row, column), value in np.ndenumerate(values):
            dark = np.isfinite(value) and abs(value) > 0.6 * largest
            text = f"{value:.2f}" if np.isfinite(value) else "–"
            text = "0" if text in ("0.00", "-0.00") else text.replace("-", "−")
            axes.text(
                column, row, text, ha="center", va="center", fontsize=7.5, color="white" if dark else INK
            )
    for row, column in own:
        axes.add_patch(
            Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, fill=False, edgecolor=INK, linewidth=1.3)
        )


@dataclass(frozen=True)
class DosePanel:
    """One panel of dose curves.

    Attributes:
        title: above the panel.
        doses: (D,) share of the movement undone, 1 for all of it.
        lines: name -> (D,) damage in nats.
        headroom: loss that undoing all learning would cost, None where unknown.
        controls: random-direction records with ``on_target_mean`` and ``on_target_max``.
    """

    title: str
    doses: Sequence[float]
    lines: Mapping[str, Sequence[float | None]]
    headroom: float | None
    controls: Sequence[Mapping[str, Any]]


def dose_curves(panels: Sequence[DosePanel]) -> Figure:
    """Damage over dose, with random directions of the same norm in grey."""
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    by_name = dict(zip(names, colours(len(names)), strict=True))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(0.7 + 2.5 * rows, max(WIDTH * columns / 4, 6.0))
        grid = figure.subplots(rows, columns, squeeze=False)
        for index, axes in enumerate(grid.flat):
            if index >= len(panels):
                axes.set_axis_off()
                continue
            _dose_panel(axes, panels[index], by_name)
            axes.set_xlabel("dose" if index + columns >= len(panels) else "")
            axes.set_ylabel("damage (nats)" if index % columns == 0 else "")
        handles: dict[str, Any] = {}
        for axes in grid.flat:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=min(len(handles), 5 if columns > 2 else 3),
        )
    return figure


def _dose_panel(axes: Axes, panel: DosePanel, colours: Mapping[str, str]) -> None:
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.axvline(1, color=PALE, linewidth=0.8, zorder=0)
    with_control = sorted(panel.controls, key=lambda row: float(row.get("dose", 1.0)))
    if with_control:
        at = np.array([float(row.get("dose", 1.0)) for row in with_control])
        low = np.array([float(row["on_target_mean"]) for row in with_control])
        high = np.array([float(row["on_target_max"]) for row in with_control])
        if len(at) == 1:
            # Measured at one norm only: the band must not suggest other doses.
            at, low, high = at[0] + np.array([-0.18, 0.18]), low.repeat(2), high.repeat(2)
        axes.fill_between(
            at,
            low,
            high,
            color="#888888",
            alpha=0.6,
            linewidth=4,
            label="random directions, same norm",
            zorder=1.5,
        )
    for name, values in panel.lines.items():
        known = [np.nan if value is None else value for value in values]
        style = "--" if name.startswith("all other") else "-"
        axes.plot(
            panel.doses,
            known,
            style,
            color=colours[name],
            marker="o",
            markersize=2.8,
            linewidth=1.4,
            label=name,
        )
    # Noise must not fill a panel, and a headroom far above must not flatten the curves.
    bottom, top = min(axes.get_ylim()[0], -SMALLEST_SCALE / 4), max(axes.get_ylim()[1], SMALLEST_SCALE)
    if panel.headroom is not None and panel.headroom < 2.5 * top:
        axes.axhline(panel.headroom, color=GREY, linestyle=":", linewidth=1.2, label="headroom")
        top = max(top, 1.08 * panel.headroom)
    elif panel.headroom is not None:
        axes.text(
            0.03,
            0.97,
            f"headroom {panel.headroom:.2f}",
            transform=axes.transAxes,
            va="top",
            color=GREY,
            fontsize=8,
        )
    axes.set_ylim(bottom, top)
    axes.set_title(panel.title, fontsize=9)


def cluster_doses(view: ClusterView) -> DosePanel:
    """The dose curve of one cluster under its own vector."""
    row = view.at_one
    label = view.entry["label"]
    return DosePanel(
        f"{view.name}" + (f" ({brief(label)})" if label else ""),
        [float(r["dose"]) for r in view.damage],
        {
            "the cluster's tokens": [r["on_target"] for r in view.damage],
            "all other tokens": [r["off_target"] for r in view.damage],
        },
        None if row is None else row["headroom"],
        view.controls,
    )


def vector_doses(
    analysis: AnalysisView,
    vector: int,
    title: str,
    skills: Sequence[str],
    controls: Sequence[Mapping[str, Any]],
) -> DosePanel:
    """The dose curves of every skill under one vector."""
    rows = analysis.vector_rows(vector)
    lines: dict[str, list[float | None]] = {skill: [r["groups"].get(skill) for r in rows] for skill in skills}
    lines["all tokens"] = [r["on_target"] for r in rows]
    return DosePanel(title, [float(r["dose"]) for r in rows], lines, None, controls)
