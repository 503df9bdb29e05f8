"""Membership rules against planted rules."""

import json

import numpy as np
import pytest
import torch

from experiments.tasks.arithmetic import make_data
from polca_edit.clusters.membership import MembershipRule, fit_rule
from polca_edit.tokens import TokenSet


def _tokens(sequences: int, features: dict, places: int = 4) -> TokenSet:
    scored = torch.ones(sequences, places, dtype=torch.bool)
    return TokenSet(torch.zeros(sequences, 3), scored, torch.arange(sequences), features=features)


def test_planted_integer_rule_is_found_and_transfers():
    data = make_data(150, 10, 200, 8, seed=0)
    select, evaluate = data.splits.select, data.splits.evaluate
    rule = fit_rule(select, select.skills["carry@100s"], seed=0)
    assert rule.auc > 0.99
    assert bool((rule.assign(evaluate) == evaluate.skills["carry@100s"]).all())
    assert "carry in" in rule.features
    assert "place = 1" in rule.description


def test_text_features_and_unseen_values():
    generator = np.random.default_rng(0)
    tags = generator.choice(["NOUN", "VERB", "ADJ"], size=400)
    tokens = _tokens(100, {"tag": tags, "length": generator.integers(1, 9, 400)})
    member = torch.from_numpy(tags == "VERB")
    rule = fit_rule(tokens, member, seed=1)
    assert rule.auc == 1.0
    assert rule.description == "tag is 'VERB'"
    other = np.array(["VERB", "XX", "NOUN", "VERB"])
    unseen = _tokens(1, {"tag": other, "length": np.arange(4)})
    assert rule.assign(unseen).tolist() == [True, False, False, True]


def test_noise_has_auc_near_a_half_and_duplicates_do_not_leak():
    # Every document's tokens share one random label and one document number: a split that cuts
    # documents would score 1 here, a split by document cannot know.
    generator = np.random.default_rng(0)
    number = np.repeat(np.arange(300), 4)
    label = np.repeat(generator.random(300) < 0.4, 4)
    tokens = _tokens(300, {"number": number % 97 * 1.0, "own": number})
    rule = fit_rule(tokens, torch.from_numpy(label), seed=0)
    assert abs(rule.auc - 0.5) < 0.08


def test_survives_json_and_is_deterministic():
    data = make_data(60, 10, 60, 8, seed=3)
    select = data.splits.select
    rule = fit_rule(select, select.skills["carry"], seed=0)
    again = MembershipRule.from_dict(json.loads(json.dumps(rule.as_dict())))
    assert again == rule
    assert fit_rule(select, select.skills["carry"], seed=0) == rule
    assert bool((again.assign(data.splits.evaluate) == rule.assign(data.splits.evaluate)).all())


def test_score_is_sklearns_own_probability():
    from sklearn.tree import DecisionTreeClassifier

    generator = np.random.default_rng(2)
    values = generator.normal(size=(800, 3))
    member = values[:, 0] * values[:, 1] + 0.3 * generator.normal(size=800) > 0.2
    tokens = _tokens(200, {f"x{i}": values[:, i] for i in range(3)})
    rule = fit_rule(tokens, torch.from_numpy(member), seed=0)
    tree = DecisionTreeClassifier(max_depth=5, min_samples_leaf=4, random_state=0).fit(values, member)
    np.testing.assert_allclose(rule.score(tokens).numpy(), tree.predict_proba(values)[:, 1], atol=1e-12)


def test_degenerate_and_invalid_input():
    tokens = _tokens(5, {"a": np.arange(20)})
    nobody = fit_rule(tokens, torch.zeros(20, dtype=torch.bool), seed=0)
    assert nobody.auc == 0.5
    assert not bool(nobody.assign(tokens).any())
    with pytest.raises(ValueError, match="features"):
        fit_rule(_tokens(5, {}), torch.zeros(20, dtype=torch.bool), seed=0)
    rule = fit_rule(tokens, torch.arange(20) > 9, seed=0)
    with pytest.raises(ValueError, match="missing"):
        rule.assign(_tokens(5, {"b": np.arange(20)}))
