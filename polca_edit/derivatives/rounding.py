"""What slopes lose when their matrix products are taken in fewer bits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from polca_edit.basis.subsets import Directions
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet

#: Sequences on which both ways are compared.
COMPARED = 16


def slope_rounding(
    objective: Objective,
    theta: Float[Tensor, " N"],
    rows: Float[Tensor, "K N"] | Directions,
    tokens: TokenSet,
    products: torch.dtype,
    *,
    expected: int | None = None,
) -> float:
    """Error of slopes whose matrix products are taken in fewer bits, relative to those in full.

    Zero where the processor has no units for them. Costs the slopes of a few sequences, twice.

    >>> module = torch.nn.Linear(3, 1, bias=False)
    >>> tokens = TokenSet(torch.randn(4, 3), torch.ones(4, 1, dtype=torch.bool), torch.zeros(4))
    >>> objective = Objective(module, lambda m, x: m(x).square())
    >>> slope_rounding(objective, torch.ones(3), torch.eye(3), tokens, torch.float32)
    0.0

    Args:
        objective: the token loss.
        theta: weights.
        rows: directions.
        tokens: a sample; its first sequences are used.
        products: type of the products.
        expected: number of vectors the objective will see in all, for the choice of route.

    Returns:
        The root mean square of the difference over that of the slopes.
    """
    few = tokens.select(torch.arange(min(COMPARED, tokens.sequences)))
    found, exact = (
        objective.directional(theta, rows, few, expected=expected, products=own)[1].double()
        for own in (products, None)
    )
    return float((found - exact).norm() / exact.norm().clamp_min(1e-300))
