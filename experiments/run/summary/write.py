"""summary.json and tokens.parquet: the machine-readable answer of a run.

Passes are in passes over the select split: one unit is every select sequence through the model
once, and a batch of half as many sequences counts half.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from experiments.run.keys import stage_names
from experiments.run.run import Run
from experiments.run.stages.clusters import load_observation
from experiments.run.stages.damage_rows import DamageRecord
from experiments.run.stages.evaluate import EvaluateRecord
from experiments.run.stages.label_records import BasisLabels
from experiments.run.summary.records import (
    Analysis,
    BasisEntry,
    ClusterEntry,
    Cost,
    LossChange,
    ModelEntry,
    PlanEntry,
    Summary,
    TestedFile,
    TokenCounts,
    VectorEntry,
    VerdictEntry,
    read_summary,
)
from experiments.run.summary.tokens import write_token_table
from polca_edit.allocation.allocate import explained_share, loss_change
from polca_edit.artifacts import from_plain, load_record, to_plain
from polca_edit.basis.record import Basis, capture, random_walk_capture
from polca_edit.checkpoints.files import write_json
from polca_edit.clusters.agreement import skill_scores
from polca_edit.clusters.density import VectorClusters
from polca_edit.clusters.names import name_of
from polca_edit.observation import Observation
from polca_edit.tokens import TokenSet

AGREEMENT = ("homogeneity", "recall_all", "recall_paper", "lift")


def summary_schema() -> dict[str, Any]:
    """The JSON Schema of summary.json."""
    text = (resources.files("experiments.run.summary") / "summary.schema.json").read_text()
    schema: dict[str, Any] = json.loads(text)
    return schema


def write_summary(run: Run) -> dict[str, Any]:
    """Collect all stage records into summary.json (validated) and tokens.parquet; its plain values."""
    values: dict[str, Any] = json.loads(json.dumps(to_plain(collect_summary(run))))
    jsonschema.validate(values, summary_schema())
    run.directory.unseal()
    write_json(run.directory / "summary.json", values)
    write_token_table(run)
    return values


def collect_summary(run: Run) -> Summary:
    """The summary of a finished run, from its records."""
    evaluated = load_record(EvaluateRecord, run.directory.evaluated)
    splits = run.task.splits
    return Summary(
        run.task.name,
        run.config.seed,
        ModelEntry(run.task.space.size, run.config.precision),
        TokenCounts(splits.select.count, splits.evaluate.count, len(run.observed())),
        _cost(run),
        PlanEntry(evaluated.opening.plan, evaluated.opening.exploratory),
        {spec.label: _analysis(run, spec.label, evaluated) for spec in run.config.bases},
    )


def _cost(run: Run) -> Cost:
    names = set(stage_names(run.config))
    records = [r for r in run.directory.stage_records() if r.stage in names]
    unit = run.task.splits.select.sequences
    kinds = ("forward", "backward", "tangent", "hvp")
    return Cost(
        sum(r.seconds for r in records),
        max(r.peak_rss_bytes for r in records),
        {kind: round(sum(r.passes.get(kind, 0.0) for r in records) / unit, 6) for kind in kinds},
    )


def _analysis(run: Run, label: str, evaluated: EvaluateRecord) -> Analysis:
    basis = load_record(Basis, run.directory.basis(label))
    observation, tokens = load_observation(run, label), run.task.splits.select
    change: LossChange = from_plain(LossChange, loss_change(observation.allocation, tokens.skills))
    damage, own = load_record(DamageRecord, run.directory.damage(label)), evaluated.bases[label]
    clusters = [
        _cluster_entry(tokens, found, cluster, observation.hidden[found.vector, cluster])
        for found in observation.clusters
        for cluster in range(found.count)
    ]
    return Analysis(
        change,
        _basis_entry(run, basis, observation, change),
        tuple(_vector_entry(basis, found) for found in observation.clusters),
        tuple(
            _with_found_label(run.directory.path / "labels" / f"{label}.json", entry) for entry in clusters
        ),
        own.scores,
        (*damage.damage, *own.damage),
        damage.controls,
        *_tested(run, label),
    )


def _tested(run: Run, label: str) -> tuple[tuple[VerdictEntry, ...], dict[str, str]]:
    """Verdicts and answers of the last causal test; none where these clusters were not the ones tested."""
    file = run.directory / "verdicts.json"
    tested = load_record(TestedFile, file) if file.exists() else TestedFile()
    if tested.clusters.get(label) != run.key(f"clusters:{label}"):
        return (), {}
    answers = next(({"A": b.A, "P": b.P} for b in tested.bases if b.basis == label), {})
    return tuple(row.entry() for row in tested.rows if row.basis == label), answers


def _basis_entry(run: Run, basis: Basis, observation: Observation, change: LossChange) -> BasisEntry:
    net, path = capture(basis, run.observed())
    norms = observation.projections.step_norms.double().tolist()
    walk_net, walk_path = random_walk_capture(norms, len(basis))
    return BasisEntry(
        basis.kind,
        basis.supervised,
        len(basis),
        net,
        path,
        walk_net,
        walk_path,
        explained_share(change.attributed, change.exact),
        observation.allocation.rule,
        observation.allocation.guarded,
        basis.products,
        observation.tau,
    )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _vector_entry(basis: Basis, found: VectorClusters) -> VectorEntry:
    v = found.vector
    return VectorEntry(
        v,
        int(basis.origins[v]) if int(basis.origins[v]) >= 0 else None,
        _finite(float(basis.eigenvalues[v])),
        _finite(float(basis.residuals[v])),
        found.kept,
        int(found.dropped.sum()),
        found.outlier_share,
    )


def _cluster_entry(tokens: TokenSet, found: VectorClusters, cluster: int, hidden: bool) -> ClusterEntry:
    scores = skill_scores(found, cluster, tokens.skills)
    members = found.members(cluster)
    agreement = {key: {name: getattr(s, key) for name, s in scores.items()} for key in AGREEMENT}
    entry = ClusterEntry(
        vector=found.vector,
        cluster=cluster,
        tokens=int(members.sum()),
        hidden_breakthrough=hidden,
        label=None,
        label_support=0,
        name=name_of(tokens, members, f"{found.vector}:{cluster}"),
        **agreement,
    )
    if not scores:
        return entry
    # The skill that describes the cluster best: the largest F1 of homogeneity and recall.
    label = max(scores, key=entry.f1)
    return replace(entry, label=label, label_support=int((members & tokens.skills[label]).sum()))


def _with_found_label(file: Path, entry: ClusterEntry) -> ClusterEntry:
    """Where no skill is known, the cluster is called what the labelling found (held-out numbers)."""
    if entry.label is not None or not file.exists():
        return entry
    for found in load_record(BasisLabels, file).clusters:
        if (found.vector, found.cluster) == (entry.vector, entry.cluster) and found.counts:
            name = found.rule
            return replace(
                entry,
                label=name,
                label_support=found.support,
                homogeneity={name: found.precision},
                recall_all={name: found.coverage},
                lift={name: found.precision / found.base_rate if found.base_rate else 0.0},
            )
    return entry


def summary_values(path: Path) -> dict[str, Any]:
    """summary.json of a run directory as it is.

    Raises:
        ValueError: if there is none.
    """
    read_summary(path)
    values: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return values
