"""Pairs of several runs: rules that pick the same tokens get one name, others keep theirs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from experiments.causal_matching import largest_overlap, match_pairs, rule_overlap
from experiments.causal_runs import RunTest
from interventions.measures import Target
from interventions.protocol import Pair, PlanSettings
from polca_edit.membership import fit_rule
from polca_edit.tokens import TokenSet


def tokens(first: int) -> TokenSet:
    """A hundred tokens, one a sequence, with their number as feature."""
    number = np.arange(first, first + 100) % 100
    return TokenSet(
        torch.zeros(100, 2, dtype=torch.long),
        torch.tensor([[True, False]] * 100),
        torch.arange(100),
        {"known": torch.from_numpy(number >= 90)},
        features={"number": number},
    )


def run_test(first: int, pairs: dict[str, tuple[int, int]]) -> RunTest:
    """A run whose pairs are the tokens numbered from .. to (exclusive), by a fitted rule."""
    split = tokens(first)
    found = []
    for vector, (name, (low, high)) in enumerate(pairs.items()):
        members = (split.features["number"] >= low) & (split.features["number"] < high)
        others = {f"cluster {n}": ~members for n in pairs if n != name} | {"group known": ~members}
        rule = fit_rule(split, torch.from_numpy(members), seed=0)
        found.append(Pair(name, (vector,), Target(members, others), Target(members, others), 1.0, rule=rule))
    run = SimpleNamespace(task=SimpleNamespace(splits=SimpleNamespace(evaluate=split)))
    nulls = tuple(replace(pair, name=f"null {i + 1}: {pair.name}") for i, pair in enumerate(found))
    return RunTest(run, None, None, tuple(found), nulls, lambda _: [], PlanSettings())  # type: ignore[arg-type]


def test_overlap_is_counted_over_both_splits():
    """Rules [0, 40) and [20, 60): 20 common of 60, on each split and so on both."""
    one, two = run_test(0, {"a": (0, 40)}), run_test(50, {"b": (20, 60)})
    assert rule_overlap(one, one.pairs[0], two, two.pairs[0]) == 20 / 60
    assert largest_overlap([one, two]) == 20 / 60
    assert largest_overlap([one]) is None


def test_the_closest_pair_gets_the_name_and_it_is_given_once():
    one = run_test(0, {"a": (0, 40), "z": (60, 80)})
    two = run_test(50, {"b": (5, 40), "c": (0, 39), "d": (61, 90)})
    first, second = match_pairs([one, two], 0.5)
    assert [pair.name for pair in first.pairs] == ["a", "z"]
    # c overlaps a by 39/40, b by 35/40: c is a, and b has no other name to take; d overlaps z by 19/30.
    assert [pair.name for pair in second.pairs] == ["b", "a", "z"]
    assert [pair.name for pair in second.nulls] == ["null 1: b", "null 2: a", "null 3: z"]
    assert sorted(second.pairs[0].evaluate.others) == ["cluster a", "cluster z", "group known"]
    assert [pair.name for pair in match_pairs([one, two], 0.99)[1].pairs] == ["b", "c", "d"]


def test_known_skills_are_matched_by_name_alone():
    one, two = run_test(0, {"known": (90, 100)}), run_test(0, {"b": (90, 100)})
    assert match_pairs([one, two], 0.5)[1].pairs[0].name == "b"
    assert match_pairs([two, one], 0.5)[1].pairs[0].name == "known"
