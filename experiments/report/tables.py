"""One table, written as HTML for the page, as a terminal table, or as Markdown: the cells are shared."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import rich.table
from markupsafe import Markup, escape
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

#: Opacity of the strongest shade: the page's letters keep a contrast of 4.5 on it in both themes.
FULL = 0.58


@dataclass(frozen=True)
class Column:
    """A heading.

    Attributes:
        heading: its words.
        left: words stand left, numbers right.
        note: what it means, shown when the pointer rests on the heading of the page.
    """

    heading: str
    left: bool = False
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """A value as it is shown.

    Attributes:
        text: its words; ``Markup`` goes into the page as it is.
        sort: what the page sorts by, where that is not the text itself.
        look: CSS classes.
        colour: of a dot before the text.
        note: shown when the pointer rests on it.
        shade: of a map, from -1 (blue) over nothing to 1 (red).
    """

    text: str
    sort: float | None = None
    look: str = ""
    colour: str | None = None
    note: str = ""
    shade: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns.

    Attributes:
        columns: one per cell of a row.
        rows: plain text is a cell too.
        title: above the terminal's table.
        total: a last row that sorting leaves in place.
        look: CSS classes of the page's table.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    total: tuple[Cell, ...] | None = None
    look: str = ""

    def __post_init__(self) -> None:
        for row in (*self.rows, *([self.total] if self.total else [])):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"a row needs one cell for each of {len(self.columns)} columns, got {len(row)}; "
                    "add or drop cells"
                )

    def __html__(self) -> str:
        """The table for the page: headings sort it, and narrow screens scroll it."""
        head = "".join(_heading(column) for column in self.columns)
        body = "".join(self._html_row(row) for row in self.rows)
        total = f"<tfoot>{self._html_row(self.total)}</tfoot>" if self.total else ""
        look = escape(f"sortable {self.look}".strip())
        return (
            f'<div class="scroll"><table class="{look}"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody>{total}</table></div>"
        )

    def terminal(self) -> Terminal:
        """The table for a console; one that is too wide is written row by row, and nothing is cut."""
        return Terminal(self)

    def markdown(self) -> str:
        """The table for a document."""
        lines = [
            [column.heading for column in self.columns],
            ["---" if column.left else "---:" for column in self.columns],
            *([_plain(cell) for cell in row] for row in (*self.rows, *([self.total] if self.total else []))),
        ]
        return "".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |\n" for line in lines)

    def _html_row(self, row: Sequence[Cell]) -> str:
        cells = "".join(_html_cell(cell, column) for cell, column in zip(row, self.columns, strict=True))
        return f"<tr>{cells}</tr>"


@dataclass(frozen=True)
class Terminal:
    """A table as a console shows it: a grid where that fits, else one line for each value of a row."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for edges in (box.HEAVY_HEAD, box.SIMPLE_HEAD):
            grid = self.grid(edges)
            if Measurement.get(console, options.update(width=1000), grid).maximum <= options.max_width:
                yield grid
                return
        yield from self.records(options.max_width)

    def grid(self, edges: box.Box = box.HEAVY_HEAD) -> rich.table.Table:
        """Rows and columns; long words wrap."""
        given, narrow = self.table, edges is not box.HEAVY_HEAD
        made = rich.table.Table(
            title=given.title or None,
            title_justify="left",
            show_footer=bool(given.total),
            box=edges,
            padding=(0, 0) if narrow else (0, 1),
            pad_edge=not narrow,
        )
        for index, column in enumerate(given.columns):
            footer = _plain(given.total[index]) if given.total else ""
            made.add_column(
                Text(column.heading),
                footer=Text(footer),
                justify="left" if column.left else "right",
                overflow="fold",
            )
        for row in given.rows:
            made.add_row(*(Text(_plain(cell)) for cell in row))
        return made

    def records(self, most: int) -> Iterator[Text]:
        """Each row under its own words, a value a line of at most so many characters; nothing is cut."""
        given = self.table
        if given.title:
            yield Text(given.title, style="italic")
        width = max((len(column.heading) for column in given.columns), default=0)
        heads = next((i for i, column in enumerate(given.columns) if not column.left), 1) or 1
        for row in (*given.rows, *([given.total] if given.total else [])):
            yield Text("  ".join(_plain(cell) for cell in row[:heads]), style="bold")
            for column, cell in zip(given.columns[heads:], row[heads:], strict=True):
                if _plain(cell).strip():
                    text = f"  {column.heading:<{width}}  {_plain(cell)}"
                    after = " " * (width + 4)
                    room = max(most, width + 24)
                    yield from map(
                        Text, textwrap.wrap(text, room, subsequent_indent=after, break_long_words=False)
                    )


def table(
    columns: Iterable[Column | str], rows: Iterable[Iterable[Cell | str]], title: str = "", look: str = ""
) -> Table:
    """A table from cells and plain text; headings given as text are of numbers, all but the first.

    >>> print(table(["vector", "damage"], [["v1", "+0.25"]]).markdown(), end="")
    | vector | damage |
    | --- | ---: |
    | v1 | +0.25 |
    """
    heads = tuple(
        Column(column, left=not index) if isinstance(column, str) else column
        for index, column in enumerate(columns)
    )
    cells = tuple(tuple(Cell(c) if isinstance(c, str) else c for c in row) for row in rows)
    return Table(heads, cells, title, look=look)


def _plain(cell: Cell) -> str:
    return cell.text.striptags() if isinstance(cell.text, Markup) else cell.text


def _heading(column: Column) -> str:
    side, note = (' class="l"' if column.left else ""), _note(column.note)
    return f'<th scope="col"{side}{note}><button type="button">{escape(column.heading)}</button></th>'


def _html_cell(cell: Cell, column: Column) -> str:
    look = f"{'l ' if column.left else ''}{cell.look}".strip()
    sort = "" if cell.sort is None else f' data-sort="{cell.sort!r}"'
    text = escape(cell.text)
    if cell.colour is not None:
        first, space, rest = text.partition(" ")
        dot = f'<span class="dot" style="background:{cell.colour}"></span>'
        text = Markup(f'<span class="joined">{dot}{first}</span>{space}{rest}')
    shade = _shade(cell.shade)
    classes = f' class="{escape(look.strip())}"' if look else ""
    label = f' data-label="{escape(column.heading)}"'
    return f"<td{classes}{label}{sort}{shade}{_note(cell.note)}>{text}</td>"


def _shade(value: float | None) -> str:
    """Background of a map's cell; the paper shows through small values, in every theme."""
    if value is None:
        return ""
    colour = "178,24,43" if value > 0 else "33,102,172"
    return f' style="background:rgba({colour},{FULL * min(abs(value), 1.0):.2f})"'


def _note(text: str) -> str:
    return f' title="{escape(text)}"' if text else ""
