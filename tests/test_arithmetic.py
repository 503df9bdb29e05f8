"""The arithmetic task against Python integers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from experiments.tasks.arithmetic import (
    EQUALS,
    LENGTH,
    PLACES,
    PLUS,
    SKILLS,
    carries,
    encode,
    first_and_second,
    first_and_second_of,
    make_data,
    token_loss,
    token_set,
)
from polca_edit.models import TransformerShape, build_small_transformer

NUMBERS = st.lists(st.tuples(st.integers(0, 999), st.integers(0, 999)), min_size=1, max_size=8)


def pair(sums: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = zip(*sums, strict=True)
    return torch.tensor(first), torch.tensor(second)


def column_carry(a: int, b: int) -> list[bool]:
    """Pencil and paper: whether a 1 is carried into the 1000s, 100s, 10s, 1s column."""
    carried, into = 0, [False]
    for _ in range(3):
        carried = int(a % 10 + b % 10 + carried >= 10)
        into.append(bool(carried))
        a, b = a // 10, b // 10
    return into[::-1]


@settings(deadline=None, max_examples=40)
@given(NUMBERS)
def test_encoding_reads_back_as_the_sum(sums):
    symbols = "0123456789+="
    rows = encode(*pair(sums))
    assert rows.shape == (len(sums), LENGTH)
    for (a, b), row in zip(sums, rows.tolist(), strict=True):
        assert "".join(symbols[i] for i in row) == f"{a:03d}+{b:03d}={a + b:04d}"
    assert symbols[PLUS] == "+"
    assert symbols[EQUALS] == "="


@settings(deadline=None, max_examples=40)
@given(NUMBERS)
def test_labels_against_pencil_and_paper(sums):
    assert carries(*pair(sums)).tolist() == [column_carry(a, b) for a, b in sums]
    tokens = token_set(*pair(sums))
    assert tuple(tokens.skills) == SKILLS
    assert tokens.count == 4 * len(sums)
    for number, (a, b) in enumerate(sums):
        carry = column_carry(a, b)
        for slot in range(4):
            token = 4 * number + slot
            has = {name for name, labels in tokens.skills.items() if bool(labels[token])}
            expected = {PLACES[slot]}
            if carry[slot]:
                expected.add("carry")
                if PLACES[slot] in ("100s", "10s"):
                    expected.add(f"carry@{PLACES[slot]}")
            assert has == expected
            digit = int(f"{a + b:04d}"[slot])
            assert int(tokens.output_of[token]) == digit == int(tokens.features["output digit"][token])
            assert int(tokens.features["carry in"][token]) == int(carry[slot])
            text = f"{a:03d}+{b:03d}={a + b:04d}"
            assert tokens.contexts[token] == f"{text[: 8 + slot]}[{text[8 + slot]}]{text[9 + slot :]}"


def test_carry_of_the_1000s_place_is_the_digit_itself():
    first, second = torch.arange(1000).repeat(3), torch.tensor([1, 500, 999]).repeat_interleave(1000)
    assert torch.equal(carries(first, second)[:, 0], (first + second) >= 1000)
    assert not bool(carries(first, second)[:, 3].any())


def test_digit_features_by_hand():
    features = token_set(torch.tensor([57]), torch.tensor([968])).features
    assert features["place"].tolist() == [0, 1, 2, 3]
    assert features["first digit"].tolist() == [0, 0, 5, 7]
    assert features["second digit"].tolist() == [0, 9, 6, 8]
    assert features["digit sum"].tolist() == [0, 9, 11, 15]


def test_first_and_second_read_the_summands_back():
    first, second = torch.tensor([0, 7, 999, 120]), torch.tensor([999, 80, 5, 34])
    back = first_and_second(token_set(first, second))
    assert torch.equal(back[0], first)
    assert torch.equal(back[1], second)


class Teacher(nn.Module):
    """Puts all its mass on what it is told to, by position."""

    def __init__(self, digits: list[int], margin: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(11, 10))
        with torch.no_grad():
            for place, digit in enumerate(digits):
                self.logits[7 + place, digit] = margin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1] == 11  # the last output digit is never an input
        return self.logits.expand(len(x), 11, 10)


def test_token_loss_scores_the_four_output_digits():
    inputs = encode(torch.tensor([57, 57]), torch.tensor([968, 967]))  # 1025 and 1024
    losses = token_loss(Teacher([1, 0, 2, 5], 3.0), inputs)
    right, wrong = math.log(math.exp(3) + 9) - 3, math.log(math.exp(3) + 9)
    assert losses.tolist()[0] == pytest.approx([right] * 4, abs=1e-5)
    assert losses.tolist()[1] == pytest.approx([right, right, right, wrong], abs=1e-5)


def test_no_digit_is_seen_before_it_is_predicted():
    """Changing an output digit changes no loss of a place before it."""
    model = build_small_transformer(TransformerShape(1, 16, 2, 32, 12, 12, 10), 0)
    inputs = encode(torch.tensor([57]), torch.tensor([968]))
    changed = inputs.clone()
    changed[0, -2] = 9
    before, after = token_loss(model, inputs)[0], token_loss(model, changed)[0]
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2:], after[2:])


def test_splits_are_disjoint_as_unordered_pairs_and_held_out_as_both_orders():
    data = make_data(400, 300, 500, 64, seed=3)
    parts = [data.splits.curvature, data.splits.select, data.splits.evaluate]
    assert [part.sequences for part in parts] == [300, 400, 500]
    pairs = []
    for part in parts:
        first, second = first_and_second(part)
        found = {frozenset((a, b)) for a, b in zip(first.tolist(), second.tolist(), strict=True)}
        assert len(found) == part.sequences
        pairs.append(found)
    assert not pairs[0] & pairs[1]
    assert not pairs[0] & pairs[2]
    assert not pairs[1] & pairs[2]
    assert torch.equal(data.held_out, data.held_out.T)
    both_orders = sum(2 - (len(p) == 1) for p in pairs[1] | pairs[2])
    assert int(data.held_out.sum()) == both_orders


def test_operands_are_alike_in_distribution():
    first, second = first_and_second(make_data(20_000, 10, 10, 8, seed=0).splits.select)
    assert float((first > second).double().mean()) == pytest.approx(0.5, abs=0.015)


def test_same_seed_same_splits():
    first, again, other = (make_data(50, 20, 50, 8, seed) for seed in (1, 1, 2))
    for split in ("curvature", "select", "evaluate"):
        one, two, three = (getattr(d.splits, split).fingerprint() for d in (first, again, other))
        assert one == two != three


def test_small_batches_are_full_even_with_many_sums_held_out():
    data = make_data(49_000, 10, 49_000, 2, seed=0)
    assert {len(data.batch(step)) for step in range(1, 400)} == {2}


def test_too_many_held_out_sums_are_refused():
    with pytest.raises(ValueError, match="at most 100000 sums"):
        make_data(90_000, 10_000, 10_000, 64, 0)


def test_unseen_sums_are_all_that_no_split_and_no_training_batch_shows_in_either_order():
    data, steps = make_data(50, 40, 60, 4000, seed=5), 60

    def unordered(first: torch.Tensor, second: torch.Tensor) -> set[tuple[int, int]]:
        return {(min(p), max(p)) for p in zip(first.tolist(), second.tolist(), strict=True)}

    splits = data.splits
    used = [unordered(*first_and_second(s)) for s in (splits.curvature, splits.select, splits.evaluate)]
    used += [unordered(*first_and_second_of(data.batch(step))) for step in range(1, steps + 1)]
    seen = set.union(*used)
    left = 1000 * 1001 // 2 - len(seen)
    unseen = data.unseen(left, steps, seed=1)
    mine = unordered(*first_and_second(unseen))
    # Drawn to the last one, so that a single sum wrongly kept or left out shows.
    assert len(mine) == unseen.sequences == left
    assert not mine & seen
    assert torch.equal(data.unseen(300, steps, seed=1).inputs, data.unseen(300, steps, seed=1).inputs)
    with pytest.raises(ValueError, match=f"leave {left} unseen sums, got {left + 1} to draw"):
        data.unseen(left + 1, steps, seed=1)
