"""What a chapter of the page is made of: a title over blocks of words, tables and drawings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from markupsafe import Markup

from experiments.report.style import Drawing


class Block(Protocol):
    """A part of a section as HTML; whoever makes it escapes what came from data."""

    def __html__(self) -> str: ...


@dataclass(frozen=True)
class Section:
    """A chapter of the page.

    Attributes:
        title: heading.
        blocks: what stands below it, in order.
    """

    title: str
    blocks: Sequence[Block]

    @property
    def drawings(self) -> list[Drawing]:
        """Its figures."""
        return [block for block in self.blocks if isinstance(block, Drawing)]


def paragraph(text: str) -> Markup:
    """A paragraph of plain words."""
    return Markup("<p>{}</p>").format(text)


def note(text: str) -> Markup:
    """A paragraph in small print."""
    return Markup('<p class="note">{}</p>').format(text)


def heading(text: str) -> Markup:
    """A heading inside a chapter."""
    return Markup("<h3>{}</h3>").format(text)
