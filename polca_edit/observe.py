"""The whole observation, pure: checkpoints + tokens + settings -> records.

The pipeline null of the causal test calls the same functions on reference bases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from polca_edit.allocation.allocate import Allocation, CheckpointMap, Projections, Rule, allocate, project
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.clusters.breakthroughs import fitting_delta, flat_after, is_hidden
from polca_edit.clusters.density import ClusterSettings, VectorClusters, cluster_trajectories
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet


@dataclass(frozen=True)
class ObserveSettings:
    """How derivatives are integrated and trajectories clustered.

    Attributes:
        rule: quadrature rule.
        clusters: clustering.
        breakthrough_delta: Delta of Eqs. 9-10 in optimiser steps.
    """

    rule: Rule = "trapezoid"
    clusters: ClusterSettings = field(default_factory=ClusterSettings)
    breakthrough_delta: int = 100


@dataclass(frozen=True)
class Observation:
    """Everything observed along one basis on one token set."""

    projections: Projections
    allocation: Allocation
    clusters: tuple[VectorClusters, ...]
    hidden: dict[tuple[int, int], bool]
    tau: int


def analyse(
    projections: Projections, settings: ObserveSettings, outputs: Int[Tensor, " M"] | None = None
) -> Observation:
    """Allocate, cluster and date breakthroughs from stored projections; no model is needed."""
    allocation = allocate(projections, settings.rule)
    paths = allocation.projected_loss()
    clusters = tuple(cluster_trajectories(paths, settings.clusters, outputs))
    steps = projections.steps
    tau = flat_after(projections.losses.double().mean(1), steps)
    # A run shorter than two deltas still has a breakthrough; the largest delta that fits is used.
    delta = fitting_delta(settings.breakthrough_delta, steps)
    hidden = {
        (found.vector, cluster): is_hidden(
            paths[:, found.vector].T[found.members(cluster)], steps, delta, tau
        )
        for found in clusters
        for cluster in range(found.count)
    }
    return Observation(projections, allocation, clusters, hidden, tau)


def observe(
    objective: Objective,
    checkpoints: Checkpoints,
    bases: Sequence[Basis],
    tokens: TokenSet,
    settings: ObserveSettings,
    *,
    mapped: CheckpointMap = map,
) -> list[Observation]:
    """Project, allocate and cluster every basis on one token set."""
    measured = project(objective, checkpoints, bases, tokens, mapped=mapped)
    outputs = tokens.output_of if settings.clusters.by_output else None
    return [analyse(projections, settings, outputs) for projections in measured]


def cluster_masks(observation: Observation) -> dict[tuple[int, int], Tensor]:
    """(vector, cluster) -> (M,) mask of its tokens."""
    return {
        (found.vector, cluster): found.members(cluster)
        for found in observation.clusters
        for cluster in range(found.count)
    }


def kept_vectors(observation: Observation) -> list[int]:
    """Vectors that were not dropped as oscillation."""
    return [found.vector for found in observation.clusters if found.kept]


def skill_means(values: Tensor, tokens: TokenSet) -> dict[str, float]:
    """Mean of a per-token quantity in each skill group."""
    return {
        name: float(values[mask].double().mean())
        for name, mask in tokens.skills.items()
        if bool(torch.any(mask))
    }
