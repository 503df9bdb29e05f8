"""The verdict rule: total, deterministic, and every row of the table."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from interventions.statistics import Interval
from interventions.verdict import BlockingResult, OtherGroup, Thresholds, VerdictInputs, decide


def narrow(value: float, half: float = 0.001) -> Interval:
    return Interval(value, value - half, value + half, value - 0.84 * half, value + 0.84 * half, half / 1.96)


CAUSAL = VerdictInputs(
    damage=narrow(1.0),
    headroom=narrow(2.0),
    share=0.5,
    effect=narrow(0.5),
    attributed=narrow(-1.0),
    sufficiency=narrow(0.5),
    sufficiency_beats="passed",
    joint=narrow(0.0),
    seeds=5,
    seed_effects=(0.5,) * 5,
    sign_p=1 / 32,
    pipeline_p=0.005,
    control_p={"c3": 0.01, "c4": 0.01, "c6": 0.01},
    others={"rest": OtherGroup(narrow(0.0), 1.0, 0.0), "j": OtherGroup(narrow(0.0), 1.0, 0.0)},
    dose_monotone="passed",
    gates={"operator": "passed"},
    positive_control="passed",
)
NO_DAMAGE = replace(CAUSAL, damage=narrow(0.0), share=0.0, sufficiency=narrow(0.0))


def test_causal_row_and_grades() -> None:
    verdict = decide(CAUSAL)
    assert (verdict.verdict, verdict.grade) == ("causal", "+S strict")
    assert "causes" not in verdict.reason
    assert "depends on the movement" in verdict.reason
    blocked = BlockingResult(narrow(0.3), narrow(0.2), False, True, True)
    with_blocking = decide(replace(CAUSAL, blocking=blocked, crossover=True))
    assert with_blocking.grade == "+S+D+X strict"
    assert "causes" in with_blocking.reason
    not_held = decide(replace(CAUSAL, blocking=replace(blocked, held=False)))
    assert "+D" not in not_held.grade
    assert "block_not_held" in not_held.flags


@pytest.mark.parametrize(
    ("change", "verdict", "flag"),
    [
        ({"pipeline_p": 0.06}, "not_selective", "failed:pipeline_null"),
        ({"control_p": {"c3": 0.2, "c4": 0.01, "c6": 0.01}}, "not_selective", "failed:c3"),
        ({"control_p": {"c3": 0.01, "c4": 0.01}}, "not_selective", "not_run:c6"),
        ({"pipeline_p": None}, "not_selective", "not_run:pipeline_null"),
        ({"positive_control": "not_run"}, "not_selective", "not_run:positive_control"),
        ({"positive_control": "failed"}, "inconclusive", "failed:positive_control"),
        ({"gates": {"operator": "failed"}}, "inconclusive", "failed:gate:operator"),
        ({"dose_monotone": "failed"}, "not_selective", "non_monotone"),
        ({"attributed": narrow(0.0)}, "inconclusive", "sensitive"),
        ({"rule_auc": 0.7}, "inconclusive", "failed:description"),
        ({"pilot_error": 0.1}, "inconclusive", "failed:power"),
        ({"damage": narrow(0.2, 0.5)}, "inconclusive", "undecided"),
        ({"seed_effects": (0.5, 0.5, 0.5, 0.5, -0.1)}, "not_selective", "sign"),
        ({"seeds": 3}, "inconclusive", "few_seeds"),
        (
            {"others": {"rest": OtherGroup(narrow(0.2), 1.0, 0.2), "j": OtherGroup(narrow(0.2), 1.0, 0.2)}},
            "not_selective",
            "leaky",
        ),
        ({"others": {"j": OtherGroup(narrow(0.6), 1.0, 0.6)}}, "not_selective", "failed:worst_other"),
    ],
)
def test_one_clause_changed(change: dict[str, object], verdict: str, flag: str) -> None:
    found = decide(replace(CAUSAL, **change))  # type: ignore[arg-type]
    assert found.verdict == verdict
    assert flag in found.flags


@pytest.mark.parametrize(
    ("change", "verdict", "flag"),
    [
        ({}, "observational_only", None),
        ({"sufficiency": narrow(0.5)}, "inconclusive", "redundant"),
        ({"joint": narrow(1.0)}, "inconclusive", "redundant"),
        ({"attributed": narrow(0.0)}, "inconclusive", "no_role"),
        ({"damage": narrow(-0.5)}, "not_selective", "improves"),
        ({"damage": narrow(-0.5), "attributed": narrow(0.1)}, "inconclusive", "improves"),
        ({"sufficiency": None}, "inconclusive", "not_run:sufficiency"),
        ({"window": narrow(1.0)}, "not_selective", "window_effect"),
        ({"window": narrow(1.0), "there_and_back": 9.0}, "observational_only", "there_and_back"),
    ],
)
def test_no_damage_rows(change: dict[str, object], verdict: str, flag: str | None) -> None:
    found = decide(replace(NO_DAMAGE, **change))  # type: ignore[arg-type]
    assert found.verdict == verdict
    assert flag is None or flag in found.flags


def test_few_seeds_keep_a_single_run_verdict() -> None:
    found = decide(replace(CAUSAL, seeds=1, seed_effects=(0.5,), sign_p=None))
    assert (found.verdict, found.single_run_verdict) == ("inconclusive", "causal")
    assert "Single-run verdict: 1 of 5 seeds" in found.reason


@pytest.mark.parametrize(
    ("change", "testable"),
    [
        ({}, True),
        ({"pipeline_p": 0.06}, True),  # not selective, with a failed clause of the test itself
        ({"damage": narrow(0.2, 0.1)}, True),  # undecided: looked at, nothing to say
        ({"pilot_error": 1.0}, False),
        ({"positive_control": "failed"}, False),
        ({"gates": {"operator": "failed"}}, False),
    ],
)
@pytest.mark.parametrize("seeds", [1, 5])
def test_testable_is_what_no_gate_stopped_whatever_the_seeds(change, testable, seeds) -> None:
    verdict = decide(replace(CAUSAL, seeds=seeds, **change))
    assert verdict.testable == testable
    assert testable or verdict.single_run_verdict == "inconclusive"


def test_not_applicable_is_stored_and_never_passed() -> None:
    found = decide(replace(CAUSAL, control_p={"c3": 0.01, "c4": 0.01}, not_applicable=("c6",)))
    assert found.verdict == "causal"
    assert found.clauses["c6"] == "not_applicable"


def test_even_response_and_underpowered_are_flags_only() -> None:
    found = decide(replace(CAUSAL, dose_asymmetry=(1.0, 1.0)))
    assert found.verdict == "causal"
    assert "even_response" in found.flags
    wide = OtherGroup(Interval(0.0, -0.3, 0.3, -0.25, 0.25, 0.15), 1.0, 0.0)
    assert "underpowered" in decide(replace(CAUSAL, others={"rest": wide})).flags


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.9, "from 90% of their tokens' headroom on"), (float("inf"), "No planted skill was found")],
)
def test_a_blunt_assay_is_flagged_and_said(share: float, words: str) -> None:
    blunt = decide(replace(CAUSAL, pipeline_p=0.2, detectable_share=share))
    assert blunt.verdict == "not_selective"
    assert "low_power" in blunt.flags
    assert words in blunt.reason
    sharp = decide(replace(CAUSAL, pipeline_p=0.2, detectable_share=0.8))
    assert "low_power" not in sharp.flags
    assert "lanted" not in sharp.reason
    # Planted skills say nothing about a damage that is shown to be nil.
    nil = decide(replace(NO_DAMAGE, detectable_share=share))
    assert nil.verdict == "observational_only"
    assert "low_power" in nil.flags
    assert "lanted" not in nil.reason
    # A verdict that was reached needs no excuse.
    reached = decide(replace(CAUSAL, detectable_share=share))
    assert reached.verdict == "causal"
    assert "lanted" not in reached.reason


values = some.floats(allow_nan=True, allow_infinity=True) | some.floats(-2, 2)
intervals = some.builds(Interval, *[values] * 6)
outcomes = some.sampled_from(["passed", "failed", "not_run", "not_applicable"])
p_values = some.none() | some.floats(0, 1)
everything = some.builds(
    VerdictInputs,
    damage=intervals,
    headroom=intervals,
    share=values,
    effect=intervals,
    attributed=intervals,
    sufficiency=some.none() | intervals,
    sufficiency_beats=outcomes,
    window=some.none() | intervals,
    window_beats_sham=outcomes,
    joint=some.none() | intervals,
    there_and_back=values,
    pilot_error=values,
    rule_auc=some.none() | values,
    seeds=some.integers(0, 8),
    seed_effects=some.lists(values, max_size=6).map(tuple),
    sign_p=p_values,
    pipeline_p=p_values,
    control_p=some.dictionaries(some.sampled_from(["c1", "c3", "c4", "c6"]), p_values),
    others=some.dictionaries(
        some.sampled_from(["rest", "j"]), some.builds(OtherGroup, intervals, values, values)
    ),
    dose_monotone=outcomes,
    gates=some.dictionaries(some.sampled_from(["operator", "movement"]), outcomes),
    positive_control=outcomes,
    detectable_share=some.none() | values,
    blocking=some.none()
    | some.builds(BlockingResult, intervals, intervals, some.booleans(), some.booleans(), some.booleans()),
    not_applicable=some.lists(some.sampled_from(["c6", "seeds", "dose", "equivalence"]), max_size=2).map(
        tuple
    ),
)


@settings(max_examples=400, deadline=None)
@given(everything)
def test_every_input_gets_exactly_one_verdict(inputs: VerdictInputs) -> None:
    found = decide(inputs)
    again = decide(inputs)
    assert found == again
    assert found.verdict in ("causal", "not_selective", "observational_only", "inconclusive")
    assert found.reason
    if found.verdict == "causal":
        assert set(found.clauses.values()) <= {"passed", "not_applicable"}
        assert inputs.seeds >= Thresholds().seeds or "seeds" in inputs.not_applicable
    if found.verdict == "observational_only":
        assert not inputs.damage.high < 0
