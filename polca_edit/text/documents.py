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

    The name is the row's ``id``, else its ``title``, else its running number. A row is cut where it holds an
    end-of-text mark, which is no text.

    Raises:
        ValueError: for a row without the text field, or one that is no Unicode text.
    """
    documents = []
    for number, row in enumerate(rows):
        if field not in row:
            raise ValueError(
                f"every row needs a text field '{field}', row {number} has {sorted(map(str, row))[:6]}; "
                "name the field (text.field)"
            )
        text = row[field]
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(
                f"the field '{field}' must hold text, that of row {number} is a {type(text).__name__}; "
                "name another field (text.field)"
            )
        documents += _marked(str(row.get("id", row.get("title", number))), text)
    return documents


def _marked(name: str, text: str) -> list[Document]:
    """The documents between end-of-text marks, empty ones left out.

    Raises:
        ValueError: for text with half a surrogate pair, which no tokenizer takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text must be Unicode, document '{name}' holds half a surrogate pair at character "
            f"{error.start}; encode it with 'surrogatepass' to UTF-16 and decode it with 'replace'"
        ) from error
    parts = [part for part in text.split(END_OF_TEXT) if part.strip()]
    if len(parts) == 1:
        return [Document(name, parts[0] if END_OF_TEXT in text else text)]
    return [Document(f"{name}.{number}", part) for number, part in enumerate(parts)]


def documents_from_plain(text: str, *, characters: int = 2000) -> list[Document]:
    r"""Documents of a plain text; nothing of it is dropped but white space.

    End-of-text marks separate documents. Where a part has WikiText headings (`` = Title = ``) each heading
    starts a document, and what stands before the first is one too. Otherwise paragraphs (separated by blank
    lines) are joined until a document has ``characters`` characters, so that one long file still has
    documents to split by; neighbours then share a topic. A paragraph of more than twice that (one sentence a
    line, one long line) is cut at line ends, else at white space.

    >>> [d.text for d in documents_from_plain("one\n\ntwo\n\nthree", characters=6)]
    ['one\n\ntwo', 'three']
    >>> [d.text for d in documents_from_plain("one two three four", characters=8)]
    ['one two', 'three', 'four']
    """
    parts = [document.text for document in _marked("", text)]
    found: list[Document] = []
    for part in parts:
        for title, piece in _headed(part) or _joined(part, characters):
            found.append(Document(title or str(len(found)), piece))
    return found


def _headed(text: str) -> list[tuple[str, str]]:
    """(title, piece) of a text with at least two WikiText headings, empty for every other."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if _HEADING.match(line)]
    if len(starts) < 2:
        return []
    titles = [lines[start].strip(" =") for start in starts]
    if starts[0] > 0:
        starts, titles = [0, *starts], ["", *titles]
    bounds = zip(starts, [*starts[1:], len(lines)], strict=True)
    pieces = ["\n".join(lines[a:b]).strip() for a, b in bounds]
    return [(title, piece) for title, piece in zip(titles, pieces, strict=True) if piece]


def _joined(text: str, characters: int) -> list[tuple[str, str]]:
    """(no title, piece): whole paragraphs up to a number of characters, long ones cut."""
    pieces: list[tuple[str, str]] = []
    held: list[str] = []
    for paragraph in [*re.split(r"\n\s*\n", text), None]:
        if held and (paragraph is None or sum(map(len, held)) >= characters):
            pieces.append(("", "\n\n".join(held)))
            held = []
        if paragraph is None or not paragraph.strip():
            continue
        parts = _cut(paragraph.strip("\n"), characters)
        if len(parts) > 1:
            pieces += [("", part) for part in [*(["\n\n".join(held)] if held else []), *parts[:-1]]]
            held = [parts[-1]]
        else:
            held.append(parts[0])
    return pieces


def _cut(paragraph: str, characters: int) -> list[str]:
    """A paragraph in pieces of about a number of characters, cut at line ends, else at white space."""
    if len(paragraph) <= 2 * characters:
        return [paragraph]
    between = "\n" if "\n" in paragraph else None
    pieces: list[str] = []
    held: list[str] = []
    size = 0
    for part in paragraph.split(between):
        if held and size + len(part) > characters:
            pieces.append((between or " ").join(held))
            held, size = [], 0
        held.append(part)
        size += len(part) + 1
    return [*pieces, (between or " ").join(held)]


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
    """Token ids of every document.

    Documents begin and end as the tokenizer's own rules say; where it has none, each begins with
    end-of-text if the vocabulary has it.
    """
    start = tokenizer.token_to_id(END_OF_TEXT)
    own = tokenizer.encode("", add_special_tokens=True).ids
    head = [] if start is None or own else [start]
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=True)
    return [np.array(head + one.ids, dtype=np.int64) for one in encoded]


def documents_from_array(
    ids: np.ndarray, *, separator: int | None = None, padding: int | None = None
) -> list[np.ndarray]:
    """Documents of a pre-tokenised array.

    A two-dimensional array holds one document per row, filled up at the end with ``padding`` or negative ids
    (-100), which are no text. A flat one is cut at the separator: after each where the array ends with one
    and does not begin with one, else before each.

    >>> [d.tolist() for d in documents_from_array(np.array([0, 5, 6, 0, 7]), separator=0)]
    [[0, 5, 6], [0, 7]]
    >>> [d.tolist() for d in documents_from_array(np.array([5, 6, 0, 7, 0]), separator=0)]
    [[5, 6, 0], [7, 0]]
    >>> [d.tolist() for d in documents_from_array(np.array([[5, 6, -100], [7, 8, 9]]))]
    [[5, 6], [7, 8, 9]]

    Raises:
        ValueError: for a flat array without a separator, another number of axes, or ids below zero inside.
    """
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token ids must be integers, got {ids.dtype}; tokenise the text first")
    if ids.ndim == 2:
        rows = [_unpadded(row.astype(np.int64), padding) for row in ids]
        return [_whole(row) for row in rows if len(row)]
    if ids.ndim != 1 or separator is None:
        raise ValueError(
            "a pre-tokenised array needs one document per row, or one axis and a separator id, "
            f"got {ids.ndim} axes and separator {separator}; reshape it or name it (text.separator)"
        )
    marks = np.flatnonzero(ids == separator)
    if not len(marks):
        raise ValueError(
            f"a flat array of token ids must hold its separator, {separator} does not occur; name the one "
            "that does (text.separator)"
        )
    after = marks[-1] == len(ids) - 1 and marks[0] != 0
    cuts = marks + 1 if after else marks
    parts = np.split(ids, cuts[(cuts > 0) & (cuts < len(ids))])
    return [_whole(part.astype(np.int64)) for part in parts if len(part)]


def _unpadded(row: np.ndarray, padding: int | None) -> np.ndarray:
    filled = (row < 0) if padding is None else (row < 0) | (row == padding)
    text = np.flatnonzero(~filled)
    return row[: text[-1] + 1] if len(text) else row[:0]


def _whole(ids: np.ndarray) -> np.ndarray:
    if (ids < 0).any():
        raise ValueError(
            f"token ids must not be below zero inside a document, got {int(ids.min())}; give the inputs, "
            "not the labels, with padding at the end"
        )
    return ids
