"""Projected Lanczos against matrices of chosen spectrum and dense eigendecompositions."""

from __future__ import annotations

import pytest
import torch
from oracles import orthogonal, with_spectrum

from polca_edit.basis.hessian import EigenSettings, next_vectors
from polca_edit.derivatives.lanczos import LanczosSettings, orthonormalise, projected_lanczos, remove_rows

SPECTRUM = [9.0, 7.5, 7.4, 5.0, -8.0, *torch.linspace(1.0, -1.0, 35).tolist()]


def angle(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest sine of the principal angles between two row spaces."""
    rest = found - found @ wanted.T @ wanted
    return float(torch.linalg.matrix_norm(rest, ord=2))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_pairs_of_a_chosen_spectrum(k, generator):
    matrix, frame = with_spectrum(SPECTRUM, generator)
    pairs = projected_lanczos(
        lambda v: matrix @ v,
        torch.zeros(40, dtype=torch.float64),
        k,
        generator,
        LanczosSettings(tolerance=1e-9),
    )
    wanted = sorted(SPECTRUM, reverse=True)[:k]
    assert pairs.converged
    assert torch.allclose(pairs.values, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12)
    columns = [SPECTRUM.index(value) for value in wanted]
    assert angle(pairs.vectors, frame[:, columns].T) < 1e-7
    # The residual that is reported is the residual that is there.
    true = (pairs.vectors @ matrix - pairs.values[:, None] * pairs.vectors).norm(dim=1) / pairs.values.abs()
    assert torch.allclose(true, pairs.residuals, atol=1e-12)


def test_projected_pairs_equal_the_dense_ones(generator):
    matrix, _ = with_spectrum(SPECTRUM, generator)
    rows = orthogonal(40, generator)[:6]
    keep = torch.eye(40, dtype=torch.float64) - rows.T @ rows
    values, vectors = torch.linalg.eigh(keep @ matrix @ keep)
    pairs = projected_lanczos(
        lambda v: matrix @ v,
        torch.zeros(40, dtype=torch.float64),
        3,
        generator,
        LanczosSettings(tolerance=1e-10),
        rows=rows,
    )
    assert torch.allclose(pairs.values, values.flip(0)[:3])
    assert angle(pairs.vectors, vectors.flip(1)[:, :3].T) < 1e-7
    assert float((pairs.vectors @ rows.T).abs().max()) < 1e-12


def test_unconverged_says_so(generator):
    matrix, _ = with_spectrum(SPECTRUM, generator)
    pairs = projected_lanczos(
        lambda v: matrix @ v,
        torch.zeros(40, dtype=torch.float64),
        1,
        generator,
        LanczosSettings(tolerance=1e-10, max_products=4),
    )
    assert not pairs.converged
    assert pairs.products == 4
    assert float(pairs.residuals[0]) > 1e-10


def test_refuses_impossible_and_broken(generator):
    with pytest.raises(ValueError, match="k must be"):
        projected_lanczos(lambda v: v, torch.zeros(3), 4, generator)
    with pytest.raises(ValueError, match="finite"):
        projected_lanczos(lambda v: v * float("nan"), torch.zeros(3), 1, generator)


def test_orthonormal_rows_drop_dependent_ones(generator):
    rows = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    kept = orthonormalise(torch.cat([rows, rows[:1] + rows[1:2]]))
    assert len(kept) == 3
    assert torch.allclose(kept @ kept.T, torch.eye(3, dtype=torch.float64), atol=1e-14)
    assert float(remove_rows(rows, kept).norm()) < 1e-13


@pytest.mark.parametrize("masked", [False, True])
def test_successors_start_the_next_checkpoint(masked, generator):
    """Started from the Ritz vectors behind the last ones, a changed operator needs fewer products."""
    matrix, _ = with_spectrum([9.0, 7.5, 6.0, *torch.linspace(1.0, -1.0, 197).tolist()], generator)
    noise = torch.randn(200, 200, generator=generator, dtype=torch.float64)
    moved = matrix + 2e-4 * (noise + noise.T)
    theta = torch.zeros(200, dtype=torch.float64)
    mask = torch.arange(200) != 17 if masked else None
    settings = EigenSettings(tolerance=1e-3, mask=mask)
    if mask is not None:  # operators work between the entries that vectors may use
        matrix, moved = matrix[mask][:, mask], moved[mask][:, mask]
    first = next_vectors(lambda v: matrix @ v, theta, [], 0, generator, settings)
    assert first.following is not None
    warm = next_vectors(lambda v: moved @ v, theta, [first], 1, generator, settings)
    cold_rows = projected_lanczos(
        lambda v: moved @ v,
        torch.zeros(len(moved), dtype=torch.float64),
        1,
        generator,
        LanczosSettings(tolerance=1e-3),
        rows=first.rows,
    )
    assert warm.products < cold_rows.products
    assert float(warm.residuals.max()) <= 1e-3
    keep = torch.eye(len(moved), dtype=torch.float64)
    keep = keep - first.rows.T @ first.rows
    assert abs(float(torch.linalg.eigvalsh(keep @ moved @ keep)[-1]) - float(warm.eigenvalues[0])) < 1e-4


def test_single_precision_stays_orthogonal(generator):
    matrix, _ = with_spectrum([10.0 * 0.9**i for i in range(300)], generator)
    single = matrix.float()
    pairs = projected_lanczos(
        lambda v: single @ v, torch.zeros(300), 5, generator, LanczosSettings(tolerance=1e-5)
    )
    gram = pairs.vectors.double() @ pairs.vectors.double().T
    assert float((gram - torch.eye(5, dtype=torch.float64)).abs().max()) < 1e-6
    assert torch.allclose(
        pairs.values, torch.tensor([10.0 * 0.9**i for i in range(5)], dtype=torch.float64), rtol=1e-5
    )


@pytest.mark.parametrize("k", [1, 3])
def test_stops_at_the_first_product_that_reaches_the_tolerance(k, generator):
    """No product is wasted, and none is missing: one step less leaves a residual above the tolerance."""
    matrix, _ = with_spectrum([10.0 * 0.93**i for i in range(120)], generator)
    start = torch.randn(k, 120, generator=generator, dtype=torch.float64)

    def pairs(limit, tolerance=1e-4):
        return projected_lanczos(
            lambda v: matrix @ v,
            torch.zeros(120, dtype=torch.float64),
            k,
            torch.Generator().manual_seed(0),
            LanczosSettings(tolerance=tolerance, max_products=limit),
            start=start,
        )

    found = pairs(100)
    assert found.converged
    assert k < found.products < 100
    assert float(found.residuals.max()) <= 1e-4
    true = found.vectors @ matrix - found.values[:, None] * found.vectors
    assert torch.allclose(true.norm(dim=1) / found.values, found.residuals, rtol=1e-6)
    short = pairs(found.products - k)
    assert not short.converged
    assert short.products == found.products - k
    assert float(short.residuals.max()) > 1e-4
    # A tolerance just above the residual of that step stops there, one just below does not.
    worst = float(short.residuals.max())
    assert pairs(100, worst * 1.001).products == short.products
    assert pairs(100, worst * 0.999).products > short.products


def test_blocks_of_rows_are_read_three_times_a_product(generator):
    """What is streamed from disk is read once for the product and twice for the next Krylov vector."""
    matrix, _ = with_spectrum(SPECTRUM, generator)
    rows = orthogonal(40, generator)[:6]
    reads = [0]

    class Counted(list):
        def __iter__(self):
            reads[0] += 1
            return super().__iter__()

    pairs = projected_lanczos(
        lambda v: matrix @ v,
        torch.zeros(40, dtype=torch.float64),
        1,
        generator,
        LanczosSettings(tolerance=1e-9),
        rows=Counted([rows[:4], rows[4:]]),
    )
    assert pairs.converged
    # Once to count them, two reads for the start, two for the result.
    assert reads[0] <= 3 * pairs.products + 5
    assert float((pairs.vectors @ rows.T).abs().max()) < 1e-12


@pytest.mark.parametrize("rows", [None, [], torch.eye(40)[:2]])
def test_what_a_product_returns_is_left_as_it_is(rows, tmp_path):
    """It may be kept by whoever made it, as products that are replayed are."""
    diagonal, kept = torch.linspace(0, 1, 40), []

    def product(vector):
        kept.append((diagonal * vector, (diagonal * vector).clone()))
        return kept[-1][0]

    projected_lanczos(product, diagonal, 1, torch.Generator().manual_seed(0), rows=rows, allocate=torch.empty)
    assert len(kept) > 5
    assert all(torch.equal(given, copy) for given, copy in kept)
