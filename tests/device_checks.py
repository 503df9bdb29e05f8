"""The device paths, on a device that refuses to meet CPU tensors (tests/elsewhere.py).

Results are compared bit by bit: the device computes as the CPU does, so only a wrong place can differ.
"""

from __future__ import annotations

import copy

import elsewhere
import pytest
import torch
from oracles import curved_series, with_spectrum
from torch import Tensor, nn

from interventions.damage import EvaluatedSplit
from interventions.edits import project_out
from interventions.removal.grouped import GroupedSplit, Predictor
from interventions.removal.problem import RemovalProblem
from interventions.removal.undo import UNDO_LIMITS, repaired
from polca_edit.allocation.allocate import project
from polca_edit.basis.hessian import EigenSettings, hessian_basis
from polca_edit.basis.operators import fisher_basis
from polca_edit.basis.path import trajectory_basis
from polca_edit.basis.subsets import Directions, Group, Subset
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import LanczosSettings, projected_lanczos
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet
from polca_edit.training import TrainingSettings
from tests.test_removal import TwoTables, answers_of, table_logits, table_loss, tokens_of
from tests.test_undo import LEARNED, RULE, batch

ROUTES = ("adjoint", "traced", "jvp", "double_backward")


def moved(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to(elsewhere.device())


def both(route: str = "jvp") -> tuple[Objective, Objective, Checkpoints, TokenSet]:
    """The same loss on the CPU and on the device; weights and tokens are the caller's, on the CPU."""
    objective, series, tokens = curved_series()
    here, there = (
        Objective(module, objective.token_loss, objective.space, batch_size=4, route=route)
        for module in (objective.module, moved(objective.module))
    )
    assert there.device.type == elsewhere.NAME
    return here, there, series.subset(range(4)), tokens


def test_the_device_refuses_what_a_gpu_refuses():
    device = elsewhere.device()
    there = torch.arange(6.0).reshape(2, 3).to(device)
    assert float((there * 2 + torch.tensor(1.0)).sum()) == 36
    assert torch.equal(
        (there[torch.tensor([1])] + torch.ones(3, device=device)).cpu()[0], torch.tensor([4.0, 5, 6])
    )
    for wrong in (
        lambda: there + torch.zeros(3),
        lambda: torch.zeros(2, 2) @ there,
        lambda: torch.cat([there, torch.zeros(2, 3)]),
        lambda: torch.zeros(2, 3)[there.long()],
        lambda: torch.where(torch.ones(2, 3, dtype=torch.bool), there, there),
        lambda: torch.zeros(3).add_(there[0]),
        lambda: nn.functional.linear(there, torch.zeros(4, 3)),
    ):
        with pytest.raises(RuntimeError, match="on one device"):
            wrong()
    with pytest.raises((RuntimeError, TypeError, NotImplementedError, ValueError)):
        there.numpy()


@pytest.mark.parametrize("route", ROUTES)
def test_losses_slopes_gradients_and_products(route):
    here, there, series, tokens = both(route)
    theta, inside = series[1], Subset.of_mask(series.space.mask(["second.*"]))
    rows = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(0))
    mixed = Directions(3, (Group(inside, (0, 2), inside.take(rows[:2])), Group(None, (1,), rows[2:])))
    for take in (
        lambda loss: loss.losses(theta, tokens),
        lambda loss: loss.directional(theta, rows, tokens)[1],
        lambda loss: loss.directional(theta, mixed, tokens)[1],
        lambda loss: loss.mean_gradient(theta, tokens, inside=inside)[1],
        lambda loss: loss.hessian(theta, tokens)(rows[0]),
    ):
        expected, found = take(here), take(there)
        assert found.device.type == "cpu"
        assert torch.equal(found, expected)
    assert here.route_used == there.route_used == route


def test_lanczos_on_the_device(generator):
    matrix, _ = with_spectrum([9.0, 7.5, 5.0, *torch.linspace(1.0, -1.0, 27).tolist()], generator)
    rows = torch.linalg.qr(torch.randn(30, 2, generator=generator, dtype=torch.float64))[0].T
    start = torch.randn(1, 30, generator=generator, dtype=torch.float64)
    found = []
    for device in (torch.device("cpu"), elsewhere.device()):
        operator, draw = matrix.to(device), torch.Generator().manual_seed(0)
        found.append(
            projected_lanczos(
                lambda v, operator=operator: operator @ v,
                torch.zeros(30, dtype=torch.float64, device=device),
                2,
                draw,
                LanczosSettings(1e-6, following=1),
                rows=rows.to(device).contiguous(),
                start=start.to(device),
            )
        )
    assert found[1].vectors.device.type == elsewhere.NAME
    torch.testing.assert_close(found[0].values, found[1].values, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0].vectors, found[1].vectors.cpu(), rtol=0, atol=1e-9)
    assert found[0].products == found[1].products


def test_bases_projections_and_damage():
    here, there, series, tokens = both()
    few = EigenSettings(1, 1e-2, 3)
    found = []
    for loss in (here, there):
        bases = [
            hessian_basis(loss, series, tokens, 2, few),
            trajectory_basis(series, 2, mask=series.space.mask(["first.*"])),
            fisher_basis(loss, series.subset([1]), tokens, few),
        ]
        projections = project(loss, series, bases, tokens)
        split = EvaluatedSplit(loss, series, tokens)
        damage = split.damage(project_out(split, bases[0]))
        found.append([*(b.rows for b in bases), *(p.gradients for p in projections), damage.change])
    for expected, result in zip(*found, strict=True):
        assert result.device.type == "cpu"
        assert torch.equal(result, expected)


def test_a_step_of_repair():
    """The loop of tests/test_undo.py on the device: the same weights, the same shares."""
    right, found = nn.functional.one_hot(answers_of(torch.arange(10)), 4).float(), []
    settings = TrainingSettings(2, 0.1, weight_decay=0.0, warmup=0)
    space = Objective(TwoTables(), table_loss).space
    tables = {s: {"first": a * right[:5], "second": b * right[5:]} for s, (a, b) in LEARNED.items()}
    series = open_checkpoints({s: space.flatten(t) for s, t in tables.items()}, space)
    for module in (TwoTables(), moved(TwoTables())):
        loss = Objective(module, table_loss, space)
        split = EvaluatedSplit(loss, series, tokens_of(torch.arange(10).repeat(3)))
        grouped = GroupedSplit(split, Predictor(loss, table_logits), RULE)
        found.append(repaired(RemovalProblem(grouped, batch, UNDO_LIMITS), series[1], settings, every=1))
    assert found[0].steps == found[1].steps > 0
    torch.testing.assert_close(found[0].theta, found[1].theta, rtol=0, atol=1e-6)
    assert found[0].shares.target == pytest.approx(found[1].shares.target, abs=1e-6)


def test_a_tensor_made_in_the_wrong_place_is_found(monkeypatch):
    """The guard can fail: without the one line that moves tensors, and with a loss that makes its own."""
    _, there, series, tokens = both()
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "placed", lambda self, tensor, dtype=None: tensor.to(dtype or tensor.dtype))
        with pytest.raises(RuntimeError, match="on one device"):
            there.losses(series[0], tokens)

    def careless(module: nn.Module, inputs: Tensor) -> Tensor:
        found = module(inputs[..., :8]).square().sum(-1)
        return found + torch.zeros(found.shape)

    loss = Objective(there.module, careless, there.space, batch_size=4, route="jvp")
    with pytest.raises(RuntimeError, match="on one device"):
        loss.losses(series[0], tokens)
