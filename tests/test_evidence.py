"""Evidence: bootstrap of ratios, averaging over seeds, and the path from a planted run to a verdict."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.planted_base import (
    World,
    landscape_subject,
    make_pair,
    measure_world,
    sequences_of,
    slot_groups,
)
from interventions import nulls
from interventions.evidence import PairEvidence, combine, dose_outcome, effect_draws, null_p
from interventions.protocol import PlanSettings, plan_digest, settings_as_plan
from interventions.statistics import Draws
from interventions.verdict import decide

SMALL = PlanSettings(
    draws=39,
    rotations=39,
    random_bases=39,
    gradient_draws=39,
    transplant_draws=39,
    shuffle_draws=9,
    resamples=100,
)


def two_skills() -> World:
    """Two quadratics at their minimum along the first two of ten axes."""
    end = torch.full((12,), 0.2, dtype=torch.float64)
    end[:2] = 1.0

    def losses(theta: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        own = torch.stack([2 * (theta[0] - 1) ** 2, 0.5 * (theta[1] - 1) ** 2])
        return own.expand(len(inputs), 2)

    select, evaluate = sequences_of(5, 2), sequences_of(5, 2, first=5)
    groups = slot_groups(select, ("a", "b")), slot_groups(evaluate, ("a", "b"))
    rows = torch.eye(12, dtype=torch.float64)[:10]
    subject = landscape_subject(losses, [end * t / 8 for t in range(9)], rows, select, evaluate)
    pairs = (make_pair("a", (0,), "a", *groups), make_pair("wrong", (1,), "a", *groups))
    return World(subject, pairs, *groups)


def unequal_skills() -> World:
    """Two quadratics, steeper in later sequences, left before their minimum."""
    end = torch.full((12,), 0.2, dtype=torch.float64)
    end[:2] = torch.tensor([0.7, 0.6])

    def losses(theta: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        own = torch.stack([2 * (theta[0] - 1) ** 2, 0.5 * (theta[1] + 0.3 * theta[0] - 1) ** 2])
        return own * (1 + inputs)

    select, evaluate = sequences_of(5, 2), sequences_of(5, 2, first=5)
    groups = slot_groups(select, ("a", "b")), slot_groups(evaluate, ("a", "b"))
    rows = torch.eye(12, dtype=torch.float64)[:10]
    # Aslant, so that undoing a row takes a part of the headroom only.
    rows[0, :3], rows[2, :3] = torch.tensor([0.8, 0.0, 0.6]), torch.tensor([-0.6, 0.0, 0.8])
    thetas = [end * t / 8 for t in range(9)]
    subject = landscape_subject(losses, thetas, rows, select, evaluate, uniform=False)
    return World(subject, (make_pair("a", (0,), "a", *groups),), *groups)


@pytest.fixture(scope="module")
def measured():
    return measure_world(two_skills(), SMALL)


def test_numbers_are_the_closed_forms(measured) -> None:
    session, (right, wrong) = measured
    assert right.damage.estimate == pytest.approx(2.0)
    assert right.attributed.estimate == pytest.approx(-2.0)
    assert right.sufficiency is not None
    assert right.sufficiency.estimate == pytest.approx(1.0)
    assert right.effect.estimate == pytest.approx(1.0)
    assert wrong.damage.estimate == pytest.approx(0.0)
    assert wrong.effect.estimate == pytest.approx(-1.0)
    change = session.evaluate.change(session.undo((0,)))
    assert effect_draws(
        session.evaluate, change, two_skills().pairs[0].evaluate
    ).interval().error == pytest.approx(0)


def test_verdicts_over_seeds_and_of_one_run(measured) -> None:
    _, (right, wrong) = measured
    five = decide(combine([right] * 5))
    assert five.verdict == "causal", five
    assert "+S" in five.grade
    one = decide(combine([right]))
    assert (one.verdict, one.single_run_verdict) == ("inconclusive", "causal")
    assert decide(combine([wrong] * 5)).verdict == "inconclusive"
    unplanned = replace(right, controls={k: v for k, v in right.controls.items() if k != "c4"})
    assert decide(combine([unplanned] * 5)).verdict == "not_selective"
    with pytest.raises(ValueError, match="only evidence of one pair"):
        combine([right, wrong])


def test_seed_averages_pair_draw_with_draw() -> None:
    nulls_of_runs = [np.array([0.0, 2.0, 4.0]), np.array([4.0, 2.0, 0.0, 9.0])]
    assert null_p(2.5, nulls_of_runs) == 1 / 4
    assert null_p(1.0, [np.array([])]) is None


def test_dose_must_rise(measured) -> None:
    _, (right, _) = measured
    assert dose_outcome(right.doses) == "passed"
    falling = {a: Draws(v, np.full(20, v)) for a, v in ((0.0, 0.0), (0.5, 1.0), (1.0, 0.5))}
    assert dose_outcome(falling) == "failed"
    assert dose_outcome({0.0: falling[0.0]}) == "not_run"


def test_pipeline_null_chooses_on_select_and_takes_the_maximum(measured) -> None:
    session, _ = measured
    world = two_skills()
    choose = nulls.labelled_choice(world.select, world.evaluate, 1)
    from experiments.planted_base import projections_of

    own = projections_of(world.subject, world.subject.rows)
    (best,) = choose(own)
    assert (best.vector, best.name) in {(0, "a"), (1, "b")}
    assert nulls.largest_effect(session.evaluate, world.subject.rows, [best]) == pytest.approx(1.0)
    assert nulls.largest_effect(session.evaluate, world.subject.rows, []) == -1.0
    turned = list(nulls.rotations(4, 2, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(turned[0].T @ turned[0], torch.eye(4, dtype=torch.float64))


def test_plan_digest_changes_with_every_setting() -> None:
    plan = settings_as_plan(PlanSettings())
    assert plan_digest(plan) == plan_digest(settings_as_plan(PlanSettings()))
    assert plan_digest(plan) != plan_digest(settings_as_plan(PlanSettings(draws=198)))


def test_controls_that_do_not_apply_in_some_runs_use_the_others(measured) -> None:
    _, (other, _) = measured
    assert "c6" in other.not_applicable  # no gradient at the minimum
    right: PairEvidence = replace(
        other, controls={**other.controls, "c6": np.zeros(39)}, not_applicable=("positive_control",)
    )
    found = combine([right, other])
    assert found.control_p["c6"] is not None
    assert "c6" not in found.not_applicable


def test_ranking_on_a_part_of_the_split_leaves_damage_on_all_of_it() -> None:
    """T and its nulls are as if that part were the split, damage and other groups as without it."""
    world = unequal_skills()
    part = replace(
        world,
        subject=replace(world.subject, evaluate=world.subject.evaluate.select(torch.arange(3))),
        evaluate={name: mask[: 3 * 2] for name, mask in world.evaluate.items()},
        pairs=tuple(replace(p, evaluate=p.evaluate.among(np.arange(10) < 6)) for p in world.pairs),
    )
    (whole, *_), (small, *_), (ranked, *_) = (
        measure_world(w, settings)[1]
        for w, settings in ((world, SMALL), (part, SMALL), (world, replace(SMALL, ranked=3)))
    )
    assert ranked.damage.estimate == whole.damage.estimate != small.damage.estimate
    assert ranked.pilot_error == whole.pilot_error
    assert ranked.others["rest"][0].estimate == whole.others["rest"][0].estimate
    assert {a: d.estimate for a, d in ranked.doses.items()} == {a: d.estimate for a, d in whole.doses.items()}
    np.testing.assert_array_equal(ranked.effect.draws, small.effect.draws)
    left = 0.7 - 0.8 * (0.8 * 0.7 + 0.6 * 0.2)  # what undoing the row leaves of the first weight
    target = ((left - 1) ** 2 - 0.3**2) / (1 - 0.3**2)
    other = ((0.6 + 0.3 * left - 1) ** 2 - 0.19**2) / (1 - 0.19**2)
    assert ranked.effect.estimate == pytest.approx(target - other)
    assert ranked.attributed.estimate == pytest.approx(small.attributed.estimate)
    assert ranked.sufficiency is not None
    assert small.sufficiency is not None
    assert ranked.sufficiency.estimate == small.sufficiency.estimate
    assert ranked.controls.keys() == small.controls.keys()
    for family, values in small.controls.items():
        np.testing.assert_allclose(ranked.controls[family], values)
    for family, values in small.reference.items():
        np.testing.assert_allclose(ranked.reference[family], values)


def test_more_documents_than_a_split_has_cannot_be_ranked() -> None:
    with pytest.raises(ValueError, match="at most its 5 documents, got 6"):
        measure_world(two_skills(), replace(SMALL, ranked=6))
