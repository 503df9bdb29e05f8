"""The report's figures: plain arrays in, matplotlib figures out. Loss in nats throughout."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.formats import brief, percent, share_text
from experiments.report.records import ClusterView, Curves

# Okabe and Ito's colours: apart also for colour-blind readers, and in grey print by their lightness.
BLUE, ORANGE, GREEN, PURPLE, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
INK, GREY, PALE = "#222222", "#777777", "#D9D9D9"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, "#56B4E9", "#8C6D31", "#4B4B8F", "#A0A0A0", "#B8D36B")
WIDTH = 11.0
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "svg.hashsalt": "polca-edit",
    "svg.fonttype": "path",
}


LOSS_CHANGE_CAPTION = (
    "Loss change over training (negative: the loss fell) and what it is made of: exact = attributed + "
    "rest of the movement + quadrature error. The share above each group is attributed / exact. Right: "
    "how much of the weights' movement lies in the span of the vectors, beside what as many trajectory "
    "vectors hold of a pure random walk."
)
CURVES_CAPTION = (
    "Blue: projected loss, the running sum of the loss change attributed to the vector. Black: exact loss "
    "of the same tokens. Lines are means over the cluster's tokens, bands hold the middle 80 % of them. "
    "Red: start of the breakthrough, where the fall of a token's projected loss accelerates most; the line "
    "is the mean over the tokens, the bar below it holds the middle 80 %: where it is wide, the tokens have "
    "no common start. Dotted: the mean loss is flat from there on."
)
COMPOSITION_CAPTION = (
    "What the clusters hold. Tokens are counted by their exact set of skills; the top bar is the whole "
    "select split."
)


@dataclass(frozen=True)
class Drawing:
    """A figure with its file name and what it says in words.

    Attributes:
        name: file name under figures/, without the ending.
        caption: one or two sentences for readers, also the alternative text.
        figure: what to draw.
    """

    name: str
    caption: str
    figure: Figure

    def svg_uri(self) -> str:
        """The drawing as a data URI, the same bytes for the same figure."""
        return "data:image/svg+xml;base64," + base64.b64encode(self._saved("svg", {"Date": None})).decode()

    def png(self) -> bytes:
        """The drawing as PNG."""
        return self._saved("png", {"Software": None})

    @property
    def width_share(self) -> float:
        """Width over the page's, so that letters have one size in all figures."""
        return min(float(self.figure.get_figwidth()) / WIDTH, 1.0)

    def _saved(self, kind: str, metadata: dict[str, Any]) -> bytes:
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
        # Finding places for all labels is the slow part; the first time is good for the second file.
        self.figure.set_layout_engine("none")
        return buffer.getvalue()


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure that keeps its labels apart."""
    return Figure(figsize=(width, height), layout="constrained")


def training_losses(
    steps: np.ndarray, losses: np.ndarray, groups: Mapping[str, np.ndarray], flat_after: int
) -> Figure:
    """Exact mean loss of every group of tokens (losses (T, M)) over training."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3.2)
        axes = figure.subplots()
        for (name, mask), colour in zip(groups.items(), colours(len(groups)), strict=True):
            axes.plot(
                steps, losses[:, mask].mean(1, dtype=np.float64), color=colour, label=name, linewidth=1.3
            )
        axes.plot(steps, losses.mean(1, dtype=np.float64), color=INK, linewidth=2.2, label="all tokens")
        axes.axvline(flat_after, color=GREY, linestyle=":", linewidth=1.2)
        axes.annotate(
            f" mean loss is flat after step {flat_after}",
            (flat_after, 0.97),
            xycoords=("data", "axes fraction"),
            color=GREY,
            va="top",
            ha="right" if flat_after > 0.6 * float(steps[-1]) else "left",
        )
        axes.set(xlabel="optimiser step", ylabel="exact loss (nats per token)", ylim=(0, None))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def colours(count: int) -> list[str]:
    """A colour per line, repeated after ten."""
    return [CYCLE[i % len(CYCLE)] for i in range(count)]


PARTS = (
    ("exact", "exact change", INK),
    ("attributed", "attributed to the basis", BLUE),
    ("residual", "rest of the movement", ORANGE),
    ("quadrature_error", "quadrature error", PALE),
)


def loss_change(name: str, change: Mapping[str, Any], basis: Mapping[str, Any]) -> Figure:
    """Exact = attributed + residual + quadrature error, per group, with capture beside."""
    groups = {"all tokens": change, **change["per_group"]}
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3.6)
        left, right = figure.subplots(1, 2, width_ratios=(3.4, 1))
        place = np.arange(len(groups), dtype=float)
        for offset, (key, label, colour) in enumerate(PARTS):
            heights = [values[key] for values in groups.values()]
            left.bar(
                place + 0.2 * (offset - 1.5),
                heights,
                0.2,
                color=colour,
                label=label,
                edgecolor=GREY,
                linewidth=0.4,
            )
        left.axhline(0, color=GREY, linewidth=0.8)
        lowest = min(min(float(v[key]) for key, *_ in PARTS) for v in groups.values())
        highest = max(max(float(v[key]) for key, *_ in PARTS) for v in groups.values())
        room = 0.16 * (highest - lowest or 1.0)
        left.set_ylim(lowest - 0.3 * room, highest + 1.6 * room)
        for x, values in zip(place, groups.values(), strict=True):
            share = values["attributed"] / values["exact"] if abs(values["exact"]) >= 0.01 else None
            text = (
                "–" if share is None else f"{100 * share + 0.0:.0f} %".replace("-0 ", "0 ").replace("-", "−")
            )
            left.text(x, highest + 0.25 * room, text, ha="center", color=BLUE, fontweight="bold")
        left.text(-0.5, highest + 1.05 * room, "explained share", color=BLUE, fontsize=8.5)
        names = [textwrap.fill(group, 12) for group in groups]
        left.set_xticks(place, names, rotation=0 if len(groups) <= 9 else 60)
        left.set_ylabel("loss change over training\n(nats per token)")
        figure.legend(*left.get_legend_handles_labels(), ncols=4, loc="outside lower center")
        _capture(right, basis)
        figure.suptitle(
            f"{name} basis, {basis['vectors']} vectors: "
            f"explains {share_text(basis['explained_share'])} of the mean loss change",
            fontsize=10.5,
        )
    return figure


def _capture(axes: Axes, basis: Mapping[str, Any]) -> None:
    """Share of the squared movement inside the span, beside a random walk's."""
    keys = ("captured_net", "random_walk_net", "captured_path", "random_walk_path")
    bars = axes.barh((3.2, 2.4, 0.8, 0.0), [basis[key] for key in keys], 0.7, color=(BLUE, PALE, BLUE, PALE))
    for bar, key in zip(bars, keys, strict=True):
        axes.text(bar.get_width() + 0.02, bar.get_y() + 0.35, percent(basis[key]), va="center", fontsize=8.5)
    axes.set_yticks((3.2, 2.4, 0.8, 0.0), ("start to end", "random walk", "each interval", "random walk"))
    axes.set(
        xlim=(0, 1.35),
        xticks=(0, 0.5, 1.0),
        xticklabels=("0", "50 %", "100 %"),
        title="movement held by the span",
    )
    axes.tick_params(axis="y", length=0)


def cluster_curves(
    name: str, share: float | None, shown: Sequence[ClusterView], curves: Sequence[Curves], tau: int
) -> Figure:
    """Per cluster: projected loss above, exact loss of the same tokens below; mean and 10-90 % band."""
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(0.6 + 3.5 * rows, max(WIDTH * columns / 4, 6.0))
        blocks = figure.subfigures(rows, columns, squeeze=False)
        for index, block in enumerate(blocks.flat):
            if index < len(shown):
                _curve_pair(block, shown[index], curves[index], tau, first=index % columns == 0)
        figure.suptitle(f"{name} basis (explained share {share_text(share)})", fontsize=10.5)
    return figure


def _curve_pair(block: Any, view: ClusterView, curves: Curves, tau: int, *, first: bool) -> None:
    upper, lower = block.subplots(2, 1, sharex=True)
    for axes, paths, colour in ((upper, curves.projected, BLUE), (lower, curves.exact, INK)):
        low, high = np.percentile(paths, (10, 90), axis=0)
        axes.fill_between(curves.steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(curves.steps, paths.mean(0), color=colour, linewidth=1.8)
        axes.axvline(curves.starts.mean(), color=RED, linewidth=1.3)
        axes.axvline(tau, color=GREY, linestyle=":", linewidth=1.2)
    spread = np.percentile(curves.starts, (10, 90))
    upper.plot(
        spread, (0.02, 0.02), transform=upper.get_xaxis_transform(), color=RED, linewidth=3.5, alpha=0.7
    )
    label = view.entry["label"]
    detail = (
        "" if label is None else f"\n{100 * view.entry['homogeneity'].get(label, 0.0):.0f} % {brief(label)}"
    )
    upper.set_title(f"{view.name}, {view.entry['tokens']} tokens{detail}", fontsize=9)
    lower.set_xlabel(f"step (start {curves.starts.mean():.0f})")
    lower.set_ylim(bottom=0)
    if first:
        upper.set_ylabel("projected loss\n(nats)")
        lower.set_ylabel("exact loss\n(nats)")


def composition(sets: Mapping[str, np.ndarray], shown: Sequence[ClusterView]) -> Figure:
    """Stacked bars: what each cluster's tokens are, all tokens as reference on top."""
    total = next(iter(sets.values())).shape[0]
    bars = {f"all tokens ({total})": np.ones(total, dtype=bool)}
    bars.update({f"{view.name} ({view.entry['tokens']})": view.members for view in shown})
    with matplotlib.rc_context(STYLE):
        figure = new_figure(1.0 + 0.27 * len(bars))
        axes = figure.subplots()
        place = np.arange(len(bars))[::-1].astype(float)
        place[0] += 0.4
        left = np.zeros(len(bars))
        for (name, mask), colour in zip(sets.items(), colours(len(sets)), strict=True):
            widths = np.array(
                [(mask & members).sum() / max(int(members.sum()), 1) for members in bars.values()]
            )
            axes.barh(
                place, widths, 0.75, left=left, color=colour, label=name, edgecolor="white", linewidth=0.5
            )
            left += widths
        axes.set_yticks(place, list(bars))
        axes.tick_params(axis="y", length=0)
        axes.set(
            xlim=(0, 1), xticks=(0, 0.25, 0.5, 0.75, 1), xticklabels=("0", "25 %", "50 %", "75 %", "100 %")
        )
        axes.set_xlabel("share of the cluster's tokens")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
