"""Bases against dense eigenpairs, numpy's SVD and simulated walks."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from oracles import copied_with, dense_hessian, mean_loss, quadratic_problem, text_tokens, tiny_gpt2, walk
from torch import nn

from experiments.run.parts import Ledger, kept_products, mapped_rows
from polca_edit.artifacts import load_record, save_record
from polca_edit.basis import hessian as seeking
from polca_edit.basis.hessian import (
    BasisCheckpoint,
    EigenSettings,
    Keeping,
    hessian_basis,
    join,
    operator_basis,
)
from polca_edit.basis.path import trajectory_basis
from polca_edit.basis.record import Basis, capture, gram_error, random_basis, random_walk_capture, unlabelled
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import orthonormalise
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet, next_token_loss

TIGHT = {"tolerance": 1e-10, "max_products": 400}


class Curved(nn.Module):
    """A small smooth network in float64: its Hessian differs from checkpoint to checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4).double()
        self.second = nn.Linear(4, 2).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def curved_loss(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return (module(inputs[..., :3]) - inputs[..., 3:]).square().sum(-1)


def curved_problem(generator: torch.Generator) -> tuple[Curved, Objective, object, Checkpoints]:
    module = Curved()
    inputs = torch.randn(7, 3, 5, generator=generator, dtype=torch.float64)
    scored = torch.ones(7, 3, dtype=torch.bool)
    scored[2, 1] = False
    tokens = TokenSet(inputs, scored, torch.arange(7))
    space = ParameterSpace.from_module(module)
    thetas = [torch.randn(space.size, generator=generator, dtype=torch.float64) for _ in range(4)]
    objective = Objective(module, curved_loss, space, batch_size=4, route="double_backward")
    return module, objective, tokens, open_checkpoints(thetas, space, steps=[0, 10, 20, 30])


class Straight(nn.Module):
    """Linear in one weight, quadratic in the second; the third is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.curved, self.unused = (nn.Parameter(torch.ones(n)) for n in (3, 2, 1))


@pytest.mark.parametrize("route", ["auto", "double_backward", "traced", "jvp"])
def test_products_of_a_model_that_is_linear_in_some_weights(route):
    tokens = TokenSet(torch.randn(4, 3), torch.ones(4, 1, dtype=torch.bool), torch.arange(4))
    losses = {
        (0.0, 0.0, 0.0, 2.0, 2.0, 0.0): lambda m, x: (x @ m.linear + m.curved.square().sum())[:, None],
        (0.0,) * 6: lambda m, x: (x @ m.linear)[:, None],
    }
    for diagonal, token_loss in losses.items():
        loss, vector = Objective(Straight(), token_loss, route=route), torch.arange(1.0, 7.0)
        found = loss.hessian(loss.space.read(loss.module), tokens)(vector)
        torch.testing.assert_close(found, torch.tensor(diagonal) * vector)


def algorithm_one(
    hessians: list[torch.Tensor], k: int, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense Algorithm 1: top eigenpairs of Pi H Pi, appended checkpoint after checkpoint."""
    size = len(hessians[0])
    rows, values = torch.zeros(0, size, dtype=torch.float64), []
    inside = torch.eye(size, dtype=torch.float64) if mask is None else torch.diag(mask.double())
    for hessian in hessians:
        project = inside - rows.T @ rows
        found, vectors = torch.linalg.eigh(project @ hessian @ project)
        order = torch.argsort(found, descending=True)[:k]
        rows = torch.cat([rows, vectors[:, order].T])
        values.append(found[order])
    return rows, torch.cat(values)


def dense_hessians(module, loss, tokens, checkpoints) -> list[torch.Tensor]:
    scalar = mean_loss(loss, tokens)
    return [dense_hessian(copied_with(module, checkpoints[i]), scalar) for i in range(len(checkpoints))]


def assert_same_rows(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Equal up to the sign of each row."""
    overlap = (found * expected).sum(1).abs()
    assert torch.allclose(overlap, torch.ones_like(overlap), rtol=0, atol=tolerance), overlap


# -- hessian basis ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_hessian_basis_against_dense_eigenpairs(k, masked, generator):
    module, objective, tokens, checkpoints = curved_problem(generator)
    mask = objective.space.mask(["first.*"]) if masked else None
    expected, values = algorithm_one(dense_hessians(module, curved_loss, tokens, checkpoints), k, mask)
    settings = EigenSettings(per_checkpoint=k, mask=mask, **TIGHT)
    basis = hessian_basis(objective, checkpoints, tokens, 4 * k, settings)
    assert len(basis) == 4 * k
    assert basis.origins.tolist() == [step for step in checkpoints.steps for _ in range(k)]
    assert torch.allclose(basis.eigenvalues, values, rtol=1e-9, atol=1e-9)
    assert_same_rows(basis.rows, expected, 1e-8)
    assert gram_error(basis.rows) < 1e-12
    assert float(basis.residuals.max()) < 1e-8
    assert not basis.supervised
    if mask is not None:
        assert torch.equal(basis.rows[:, ~mask], torch.zeros_like(basis.rows[:, ~mask]))


@pytest.mark.parametrize("k", [1, 2])
def test_vectors_sought_by_rounded_products_are_finished_by_exact_ones(k, generator, monkeypatch):
    """With eight bits of a product left, the basis is still that of the dense Hessians."""
    module, objective, tokens, checkpoints = curved_problem(generator)
    expected, values = algorithm_one(dense_hessians(module, curved_loss, tokens, checkpoints), k)
    rounded = []

    def rounding(product):
        rounded.append(0)

        def coarse(vector):
            rounded[-1] += 1
            return product(vector).bfloat16().to(vector)

        return coarse

    monkeypatch.setattr(seeking, "in_fewer_bits", rounding)
    basis = hessian_basis(
        objective, checkpoints, tokens, 4 * k, EigenSettings(per_checkpoint=k, coarse=True, **TIGHT)
    )
    assert torch.allclose(basis.eigenvalues, values, rtol=1e-9, atol=1e-9)
    assert_same_rows(basis.rows, expected, 1e-8)
    assert float(basis.residuals.max()) < 1e-8
    assert len(rounded) == 4
    assert all(count >= k for count in rounded)
    # Where a loose tolerance is met, a vector takes one exact product more than it took rounded ones.
    loose = EigenSettings(per_checkpoint=k, tolerance=0.3, max_products=30, coarse=True)
    before = objective.passes.hvp
    hessian_basis(objective, checkpoints, tokens, 4 * k, loose)
    assert (objective.passes.hvp - before) / tokens.sequences == sum(rounded[4:]) + 4 * k


def test_products_in_fewer_bits_leave_the_setting_as_it_was():
    seen = []

    def product(vector):
        seen.append(torch.get_float32_matmul_precision())
        if vector.sum() < 0:
            raise ArithmeticError
        return vector

    assert torch.get_float32_matmul_precision() == "highest"
    coarse = seeking.in_fewer_bits(product)
    coarse(torch.ones(1))
    with pytest.raises(ArithmeticError):
        coarse(-torch.ones(1))
    product(torch.ones(1))
    assert seen == ["medium", "medium", "highest"]


def test_hessian_basis_of_a_tied_language_model(generator):
    model = tiny_gpt2().double()
    tokens = text_tokens(generator)
    space = ParameterSpace.from_module(model, ["transformer.h.0.attn.c_proj.bias", "transformer.ln_f.*"])
    thetas = [space.read(model), space.read(model) + 0.1]
    checkpoints = open_checkpoints(thetas, space, steps=[0, 5])
    chosen = {slot for slot, _ in space.aliases}
    hessians = []
    for theta in thetas:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        hessians.append(dense_hessian(copied_with(model, theta), mean_loss(next_token_loss, tokens)))
    expected, values = algorithm_one(hessians, 1)
    objective = Objective(model, next_token_loss, space, batch_size=3, route="double_backward")
    basis = hessian_basis(objective, checkpoints, tokens, 2, EigenSettings(**TIGHT))
    assert torch.allclose(basis.eigenvalues, values, rtol=1e-8)
    assert_same_rows(basis.rows, expected, 1e-7)


def test_reported_residual_is_the_residual(generator):
    """Stopped early, the residual says how far off: ||Pi H Pi v - lambda v|| / |lambda|, recomputed."""
    module, objective, tokens, checkpoints = curved_problem(generator)
    hessians = dense_hessians(module, curved_loss, tokens, checkpoints)
    basis = hessian_basis(objective, checkpoints, tokens, 4, EigenSettings(tolerance=1e-10, max_products=3))
    for index, row in enumerate(basis.rows):
        before = basis.rows[:index]
        project = torch.eye(len(row), dtype=torch.float64) - before.T @ before
        applied = project @ hessians[index] @ project @ row
        value = float(basis.eigenvalues[index])
        residual = float((applied - value * row).norm()) / abs(value)
        assert float(basis.residuals[index]) == pytest.approx(residual, rel=1e-6)
    assert float(basis.residuals.max()) > 1e-3
    assert gram_error(basis.rows) < 1e-12


def test_fewer_vectors_are_taken_at_equally_spaced_checkpoints(generator):
    module, objective, tokens, checkpoints = curved_problem(generator)
    two = hessian_basis(objective, checkpoints, tokens, 2, EigenSettings(**TIGHT))
    assert two.origins.tolist() == [20, 30]
    hessians = dense_hessians(module, curved_loss, tokens, checkpoints)
    assert_same_rows(two.rows, algorithm_one(hessians[2:], 1)[0], 1e-8)
    three = hessian_basis(objective, checkpoints, tokens, 3, EigenSettings(per_checkpoint=2, **TIGHT))
    assert three.origins.tolist() == [20, 20, 30]
    assert_same_rows(three.rows, algorithm_one(hessians[2:], 2)[0][:3], 1e-8)
    with pytest.raises(ValueError, match="ask for fewer"):
        hessian_basis(objective, checkpoints, tokens, 5, EigenSettings(**TIGHT))


def test_products_are_counted(generator):
    _, objective, tokens, checkpoints = curved_problem(generator)
    basis = hessian_basis(objective, checkpoints, tokens, 4, EigenSettings(**TIGHT))
    assert basis.products * tokens.sequences == objective.passes.hvp


@pytest.mark.parametrize("done", [0, 1, 3, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_resume_gives_the_same_bytes(done, masked, generator):
    """Loose tolerance on purpose: there the start vectors decide the last digits."""
    _, objective, tokens, checkpoints = curved_problem(generator)
    mask = objective.space.mask(["first.*"]) if masked else None
    parts: list[BasisCheckpoint] = []
    settings = EigenSettings(2, 1e-1, 12, seed=4, mask=mask)
    whole = hessian_basis(
        objective, checkpoints, tokens, 8, settings, keeping=Keeping(on_checkpoint=parts.append)
    )
    again: list[BasisCheckpoint] = []
    keeping = Keeping(finished=parts[:done], on_checkpoint=again.append)
    resumed = hessian_basis(objective, checkpoints, tokens, 8, settings, keeping=keeping)
    assert [part.step for part in again] == list(checkpoints.steps[done:])
    assert torch.equal(resumed.rows, whole.rows)
    assert torch.equal(resumed.eigenvalues, whole.eigenvalues)
    assert resumed.products == whole.products


def test_the_product_of_one_checkpoint_is_gone_before_the_next_is_made():
    class Scaled:
        """The diagonal 1, 2, ..., 5 times a factor; a linearised Hessian would hold its batches."""

        def __init__(self, factor: float) -> None:
            self.values = factor * torch.arange(1.0, 6.0)

        def __call__(self, vector: torch.Tensor) -> torch.Tensor:
            return self.values * vector

    space = ParameterSpace.from_module(nn.Linear(5, 1, bias=False))
    series = open_checkpoints({step: torch.full((5,), float(step)) for step in range(3)}, space)
    made: list[weakref.ref[Scaled]] = []

    def product_at(index: int) -> Scaled:
        assert all(earlier() is None for earlier in made)
        product = Scaled(1.0 + index)
        made.append(weakref.ref(product))
        return product

    basis = operator_basis("scaled", product_at, series)
    torch.testing.assert_close(basis.rows.abs(), torch.eye(5)[[4, 3, 2]], atol=1e-3, rtol=0)
    assert len(made) == 3


def test_seed_of_the_start_vectors_does_not_matter_at_tight_tolerance(generator):
    _, objective, tokens, checkpoints = curved_problem(generator)
    first, second = (
        hessian_basis(objective, checkpoints, tokens, 4, EigenSettings(seed=s, **TIGHT)) for s in (0, 1)
    )
    assert_same_rows(first.rows, second.rows, 1e-8)


# -- trajectory basis ------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_trajectory_basis_against_numpy_svd(masked, generator):
    problem = quadratic_problem([1.0] * 9, generator)
    checkpoints = walk(problem.objective.space, 6, generator)
    mask = torch.arange(9) % 3 != 0 if masked else None
    moved = torch.stack([checkpoints[t] - checkpoints[0] for t in range(1, 6)])
    if mask is not None:
        moved = moved * mask
    _, singular, right = np.linalg.svd(moved.numpy(), full_matrices=False)
    basis = trajectory_basis(checkpoints, 4, mask=mask)
    assert np.allclose(basis.eigenvalues.numpy(), singular[:4] ** 2, rtol=1e-10)
    assert_same_rows(basis.rows, torch.from_numpy(right[:4]), 1e-10)
    assert gram_error(basis.rows) < 1e-12
    assert basis.origins.tolist() == [-1] * 4


def test_trajectory_basis_refuses_more_vectors_than_the_movement_has(generator):
    problem = quadratic_problem([1.0] * 9, generator)
    checkpoints = walk(problem.objective.space, 5, generator)
    assert len(trajectory_basis(checkpoints, 4)) == 4
    with pytest.raises(ValueError, match="got 4; use fewer"):
        trajectory_basis(checkpoints, 5)
    direction = torch.randn(9, generator=generator, dtype=torch.float64)
    line = open_checkpoints([direction * t for t in range(4)], checkpoints.space, steps=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="got 1; use fewer"):
        trajectory_basis(line, 2)


# -- random basis, record --------------------------------------------------------------------------


def test_random_basis_is_orthonormal_and_seeded():
    mask = torch.arange(50) < 20
    first = random_basis(50, 6, torch.Generator().manual_seed(1), dtype=torch.float64, mask=mask)
    again = random_basis(50, 6, torch.Generator().manual_seed(1), dtype=torch.float64, mask=mask)
    other = random_basis(50, 6, torch.Generator().manual_seed(2), dtype=torch.float64, mask=mask)
    assert gram_error(first.rows) < 1e-14
    assert torch.equal(first.rows, again.rows)
    assert not torch.allclose(first.rows, other.rows)
    assert torch.equal(first.rows[:, 20:], torch.zeros(6, 30, dtype=torch.float64))


def test_random_basis_favours_no_direction():
    """Uniform on the Stiefel manifold: the mean projector is (K/N) I."""
    generator = torch.Generator().manual_seed(0)
    projector = torch.zeros(6, 6, dtype=torch.float64)
    for _ in range(2000):
        rows = random_basis(6, 2, generator, dtype=torch.float64).rows
        projector += rows.T @ rows / 2000
    # Standard error of an entry is at most 0.5 / sqrt(2000) = 0.011.
    assert float((projector - torch.eye(6) / 3).abs().max()) < 0.05


def test_subset_and_rotation(generator):
    parts = [
        BasisCheckpoint(
            step,
            rows,
            torch.tensor([float(step)], dtype=torch.float64),
            torch.tensor([0.1], dtype=torch.float64),
            3,
        )
        for step, rows in zip((0, 10, 20), torch.eye(4, dtype=torch.float64)[:3].split(1), strict=True)
    ]
    basis = join("hessian", parts)
    assert basis.products == 9
    picked = basis[2, 0]
    assert picked.origins.tolist() == [20, 0]
    assert picked.eigenvalues.tolist() == [20.0, 0.0]
    assert torch.equal(picked.rows, basis.rows[[2, 0]])
    assert torch.equal(basis[torch.tensor([2, 0])].rows, picked.rows)
    assert basis[1].origins.tolist() == [10]
    assert basis[-1].rows.shape == (1, 4)
    assert basis[1:].eigenvalues.tolist() == [10.0, 20.0]
    assert [one.origins.tolist() for one in basis] == [[0], [10], [20]]
    with pytest.raises(IndexError):
        basis[3]
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    turned = basis.rotated(turn, "rotated", supervised=True)
    assert torch.allclose(turned.rows, turn.T @ basis.rows)
    assert turned.supervised
    assert bool(turned.eigenvalues.isnan().all())
    with pytest.raises(ValueError, match="must be orthogonal"):
        basis.rotated(turn * 1.01, "stretched")


# -- capture ---------------------------------------------------------------------------------------


def test_capture_by_hand():
    space = ParameterSpace.from_module(nn.Linear(3, 1, bias=False))
    thetas = torch.tensor([[0.0, 0, 0], [3.0, 4.0, 0], [3.0, 4.0, 2.0], [3.0, 4.0, 2.0]], dtype=torch.float64)
    checkpoints = open_checkpoints(list(thetas), space, steps=[0, 1, 2, 3])
    rows = torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
    net, path = capture(unlabelled("rows", rows), checkpoints)
    assert net == pytest.approx(9 / 29)
    assert path == pytest.approx((9 / 25 + 0) / 2)  # the interval without movement does not count


def test_capture_of_a_complete_basis_is_one(generator):
    problem = quadratic_problem([1.0] * 5, generator)
    checkpoints = walk(problem.objective.space, 6, generator)
    assert capture(unlabelled("frame", problem.frame.T), checkpoints) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_random_walk_capture_against_a_simulated_walk(count):
    """20,000 dimensions: steps are orthogonal within 1/sqrt(20000) = 0.7 %."""
    size, norms = 20_000, [0.5, 1.0, 2.0, 1.0, 1.0, 0.3, 1.5, 1.0, 0.7, 1.0, 1.0, 0.2]
    generator = torch.Generator().manual_seed(11)
    steps = torch.randn(len(norms), size, generator=generator, dtype=torch.float64)
    steps = steps / steps.norm(dim=1, keepdim=True) * torch.tensor(norms, dtype=torch.float64)[:, None]
    thetas = torch.cat([torch.zeros(1, size, dtype=torch.float64), steps.cumsum(0)])
    space = ParameterSpace.from_module(nn.Linear(size, 1, bias=False))
    checkpoints = open_checkpoints(list(thetas), space, steps=list(range(len(thetas))))
    simulated = capture(trajectory_basis(checkpoints, count), checkpoints)
    assert random_walk_capture(norms, count) == pytest.approx(simulated, abs=0.03)


def test_random_walk_capture_edges():
    assert random_walk_capture([1.0, 2.0, 3.0], 3) == pytest.approx((1.0, 1.0))
    net, path = random_walk_capture([1.0] * 60, 1)
    # The long equal-step walk: one vector holds 8/pi^2 of the net movement (first cosine mode).
    assert net == pytest.approx(8 / np.pi**2, abs=0.01)
    assert path == pytest.approx(1 / 60, abs=1e-12)
    assert random_walk_capture([0.0, 0.0], 1) == (0.0, 0.0)


def test_orthonormalise_keeps_the_span_and_drops_dependent_rows(generator):
    rows = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    first, second, third = rows
    kept = orthonormalise(torch.stack([first, 2 * first, second, first - second, 0 * first, third]))
    assert kept.shape == (3, 8)
    assert gram_error(kept) < 1e-14
    assert torch.allclose(rows @ kept.T @ kept, rows)
    assert isinstance(unlabelled("any", kept), Basis)


def test_rows_in_blocks_on_disk_give_the_same_basis(generator, tmp_path):
    _, objective, tokens, checkpoints = curved_problem(generator)
    whole = hessian_basis(objective, checkpoints, tokens, 8, EigenSettings(per_checkpoint=2, seed=4, **TIGHT))
    seen = []

    def stored(part: BasisCheckpoint) -> BasisCheckpoint:
        path = tmp_path / f"{len(seen)}.safetensors"
        save_record(path, part)
        seen.append(path)
        return load_record(BasisCheckpoint, path)

    settings = EigenSettings(per_checkpoint=2, seed=4, **TIGHT)
    keeping = Keeping(
        on_checkpoint=stored,
        rows_in_memory=0,
        allocate=lambda count, size: mapped_rows(tmp_path / "rows.bin", count, size),
    )
    streamed = hessian_basis(objective, checkpoints, tokens, 8, settings, keeping=keeping)
    assert len(seen) == 4
    assert (tmp_path / "rows.bin").stat().st_size == 4 * streamed.rows.numel()
    torch.testing.assert_close(streamed.eigenvalues, whole.eigenvalues, rtol=1e-9, atol=0)
    overlap = (streamed.rows.double() * whole.rows).sum(1).abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-6)


def test_products_of_an_interrupted_checkpoint_are_replayed(generator, tmp_path):
    """Broken off inside the second checkpoint: the same bytes, and no product is computed twice."""
    _, objective, tokens, checkpoints = curved_problem(generator)

    class Killed(BaseException):
        pass

    def run(parts, finished=(), stop=None):
        ledger = Ledger(parts, objective.passes)
        done = []

        def kept(index, product):
            inner = kept_products(parts / f"products-{index}", product, ledger)

            def counted(vector):
                if stop is not None and len(done) == stop:
                    raise Killed
                done.append(index)
                return inner(vector)

            return counted

        before = objective.passes.hvp
        try:
            settings, keeping = EigenSettings(seed=4, **TIGHT), Keeping(finished=finished, products=kept)
            basis = hessian_basis(objective, checkpoints, tokens, 4, settings, keeping=keeping)
        except Killed:
            basis = None
        return basis, objective.passes.hvp - before

    whole, all_passes = run(tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    nothing, first_passes = run(tmp_path / "killed", stop=whole.products // 2)
    assert nothing is None
    resumed, rest = run(tmp_path / "killed")
    assert torch.equal(resumed.rows, whole.rows)
    assert 0 < first_passes < all_passes
    assert first_passes + rest == all_passes
