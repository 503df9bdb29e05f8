"""What the report says of config.yaml.

Everything the report writes comes from records of the run and from tokens.parquet, so it can be drawn
again on a machine that has neither the weights nor the training data. Keys that are not shown are
ignored, so records with further keys can still be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from experiments.run.store import RunDirectory
from polca_edit.artifacts import from_plain


@dataclass(frozen=True)
class TrainingFile:
    """``training`` of config.yaml."""

    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    record_every: int | None = None


@dataclass(frozen=True)
class DamageFile:
    """``damage`` of config.yaml: the checkpoint that headroom is counted from, by index."""

    reference: int = 0


@dataclass(frozen=True)
class ConfigFile:
    """What the report says of config.yaml."""

    breakthrough_delta: int = 100
    damage: DamageFile = DamageFile()
    training: TrainingFile | None = None
    checkpoints: Any = None

    @property
    def trained_here(self) -> bool:
        """Whether the run made its checkpoints itself."""
        return self.checkpoints is None


def read_config(directory: RunDirectory) -> ConfigFile:
    """config.yaml, its defaults where there is none."""
    path = directory / "config.yaml"
    values = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}
    config: ConfigFile = from_plain(ConfigFile, values)
    return config
