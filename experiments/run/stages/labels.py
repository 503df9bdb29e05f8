"""Labels of a run's clusters, for ``labels/NAME.json`` and ``polca-edit label``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.run.run import Run
from experiments.run.stages.clusters import load_clusters, load_observation
from experiments.run.stages.label_records import (
    EXACT_LOSS,
    BasisLabels,
    ClusterLabel,
    TagRecord,
    TransferredLabel,
)
from polca_edit.allocation.allocate import Projections, allocate
from polca_edit.allocation.terms import project_for
from polca_edit.artifacts import load_record, save_record
from polca_edit.basis.record import Basis
from polca_edit.clusters.comparators import cluster_both
from polca_edit.clusters.density import ClusterSettings, VectorClusters, cluster_trajectories
from polca_edit.clusters.features import exact_loss
from polca_edit.clusters.labels import LABEL_AUC, distinct, overlap, rule_label, tag_label, transferred_auc
from polca_edit.clusters.medoid import nearest_to_medoid
from polca_edit.tokens import TokenSet

CONTEXTS = 10


def label_clusters(run: Run, basis: str) -> BasisLabels:
    """Labels of every cluster of one basis, and how much clusters overlap."""
    return _labelled(run, load_clusters(run, basis), load_observation(run, basis).allocation.projected_loss())


def label_exact_losses(run: Run) -> BasisLabels:
    """The rival without a basis: clusters of the exact losses, by the same settings, labelled alike."""
    projections = load_record(Projections, run.directory.projections(run.config.bases[0].label))
    paths = exact_loss(projections).paths
    settings = ClusterSettings(**run.config.clusters.model_dump())
    return _labelled(run, cluster_trajectories(paths, settings), paths)


def _labelled(run: Run, found_clusters: Sequence[VectorClusters], paths: Tensor) -> BasisLabels:
    """Labels of clusters found on the select split; ``paths`` are the (T, K, M) trajectories clustered."""
    clusters, members = [], {}
    for found in found_clusters:
        for number in range(found.count):
            member = found.members(number)
            clusters.append(_label(run, found.vector, number, member, paths[:, found.vector].T))
            members[f"{found.vector}:{number}"] = member
    return BasisLabels(
        threshold=LABEL_AUC,
        clusters=tuple(clusters),
        overlap=tuple(tuple(row) for row in overlap(members).tolist()) if members else (),
        distinct_groups=tuple(tuple(group) for group in distinct(members)),
        vectors_kept=sum(found.kept for found in found_clusters),
        vectors_with_rule=len({c.vector for c in clusters if c.counts}),
        vectors_with_tags=len({c.vector for c in clusters if c.tags is not None and c.tags.found}),
        clusters_with_rule=sum(c.counts for c in clusters),
    )


def _label(run: Run, vector: int, number: int, member: Tensor, paths: Tensor) -> ClusterLabel:
    tokens = run.task.splits.select
    rule = rule_label(tokens, member, seed=run.config.seed)
    return ClusterLabel(
        vector=vector,
        cluster=number,
        tokens=int(member.sum()),
        rule=rule.text,
        auc=rule.auc,
        auc_shuffled=rule.auc_shuffled,
        coverage=rule.coverage,
        precision=rule.precision,
        support=rule.support,
        base_rate=rule.base_rate,
        counts=rule.counts,
        contexts=_contexts(tokens, member, paths),
        tags=_tags(run, member),
    )


def _tags(run: Run, member: Tensor) -> TagRecord | None:
    if run.task.tags is None:
        return None
    gold = tag_label(run.task.tags, member, torch.Generator().manual_seed(run.config.seed))
    return TagRecord(gold.text, gold.found, gold.support, gold.coverage, gold.lift, gold.chance)


def transferred_labels(run: Run, basis: str, tokens: TokenSet) -> list[TransferredLabel]:
    """How well each cluster's rule names the tokens of another text that move like the cluster.

    Those tokens get their cluster from their own projected losses, by the prediction of the clustering
    that was fitted on select; the rule never sees a loss.
    """
    settings = ClusterSettings(**run.config.clusters.model_dump())
    projections = project_for(
        run.config.rule,
        run.objective,
        run.observed(),
        [load_record(Basis, run.directory.basis(basis))],
        tokens,
        curvature=run.task.splits.curvature,
    )[0]
    both = cluster_both(
        load_observation(run, basis).allocation.projected_loss(),
        allocate(projections, run.config.rule).projected_loss(),
        settings,
        seed=run.config.seed,
    )
    rows = []
    for found in both:
        for number in range(found.select.count):
            rule = rule_label(run.task.splits.select, found.select.members(number), seed=run.config.seed)
            member = found.evaluate.members(number)
            there = transferred_auc(rule.rule, tokens, member)
            place = basis, found.select.vector, number
            rows.append(TransferredLabel(*place, rule.text, rule.auc, there, int(member.sum())))
    return rows


def _contexts(tokens: TokenSet, member: Tensor, paths: Tensor) -> tuple[str, ...]:
    """Contexts of the tokens nearest the medoid of the cluster's trajectories."""
    if not tokens.contexts:
        return ()
    rows = member.nonzero()[:, 0]
    nearest = nearest_to_medoid(paths[rows].double().numpy(), CONTEXTS)
    return tuple(tokens.contexts[int(rows[i])] for i in nearest)


def write_labels(run: Run) -> dict[str, BasisLabels]:
    """Label the clusters of every basis, and those of the exact losses as a rival; keep all beside them."""
    result = {spec.label: label_clusters(run, spec.label) for spec in run.config.bases}
    result[EXACT_LOSS] = label_exact_losses(run)
    for name, labels in result.items():
        save_record(run.directory.path / "labels" / f"{name}.json", labels)
    return result
