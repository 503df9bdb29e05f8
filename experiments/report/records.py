"""Typed views of the records a run leaves: summary.json, run.json and config.yaml.

Everything the report writes comes from these and from tokens.parquet, so it can be drawn again on a
machine that has neither the weights nor the training data. Keys that are not shown are ignored, so
records with further keys can still be read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from experiments.run.store import RunDirectory
from experiments.run.summary_records import VerdictEntry
from polca_edit.artifacts import from_plain, load_record


@dataclass(frozen=True)
class LossParts:
    """A loss change and what it is made of, nats per token: exact = attributed + residual + error."""

    exact: float
    attributed: float
    residual: float
    quadrature_error: float


@dataclass(frozen=True)
class LossChange(LossParts):
    """The same over all scored tokens and per skill group."""

    per_group: dict[str, LossParts]


@dataclass(frozen=True)
class BasisEntry:
    """``analyses.NAME.basis``: what the basis is and how much of movement and loss it holds."""

    kind: str
    supervised: bool
    vectors: int
    captured_net: float
    captured_path: float
    random_walk_net: float
    random_walk_path: float
    explained_share: float | None
    rule: str
    guarded_denominators: int
    flat_after: int


@dataclass(frozen=True)
class VectorEntry:
    """``analyses.NAME.vectors[]``."""

    vector: int
    origin: int | None
    eigenvalue: float | None
    residual: float | None
    kept: bool
    dropped_tokens: int
    outlier_share: float

    @property
    def title(self) -> str:
        """Index and the step it was taken at, as row titles have it."""
        return f"v{self.vector}" + ("" if self.origin is None else f" (step {self.origin})")


@dataclass(frozen=True)
class Agreement:
    """How well a set of tokens agrees with each known skill; skill -> number."""

    vector: int
    cluster: int
    tokens: int
    homogeneity: dict[str, float]
    recall_all: dict[str, float]
    lift: dict[str, float]

    def f1(self, skill: str | None) -> float:
        """F1 of homogeneity and recall over all tokens of the skill, 0 where it is unknown."""
        if skill is None:
            return 0.0
        share, recall = self.homogeneity.get(skill, 0.0), self.recall_all.get(skill, 0.0)
        return 2 * share * recall / (share + recall) if share + recall else 0.0


@dataclass(frozen=True)
class ClusterEntry(Agreement):
    """``analyses.NAME.clusters[]``."""

    hidden_breakthrough: bool
    label: str | None
    label_support: int
    recall_paper: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluateClusterEntry(Agreement):
    """``analyses.NAME.evaluate_clusters[]``: the evaluate tokens that a rule assigns to a cluster."""

    rule: str
    rule_auc: float | None


@dataclass(frozen=True)
class DamageEntry:
    """``analyses.NAME.damage[]``: loss change under one edit, nats per token; cluster None = all tokens."""

    vector: int
    cluster: int | None
    operator: str
    dose: float
    split: str
    on_target: float | None
    off_target: float | None
    off_target_worst: float | None
    headroom: float | None
    groups: dict[str, float]
    group_headroom: dict[str, float]


@dataclass(frozen=True)
class ControlEntry:
    """``analyses.NAME.controls[]``: edits of the wrong direction, damage in nats per token."""

    control: str
    vector: int | None = None
    cluster: int | None = None
    split: str = "select"
    draws: int = 0
    norm: float | None = None
    on_target_mean: float | None = None
    on_target_max: float | None = None


@dataclass(frozen=True)
class Analysis:
    """``analyses.NAME``: one basis."""

    loss_change: LossChange
    basis: BasisEntry
    vectors: tuple[VectorEntry, ...]
    clusters: tuple[ClusterEntry, ...]
    evaluate_clusters: tuple[EvaluateClusterEntry, ...]
    damage: tuple[DamageEntry, ...]
    controls: tuple[ControlEntry, ...]
    verdicts: tuple[VerdictEntry, ...] = ()
    answers: dict[str, str] = field(default_factory=dict)

    def damage_row(self, vector: int, cluster: int | None, split: str) -> DamageEntry | None:
        """What undoing the whole movement along a vector costs a target."""
        rows = self.damage_rows(vector, cluster, split)
        return next((row for row in rows if row.dose == 1.0), None)

    def damage_rows(self, vector: int, cluster: int | None, split: str) -> tuple[DamageEntry, ...]:
        """The same at every dose, by rising dose."""
        place = (vector, cluster, split)
        found = (row for row in self.damage if (row.vector, row.cluster, row.split) == place)
        return tuple(sorted(found, key=lambda row: row.dose))

    def random_controls(self, vector: int, cluster: int | None) -> tuple[ControlEntry, ...]:
        """Random directions of the same norm, measured on a target of the select split."""
        place = ("random_direction", vector, cluster, "select")
        return tuple(c for c in self.controls if (c.control, c.vector, c.cluster, c.split) == place)


@dataclass(frozen=True)
class ModelEntry:
    """``model``."""

    parameters: int


@dataclass(frozen=True)
class TokenCounts:
    """``tokens``: scored tokens per split, and checkpoints."""

    select: int
    evaluate: int
    checkpoints: int


@dataclass(frozen=True)
class Cost:
    """``cost``: passes are passes over the select split."""

    seconds: float
    peak_rss_bytes: int
    passes: dict[str, float]


@dataclass(frozen=True)
class Opening:
    """``evaluate``: the plan under which the evaluate split was opened."""

    plan: str
    exploratory: bool


@dataclass(frozen=True)
class Summary:
    """summary.json."""

    schema: str
    task: str
    seed: int
    model: ModelEntry
    tokens: TokenCounts
    cost: Cost
    evaluate: Opening
    analyses: dict[str, Analysis]


@dataclass(frozen=True)
class StageCost:
    """One stage of run.json; passes count sequences."""

    seconds: float
    passes: dict[str, float]
    peak_rss_bytes: int


@dataclass(frozen=True)
class Hardware:
    """The machine of run.json."""

    processor: str
    cores: int | None
    torch_threads: int
    accelerator: str | None = None


@dataclass(frozen=True)
class RunFile:
    """run.json."""

    select_sequences: int = 1
    stages: dict[str, StageCost] = field(default_factory=dict)
    hardware: Hardware | None = None
    versions: dict[str, str] = field(default_factory=dict)


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


def read_summary(directory: Path) -> Summary:
    """summary.json of a run directory.

    Raises:
        ValueError: if there is none, or it was written by another version.
    """
    file = directory / "summary.json"
    if not file.exists():
        raise ValueError(f"'{directory}' must hold a finished run (summary.json); run 'polca-edit run' first")
    return load_record(Summary, file)


def read_run_file(directory: RunDirectory) -> RunFile:
    """run.json, empty where there is none."""
    path = directory / "run.json"
    return load_record(RunFile, path) if path.exists() else RunFile()


def read_config(directory: RunDirectory) -> ConfigFile:
    """config.yaml, its defaults where there is none."""
    path = directory / "config.yaml"
    values = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}
    config: ConfigFile = from_plain(ConfigFile, values)
    return config
