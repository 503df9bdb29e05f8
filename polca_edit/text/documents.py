"""From text to token ids: documents, de-duplication, tokenizer.

No file is opened here: functions take lines, rows or arrays. :mod:`polca_edit.text.sequences` cuts the
ids into scored sequences.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"

#: A WikiText article begins with a heading of one equals sign on each side.
_HEADING = re.compile(r"^ ?= [^=].* = ?$")


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        name: where it came from (an id, a title, a running number).
        text: its text.
    """

    name: str
    text: str


def documents_from_jsonl(lines: Iterable[str], *, field: str = "text") -> list[Document]:
    """One document per JSON line.

    Args:
        lines: the file's lines; blank ones are skipped.
        field: name of the text field.

    Raises:
        ValueError: for a line that is not a JSON object with that field as a string.
    """
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"line {number} must be JSON, got {line[:40]!r} ({error.msg}); repair the file"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} must be a JSON object, got {type(row).__name__}; one a line")
        rows.append(row)
    return documents_from_rows(rows, field=field)


def documents_from_rows(rows: Iterable[Mapping[str, Any]], *, field: str = "text") -> list[Document]:
    """One document per row: a ``datasets.Dataset`` or any iterable of mappings.

    The name is the row's ``id``, else its ``title``, else its running number.

    Raises:
        ValueError: for a row without the text field.
    """
    documents = []
    for number, row in enumerate(rows):
        text = row.get(field)
        if not isinstance(text, str):
            raise ValueError(
                f"every row needs a text field '{field}', row {number} has {sorted(row)[:6]}; name the field"
            )
        if text.strip():
            documents.append(Document(str(row.get("id", row.get("title", number))), text))
    return documents


def documents_from_plain(text: str, *, characters: int = 2000) -> list[Document]:
    r"""Documents of a plain text.

    Where the text has WikiText headings (`` = Title = ``) each heading starts a document. Otherwise
    paragraphs (separated by blank lines) are joined until a document has ``characters`` characters,
    so that one long file still has documents to split by; neighbours then share a topic.

    >>> [d.text for d in documents_from_plain("one\n\ntwo\n\nthree", characters=6)]
    ['one\n\ntwo', 'three']
    """
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if _HEADING.match(line)]
    if len(starts) > 1:
        bounds = zip(starts, [*starts[1:], len(lines)], strict=True)
        pieces = ["\n".join(lines[a:b]).strip() for a, b in bounds]
        titles = [lines[a].strip(" =") for a in starts]
        return [Document(title, piece) for title, piece in zip(titles, pieces, strict=True) if piece]
    documents: list[Document] = []
    held: list[str] = []
    for paragraph in [*re.split(r"\n\s*\n", text), None]:
        if held and (paragraph is None or sum(map(len, held)) >= characters):
            documents.append(Document(str(len(documents)), "\n\n".join(held)))
            held = []
        if paragraph is not None and paragraph.strip():
            held.append(paragraph.strip("\n"))
    return documents


def deduplicate(
    documents: Sequence[Document], *, shingle: int = 13, share: float = 0.5
) -> tuple[list[Document], list[Document]]:
    """(kept, dropped): a document goes when most of its word n-grams occur in earlier ones.

    Shingles of 13 words are those of the GPT-3 overlap filter (Brown et al. 2020, appendix C).
    Texts shorter than one shingle are compared whole. Case and white space do not count.

    Args:
        documents: in order of preference; the first of a group of duplicates stays.
        shingle: words per n-gram.
        share: a document is dropped when more than this share of its n-grams was seen before.
    """
    seen: set[int] = set()
    codes: dict[str, int] = {}
    kept, dropped = [], []
    for document in documents:
        grams = set(_shingles(document.text.lower().split(), shingle, codes))
        if len(grams & seen) > share * len(grams):
            dropped.append(document)
            continue
        kept.append(document)
        seen |= grams
    return kept, dropped


def _shingles(words: Sequence[str], length: int, codes: dict[str, int]) -> list[int]:
    """A 64-bit polynomial hash of every run of ``length`` words (of the whole if it is shorter).

    ``codes`` keeps each word's own 64-bit code between calls.
    """
    for word in words:
        if word not in codes:
            codes[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    values = np.array([codes[word] for word in words], dtype=np.uint64)
    length = max(1, min(length, len(words)))
    total = np.zeros(max(1, len(values) - length + 1), dtype=np.uint64)
    for offset in range(length if len(values) else 0):
        # Wrap-around is wanted: the hash lives modulo 2**64.
        total = total * np.uint64(0x9E3779B97F4A7C15) + values[offset : offset + len(total)]
    result: list[int] = total.tolist()
    return result


# -- tokens of documents --------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer; id 0 is the end-of-text token.

    Args:
        texts: training documents only (no held-out text).
        vocabulary: number of tokens wanted, the 256 bytes and end-of-text included.

    Raises:
        ValueError: if the vocabulary has no room for all bytes.
    """
    if vocabulary < 257:
        raise ValueError(f"a byte-level vocabulary needs at least 257 tokens, got {vocabulary}; ask for more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_level_decoding() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies -> that byte.

    Radford et al. 2019: printable bytes stand for themselves, the others for U+0100 onwards.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def token_strings(tokenizer: Tokenizer) -> tuple[str, ...]:
    """What each token id looks like in text, a leading space included.

    Byte-level and SentencePiece-style vocabularies are understood; the bytes of a character that
    is cut between tokens show as U+FFFD.
    """
    table = byte_level_decoding()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    byte_level = "Ġ" in vocabulary or any("Ġ" in token for token in vocabulary)
    strings = [""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        if byte_level and all(character in table for character in token):
            strings[index] = bytes(table[c] for c in token).decode("utf-8", errors="replace")
        else:
            strings[index] = token.replace("▁", " ")
    return tuple(strings)


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of every document, each begun with end-of-text where the vocabulary has it."""
    start = tokenizer.token_to_id(END_OF_TEXT)
    head = [] if start is None else [start]
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.array(head + one.ids, dtype=np.int64) for one in encoded]


def documents_from_array(ids: np.ndarray, *, separator: int | None = None) -> list[np.ndarray]:
    """Documents of a pre-tokenised array.

    A two-dimensional array holds one document per row; a flat one is cut before each separator.

    >>> [d.tolist() for d in documents_from_array(np.array([0, 5, 6, 0, 7]), separator=0)]
    [[0, 5, 6], [0, 7]]

    Raises:
        ValueError: for a flat array without a separator, or another number of axes.
    """
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token ids must be integers, got {ids.dtype}; tokenise the text first")
    if ids.ndim == 2:
        return [row.astype(np.int64) for row in ids]
    if ids.ndim != 1 or separator is None:
        raise ValueError(
            "a pre-tokenised array needs one document per row, or one axis and a separator id, "
            f"got {ids.ndim} axes and separator {separator}; reshape it or pass the separator"
        )
    cuts = np.flatnonzero(ids == separator)
    return [part.astype(np.int64) for part in np.split(ids, cuts[cuts > 0]) if len(part)]
