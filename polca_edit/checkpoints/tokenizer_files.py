"""The tokenizer of a checkpoint folder, with what it would do to every text unasked switched off."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


@dataclass(frozen=True)
class FolderTokenizer:
    """A tokenizer as a folder has it.

    Attributes:
        tokenizer: padding and truncation are off; beginnings and ends of documents are its own.
        separator: id that ends a document, None where the folder does not say.
        padding: id of padding, None where there is none.
        notes: what was switched off, for the reader.
    """

    tokenizer: Tokenizer
    separator: int | None
    padding: int | None
    notes: tuple[str, ...] = ()


def load_tokenizer(folder: Path | str) -> FolderTokenizer | None:
    """The folder's tokenizer, or None where there is none.

    ``tokenizer.json`` is read as it is. A stored padding or truncation, left there by whoever tokenised a
    training set last, would cut or fill every text; both are switched off and said.

    Raises:
        ValueError: for a file that is no tokenizer.
    """
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"'{file}' must be a tokenizer ({error}); save the tokenizer again") from error
    notes = []
    if tokenizer.padding is not None:
        tokenizer.no_padding()
        notes.append("padding stored in the tokenizer is switched off")
    if tokenizer.truncation is not None:
        longest = tokenizer.truncation.get("max_length")
        tokenizer.no_truncation()
        notes.append(f"truncation to {longest} tokens stored in the tokenizer is switched off")
    return FolderTokenizer(
        tokenizer,
        _special(folder, tokenizer, "eos_token", "<|endoftext|>"),
        _special(folder, tokenizer, "pad_token", None),
        tuple(notes),
    )


def _special(folder: Path, tokenizer: Tokenizer, role: str, usual: str | None) -> int | None:
    """Id of a special token as the tokenizer's own settings name it."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            value: Any = json.loads((folder / name).read_text()).get(role)
        except (OSError, ValueError, AttributeError):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and (index := tokenizer.token_to_id(text)) is not None:
            return int(index)
    index = None if usual is None else tokenizer.token_to_id(usual)
    return None if index is None else int(index)
