"""Labels on planted clusters: known rules must be found, shuffled ones must not."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub_models import story
from markupsafe import escape

from experiments.report.labels import label_section, read_labels, transferred_table
from experiments.run.stages.label_records import (
    EXACT_LOSS,
    BasisLabels,
    ClusterLabel,
    TagRecord,
    TransferredLabel,
)
from experiments.run.store import RunDirectory
from polca_edit.artifacts import save_record
from polca_edit.clusters.labels import (
    LABEL_AUC,
    covering_tags,
    distinct,
    overlap,
    rule_label,
    spacy_tagger,
    tag_label,
    tags_from_tagger,
    transferred_auc,
)
from polca_edit.text.conllu import NO_TAG, GoldTags, gold_tags, read_conllu, token_tags
from polca_edit.text.documents import encode_documents, token_strings, train_tokenizer
from polca_edit.text.sequences import cut_windows, scored_slots, text_token_set

DATA = Path(os.environ.get("POLCA_EDIT_DATA", Path(__file__).parents[2] / "shared" / "data"))

CONLLU = """# newdoc id = first
# text = I don't know.
1	I	I	PRON	_	_	_	_	_	_
2-3	don't	_	_	_	_	_	_	_	_
2	do	do	AUX	_	_	_	_	_	_
3	n't	not	PART	_	_	_	_	_	_
4	know	know	VERB	_	_	_	_	_	SpaceAfter=No
4.1	ghost	_	X	_	_	_	_	_	_
5	.	.	PUNCT	_	_	_	_	_	_

1	Dogs	dog	NOUN	_	_	_	_	_	_
2-3	zum	_	_	_	_	_	_	_	_
2	zu	zu	ADP	_	_	_	_	_	_
3	dem	der	DET	_	_	_	_	_	_

# newdoc id = second
1	Yes	yes	INTJ	_	_	_	_	_	_
"""


class TestConllu:
    def test_text_and_tags_of_characters(self):
        first, second = read_conllu(CONLLU.splitlines(keepends=True))
        assert (first.name, second.name) == ("first", "second")
        assert first.text == "I don't know. Dogs zum"
        spans = [(0, 1), (2, 4), (4, 7), (8, 12), (12, 13), (14, 18), (19, 22)]
        names = ["PRON", "AUX", "PART", "VERB", "PUNCT", "NOUN", "ADP"]
        for (a, b), tag in zip(spans, names, strict=True):
            assert set(first.tags[a:b]) == {tag}
        assert first.tags[1] == NO_TAG
        assert len(first.tags) == len(first.text)

    def test_tokens_take_the_tag_of_their_first_tagged_character(self):
        first, _ = read_conllu(CONLLU.splitlines(keepends=True))
        tags = token_tags(first, [(0, 0), (0, 1), (1, 4), (4, 7), (7, 8), (11, 13)])
        assert tags.tolist() == [NO_TAG, "PRON", "AUX", "PART", NO_TAG, "VERB"]

    def test_a_wrong_line_is_named(self):
        with pytest.raises(ValueError, match="line 2"):
            read_conllu(["# newdoc id = x\n", "1 word\n"])

    def test_grams_follow_the_document_across_windows(self):
        ids = np.arange(20)
        windows = cut_windows({4: ids}, 10)
        tokens = text_token_set(windows, scored_slots(windows), [str(i) for i in range(20)])
        grams = gold_tags(tokens, windows, {4: np.array([f"T{i}" for i in range(20)])}).grams
        assert grams[0] == (NO_TAG, NO_TAG, "T0", "T1")
        # The second window's first scored token is token 11: its grams reach back over the cut.
        assert grams[9] == ("T8", "T9", "T10", "T11")


class TestTagLabels:
    def test_the_smallest_covering_set(self):
        tags = ["N"] * 6 + ["V"] * 3 + ["D"]
        assert covering_tags(tags, 0.6) == ("N",)
        assert covering_tags(tags, 0.61) == ("N", "V")
        assert covering_tags(tags, 0.91) == ("N", "V", "D")

    def planted(self, generator):
        draw = np.random.default_rng(0)
        names = np.array(["NOUN", "VERB", "DET", "ADJ", "ADP", "PRON"])
        grams = names[draw.integers(0, 6, (600, 4))]
        member = torch.zeros(600, dtype=torch.bool)
        member[:100] = True
        grams[:80, 2] = "DET"  # 80 of 100 after a determiner, and about a sixth of the rest
        return GoldTags(tuple(map(tuple, grams))), member, grams

    def test_a_planted_place_is_found_and_counted(self, generator):
        tags, member, grams = self.planted(generator)
        label = tag_label(tags, member, generator)
        assert label.places == ((), (), ("DET",), ())
        assert label.text == "1 before: DET"
        assert label.support == int((grams[:100, 2] == "DET").sum())
        assert label.coverage == label.support / 100
        assert label.base_rate == pytest.approx((grams[:, 2] == "DET").mean())
        assert label.lift > 2
        assert label.chance == 0.0

    def test_a_random_cluster_has_none(self, generator):
        tags, member, _ = self.planted(generator)
        shuffled = member[torch.randperm(600, generator=generator)]
        label = tag_label(tags, shuffled, generator)
        assert not label.found
        assert (label.text, label.support) == ("none", 0)

    def test_chance_is_shown_where_one_tag_is_everywhere(self, generator):
        grams = tuple(("N", "N", "N", "N") for _ in range(50))
        member = torch.arange(50) < 10
        label = tag_label(GoldTags(grams), member, generator)
        assert label.found
        assert label.chance == 1.0
        assert label.lift == 1.0


@pytest.fixture(scope="module")
def tokens():
    texts = [story(i, 12) for i in range(24)]
    tokenizer = train_tokenizer(texts, 320)
    ids = encode_documents(tokenizer, texts)
    windows = cut_windows(dict(enumerate(ids)), 24)
    return text_token_set(windows, scored_slots(windows, skip=2), token_strings(tokenizer))


class TestRuleLabels:
    def test_a_planted_rule_is_found_on_held_out_documents(self, tokens):
        member = torch.from_numpy(tokens.features["shape"] == "digits")
        assert 20 < int(member.sum()) < tokens.count / 2
        label = rule_label(tokens, member, seed=0)
        assert label.counts
        assert label.auc > 0.99
        assert label.coverage > 0.99
        assert label.precision > 0.99
        assert "digits" in label.text or "frequency" in label.text or "token" in label.text
        assert abs(label.auc_shuffled - 0.5) < 0.15
        assert label.support == round(label.coverage * int(member.sum()))

    def test_a_cluster_of_two_conditions(self, tokens):
        after_a = tokens.features["previous token"] == " a"
        member = torch.from_numpy(after_a & (tokens.features["position"] > 8))
        label = rule_label(tokens, member, seed=1)
        assert label.auc > LABEL_AUC
        assert label.precision > 0.9
        assert "previous token" in label.text
        assert "position" in label.text

    def test_a_random_cluster_gets_no_label(self, tokens, generator):
        member = torch.rand(tokens.count, generator=generator) < 0.2
        label = rule_label(tokens, member, seed=0)
        assert not label.counts
        # The null: AUC of a rule for noise, like the shuffled clusters beside it.
        assert abs(label.auc - 0.5) < 0.12
        assert abs(label.auc - label.auc_shuffled) < 0.15

    def test_the_rule_never_sees_a_loss(self, tokens):
        """Features come from ids alone: nothing about a model is in them."""
        assert not any("loss" in name for name in tokens.features)
        member = torch.from_numpy(tokens.features["shape"] == "punctuation")
        label = rule_label(tokens, member, seed=0)
        assert set(label.rule.features) <= set(tokens.features)

    def test_transfer_to_other_text(self, tokens):
        member = torch.from_numpy(tokens.features["shape"] == "digits")
        halves = tokens.documents < 12
        inside = halves[tokens.sequence_of]
        label = rule_label(tokens.select(halves), member[inside], seed=0)
        other = tokens.select(~halves)
        assert transferred_auc(label.rule, other, member[~inside]) > 0.95
        noise = torch.arange(other.count) % 2 == 0
        assert abs(transferred_auc(label.rule, other, noise) - 0.5) < 0.1
        assert transferred_auc(label.rule, other, torch.ones(other.count, dtype=torch.bool)) is None

    def test_a_cluster_within_one_document_is_not_covered_elsewhere(self, tokens):
        member = tokens.documents[tokens.sequence_of] == 3
        label = rule_label(tokens, member, seed=0)
        assert label.coverage < 0.2


class TestOverlap:
    def test_jaccard_against_sets(self, generator):
        masks = {name: torch.rand(200, generator=generator) < 0.3 for name in "abc"}
        found = overlap(masks)
        sets = {name: set(mask.nonzero()[:, 0].tolist()) for name, mask in masks.items()}
        for i, a in enumerate("abc"):
            for j, b in enumerate("abc"):
                assert float(found[i, j]) == pytest.approx(len(sets[a] & sets[b]) / len(sets[a] | sets[b]))

    def test_groups_of_overlapping_clusters(self):
        base = torch.arange(100) < 50
        masks = {"a": base, "b": torch.arange(100) < 40, "c": ~base, "d": torch.arange(100) < 30}
        # a-b and b-d overlap by more than half, a-d does not; the chain joins all three.
        assert distinct(masks, 0.65) == [("a", "b", "d"), ("c",)]
        assert distinct({}) == []


class TestReport:
    def labels(self) -> BasisLabels:
        rule = "token is ',' and previous shape is 'piece' and distance >= 7 and position in 3..9 " * 3
        tags = TagRecord("1 before: DET", True, 30, 0.75, 4.5, 0.1)
        clusters = (
            ClusterLabel(3, 0, 1234, rule, 0.953, 0.51, 0.8, 0.7, 900, 0.1, True, ("<a>[b]c",), tags),
            ClusterLabel(5, 1, 60, "position >= 9", 0.61, 0.5, 0.2, 0.3, 9, 0.1, False, (), tags),
        )
        return BasisLabels(0.9, clusters, ((1.0, 0.2), (0.2, 1.0)), (("3:0", "5:1"),), 4, 1, 2, 1)

    def test_the_chapter_has_the_records_numbers_and_whole_rules(self, tmp_path):
        directory = RunDirectory(tmp_path)
        save_record(tmp_path / "labels" / "hessian.json", self.labels())
        save_record(tmp_path / "labels" / f"{EXACT_LOSS}.json", self.labels())
        (tmp_path / "labels" / "transfer.json").write_text("{}")
        assert read_labels(directory)["hessian"] == self.labels()
        section = label_section(directory)
        page = "".join(block.__html__() for block in section.blocks)
        assert str(escape(self.labels().clusters[0].rule)) in page
        assert "1 of 4 kept vectors have a cluster with a feature rule of AUC 0.9" in page
        assert "1 of 2 clusters have a feature rule of AUC 0.9" in page
        for number in ("1,234", "0.95", "0.51", "0.80", "0.70", "900", "1 before: DET", "0.75", "4.5"):
            assert f">{number}</td>" in page
        assert "&lt;a&gt;<mark>b</mark>c" in page
        assert "Tokens in context of 1 of 2 clusters." in page

    def test_without_labels_there_is_no_chapter(self, tmp_path):
        assert label_section(RunDirectory(tmp_path)) is None

    def test_labels_on_another_text(self):
        rows = [
            TransferredLabel("hessian", 3, 0, "a rule", 0.95, 0.91, 40),
            TransferredLabel("hessian", 3, 1, "b rule", 0.95, None, 0),
        ]
        shown = transferred_table(rows).markdown().splitlines()[2:]
        assert shown == [
            "| hessian | 3:0 | 0.95 | 0.91 | 40 | a rule |",
            "| hessian | 3:1 | 0.95 | – | 0 | b rule |",
        ]


class TestTaggers:
    def test_any_tagger_with_spacys_words(self, tokens):
        strings_of = {}

        def tagger(text):
            import re

            for found in re.finditer(r"[A-Za-z]+|\d+|[^\sA-Za-z\d]", text):
                word = found.group()
                kind = "NUM" if word.isdigit() else "WORD" if word.isalpha() else "PUNCT"
                yield SimpleNamespace(idx=found.start(), text=word, pos_=kind)

        tokenizer = train_tokenizer([story(i, 12) for i in range(24)], 320)
        strings_of = token_strings(tokenizer)
        grams = tags_from_tagger(replace(tokens, skills={}), strings_of, tagger).grams
        own = np.array([gram[-1] for gram in grams])
        assert (own[tokens.features["shape"] == "digits"] == "NUM").all()
        assert (own[tokens.features["shape"] == "punctuation"] == "PUNCT").all()
        before = np.array([gram[-2] for gram in grams])
        digits_before = tokens.features["previous shape"] == "digits"
        assert (before[digits_before] == "NUM").all()

    def test_without_a_model_the_remedy_is_named(self):
        with pytest.raises(ValueError, match="--probe"):
            spacy_tagger("no_such_model")


def test_english_web_treebank():
    import gzip

    path = DATA / "ud" / "en_ewt-ud-test.conllu.gz"
    if not path.exists():
        pytest.skip(f"the treebank is not at hand (set POLCA_EDIT_DATA): {path.name}")
    with gzip.open(path, "rt") as handle:
        lines = handle.readlines()
    documents = read_conllu(lines)
    forms = sum(1 for line in lines if line[:1].isdigit() and "." not in line.split("\t")[0])
    assert forms > 25_000
    text = [line.partition("=")[2].strip() for line in lines if line.startswith("# text =")]
    # The sentences as the treebank prints them are found in the documents, white space aside.
    joined = "".join("".join(d.text.split()) for d in documents)
    assert joined == "".join("".join(t.split()) for t in text)
    tags = {tag for d in documents for tag in d.tags} - {NO_TAG}
    universal = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X"
    assert {"NOUN", "VERB", "DET", "PROPN"} <= tags <= set(universal.split())
