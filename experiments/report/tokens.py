"""Tokens as the report counts and quotes them: skill masks, exact skill sets, medoids."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

MEDOID_CANDIDATES = 2000


def skill_masks(tokens: pd.DataFrame) -> dict[str, np.ndarray]:
    """Skill name -> (M,) mask, from the comma-separated column."""
    lists = [[name for name in text.split(",") if name] for text in tokens["skills"]]
    names = sorted({name for found in lists for name in found})
    return {name: np.array([name in found for found in lists]) for name in names}


def nearest_to_medoid(paths: np.ndarray, count: int) -> np.ndarray:
    """Rows of the ``count`` trajectories nearest the medoid, the medoid first.

    The medoid is the trajectory with the smallest summed Euclidean distance to all others. In
    clusters of more than ``MEDOID_CANDIDATES`` tokens every n-th trajectory stands for the others.

    >>> nearest_to_medoid(np.array([[0.0], [1.0], [1.1], [9.0]]), 2).tolist()
    [2, 1]
    """
    stride = -(-len(paths) // MEDOID_CANDIDATES)
    sample = torch.from_numpy(np.ascontiguousarray(paths[::stride])).double()
    everything = torch.from_numpy(np.ascontiguousarray(paths)).double()
    medoid = int(torch.cdist(sample, sample).sum(1).argmin()) * stride
    distance = (everything - everything[medoid]).norm(dim=1)
    nearest: np.ndarray = distance.argsort(stable=True)[:count].numpy()
    return nearest


def exact_combinations(skills: Mapping[str, np.ndarray], most: int = 9) -> dict[str, np.ndarray]:
    """Tokens by their exact set of skills: a partition, where the skills themselves overlap.

    A skill ``a@b`` makes its parts ``a`` and ``b`` redundant in the name. The ``most`` commonest
    sets are kept apart, the rest is "other".

    >>> sets = exact_combinations({"carry": np.array([1, 0]) > 0, "10s": np.array([1, 1]) > 0})
    >>> {name: mask.tolist() for name, mask in sets.items()}
    {'10s': [False, True], '10s + carry': [True, False]}
    """
    if not skills:
        return {}
    names = list(skills)
    table = np.stack([skills[name] for name in names], 1)
    sets: dict[str, np.ndarray] = {}
    for pattern in np.unique(table, axis=0):
        found = [name for name, has in zip(names, pattern, strict=True) if has]
        parts = {part for name in found if "@" in name for part in name.split("@")}
        label = " + ".join(name for name in found if name not in parts) or "no skill"
        sets[label] = sets.get(label, np.zeros(len(table), dtype=bool)) | (table == pattern).all(1)
    if len(sets) > most:
        kept = sorted(sets, key=lambda name: -int(sets[name].sum()))[: most - 1]
        rest = ~np.any([sets[name] for name in kept], axis=0)
        sets = {**{name: sets[name] for name in kept}, "other": rest}
    return dict(sorted(sets.items(), key=lambda item: (item[0] == "other", item[0])))
