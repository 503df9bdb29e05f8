"""Rule ``simpson``: closed forms of polynomials, the order of its error, and a run with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.config import load_config, parse_config
from experiments.run.cost import plan as planning
from experiments.run.cost.sizes import sizes_of
from experiments.run.driver import run_stages
from experiments.run.run import open_run
from experiments.run.stages.clusters import load_observation
from polca_edit.allocation.allocate import allocate, project
from polca_edit.allocation.quadrature import fixed_plan, measure_nodes
from polca_edit.allocation.terms import project_for
from polca_edit.basis.record import random_basis, unlabelled
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.observation import ObserveSettings, observe
from polca_edit.tokens import TokenSet

DOUBLE = torch.float64


class Powers(nn.Module):
    """loss(x) = sum_i x_i theta_i ** degree."""

    def __init__(self, size: int, degree: int) -> None:
        super().__init__()
        self.theta, self.degree = nn.Parameter(torch.zeros(size, dtype=DOUBLE)), degree

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.theta**self.degree)[:, None]


def problem(degree: int, thetas: np.ndarray) -> tuple[Objective, Checkpoints, TokenSet]:
    weights = torch.as_tensor(thetas, dtype=DOUBLE)
    module = Powers(weights.shape[1], degree)
    inputs = torch.rand(5, weights.shape[1], generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    tokens = TokenSet(inputs, torch.ones(5, 1, dtype=torch.bool), torch.arange(5))
    objective = Objective(module, lambda m, x: m(x), route="jvp")
    return objective, open_checkpoints(weights, module, steps=range(0, 3 * len(thetas), 3)), tokens


@pytest.mark.parametrize("count", [4, 5], ids=["three intervals", "four intervals"])
def test_quartic_losses_are_shared_out_exactly_in_any_window(count: int) -> None:
    # Along the axes the part of each vector is the exact difference of theta ** 4, whether T is odd or even.
    thetas = np.random.default_rng(0).normal(size=(count, 3))
    objective, series, tokens = problem(4, thetas)
    basis = unlabelled("axes", torch.eye(3, dtype=DOUBLE)[:2])
    (found,) = project_for("simpson", objective, series, [basis], tokens)
    allocation = allocate(found, "simpson")
    change = torch.as_tensor(thetas**4).diff(dim=0)[:, :, None] * tokens.inputs.T
    torch.testing.assert_close(allocation.values, change[:, :2], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(allocation.residual, change[:, 2], atol=1e-12, rtol=1e-10)
    assert allocation.rule == "simpson"
    assert float(allocate(found, "trapezoid").quadrature_error.abs().max()) > 1e-2


def test_halved_places_give_what_interior_nodes_give() -> None:
    objective, series, tokens = problem(7, np.random.default_rng(1).normal(size=(4, 6)))
    bases = [random_basis(6, k, torch.Generator().manual_seed(k), dtype=DOUBLE) for k in (1, 3)]
    found = project_for("simpson", objective, series, bases, tokens)
    ends = project(objective, series, bases, tokens)
    nodes = measure_nodes(objective, series, bases, tokens, fixed_plan("simpson", 3), ends)
    for own, other in zip(found, nodes, strict=True):
        one, two = allocate(own, "simpson"), allocate(other, "quadrature")
        torch.testing.assert_close(one.values, two.values, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(one.residual, two.residual, atol=1e-10, rtol=1e-10)
        assert own.steps.tolist() == [0, 3, 6, 9]


@pytest.mark.parametrize(("rule", "order"), [("trapezoid", 2), ("simpson", 4)])
def test_order_of_the_error(rule: str, order: int) -> None:
    """Half the spacing, a fourth of the trapezoid's error and a sixteenth of Simpson's (theta ** 6)."""
    errors = []
    for intervals in (8, 16, 32):
        way = np.linspace(0.5, 1.5, intervals + 1)
        objective, series, tokens = problem(6, np.stack([way, way], axis=1))
        basis = unlabelled("axes", torch.eye(2, dtype=DOUBLE))
        seen = allocate(project_for(rule, objective, series, [basis], tokens)[0], rule)
        errors.append(float(seen.quadrature_error.sum(0).abs().mean()))
    orders = [np.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert orders == pytest.approx([order, order], abs=0.05)


def test_projections_without_middles_are_refused() -> None:
    objective, series, tokens = problem(4, np.random.default_rng(0).normal(size=(4, 3)))
    basis = unlabelled("axes", torch.eye(3, dtype=DOUBLE)[:2])
    ends = project(objective, series, [basis], tokens)
    with pytest.raises(ValueError, match=r"middle of every interval.*use rule 'trapezoid'"):
        allocate(ends[0], "simpson")
    other = measure_nodes(objective, series, [basis], tokens, fixed_plan("gauss2", 3), ends)
    with pytest.raises(ValueError, match="middle of every interval"):
        allocate(other[0], "simpson")
    (found,) = project_for("simpson", objective, series, [basis], tokens)
    with pytest.raises(ValueError, match="middle of every interval"):
        allocate(replace(found, interior_interval=torch.tensor([0, 2, 1])), "simpson")


def test_observe_takes_the_rule() -> None:
    objective, series, tokens = problem(4, np.random.default_rng(0).normal(size=(4, 3)))
    basis = unlabelled("axes", torch.eye(3, dtype=DOUBLE)[:2])
    seen = observe(objective, series, basis, tokens, ObserveSettings(rule="simpson"))
    assert float(seen.allocation.quadrature_error.abs().max()) < 1e-12


def test_a_plan_advises_rules_that_a_run_accepts() -> None:
    # 5e-3 x 2 lies between the bounds of the two rules; 5e-3 x 6 above both.
    training = {"steps": 60, "learning_rate": 5e-3, "record_every": 2}
    config = parse_config({"task": "arithmetic", "training": training})
    (warning,) = planning.gap_warnings(config, [])
    assert warning.endswith("or rule to simpson")
    followed = parse_config({"task": "arithmetic", "training": training, "rule": "simpson"})
    assert planning.gap_warnings(followed, []) == []
    wide = parse_config({"training": {**training, "record_every": 6}, "rule": "simpson"})
    (warning,) = planning.gap_warnings(wide, [])
    assert "set training.record_every to 3 or less" in warning
    assert "rule 'simpson' misses" in warning
    narrower = parse_config({"training": {**training, "record_every": 3}, "rule": "simpson"})
    assert planning.gap_warnings(narrower, []) == []


def test_a_run_takes_the_rule_and_the_plan_counts_its_places(smoke_copy: Path) -> None:
    """On the weights of the finished run: the error falls to a fifth at most, and nothing is trained anew."""
    before = load_observation(
        open_run(load_config(smoke_copy / "config.yaml"), smoke_copy, print), "trajectory"
    )
    said: list[str] = []
    bases = [{"kind": "trajectory", "vectors": 3}]
    config = load_config(smoke_copy / "config.yaml", {"rule": "simpson", "bases": bases})
    run = open_run(config, smoke_copy, said.append)
    run_stages(run, stages=["train", "basis:trajectory", "projections", "clusters:trajectory"])
    assert [line.split()[0] for line in said if "kept" in line] == ["train", "basis:trajectory"]
    seen = load_observation(run, "trajectory")
    assert seen.allocation.rule == "simpson"
    after_error, before_error = (
        float(found.allocation.quadrature_error.sum(0).abs().mean()) for found in (seen, before)
    )
    assert after_error < before_error / 5
    assert torch.equal(seen.allocation.exact, before.allocation.exact)
    sizes = sizes_of(run.task, config, seen.projections.steps.tolist())
    assert sizes.places == 2 * len(seen.projections.steps) - 1
    recorded = run.directory.record("projections").passes["forward"]
    assert recorded == sizes.places * sizes.select
