"""Names hold where they are given: a planted rule is found, noise stays unnamed."""

import numpy as np
import pytest
import torch

from polca_edit.clusters.names import describe_group, name_group, name_of
from polca_edit.tokens import TokenSet


@pytest.fixture
def tokens() -> TokenSet:
    rng = np.random.default_rng(0)
    count = 1200
    place = rng.integers(0, 4, count)
    features = {
        "place": place,
        "digit_sum": rng.integers(0, 19, count),
        "word": rng.choice(["a", "b", "c"], count),
        "weight": rng.normal(size=count),
    }
    skills = {f"{10**k}s": torch.from_numpy(place == k) for k in range(4)}
    return TokenSet(
        torch.zeros(count, 1),
        torch.ones(count, 1, dtype=torch.bool),
        torch.arange(count),
        skills,
        features=features,
    )


def test_a_parent_with_a_range_is_named_with_precision_and_recall(tokens) -> None:
    tens = tokens.skills["10s"].numpy()
    sums = tokens.features["digit_sum"]
    member = tens & (sums >= 5) & (sums <= 14)
    found = describe_group(tokens, torch.from_numpy(member))
    assert found.text == "10s digit, digit sum 5-14"
    assert (found.precision, found.recall) == (1.0, 1.0)
    assert name_of(tokens, torch.from_numpy(member), "x") == "10s digit, digit sum 5-14"
    spoiled = member ^ (np.random.default_rng(1).random(len(member)) < 0.03)
    described = describe_group(tokens, torch.from_numpy(spoiled))
    both = (tens & (sums >= 5) & (sums <= 14) & spoiled).sum()
    assert described.text == "10s digit, digit sum 5-14"
    assert described.precision == pytest.approx(both / member.sum())
    assert described.recall == pytest.approx(both / spoiled.sum())
    text = name_of(tokens, torch.from_numpy(spoiled), "x")
    assert text == f"10s digit, digit sum 5-14 (P {described.precision:.2f}, R {described.recall:.2f})"


def test_at_most_two_conditions_and_none_that_brings_nothing(tokens) -> None:
    word = tokens.features["word"] == "b"
    assert describe_group(tokens, torch.from_numpy(word)).text == "word 'b'"
    sums = tokens.features["digit_sum"]
    three = word & (sums > 4) & (tokens.features["weight"] > 0) & tokens.skills["1s"].numpy()
    found = describe_group(tokens, torch.from_numpy(three))
    assert found.conditions == 2
    assert found.text.startswith("1s digit, ")


def test_noise_has_no_name_and_says_what_is_commonest(tokens) -> None:
    noise = torch.from_numpy(np.random.default_rng(2).random(1200) < 0.1)
    assert not describe_group(tokens, noise).holds
    held = {n: float(m[noise].double().mean()) for n, m in tokens.skills.items()}
    best = max(held, key=lambda n: held[n])
    assert name_of(tokens, noise, "hessian 3:1") == f"unnamed hessian 3:1 ({held[best]:.0%} {best} digit)"


def test_the_rule_finds_the_group_among_other_tokens(tokens) -> None:
    half = tokens.select(torch.arange(600))
    other = tokens.select(torch.arange(600, 1200))

    def members(part: TokenSet) -> torch.Tensor:
        return part.skills["100s"] & torch.from_numpy(part.features["digit_sum"] >= 9)

    group = name_group(half, members(half), "x", seed=0)
    found = group.on(other)
    truth = members(other)
    assert float((found & truth).sum()) / float((found | truth).sum()) > 0.6
