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

    ``tokenizer.json`` is read as it is; ``vocab.json`` with ``merges.txt`` (GPT-2 and its kin) as
    transformers reads them, by the class the folder names and as GPT-2's where it names none. A stored
    padding or truncation, left there by whoever tokenised a training set last, would cut or fill every text;
    both are switched off and said.

    Raises:
        ValueError: for a file that is no tokenizer.
    """
    folder = Path(folder)
    file, notes = folder / "tokenizer.json", []
    if file.exists():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"'{file}' must be a tokenizer ({error}); save the tokenizer again") from error
    elif (folder / "merges.txt").exists():
        tokenizer, kind = _merged(folder)
        notes.append(f"tokenizer read from vocab.json and merges.txt as {kind}")
    else:
        return None
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


def _merged(folder: Path) -> tuple[Tokenizer, str]:
    """The tokenizer of ``vocab.json`` and ``merges.txt``, and the name of its class."""
    from transformers import AutoTokenizer, GPT2TokenizerFast

    named = any((folder / name).exists() for name in ("tokenizer_config.json", "config.json"))
    words = folder / "vocab.json"
    try:
        count = len(json.loads(words.read_text(encoding="utf-8")))
        kind = AutoTokenizer if named else GPT2TokenizerFast
        found = kind.from_pretrained(str(folder), local_files_only=True)
        tokenizer: Tokenizer = found.backend_tokenizer
    except Exception as error:  # transformers and tokenizers raise whatever comes
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"'{folder}' must hold a vocab.json that fits its merges.txt ({reason}); save the tokenizer again"
        ) from error
    if not count or tokenizer.get_vocab_size(with_added_tokens=False) < count:
        raise ValueError(
            f"'{words}' has {count} tokens, {type(found).__name__} read "
            f"{tokenizer.get_vocab_size(with_added_tokens=False)}; save the tokenizer as tokenizer.json"
        )
    return tokenizer, type(found).__name__


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
