"""Which pairs of several runs are the same pair: known skills by name, other clusters by their rules.

Directions do not align across seeds, and rules that pick the same tokens are seldom the same words. So
two clusters without a known skill's name are one pair where their rules agree on both runs' tokens. Only
input features are read, never a loss, so this may be done before the evaluate split is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from experiments.causal_runs import RunTest
from interventions.measures import Target
from interventions.protocol import Pair


def match_pairs(tests: Sequence[RunTest], overlap: float) -> list[RunTest]:
    """Give the same name to pairs of different runs whose rules pick the same tokens.

    A pair is compared with the first run's pair of every name so far; the closest get the name first, and
    no two pairs of a run get the same one.

    Args:
        tests: the runs of one study with their pairs.
        overlap: least Jaccard overlap of the two rules' tokens, over the evaluate tokens of both runs.
    """
    named: dict[str, tuple[RunTest, Pair]] = {}
    found = []
    for test in tests:
        unnamed = described(test)
        near = [
            (rule_overlap(test, pair, *other), pair.name, name)
            for pair in unnamed
            for name, other in named.items()
        ]
        names: dict[str, str] = {}
        for value, own, name in sorted(near, key=lambda item: -item[0]):
            if value >= overlap and own not in names and name not in names.values():
                names[own] = name
        found.append(renamed(test, names))
        for pair in unnamed:
            named.setdefault(names.get(pair.name, pair.name), (test, pair))
    return found


def rule_overlap(test: RunTest, pair: Pair, other_test: RunTest, other: Pair) -> float:
    """Jaccard overlap of two pairs' rules over the evaluate tokens of both runs."""
    if pair.rule is None or other.rule is None:
        return 0.0
    both = either = 0
    for tokens in (test.run.task.splits.evaluate, other_test.run.task.splits.evaluate):
        one, two = pair.rule.assign(tokens).numpy(), other.rule.assign(tokens).numpy()
        both += int(np.sum(one & two))
        either += int(np.sum(one | two))
    return both / either if either else 0.0


def described(test: RunTest) -> list[Pair]:
    """The run's pairs that no known skill names."""
    skills = test.run.task.splits.evaluate.skills
    return [pair for pair in test.pairs if pair.name not in skills]


def largest_overlap(tests: Sequence[RunTest]) -> float | None:
    """Largest overlap of two runs' clusters that no known skill names; None where there are no two."""
    found = [
        rule_overlap(test, pair, other, theirs)
        for test, other in combinations(tests, 2)
        for pair in described(test)
        for theirs in described(other)
    ]
    return max(found, default=None)


def renamed(test: RunTest, names: Mapping[str, str]) -> RunTest:
    """A run's pairs, null pairs and off-target clusters under their new names."""

    def target(old: Target) -> Target:
        groups = {}
        for name, mask in old.others.items():
            kind, _, cluster = name.partition(" ")
            groups[f"cluster {names.get(cluster, cluster)}" if kind == "cluster" else name] = mask
        return replace(old, others=groups)

    def pair(old: Pair, name: str) -> Pair:
        return replace(old, name=name, evaluate=target(old.evaluate), select=target(old.select))

    def null(old: Pair) -> Pair:
        prefix, _, cluster = old.name.partition(": ")
        return pair(old, f"{prefix}: {names.get(cluster, cluster)}")

    own = tuple(pair(p, names.get(p.name, p.name)) for p in test.pairs)
    return replace(test, pairs=own, nulls=tuple(map(null, test.nulls)))
