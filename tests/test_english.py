"""The English task: files in, splits and batches out; the paper's parameter count."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.config import parse_config
from experiments.tasks import text as english
from experiments.tasks.corpus import read_documents, read_token_ids
from polca_edit.models import build_small_transformer

DATA = Path(os.environ.get("POLCA_EDIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
NOUNS = ["tree", "river", "engine", "cloud", "market", "teacher", "bridge", "song", "window", "planet"]
VERBS = ["moves", "holds", "finds", "leaves", "turns", "paints", "breaks", "keeps", "builds", "forgets"]


def story(number: int, length: int = 40) -> str:
    draw = np.random.default_rng(number)
    return " ".join(
        f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} a {draw.choice(NOUNS)} {draw.integers(100)}."
        for _ in range(length)
    )


def write_jsonl(path: Path, count: int = 40) -> Path:
    with gzip.open(path, "wt") as handle:
        for i in range(count):
            handle.write(json.dumps({"id": i, "text": story(i)}) + "\n")
    return path


def config(path: Path, **text: object):
    sizes = {"curvature_sequences": 10, "select_sequences": 12, "evaluate_sequences": 12}
    return parse_config(
        {
            "task": "text",
            "model": {"layers": 1, "d_model": 16, "heads": 2, "d_mlp": 32},
            "text": {"file": str(path), "vocabulary": 300, "n_ctx": 16, **sizes, **text},
            "training": {"steps": 10, "batch_size": 4, "record_every": 2},
        }
    )


def test_the_paper_model_has_exactly_the_published_number_of_parameters():
    model = build_small_transformer(english.PAPER_SHAPE, 0)
    assert sum(p.numel() for p in model.parameters()) == english.PAPER_PARAMETERS == 40_274_737


def test_a_task_from_jsonl(tmp_path):
    task = english.build(config(write_jsonl(tmp_path / "t.jsonl.gz")))
    splits = task.splits
    assert [s.sequences for s in (splits.curvature, splits.select, splits.evaluate)] == [10, 12, 12]
    assert splits.select.count == 12 * 8
    losses = task.objective(config(tmp_path)).losses(task.space.read(task.module), splits.select)
    # A fresh model is near uniform over 300 tokens; ln 300 = 5.70.
    assert 5.0 < float(losses.mean()) < 7.0
    assert task.batch_loss is not None
    assert torch.isfinite(task.batch_loss(task.module, 1))


def test_batches_are_a_pure_function_of_seed_and_step_and_never_held_out(tmp_path):
    # Every document repeats its own number, so a token tells its document.
    path = tmp_path / "ids.npy"
    np.save(path, np.repeat(np.arange(40)[:, None], 64, axis=1))
    data = english.text_data(config(path))
    splits = data.splits
    held_out = set(torch.cat([splits.select.inputs, splits.evaluate.inputs]).unique().tolist())
    assert torch.equal(data.batch(3), data.batch(3))
    assert not torch.equal(data.batch(3), data.batch(4))
    seen = set(torch.cat([data.batch(i) for i in range(1, 200)]).unique().tolist())
    assert seen.isdisjoint(held_out)
    # Documents that were drawn by hold_out but not needed are not trained on either; the rest all occur.
    assert len(seen) + len(held_out) >= 38


def test_another_seed_draws_other_documents(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl.gz")
    one = english.text_data(config(path))
    same = english.text_data(config(path))
    other = english.text_data(config(path).model_copy(update={"seed": 1}))
    assert torch.equal(one.splits.select.inputs, same.splits.select.inputs)
    assert one.splits.select.documents.tolist() != other.splits.select.documents.tolist()


def test_training_learns_the_text(tmp_path):
    from polca_edit.tokens import next_token_loss
    from polca_edit.training import TrainingSettings, train

    task = english.build(config(write_jsonl(tmp_path / "t.jsonl.gz")))

    def held_out_loss() -> float:
        with torch.no_grad():
            return float(next_token_loss(task.module, task.splits.select.inputs).mean())

    before = held_out_loss()
    train(task.module, task.batch_loss, TrainingSettings(150, 1e-2, warmup=10))
    assert held_out_loss() < before - 2.0


class Uniform(nn.Module):
    """Logits that do not depend on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(7))

    def forward(self, tokens):
        return self.bias.expand(*tokens.shape, 7)


def test_batch_loss_is_the_cross_entropy_of_next_tokens(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 7, (40, 64)))
    data = english.text_data(config(path))
    assert float(data.batch_loss(Uniform(), 1)) == pytest.approx(np.log(7), rel=1e-6)


class TestReading:
    def test_plain_gzip_and_datasets_folder_agree(self, tmp_path):
        texts = [story(i) for i in range(5)]
        plain = "\n\n".join(texts)
        (tmp_path / "a.txt").write_text(plain)
        with gzip.open(tmp_path / "a.txt.gz", "wt") as handle:
            handle.write(plain)
        one, two = read_documents(tmp_path / "a.txt"), read_documents(tmp_path / "a.txt.gz")
        assert one == two
        assert "\n\n".join(d.text for d in one) == plain
        datasets = pytest.importorskip("datasets", reason="package 'datasets' is not installed")
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
        assert [d.text for d in read_documents(tmp_path / "saved")] == texts

    @pytest.mark.parametrize("name", ["none.txt", "none.npy"])
    def test_a_missing_file_is_named(self, tmp_path, name):
        with pytest.raises(ValueError, match=name):
            (read_token_ids if name.endswith("npy") else read_documents)(tmp_path / name)

    def test_empty_and_binary_files_are_refused(self, tmp_path):
        (tmp_path / "empty.txt").write_text("\n\n")
        with pytest.raises(ValueError, match="empty"):
            read_documents(tmp_path / "empty.txt")
        (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
        with pytest.raises(ValueError, match="UTF-8"):
            read_documents(tmp_path / "binary.txt")
        (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 100)[:-20])
        with pytest.raises(ValueError, match="gzip"):
            read_documents(tmp_path / "cut.jsonl.gz")

    def test_no_text_and_too_large_ids_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="--text"):
            english.text_data(parse_config({"task": "text"}))
        np.save(tmp_path / "ids.npy", np.full((40, 64), 300))
        with pytest.raises(ValueError, match="below the vocabulary of 300"):
            english.text_data(config(tmp_path / "ids.npy"))


def test_wikipedia_articles(tmp_path):
    path = DATA / "wiki" / "wiki_core_valid.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the Wikipedia sample is not at hand (set POLCA_EDIT_DATA): {path.name}")
    data = english.text_data(config(path, max_documents=30, select_sequences=16, evaluate_sequences=16))
    assert data.splits.select.sequences == 16
    # The windows of the splits are pieces of the articles, word for word.
    texts = [d.text for d in read_documents(path, limit=30)]
    for row in data.splits.select.inputs[:4].tolist():
        piece = "".join(data.strings[i] for i in row).replace("<|endoftext|>", "").strip("\ufffd")
        assert any(piece in text for text in texts)


def write_conllu(path: Path, documents: int = 24) -> Path:
    """Stories whose tag is known from the word alone."""
    kinds = {**dict.fromkeys(NOUNS, "NOUN"), **dict.fromkeys(VERBS, "VERB"), "The": "DET", "a": "DET"}
    lines = []
    for number in range(documents):
        lines.append(f"# newdoc id = story-{number}")
        for sentence in story(1000 + number, 12).split(". "):
            words = sentence.removesuffix(".").split()
            for index, word in enumerate([*words, "."], start=1):
                tag = "PUNCT" if word == "." else "NUM" if word.isdigit() else kinds[word]
                space = "SpaceAfter=No" if index == len(words) else "_"
                lines.append(f"{index}\t{word}\t_\t{tag}\t_\t_\t_\t_\t_\t{space}")
            lines.append("")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_tagged_probe_gives_select_and_evaluate_tokens_with_gold_tags(tmp_path):
    probe = write_conllu(tmp_path / "probe.conllu")
    text = write_jsonl(tmp_path / "t.jsonl.gz")
    task = english.build(config(text, probe=str(probe), vocabulary=500))
    select = task.splits.select
    assert task.tags is not None
    assert len(task.tags.grams) == select.count
    own = np.array([gram[-1] for gram in task.tags.grams])
    before = np.array([gram[-2] for gram in task.tags.grams])
    whole = np.array([str(t).strip() for t in select.features["token"]])
    for words, tag in ((NOUNS, "NOUN"), (VERBS, "VERB"), (["The", "a"], "DET"), (["."], "PUNCT")):
        chosen = np.isin(whole, words) & (select.features["starts word"] | (whole == ".")).astype(bool)
        assert chosen.sum() > 3
        assert (own[chosen] == tag).all()
        assert torch.equal(select.skills[tag], torch.from_numpy(own == tag))
    after_the = np.array([str(t).strip() for t in select.features["previous token"]]) == "The"
    assert after_the.any()
    assert (before[after_the] == "DET").all()
    # The probe's documents are no training text: the stream is the text file's alone.
    data = english.text_data(config(text, probe=str(probe)))
    length = len(english.tokenise(config(text).text, None, 300, torch.Generator().manual_seed(0)).documents)
    assert length == 40
    assert int((data.stream == 0).sum()) == 40
