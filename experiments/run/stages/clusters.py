"""Stage ``clusters:NAME``: skill clusters of one basis on the select split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.run.run import Run
from polca_edit.allocation.allocate import Projections
from polca_edit.artifacts import load_record, save_record
from polca_edit.clusters.density import VectorClusters
from polca_edit.observation import Observation, analyse


@dataclass(frozen=True)
class ClusterRecord:
    """Clusters of one basis on the select split.

    Attributes:
        labels: (K, M) cluster per vector and token, -1 outside every cluster.
        dropped: (K, M) tokens left out before clustering.
        kept: (K,) vectors that were clustered.
        tau: step after which the mean exact loss is flat.
        hidden: "vector:cluster" -> hidden breakthrough.
    """

    labels: Tensor
    dropped: Tensor
    kept: Tensor
    tau: int
    hidden: dict[str, bool]

    @classmethod
    def of(cls, observation: Observation) -> ClusterRecord:
        """From an observation."""
        found = observation.clusters
        return cls(
            torch.stack([c.labels for c in found]),
            torch.stack([c.dropped for c in found]),
            torch.tensor([c.kept for c in found]),
            observation.tau,
            {f"{v}:{c}": hidden for (v, c), hidden in observation.hidden.items()},
        )

    def vectors(self) -> list[VectorClusters]:
        """One record per vector."""
        return [
            VectorClusters(v, bool(self.kept[v]), self.labels[v], self.dropped[v])
            for v in range(len(self.labels))
        ]


def run_clusters(run: Run, stage: str) -> None:
    """Allocate, cluster and date breakthroughs from stored projections."""
    label = stage.partition(":")[2]
    path = run.directory.clusters(label)
    with run.directory.stage(stage, run.key(stage), [path], run.objective.passes):
        save_record(path, ClusterRecord.of(load_observation(run, label)))


def load_clusters(run: Run, label: str) -> list[VectorClusters]:
    """Stored clusters of a basis, one record per vector."""
    return load_record(ClusterRecord, run.directory.clusters(label)).vectors()


def load_observation(run: Run, label: str) -> Observation:
    """Allocation and clusters of a basis, recomputed from stored projections (seconds, no model)."""
    projections = load_record(Projections, run.directory.projections(label))
    return analyse(projections, run.task.splits.select, run.settings())
