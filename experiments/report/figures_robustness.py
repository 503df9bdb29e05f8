"""The figure of the multiverse (part of the report: this module may import matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw_survival(table: dict[str, dict[str, Any]], path: Path) -> None:
    """One row per conclusion, one dot per level of each factor, a bar for all branches together.

    Args:
        table: from ``survival``.
        path: png or svg.
    """
    names = list(table)
    factors = list(next(iter(table.values()))["levels"])
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.62 * len(names)), constrained_layout=True)
    colours = [plt.get_cmap("tab10")(i) for i in range(10)]
    for row, name in enumerate(reversed(names)):
        entry = table[name]
        axes.barh(row, entry["share"], height=0.66, color="#dddddd", zorder=1)
        for index, factor in enumerate(factors):
            height = row + 0.27 - 0.54 * index / max(1, len(factors) - 1)
            shares = list(entry["levels"][factor].values())
            axes.plot(
                shares,
                [height] * len(shares),
                "o-",
                color=colours[index % len(colours)],
                markersize=3.5,
                linewidth=0.8,
                label=factor if row == 0 else None,
                zorder=2,
            )
    axes.set_yticks(range(len(names)), [name for name in reversed(names)])
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of branches in which the conclusion holds (bar: all; dots: levels of one factor)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=1, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
