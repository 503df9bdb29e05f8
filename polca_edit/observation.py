"""The whole observation, pure: checkpoints + tokens + settings -> records."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from polca_edit.allocation.allocate import Allocation, CheckpointMap, Projections, Rule, allocate
from polca_edit.allocation.terms import project_for
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.clusters.breakthroughs import fitting_delta, flat_after, is_hidden
from polca_edit.clusters.density import ClusterSettings, VectorClusters, cluster_trajectories
from polca_edit.clusters.hypotheses import Hypothesis
from polca_edit.clusters.membership import fit_rule
from polca_edit.clusters.names import name_group
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
    """Everything observed along one basis on one token set.

    Attributes:
        projections: stored derivatives along the basis.
        allocation: loss change given to each vector in each interval, nats.
        clusters: per vector, the tokens whose projected loss moves together.
        hidden: (vector, cluster) -> whether its mean breakthrough lies after ``tau``.
        tau: optimiser step after which the mean loss falls no more.
        tokens: (M) the tokens.
        basis: the vectors; None where the record was made from stored projections alone.
        settings: what it was made with.
    """

    projections: Projections
    allocation: Allocation
    clusters: tuple[VectorClusters, ...]
    hidden: dict[tuple[int, int], bool]
    tau: int
    tokens: TokenSet
    basis: Basis | None = None
    settings: ObserveSettings = field(default_factory=ObserveSettings)

    def members(self, tokens: TokenSet) -> dict[str, Tensor]:
        """Cluster name -> (M,) its tokens among any tokens, found by rules that never see a loss.

        On the tokens of the observation itself these are the clusters as they are.
        """
        if tokens.fingerprint() == self.tokens.fingerprint():
            return {name: mask for found in self.clusters for name, mask in found.masks().items()}
        return {
            name: fit_rule(self.tokens, mask, seed=0).assign(tokens)
            for found in self.clusters
            for name, mask in found.masks().items()
        }

    def hypotheses(
        self, name: str | None = None, *, least: int = 20, seed: int = 0
    ) -> tuple[Hypothesis, ...]:
        """POLCA's own pairs: each vector with each of its clusters, found again by a loss-free rule.

        Args:
            name: what the basis is called in records; its kind by default.
            least: tokens a cluster must have.
            seed: of the membership rules.

        Raises:
            ValueError: where the vectors are not at hand, or tokens have no features to make rules of.
        """
        if self.basis is None:
            raise ValueError(
                "hypotheses undo movement along the basis, this observation has none; pass basis= to analyse"
            )
        label = name or self.basis.kind
        return tuple(
            Hypothesis(
                f"{label} {found.vector}:{cluster}",
                self.basis.rows[found.vector][None],
                name_group(
                    self.tokens, found.members(cluster), f"{label} {found.vector}:{cluster}", seed=seed
                ),
                "polca",
                label,
                (found.vector,),
                cluster,
                span=self.basis.rows,
                supervised=self.basis.supervised,
                why="its tokens' projected loss moves together along the vector",
            )
            for found in self.clusters
            if found.kept
            for cluster in range(found.count)
            if int(found.members(cluster).sum()) >= least
        )


def analyse(
    projections: Projections,
    tokens: TokenSet,
    settings: ObserveSettings | None = None,
    *,
    basis: Basis | None = None,
) -> Observation:
    """Allocate, cluster and date breakthroughs from stored projections; no model is needed.

    Args:
        projections: from :func:`~polca_edit.allocation.allocate.project` on the same tokens.
        tokens: the tokens.
        settings: quadrature rule and clustering.
        basis: the vectors, kept in the record for what is made of it later.
    """
    settings = settings or ObserveSettings()
    allocation = allocate(projections, settings.rule)
    paths = allocation.projected_loss()
    outputs = tokens.output_of if settings.clusters.by_output else None
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
    return Observation(projections, allocation, clusters, hidden, tau, tokens, basis, settings)


def observe(
    objective: Objective,
    checkpoints: Checkpoints,
    basis: Basis,
    tokens: TokenSet,
    settings: ObserveSettings | None = None,
    *,
    mapped: CheckpointMap = map,
) -> Observation:
    """Project, allocate and cluster one basis on one token set.

    Several bases share their forward passes in one call of
    :func:`~polca_edit.allocation.allocate.project`, then :func:`analyse` for each.

    Args:
        objective: the token loss.
        checkpoints: the whole series, at least three.
        basis: orthonormal vectors, from :mod:`polca_edit.basis`.
        tokens: where derivatives are taken.
        settings: quadrature rule and clustering.
        mapped: runs the checkpoints; pass a caching map to resume.

    Raises:
        ValueError: for a series that is too short, or losses that are not finite.
    """
    settings = settings or ObserveSettings()
    (projections,) = project_for(settings.rule, objective, checkpoints, [basis], tokens, mapped=mapped)
    return analyse(projections, tokens, settings, basis=basis)
