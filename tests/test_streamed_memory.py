"""Vectors of N entries that are alive at once, counted by torch's own allocator record at three sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from polca_edit.allocation.allocate import directions_at
from polca_edit.basis import streamed
from polca_edit.basis.hessian import BasisCheckpoint, EigenSettings, Keeping, next_vectors, operator_basis
from polca_edit.basis.path import trajectory_basis
from polca_edit.basis.record import Basis
from polca_edit.basis.streamed import HELD, displacement_gram
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import LanczosSettings, orthonormalise, projected_lanczos
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet

SIZES = (50_000, 100_000, 200_000)


@pytest.fixture(autouse=True)
def narrow_blocks(monkeypatch):
    """Blocks of columns do not grow with N; at these small sizes they must be narrow to count as little."""
    monkeypatch.setattr(streamed, "WIDTH", 4096)
    monkeypatch.setattr(streamed, "PRODUCT_ENTRIES", 4096)


def peak_vectors(work: Callable[[], object], size: int) -> float:
    """The largest sum of allocated minus freed bytes while working, in vectors of ``size`` float32."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = work()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return peak / (4 * size)


def in_file(path: Path, rows: int, width: int) -> Tensor:
    """A mapped table; numpy's, because torch's own counts as an allocation in its record."""
    return torch.from_numpy(np.memmap(path, dtype=np.float32, mode="w+", shape=(rows, width)))


def walk(size: int, count: int) -> Checkpoints:
    """A series that is drawn anew at every read, as if it lay on disk."""
    space = ParameterSpace(("w",), ((size,),), (("w", "w"),))

    def read(index: int) -> dict[str, Tensor]:
        return {"w": torch.empty(size).normal_(generator=torch.Generator().manual_seed(index))}

    return Checkpoints(space, tuple(range(count)), read)


def test_the_counter_counts():
    size = SIZES[0]
    assert peak_vectors(lambda: [torch.empty(size) for _ in range(5)], size) == pytest.approx(5, abs=0.01)
    assert peak_vectors(lambda: [torch.empty(size).sum() for _ in range(5)], size) == pytest.approx(
        1, abs=0.01
    )


@pytest.mark.parametrize("size", SIZES)
def test_a_trajectory_basis_holds_its_rows_and_a_few_displacements(size):
    found = {t: peak_vectors(lambda t=t: trajectory_basis(walk(size, t), 3), size) for t in (6, 12)}
    # Three rows, the held displacements, three cached checkpoints, the start, and what a read makes.
    assert max(found.values()) < 3 + HELD + 3 + 5, found
    assert abs(found[12] - found[6]) < 1.1, found  # not one more per checkpoint


def test_three_checkpoints_are_kept_and_a_fourth_takes_the_place_of_one():
    size = SIZES[0]

    def through() -> Checkpoints:
        series = walk(size, 6)
        for index in range(6):
            series[index]
        return series

    assert 3 < peak_vectors(through, size) < 4.1  # two kept, what is read, and its flat copy


def test_streamed_gram_and_coefficients_against_all_displacements_at_once():
    series = walk(5000, 11)
    moved = torch.stack([series[t] - series[0] for t in range(1, 11)]).double()
    for held in (1, 3, 20):
        torch.testing.assert_close(
            displacement_gram(series, None, held), moved @ moved.T, rtol=1e-9, atol=1e-6
        )
    mask = torch.arange(5000) % 3 == 0
    for chosen in (None, mask):
        basis = trajectory_basis(series, 4, mask=chosen)
        assert basis.coefficients is not None
        assert basis.coefficients.shape == (4, 10)
        rows = basis.coefficients.float() @ (moved if chosen is None else moved * chosen).float()
        torch.testing.assert_close(rows, basis.rows, rtol=0, atol=2e-6)
        assert torch.equal(basis[1:3].coefficients, basis.coefficients[1:3])


@pytest.mark.parametrize("size", SIZES)
def test_rows_of_bases_are_taken_where_they_lie_and_residuals_alone_are_made(size):
    series = walk(size, 5)
    basis, other = trajectory_basis(series, 4), trajectory_basis(series, 3)
    theta, found = directions_at(series, [basis, other], 2)
    rows = found.whole(size)
    assert torch.equal(rows[:4], basis.rows)
    assert torch.equal(rows[6:9], other.rows)
    assert torch.equal(rows[5], basis.remainder(series[3] - series[2]))
    for first in range(0, 11, 3):
        part = directions_at(series, [basis, other], 2, range(first, min(11, first + 3)))[1]
        assert torch.equal(part.whole(size), rows[first : first + 3])
    own = {group.rows.untyped_storage().data_ptr() for group in found.groups}
    assert {basis.entries.untyped_storage().data_ptr(), other.entries.untyped_storage().data_ptr()} < own
    assert peak_vectors(lambda: directions_at(series, [basis, other], 2, range(3)), size) < 1
    assert 4 <= peak_vectors(lambda: directions_at(series, [basis, other], 2), size) < 4 + 4 < len(rows)
    assert torch.equal(theta, series[2])


class Cubes(nn.Module):
    """The Hessian of a sixth of its cubes is its weights on the diagonal."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(size))

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.first.pow(3).sum() + self.second.pow(3).sum()) * inputs / 6


@pytest.mark.parametrize("size", SIZES)
def test_products_by_reverse_mode_copy_neither_weights_nor_vector(size):
    module, inputs = Cubes(size), torch.ones(2, 1)
    tokens = TokenSet(inputs, torch.ones(2, 1, dtype=torch.bool), torch.arange(2))
    theta, vector = torch.arange(2.0 * size) / size, torch.randn(2 * size)
    made, taken = {}, {}
    for route in ("double_backward", "traced"):
        loss, products = Objective(module, lambda m, x: m(x), route=route), []
        torch.testing.assert_close(loss.hessian(theta, tokens)(vector), theta * vector)

        def linearise(loss: Objective = loss, products: list = products) -> None:
            products.append(loss.hessian(theta, tokens))

        made[route] = peak_vectors(linearise, 2 * size)
        taken[route] = peak_vectors(lambda products=products: products[0](vector), 2 * size)
    # A gradient while the graph is made; then one tensor by tensor, its flat sum, and half of one under way.
    assert made["double_backward"] < 2.1 < made["traced"]
    assert taken["double_backward"] < 2.6


@pytest.mark.parametrize("size", SIZES)
def test_lanczos_holds_two_vectors_a_product_or_none_where_they_are_mapped(size, tmp_path):
    diagonal = torch.linspace(0, 1, size).pow(8)
    made: list[Tensor] = []

    def mapped(rows: int, width: int) -> Tensor:
        made.append(in_file(tmp_path / f"{size}-{len(made)}.bin", rows, width))
        return made[-1]

    def pairs(allocate: Callable[[int, int], Tensor] | None):
        settings = LanczosSettings(tolerance=1e-12, max_products=12)
        draw = torch.Generator().manual_seed(0)
        return projected_lanczos(lambda v: diagonal * v, diagonal, 1, draw, settings, allocate=allocate)

    inside, outside = peak_vectors(lambda: pairs(None), size), peak_vectors(lambda: pairs(mapped), size)
    assert 24 <= inside < 24 + 8
    assert outside < 3.1  # an image, what is left of it, and the next block
    assert len(made) == 24
    near, same = pairs(None), pairs(mapped)
    torch.testing.assert_close(near.values, same.values)
    assert float((near.vectors @ same.vectors.T).abs()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_a_later_checkpoint_holds_four_vectors_beside_what_came_before(size, tmp_path):
    """With an earlier row to project off and a warm start, Krylov vectors in files."""
    diagonal, draw = torch.linspace(0, 1, size), torch.Generator().manual_seed(0)
    row, follows = orthonormalise(torch.randn(2, size, generator=draw)).split(1)
    before = BasisCheckpoint(0, row, torch.ones(1), torch.zeros(1), 1, follows)
    made = itertools.count()
    keeping = Keeping(krylov=lambda k, n: in_file(tmp_path / f"{size}-{next(made)}.bin", k, n))
    settings = EigenSettings(tolerance=1e-9, max_products=8)

    def found() -> BasisCheckpoint:
        return next_vectors(lambda v: diagonal * v, diagonal, [before], 1, draw, settings, keeping)

    assert peak_vectors(found, size) < 4.1


@pytest.mark.parametrize("size", SIZES)
def test_the_vectors_of_a_basis_lie_in_one_table_and_nowhere_else(size):
    """They were copied at every checkpoint, and again at the end: 3.4 GB for twelve of Pythia 70m."""
    diagonal, settings = torch.linspace(0, 1, size), EigenSettings(tolerance=1.0, max_products=3)

    def found(count: int) -> Basis:
        return operator_basis("scaled", lambda _: lambda v: diagonal * v, walk(size, count), settings)

    few, many = (peak_vectors(lambda count=count: found(count), size) for count in (6, 12))
    assert many - few == pytest.approx(6, abs=0.2)
    assert many < 12 + 12  # the checkpoint that is read, Krylov vectors in memory, and what Lanczos makes


class Squashed(nn.Module):
    """A result that its own node saves for the way back, as those of tanh, softmax and exp are."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0, 1, size))

    def forward(self, inputs: Tensor) -> Tensor:
        return (torch.tanh(self.weight) * inputs[:, :1]).sum(1, keepdim=True)


def test_a_linearisation_that_is_let_go_leaves_nothing_behind():
    size = SIZES[0]
    module = Squashed(size)
    tokens = TokenSet(torch.ones(1, 2), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1))
    loss = Objective(module, lambda m, x: m(x), route="double_backward")
    theta = loss.space.read(module)
    loss.hessian(theta, tokens)

    def made(times: int) -> None:
        for _ in range(times):
            loss.hessian(theta, tokens)(theta)

    assert peak_vectors(lambda: made(6), size) < peak_vectors(lambda: made(1), size) + 0.5
