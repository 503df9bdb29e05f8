"""Rotations against planted ones, and against what they say they optimise."""

import pytest
import torch
from oracles import orthomax_criterion, rotated_allocation

from polca_edit.allocation.allocate import Projections, allocate
from polca_edit.basis.rotate import (
    allocation_matrices,
    contrastive,
    independent_components,
    joint_diagonalisation,
    orthomax,
)

torch.set_num_threads(1)
K = 4


def _rotation(seed, size=K):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def _recovers(found, planted, tolerance):
    """Equal up to order and sign of the columns."""
    overlap = (found.T @ planted).abs()
    best = torch.cat([overlap.max(0).values, overlap.max(1).values])
    return bool((best > 1 - tolerance).all())


def _sparse_table(seed, count=400):
    generator = torch.Generator().manual_seed(seed)
    table = torch.zeros(count, K, dtype=torch.float64)
    owner = torch.randint(K, (count,), generator=generator)
    table[torch.arange(count), owner] = torch.randn(count, generator=generator, dtype=torch.float64) - 1
    return table


def _projections(seed=0, steps=6, tokens=30):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ones = torch.ones(steps - 1, dtype=torch.float64)
    return Projections(
        torch.arange(steps),
        draw(steps, tokens),
        draw(steps, K, tokens),
        draw(steps - 1, K),
        draw(steps - 1, tokens),
        draw(steps - 1, tokens),
        ones,
        ones,
    )


def test_matrices_reproduce_the_allocation_of_any_rotated_basis():
    projections = _projections()
    matrices = allocation_matrices(projections)
    rotation = _rotation(1)
    expected = allocate(projections.rotated(rotation)).values.sum(0).T
    torch.testing.assert_close(rotated_allocation(matrices, rotation), expected)
    trace = matrices.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(expected.sum(1), trace)


@pytest.mark.parametrize("kind", ["varimax", "quartimax"])
def test_orthomax_finds_planted_loadings_and_climbs_its_criterion(kind):
    planted = _rotation(2)
    table = _sparse_table(0) @ planted.T
    found = orthomax(table, kind)
    assert _recovers(found, planted, 1e-3)
    best = orthomax_criterion(table @ found, kind)
    for seed in range(20):
        assert orthomax_criterion(table @ _rotation(100 + seed), kind) <= best + 1e-9


def test_joint_diagonalisation_is_exact_for_commuting_matrices():
    planted = _rotation(3)
    values = torch.randn(50, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices = planted @ torch.diag_embed(values) @ planted.T
    found = joint_diagonalisation(matrices)
    assert _recovers(found, planted, 1e-10)
    # One matrix: its eigenvectors.
    single = joint_diagonalisation(matrices[:1])
    assert _recovers(single, torch.linalg.eigh(matrices[0])[1], 1e-8)


@pytest.mark.parametrize(("centred", "normalised"), [(False, False), (True, False), (True, True)])
def test_joint_diagonalisation_maximises_the_stated_sum(centred, normalised):
    matrices = allocation_matrices(_projections(seed=4))
    sizes = matrices.square().sum((1, 2)).sqrt()

    def criterion(rotation):
        allocation = rotated_allocation(matrices, rotation)
        if normalised:
            allocation = allocation / sizes[:, None]
        return float((allocation - allocation.mean(0) if centred else allocation).square().sum())

    found = joint_diagonalisation(matrices, centred=centred, normalised=normalised)
    best = criterion(found)
    assert best > max(criterion(_rotation(seed)) for seed in range(40))
    # A local maximum: small turns in every plane lower it.
    for p in range(K):
        for q in range(p + 1, K):
            turn = torch.eye(K, dtype=torch.float64)
            c, s = torch.cos(torch.tensor(0.01)), torch.sin(torch.tensor(0.01))
            turn[p, p], turn[p, q], turn[q, p], turn[q, q] = c, -s, s, c
            assert criterion(found @ turn) < best


def test_shared_part_is_ignored_when_centred():
    planted, shared = _rotation(5), _rotation(6)
    values = torch.randn(60, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    common = shared @ torch.diag(torch.tensor([50.0, -20.0, 10.0, 0.0], dtype=torch.float64)) @ shared.T
    matrices = planted @ torch.diag_embed(values - values.mean(0)) @ planted.T + common
    assert _recovers(joint_diagonalisation(matrices, centred=True), planted, 1e-8)
    assert not _recovers(joint_diagonalisation(matrices), planted, 1e-2)


def test_independent_components_finds_planted_sources():
    planted = _rotation(7)
    generator = torch.Generator().manual_seed(0)
    # Heavy tails on both sides: FastICA's contrast (log cosh) is blind to skewness.
    sources = torch.randn(4000, K, generator=generator, dtype=torch.float64).pow(3)
    found = independent_components(sources @ planted.T, seed=0)
    torch.testing.assert_close(found.T @ found, torch.eye(K, dtype=torch.float64), atol=1e-8, rtol=0)
    assert _recovers(found, planted, 0.02)


def test_contrastive_puts_the_skill_first():
    planted = _rotation(8)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, K, generator=generator, dtype=torch.float64)
    on = torch.arange(200) < 60
    values[on, 2] *= 6
    values[:, 0] *= 5  # moves everybody: large but not selective
    matrices = planted @ torch.diag_embed(values) @ planted.T
    found = contrastive(matrices, on)
    torch.testing.assert_close(found.T @ found, torch.eye(K, dtype=torch.float64), atol=1e-10, rtol=0)
    assert abs(float(found[:, 0] @ planted[:, 2])) > 0.999
    with pytest.raises(ValueError, match="on and off"):
        contrastive(matrices, torch.ones(200, dtype=torch.bool))
