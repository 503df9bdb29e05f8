"""One thread and no hub for every test, so that sums come out in the same order everywhere."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Fixed thread count: a sum split over threads rounds differently."""
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """An explicit generator, the same for every test."""
    return torch.Generator().manual_seed(20250)
