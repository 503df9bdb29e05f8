"""The one style of all figures: colours, letters, file names, and how a figure enters the page.

Figures are built with matplotlib's object-oriented interface alone and the style holds only while a
figure of ours is drawn, so the caller's backend and settings stay as they are.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from experiments.report.figure_data import PanelData, csv_of, figure_data
from polca_edit.artifacts import to_plain
from polca_edit.checkpoints.files import write_atomically

#: Okabe and Ito's colours and a few beside them: apart also for colour-blind readers. Skills only.
CYCLE = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D31", "#8A7BC8", "#A0A0A0",
    "#B8D36B",
)  # fmt: skip
#: What is no skill: attributed, the rest of the movement, the start of a breakthrough.
SLATE, SAND, CRIMSON = "#5F7F9E", "#C9A66B", "#C2293B"
#: Letters and lines, and the paper under them; the page swaps these four for those of its theme.
INK, GREY, PALE, PAPER = "#222222", "#777777", "#d9d9d9", "#fefefe"
#: Letters on coloured cells, the same in every theme.
FIXED_INK = "#222223"
THEMED = {INK: "--ink", GREY: "--soft", PALE: "--pale", PAPER: "--paper"}
LIGHT = {"--ink": "#222222", "--soft": "#6b6b6b", "--pale": "#d9d9d9", "--paper": "#ffffff"}
DARK = {"--ink": "#e6e6e6", "--soft": "#a0a0a0", "--pale": "#4a4d52", "--paper": "#16181b"}
#: Inches of a figure as wide as the page; letters have one size in all figures.
WIDTH = 11.0
#: Inches of a figure that stands beside another, and on a phone's screen.
PAIRED = 4.8
#: Dots per inch of a PNG.
DOTS = 150
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "figure.titlesize": 10.5,
    "svg.hashsalt": "polca-edit",
    "svg.fonttype": "none",
}
#: Letters of figures: where the first is missing, one as wide.
FONTS = "'DejaVu Sans', Verdana, Geneva, sans-serif"
#: File names stay below this many characters.
LONGEST_NAME = 60


@contextmanager
def styled() -> Iterator[None]:
    """The style, for as long as a figure is built or saved; ``@styled()`` styles a whole function."""
    with matplotlib.rc_context(STYLE):
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, in inches, that keeps its labels apart."""
    return Figure(figsize=(width, height), layout="constrained")


@dataclass(frozen=True)
class Panel:
    """Size of a panel and the room for letters around its axes, in inches."""

    width: float
    height: float
    left: float
    right: float
    below: float
    above: float


def fixed_panels(count: int, panel: Panel, most: int, halves: int = 1) -> tuple[Figure, list[list[Axes]]]:
    """Equal panels of ``halves`` axes above one another, at most ``most`` a row.

    Their places follow from the letters' one size alone, which takes a fraction of the time of a search.
    """
    columns = min(most, count)
    rows = -(-count // columns)
    width, height = panel.width * columns, panel.height * rows
    figure = Figure(figsize=(width, height))
    wide = panel.width - panel.left - panel.right
    gap = 0.1
    tall = (panel.height - panel.below - panel.above - gap * (halves - 1)) / halves
    grid: list[list[Axes]] = []
    for index in range(count):
        x = panel.width * (index % columns) + panel.left
        y = height - panel.height * (index // columns) - panel.above
        tops = (y - half * (tall + gap) for half in range(halves))
        places = ((x / width, (top - tall) / height, wide / width, tall / height) for top in tops)
        grid.append([figure.add_axes(place) for place in places])
    return figure, grid


def panels(count: int, width: float, height: float, most: int) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` equal panels, at most ``most`` a row, each of that size in inches."""
    columns = min(most, count)
    rows = -(-count // columns)
    figure = new_figure(0.7 + height * rows, width * columns)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return figure, list(grid.flat[:count])


def shared_legend(figure: Figure, axes: Sequence[Axes], columns: int) -> None:
    """One legend below all panels; each label once."""
    handles = {
        label: handle
        for each in axes
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns)


def wrapped(text: str, width: int = 36) -> str:
    """A title over several lines; words are never cut."""
    return textwrap.fill(text, width, break_long_words=False)


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour per name, repeated after ten."""
    return {name: CYCLE[index % len(CYCLE)] for index, name in enumerate(names)}


def lighter(colour: str, share: float = 0.45) -> str:
    """A colour mixed with white.

    >>> lighter("#000000", 0.5)
    '#808080'
    """
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)


def file_name(title: str) -> str:
    """A file name of its own for every title: what letters and digits cannot say goes into a hash.

    >>> file_name("trajectory-curves")
    'trajectory-curves'
    >>> file_name("a b") != file_name("a/b"), file_name("x" * 90 + "1") != file_name("x" * 90 + "2")
    (True, True)
    """
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", title).strip("-")
    if plain == title and len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[: LONGEST_NAME - 9]}-{hashlib.sha256(title.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Drawing:
    """A figure with its title and what it says in words.

    Attributes:
        title: says which figure it is; its file name follows from it (:func:`file_name`).
        caption: one or two sentences for readers, also the alternative text.
        figure: what to draw.
    """

    title: str
    caption: str
    figure: Figure

    @property
    def name(self) -> str:
        """File name under figures/, without the ending."""
        return file_name(self.title)

    def __html__(self) -> str:
        """The figure for the page: real letters, its numbers beside it; wide ones scroll on narrow screens.

        The picture takes the page's colours, and its numbers lie next to it for hovering and for CSV.
        """
        inches = float(self.figure.get_figwidth())
        width = f"width:{100 * min(inches / WIDTH, 1.0):.0f}%;min-width:{min(52 * inches, 572):.0f}px"
        numbers = json.dumps([to_plain(panel) for panel in self.data], separators=(",", ":"))
        numbers = numbers.replace("</", "<\\/")
        return (
            f'<figure class="plot" id="fig-{self.name}" data-name="{self.name}"><div class="scroll">'
            f'<div class="canvas" style="{width}">{inlined(self.svg, self.name, self.caption)}</div></div>'
            f"<figcaption>{escape(self.caption)}</figcaption>"
            f'<script type="application/json">{numbers}</script></figure>'
        )

    @cached_property
    def svg(self) -> str:
        """The drawing as an SVG file that follows the reader's light or dark theme."""
        buffer = io.BytesIO()
        with self._laid_out("none"):
            FigureCanvasSVG(self.figure).print_svg(buffer, metadata={"Date": None})  # type: ignore[no-untyped-call]
        return themed(buffer.getvalue().decode())

    @cached_property
    def data(self) -> tuple[PanelData, ...]:
        """The numbers it shows, with their places on the laid out drawing."""
        _ = self.svg
        return figure_data(self.figure)

    def write(self, folder: Path) -> tuple[Path, Path]:
        """The drawing as ``NAME.svg`` and its numbers as ``NAME.csv``."""
        contents = {".svg": self.svg, ".csv": csv_of(self.data)}
        for ending, text in contents.items():
            write_atomically(folder / f"{self.name}{ending}", _writer(text))
        return folder / f"{self.name}.svg", folder / f"{self.name}.csv"

    def png(self) -> bytes:
        """The drawing as PNG on white."""
        buffer = io.BytesIO()
        with self._laid_out("white"):
            self.figure.set_dpi(DOTS)
            FigureCanvasAgg(self.figure).print_png(buffer, metadata={"Software": None})  # type: ignore[no-untyped-call]
        return buffer.getvalue()

    def write_png(self, path: Path) -> None:
        """The drawing as a PNG file."""
        content = self.png()
        write_atomically(path, lambda part: part.write_bytes(content))

    @contextmanager
    def _laid_out(self, paper: str) -> Iterator[None]:
        """The style on a paper; finding places for labels is the slow part, so it is done once."""
        with styled():
            self.figure.set_facecolor(paper)
            yield
        self.figure.set_layout_engine("none")


def _writer(text: str) -> Callable[[Path], object]:
    return lambda part: part.write_text(text, encoding="utf-8")


def themed(svg: str) -> str:
    """An SVG whose letters, lines and paper take the colours of the reader's theme."""
    for colour, variable in THEMED.items():
        svg = svg.replace(f": {colour}", f": var({variable})")
    svg = svg.replace("'DejaVu Sans'", FONTS)
    return re.sub(r"(<svg [^>]*>)", rf"\1<style>{theme_css()}</style>", svg, count=1)


def inlined(svg: str, name: str, told: str) -> Markup:
    """An SVG as part of a page: the page's colours, names of its own, described in words."""
    body = svg[svg.index("<svg ") :]
    body = re.sub(r"<style>:root.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    for old, new in (('id="', f'id="{name}-'), ('href="#', f'href="#{name}-'), ("url(#", f"url(#{name}-")):
        body = body.replace(old, new)
    head, _, rest = body.partition(">")
    head = re.sub(r'\s(width|height|version|xmlns(:\w+)?)="[^"]*"', "", head)
    return Markup('{} role="img" aria-label="{}">{}').format(Markup(head), told, Markup(rest))


def theme_css() -> str:
    """The four themed colours, light and dark, as CSS variables."""

    def block(values: dict[str, str]) -> str:
        return ":root{" + ";".join(f"{name}:{value}" for name, value in values.items()) + "}"

    return f"{block(LIGHT)}@media (prefers-color-scheme:dark){{{block(DARK)}}}"
