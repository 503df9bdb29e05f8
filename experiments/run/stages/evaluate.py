"""Stage ``evaluate``: the planned table of damage on the evaluate split."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.run.run import Run
from experiments.run.run_record import Opening, open_evaluate
from experiments.run.stages.clusters import load_clusters
from experiments.run.stages.damage import evaluated, vector_rows
from experiments.run.summary.records import DamageRow, RuleScore
from interventions.damage import EvaluatedSplit
from polca_edit.artifacts import load_record, save_record
from polca_edit.basis.record import Basis
from polca_edit.clusters.agreement import skill_scores
from polca_edit.clusters.density import VectorClusters
from polca_edit.clusters.membership import MembershipRule, fit_rule
from polca_edit.tokens import TokenSet


@dataclass(frozen=True)
class PlannedPair:
    """A cluster that will be looked at, and the rule that finds its tokens on the evaluate split."""

    basis: str
    vector: int
    cluster: int
    rule: str
    rule_auc: float | None


@dataclass(frozen=True)
class EvaluatePlan:
    """What ``run`` will look at on the evaluate split: every vector, and every cluster by its rule.

    Attributes:
        reference: index of the reference checkpoint.
        evaluate_tokens: fingerprint of the split.
        pairs: one per cluster.
        operator: what is done along each vector.
        dose: how much of it.
    """

    reference: int
    evaluate_tokens: str
    pairs: tuple[PlannedPair, ...]
    operator: str = "project_out"
    dose: float = 1.0


@dataclass(frozen=True)
class EvaluatedBasis:
    """One basis on the evaluate split."""

    scores: tuple[RuleScore, ...]
    damage: tuple[DamageRow, ...]


@dataclass(frozen=True)
class EvaluateRecord:
    """The whole table, and the plan it was made under."""

    opening: Opening
    bases: dict[str, EvaluatedBasis]


@dataclass(frozen=True)
class RuledCluster:
    """A select cluster with the rule on input features that was fitted to it."""

    clusters: VectorClusters
    cluster: int
    rule: MembershipRule

    @property
    def auc(self) -> float | None:
        """Held-out AUC of the rule, None where it could not be measured."""
        return None if self.rule.auc != self.rule.auc else self.rule.auc


def ruled_clusters(run: Run, label: str) -> list[RuledCluster]:
    """Every cluster of a basis with its rule."""
    select, seed = run.task.splits.select, run.config.seed
    return [
        RuledCluster(found, cluster, fit_rule(select, found.members(cluster), seed=seed))
        for found in load_clusters(run, label)
        for cluster in range(found.count)
    ]


def make_plan(run: Run, ruled: dict[str, list[RuledCluster]]) -> EvaluatePlan:
    """What will be looked at, from the select split alone."""
    pairs = [
        PlannedPair(
            label,
            one.clusters.vector,
            one.cluster,
            one.rule.description,
            None if one.auc is None else round(one.auc, 6),
        )
        for label, clusters in ruled.items()
        for one in clusters
    ]
    return EvaluatePlan(run.config.damage.reference, run.task.splits.evaluate.fingerprint(), tuple(pairs))


def run_evaluate(run: Run, stage: str) -> None:
    """Fit rules and write the plan, then measure the planned pairs and every vector alone."""
    path = run.directory.evaluated
    with run.directory.stage(stage, run.key(stage), [path], run.objective.passes):
        ruled = {spec.label: ruled_clusters(run, spec.label) for spec in run.config.bases}
        opening = open_evaluate(run, make_plan(run, ruled))
        place = evaluated(run, run.task.splits.evaluate)
        bases = {label: _evaluated_basis(run, place, label, found) for label, found in ruled.items()}
        # How often is counted in run.json; a run that was stopped here is the same run.
        save_record(path, EvaluateRecord(dataclasses.replace(opening, times=1), bases))


def _evaluated_basis(
    run: Run, place: EvaluatedSplit, label: str, ruled: list[RuledCluster]
) -> EvaluatedBasis:
    basis = load_record(Basis, run.directory.basis(label))
    masks: list[dict[int, Tensor]] = [{} for _ in range(len(basis))]
    scores = []
    for one in ruled:
        mask = one.rule.assign(place.tokens)
        if bool(mask.any()):
            masks[one.clusters.vector][one.cluster] = mask
            scores.append(_score(one, mask, place.tokens))
    damage, _ = vector_rows(place, "evaluate", basis, masks, ())
    return EvaluatedBasis(tuple(scores), tuple(row for own in damage for row in own))


def _score(one: RuledCluster, mask: Tensor, tokens: TokenSet) -> RuleScore:
    as_cluster = dataclasses.replace(
        one.clusters, labels=torch.where(mask, 0, -1), dropped=torch.zeros_like(mask)
    )
    agreement = skill_scores(as_cluster, 0, tokens.skills)
    return RuleScore(
        vector=one.clusters.vector,
        cluster=one.cluster,
        tokens=int(mask.sum()),
        homogeneity={name: score.homogeneity for name, score in agreement.items()},
        recall_all={name: score.recall_all for name, score in agreement.items()},
        lift={name: score.lift for name, score in agreement.items()},
        rule=one.rule.description,
        rule_auc=one.auc,
    )
