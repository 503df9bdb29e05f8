"""Analyses of one recorded run at many settings, from one set of projections; no model is needed.

Thinning a series needs no new derivative: gradients at the kept checkpoints are known, and
displacements between them add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from experiments.reproduce.rows import TokenSplits
from polca_edit.allocation.allocate import Projections, Rule, allocate, explained_share
from polca_edit.clusters.breakthroughs import flat_after, is_hidden
from polca_edit.clusters.comparators import SkillScore, carry_scores, outlier_share
from polca_edit.clusters.density import ClusterSettings, cluster_trajectories
from polca_edit.tokens import TokenSet


def thinned(projections: Projections, stride: int, vectors: Sequence[int] | None = None) -> Projections:
    """Every ``stride``-th checkpoint (the last one always), and only some vectors.

    The residual direction of a longer interval was not measured, so its fields are NaN: what the
    vectors are given is exact, the residual is not known.
    """
    last = len(projections.steps) - 1
    kept = torch.tensor(sorted({*range(0, last + 1, stride), last}))
    chosen = torch.arange(projections.gradients.shape[1]) if vectors is None else torch.tensor(list(vectors))
    start = torch.zeros_like(projections.displacements[:1])
    places = torch.cat([start, projections.displacements.cumsum(0)])
    unknown = torch.full((len(kept) - 1, projections.losses.shape[1]), float("nan"))
    nan = torch.full((len(kept) - 1,), float("nan"))
    p = projections
    return replace(
        p,
        steps=p.steps[kept],
        losses=p.losses[kept],
        gradients=p.gradients[kept][:, chosen],
        displacements=places[kept].diff(dim=0)[:, chosen],
        residual_start=unknown.to(p.losses),
        residual_end=unknown.to(p.losses),
        residual_norms=nan,
        step_norms=nan,
        interior_interval=None,
        interior_position=None,
        interior_weight=None,
        end_weights=None,
        interior_gradients=None,
        interior_residual=None,
        mean_gradients=None if p.mean_gradients is None else p.mean_gradients[kept][:, chosen],
        curvatures=None if p.curvatures is None else p.curvatures[kept[:-1]][:, chosen],
    )


@dataclass(frozen=True)
class Branch:
    """One way to analyse a run.

    Attributes:
        vectors: the first so many of each basis.
        stride: thinning of the recorded series.
        scaled: trajectories divided by their own maximum.
        by_output: tokens of each output digit clustered apart.
        min_cluster: share of the tokens.
        rule: quadrature.
    """

    vectors: int
    stride: int
    scaled: bool
    by_output: bool
    min_cluster: float
    rule: Rule

    def settings(self, base: ClusterSettings) -> ClusterSettings:
        """Clustering of this branch."""
        return replace(base, scaled=self.scaled, by_output=self.by_output, min_cluster_share=self.min_cluster)


def branches(vectors: Sequence[int], strides: Sequence[int], rules: Sequence[Rule]) -> Iterator[Branch]:
    """The full grid over vectors, spacing, rule, scaling, grouping and smallest cluster."""
    for count in vectors:
        for stride in strides:
            for rule in rules:
                for scaled in (False, True):
                    for by_output in (False, True):
                        for share in (0.02, 0.03):
                            yield Branch(count, stride, scaled, by_output, share, rule)


def outcome(
    projections: Projections, branch: Branch, tokens: TokenSet, base: ClusterSettings, delta: int
) -> dict[str, Any]:
    """Explained share and the best carry cluster (by homogeneity) of one basis in one branch."""
    chosen = range(min(branch.vectors, projections.gradients.shape[1]))
    own = thinned(projections, branch.stride, chosen)
    allocation = allocate(own, branch.rule)
    paths = allocation.projected_loss()
    clusters = cluster_trajectories(paths, branch.settings(base), tokens.output_of)
    best = best_carry(clusters, tokens)
    tau = flat_after(own.losses.double().mean(1), own.steps)
    room = min(delta, int(own.steps[-1] - own.steps[0]) // 2)
    hidden = [
        is_hidden(paths[:, found.vector].T[found.members(c)], own.steps, room, tau)
        for found in clusters
        for c in range(found.count)
    ]
    attributed = float(allocation.values.sum((0, 1)).double().mean())
    exact = float(allocation.exact.sum(0).double().mean())
    return {
        "explained_share": explained_share(attributed, exact),
        "homogeneity": best.homogeneity if best else 0.0,
        "f1": best.f1 if best else 0.0,
        "vector": best.vector if best else None,
        "clusters": len(hidden),
        "hidden_share": sum(hidden) / len(hidden) if hidden else 0.0,
        "outlier_share": outlier_share(clusters),
    }


def best_carry(clusters: Sequence[Any], tokens: TokenSet, min_share: float = 0.02) -> SkillScore | None:
    """The most homogeneous eligible carry cluster."""
    splits = TokenSplits(tokens, tokens)
    scores = carry_scores(clusters, tokens.skills["carry"], splits.counted_in(tokens), min_share=min_share)
    return scores[0] if scores else None


def conclusions(found: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """What one branch says, basis name -> outcome. Names are sentences; False is the opposite.

    A basis without any eligible cluster has homogeneity 0.
    """

    def share(name: str) -> float:
        value = found[name]["explained_share"]
        return 0.0 if value is None else float(value)

    def pure(name: str) -> float:
        return float(found[name]["homogeneity"])

    return {
        "Hessian vectors explain under a tenth of the loss change": abs(share("hessian")) < 0.1,
        "trajectory + secant explains within 10 %": abs(share("trajectory_secant") - 1) <= 0.1,
        "Hessian carry clusters are purer than random ones": pure("hessian") > pure("random"),
        "ordered Hessian is purer than shuffled": pure("hessian") > pure("shuffled_hessian"),
        "Hessian is purer than trajectory + secant": pure("hessian") > pure("trajectory_secant"),
        "a Hessian carry cluster is 90 % pure": pure("hessian") >= 0.9,
        "Hessian clusters hide more breakthroughs than random": (
            found["hessian"]["hidden_share"] > found["random"]["hidden_share"]
        ),
    }


def survival(results: Sequence[Mapping[str, Any]], factors: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per conclusion: share of branches where it holds, overall and at each level of each factor.

    Args:
        results: one per branch, with the factors and ``conclusions``.
        factors: names of the settings that vary.
    """
    table: dict[str, dict[str, Any]] = {}
    for name in results[0]["conclusions"]:
        held = [bool(r["conclusions"][name]) for r in results]
        levels: dict[str, dict[str, float]] = {}
        for factor in factors:
            groups: dict[str, list[bool]] = {}
            for r, value in zip(results, held, strict=True):
                groups.setdefault(str(r[factor]), []).append(value)
            levels[factor] = {level: sum(v) / len(v) for level, v in groups.items()}
        table[name] = {"share": sum(held) / len(held), "branches": len(held), "levels": levels}
    return table


def group_damage(change: Tensor, tokens: TokenSet) -> dict[str, float | None]:
    """Mean loss change of counted tokens (10s, 100s) with and without a carry, and of all others."""
    counted = TokenSplits(tokens, tokens).counted_in(tokens)
    carry = tokens.skills["carry"]
    masks = {"carry": counted & carry, "no carry": counted & ~carry, "other places": ~counted}
    return {n: float(change[m].double().mean()) if bool(m.any()) else None for n, m in masks.items()}
