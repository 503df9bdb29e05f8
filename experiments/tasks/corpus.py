"""Reading a user's text: the only place that opens text files.

Accepted: ``.jsonl`` (one object per line with a ``text`` field), ``.npy`` (token ids), a folder
saved by ``datasets``, and anything else as plain text; each also with ``.gz``.
"""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path

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


def read_documents(
    path: str | Path, *, field: str = "text", limit: int | None = None, unique: bool = True
) -> list[Document]:
    """Documents of a text file or a ``datasets`` folder, near-duplicates left out.

    Args:
        path: the file or folder.
        field: text field of JSON lines and data sets.
        limit: read at most this many documents.
        unique: drop near-duplicates (see :func:`polca_edit.text.documents.deduplicate`).

    Raises:
        ValueError: for a missing, unreadable or empty file.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"a text must exist, '{path}' does not; check the path after --text")
    if path.is_dir():
        documents = _saved_dataset(path, field, limit)
    elif ".jsonl" in path.suffixes:
        with _lines(path) as lines:
            documents = documents_from_jsonl(itertools.islice(lines, limit), field=field)
    else:
        with _lines(path) as lines:
            documents = documents_from_plain("".join(lines))[:limit]
    if not documents:
        raise ValueError(f"a text must hold at least one document, '{path}' is empty; give another file")
    return deduplicate(documents)[0] if unique else documents


def read_token_ids(path: str | Path, *, separator: int = 0, limit: int | None = None) -> list[np.ndarray]:
    """Documents of a pre-tokenised ``.npy`` file: rows, or a flat array with a separator id.

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
    return documents_from_array(ids, separator=separator)[:limit]


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
        self.handle = opener(self.path, "rt", encoding="utf-8")
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
