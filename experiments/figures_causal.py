"""Figures of a causal study: dissociation, control ladder, doses, blocking curves, localisation maps."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from polca_edit.checkpoints import write_atomically

TARGET, CONTROL, MUTED = "#b03a2e", "#2e6da4", "#8a8a8a"
LADDER = {
    "c1": "c1 random direction",
    "c2a": "c2 same placement",
    "c2b": "c2 same spectrum",
    "c3a": "c3 rotation, same size",
    "c3b": "c3 rotation, own movement",
    "c4": "c4 same total damage",
    "c5": "c5 other vectors",
    "c6": "c6 token-set gradients",
    "rotation": "c7 pipeline, rotated bases",
    "random": "c7 pipeline, random bases",
    "shuffled_hessian": "c7 pipeline, shuffled Hessian",
}


def dissociation(matrix: Sequence[Sequence[float]], names: Sequence[str]) -> Figure:
    """Share of headroom every cluster loses (columns) when each pair's vector is undone (rows)."""
    table = np.array(matrix, dtype=float)
    figure = Figure(figsize=(2.5 + 0.8 * len(names), 2.4 + 0.6 * len(names)), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(table, vmin=-1, vmax=1, cmap="RdBu_r")
    short = [name if len(name) <= 24 else f"{name[:23].rstrip()}…" for name in names]
    axes.set_xticks(range(len(names)), short, rotation=40, ha="right")
    axes.set_yticks(range(len(names)), short)
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            ink = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xlabel("cluster measured")
    axes.set_ylabel("vector undone,\nchosen for")
    figure.colorbar(shown, ax=axes, label="share of headroom lost")
    return figure


def ladder(row: Mapping[str, Any]) -> Figure:
    """T of the pair against the 5-95 % range of every control."""
    rungs = [(key, words) for key, words in LADDER.items() if row["ladder"].get(key, {}).get("draws")]
    figure = Figure(figsize=(6.5, 1.2 + 0.32 * len(rungs)), layout="constrained")
    axes = figure.subplots()
    for place, (key, _) in enumerate(rungs):
        spread = row["ladder"][key]
        axes.plot([spread["p5"], spread["p95"]], [place, place], color=CONTROL, lw=3, solid_capstyle="butt")
        axes.plot(spread["median"], place, "o", color=CONTROL, ms=5)
        axes.plot(spread["max"], place, "|", color=CONTROL, ms=10)
    axes.axvline(row["inputs"]["effect"]["estimate"], color=TARGET, lw=1.5)
    axes.set_yticks(range(len(rungs)), [words for _, words in rungs])
    axes.invert_yaxis()
    axes.set_xlabel(
        "T = share of headroom lost on the cluster minus elsewhere\n(line: this pair; -1: no pair)"
    )
    return figure


def doses(row: Mapping[str, Any]) -> Figure:
    """Damage of the cluster over doses; only 0 to 1 was visited in training."""
    points = sorted((float(a), v) for a, v in row["doses"].items())
    figure = Figure(figsize=(5.0, 3.0), layout="constrained")
    axes = figure.subplots()
    x = [a for a, _ in points]
    axes.axvspan(0, 1, color=MUTED, alpha=0.15)
    axes.fill_between(
        x, [v["low"] for _, v in points], [v["high"] for _, v in points], color=TARGET, alpha=0.2
    )
    axes.plot(x, [v["estimate"] for _, v in points], "o-", color=TARGET, ms=4)
    axes.set_xlabel("dose (1: movement undone; shaded: range visited in training)")
    axes.set_ylabel("damage, nats per token")
    return figure


def blocking(curves: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss of the cluster in every arm, mean over branches, every branch faint."""
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for curve in curves:
        arms.setdefault("sham" if curve["arm"].startswith("sham") else curve["arm"], []).append(curve)
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    axes = figure.subplots()
    colours = {"none": MUTED, "block": TARGET, "sham": CONTROL}
    words = {"none": "free", "block": "held still", "sham": "sham held still"}
    for arm, members in arms.items():
        for curve in members:
            axes.plot(curve["steps"], curve["target"], color=colours[arm], lw=0.5, alpha=0.35)
        same = [c for c in members if c["steps"] == members[0]["steps"]]
        mean = np.mean([c["target"] for c in same], axis=0)
        axes.plot(members[0]["steps"], mean, color=colours[arm], lw=2, label=words[arm])
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("cluster loss, nats per token")
    axes.legend(frameon=False)
    return figure


def localisation(found: Mapping[str, Any]) -> Figure:
    """Layer x component map of the damage with only that part of the edit applied."""
    parts = found["parts"]
    layers = sorted({p["layer"] for p in parts})
    names = sorted({p["name"] for p in parts})
    table = np.full((len(layers), len(names)), np.nan)
    for part in parts:
        table[layers.index(part["layer"]), names.index(part["name"])] = part["damage"]
    figure = Figure(figsize=(2.0 + 0.9 * len(names), 1.5 + 0.5 * len(layers)), layout="constrained")
    axes = figure.subplots()
    # A part may improve the cluster, so colours are signed.
    most = max(float(np.nanmax(np.abs(table))), 1e-12)
    shown = axes.imshow(table, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_yticks(range(len(layers)), ["outside" if layer < 0 else f"layer {layer}" for layer in layers])
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            ink = "white" if abs(value) > 0.6 * most else "black"
            axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=8, color=ink)
    figure.colorbar(shown, ax=axes, label="damage of this part, nats")
    return figure


def write_study_figures(
    folder: Path, rows: Sequence[Mapping[str, Any]], details: Mapping[str, Mapping[str, Any]]
) -> list[Path]:
    """All figures of a study as PNG; returns what was written."""
    written: list[Path] = []

    def save(name: str, figure: Figure) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=130, format="png", metadata={"Software": None})
        path = folder / f"{name}.png"
        write_atomically(path, lambda part: part.write_bytes(buffer.getvalue()) and None)
        written.append(path)

    if rows:
        first = details[rows[0]["name"]]
        save("dissociation", dissociation(first["matrix"], first["matrix_names"]))
    for row in rows:
        stem = re.sub(r"[^a-zA-Z0-9]+", "-", row["name"]).strip("-")[:50]
        save(f"ladder-{stem}", ladder(row))
        save(f"doses-{stem}", doses(row))
        detail = details[row["name"]]
        if detail.get("blocking"):
            save(f"blocking-{stem}", blocking(detail["blocking"]))
        save(f"localisation-{stem}", localisation(detail["localisation"]))
    return written
