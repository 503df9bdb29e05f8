"""The best relabelling of a model's outputs: an output bias and a permutation of the classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Refit:
    """A relabelling of the outputs: logit of class k becomes scale * logit[order[k]] + bias[k].

    Attributes:
        order: (V,) permutation.
        bias: (V,) nats.
        scale: 1, or fitted (then of either sign).
    """

    order: Int[Tensor, " V"]
    bias: Float[Tensor, " V"]
    scale: float = 1.0

    def apply(self, logits: Float[Tensor, "M V"]) -> Float[Tensor, "M V"]:
        """Relabelled logits."""
        return self.scale * logits[:, self.order] + self.bias


def _fit_bias(
    logits: Tensor, answers: Tensor, with_scale: bool, start: float = 1.0
) -> tuple[Tensor, float, float]:
    bias = torch.zeros(logits.shape[1], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(start, dtype=torch.float64, requires_grad=with_scale)
    values = logits.double()
    optimiser = torch.optim.LBFGS(
        [bias, scale] if with_scale else [bias], max_iter=100, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        # A tiny ridge keeps the bias finite for a class that never occurs.
        loss = nn.functional.cross_entropy(scale * values + bias, answers) + 1e-5 * bias.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        final = float(nn.functional.cross_entropy(scale * values + bias, answers))
    return bias.detach(), float(scale.detach()), final


def best_permutation(logits: Float[Tensor, "M V"], answers: Int[Tensor, " M"]) -> Int[Tensor, " V"]:
    """The permutation of classes with the least cross-entropy.

    The softmax normaliser does not depend on the order, so the sum of chosen logits is an
    assignment problem and the Hungarian answer is exact.
    """
    from scipy.optimize import linear_sum_assignment

    classes = logits.shape[1]
    gain = np.zeros((classes, classes))
    for k in range(classes):
        chosen = logits[answers == k]
        if len(chosen):
            gain[k] = chosen.double().sum(0).numpy()
    rows, columns = linear_sum_assignment(gain, maximize=True)
    order = torch.zeros(classes, dtype=torch.long)
    order[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return order


def fit_relabelling(
    logits: Float[Tensor, "M V"], answers: Int[Tensor, " M"], *, with_scale: bool = False
) -> Refit:
    """Best output bias and permutation (with ``with_scale`` also a multiple of either sign).

    The identity and the Hungarian permutation are tried; the better one on these tokens is kept.
    """
    best: tuple[float, Refit] | None = None
    for order in (torch.arange(logits.shape[1]), best_permutation(logits, answers)):
        for start in (1.0, -1.0) if with_scale else (1.0,):
            bias, scale, loss = _fit_bias(logits[:, order], answers, with_scale, start)
            if best is None or loss < best[0]:
                best = loss, Refit(order, bias.to(logits), scale)
    assert best is not None
    return best[1]
