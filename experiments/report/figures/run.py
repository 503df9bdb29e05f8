"""Figures of training, attribution and clusters: plain arrays in, figures out. Loss in nats throughout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.formats import count, decimal, share
from experiments.report.style import (
    CRIMSON,
    GREY,
    INK,
    PAIRED,
    PALE,
    PAPER,
    SAND,
    SLATE,
    WIDTH,
    Panel,
    fixed_panels,
    lighter,
    new_figure,
    styled,
    wrapped,
)
from experiments.report.view import ClusterView, Curves
from experiments.run.summary.records import BasisEntry, LossChange, LossParts

TRAINING_CAPTION = (
    "What was learned when: exact loss of the select tokens of each skill over training. After the dotted "
    "line at most 5 % of the fall of the mean loss is left."
)
LOSS_CHANGE_CAPTION = (
    "Loss change over training (negative: the loss fell) and what it is made of: exact = attributed + "
    "rest of the movement + quadrature error. The share above each group is attributed / exact. Right: "
    "how much of the weights' movement lies in the span of the vectors, beside what as many trajectory "
    "vectors hold of a pure random walk."
)
CURVES_CAPTION = (
    "Above: projected loss, the running sum of the loss change attributed to the vector. Below: exact loss "
    "of the same tokens. Lines are means over the cluster's tokens, bands hold the middle 80 % of them. "
    "Red: start of the breakthrough, where the fall of a token's projected loss accelerates most; the line "
    "is the mean over the tokens, the bar below it holds the middle 80 %: where it is wide, the tokens have "
    "no common start. Dotted: the mean loss is flat from there on."
)
COMPOSITION_CAPTION = (
    "What the clusters hold. Tokens are counted by their exact set of skills; the top bar is the whole "
    "select split."
)
#: A pair of curves above one another.
CURVE_PANEL = Panel(width=WIDTH / 4, height=3.7, left=0.8, right=0.06, below=0.5, above=0.62)


@styled()
def training_losses(
    steps: np.ndarray, losses: np.ndarray, groups: Mapping[str, np.ndarray], hues: Mapping[str, str], tau: int
) -> Figure:
    """Exact mean loss of every group of tokens (losses (T, M)) over training; flat after step tau."""
    figure = new_figure(3.9, PAIRED)
    axes = figure.subplots()
    for name, mask in groups.items():
        axes.plot(steps, losses[:, mask].mean(1, dtype=np.float64), color=hues[name], label=name, lw=1.3)
    axes.plot(steps, losses.mean(1, dtype=np.float64), color=INK, linewidth=2.2, label="all tokens")
    axes.axvline(tau, color=GREY, linestyle=":", linewidth=1.2)
    late = tau > 0.6 * float(steps[-1])
    axes.annotate(
        f" flat after step {tau} ",
        (tau, 0.98),
        xycoords=("data", "axes fraction"),
        color=GREY,
        va="top",
        ha="right" if late else "left",
    )
    axes.set(xlabel="optimiser step", ylabel="exact loss (nats per token)", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@styled()
def both_losses(
    runs: Sequence[tuple[np.ndarray, Mapping[str, np.ndarray]]], names: Sequence[str], hues: Mapping[str, str]
) -> Figure:
    """Mean losses of two runs, (steps, group -> (T,) nats) each: the first solid, the second dashed."""
    figure = new_figure(4.2)
    axes = figure.subplots()
    for (steps, groups), name, line in zip(runs, names, ("-", "--"), strict=True):
        for group, path in groups.items():
            hue, width = hues.get(group, INK), 1.3 if group in hues else 2.2
            axes.plot(steps, path, line, color=hue, lw=width, label=f"{group}, {name}")
    axes.set(xlabel="optimiser step", ylabel="exact loss (nats per token)", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=4)
    return figure


PARTS = (
    ("exact", "exact change", INK),
    ("attributed", "attributed to the basis", SLATE),
    ("residual", "rest of the movement", SAND),
    ("quadrature_error", "quadrature error", PALE),
)


@styled()
def loss_change(
    change: LossChange, basis: BasisEntry, shown: Sequence[str], hues: Mapping[str, str]
) -> Figure:
    """Exact = attributed + residual + quadrature error, for all tokens and each shown group."""
    groups: dict[str, LossParts] = {"all tokens": change}
    groups.update({name: change.per_group[name] for name in shown if name in change.per_group})
    figure = new_figure(3.6)
    left, right = figure.subplots(1, 2, width_ratios=(3.4, 1))
    place = np.arange(len(groups), dtype=float)
    sizes = np.array([[getattr(parts, key) for key, *_ in PARTS] for parts in groups.values()])
    for offset, (_, label, colour) in enumerate(PARTS):
        at = place + 0.2 * (offset - 1.5)
        left.bar(at, sizes[:, offset], 0.2, color=colour, label=label, edgecolor=GREY, linewidth=0.4)
    left.axhline(0, color=GREY, linewidth=0.8)
    lowest, highest = float(sizes.min()), float(sizes.max())
    room = 0.16 * (highest - lowest or 1.0)
    left.set_ylim(lowest - 0.3 * room, highest + 1.6 * room)
    for x, parts in zip(place, groups.values(), strict=True):
        told = f"{100 * parts.attributed / parts.exact:.0f} %" if abs(parts.exact) >= 0.01 else "–"
        told = "0 %" if told == "-0 %" else told.replace("-", "−")
        left.text(x, highest + 0.25 * room, told, ha="center", color=SLATE, fontweight="bold")
    left.text(-0.5, highest + 1.05 * room, "explained share", color=SLATE, fontsize=8.5)
    names = [wrapped(group, 12) for group in groups]
    left.set_xticks(place, names, rotation=0 if len(groups) <= 9 else 60)
    for tick, group in zip(left.get_xticklabels(), groups, strict=True):
        tick.set_color(hues.get(group, INK))
    left.set_ylabel("loss change over training\n(nats per token)")
    figure.legend(*left.get_legend_handles_labels(), ncols=4, loc="outside lower center")
    _capture(right, basis)
    return figure


def _capture(axes: Axes, basis: BasisEntry) -> None:
    """Share of the squared movement inside the span, beside a random walk's."""
    held = (basis.captured_net, basis.random_walk_net, basis.captured_path, basis.random_walk_path)
    bars = axes.barh((3.2, 2.4, 0.8, 0.0), held, 0.7, color=(SLATE, PALE, SLATE, PALE))
    for bar, value in zip(bars, held, strict=True):
        axes.text(bar.get_width() + 0.02, bar.get_y() + 0.35, share(value), va="center", fontsize=8.5)
    axes.set_yticks((3.2, 2.4, 0.8, 0.0), ("start to end", "random walk", "each interval", "random walk"))
    axes.set(xlim=(0, 1.35), xticks=(0, 0.5, 1.0), title="movement held by the span")
    axes.set_xticklabels(("0", "50 %", "100 %"))
    axes.tick_params(axis="y", length=0)


@styled()
def cluster_curves(
    shown: Sequence[ClusterView], curves: Sequence[Curves], tau: int, hues: Mapping[str, str]
) -> Figure:
    """Per cluster: projected loss above, exact loss of the same tokens below; mean and 10-90 % band."""
    figure, grid = fixed_panels(len(shown), CURVE_PANEL, most=4, halves=2)
    for index, (view, own) in enumerate(zip(shown, curves, strict=True)):
        upper, lower = grid[index]
        _curve_pair(upper, lower, view, own, tau, hues.get(view.skill or "", SLATE))
        if index % 4 == 0:
            upper.set_ylabel("projected loss\n(nats)")
            lower.set_ylabel("exact loss\n(nats)")
    return figure


def _curve_pair(upper: Axes, lower: Axes, view: ClusterView, curves: Curves, tau: int, hue: str) -> None:
    pairs = ((upper, curves.projected, hue, "projected loss"), (lower, curves.exact, INK, "exact loss"))
    for axes, paths, colour, label in pairs:
        low, high = np.percentile(paths, (10, 90), axis=0)
        axes.fill_between(curves.steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(curves.steps, paths.mean(0), color=colour, linewidth=1.8, label=label)
        axes.axvline(curves.starts.mean(), color=CRIMSON, linewidth=1.3)
        axes.axvline(tau, color=GREY, linestyle=":", linewidth=1.2)
    spread = np.percentile(curves.starts, (10, 90))
    upper.plot(
        spread, (0.02, 0.02), transform=upper.get_xaxis_transform(), color=CRIMSON, linewidth=3.5, alpha=0.7
    )
    upper.set_title(cluster_heading(view), fontsize=8, color=INK)
    lower.set_xlabel(f"step (start {curves.starts.mean():.0f})")
    upper.tick_params(labelbottom=False)
    lower.set(ylim=(0, None), xlim=upper.get_xlim())
    for axes in (upper, lower):
        axes.locator_params(nbins=4)


def cluster_heading(view: ClusterView) -> str:
    """Title and size, and how well it fits the skill it may carry."""
    fit = "" if view.skill is None or view.entry.name else f", F1 {decimal(view.f1)}"
    told = f"{view.title}: {count(view.entry.tokens)} tokens{fit}"
    return wrapped(told)


@styled()
def composition(
    sets: Mapping[str, np.ndarray], shown: Sequence[ClusterView], hues: Mapping[str, str]
) -> Figure:
    """Stacked bars: what each cluster's tokens are, all tokens as reference on top."""
    total = next(iter(sets.values())).shape[0]
    bars = {f"all tokens ({count(total)})": np.ones(total, dtype=bool)}
    bars.update({f"{view.name} ({count(view.entry.tokens)})": view.members for view in shown})
    figure = new_figure(1.0 + 0.27 * len(bars))
    axes = figure.subplots()
    place = np.arange(len(bars))[::-1].astype(float)
    place[0] += 0.4
    left = np.zeros(len(bars))
    for name, mask in sets.items():
        widths = np.array([(mask & members).sum() / max(int(members.sum()), 1) for members in bars.values()])
        colour = set_colour(name, hues)
        axes.barh(place, widths, 0.75, left=left, color=colour, label=name, edgecolor=PAPER, linewidth=0.5)
        left += widths
    axes.set_yticks(place, list(bars))
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 1), xticks=(0, 0.25, 0.5, 0.75, 1), xlabel="share of the cluster's tokens")
    axes.set_xticklabels(("0", "25 %", "50 %", "75 %", "100 %"))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def set_colour(name: str, hues: Mapping[str, str]) -> str:
    """A skill's own colour; a set of several has its first skill's, lighter; the rest is pale."""
    if name in hues:
        return hues[name]
    first = name.split(" + ")[0]
    return lighter(hues[first]) if first in hues else PALE
