"""Analyses of one recorded run at many settings, from one set of projections; no model is needed.

Thinning a series needs no new derivative: gradients at the kept checkpoints are known, and
displacements between them add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from experiments.report.figures.studies import Survival
from experiments.study.reproduce.carry import eligible_clusters
from polca_edit.allocation.allocate import Projections, Rule, explained_share
from polca_edit.clusters.density import ClusterSettings
from polca_edit.observation import ObserveSettings, analyse
from polca_edit.tokens import TokenSet

#: What varies: settings of a branch, then of the run.
FACTORS = ("vectors", "stride", "rule", "scaled", "by_output", "min_cluster", "seed", "shape")
#: Smallest carry cluster, share of the tokens.
SMALLEST = 0.02


def thinned(projections: Projections, stride: int, vectors: Sequence[int] | None = None) -> Projections:
    """Every ``stride``-th checkpoint (the last one always), and only some vectors: :func:`kept_at`."""
    last = len(projections.steps) - 1
    return kept_at(projections, sorted({*range(0, last + 1, stride), last}), vectors)


def spaced(projections: Projections, least: int) -> Projections:
    """Checkpoints at least so many steps apart, the first and the last always: :func:`kept_at`."""
    steps = projections.steps.tolist()
    kept = [0]
    for index, step in enumerate(steps[:-1]):
        if step >= steps[kept[-1]] + least:
            kept.append(index)
    return kept_at(projections, [*kept, len(steps) - 1])


def kept_at(
    projections: Projections, indices: Sequence[int], vectors: Sequence[int] | None = None
) -> Projections:
    """Some of the checkpoints, and only some vectors.

    The residual direction of a longer interval was not measured, so its fields are NaN: what the
    vectors are given is exact, the residual is not known.
    """
    kept = torch.tensor(list(indices))
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
    flags = (False, True)
    for count, stride, rule, scaled, by_output, least in product(
        vectors, strides, rules, flags, flags, (0.02, 0.03)
    ):
        yield Branch(count, stride, scaled, by_output, least, rule)


@dataclass(frozen=True)
class Outcome:
    """One basis in one branch.

    Attributes:
        explained_share: attributed over exact change; None where the exact change is too small.
        homogeneity: of the purest eligible carry cluster; 0 without one.
        hidden_share: share of all clusters with a hidden breakthrough; 0 without clusters.
    """

    explained_share: float | None
    homogeneity: float
    hidden_share: float


@dataclass(frozen=True)
class BranchResult:
    """What one branch of one run says.

    Attributes:
        branch: the settings.
        seed: of the run.
        shape: of its model, as the study names it.
        conclusions: sentence -> whether it holds.
    """

    branch: Branch
    seed: int
    shape: str
    conclusions: dict[str, bool]

    def level(self, factor: str) -> str:
        """Level of one factor: of the branch or of the run."""
        return str(getattr(self if factor in ("seed", "shape") else self.branch, factor))


def outcome(projections: Projections, branch: Branch, tokens: TokenSet, base: ObserveSettings) -> Outcome:
    """Explained share, best carry cluster (by homogeneity) and breakthroughs of one basis in one branch."""
    chosen = range(min(branch.vectors, projections.gradients.shape[1]))
    settings = replace(base, rule=branch.rule, clusters=branch.settings(base.clusters))
    seen = analyse(thinned(projections, branch.stride, chosen), tokens, settings)
    scores = eligible_clusters(seen.clusters, tokens, SMALLEST)
    totals, hidden = seen.allocation.totals(), list(seen.hidden.values())
    return Outcome(
        explained_share(totals["attributed"], totals["exact"]),
        scores[0].homogeneity if scores else 0.0,
        sum(hidden) / len(hidden) if hidden else 0.0,
    )


def conclusions(found: Mapping[str, Outcome]) -> dict[str, bool]:
    """What one branch says, basis name -> outcome. Names are sentences; False is the opposite."""
    hessian, rest = found["hessian"], found["trajectory_secant"]
    return {
        "Hessian vectors explain under a tenth of the loss change": abs(hessian.explained_share or 0.0) < 0.1,
        "trajectory + secant explains within 10 %": abs((rest.explained_share or 0.0) - 1) <= 0.1,
        "Hessian carry clusters are purer than random ones": (
            hessian.homogeneity > found["random"].homogeneity
        ),
        "ordered Hessian is purer than shuffled": hessian.homogeneity > found["shuffled_hessian"].homogeneity,
        "Hessian is purer than trajectory + secant": hessian.homogeneity > rest.homogeneity,
        "a Hessian carry cluster is 90 % pure": hessian.homogeneity >= 0.9,
        "Hessian clusters hide more breakthroughs than random": (
            hessian.hidden_share > found["random"].hidden_share
        ),
    }


def survival(results: Sequence[BranchResult]) -> dict[str, Survival]:
    """Conclusion -> share of branches where it holds, overall and at each level of each factor."""
    table: dict[str, Survival] = {}
    for name in results[0].conclusions:
        levels: dict[str, dict[str, list[bool]]] = {factor: {} for factor in FACTORS}
        for result in results:
            for factor in FACTORS:
                levels[factor].setdefault(result.level(factor), []).append(result.conclusions[name])
        shares = {f: {level: sum(h) / len(h) for level, h in own.items()} for f, own in levels.items()}
        held = [result.conclusions[name] for result in results]
        table[name] = Survival(sum(held) / len(held), len(held), shares)
    return table
