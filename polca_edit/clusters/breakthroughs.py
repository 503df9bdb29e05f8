"""Breakthroughs: where a loss decrease accelerates, and whether the exact loss hides it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def breakthrough_start(
    curves: Float[Tensor, "m T"], steps: Int[Tensor, " T"], delta: int
) -> Int[Tensor, " m"]:
    """Step at which each curve's decrease accelerates most (Eqs. 9-10).

    Sign used: the acceleration of a *decrease* over ``delta`` steps,
    [f(t) - f(t + delta)] - [f(t - delta) - f(t)], is maximised over t. The curve is read off at
    t +- delta by linear interpolation.

    >>> curve = torch.tensor([[0.0, 0.0, 0.0, -1.0, -2.0]])
    >>> breakthrough_start(curve, torch.tensor([0, 1, 2, 3, 4]), 1).tolist()
    [2]

    Raises:
        ValueError: if the run is shorter than two deltas.
    """
    inside = (steps - delta >= steps[0]) & (steps + delta <= steps[-1])
    if not bool(inside.any()):
        raise ValueError(
            f"delta must be at most half the run's {int(steps[-1] - steps[0])} steps, got {delta}; "
            "use a smaller one"
        )
    at = steps[inside]
    now = curves[:, inside]
    acceleration = (now - interpolate(curves, steps, at + delta)) - (
        interpolate(curves, steps, at - delta) - now
    )
    return at[acceleration.argmax(1)]


def fitting_delta(wanted: int, steps: Int[Tensor, " T"]) -> int:
    """``wanted``, or the largest spacing that fits around some checkpoint of a shorter run.

    >>> fitting_delta(100, torch.tensor([0, 5, 10, 15, 20, 25])), fitting_delta(3, torch.tensor([0, 5, 10]))
    (10, 3)
    """
    return min(wanted, int(torch.minimum(steps - steps[0], steps[-1] - steps).max()))


def interpolate(
    curves: Float[Tensor, "m T"], steps: Int[Tensor, " T"], at: Int[Tensor, " n"]
) -> Float[Tensor, "m n"]:
    """Curves at other steps, linearly between checkpoints."""
    right = torch.searchsorted(steps, at).clamp(1, len(steps) - 1)
    low, high = steps[right - 1], steps[right]
    share = (at - low).to(curves) / (high - low).to(curves)
    return curves[:, right - 1] * (1 - share) + curves[:, right] * share


def flat_after(mean_loss: Float[Tensor, " T"], steps: Int[Tensor, " T"], share: float = 0.05) -> int:
    """tau: first step after which at most ``share`` of the mean loss's total fall remains."""
    remaining = (mean_loss - mean_loss[-1]) / (mean_loss[0] - mean_loss[-1]).clamp_min(1e-12)
    above = (remaining > share).nonzero()[:, 0]
    return int(steps[min(int(above[-1]) + 1, len(steps) - 1)]) if len(above) else int(steps[0])


def is_hidden(curves: Float[Tensor, "m T"], steps: Int[Tensor, " T"], delta: int, tau: int) -> bool:
    """Whether the mean breakthrough start over a set of curves lies after tau."""
    return bool(breakthrough_start(curves, steps, delta).double().mean() > tau)
