"""Token sets: order, subsets, splits and sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polca_edit.tokens import TokenSet, group_means, next_token_loss, split_by_document


def labelled(sequences: int = 6, slots: int = 4, *, documents: list[int] | None = None) -> TokenSet:
    """Every scored token can be recognised by its output id, skill, feature and context."""
    generator = torch.Generator().manual_seed(1)
    scored = torch.rand(sequences, slots, generator=generator) < 0.7
    scored[0, 0] = True
    outputs = torch.arange(sequences * slots).view(sequences, slots)
    ids = outputs[scored]
    return TokenSet(
        torch.arange(sequences)[:, None].expand(-1, 5).clone(),
        scored,
        torch.tensor(documents or list(range(sequences))),
        {"even": ids % 2 == 0},
        outputs,
        {"id": ids.numpy()},
        tuple(f"token {i}" for i in ids.tolist()),
    )


def assert_aligned(tokens: TokenSet) -> None:
    ids = tokens.output_of
    assert torch.equal(tokens.skills["even"], ids % 2 == 0)
    assert np.array_equal(tokens.features["id"], ids.numpy())
    assert tokens.contexts == tuple(f"token {i}" for i in ids.tolist())


def test_token_order_is_row_major():
    tokens = labelled()
    walked = [(r, c) for r in range(6) for c in range(4) if tokens.scored[r, c]]
    assert list(zip(tokens.sequence_of.tolist(), tokens.position_of.tolist(), strict=True)) == walked
    assert tokens.count == len(walked)
    assert tokens.output_of.tolist() == [4 * r + c for r, c in walked]


def test_outputs_are_minus_one_where_unknown():
    tokens = replace(labelled(), outputs=None)
    assert tokens.output_of.tolist() == [-1] * tokens.count


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(6)), st.integers(1, 6))
def test_select_keeps_everything_aligned(order, count):
    tokens = labelled()
    rows = torch.tensor(order[:count])
    if not bool(tokens.scored[rows].any()):
        return
    chosen = tokens.select(rows)
    assert torch.equal(chosen.inputs[:, 0], rows)
    assert_aligned(chosen)


def test_select_by_mask():
    tokens = labelled()
    mask = torch.tensor([True, False, True, False, False, True])
    chosen = tokens.select(mask)
    assert chosen.inputs[:, 0].tolist() == [0, 2, 5]
    assert_aligned(chosen)


def test_batches_cover_every_row_once_with_a_short_last_one():
    tokens = labelled(7)
    assert [len(rows) for rows in tokens.batches(3)] == [3, 3, 1]
    assert torch.cat(tokens.batches(3)).tolist() == list(range(7))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 6), min_size=8, max_size=20), st.integers(0, 50))
def test_splits_never_cut_a_document_and_lose_nothing(documents, seed):
    tokens = labelled(len(documents), documents=documents)
    tokens = replace(tokens, scored=torch.ones_like(tokens.scored), skills={}, features={}, contexts=())
    generator = torch.Generator().manual_seed(seed)
    if len(set(documents)) < 3:
        with pytest.raises(ValueError, match="at least 3 documents"):
            split_by_document(tokens, (1.0, 1.0, 1.0), generator)
        return
    splits = split_by_document(tokens, (0.2, 0.5, 0.3), generator)
    parts = [splits.curvature, splits.select, splits.evaluate]
    names = [set(part.documents.tolist()) for part in parts]
    assert all(names)
    assert set.union(*names) == set(documents)
    assert sum(len(n) for n in names) == len(set(documents))
    assert sum(part.sequences for part in parts) == tokens.sequences


def test_split_shares_and_seed():
    tokens = labelled(100)
    first = split_by_document(tokens, (2.0, 5.0, 3.0), torch.Generator().manual_seed(0))
    again = split_by_document(tokens, (2.0, 5.0, 3.0), torch.Generator().manual_seed(0))
    other = split_by_document(tokens, (2.0, 5.0, 3.0), torch.Generator().manual_seed(1))
    assert [p.sequences for p in (first.curvature, first.select, first.evaluate)] == [20, 50, 30]
    assert first.select.fingerprint() == again.select.fingerprint() != other.select.fingerprint()


def test_group_means_are_sums_and_counts():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    first, second = torch.tensor([True, True, False, False]), torch.tensor([False, False, True, False])
    groups = group_means(values, {"a": first, "b": second, "none": torch.zeros(4, dtype=torch.bool)})
    assert groups == {"a": (3.0, 2), "b": (4.0, 1), "none": (0.0, 0)}
    # Unequal groups: the pooled mean follows from sums and counts, not from the two means.
    total, count = (sum(part) for part in zip(groups["a"], groups["b"], strict=True))
    assert total / count == pytest.approx(7 / 3)


def test_group_sum_of_many_float32_values_is_exact():
    values = torch.full((1 << 20,), 0.1, dtype=torch.float32)
    total, count = group_means(values, {"all": torch.ones(1 << 20, dtype=torch.bool)})["all"]
    assert total == pytest.approx(float(values[0]) * count, rel=1e-12)


def test_fingerprint_sees_inputs_scored_and_documents():
    tokens = labelled()
    inputs, scored = tokens.inputs.clone(), tokens.scored.clone()
    inputs[0, 0] += 1
    changed = replace(tokens, inputs=inputs)
    other = replace(tokens, documents=tokens.documents.flip(0))
    scored[0] = scored[0].flip(0)
    assert tokens.fingerprint() == labelled().fingerprint()
    assert len({t.fingerprint() for t in (tokens, changed, other)}) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": torch.zeros(5, 5)}, "one row per sequence"),
        ({"scored": torch.zeros(6, 4, dtype=torch.bool)}, "at least one token"),
        ({"skills": {"short": torch.ones(2, dtype=torch.bool)}}, "skill 'short'"),
        ({"features": {"short": np.zeros(2)}}, "feature 'short'"),
        ({"contexts": ("one",)}, "contexts must have"),
    ],
)
def test_inconsistent_token_sets_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(labelled(), **change)


class Bigram(nn.Module):
    """Logits of the next token from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[x]


def test_next_token_loss_by_hand():
    losses = next_token_loss(Bigram(), torch.tensor([[0, 1, 2, 2]]))
    normaliser = [np.log(1 + np.e + np.e**2), np.log(np.e**3 + 2), np.log(3)]
    expected = [normaliser[0] - 1.0, normaliser[1] - 0.0, normaliser[2] - 0.0]
    assert losses.shape == (1, 3)
    assert losses[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_set_from_token_ids_predicts_every_next_token():
    ids = torch.tensor([[5, 6, 7], [8, 8, 9]])
    tokens = TokenSet.from_ids(ids)
    assert tokens.output_of.tolist() == [6, 7, 8, 9]
    assert tokens.features["token"].tolist() == ["6", "7", "8", "9"]
    assert tokens.features["previous token"].tolist() == ["5", "6", "8", "8"]
    assert tokens.features["position"].tolist() == [0, 1, 0, 1]
    assert tokens.documents.tolist() == [0, 1]
    # Slot p of the loss is the token in output_of, so the set fits next_token_loss as it is.
    losses = next_token_loss(Bigram(), ids % 3)[tokens.scored]
    assert losses.shape == (tokens.count,)


def test_a_set_from_token_ids_with_its_own_slots_documents_and_skills():
    ids = torch.tensor([[5, 6, 7], [8, 8, 9]])
    scored = torch.tensor([[False, True], [True, False]])
    labels = {"big": torch.tensor([False, True])}
    tokens = TokenSet.from_ids(ids, documents=torch.tensor([4, 4]), scored=scored, skills=labels)
    assert tokens.output_of.tolist() == [7, 8]
    assert tokens.features["previous token"].tolist() == ["6", "8"]
    assert tokens.documents.tolist() == [4, 4]
    assert torch.equal(tokens.skills["big"], labels["big"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ids": torch.zeros(3, 1, dtype=torch.long)}, "L at least 2"),
        ({"ids": torch.zeros(3, 4)}, "whole numbers"),
        ({"ids": torch.zeros(2, 4, dtype=torch.long), "scored": torch.ones(2, 4, dtype=torch.bool)}, "L-1"),
    ],
)
def test_ids_that_hold_no_next_token_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        TokenSet.from_ids(**given)


class TestPaddedIds:
    def test_negative_ids_at_the_end_are_never_scored_and_inside_are_refused(self):
        tokens = TokenSet.from_ids(torch.tensor([[7, 8, 9, -100], [1, 2, -100, -100]]))
        assert tokens.output_of.tolist() == [8, 9, 2]
        assert int(tokens.inputs.min()) == 0
        with pytest.raises(ValueError, match="at the end"):
            TokenSet.from_ids(torch.tensor([[7, -100, 9]]))

    def test_a_padding_id_is_never_scored_even_where_it_was_asked_for(self):
        ids = torch.tensor([[7, 8, 0, 0], [1, 0, 2, 3]])
        everything = torch.ones(2, 3, dtype=torch.bool)
        tokens = TokenSet.from_ids(ids, scored=everything, padding=0)
        assert tokens.output_of.tolist() == [8, 0, 2, 3]  # the 0 inside a row is text
