"""The causal test says yes where yes is true and no to the twin, through the whole call."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from interventions.causal import bases
from interventions.causal.bases import special_axes
from interventions.causal.cost import causal_cost
from interventions.causal.evidence import Evidence, Insertion, Other, leakage_draws
from interventions.causal.nulls import SpanPool, total_share
from interventions.causal.questions import judge, needed, only, pool, within
from interventions.causal.settings import TestSettings
from interventions.causal.statistics import Interval, Shares
from interventions.causal.test import CausalTable, causal_test, open_bench
from interventions.damage import EvaluatedSplit
from polca_edit.basis.record import unlabelled
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.clusters.density import ClusterSettings
from polca_edit.clusters.hypotheses import Hypothesis, TokenGroup
from polca_edit.derivatives.objective import Objective
from polca_edit.observation import ObserveSettings, observe
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet

QUICK = TestSettings(resamples=300, null_documents=40, random_draws=19, rotations=24, transplants=19, least=5)
#: For what does not need the directions of a span: words of N and W, names, reasons.
PLAIN = replace(QUICK, rotations=0, transplants=0)
SKILLS = 4


class Landscape(nn.Module):
    """Slot k of document i loses 1/2 h_i (theta_k - 2)^2; the mixed one reads two coordinates at once."""

    def __init__(self, size: int, coupled: bool) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.coupled = coupled

    def forward(self, inputs: Tensor) -> Tensor:
        skills = self.theta[:SKILLS]
        read = skills.mean() * torch.ones(SKILLS, dtype=torch.float64) if self.coupled else skills
        return 0.5 * inputs * (read - 2.0) ** 2


def token_loss(module: nn.Module, inputs: Tensor) -> Tensor:
    return module(inputs)


def world(
    coupled: bool = False, seed: int = 0, documents: int = 80
) -> tuple[EvaluatedSplit, dict[str, Tensor]]:
    """Four skills learned along the first four axes; twelve more axes moved in vain."""
    generator = torch.Generator().manual_seed(seed)
    module = Landscape(16, coupled)
    space = ParameterSpace.from_module(module)
    end = torch.cat([torch.full((SKILLS,), 2.0), torch.randn(12, generator=generator)]).double()
    series = open_checkpoints({t: end * t / 10 for t in range(11)}, space)
    strength = 0.5 + torch.rand(documents, 1, generator=generator, dtype=torch.float64).expand(-1, SKILLS)
    tokens = TokenSet(strength, torch.ones(documents, SKILLS, dtype=torch.bool), torch.arange(documents))
    groups = {f"skill{k}": tokens.position_of == k for k in range(SKILLS)}
    tokens = replace(tokens, skills=groups)
    return EvaluatedSplit(Objective(module, token_loss, space), series, tokens), groups


def pairs_of(vectors: tuple[int, ...] = (0, 1, 2, 3), skill: int | None = None) -> list[Hypothesis]:
    axes = torch.eye(16, dtype=torch.float64)[:8]
    found = []
    for k in vectors:
        name = f"skill{k if skill is None else skill}"
        group = TokenGroup(name, skill=name)
        found.append(Hypothesis(f"axis {k}", axes[k][None], group, "skill", "axes", (k,), span=axes))
    return found


@pytest.fixture(scope="module")
def separable() -> CausalTable:
    split, groups = world()
    return causal_test(split, pairs_of(), QUICK, parents=groups)


def test_planted_skills_are_carriers_with_closed_forms(separable) -> None:
    assert [row.word for row in separable.rows] == ["carrier"] * SKILLS
    split, _ = world()
    mean = float(split.tokens.inputs[:, 0].mean())
    for row in separable.rows:
        [evidence] = row.pooled.runs
        # Undone whole, 1/2 h 2^2 = 2 h comes back, all of the headroom and nobody else's.
        assert row.pooled.damage.estimate == pytest.approx(2 * mean, abs=1e-9)
        assert row.pooled.share.estimate == pytest.approx(1.0)
        assert row.pooled.leakage.high == pytest.approx(0.0, abs=1e-12)
        assert evidence.insertion is not None
        assert evidence.insertion.gain.estimate == pytest.approx(1.0)
        assert row.size == "full"
        assert set(row.grades) == {"clean", "strict"}
        assert "all it learned" in row.sentence
    [basis] = separable.bases
    assert basis.special.answer == "yes"


def test_a_movement_that_no_loss_sees_is_inert() -> None:
    split, groups = world()
    table = causal_test(split, pairs_of((6, 7), skill=1), PLAIN, parents=groups)
    assert [row.word for row in table.rows] == ["inert", "inert"]
    assert all("would have been seen" in row.sentence for row in table.rows)
    assert all(row.smallest_effect >= PLAIN.damage_floor for row in table.rows)


def test_a_tested_group_of_the_same_parent_is_not_off_target() -> None:
    split, groups = world()
    tokens = split.tokens
    # Three quarters of it are skill0; its rest are the tokens of skill1 that the edit of the pair hurts.
    mostly = groups["skill0"] & (torch.arange(tokens.count) % 4 == 0) | (
        groups["skill1"] & (torch.arange(tokens.count) < 30)
    )
    other = groups["skill2"] & (torch.arange(tokens.count) < 200)
    axes = torch.eye(16, dtype=torch.float64)[:8]

    def pair(name: str, row: int, mask: Tensor) -> Hypothesis:
        group = TokenGroup.labelled(name, mask, tokens)
        return Hypothesis(name, axes[row][None], group, "own", "axes", (row,), span=axes)

    pairs = [*pairs_of((0,)), pair("mostly skill0", 4, mostly), pair("part of skill2", 2, other)]
    rows = {row.name: row for row in causal_test(split, pairs, PLAIN, parents=groups).rows}
    judged = set(rows["axis 0"].pooled.runs[0].others)
    assert judged == {"skill1", "skill2", "skill3", "part of skill2"}


def test_a_direction_that_every_skill_needs_is_shared() -> None:
    split, groups = world(coupled=True)
    mean = torch.zeros(1, 16, dtype=torch.float64)
    mean[0, :SKILLS] = 0.5
    axes = torch.linalg.qr(torch.cat([mean, torch.eye(16, dtype=torch.float64)[1:6]]).T)[0].T.contiguous()
    group = TokenGroup("skill2", skill="skill2")
    pair = Hypothesis("common", axes[:1], group, basis="axes", vectors=(0,), span=axes)
    [row] = causal_test(split, [pair], replace(QUICK, rotations=20), parents=groups).rows
    assert row.word == "shared"
    assert row.answers["N"] == "yes"
    assert row.pooled.leakage.estimate == pytest.approx(1.0)


def test_two_skills_mixed_at_45_degrees_are_shared() -> None:
    split, groups = world()
    axes = torch.eye(16, dtype=torch.float64)[:8]
    turned = axes.clone()
    turned[0], turned[1] = (axes[0] + axes[1]) / 2**0.5, (axes[0] - axes[1]) / 2**0.5
    pair = Hypothesis(
        "mix", turned[:1], TokenGroup("skill0", skill="skill0"), basis="b", vectors=(0,), span=turned
    )
    [row] = causal_test(split, [pair], QUICK, parents=groups).rows
    assert row.word == "shared"
    assert row.pooled.runs[0].worst == "skill1"


def test_redundant_and_synergic_movements_are_flagged_beside_their_words() -> None:
    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(300, dtype=torch.float64))

        def forward(self, inputs: Tensor) -> Tensor:
            t = self.theta
            either = nn.functional.softplus(-8 * (torch.maximum(t[0], t[1]) - 0.5))
            both = 0.5 * (t[2] * t[3] - 2.0) ** 2
            return torch.stack([either, both, 0.5 * (t[4] - 1) ** 2]).expand(len(inputs), 3)

    module = Gates()
    space = ParameterSpace.from_module(module)
    end = torch.tensor([1.0, 1.0, 2**0.5, 2**0.5, 1.0, *[0.03] * 295], dtype=torch.float64)
    series = open_checkpoints({t: end * t / 10 for t in range(11)}, space)
    tokens = TokenSet(torch.zeros(20, 1), torch.ones(20, 3, dtype=torch.bool), torch.arange(20))
    groups = {n: tokens.position_of == k for k, n in enumerate(("or", "and", "other"))}
    split = EvaluatedSplit(Objective(module, token_loss, space), series, replace(tokens, skills=groups))
    axes = torch.eye(300, dtype=torch.float64)[:6]

    def pair(name: str, rows: tuple[int, ...], group: str, partner: int | None = None) -> Hypothesis:
        partners = None if partner is None else axes[[partner]]
        group_of = TokenGroup(group, skill=group)
        return Hypothesis(name, axes[list(rows)], group_of, "own", "axes", rows, partners=partners, span=axes)

    table = causal_test(
        split,
        [
            pair("or 0", (0,), "or", 1),
            pair("or both", (0, 1), "or"),
            pair("and 2", (2,), "and", 3),
            pair("and both", (2, 3), "and"),
        ],
        QUICK,
        parents=groups,
    )
    rows = {row.name: row for row in table.rows}
    assert (rows["or 0"].word, rows["or both"].word) == ("inert", "carrier")
    assert "redundant" in rows["or 0"].flags
    assert (rows["and 2"].word, rows["and both"].word) == ("selective", "carrier")
    assert "synergy" in rows["and 2"].flags
    assert "synergy" not in rows["and both"].flags


def evidence(**changes: object) -> Evidence:
    own = Evidence(
        tokens=100,
        parent=None,
        damage=Interval(1.0, 0.8, 1.2, 50),
        share=Interval(0.6, 0.5, 0.7, 50),
        headroom=2.0,
        in_nats=False,
        random95=0.01,
        leakage=Interval(0.05, 0.01, 0.1, 50),
        worst="other",
        others={"other": Other(0.03, Interval(0.05, 0.0, 0.1, 50), False)},
        selectivity=0.57,
        selectivity_null=(0.0,) * 199,
        insertion=Insertion(Interval(0.5, 0.3, 0.6, 50), Interval(0.4, 0.2, 0.5, 50), 0.1),
    )
    return replace(own, **changes)


PAIR = Hypothesis("p", torch.eye(2)[:1], TokenGroup("g"), "own", "b", (0,))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "carrier"),
        ({"insertion": None}, "selective"),
        (
            {"insertion": Insertion(Interval(0.05, 0.0, 0.09, 50), Interval(0.05, 0.0, 0.1, 50), 0.0)},
            "selective",
        ),
        ({"damage": Interval(0.01, 0.0, 0.015, 50)}, "inert"),
        ({"damage": Interval(0.03, 0.01, 0.05, 50)}, "unclear"),
        # Random edits of the same size do as much.
        ({"random95": 0.9}, "unclear"),
        ({"random95": 3.0}, "inert"),
        ({"leakage": Interval(0.5, 0.4, 0.6, 50)}, "shared"),
        ({"leakage": Interval(0.3, 0.2, 0.4, 50)}, "unclear"),
        # Directions of the span at the same damage are as selective.
        ({"selectivity_null": (1.0,) * 199}, "unclear"),
        ({"selectivity_null": ()}, "unclear"),
        # A group with hardly any headroom loses nats instead.
        ({"others": {"small": Other(float("nan"), Interval(0.9, 0.8, 1.0, 50), True)}}, "shared"),
        ({"others": {"small": Other(float("nan"), Interval(0.0, -0.01, 0.01, 50), True)}}, "carrier"),
    ],
)
def test_the_word_follows_from_the_answers(changes, word) -> None:
    settings = TestSettings()
    pooled = pool([evidence(**changes)], settings)
    [row] = judge([PAIR], [pooled], settings, [(0,)])
    assert row.word == word
    assert "1 run" in row.flags


def test_large_effects_never_fail_for_their_own_error() -> None:
    """The first rule's power gate failed large effects; power only qualifies a no here."""
    wide = evidence(damage=Interval(5.0, 1.0, 9.0, 20))
    assert needed(pool([wide], TestSettings())) == "yes"


def test_answers_over_runs_come_from_t_intervals() -> None:
    settings = TestSettings()
    runs = [
        evidence(damage=Interval(d, 0.0, 9.0, 50), rest=Interval(r, -1.0, 1.0, 50))
        for d, r in ((1.0, 0.3), (1.2, 0.35), (1.1, 0.31))
    ]
    found = pool(runs, settings)
    assert found.damage.units == 3
    assert needed(found) == "yes"
    assert within(found, settings) == "yes"
    assert only(found, settings, found.p) == "yes"
    # A run without a rest of its parent leaves W out rather than averaging what is there.
    assert within(pool([*runs, evidence()], settings), settings) == "not asked"


def test_a_pair_found_by_a_search_takes_the_p_of_the_search() -> None:
    settings = TestSettings()
    strong = evidence(selectivity_null=(0.0,) * 199)
    assert pool([strong], settings, searched_p=0.4).p == 0.4
    [row] = judge([PAIR], [pool([strong], settings, searched_p=0.4)], settings, [(0,)])
    assert row.answers["S"] == "unclear"


def test_the_largest_leak_is_taken_anew_in_every_resample() -> None:
    share = np.array([[1.0, 0.2, 0.1], [1.0, 0.1, 0.4], [0.5, 0.3, 0.0], [-0.1, 0.3, 0.0]])
    found = Shares(share, 2 * share, np.ones_like(share), np.array([5, 5, 5]))
    leak = leakage_draws(found, np.array([False, False, False]))
    assert leak.tolist() == pytest.approx([0.2, 0.4, 0.6, np.inf])
    # The group judged in nats is left to its own rule.
    assert leakage_draws(found, np.array([False, False, True])).tolist()[:2] == pytest.approx([0.2, 0.1])


def test_matched_directions_do_the_wanted_total_damage() -> None:
    split, _ = world()
    axes = torch.eye(16, dtype=torch.float64)[:8]
    filled = SpanPool(split, axes, 3, seed=0, lowest=0.02, highest=0.6)
    filled.fill()
    room = split.headroom.numpy()
    for level in (0.03, 0.2, 0.5):
        matched = filled.matched(level)
        assert len(matched) > 20
        assert [total_share(change, room) for change in matched] == pytest.approx(
            [level] * len(matched), rel=0.01
        )


def test_a_span_that_hardly_moved_still_has_directions_to_compare_with() -> None:
    """Most rows of this span never moved, so the median displacement is zero."""
    module = Landscape(60, coupled=False)
    space = ParameterSpace.from_module(module)
    end = torch.zeros(60, dtype=torch.float64)
    end[:SKILLS] = 2.0
    series = open_checkpoints({t: end * t / 10 for t in range(11)}, space)
    tokens = TokenSet(
        torch.ones(10, SKILLS).double(), torch.ones(10, SKILLS, dtype=torch.bool), torch.arange(10)
    )
    split = EvaluatedSplit(Objective(module, token_loss, space), series, tokens)
    filled = SpanPool(split, torch.eye(60, dtype=torch.float64)[:12], 2, seed=0, lowest=0.02, highest=0.3)
    filled.fill()
    assert len(filled.matched(0.25)) > 20


def test_attribution_stands_beside_the_damage_where_unseen_tokens_were_observed() -> None:
    split, groups = world()
    axes = torch.eye(16, dtype=torch.float64)[:8]
    seen = observe(split.loss, split.series, unlabelled("axes", axes), split.tokens)
    table = causal_test(split, pairs_of((0, 1)), PLAIN, parents=groups, observations={"axes": seen})
    for row in table.rows:
        [evidence] = row.pooled.runs
        # Straight path, separable loss: A = -(D + S) / 2 with D = S.
        assert evidence.attributed == pytest.approx(-row.pooled.damage.estimate)
    other, _ = world(seed=1)
    elsewhere = observe(other.loss, other.series, unlabelled("axes", axes), other.tokens)
    table = causal_test(split, pairs_of((0,)), PLAIN, parents=groups, observations={"axes": elsewhere})
    assert table.rows[0].pooled.runs[0].attributed is None


def test_a_basis_is_compared_with_rotated_ones_on_the_same_tokens(monkeypatch) -> None:
    """Rotated by nothing at all, a basis must tie with itself, however few tokens the null has."""
    split, groups = world(documents=60)
    split.loss.token_loss = lambda module, inputs: 0.5 * (module.theta[:SKILLS] - 3 * inputs) ** 2
    tokens = replace(split.tokens, features={"slot": split.tokens.position_of.numpy().astype(str)})
    turn = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    basis = unlabelled("turned", torch.linalg.qr(turn)[0] @ torch.eye(16, dtype=torch.float64)[:8])
    how = ObserveSettings(
        clusters=ClusterSettings(min_cluster_share=0.1, drop_rising_vectors=False, algorithm="generic")
    )
    seen = observe(split.loss, split.series, basis, tokens, how)
    again: list[float] = []

    def unturned(bench, seen, settings, progress):
        again.append(bases.rotated_statistic(bench, seen, torch.eye(8, dtype=torch.float64), settings))
        return again

    monkeypatch.setattr(bases, "_rotated", unturned)
    table = causal_test(
        split.on(tokens),
        seen.hypotheses("turned"),
        replace(PLAIN, null_documents=7),
        parents=groups,
        observations={"turned": seen},
    )
    found = table.bases[0].aligned
    assert abs(found.statistic - again[0]) > 1e-3  # on all tokens it is another number
    assert found.rotated_p == 1.0


def test_pairs_that_cannot_be_tested_are_named_with_the_reason() -> None:
    split, groups = world()
    still = Hypothesis(
        "still",
        torch.eye(16, dtype=torch.float64)[:1],
        TokenGroup(
            "none", masks={split.tokens.fingerprint(): torch.zeros(split.tokens.count, dtype=torch.bool)}
        ),
    )
    table = causal_test(split, [still, *pairs_of((0,))], PLAIN, parents=groups)
    assert [left.name for left in table.untested] == ["still"]
    assert "0 unseen tokens" in table.untested[0].reason
    with pytest.raises(ValueError, match="at least one pair"):
        causal_test(split, [], PLAIN)
    with pytest.raises(ValueError, match="occurs twice"):
        causal_test(split, [*pairs_of((0,)), *pairs_of((0,))], PLAIN)
    with pytest.raises(ValueError, match="must not share tokens"):
        causal_test(split, pairs_of((0,)), PLAIN, parents={"a": groups["skill0"], "b": groups["skill0"]})
    with pytest.raises(ValueError, match="given for other tokens"):
        causal_test(
            split, [replace(still, group=TokenGroup("elsewhere", masks={"": groups["skill0"]}))], PLAIN
        )


def test_a_group_outside_the_documents_of_the_null_is_not_tested() -> None:
    split, groups = world()
    late = split.tokens.sequence_of >= QUICK.null_documents
    tokens = replace(split.tokens, skills={**groups, "late": groups["skill0"] & late})
    pairs = [replace(pairs_of((0,))[0], group=TokenGroup("late", skill="late")), pairs_of((1,))[0]]
    quick = replace(QUICK, rotations=0, transplants=0)
    table = causal_test(split.on(tokens), pairs, quick)
    assert [row.name for row in table.rows] == ["axis 1"]
    assert "no token in the first 40 documents" in table.untested[0].reason
    # With every document in the null the same pair is tested, and needed.
    wide = causal_test(split.on(tokens), pairs[:1], replace(quick, null_documents=80))
    assert wide.rows[0].answers["N"] == "yes"


def test_the_stated_cost_is_that_of_the_passes_made() -> None:
    split, groups = world()
    split.before, split.headroom, split.start_loss  # noqa: B018 - measured once, whoever asks first
    sizes: list[int] = []
    losses = split.loss.losses

    def counted(theta: Tensor, tokens: TokenSet) -> Tensor:
        sizes.append(tokens.sequences)
        return losses(theta, tokens)

    split.loss.losses = counted  # type: ignore[method-assign]
    try:
        causal_test(split, pairs_of(), QUICK, parents=groups)
    finally:
        del split.loss.losses
    cost = causal_cost(pairs_of(), QUICK)
    assert cost.observed == 0
    made = sum(sizes)
    # Curves end early where all pairs do about the same damage, as here: an upper bound, not far off.
    assert made <= cost.sequences(QUICK.null_documents, 80) <= 3 * made
    # Random edits and transplants are counted exactly; each is one pass over the null's documents.
    assert cost.random == 4 * (QUICK.random_draws + QUICK.transplants)


def test_a_group_that_was_known_before_does_not_take_the_credit_of_an_insertion() -> None:
    """Skill 1 is learned to its last 0.02 nats before the window; mending those is no gain of its own."""
    split, _ = world()
    theta = torch.zeros(16, dtype=torch.float64)
    known, end = theta.clone(), theta.clone()
    known[1], end[:2] = 1.8, 2.0
    series = open_checkpoints({0: theta, 10: known, 20: end}, split.loss.space)
    late = EvaluatedSplit(split.loss, series, split.tokens, (10, 20))
    span = torch.eye(16, dtype=torch.float64)[:SKILLS]
    row = ((end - known) / (end - known).norm())[None]
    pair = Hypothesis("late | 0", row, TokenGroup("skill0", skill="skill0"), basis="axes", span=span)
    names = {name: split.tokens.skills[name] for name in ("skill0", "skill1")}
    [verdict] = causal_test(late, [pair], QUICK, parents=names).rows
    inserted = verdict.pooled.runs[0].insertion
    assert inserted is not None
    # It brings all of both rooms; skill 1's is a hundredth of skill 0's: (2 - 1.8)^2 over 2^2.
    assert inserted.gain.estimate == pytest.approx(1.0, abs=1e-6)
    assert inserted.beyond_others.estimate == pytest.approx(0.99, abs=0.01)
    # A group with a room of its own still counts by share: here it gains all of it as well.
    both = EvaluatedSplit(split.loss, series, split.tokens, (0, 20))
    whole = (end / end.norm())[None]
    joint = Hypothesis("whole | 0", whole, TokenGroup("skill0", skill="skill0"), basis="axes", span=span)
    [shared] = causal_test(both, [joint], QUICK, parents=names).rows
    assert shared.pooled.runs[0].insertion is not None
    assert shared.pooled.runs[0].insertion.beyond_others.estimate == pytest.approx(0.0, abs=1e-6)


def test_a_turned_basis_shares_directions_of_its_span_and_keeps_its_own_axes() -> None:
    split, groups = world()
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).double())[0]
    axes = torch.eye(16, dtype=torch.float64)[:8]
    members = {f"axis {k}": groups[f"skill{k}"].numpy() for k in range(SKILLS)}
    bench = open_bench(split, pairs_of(), members, QUICK, groups)
    straight = SpanPool(bench.nulls, axes, 24, 0)
    straight.fill()
    # The span's directions are the same; what is asked about are the turned axes, which mix the skills.
    turned = replace(straight, axes=turn @ axes)
    own, mixed = (special_axes(bench, pool, QUICK) for pool in (straight, turned))
    assert (own.answer, own.statistic) == ("yes", pytest.approx(1.0))
    assert mixed.answer != "yes"
    assert mixed.statistic < 0.9
