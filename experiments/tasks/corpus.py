"""Reading a user's text: the only place that opens text files.

Accepted: ``.jsonl`` (one object per line with a ``text`` field), ``.json`` (a list of objects or texts, or
an object that holds one), ``.csv`` and ``.tsv`` with a header, ``.npy`` (token ids), a folder saved by
``datasets``, and anything else as plain text; each also with ``.gz``.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polca_edit.text.conllu import TaggedDocument, read_conllu
from polca_edit.text.documents import (
    Document,
    deduplicate,
    documents_from_array,
    documents_from_jsonl,
    documents_from_plain,
    documents_from_rows,
)


@dataclass(frozen=True)
class Corpus:
    """Documents of a text, and how much of it they are.

    Attributes:
        documents: kept.
        read: documents before near-duplicates were left out.
        characters: of text in them.
    """

    documents: list[Document]
    read: int
    characters: int

    def sentence(self) -> str:
        """How much text was kept."""
        kept = sum(len(document.text) for document in self.documents)
        share = kept / self.characters if self.characters else 0.0
        return (
            f"text: {len(self.documents):,} of {self.read:,} documents kept, {kept:,} of {self.characters:,} "
            f"characters ({share:.1%})"
            + ("; the others are near-duplicates" if len(self.documents) < self.read else "")
        )


def read_documents(
    path: str | Path, *, field: str = "text", limit: int | None = None, unique: bool = True
) -> list[Document]:
    """Documents of a text; see :func:`read_corpus`."""
    return read_corpus(path, field=field, limit=limit, unique=unique).documents


def read_corpus(
    path: str | Path, *, field: str = "text", limit: int | None = None, unique: bool = True
) -> Corpus:
    """Documents of a text file or a ``datasets`` folder, near-duplicates left out.

    Args:
        path: the file or folder.
        field: text field of JSON, tables and data sets.
        limit: read at most this many documents.
        unique: drop near-duplicates (see :func:`polca_edit.text.documents.deduplicate`).

    Raises:
        ValueError: for a missing, unreadable or empty file.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"a text must exist, '{path}' does not; check the path after --text")
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if path.is_dir():
        documents = _saved_dataset(path, field, limit)
    else:
        with _lines(path) as lines:
            if ".jsonl" in path.suffixes or ".ndjson" in path.suffixes:
                documents = documents_from_jsonl(itertools.islice(lines, limit), field=field)
            elif kind == ".json":
                documents = _json(path, "".join(lines), field)
            elif kind in (".csv", ".tsv"):
                documents = _table(path, lines, field, "," if kind == ".csv" else "\t")
            elif kind in _BINARY:
                raise ValueError(
                    f"a text must be plain text, JSON, a table or token ids, '{path.name}' is none; convert "
                    "it to .jsonl with a text field"
                )
            else:
                documents = documents_from_plain("".join(lines))
    documents = documents[:limit]
    if not documents:
        raise ValueError(f"a text must hold at least one document, '{path}' is empty; give another file")
    kept = deduplicate(documents)[0] if unique else documents
    return Corpus(kept, len(documents), sum(len(document.text) for document in documents))


#: Suffixes of files that are no text, however they decode.
_BINARY = (".parquet", ".arrow", ".pdf", ".docx", ".zip", ".bin", ".npz", ".xlsx", ".zst", ".xz", ".bz2")


def _json(path: Path, text: str, field: str) -> list[Document]:
    """Documents of a JSON file: a list of objects or texts, or an object with one such list."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():
            return documents_from_jsonl(text.splitlines(), field=field)
        raise ValueError(f"'{path}' must be JSON ({error}); repair it, or name it .txt or .jsonl") from error
    if isinstance(value, dict) and field in value:
        value = value[field]
    elif isinstance(value, dict):
        lists = [key for key, held in value.items() if isinstance(held, list)]
        if len(lists) != 1:
            raise ValueError(
                f"'{path}' must be a list, or an object with one list or the field '{field}', it has "
                f"{sorted(value)[:6]}; write one object a line as .jsonl"
            )
        value = value[lists[0]]
    if isinstance(value, str):
        return documents_from_plain(value)
    if not isinstance(value, list):
        raise ValueError(f"'{path}' must hold a list of texts, got a {type(value).__name__}; write .jsonl")
    return documents_from_rows(_rows(path, value, field), field=field)


def _rows(path: Path, values: list[Any], field: str) -> Iterator[Mapping[str, Any]]:
    for number, value in enumerate(values):
        if not isinstance(value, str | dict):
            raise ValueError(
                f"entry {number} of '{path}' must be a text or an object, got a {type(value).__name__}; "
                "write one object a line as .jsonl"
            )
        yield {field: value} if isinstance(value, str) else value


def _table(path: Path, lines: Iterator[str], field: str, separator: str) -> list[Document]:
    """Documents of a table with a header, one a row."""
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(lines, delimiter=separator)
    if field not in (reader.fieldnames or ()):
        raise ValueError(
            f"a table must have a column '{field}', '{path.name}' has {list(reader.fieldnames or ())[:6]}; "
            "name the column (text.field)"
        )
    try:
        return documents_from_rows(reader, field=field)
    except csv.Error as error:
        raise ValueError(f"'{path}' must be a table ({error}, line {reader.line_num}); repair it") from error


def read_token_ids(
    path: str | Path, *, separator: int | None = None, padding: int | None = None, limit: int | None = None
) -> list[np.ndarray]:
    """Documents of a pre-tokenised ``.npy`` file: rows, or a flat array with a separator id.

    Args:
        path: the file.
        separator: id between the documents of a flat array.
        padding: id at the end of rows that is no text.
        limit: read at most this many documents.

    Raises:
        ValueError: if the file is missing or holds no integers.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"a token file must exist, '{path}' does not; check the path after --text")
    try:
        ids = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python, which may fail in any way
        raise ValueError(f"'{path}' must be an .npy array of token ids ({error}); use numpy.save") from error
    return documents_from_array(ids, separator=separator, padding=padding)[:limit]


def read_tagged(path: str | Path) -> list[TaggedDocument]:
    """Documents of a CoNLL-U file, gzipped or not.

    Raises:
        ValueError: if it is missing or not CoNLL-U.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"a CoNLL-U file must exist, '{path}' does not; check text.probe")
    with _lines(path) as lines:
        return read_conllu(lines)


class _lines:
    """Lines of a text file, gzipped or not, with a one-sentence error for bad bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Iterator[str]:
        opener = gzip.open if self.path.suffix == ".gz" else open
        self.handle = opener(self.path, "rt", encoding="utf-8-sig", newline=None)
        return self._read()

    def _read(self) -> Iterator[str]:
        try:
            yield from self.handle
        except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
            raise ValueError(f"'{self.path}' must be UTF-8 text or its gzip ({error}); convert it") from error

    def __exit__(self, *_: object) -> None:
        self.handle.close()


def _saved_dataset(path: Path, field: str, limit: int | None) -> list[Document]:
    try:
        from datasets import Dataset, DatasetDict, load_from_disk
    except ImportError as error:
        raise ValueError(
            f"'{path}' is a folder, which needs the package 'datasets'; pip install datasets or give a file"
        ) from error
    try:
        data = load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"'{path}' must be a folder saved by datasets.save_to_disk ({error})") from error
    if isinstance(data, DatasetDict):
        data = data["train"] if "train" in data else next(iter(data.values()))
    assert isinstance(data, Dataset)
    return documents_from_rows(itertools.islice(data, limit), field=field)
