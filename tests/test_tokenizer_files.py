"""Tokenizers given as vocab.json and merges.txt: the ids of transformers' own reader, or a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer

from polca_edit.checkpoints.tokenizer_files import load_tokenizer

TEXTS = [
    "Hello world, it's 12 o'clock.",
    "  Two  spaces\n\nand a\tnew line ",
    "naïve 日本 é 🙂",
    "before<|endoftext|>after",
    "",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS[:3] * 20, vocab_size=400, special_tokens=["<|endoftext|>"])
    trained.save_model(str(tmp_path))
    return tmp_path


def own_ids(folder: Path) -> list[list[int]]:
    from transformers import GPT2Tokenizer

    reader = GPT2Tokenizer.from_pretrained(str(folder))
    return [reader(text).input_ids for text in TEXTS]


def test_ids_are_those_of_transformers_and_letters_come_back(folder: Path) -> None:
    found = load_tokenizer(folder)
    assert found is not None
    assert [found.tokenizer.encode(text).ids for text in TEXTS] == own_ids(folder)
    assert found.separator == found.tokenizer.token_to_id("<|endoftext|>")
    for text in TEXTS[:3]:
        assert found.tokenizer.decode(found.tokenizer.encode(text).ids) == text
    assert found.notes == ("tokenizer read from vocab.json and merges.txt as GPT2Tokenizer",)


def test_the_class_and_beginnings_that_the_folder_names_are_used(folder: Path) -> None:
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **ends}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found = load_tokenizer(folder)
    assert found is not None
    ids = [found.tokenizer.encode(text).ids for text in TEXTS]
    assert ids == own_ids(folder)
    assert ids[0][0] == found.separator


@pytest.mark.parametrize("vocabulary", [None, "{}", "[1, 2]", "not json"])
def test_merges_without_their_words_are_refused(folder: Path, vocabulary: str | None) -> None:
    (folder / "vocab.json").unlink()
    if vocabulary is not None:
        (folder / "vocab.json").write_text(vocabulary)
    with pytest.raises(ValueError, match=r"save the tokenizer"):
        load_tokenizer(folder)


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
