"""What summary.json holds, as records. Its keys are a promise; ``summary.schema.json`` states them."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.run.stages.damage_rows import ControlRow, DamageRow
from experiments.run.stages.evaluate import RuleScore

SUMMARY_SCHEMA = "polca-edit/summary/1"


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
    hvps: int
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


@dataclass(frozen=True)
class ClusterEntry:
    """``analyses.NAME.clusters[]``; the last four are skill -> number."""

    vector: int
    cluster: int
    tokens: int
    hidden_breakthrough: bool
    label: str | None
    label_support: int
    homogeneity: dict[str, float]
    recall_all: dict[str, float]
    recall_paper: dict[str, float]
    lift: dict[str, float]


@dataclass(frozen=True)
class Analysis:
    """``analyses.NAME``: one basis."""

    loss_change: LossChange
    basis: BasisEntry
    vectors: tuple[VectorEntry, ...]
    clusters: tuple[ClusterEntry, ...]
    evaluate_clusters: tuple[RuleScore, ...]
    damage: tuple[DamageRow, ...]
    controls: tuple[ControlRow, ...]
    verdicts: tuple[dict[str, object], ...] = ()


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
class PlanEntry:
    """``evaluate``: the plan under which the evaluate split was read."""

    plan: str
    exploratory: bool


@dataclass(frozen=True)
class Summary:
    """summary.json."""

    task: str
    seed: int
    model: ModelEntry
    tokens: TokenCounts
    cost: Cost
    evaluate: PlanEntry
    analyses: dict[str, Analysis] = field(default_factory=dict)
    schema: str = SUMMARY_SCHEMA
