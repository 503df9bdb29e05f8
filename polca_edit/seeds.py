"""Generators that cannot meet: one for every purpose, all from the seed of a run."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def generator_for(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator for one purpose of a seed, independent of those of every other seed and purpose.

    It is seeded from the child of ``numpy.random.SeedSequence(seed)`` that the purpose names, so no
    arithmetic on seeds, steps and indices can make two streams the same or shifts of each other.

    Args:
        seed: of the run.
        *purpose: what the draws are for, e.g. ``"random_direction", vector``.

    >>> a, b = generator_for(0, "data", 1), generator_for(1, "data", 0)
    >>> bool((torch.randint(1000, (5,), generator=a) == torch.randint(1000, (5,), generator=b)).all())
    False
    """
    child = np.random.SeedSequence(seed, spawn_key=tuple(_number(part) for part in purpose))
    return torch.Generator().manual_seed(int(child.generate_state(1, np.uint64)[0] >> 1))


def _number(part: str | int) -> int:
    if isinstance(part, int):
        return part
    return int.from_bytes(hashlib.sha256(part.encode()).digest()[:4], "little")
