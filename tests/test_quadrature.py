"""Quadrature against polynomials, closed forms and a planted kink."""

import numpy as np
import pytest
import torch
from torch import nn

from polca_edit.allocation.adaptive import adaptive_plan
from polca_edit.allocation.allocate import allocate, project
from polca_edit.allocation.quadrature import fixed_plan, measure_nodes, unit_rule
from polca_edit.basis.record import random_basis, unlabelled
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet

torch.set_num_threads(1)
EXACT_DEGREE = {
    "trapezoid": 1,
    "trapezoid2": 1,
    "simpson": 3,
    "simpson2": 3,
    "gauss2": 3,
    "gauss3": 5,
    "gauss4": 7,
    "gauss5": 9,
}


class Powers(nn.Module):
    """loss(x) = sum_i x_i theta_i ** degree, and one steep step where asked."""

    def __init__(self, size: int, degree: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.degree = degree

    def forward(self, x):
        return x @ self.theta**self.degree


def _problem(degree, thetas, rows=6, seed=0):
    thetas = torch.as_tensor(thetas, dtype=torch.float64)
    module = Powers(thetas.shape[1], degree)
    space = ParameterSpace.from_module(module)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(rows, thetas.shape[1], generator=generator, dtype=torch.float64)
    tokens = TokenSet(inputs, torch.ones(rows, 1, dtype=torch.bool), torch.arange(rows))
    objective = Objective(module, lambda m, x: m(x)[:, None], space)
    return objective, open_checkpoints(thetas, space, steps=range(len(thetas))), tokens


@pytest.mark.parametrize("rule", list(EXACT_DEGREE))
def test_rules_are_exact_to_their_degree_and_not_beyond(rule):
    (start, end), inner = unit_rule(rule)
    degree = EXACT_DEGREE[rule]

    def integral(power):
        return start * 0.0**power + end + sum(w * p**power for p, w in inner)

    for power in range(degree + 1):
        assert integral(power) == pytest.approx(1 / (power + 1), abs=1e-14)
    assert abs(integral(degree + 1) - 1 / (degree + 2)) > 1e-6


@pytest.mark.parametrize(("rule", "degree"), [("simpson", 4), ("gauss2", 4), ("gauss3", 6)])
def test_allocation_of_each_vector_is_exact_for_polynomials(rule, degree):
    # In coordinate axes the integral of degree * theta^(degree-1) over an interval is the exact
    # difference of theta^degree: a per-vector oracle, not only a completeness check.
    thetas = np.random.default_rng(0).normal(size=(4, 3))
    objective, checkpoints, tokens = _problem(degree, thetas)
    basis = unlabelled("axes", torch.eye(3, dtype=torch.float64)[:2])
    plan = fixed_plan(rule, 3)
    ends = project(objective, checkpoints, [basis], tokens)
    filled = measure_nodes(objective, checkpoints, [basis], tokens, plan, ends)
    allocation = allocate(filled[0], "quadrature")
    change = torch.as_tensor(thetas**degree).diff(dim=0)
    expected = change[:, :2, None] * tokens.inputs.T[None, :2]
    torch.testing.assert_close(allocation.values, expected, atol=1e-12, rtol=1e-10)
    assert float(allocation.quadrature_error.abs().max()) < 1e-12
    trapezoid = allocate(filled[0], "trapezoid")
    assert float(trapezoid.quadrature_error.abs().max()) > 1e-3


def test_adaptive_splits_only_where_it_must_and_meets_its_tolerance():
    # Interval 1 is strongly curved (theta^12), the others are straight in the loss.
    thetas = np.array([[0.0, 0.0], [0.05, 0.0], [1.0, 0.0], [1.0, 0.1]])
    objective, checkpoints, tokens = _problem(12, thetas)
    groups = {"first": torch.arange(6) < 3, "empty": torch.zeros(6, dtype=torch.bool)}
    plan, report = adaptive_plan(objective, checkpoints, tokens, groups, floor=1e-6, max_depth=6)
    assert report.met
    assert report.unresolved == ()
    assert report.nodes[0] == report.nodes[2] == 0
    assert report.nodes[1] >= 3
    basis = random_basis(2, 1, torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = project(objective, checkpoints, [basis], tokens)
    filled = measure_nodes(objective, checkpoints, [basis], tokens, plan, ends)
    totals = allocate(filled[0], "quadrature").totals()
    assert abs(totals["quadrature_error"]) <= 0.01 * abs(totals["exact"])
    assert totals["quadrature_error"] == pytest.approx(report.group_error["mean"][0], abs=1e-12)
    coarse = allocate(filled[0], "trapezoid").totals()
    assert abs(coarse["quadrature_error"]) > 0.1 * abs(coarse["exact"])


def test_unresolved_intervals_are_named():
    thetas = np.array([[0.0], [0.02], [1.0]])
    objective, checkpoints, tokens = _problem(40, thetas)
    _, report = adaptive_plan(objective, checkpoints, tokens, {}, tolerance=1e-6, floor=1e-9, max_depth=1)
    assert not report.met
    assert report.unresolved == (1,)


def test_wrong_derivative_is_not_resolved_by_splitting():
    thetas = np.array([[0.2], [0.6], [1.0]])
    objective, checkpoints, tokens = _problem(2, thetas)

    class Halved(Objective):
        def directional(self, *args, **kwargs):
            losses, slopes = super().directional(*args, **kwargs)
            return losses, slopes / 2

    wrong = Halved(objective.module, objective.token_loss, objective.space)
    _, report = adaptive_plan(wrong, checkpoints, tokens, {}, max_depth=3)
    assert not report.met
    assert len(report.unresolved) == 2
