"""Two questions about a whole basis: A, are the clustered tokens the ones hurt? P, are its axes special?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from interventions.causal.evidence import Bench, selectivity_of
from interventions.causal.nulls import SpanPool, total_share
from interventions.causal.questions import Answer
from interventions.causal.settings import TestSettings
from interventions.causal.statistics import Array, Bits, capped, rank_p
from interventions.edits import project_out
from polca_edit.clusters.hypotheses import Hypothesis
from polca_edit.clusters.membership import fit_rule
from polca_edit.derivatives.lanczos import orthonormalise
from polca_edit.observation import Observation, analyse
from polca_edit.tokens import TokenSet

PERMUTATIONS = 999


@dataclass(frozen=True)
class Special:
    """P of one basis: selectivity of its axes against rotated axes at the same total damage.

    Attributes:
        answer: yes, no or unclear.
        statistic: mean of the three largest selectivities.
        null: the same for every rotation.
        p: rank of the statistic.
    """

    answer: Answer
    statistic: float
    null: tuple[float, ...]
    p: float | None


@dataclass(frozen=True)
class Aligned:
    """A of one basis: are tokens hurt most by the vector along which they were clustered?

    Attributes:
        answer: yes, no or unclear.
        statistic: mean own entry of the double-centred matrix n(vector, cluster).
        p: by permuting clusters among vectors.
        rotated: the statistic of rotated bases, observed and clustered anew.
        rotated_p: rank of ``compared`` among them.
        auc: vector -> AUC of its damage for membership in its own clusters.
        compared: the statistic on the null's tokens, which rotated bases are measured on.
    """

    answer: Answer
    statistic: float
    p: float | None
    rotated: tuple[float, ...]
    rotated_p: float | None
    auc: Mapping[int, float]
    compared: float = float("nan")


@dataclass(frozen=True)
class BasisAnswer:
    """Both answers for one basis in one run."""

    basis: str
    special: Special
    aligned: Aligned


def three_largest(values: Sequence[float]) -> float:
    """Mean of the three largest values, NaN without any."""
    return float(np.mean(sorted(values)[-3:])) if len(values) else float("nan")


def best_selectivity(change: Array, headroom: Array, groups: Mapping[str, Bits]) -> float:
    """The largest n_g - max n_other over the groups."""
    return max(
        selectivity_of(change, headroom, mask, {k: m & ~mask for k, m in groups.items() if k != name})
        for name, mask in groups.items()
    )


def special_axes(bench: Bench, pool: SpanPool, settings: TestSettings) -> Special:
    """P: are the axes more selective than rotated axes that do the same total damage?"""
    groups = {n: m[bench.kept] for n, m in (bench.parents or bench.tested).items() if m[bench.kept].any()}
    if len(groups) < 2 or not pool.curves:
        return Special("not asked", float("nan"), (), None)
    room = bench.headroom[bench.kept]
    axes = pool.rows if pool.axes is None else pool.axes
    changes = [bench.change(project_out(bench.split, row))[bench.kept] for row in axes]
    own = three_largest([best_selectivity(change, room, groups) for change in changes])
    levels = [total_share(change, room) for change in changes]
    null = [
        three_largest([best_selectivity(change, room, groups) for change in axes])
        for axes in pool.rotated(levels)
        if axes
    ]
    if not null:
        return Special("not asked", own, (), None)
    p = rank_p(own, np.array(null))
    return Special(_answer(own, p, null, settings.level), own, tuple(null), p)


def _answer(own: float, p: float, null: Sequence[float], level: float) -> Answer:
    if p < level:
        return "yes"
    return "no" if own < float(np.median(null)) else "unclear"


def double_centred(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The matrix less its row and column means, plus the grand mean.

    >>> double_centred(np.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [[0.5, -0.5], [-0.5, 0.5]]
    """
    rows, columns = matrix.mean(1, keepdims=True), matrix.mean(0, keepdims=True)
    return np.asarray(matrix - rows - columns + matrix.mean())


def own_entry(matrix: NDArray[np.float64], owner: Sequence[int]) -> float:
    """Mean over clusters of the double-centred entry of their own vector."""
    return float(double_centred(matrix)[list(owner), np.arange(matrix.shape[1])].mean())


def own_share(
    changes: Sequence[Array], headroom: Array, masks: Sequence[Bits], owner: Sequence[int], floor: float
) -> tuple[NDArray[np.float64], list[int]]:
    """(vectors, clusters) share n of every cluster under every vector, and the clusters' own vectors.

    Clusters whose headroom is below max(floor, 3 standard errors) are left out: a share of next to nothing
    says nothing, and one of them would outweigh all others.

    Args:
        changes: per vector (M,) damage, nats.
        headroom: (M,) nats.
        masks: per cluster (M,) members.
        owner: per cluster its vector's place among ``changes``.
        floor: least mean headroom, nats per token.
    """
    usable = [i for i, mask in enumerate(masks) if _has_headroom(headroom[mask], floor)]
    if not usable:
        return np.zeros((len(changes), 0)), []
    table = np.stack([masks[i] for i in usable]).astype(np.float64)
    lost = np.stack([capped(change, headroom) for change in changes]) @ table.T
    return np.asarray(lost / (table @ np.maximum(headroom, 0.0))), [owner[i] for i in usable]


def _has_headroom(headroom: Array, floor: float) -> bool:
    if len(headroom) < 2:
        return False
    return float(headroom.mean()) >= max(floor, 3 * float(headroom.std(ddof=1)) / math.sqrt(len(headroom)))


def aligned_tokens(
    bench: Bench,
    pairs: Sequence[Hypothesis],
    members: Mapping[str, Bits],
    observation: Observation | None,
    settings: TestSettings,
    progress: Callable[[], None] | None = None,
) -> Aligned:
    """A: POLCA's own pairs of one basis, against permuted clusters and against rotated bases.

    Attribution and damage of a token share the same gradient, so tokens clustered along any direction are
    hurt by undoing it; only what rotated bases, observed anew, do not show as well is an answer.

    Args:
        bench: of the run.
        pairs: POLCA's pairs of this basis.
        members: pair name -> (M,) tokens on the unseen split.
        observation: of the basis on select; without it rotated bases cannot be observed.
        settings: of the test.
        progress: called after each rotated basis.
    """
    vectors = sorted({pair.vectors[0] for pair in pairs})
    if len(vectors) < 3:
        return Aligned("not asked", float("nan"), None, (), None, {})
    rows = {pair.vectors[0]: pair.rows for pair in pairs}
    changes = [bench.change(project_out(bench.split, rows[v])) for v in vectors]
    masks = [members[pair.name] for pair in pairs]
    owner = [vectors.index(pair.vectors[0]) for pair in pairs]
    matrix, kept_owner = own_share(changes, bench.headroom, masks, owner, settings.headroom_floor)
    if len(set(kept_owner)) < 3:
        return Aligned("not asked", float("nan"), None, (), None, {})
    own = own_entry(matrix, kept_owner)
    generator = np.random.default_rng(settings.seed + 3)
    drawn = [own_entry(matrix, generator.permutation(kept_owner).tolist()) for _ in range(PERMUTATIONS)]
    p = rank_p(own, np.array(drawn))
    auc = {
        v: _auc(changes[k], np.any([m for m, o in zip(masks, owner, strict=True) if o == k], axis=0))
        for k, v in enumerate(vectors)
    }
    rotated: list[float] = []
    if observation is not None and observation.basis is not None:
        rotated = _rotated(bench, observation, settings, progress)
    # Rotated bases are measured on the null's tokens, so the basis is compared with them there.
    kept = bench.kept
    there, there_owner = own_share(
        [c[kept] for c in changes],
        bench.headroom[kept],
        [m[kept] for m in masks],
        owner,
        settings.headroom_floor,
    )
    compared = own_entry(there, there_owner) if there_owner else float("nan")
    rank = rank_p(compared, rotated) if rotated and there_owner else None
    if rank is None:
        answer: Answer = "unclear" if p < settings.level else "no"
    elif compared < float(np.median(rotated)):
        answer = "no"
    else:
        answer = "yes" if p < settings.level and rank <= settings.level else "unclear"
    return Aligned(answer, own, p, tuple(rotated), rank, auc, compared)


def _auc(change: Array, members: Bits) -> float:
    """Area under the ROC curve of damage for membership; NaN where one class is empty."""
    from sklearn.metrics import roc_auc_score

    if members.all() or not members.any():
        return float("nan")
    return float(roc_auc_score(members, change))


def _rotated(
    bench: Bench, seen: Observation, settings: TestSettings, progress: Callable[[], None] | None
) -> list[float]:
    """The statistic of rotated bases: allocated, clustered, described and undone like the basis itself."""
    generator = torch.Generator().manual_seed(settings.seed + 4)
    size = seen.projections.gradients.shape[1]
    found = []
    for _ in range(settings.observed_rotations):
        turn = orthonormalise(torch.randn(size, size, generator=generator, dtype=torch.float64))
        statistic = rotated_statistic(bench, seen, turn, settings)
        if statistic is not None:
            found.append(statistic)
        if progress is not None:
            progress()
    return found


def rotated_statistic(
    bench: Bench, seen: Observation, turn: torch.Tensor, settings: TestSettings
) -> float | None:
    """Own entry of one rotated basis on the null's documents; None with clusters on fewer than 3 vectors."""
    projections = seen.projections.rotated(turn.T)
    again = analyse(projections, seen.tokens, seen.settings)
    tokens: TokenSet = bench.nulls.tokens
    owner, masks, vectors = [], [], []
    for clusters in again.clusters:
        for cluster in range(clusters.count):
            members = clusters.members(cluster)
            if int(members.sum()) < settings.least:
                continue
            there = fit_rule(seen.tokens, members, seed=settings.seed).assign(tokens).numpy()
            if not there.any():
                continue
            if clusters.vector not in vectors:
                vectors.append(clusters.vector)
            owner.append(vectors.index(clusters.vector))
            masks.append(there)
    if len(vectors) < 3:
        return None
    assert seen.basis is not None
    rows = (turn.to(seen.basis.rows) @ seen.basis.rows)[vectors]
    split = bench.nulls
    changes = list(split.changes(project_out(split, row) for row in rows).numpy())
    matrix, kept = own_share(changes, split.headroom.double().numpy(), masks, owner, settings.headroom_floor)
    return own_entry(matrix, kept) if len(set(kept)) >= 3 else None
