"""Basis rows in fewer bits: half the bytes, and an error that is measured and said."""

from __future__ import annotations

import pytest
import torch
from oracles import curved_series

from interventions.damage import EvaluatedSplit
from interventions.edits import project_out
from polca_edit.allocation.allocate import allocate, project
from polca_edit.artifacts import load_record, save_record
from polca_edit.basis.build import BasisInputs, build_basis
from polca_edit.basis.path import trajectory_basis
from polca_edit.basis.record import Basis, unlabelled
from polca_edit.basis.storage import stored_as

STORAGES = {"bfloat16": 2**-8, "float16": 2**-11}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_rounded_rows_say_how_far_off_they_are(storage, masked, tmp_path):
    objective, series, tokens = curved_series()
    mask = series.space.mask(["second.*"]) if masked else None
    exact = trajectory_basis(series, 5, mask=mask)
    found = stored_as(exact, storage, objective, series[4], tokens)
    assert found.rounding is not None
    rows = exact.rows.to(getattr(torch, storage)).double()
    torch.testing.assert_close(found.rows.double(), rows, rtol=0, atol=0)
    wanted = float((rows @ rows.T - torch.eye(5).double()).abs().max())
    assert found.rounding.gram == pytest.approx(wanted, rel=1e-6)
    first = tokens.select(torch.arange(objective.batch_size))
    gradients = objective.token_gradients(series[4], first).double()
    slopes, moved = gradients @ exact.rows.double().T, gradients @ (rows - exact.rows.double()).T
    worst = float((moved.abs().amax(0) / slopes.abs().amax(0)).max())
    assert found.rounding.slopes == pytest.approx(worst, rel=1e-3)
    assert 0 < found.rounding.gram < STORAGES[storage]
    assert 0 < found.rounding.slopes < 20 * STORAGES[storage]
    for basis, name in ((exact, "exact"), (found, "rounded")):
        save_record(tmp_path / f"{name}.safetensors", basis)
    back = load_record(Basis, tmp_path / "rounded.safetensors")
    assert torch.equal(back.entries, found.entries)
    assert back.rounding == found.rounding
    assert found.entries.nbytes * 2 == exact.entries.nbytes
    assert storage in str(found.rounding)


def test_an_allocation_along_rounded_rows_still_adds_up():
    objective, series, tokens = curved_series()
    exact = trajectory_basis(series, 5)
    rounded = stored_as(exact, "bfloat16", objective, series[4], tokens)
    both = project(objective, series, [exact, rounded], tokens)
    mine, theirs = (allocate(projections) for projections in both)
    # The same whole for any rows: what the parts do not take, the residual does.
    torch.testing.assert_close(mine.quadrature_error, theirs.quadrature_error, rtol=0, atol=3e-6)
    largest = both[0].gradients.abs().amax((0, 2))
    off = (both[0].gradients - both[1].gradients).abs().amax((0, 2)) / largest
    assert rounded.rounding is not None
    assert 0 < float(off.max()) < 3 * rounded.rounding.slopes
    along = rounded.rows.double() @ (series[5] - series[4]).double()
    torch.testing.assert_close(both[1].displacements[4].double(), along, rtol=1e-4, atol=1e-6)
    split = EvaluatedSplit(objective, series, tokens)
    damages = [split.damage(project_out(split, basis[0])).change for basis in (exact, rounded)]
    assert float((damages[0] - damages[1]).norm()) < 0.02 * float(damages[0].norm())


def test_storage_by_name():
    objective, series, tokens = curved_series()
    inputs = BasisInputs(objective, series, tokens)
    assert build_basis("random", inputs, 3).rounding is None
    half = build_basis("random", inputs, 3, storage="bfloat16")
    assert half.entries.dtype == torch.bfloat16
    turn = torch.linalg.qr(torch.randn(3, 3))[0]
    assert half.rotated(turn, "turned").entries.dtype == torch.float32
    with pytest.raises(ValueError, match="got 'int8'; correct"):
        build_basis("random", inputs, 3, storage="int8")
    tiny = unlabelled("tiny", torch.eye(1, series.space.size) * 0.9)
    with pytest.raises(ValueError, match="miss being orthonormal"):
        stored_as(tiny, "float16", objective, series[0], tokens)
