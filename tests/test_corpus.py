"""Texts and token ids as people have them: read right, or refused in a sentence."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from experiments.tasks.corpus import read_corpus, read_token_ids
from polca_edit.checkpoints.tokenizer_files import load_tokenizer
from polca_edit.text.documents import (
    documents_from_array,
    documents_from_plain,
    encode_documents,
    train_tokenizer,
)

WORDS = [f"word{i} and some more text about number {i}" for i in range(40)]


def tokenizer() -> Tokenizer:
    return train_tokenizer(WORDS, 300)


class TestFormats:
    def texts(self, path) -> list[str]:
        return [document.text for document in read_corpus(path, unique=False).documents]

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.json", json.dumps([{"text": t} for t in WORDS])),
            ("a.json", json.dumps(WORDS)),
            ("a.json", json.dumps({"version": 1, "data": [{"text": t} for t in WORDS]})),
            ("a.json", json.dumps({"text": WORDS})),
            ("a.json", "".join(json.dumps({"text": t}) + "\n" for t in WORDS)),
            ("a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in WORDS)),
            ("a.csv", "id,text\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(WORDS))),
            ("a.tsv", "id\ttext\n" + "".join(f"{i}\t{t}\n" for i, t in enumerate(WORDS))),
            ("a.txt", "<|endoftext|>".join(WORDS)),
        ],
    )
    def test_the_same_documents_from_every_format(self, name, content, packed, tmp_path):
        path = tmp_path / (name + ".gz" if packed else name)
        path.write_bytes(gzip.compress(content.encode()) if packed else b"\xef\xbb\xbf" + content.encode())
        assert self.texts(path) == WORDS

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("a.csv", b"id,body\n1,x\n", "column 'text'.*'body'"),
            ("a.json", b'{"a": [1], "b": [2]}', "one list or the field 'text'"),
            ("a.json", b"[1, 2]", "entry 0 .* int"),
            ("a.json", b"[", "must be JSON"),
            ("a.json", b"3", "list of texts"),
            ("a.jsonl", b'{"body": "x"}\n', "text field 'text'"),
            ("a.jsonl", b'{"text": 3}\n', "is a int"),
            ("a.jsonl", b'{"text": "\\ud800 x"}\n', "half a surrogate pair"),
            ("a.jsonl", b'{"text": null}\n', "empty"),
            ("a.parquet", b"PAR1", "convert it"),
            ("a.txt", b"\xff\xfe\x00", "UTF-8"),
            ("a.txt", b"  \n", "empty"),
            ("a.txt.gz", b"no gzip", "gzip"),
        ],
    )
    def test_what_cannot_be_read_is_a_sentence(self, name, content, words, tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_corpus(tmp_path / name)

    def test_how_much_was_kept_is_said(self, tmp_path):
        (tmp_path / "a.json").write_text(json.dumps(["one two three", "one two three", "four five"]))
        found = read_corpus(tmp_path / "a.json")
        assert found.sentence() == (
            "text: 2 of 3 documents kept, 22 of 35 characters (62.9%); the others are near-duplicates"
        )


class TestPlainText:
    def test_nothing_is_dropped_before_the_first_heading(self):
        text = "a preface\nof two lines\n = One = \nbody one\n = Two = \nbody two\n"
        found = documents_from_plain(text)
        assert [d.text.split("\n")[0].strip() for d in found] == ["a preface", "= One =", "= Two ="]

    @pytest.mark.parametrize("between", [" ", "\n"])
    def test_one_long_line_and_one_sentence_a_line_have_documents(self, between):
        words = [f"w{i}" for i in range(5000)]
        found = documents_from_plain(between.join(words))
        assert len(found) > 5
        assert " ".join(d.text for d in found).split() == words
        assert max(len(d.text) for d in found) <= 2100

    def test_marks_are_no_text(self):
        found = documents_from_plain("one<|endoftext|>\ntwo\n<|endoftext|>")
        assert [d.text.strip() for d in found] == ["one", "two"]


class TestTokenizers:
    def test_stored_padding_and_truncation_are_switched_off_and_said(self, tmp_path):
        own = tokenizer()
        plain = [len(ids) for ids in encode_documents(own, WORDS)]
        own.enable_padding(pad_id=1, pad_token="!", length=200)
        own.enable_truncation(5)
        own.save(str(tmp_path / "tokenizer.json"))
        found = load_tokenizer(tmp_path)
        assert [len(ids) for ids in encode_documents(found.tokenizer, WORDS)] == plain
        assert len(found.notes) == 2
        assert "truncation to 5 tokens" in found.notes[1]

    def test_a_tokenizers_own_beginnings_and_ends_are_used(self):
        own = tokenizer()
        start = own.token_to_id("<|endoftext|>")
        assert encode_documents(own, ["word1"])[0][0] == start  # no rule: each begins with end-of-text
        body = own.encode("word1", add_special_tokens=False).ids
        own.add_special_tokens(["<s>", "</s>"])
        marks = [(mark, own.token_to_id(mark)) for mark in ("<s>", "</s>")]
        own.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
        assert encode_documents(own, ["word1"])[0].tolist() == [marks[0][1], *body, marks[1][1]]

    def test_end_of_text_and_padding_are_the_folders_own(self, tmp_path):
        own = tokenizer()
        own.add_special_tokens(["</s>", "<pad>"])
        own.save(str(tmp_path / "tokenizer.json"))
        settings = {"eos_token": "</s>", "pad_token": {"content": "<pad>"}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        found = load_tokenizer(tmp_path)
        assert (found.separator, found.padding) == (own.token_to_id("</s>"), own.token_to_id("<pad>"))

    def test_a_file_that_is_no_tokenizer_is_a_sentence(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match="must be a tokenizer"):
            load_tokenizer(tmp_path)


class TestIds:
    def test_flat_ids_are_cut_at_the_separator_that_is_named(self, tmp_path):
        ids = np.array([5, 6, 299, 0, 7, 8, 299, 9, 0, 3, 299], dtype=np.uint16)
        np.save(tmp_path / "a.npy", ids)
        found = read_token_ids(tmp_path / "a.npy", separator=299)
        assert [d.tolist() for d in found] == [[5, 6, 299], [0, 7, 8, 299], [9, 0, 3, 299]]
        with pytest.raises(ValueError, match=r"text\.separator"):
            read_token_ids(tmp_path / "a.npy")
        with pytest.raises(ValueError, match="300 does not occur"):
            read_token_ids(tmp_path / "a.npy", separator=300)

    def test_padding_at_the_end_of_rows_is_no_text(self):
        rows = np.array([[5, 6, 1, 1], [7, 1, 8, 9], [1, 1, 1, 1], [2, -100, -100, -100]])
        found = documents_from_array(rows, padding=1)
        assert [d.tolist() for d in found] == [[5, 6], [7, 1, 8, 9], [2]]
        with pytest.raises(ValueError, match="below zero"):
            documents_from_array(np.array([[-100, 5, 6]]))
