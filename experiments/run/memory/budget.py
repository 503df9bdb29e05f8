"""One memory budget for a run, and what of it each kind of work may hold.

Weights, gradients and a few vectors of N entries are needed in any case; the budget is shared by what
grows with vectors, products and tokens. Without a budget the defaults of the library hold.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from experiments.config import BasisConfig, RunConfig
from polca_edit.basis.streamed import HELD

#: Vectors of N entries that are needed however small the budget is: three cached checkpoints, the model,
#: its weights in their own storage, tangents, a gradient, a product and what Lanczos takes it from; and how
#: many more there must be room for.
FIXED_VECTORS, LEAST_VECTORS = 9, 2
#: Bytes that displacements may take where there is no budget.
DISPLACEMENTS = 1 << 30
UNITS = {"": 1e9, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class MemoryShares:
    """Bytes by kind of work.

    Attributes:
        rows: earlier vectors held while a basis is built, and Krylov vectors; above it they lie on disk.
        curvature: linearised batches of a Hessian; above it they are linearised anew.
        slopes: what the adjoint route keeps of a batch.
        displacements: displacements held while those of a trajectory are multiplied, in number: the more,
            the fewer times the series is read.
    """

    rows: int
    curvature: int = 4 << 30
    slopes: int = 1 << 30
    displacements: int = HELD


def memory_shares(config: RunConfig, parameters: int) -> MemoryShares:
    """The shares of a config's budget for a model of N parameters.

    Raises:
        ValueError: for a budget that the model alone exceeds.
    """
    rows = round(config.basis_memory_gb * 1e9)
    vector = config.itemsize * parameters
    most = max(HELD, DISPLACEMENTS // vector)
    if config.memory_gb is None:
        return MemoryShares(rows, displacements=most)
    budget = round(config.memory_gb * 1e9)
    left = budget - FIXED_VECTORS * vector
    least = FIXED_VECTORS + LEAST_VECTORS
    if left < LEAST_VECTORS * vector:
        raise ValueError(
            f"a memory budget must hold {least} vectors of {parameters:,} weights, "
            f"{least * vector / 1e9:.1f} GB, got {config.memory_gb:g} GB; raise --memory"
        )
    held = max(1, min(most, left // vector))
    return MemoryShares(min(rows, left // 2), left // 3, min(1 << 30, left // 3), held)


def krylov_in_files(config: RunConfig, spec: BasisConfig, row: int, share: int) -> bool:
    """Whether Krylov vectors lie in files: with a budget, where they could exceed the share of rows.

    Args:
        config: the run.
        spec: the basis; a checkpoint may use up its products, two vectors each.
        row: bytes of a vector.
        share: bytes that rows may take.
    """
    return config.memory_gb is not None and 2 * spec.max_products * row > share


def parse_memory(text: str | None) -> float | None:
    """Gigabytes (10^9 bytes) of ``16GB``, ``800MB``, ``1.5GiB`` or a plain number of gigabytes.

    >>> parse_memory("16GB"), parse_memory("500MB"), parse_memory(None)
    (16.0, 0.5, None)

    Raises:
        ValueError: for anything else.
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise ValueError(f"--memory must be a size such as 16GB or 800MB, got '{text}'")
    return float(found[1]) * UNITS[found[2].upper()] / 1e9
