"""Documents, de-duplication, tokenizer, windows, features: against the text itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from polca_edit.text.documents import (
    END_OF_TEXT,
    Document,
    deduplicate,
    documents_from_array,
    documents_from_jsonl,
    documents_from_plain,
    documents_from_rows,
    encode_documents,
    token_strings,
    train_tokenizer,
)
from polca_edit.text.features import frequency_bands, shape_of
from polca_edit.text.sequences import (
    Sampling,
    cut_windows,
    draw_token_sets,
    hold_out,
    scored_slots,
    text_token_set,
    training_splits,
)

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "42", "Dogs", "ran,", "fast;", "NASA's", "café"]
WORDS.append("opened…")


def sentence(number: int, length: int = 30) -> str:
    draw = np.random.default_rng(number)
    return " ".join(draw.choice(WORDS, length))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([sentence(i) for i in range(50)], 300)


class TestDocuments:
    def test_jsonl_keeps_order_names_and_text(self):
        rows = [{"id": 7, "text": "one"}, {"title": "B", "text": "two"}, {"text": "  "}, {"text": "three"}]
        found = documents_from_jsonl([json.dumps(r) + "\n" for r in rows] + ["\n"])
        assert [(d.name, d.text) for d in found] == [("7", "one"), ("B", "two"), ("3", "three")]

    @pytest.mark.parametrize("line", ['{"text": "cut', "[1, 2]", '{"body": "x"}', '{"text": 3}'])
    def test_a_bad_line_is_named(self, line):
        with pytest.raises(ValueError, match="1|0"):
            documents_from_jsonl([line])

    def test_datasets_rows_are_rows(self):
        datasets = pytest.importorskip("datasets", reason="package 'datasets' is not installed")
        data = datasets.Dataset.from_dict({"text": ["a b", "c"], "id": [3, 4]})
        assert documents_from_rows(data) == [Document("3", "a b"), Document("4", "c")]

    def test_wikitext_headings_start_documents(self):
        text = " = First = \n\n body one \n\n = = Section = = \n more \n\n = Second = \n\n body two \n"
        found = documents_from_plain(text)
        assert [d.name for d in found] == ["First", "Second"]
        assert "more" in found[0].text
        assert "body two" in found[1].text

    def test_paragraphs_are_joined_without_loss(self):
        paragraphs = [sentence(i) for i in range(20)]
        found = documents_from_plain("\n\n".join(paragraphs), characters=300)
        assert len(found) > 3
        assert "\n\n".join(d.text for d in found).split("\n\n") == paragraphs

    def test_near_duplicates_go_and_the_first_stays(self):
        base = [sentence(i, 60) for i in range(4)]
        changed = base[1].split()
        changed[30] = "changed"  # 13 of 48 shingles differ
        documents = [Document(str(i), t) for i, t in enumerate([*base, " ".join(changed), base[2].upper()])]
        kept, dropped = deduplicate(documents)
        assert [d.name for d in kept] == ["0", "1", "2", "3"]
        assert [d.name for d in dropped] == ["4", "5"]

    def test_short_texts_are_compared_whole(self):
        kept, _ = deduplicate([Document("a", "one two"), Document("b", "One  two"), Document("c", "one")])
        assert [d.name for d in kept] == ["a", "c"]

    def test_the_share_is_counted_over_distinct_shingles(self):
        """A copy with fraction f of old text is dropped exactly when f exceeds the share."""
        old = [f"w{i}" for i in range(112)]  # 100 shingles
        for fresh, stays in ((49, False), (60, True)):
            new = [f"n{i}" for i in range(fresh)] + old[: 112 - fresh]
            seen = 112 - fresh - 12  # shingles wholly inside the old part, of 100
            assert (seen > 50) is not stays
            kept, _ = deduplicate([Document("old", " ".join(old)), Document("new", " ".join(new))])
            assert (len(kept) == 2) is stays

    def test_arrays_of_two_shapes(self):
        rows = documents_from_array(np.arange(6).reshape(2, 3))
        assert [r.tolist() for r in rows] == [[0, 1, 2], [3, 4, 5]]
        with pytest.raises(ValueError, match="separator"):
            documents_from_array(np.arange(6))
        with pytest.raises(ValueError, match="integers"):
            documents_from_array(np.ones(3), separator=0)


class TestTokenizer:
    def test_round_trip_of_any_text(self, tokenizer):
        text = "  Unseen words\n\tand ümläuts 漢字 <tags> [x]"
        (ids,) = encode_documents(tokenizer, [text])
        assert ids[0] == tokenizer.token_to_id(END_OF_TEXT) == 0
        assert tokenizer.decode(ids[1:].tolist()) == text

    def test_strings_of_ids_spell_the_text(self, tokenizer):
        strings = token_strings(tokenizer)
        text = sentence(99).replace("é", "e").replace("…", ".")
        (ids,) = encode_documents(tokenizer, [text])
        assert "".join(strings[i] for i in ids[1:]) == text
        assert strings[0] == END_OF_TEXT
        assert len(strings) == tokenizer.get_vocab_size() == 300

    def test_the_same_text_gives_the_same_tokenizer(self, tokenizer):
        again = train_tokenizer([sentence(i) for i in range(50)], 300)
        assert again.to_str() == tokenizer.to_str()

    def test_a_vocabulary_without_room_for_bytes_is_refused(self):
        with pytest.raises(ValueError, match="257"):
            train_tokenizer(["x"], 100)


class TestWindows:
    def test_windows_tile_each_document_once(self):
        documents = {3: np.arange(100, 125), 8: np.arange(200, 207)}
        windows = cut_windows(documents, 10, minimum=5, padding=-7)
        for name, ids in documents.items():
            rows = windows.documents == name
            text = torch.cat(
                [r[:n] for r, n in zip(windows.inputs[rows], windows.lengths[rows], strict=True)]
            )
            assert text.tolist() == ids.tolist()
        assert windows.inputs[2].tolist() == [*range(120, 125), *[-7] * 5]
        assert windows.offsets.tolist() == [0, 10, 20, 0]

    def test_padding_is_never_scored(self):
        windows = cut_windows({0: np.arange(13)}, 10, minimum=2)
        scored = scored_slots(windows, skip=2)
        assert scored[0].nonzero()[:, 0].tolist() == list(range(2, 9))
        # The second window holds tokens 10, 11, 12: slot p predicts token p + 1, so 0 and 1 exist.
        assert not scored[1].any()
        assert scored_slots(windows)[1].nonzero()[:, 0].tolist() == [0, 1]

    def test_slots_are_drawn_without_replacement_and_uniformly(self, generator):
        windows = cut_windows({0: np.arange(4000)}, 10)
        scored = scored_slots(windows, skip=1, per_window=3, generator=generator)
        assert scored.sum(1).eq(3).all()
        share = scored.double().mean(0)
        assert share[0] == 0
        # 400 windows, each slot with probability 3/8: standard error 0.024, bound 4 of them.
        assert float((share[1:] - 3 / 8).abs().max()) < 0.1

    def test_a_long_document_lends_only_its_share(self, generator):
        windows = cut_windows({0: np.arange(1000), 1: np.arange(30)}, 10, per_document=3, generator=generator)
        assert windows.documents.tolist() == [0, 0, 0, 1, 1, 1]
        assert windows.offsets[:3].tolist() != [0, 10, 20]

    def test_empty_text_is_refused(self):
        with pytest.raises(ValueError, match="empty"):
            cut_windows({0: np.arange(3)}, 10)


class TestTokenSets:
    def make(self, tokenizer, text):
        windows = cut_windows({5: encode_documents(tokenizer, [text])[0]}, 16)
        return windows, text_token_set(windows, scored_slots(windows), token_strings(tokenizer))

    def test_features_agree_with_a_plain_loop(self, tokenizer):
        windows, tokens = self.make(tokenizer, sentence(5, 60))
        strings = token_strings(tokenizer)
        assert tokens.count > 40
        repeated = 0
        for m, (row, slot) in enumerate(
            zip(tokens.sequence_of.tolist(), tokens.position_of.tolist(), strict=True)
        ):
            line = windows.inputs[row].tolist()
            target, before = line[slot + 1], line[: slot + 1]
            last = max((i for i, t in enumerate(before) if t == target), default=None)
            pairs = list(zip(before, before[1:], strict=False))
            f = {name: values[m] for name, values in tokens.features.items()}
            assert f["token"] == strings[target]
            assert f["previous token"] == strings[line[slot]]
            assert f["second previous token"] == (strings[line[slot - 1]] if slot else "")
            assert f["repeated"] == (target in before)
            assert f["distance"] == (0 if last is None else slot + 1 - last)
            assert f["bigram repeated"] == ((line[slot], target) in pairs)
            assert f["position"] == slot
            assert f["length"] == len(strings[target])
            assert int(tokens.output_of[m]) == target
            repeated += f["repeated"]
        assert 0 < repeated < tokens.count

    def test_the_context_marks_the_predicted_token(self, tokenizer):
        _, tokens = self.make(tokenizer, "the cat [sat] on\na mat " * 4)
        for m, context in enumerate(tokens.contexts):
            left, marked = context.split("[")
            inside, right = marked.split("]")
            shown = str(tokens.features["token"][m]).replace("\n", "⏎").replace("[", "(").replace("]", ")")
            assert inside == shown
            assert (left + inside + right) in "<|endoftext|>" + "the cat (sat) on⏎a mat " * 4

    def test_shapes(self):
        given = [" the", "the", " The", " THE", "A", " 12", "'s", " ", "\n", "!", "a1"]
        assert [shape_of(t) for t in given] == [
            "lower",
            "piece",
            "Capital",
            "UPPER",
            "Capital",
            "digits",
            "mixed",
            "space",
            "newline",
            "punctuation",
            "mixed",
        ]

    def test_frequency_bands_double_in_width(self):
        bands = frequency_bands(np.arange(15)[::-1])
        assert np.bincount(bands).tolist() == [1, 2, 4, 8]

    def test_splits_share_no_document_and_training_sees_no_held_out_one(self, generator):
        # Every token of document i is i, so membership can be read off the ids.
        documents = [np.full(40 + i, i) for i in range(60)]
        sampling = Sampling(length=10, per_document=2, skip=1, per_window=4)
        held_out = hold_out([len(d) for d in documents], 30, sampling, generator)
        splits, stream = training_splits(
            documents, held_out, (12, 15, 15), sampling, [str(i) for i in range(60)], generator
        )
        names = {
            n: set(getattr(splits, n).inputs.unique().tolist()) for n in ("curvature", "select", "evaluate")
        }
        assert names["select"].isdisjoint(names["evaluate"])
        seen = set(stream.unique().tolist())
        assert names["curvature"] <= seen
        assert seen.isdisjoint(names["select"] | names["evaluate"])
        for name, sequences in (("curvature", 12), ("select", 15), ("evaluate", 15)):
            part = getattr(splits, name)
            assert part.sequences == sequences
            assert part.count == 4 * sequences
            assert torch.equal(part.documents, part.inputs[:, 0])
            assert int(part.documents.bincount().max()) <= 2

    def test_too_little_text_is_said(self, generator):
        with pytest.raises(ValueError, match="needs 9 sequences.*documents for 4"):
            draw_token_sets([np.arange(25), np.arange(25)], [0, 1], [9], Sampling(10), ["x"] * 25, generator)
