"""tokens.parquet: one row per scored select token."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file

from experiments.run.run import Run
from experiments.run.stages.clusters import load_clusters
from polca_edit.checkpoints.files import write_atomically


def write_token_table(run: Run) -> None:
    """Write the table: context, skills, and cluster and damage along every vector of every basis."""
    table = token_table(run)
    write_atomically(run.directory / "tokens.parquet", lambda part: table.to_parquet(part))


def token_table(run: Run) -> pd.DataFrame:
    """Document, sequence, position, context, skills, cluster per vector, damage per vector (nats)."""
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
    for label in (basis.label for basis in run.config.bases):
        damage = load_file(run.directory.token_damage(label))["damage"]
        for found in load_clusters(run, label):
            columns[f"cluster:{label}:{found.vector}"] = found.labels.to(torch.int32).numpy()
            columns[f"damage:{label}:{found.vector}"] = damage[found.vector].numpy()
    return pd.DataFrame(columns)
