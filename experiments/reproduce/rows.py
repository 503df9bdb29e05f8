"""From projections on two splits to the rows of the tables; no model is needed.

Clusters are found on select and carried over to evaluate by the clustering's own rule. Labels choose
one cluster on select, as in the paper; evaluate only scores it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polca_edit.allocation.allocate import Allocation, Projections, allocate, explained_share
from polca_edit.clusters.breakthroughs import flat_after, is_hidden
from polca_edit.clusters.comparators import (
    Method,
    SkillScore,
    SplitClusters,
    agreement,
    bootstrap_stability,
    carry_scores,
    cluster_both,
    density_validity,
    fit_clustering,
    outlier_share,
    score_cluster,
    success_rate,
)
from polca_edit.clusters.density import ClusterSettings, shaped
from polca_edit.clusters.membership import fit_rule
from polca_edit.tokens import TokenSet

#: Smallest exact change of a group whose explained share is judged, nats.
JUDGED = 0.1


@dataclass(frozen=True)
class Variant:
    """How trajectories are shaped and clustered."""

    method: Method
    scaled: bool

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.method}/{'scaled' if self.scaled else 'raw'}"


VARIANTS = (
    Variant("hdbscan", False),
    Variant("hdbscan", True),
    Variant("kmeans", False),
    Variant("kmeans", True),
    Variant("gaussian_mixture", True),
)


@dataclass(frozen=True)
class TokenSplits:
    """The two splits and the labels the tables speak of.

    Attributes:
        select: clusters are found and chosen here.
        evaluate: and scored here.
        skill: the label of the tables.
        counted: skills whose tokens count for the 85 % rule.
    """

    select: TokenSet
    evaluate: TokenSet
    skill: str = "carry"
    counted: tuple[str, ...] = ("100s", "10s")

    def counted_in(self, tokens: TokenSet) -> Tensor:
        """Tokens at the places that count."""
        return torch.stack([tokens.skills[name] for name in self.counted]).any(0)


def share_fields(allocation: Allocation, tokens: TokenSet) -> dict[str, Any]:
    """Explained share in the mean and its worst error over judged skill groups; quadrature error."""
    totals = allocation.totals()
    worst, groups = 0.0, {}
    for name, mask in tokens.skills.items():
        own = allocation.totals(mask)
        if abs(own["exact"]) > JUDGED:
            groups[name] = own["attributed"] / own["exact"]
            worst = max(worst, abs(groups[name] - 1))
    return {
        "explained_share": explained_share(totals["attributed"], totals["exact"]),
        "worst_group_share_error": worst,
        "group_shares": groups,
        "quadrature_error": totals["quadrature_error"],
        "exact": totals["exact"],
    }


@dataclass(frozen=True)
class Clustered:
    """One variant's clusters of one family of trajectories.

    Attributes:
        variant: how.
        vectors: per vector, on both splits.
        eligible: carry scores on select, most homogeneous first.
        on_evaluate: the same clusters carried over, in the same order.
    """

    variant: Variant
    vectors: tuple[SplitClusters, ...]
    eligible: tuple[SkillScore, ...]
    on_evaluate: tuple[SkillScore, ...]


def cluster_variants(
    select: Tensor,
    evaluate: Tensor,
    splits: TokenSplits,
    settings: ClusterSettings,
    *,
    falls: bool = True,
    variants: Sequence[Variant] = VARIANTS,
    seed: int = 0,
) -> list[Clustered]:
    """Cluster (T, K, M) trajectories every way, and score each eligible cluster on both splits."""
    result = []
    for variant in variants:
        own = replace(
            settings,
            scaled=variant.scaled,
            drop_rising_tokens=falls and settings.drop_rising_tokens,
            drop_rising_vectors=falls and settings.drop_rising_vectors,
        )
        vectors = cluster_both(select, evaluate, own, method=variant.method, seed=seed)
        chosen = carry_scores(
            [v.select for v in vectors],
            splits.select.skills[splits.skill],
            splits.counted_in(splits.select),
        )
        again = [
            score_cluster(vectors[s.vector].evaluate, s.cluster, splits.evaluate.skills[splits.skill])
            for s in chosen
        ]
        result.append(Clustered(variant, tuple(vectors), tuple(chosen), tuple(again)))
    return result


def hidden_share(
    clustered: Clustered, paths: Tensor, losses: Tensor, steps: Tensor, delta: int
) -> float | None:
    """Share of all clusters on select with a hidden breakthrough; None without clusters."""
    tau = flat_after(losses.double().mean(1), steps)
    delta = min(delta, int(steps[-1] - steps[0]) // 2)
    found = [
        is_hidden(paths[:, v.select.vector].T[v.select.members(c)], steps, delta, tau)
        for v in clustered.vectors
        for c in range(v.select.count)
    ]
    return sum(found) / len(found) if found else None


def carry_fields(
    clustered: Sequence[Clustered],
    paths: Tensor,
    projections: Projections,
    splits: TokenSplits,
    settings: ClusterSettings,
    *,
    delta: int,
    seed: int,
    draws: int = 4,
) -> dict[str, Any]:
    """The carry columns: the cluster with the largest F1 on select, scored on evaluate.

    Args:
        clustered: every variant.
        paths: (T, K, M) trajectories on select.
        projections: on select, for losses and steps.
        splits: labels.
        settings: cluster sizes.
        delta: of the breakthroughs, steps.
        seed: of the bootstrap and of k-means.
        draws: bootstrap samples for the stability of the chosen vector's clustering, which also gets its
            density-based validity on select and its agreement with the skill's labels on evaluate.
    """
    losses, steps = projections.losses, projections.steps
    pairs = [(s, e, c) for c in clustered for s, e in zip(c.eligible, c.on_evaluate, strict=True)]
    best = max(pairs, key=lambda pair: pair[0].f1, default=None)
    # Without an eligible cluster the other columns describe the paper's clustering.
    used = best[2] if best else clustered[0]
    fields: dict[str, Any] = {
        "variant": used.variant.name,
        "hidden_share": hidden_share(used, paths, losses, steps, delta),
        "outlier_share": outlier_share([v.select for v in used.vectors]),
        "success_rate": success_rate([v.select for v in used.vectors]),
        "carry_homogeneity": None,
        "recall_all": None,
        "recall_paper": None,
        "f1": None,
        "stability": None,
        "validity": None,
        "agreement": None,
        "on_select": None,
        "rule": None,
        "by_variant": {c.variant.name: _by_homogeneity(c) for c in clustered},
    }
    if best is None:
        return fields
    on_select, on_evaluate, _ = best
    vector = used.vectors[on_select.vector].select
    fields |= {
        "carry_homogeneity": on_evaluate.homogeneity,
        "recall_all": on_evaluate.recall_all,
        "recall_paper": on_evaluate.recall_paper,
        "f1": on_evaluate.f1,
        "on_select": asdict(on_select),
        "agreement": asdict(
            agreement(
                used.vectors[on_select.vector].evaluate.labels, splits.evaluate.skills[splits.skill].long()
            )
        ),
    }
    kept = ~vector.dropped
    shaped_paths = shaped(paths[:, on_select.vector].T[kept], used.variant.scaled)

    fields["validity"] = density_validity(shaped_paths, vector.labels[kept])

    def again(rows: Tensor) -> Tensor:
        fitted = fit_clustering(
            rows, used.variant.method, tokens=len(vector.labels), settings=settings, seed=seed
        )
        return fitted.labels

    fields["stability"] = bootstrap_stability(
        shaped_paths,
        splits.select.documents[splits.select.sequence_of][kept],
        vector.labels[kept],
        again,
        draws=draws,
        generator=torch.Generator().manual_seed(seed),
    )
    fields["rule"] = _rule_fields(vector.members(on_select.cluster), splits, seed)
    return fields


def _by_homogeneity(clustered: Clustered) -> dict[str, Any] | None:
    """The paper's choice: most homogeneous on select; with the three best on evaluate."""
    if not clustered.eligible:
        return None
    return {
        "select": asdict(clustered.eligible[0]),
        "evaluate": asdict(clustered.on_evaluate[0]),
        "top_three_evaluate": [s.homogeneity for s in clustered.on_evaluate[:3]],
        "clusters": len(clustered.eligible),
    }


def _rule_fields(member: Tensor, splits: TokenSplits, seed: int) -> dict[str, Any]:
    """The chosen cluster's membership rule (input features only), scored on evaluate."""
    rule = fit_rule(splits.select, member, seed=seed)
    assigned = rule.assign(splits.evaluate)
    skill = splits.evaluate.skills[splits.skill]
    both, size = int((assigned & skill).sum()), int(assigned.sum())
    return {
        "text": rule.description,
        "auc": rule.auc,
        "homogeneity": both / size if size else None,
        "recall_all": both / int(skill.sum()),
    }


def projected(projections: Projections, rule: str = "trapezoid") -> Tensor:
    """(T, K, M) projected loss."""
    return allocate(projections, rule).projected_loss()  # type: ignore[arg-type]


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean, smallest and largest over seeds."""
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values), "count": len(values)}


def over_seeds(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """One line per (basis, rotation): each key's mean and range over seeds."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["basis"], row["rotation"]), []).append(row)
    lines = []
    for (basis, rotation), members in groups.items():
        line: dict[str, Any] = {"basis": basis, "rotation": rotation, "seeds": len(members)}
        line["supervised"] = members[0]["supervised"]
        for key in keys:
            known = [float(m[key]) for m in members if m[key] is not None]
            line[key] = interval(known) if known else None
        lines.append(line)
    return lines
