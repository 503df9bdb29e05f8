"""Entries of a few tensors: stored alone, differentiated alone, and the same numbers as whole vectors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from oracles import copied_with, curved_series, mean_loss, own_parameters, text_tokens, tiny_gpt2
from torch import Tensor, nn
from typer.testing import CliRunner

from experiments.cli import app
from experiments.run.cost.gauge import gauge_table, gauges
from experiments.verbs.subsets import patterns_of
from interventions.damage import EvaluatedSplit
from interventions.edits import project_out
from polca_edit.allocation.allocate import project
from polca_edit.allocation.directions import directions_at
from polca_edit.artifacts import load_record, save_record
from polca_edit.basis.hessian import EigenSettings, hessian_basis
from polca_edit.basis.path import trajectory_basis
from polca_edit.basis.record import Basis, capture, random_basis, unlabelled
from polca_edit.basis.sketch import norm_share
from polca_edit.basis.subsets import Chosen, Directions, Group, Subset, blocks_of
from polca_edit.checkpoints.files import write_tensors
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.models import TransformerShape, build_small_transformer
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet, next_token_loss

ROUTES = ("adjoint", "traced", "jvp", "double_backward")
#: Whole tensors, one tensor, and entries that cut through tensors.
SUBSETS = {
    "mlp": lambda space: Subset.of_mask(space.mask(["*.1.mlp*"])),
    "tied": lambda space: Subset.of_mask(space.mask(["*wte*"])),
    "every third": lambda space: Subset.of_mask(torch.arange(space.size) % 3 == 0),
}


@pytest.fixture(scope="module")
def language() -> tuple[Objective, TokenSet, Checkpoints]:
    """A tied model in float64, few scored tokens of unequal number, four places on a walk."""
    model, draw = tiny_gpt2(layers=2).double(), torch.Generator().manual_seed(5)
    tokens = text_tokens(draw)
    objective = Objective(model, next_token_loss, batch_size=3, route="jvp")
    start = objective.space.read(model)
    steps = 0.05 * torch.randn(4, len(start), generator=draw, dtype=torch.float64)
    return objective, tokens, open_checkpoints(start + steps.cumsum(0), objective.space, steps=[0, 1, 2, 3])


def rerouted(objective: Objective, route: str) -> Objective:
    return Objective(objective.module, next_token_loss, objective.space, batch_size=3, route=route)


def test_sets_of_entries_are_sets(generator):
    for _ in range(20):
        first, second = torch.rand(2, 40, generator=generator) < torch.rand(2, 1, generator=generator)
        one, other, flat = Subset.of_mask(first), Subset.of_mask(second), torch.arange(40)
        assert torch.equal(one.mask(), first)
        assert Subset.of_tensor(40, one.tensor()) == one
        both = one.common(other)
        assert both == Subset.of_mask(first & second)
        assert torch.equal(one.take(flat), flat[first])
        assert torch.equal(both.take(one.take(flat), one), flat[first & second])
        assert torch.equal(one.spread(one.take(flat.double())), flat * first.double())
    for wrong in ([[3, 2]], [[0, 2], [1, 4]], [[0, 41]]):
        with pytest.raises(ValueError, match="must ascend within 40"):
            Subset.of_tensor(40, torch.tensor(wrong))


def test_blocks_of_whole_tensors_hold_every_entry_once():
    space = ParameterSpace(("a", "b", "c", "d"), ((4,), (9,), (1,), (2,)), ())
    found = [block.ranges[0] for block in blocks_of(space, 5) if block is not None]
    assert found == [(0, 4), (4, 13), (13, 16)]  # b is larger than a block
    with pytest.raises(ValueError, match="at least 1"):
        blocks_of(space, 0)


@pytest.mark.parametrize("name", SUBSETS)
def test_tangents_are_pieces_of_the_whole_vector(name, language, generator):
    space = language[0].space
    subset = SUBSETS[name](space)
    entries = torch.randn(2, subset.count, generator=generator)
    chosen, whole = Chosen(space, subset), space.unflatten(subset.spread(entries))
    assert chosen.names == [n for n, value in whole.items() if bool(value.any())]
    tangents = chosen.tangents(entries)
    for found, tensor in zip(chosen.names, tangents, strict=True):
        assert torch.equal(tensor, whole[found])
    flat = torch.cat([tensor[0].reshape(-1) for tensor in tangents])
    assert torch.equal(chosen.entries(flat), entries[0])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", SUBSETS)
def test_slopes_of_groups_are_those_of_whole_rows(name, route, language, generator):
    objective, tokens, series = language
    loss, subset = rerouted(objective, route), SUBSETS[name](objective.space)
    inner = torch.randn(2, subset.count, generator=generator, dtype=torch.float64)
    outer = torch.randn(1, subset.size, generator=generator, dtype=torch.float64)
    mixed = Directions(3, (Group(subset, (0, 2), inner), Group(None, (1,), outer)))
    whole = torch.stack([subset.spread(inner[0]), outer[0], subset.spread(inner[1])])
    losses, expected = objective.directional(series[1], whole, tokens)
    for given, wanted in ((mixed, expected), (Directions.of(inner, subset), expected[[0, 2]])):
        found = loss.directional(series[1], given, tokens)
        assert loss.route_used == route
        torch.testing.assert_close(found[0], losses, rtol=1e-12, atol=0)
        torch.testing.assert_close(found[1], wanted, rtol=1e-9, atol=1e-12)


class Closed(torch.autograd.Function):
    """Identity that cannot be differentiated."""

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        raise AssertionError("a tensor outside the subset was differentiated")

    @staticmethod
    def jvp(ctx: object, *tangents: Tensor) -> Tensor:
        raise AssertionError("a tensor outside the subset was moved")


class Barred(nn.Module):
    """Two layers, of which the first is behind a bar."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, Closed.apply(self.first.weight), self.first.bias.detach())
        return self.second(torch.tanh(hidden)).square()


@pytest.mark.parametrize("route", ["jvp", "double_backward"])
def test_tensors_outside_are_not_differentiated(route, generator):
    module = Barred()
    loss = Objective(module, lambda m, x: m(x).sum(-1), route=route)
    inputs = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
    tokens = TokenSet(inputs, torch.ones(4, 2, dtype=torch.bool), torch.arange(4))
    theta, subset = loss.space.read(module), Subset.of_mask(loss.space.mask(["second.*"]))
    rows = torch.randn(2, subset.count, generator=generator, dtype=torch.float64)
    slopes = loss.directional(theta, Directions.of(rows, subset), tokens)[1]
    gradient = loss.mean_gradient(theta, tokens, inside=subset)[1]
    torch.testing.assert_close(slopes.mean(1), rows @ gradient, rtol=1e-12, atol=1e-13)
    curved = loss.hessian(theta, tokens, inside=subset)(rows[0])
    assert curved.shape == (subset.count,)
    with pytest.raises(AssertionError, match="outside the subset"):
        loss.directional(theta, subset.spread(rows) + 1, tokens)


def dense_within(objective: Objective, theta: Tensor, tokens: TokenSet, mask: Tensor) -> Tensor:
    """Hessian of the mean loss between some entries, row by row on a copy of the module."""
    module = copied_with(objective.module, theta)
    parameters = own_parameters(module)
    loss = mean_loss(next_token_loss, tokens)(module)
    first = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = []
    for entry in first[mask]:
        second = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in second])[mask])
    return torch.stack(rows)


def test_eigenpairs_slopes_and_damage_are_those_of_whole_rows(language):
    objective, tokens, series = language
    mask = objective.space.mask(["*.1.mlp.c_proj*"])
    settings = EigenSettings(2, 1e-9, 80, mask=mask)
    last = series.subset([0, 3])
    found = hessian_basis(objective, last, tokens, 2, settings)
    values, vectors = torch.linalg.eigh(dense_within(objective, series[3], tokens, mask))
    torch.testing.assert_close(found.eigenvalues, values.flip(0)[:2], rtol=1e-9, atol=0)
    overlap = found.entries @ vectors.flip(1)[:, :2]
    torch.testing.assert_close(overlap.abs(), torch.eye(2).double(), rtol=0, atol=1e-6)
    whole = unlabelled("whole", found.rows)
    assert found.entries.shape[1] == int(mask.sum()) < whole.rows.shape[1] // 4
    assert capture(found, series) == pytest.approx(capture(whole, series), rel=1e-12)
    mine, theirs = project(objective, series, [found, whole], tokens)
    for name in ("gradients", "displacements", "residual_start", "residual_end", "residual_norms"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-9, atol=1e-12)
    split = EvaluatedSplit(objective, series, tokens)
    damages = [split.damage(project_out(split, basis)).change for basis in (found, whole)]
    assert torch.equal(*damages)


def test_files_hold_the_entries_alone(language, tmp_path):
    _, _, series = language
    mask = series.space.mask(["*.1.mlp*"])
    share = float(mask.double().mean())
    found, whole = trajectory_basis(series, 3, mask=mask), trajectory_basis(series, 3)
    sizes = []
    for basis in (found, whole):
        path = tmp_path / f"{len(sizes)}.safetensors"
        save_record(path, basis)
        sizes.append(path.stat().st_size)
        back = load_record(Basis, path)
        assert torch.equal(back.rows, basis.rows)
        assert back.inside == basis.inside
    assert sizes[0] < (share + 0.05) * sizes[1]
    assert torch.equal(found[1].rows, found.rows[1:2])
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    torch.testing.assert_close(found.rotated(turn, "turned").rows, turn.T @ found.rows)
    broken = replace(found, ranges=torch.tensor([[0, 5]]))
    with pytest.raises(ValueError, match="5 entries a row"):
        broken.rows  # noqa: B018


def test_files_of_whole_rows_of_earlier_versions_are_read(tmp_path):
    basis = random_basis(12, 2, torch.Generator().manual_seed(0))
    plain = '{"kind": "random", "supervised": false, "products": 0, "coefficients": null}'
    named = {"rows": basis.rows, "origins": basis.origins}
    named |= {"eigenvalues": basis.eigenvalues, "residuals": basis.residuals}
    write_tensors(tmp_path / "old.safetensors", named, {"record": "Basis", "fields": plain})
    back = load_record(Basis, tmp_path / "old.safetensors")
    assert torch.equal(back.rows, basis.rows)
    assert back.inside is None


def test_gauge_of_parts_adds_up_to_the_whole():
    """Shares of movement, and what the trapezoid rule explains, are sums over parameters."""
    objective, series, tokens = curved_series()
    first = Subset.of_mask(series.space.mask(["first.*"]))
    second = Subset.of_mask(series.space.mask(["second.*"]))
    mine, theirs, whole = gauges(objective, series, tokens, {"a": first, "b": second, "all": None})
    assert (mine.weights, mine.row_bytes) == (first.count, 4 * first.count)
    assert mine.moved_net + theirs.moved_net == pytest.approx(whole.moved_net) == pytest.approx(1)
    assert mine.moved_path + theirs.moved_path == pytest.approx(1)
    moved = (series[7] - series[0]).double()
    assert mine.moved_net == pytest.approx(float(moved[first.mask()].square().sum() / moved.square().sum()))
    losses = [float(objective.losses(series[i], tokens).double().mean()) for i in (0, 7)]
    assert whole.exact == pytest.approx(losses[1] - losses[0], abs=1e-6)
    assert mine.explained + theirs.explained == pytest.approx(whole.explained, rel=1e-6)
    slopes = [objective.token_gradients(series[i], tokens).double().mean(0) for i in range(8)]
    steps = [(series[i + 1] - series[i]).double() * first.mask() for i in range(7)]
    trapezoid = sum(float((slopes[i] + slopes[i + 1]) / 2 @ step) for i, step in enumerate(steps))
    assert mine.explained == pytest.approx(trapezoid, rel=1e-4)
    assert whole.explained_share == pytest.approx(whole.explained / whole.exact)
    assert min(each.product_seconds for each in (mine, theirs, whole)) > 0
    assert len(gauge_table([mine, whole]).markdown().splitlines()) > 2


def test_sketched_curvature_of_parts_is_that_of_the_dense_hessian():
    objective, series, tokens = curved_series()
    first, held = Subset.of_mask(series.space.mask(["first.*"])), []
    product = objective.hessian(series[7], tokens)
    dense = torch.stack([product(row) for row in torch.eye(series.space.size)]).double()
    inside = first.mask()
    true = float(dense[inside][:, inside].square().sum() / dense.square().sum())
    for seed in range(12):
        named = {"a": first, "all": None}
        mine, whole = gauges(objective, series, tokens, named, probes=16, seed=seed)
        value, half = norm_share(mine.curvature, whole.curvature)
        held.append(abs(value - true) <= half)
        assert half < 0.5 * true
    assert sum(held) >= 9
    assert "±" in gauge_table([mine, whole]).markdown()


def test_a_layer_is_not_a_numbered_part_of_another_one():
    """The MLP of the small transformer is numbered inside: blocks.1.mlp.0 is no part of layer 0."""
    space = ParameterSpace.from_module(build_small_transformer(TransformerShape(3, 8, 2, 16, 13, 8), 1))
    for layer in (0, 2):
        chosen = Chosen(space, Subset.of_mask(space.mask(patterns_of(str(layer), None)))).names
        assert chosen == [name for name in space.names if name.startswith(f"blocks.{layer}.")]


def test_gauge_of_a_run_prints_shares_beside_prices(smoke_run):
    runner = CliRunner()
    found = runner.invoke(app, ["study", "gauge", str(smoke_run), "--parameters", "*mlp*", "--json", "-"])
    assert found.exit_code == 0, found.output
    mine, whole = json.loads(found.stdout)["gauges"]
    assert 0 < mine["moved_net"] < whole["moved_net"] == pytest.approx(1)
    assert whole["explained_share"] == pytest.approx(1, abs=0.2)
    assert mine["row_bytes"] < whole["row_bytes"]
    assert whole["curvature"] is None
    refused = runner.invoke(app, ["study", "gauge", str(smoke_run)])
    assert refused.exit_code != 0
    one = runner.invoke(app, ["study", "gauge", str(smoke_run), "--parameters", "*mlp*", "--sketch", "1"])
    assert one.exit_code != 0


def test_a_block_without_coordinates_is_refused():
    """The part of the rows that a worker holds would give other residuals."""
    _, series, _ = curved_series()
    block = Subset(series.space.size, ((0, 200),))
    with pytest.raises(ValueError, match="need the coordinates"):
        directions_at(series, [trajectory_basis(series, 2)], 1, block=block)
