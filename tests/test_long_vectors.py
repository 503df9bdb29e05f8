"""Norms of millions of entries: ``Tensor.norm`` of float32 misses a thousandth and more of them."""

from __future__ import annotations

import pytest
import torch

from interventions.controls import random_like
from interventions.edits import Movement, from_delta, rows_of
from polca_edit.allocation.allocate import CheckpointSlopes, assemble
from polca_edit.basis.record import unlabelled
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import lengths
from polca_edit.parameters import ParameterSpace

SIZE = 12_000_000
SPACE = ParameterSpace(("w",), ((SIZE,),), (("w", "w"),))


@pytest.fixture(scope="module")
def vector():
    """A few large entries first, and very many small ones that are added to their square."""
    found = torch.full((SIZE,), 3e-4)
    found[:100] = 1.0
    return found


@pytest.fixture(scope="module")
def exact(vector):
    return float(vector.double().norm())


def test_lengths_are_those_of_float64(vector, exact):
    assert float(lengths(vector[None])) == pytest.approx(exact, rel=1e-5)
    assert lengths(vector[None, :0]).tolist() == [0.0]
    assert lengths(vector[None][:0]).shape == (0,)


def test_a_row_of_length_one_is_no_error(vector, exact):
    row = (vector / exact)[None]
    assert rows_of(unlabelled("long", row)) is not None
    with pytest.raises(ValueError, match="must have length 1"):
        rows_of(unlabelled("long", 1.01 * row))


@pytest.mark.parametrize("kind", ["placement", "spectrum"])
def test_random_edits_have_the_norm_of_theirs(vector, exact, kind):
    moved = Movement(vector, torch.zeros(SIZE))
    edit = from_delta(moved.base, vector, "test")
    drawn = random_like(moved, edit, torch.Generator().manual_seed(0), kind=kind, space=SPACE)
    assert float(drawn.delta().double().norm()) == pytest.approx(exact, rel=1e-5)


def test_norms_of_a_record(vector, exact):
    series = Checkpoints(SPACE, (0, 1), lambda i: {"w": i * vector})
    zero, basis = torch.zeros(1), unlabelled("none", torch.zeros(0, SIZE))
    slopes = [CheckpointSlopes(zero, (torch.zeros(0, 1),), (zero,), (zero,))] * 2
    found = assemble(series, basis, 0, slopes)
    assert found.step_norms.tolist() == pytest.approx([exact], rel=1e-5)
    assert found.residual_norms.tolist() == pytest.approx([exact], rel=1e-5)
