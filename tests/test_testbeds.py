"""Cheap testbeds give their words, and the known mistakes break the parts that are there for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from experiments.testbeds import harness
from experiments.testbeds.base import BedResult, BedSettings, Check
from experiments.testbeds.mistakes import MISTAKES, switched_in
from experiments.testbeds.paths import bed_t4, bed_t6
from experiments.testbeds.quadratic import bed_t2
from experiments.testbeds.scorecard import QUICK, release_gate

FEW = replace(QUICK, seeds=2, draws=60)
#: Mistake -> a part of the harness that must not hold once it is made.
CAUGHT: dict[str, Callable[[BedSettings], list[Check]]] = {
    "uncapped_shares": harness.caps,
    "group_level_cap": harness.caps,
    "unmatched_dose": harness.matched,
    "power_gate": harness.large_effects,
    "flipped_sign": harness.invariances,
}


@pytest.mark.parametrize("bed", [bed_t2, bed_t4, bed_t6])
def test_a_bed_gives_the_expected_words(bed: Callable[[BedSettings], list[BedResult]]) -> None:
    found = bed(FEW)
    assert [r.observed for r in found] == [r.expected for r in found]
    assert [check for r in found for check in r.checks if not check.passed] == []
    assert release_gate(found)


@cache
def holds(part: Callable[[BedSettings], list[Check]]) -> bool:
    return all(check.passed for check in part(FEW))


@pytest.mark.parametrize("mistake", CAUGHT)
def test_a_known_mistake_breaks_its_part(mistake: str) -> None:
    part = CAUGHT[mistake]
    assert holds(part)
    with switched_in(mistake):
        assert not all(check.passed for check in part(FEW))


def test_a_residual_by_subtraction_breaks_the_identities() -> None:
    with switched_in("residual_by_subtraction"):
        assert not all(check.passed for result in bed_t2(FEW) for check in result.checks)


def test_a_mistake_is_made_inside_the_block_alone() -> None:
    from interventions.causal import statistics

    right = statistics.capped
    with pytest.raises(ValueError, match="inside"), switched_in("uncapped_shares"):
        raise ValueError("inside" if statistics.capped is not right else "unchanged")
    assert statistics.capped is right
    with pytest.raises(ValueError, match="--break must be one of"), switched_in("nothing"):
        pass
    assert {bed for mistake in MISTAKES.values() for bed in mistake.beds} <= {"T1", "T2", "T7", "T8", "T10"}
