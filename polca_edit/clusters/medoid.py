"""The trajectories that stand for a cluster: those nearest its medoid."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial.distance import cdist

MEDOID_CANDIDATES = 2000


def nearest_to_medoid(paths: Float[np.ndarray, "m T"], count: int) -> Int[np.ndarray, " n"]:
    """Rows of the ``count`` trajectories nearest the medoid, the medoid first.

    The medoid is the trajectory with the smallest summed Euclidean distance to all others. In
    clusters of more than ``MEDOID_CANDIDATES`` tokens every n-th trajectory stands for the others.

    >>> nearest_to_medoid(np.array([[0.0], [1.0], [1.1], [9.0], [8.0]]), 2).tolist()
    [2, 1]
    """
    stride = -(-len(paths) // MEDOID_CANDIDATES)
    sample = paths[::stride]
    medoid = int(cdist(sample, sample).sum(1).argmin()) * stride
    distance = np.linalg.norm(paths - paths[medoid], axis=1)
    return np.argsort(distance, kind="stable")[:count]
