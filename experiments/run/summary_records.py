"""What summary.json holds, as records. Its keys are a promise; ``summary.schema.json`` states them."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.run.stages.damage_rows import ControlRow, DamageRow
from experiments.run.stages.evaluate import RuleScore

SUMMARY_SCHEMA = "polca-edit/summary/2"


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
class VerdictEntry:
    """``analyses.NAME.verdicts[]``: one pair of the last causal test (nats per token, shares of headroom).

    Attributes:
        name: of the pair.
        vector: index, None where the edit is no single vector of the basis.
        cluster: as in ``clusters[]``, None for a skill or a group of the user's.
        group: name of the tokens.
        family: polca, interventional, skill or own.
        word: inert, shared, selective, carrier or unclear.
        answers: N, S, W, L.
        damage: D_C.
        share: n_C.
        leakage: lambda.
        worst: group that loses most besides.
        intervals: damage, leakage, rest_of_parent, gain -> bounds.
        p_values: of S, before and after correction.
        sentence: in plain words.
        seeds: of the runs.
    """

    name: str
    vector: int | None
    cluster: int | None
    group: str
    family: str
    word: str
    answers: dict[str, str]
    damage: float | None
    share: float | None
    leakage: float | None
    worst: str
    intervals: dict[str, tuple[float | None, float | None] | None]
    p_values: dict[str, float | None]
    sentence: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class TestedRow:
    """What the summary takes from a row of ``verdicts.json``."""

    name: str
    basis: str
    vector: int | None
    cluster: int | None
    group: str
    family: str
    word: str
    answers: dict[str, str]
    damage: float | None
    damage_interval: tuple[float | None, float | None] | None
    share: float | None
    leakage: float | None
    leakage_interval: tuple[float | None, float | None] | None
    worst: str
    rest_interval: tuple[float | None, float | None] | None
    gain_interval: tuple[float | None, float | None] | None
    p_values: dict[str, float | None]
    sentence: str
    seeds: tuple[int, ...]

    def entry(self) -> VerdictEntry:
        """The row as the summary has it."""
        return VerdictEntry(
            self.name,
            self.vector,
            self.cluster,
            self.group,
            self.family,
            self.word,
            self.answers,
            self.damage,
            self.share,
            self.leakage,
            self.worst,
            {
                "damage": self.damage_interval,
                "leakage": self.leakage_interval,
                "rest_of_parent": self.rest_interval,
                "gain": self.gain_interval,
            },
            self.p_values,
            self.sentence,
            self.seeds,
        )


@dataclass(frozen=True)
class TestedBasis:
    """What the summary takes from ``bases[]`` of ``verdicts.json``."""

    basis: str
    A: str
    P: str


@dataclass(frozen=True)
class TestedFile:
    """What the summary takes from ``verdicts.json``.

    Attributes:
        rows: one per pair.
        bases: answers A and P.
        clusters: basis -> key of the clusters that were tested.
    """

    rows: tuple[TestedRow, ...] = ()
    bases: tuple[TestedBasis, ...] = ()
    clusters: dict[str, str] = field(default_factory=dict)


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
    verdicts: tuple[VerdictEntry, ...] = ()
    answers: dict[str, str] = field(default_factory=dict)


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
