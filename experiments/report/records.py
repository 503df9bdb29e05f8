"""What the report draws, read from the records of a run directory; no model, no figure.

Only summary.json, tokens.parquet, run.json, config.yaml and the stored projections are read, so a
report can be drawn again on a machine that has neither the weights nor the training data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor

from experiments.report.tokens import skill_masks
from experiments.run.store import RunDirectory
from experiments.run.summary import read_summary
from polca_edit.allocation.allocate import Allocation, Projections, allocate
from polca_edit.artifacts import load_record
from polca_edit.clusters.breakthroughs import breakthrough_start, fitting_delta

SMALL_HEADROOM = 0.05


@dataclass(frozen=True)
class ClusterView:
    """One cluster with everything the report says about it.

    Attributes:
        basis: label of its basis.
        vector: index in that basis.
        cluster: index along that vector.
        members: (M,) its tokens.
        entry: its entry in summary.json.
        evaluate: its rule-assigned counterpart on the evaluate split, None where the rule found no token.
        damage: own-vector damage rows on the select split, one per dose, by rising dose.
        damage_evaluate: own-vector damage row on the evaluate split.
        controls: random-direction controls of the same vector and target.
    """

    basis: str
    vector: int
    cluster: int
    members: np.ndarray
    entry: Mapping[str, Any]
    evaluate: Mapping[str, Any] | None
    damage: tuple[Mapping[str, Any], ...]
    damage_evaluate: Mapping[str, Any] | None
    controls: tuple[Mapping[str, Any], ...]

    @property
    def name(self) -> str:
        """Short name, as in figures."""
        return f"v{self.vector}·c{self.cluster}"

    @property
    def at_one(self) -> Mapping[str, Any] | None:
        """Damage row of the whole movement undone."""
        return next((row for row in self.damage if row["dose"] == 1.0), None)

    @property
    def interest(self) -> tuple[float, int]:
        """F1 with the cluster's label (0 without labels), then size."""
        label = self.entry["label"]
        share, recall = self.entry["homogeneity"].get(label, 0.0), self.entry["recall_all"].get(label, 0.0)
        total = share + recall
        return (2 * share * recall / total if total else 0.0), int(self.entry["tokens"])


@dataclass(frozen=True)
class Curves:
    """Trajectories of one cluster's tokens.

    Attributes:
        steps: (T,) optimiser steps.
        projected: (m, T) projected loss along the cluster's vector, nats.
        exact: (m, T) exact loss of the same tokens, nats.
        starts: (m,) step at which the decrease of each token's projected loss accelerates most.
    """

    steps: np.ndarray
    projected: np.ndarray
    exact: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class AnalysisView:
    """One basis.

    Attributes:
        name: its label.
        entry: its entry under ``analyses`` in summary.json.
        steps: (T,) optimiser steps.
        losses: (T, M) exact loss, nats.
        clusters: every cluster, the best of every label first (:func:`by_interest`).
        damage: (K, M) loss change of each token when a vector's movement is undone, nats.
    """

    name: str
    entry: Mapping[str, Any]
    steps: np.ndarray
    losses: np.ndarray
    clusters: tuple[ClusterView, ...]
    damage: np.ndarray

    def cluster_damage(self, shown: Sequence[ClusterView]) -> tuple[np.ndarray, np.ndarray]:
        """(K, C) damage of every vector on every given cluster, raw and over the cluster's headroom."""
        empty = np.zeros((len(self.damage), 0))
        raw = (
            np.stack([self.damage[:, c.members].mean(1, dtype=np.float64) for c in shown], 1)
            if shown
            else empty
        )
        rooms = [row["headroom"] if (row := c.at_one) is not None else None for c in shown]
        return raw, over_headroom(raw, rooms)

    def skill_damage(self, skills: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(K, S) damage of every vector on every skill, raw and over the skill's headroom."""
        rows = sorted(
            (
                r
                for r in self.entry["damage"]
                if r["cluster"] is None and r["split"] == "select" and r["dose"] == 1.0
            ),
            key=lambda r: r["vector"],
        )
        raw = np.array([[row["groups"].get(skill, np.nan) for skill in skills] for row in rows], dtype=float)
        rooms = [rows[0]["group_headroom"].get(skill) for skill in skills] if rows else []
        return raw, over_headroom(raw, rooms)

    def vector_rows(self, vector: int, split: str = "select") -> list[Mapping[str, Any]]:
        """Damage rows of a vector alone, by rising dose."""
        found = [
            r
            for r in self.entry["damage"]
            if r["vector"] == vector and r["cluster"] is None and r["split"] == split
        ]
        return sorted(found, key=lambda r: float(r["dose"]))


@dataclass(frozen=True)
class RunView:
    """A whole run as the report sees it.

    Attributes:
        directory: where it lies.
        summary: summary.json.
        run: run.json.
        config: config.yaml.
        tokens: one row per scored select token.
        skills: skill name -> (M,) tokens that have it.
        analyses: one per basis.
    """

    directory: RunDirectory
    summary: Mapping[str, Any]
    run: Mapping[str, Any]
    config: Mapping[str, Any]
    tokens: pd.DataFrame
    skills: Mapping[str, np.ndarray]
    analyses: tuple[AnalysisView, ...]

    def curves(self, shown: Sequence[ClusterView]) -> list[Curves]:
        """Trajectories of the given clusters of one basis; only their vectors are integrated."""
        if not shown:
            return []
        vectors = sorted({view.vector for view in shown})
        projections = load_record(Projections, self.directory.projections(shown[0].basis))
        rule = self.summary["analyses"][shown[0].basis]["basis"]["rule"]
        allocation = allocate_only(projections, vectors, rule)
        paths = allocation.projected_loss()
        steps = projections.steps
        delta = fitting_delta(int(self.config.get("breakthrough_delta", 100)), steps)
        result = []
        for view in shown:
            members = torch.from_numpy(view.members)
            own = paths[:, vectors.index(view.vector)].T[members]
            starts = breakthrough_start(own, steps, delta).double().numpy()
            exact = projections.losses.T[members]
            result.append(Curves(steps.numpy(), own.double().numpy(), exact.double().numpy(), starts))
        return result


def allocate_only(projections: Projections, vectors: Sequence[int], rule: Any) -> Allocation:
    """The allocation of a few vectors, so that a report needs little memory on large runs."""
    index = torch.as_tensor(vectors, dtype=torch.long)

    def columns(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[:, index]

    chosen = replace(
        projections,
        gradients=projections.gradients[:, index],
        displacements=projections.displacements[:, index],
        interior_gradients=columns(projections.interior_gradients),
        mean_gradients=columns(projections.mean_gradients),
        curvatures=columns(projections.curvatures),
    )
    return allocate(chosen, rule)


def over_headroom(raw: np.ndarray, rooms: Sequence[float | None]) -> np.ndarray:
    """Damage over headroom per column; NaN where the headroom is below ``SMALL_HEADROOM`` nats."""
    sizes = np.array(
        [np.nan if room is None or room < SMALL_HEADROOM else room for room in rooms], dtype=float
    )
    return raw / sizes[None] if raw.size else raw


def read_run(directory: RunDirectory) -> RunView:
    """Collect the records of a finished run.

    Raises:
        ValueError: if summary.json or tokens.parquet is missing.
    """
    summary = read_summary(directory.path)
    table = directory / "tokens.parquet"
    if not table.exists():
        raise ValueError(
            f"'{directory.path}' must hold tokens.parquet beside summary.json; run 'polca-edit run' again"
        )
    tokens = pd.read_parquet(table)
    config = directory / "config.yaml"
    return RunView(
        directory,
        summary,
        _json(directory / "run.json"),
        (yaml.safe_load(config.read_text()) or {}) if config.exists() else {},
        tokens,
        skill_masks(tokens),
        tuple(_analysis(directory, name, entry, tokens) for name, entry in summary["analyses"].items()),
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _analysis(
    directory: RunDirectory, name: str, entry: Mapping[str, Any], tokens: pd.DataFrame
) -> AnalysisView:
    projections = load_record(Projections, directory.projections(name))
    columns = [f"damage:{name}:{vector['vector']}" for vector in entry["vectors"]]
    damage = np.stack([tokens[column].to_numpy(dtype=np.float64) for column in columns])
    views = [_cluster(name, entry, cluster, tokens) for cluster in entry["clusters"]]
    return AnalysisView(
        name, entry, projections.steps.numpy(), projections.losses.numpy(), by_interest(views), damage
    )


def by_interest(views: Sequence[ClusterView]) -> tuple[ClusterView, ...]:
    """The best cluster of every label first, then the second best, and so on; no label: by size."""
    seen: dict[Any, int] = {}
    rounds: list[tuple[int, ClusterView]] = []
    for view in sorted(views, key=lambda view: view.interest, reverse=True):
        label = view.entry["label"]
        rounds.append((seen.get(label, 0) if label is not None else 0, view))
        seen[label] = seen.get(label, 0) + 1
    return tuple(view for _, view in sorted(rounds, key=lambda pair: pair[0]))


def _cluster(
    basis: str, entry: Mapping[str, Any], cluster: Mapping[str, Any], tokens: pd.DataFrame
) -> ClusterView:
    vector, index = cluster["vector"], cluster["cluster"]

    def own(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [row for row in rows if row["vector"] == vector and row["cluster"] == index]

    rows = own(entry["damage"])
    return ClusterView(
        basis,
        vector,
        index,
        tokens[f"cluster:{basis}:{vector}"].to_numpy() == index,
        cluster,
        next(iter(own(entry["evaluate_clusters"])), None),
        tuple(sorted((r for r in rows if r["split"] == "select"), key=lambda r: float(r["dose"]))),
        next((r for r in rows if r["split"] == "evaluate" and r["dose"] == 1.0), None),
        tuple(random_controls(entry, vector, index)),
    )


def random_controls(entry: Mapping[str, Any], vector: int, cluster: int | None) -> list[Mapping[str, Any]]:
    """Matched-norm random directions of one vector, measured on one target of the select split."""
    return [
        row
        for row in entry["controls"]
        if row["control"] == "random_direction"
        and row.get("vector") == vector
        and row.get("cluster") == cluster
        and row.get("split", "select") == "select"
    ]
