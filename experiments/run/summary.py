"""summary.json and tokens.parquet: the machine-readable answer of a run.

Keys are a promise; ``summary.schema.json`` beside this file states them and is checked on write.
Passes are in passes over the select split: one unit is every select sequence through the model
once, and a batch of half as many sequences counts half.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

from experiments.run.stages import ClusterRecord, Run, load_observation, stage_names
from polca_edit.allocation.allocate import explained_share, loss_change
from polca_edit.artifacts import load_record
from polca_edit.basis.record import Basis, capture, random_walk_capture
from polca_edit.checkpoints.files import write_atomically, write_json
from polca_edit.clusters.density import VectorClusters, skill_scores
from polca_edit.observation import Observation
from polca_edit.tokens import TokenSet

SUMMARY_SCHEMA = "polca-edit/summary/1"


def summary_schema() -> dict[str, Any]:
    """The JSON Schema of summary.json."""
    text = (resources.files("experiments.run") / "summary.schema.json").read_text()
    schema: dict[str, Any] = json.loads(text)
    return schema


def write_summary(run: Run) -> dict[str, Any]:
    """Collect all stage records into summary.json (validated) and tokens.parquet."""
    evaluate = json.loads((run.directory.path / "damage" / "evaluate.json").read_text())
    analyses = {}
    observations = {}
    for spec in run.config.bases:
        observation = load_observation(run, spec.label)
        observations[spec.label] = observation
        analyses[spec.label] = _analysis(run, spec.label, observation, evaluate["bases"][spec.label])
    summary = {
        "schema": SUMMARY_SCHEMA,
        "task": run.task.name,
        "seed": run.config.seed,
        "model": {"parameters": run.task.space.size},
        "tokens": {
            "select": run.task.splits.select.count,
            "evaluate": run.task.splits.evaluate.count,
            "checkpoints": len(run.checkpoints()),
        },
        "cost": _cost(run),
        "evaluate": evaluate["opening"],
        "analyses": analyses,
    }
    jsonschema.validate(summary, summary_schema())
    write_json(run.directory / "summary.json", summary)
    write_atomically(
        run.directory / "tokens.parquet", lambda part: _token_table(run, observations).to_parquet(part)
    )
    return summary


def _cost(run: Run) -> dict[str, Any]:
    names = set(stage_names(run.config))
    records = [r for r in run.directory.stage_records() if r.stage in names]
    unit = run.task.splits.select.sequences
    kinds = ("forward", "backward", "tangent", "hvp")
    return {
        "seconds": sum(r.seconds for r in records),
        "peak_rss_bytes": max(r.peak_rss_bytes for r in records),
        "passes": {kind: round(sum(r.passes.get(kind, 0.0) for r in records) / unit, 6) for kind in kinds},
    }


def _analysis(run: Run, label: str, observation: Observation, evaluate: dict[str, Any]) -> dict[str, Any]:
    basis = load_record(Basis, run.directory.basis(label))
    tokens = run.task.splits.select
    change = loss_change(observation.allocation, tokens.skills)
    record = json.loads(run.directory.damage(label).read_text())
    return {
        "loss_change": change,
        "basis": _basis_entry(run, basis, observation, change),
        "vectors": [_vector_entry(basis, found) for found in observation.clusters],
        "clusters": [
            _with_found_label(
                run.directory.path / "labels" / f"{label}.json",
                _cluster_entry(tokens, found, cluster, observation.hidden[found.vector, cluster]),
            )
            for found in observation.clusters
            for cluster in range(found.count)
        ],
        "evaluate_clusters": evaluate["scores"],
        "damage": record["damage"] + evaluate["damage"],
        "controls": record["controls"],
        "verdicts": [],
    }


def _basis_entry(run: Run, basis: Basis, observation: Observation, change: dict[str, Any]) -> dict[str, Any]:
    net, path = capture(basis.rows, run.checkpoints())
    norms = observation.projections.step_norms.double().tolist()
    walk_net, walk_path = random_walk_capture(norms, len(basis))
    return {
        "kind": basis.kind,
        "supervised": basis.supervised,
        "vectors": len(basis),
        "captured_net": net,
        "captured_path": path,
        "random_walk_net": walk_net,
        "random_walk_path": walk_path,
        "explained_share": explained_share(change["attributed"], change["exact"]),
        "rule": observation.allocation.rule,
        "guarded_denominators": observation.allocation.guarded,
        "hvps": basis.products,
        "flat_after": observation.tau,
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _vector_entry(basis: Basis, found: VectorClusters) -> dict[str, Any]:
    v = found.vector
    return {
        "vector": v,
        "origin": int(basis.origins[v]) if int(basis.origins[v]) >= 0 else None,
        "eigenvalue": _finite(float(basis.eigenvalues[v])),
        "residual": _finite(float(basis.residuals[v])),
        "kept": found.kept,
        "dropped_tokens": int(found.dropped.sum()),
        "outlier_share": found.outlier_share,
    }


def _cluster_entry(tokens: TokenSet, found: VectorClusters, cluster: int, hidden: bool) -> dict[str, Any]:
    scores = skill_scores(found, cluster, tokens.skills)
    members = found.members(cluster)
    label, support = None, 0
    if scores:
        # The skill that describes the cluster best: the largest F1 of homogeneity and recall.
        def f1(name: str) -> float:
            s = scores[name]
            total = s.homogeneity + s.recall_all
            return 2 * s.homogeneity * s.recall_all / total if total else 0.0

        label = max(scores, key=f1)
        support = int((members & tokens.skills[label]).sum())
    return {
        "vector": found.vector,
        "cluster": cluster,
        "tokens": int(members.sum()),
        "hidden_breakthrough": hidden,
        "label": label,
        "label_support": support,
        **{
            key: {name: getattr(score, key) for name, score in scores.items()}
            for key in ("homogeneity", "recall_all", "recall_paper", "lift")
        },
    }


def _with_found_label(file: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Where no skill is known, the cluster is called what the labelling found (held-out numbers)."""
    if entry["label"] is not None or not file.exists():
        return entry
    place = (entry["vector"], entry["cluster"])
    for found in json.loads(file.read_text())["clusters"]:
        if (found["vector"], found["cluster"]) == place and found["counts"]:
            name, base = found["rule"], found["base_rate"]
            return {
                **entry,
                "label": name,
                "label_support": found["support"],
                "homogeneity": {name: found["precision"]},
                "recall_all": {name: found["coverage"]},
                "lift": {name: found["precision"] / base if base else 0.0},
            }
    return entry


def _token_table(run: Run, observations: dict[str, Observation]) -> pd.DataFrame:
    """One row per scored select token."""
    tokens = run.task.splits.select
    sequence = tokens.sequence_of
    columns: dict[str, Any] = {
        "document": tokens.documents[sequence].numpy(),
        "sequence": sequence.numpy(),
        "position": tokens.position_of.numpy(),
        "context": list(tokens.contexts) if tokens.contexts else [""] * tokens.count,
        "skills": [
            ",".join(name for name, mask in tokens.skills.items() if bool(mask[i]))
            for i in range(tokens.count)
        ],
    }
    for label in observations:
        record = load_record(ClusterRecord, run.directory.clusters(label))
        damage = load_file(run.directory.path / "damage" / f"{label}.safetensors")["damage"]
        for vector in range(len(record.labels)):
            columns[f"cluster:{label}:{vector}"] = record.labels[vector].to(torch.int32).numpy()
            columns[f"damage:{label}:{vector}"] = damage[vector].numpy()
    return pd.DataFrame(columns)


def read_summary(path: Path) -> dict[str, Any]:
    """summary.json of a run directory.

    Raises:
        ValueError: if there is none.
    """
    file = path / "summary.json"
    if not file.exists():
        raise ValueError(f"'{path}' must hold a finished run (summary.json); run 'polca-edit run' first")
    result: dict[str, Any] = json.loads(file.read_text())
    return result
