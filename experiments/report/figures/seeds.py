"""Vectors x groups of several runs side by side, words marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from experiments.report.style import FIXED_INK, panels, styled

#: Share from which a cell is so dark that letters are white.
DARK_CELL = 0.6
#: Letters beside a cell of the map.
MARKS = {"carrier": "C", "selective": "S"}


@dataclass(frozen=True, eq=False)
class Map:
    """Vectors x groups of one basis of one run, unseen tokens.

    Attributes:
        title: run and basis.
        vectors: tested ones.
        groups: parents and skills.
        shares: (vectors, groups) of headroom lost; NaN where it was not measured.
        words: (vector, group) -> word of a row about that group.
    """

    title: str
    vectors: tuple[int, ...]
    groups: tuple[str, ...]
    shares: np.ndarray
    words: Mapping[tuple[int, str], str]


@styled()
def seeds_figure(maps: Sequence[Map], columns: int) -> Figure:
    """One panel per basis and run: share lost by each group, words of the skills' own rows marked."""
    tallest = max(len(one.vectors) for one in maps)
    figure, axes = panels(len(maps), 2.5, 0.9 + 0.24 * tallest, columns)
    for place, one in zip(axes, maps, strict=True):
        image = place.imshow(np.ma.masked_invalid(one.shares), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        place.set_xticks(range(len(one.groups)), one.groups, rotation=45, ha="right")
        place.set_yticks(range(len(one.vectors)), [str(v) for v in one.vectors])
        place.set_title(one.title)
        for (vector, group), word in one.words.items():
            if word in MARKS:
                row, column = one.vectors.index(vector), one.groups.index(group)
                ink = "white" if abs(one.shares[row, column]) > DARK_CELL else FIXED_INK
                place.text(column, row, MARKS[word], ha="center", va="center", color=ink, weight="bold")
    figure.colorbar(image, ax=axes, label="share of headroom lost (unseen tokens)", shrink=0.4)
    figure.suptitle("What undoing one basis vector costs each skill; S selective, C carrier")
    return figure
