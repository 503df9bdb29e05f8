"""Matrix products in fewer bits, for as long as something lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def matrix_products(products: torch.dtype | None) -> Iterator[None]:
    """Take matrix products of float32 tensors in bfloat16, with sums in float32; for other types do nothing.

    It is torch's own setting for the whole process, put back at the end. On processors without units for
    bfloat16, and for tensors in float64, nothing changes.

    >>> with matrix_products(torch.bfloat16):
    ...     torch.get_float32_matmul_precision()
    'medium'
    >>> torch.get_float32_matmul_precision()
    'highest'
    """
    if products != torch.bfloat16:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
