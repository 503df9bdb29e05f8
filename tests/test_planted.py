"""Testbeds: the landscape objective is the objective, beds pass, and known mistakes make them fail."""

import numpy as np
import pytest
import torch

from experiments import planted, planted_harness, planted_quadratic, planted_softmax
from experiments.mistakes import MISTAKES, switched_in
from experiments.planted_base import Landscape, LandscapeObjective, landscape_loss, sequences_of
from polca_edit.derivatives import Objective
from polca_edit.parameters import ParameterSpace


def test_landscape_objective_gives_the_same_numbers() -> None:
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 5, generator=g, dtype=torch.float64)

    def losses(theta: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return torch.sin(inputs.double() + matrix @ theta)

    module = Landscape(torch.zeros(5, dtype=torch.float64), losses)
    space = ParameterSpace.from_module(module)
    tokens = sequences_of(4, 3)
    theta, rows = torch.randn(5, generator=g, dtype=torch.float64), torch.eye(5, dtype=torch.float64)[:2]
    plain = Objective(module, space, landscape_loss, route="jvp")
    quick = LandscapeObjective(module, space, landscape_loss, route="jvp")
    torch.testing.assert_close(quick.losses(theta, tokens), plain.losses(theta, tokens))
    for mine, other in zip(
        quick.directional(theta, rows, tokens), plain.directional(theta, rows, tokens), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_coupled_quadratic_and_its_mistake() -> None:
    (right,) = planted_quadratic.bed_t2(planted.QUICK)
    assert right.passed, right.checks
    with switched_in("residual_by_subtraction"):
        (wrong,) = planted_quadratic.bed_t2(planted.QUICK)
    assert not wrong.passed


@pytest.mark.parametrize(
    ("mistake", "part"),
    [
        ("gradient_only_blocking", planted_harness._blocking),
        ("flipped_sign", planted_harness._invariances),
        ("uncapped_n", planted_harness._capped),
    ],
)
def test_harness_notices_known_mistakes(mistake: str, part) -> None:
    assert all(check.passed for check in part()), part()
    with switched_in(mistake):
        assert not all(check.passed for check in part())
    assert all(check.passed for check in part())


def test_circularity_null_holds_and_label_shuffle_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted_softmax, "DIRECTIONS", 30)
    settings = planted.PlanSettings(rotations=79)
    null, power = planted_softmax.bed_t7(settings)
    assert null.passed, null.checks
    assert power.passed, power.checks
    with switched_in("label_shuffle_null"):
        wrong, _ = planted_softmax.bed_t7(settings)
    assert not wrong.passed
    assert wrong.observed == "causal"


def test_every_mistake_names_a_bed_and_unknown_ones_are_refused() -> None:
    assert all(set(m.beds) <= set(planted.BEDS) and m.beds for m in MISTAKES.values())
    with pytest.raises(ValueError, match="--break must be one of"), switched_in("no such mistake"):
        pass


def test_release_gate_and_confusion() -> None:
    from experiments.planted_base import BedResult

    good = BedResult("T1", "x", "causal", "causal", gate="always_causal")
    false = BedResult("T3", "y", "observational_only", "causal", gate="never_causal")
    assert planted.release_gate([good])
    assert not planted.release_gate([good, false])
    assert planted.confusion([good, false]) == {"causal": {"causal": 1}, "observational_only": {"causal": 1}}


def test_remaining_parts_of_the_harness() -> None:
    for part in (
        planted_harness._matched,
        planted_harness._multiplicity,
        planted_harness._vanishing,
        planted_harness._polygenic,
    ):
        assert all(check.passed for check in part()), part()
    assert np.isfinite(planted_harness._gradient_only_drift())
