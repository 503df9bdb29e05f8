"""Gold part-of-speech tags: reading CoNLL-U lines and carrying word tags over to model tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from polca_edit.text.sequences import Windows
from polca_edit.tokens import TokenSet

#: Tag of tokens that are white space or markers, and of places before a document's first token.
NO_TAG = "_"
#: The token and the three before it (arXiv 2506.15872, appendix E.2).
GRAM = 4


@dataclass(frozen=True)
class TaggedDocument:
    """A document's text with the tag of every character.

    Attributes:
        name: document id.
        text: sentences joined by spaces.
        tags: one tag per character, :data:`NO_TAG` between words.
    """

    name: str
    text: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class GoldTags:
    """Tags of scored tokens.

    Attributes:
        grams: per token the tags of the third, second and first token before it, then its own.
    """

    grams: tuple[tuple[str, ...], ...]

    def skills(self) -> dict[str, Bool[Tensor, " M"]]:
        """Tag -> tokens that have it, as skill labels."""
        own = np.array([gram[-1] for gram in self.grams])
        return {str(tag): torch.from_numpy(own == tag) for tag in np.unique(own)}


def read_conllu(lines: Iterable[str]) -> list[TaggedDocument]:
    """Documents of a CoNLL-U file, universal tags (column 4).

    A contraction written as one word (``3-4 don't``) gives its characters to its parts where the
    parts spell it, else to the first part. Sentences before the first ``# newdoc`` form one document.

    Raises:
        ValueError: for a line that is not CoNLL-U.
    """
    documents: list[TaggedDocument] = []
    name, text = "0", ""
    tags: list[str] = []
    held: tuple[int, str, bool] | None = None  # last id, surface and space of an open contraction
    parts: list[tuple[str, str]] = []

    def flush() -> None:
        if text.strip():
            documents.append(TaggedDocument(name, text.rstrip(), tuple(tags[: len(text.rstrip())])))

    def add(form: str, tag: Sequence[str], space: bool) -> None:
        nonlocal text
        text += form + (" " if space else "")
        tags.extend([*tag, *([NO_TAG] if space else [])])

    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\n")
        if line.startswith("# newdoc"):
            flush()
            name, text, tags = line.partition("=")[2].strip() or str(len(documents)), "", []
        if not line or line.startswith("#"):
            continue
        columns = line.split("\t")
        if len(columns) != 10:
            raise ValueError(f"line {number} must have 10 columns, got {len(columns)}; is this CoNLL-U?")
        index, form, tag, space = columns[0], columns[1], columns[3], "SpaceAfter=No" not in columns[9]
        if "." in index:
            continue
        if "-" in index:
            held, parts = (int(index.split("-")[1]), form, space), []
        elif held is not None:
            parts.append((form, tag))
            if int(index) == held[0]:
                spelled = "".join(part for part, _ in parts) == held[1]
                each = [t for part, t in parts for _ in part] if spelled else [parts[0][1]] * len(held[1])
                add(held[1], each, held[2])
                held = None
        else:
            add(form, [tag] * len(form), space)
    flush()
    return documents


def token_tags(document: TaggedDocument, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The tag of every model token: that of the first character in it that has one.

    Args:
        document: text and character tags.
        offsets: (start, end) of each token in the text; empty spans (markers) have no tag.
    """
    return np.array(
        [next((t for t in document.tags[a:b] if t != NO_TAG), NO_TAG) for a, b in offsets], dtype=str
    )


def gold_tags(tokens: TokenSet, windows: Windows, tags: Mapping[int, np.ndarray]) -> GoldTags:
    """Tag 4-grams of every scored token.

    Args:
        tokens: a token set cut from ``windows``.
        windows: where each of its sequences lies in its document.
        tags: document id -> tag of every token of the document.
    """
    documents, offsets = windows.documents.tolist(), windows.offsets.tolist()
    grams = []
    for row, slot in zip(tokens.sequence_of.tolist(), tokens.position_of.tolist(), strict=True):
        own = tags[documents[row]]
        at = offsets[row] + slot + 1
        grams.append(tuple(str(own[i]) if i >= 0 else NO_TAG for i in range(at - GRAM + 1, at + 1)))
    return GoldTags(tuple(grams))
