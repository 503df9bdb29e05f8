"""Breakthroughs of curves whose acceleration is known."""

from __future__ import annotations

import pytest
import torch

from polca_edit.clusters.breakthroughs import breakthrough_start, flat_after, interpolate, is_hidden

STEPS = torch.arange(0, 1000, 20)


def hinge(start: float, slope: float = -0.01) -> torch.Tensor:
    """Flat, then falling at a constant rate from ``start`` on."""
    return slope * (STEPS - start).clamp_min(0).double()


@pytest.mark.parametrize("start", [200, 500, 860])
@pytest.mark.parametrize("delta", [20, 60, 100])
def test_a_hinge_starts_where_it_bends(start, delta):
    assert breakthrough_start(hinge(start)[None], STEPS, delta).tolist() == [start]


def test_a_rise_is_no_breakthrough():
    """Sign: a decrease that accelerates. The end of a fall bends the other way."""
    stops = hinge(300) - hinge(600)  # falls from 300 to 600, then flat
    rises = -hinge(700)
    assert breakthrough_start(torch.stack([stops, stops + rises]), STEPS, 100).tolist() == [300, 300]


def test_acceleration_against_a_loop(generator):
    curves = torch.randn(4, len(STEPS), generator=generator, dtype=torch.float64).cumsum(1)
    found = breakthrough_start(curves, STEPS, 60)
    for row, curve in enumerate(curves.tolist()):
        best = max(
            range(3, len(STEPS) - 3),
            key=lambda i, f=curve: (f[i] - f[i + 3]) - (f[i - 3] - f[i]),
        )
        assert int(found[row]) == 20 * best


def test_delta_between_checkpoints_is_read_off_the_line():
    """Delta 30 at 20-step spacing needs values half way between checkpoints."""
    assert breakthrough_start(hinge(400)[None], STEPS, 30).tolist() == [400]


def test_uneven_spacing():
    steps = torch.tensor([0, 10, 30, 70, 150, 310, 630])
    curve = -0.1 * (steps - 150).clamp_min(0).double()
    assert breakthrough_start(curve[None], steps, 120).tolist() == [150]


def test_interpolation_is_exact_on_lines_in_float64():
    steps = torch.tensor([0, 3, 10, 40])
    slope, offset = 1 / 3, 0.1
    curve = (slope * steps.double() + offset)[None]
    at = torch.arange(0, 41)
    assert torch.allclose(interpolate(curve, steps, at)[0], slope * at.double() + offset, rtol=0, atol=1e-13)


def test_delta_longer_than_half_the_run_is_refused():
    with pytest.raises(ValueError, match="at most half the run's 980 steps, got 600"):
        breakthrough_start(hinge(400)[None], STEPS, 600)


def test_flat_after_by_hand():
    steps = torch.tensor([0, 10, 20, 30, 40, 50])
    loss = torch.tensor([2.0, 1.5, 1.1, 1.04, 1.02, 1.0])
    assert flat_after(loss, steps, share=0.05) == 30  # 0.1 of the fall is left at 20, 0.04 at 30
    assert flat_after(loss, steps, share=0.5) == 10
    assert flat_after(loss, steps, share=1.0) == 0
    assert flat_after(torch.tensor([2.0, 1.0, 1.5, 1.0, 1.0, 1.0]), steps) == 30  # a bump counts


def test_hidden_breakthrough_is_one_after_the_mean_loss_is_flat():
    curves = torch.stack([hinge(600), hinge(800)])
    assert is_hidden(curves, STEPS, 100, tau=690)
    assert not is_hidden(curves, STEPS, 100, tau=700)
