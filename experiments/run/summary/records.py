"""What summary.json holds, as records. Its keys are a promise; ``summary.schema.json`` states them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from polca_edit.artifacts import load_record

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
    """``analyses.NAME.clusters[]``; ``name`` is what it is called everywhere (docs: names)."""

    hidden_breakthrough: bool
    label: str | None
    label_support: int
    name: str = ""
    recall_paper: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RuleScore(Agreement):
    """``analyses.NAME.evaluate_clusters[]``: the evaluate tokens that a rule assigns to a cluster."""

    rule: str
    rule_auc: float | None


@dataclass(frozen=True)
class DamageRow:
    """One row of ``damage[]`` in a summary; nats per token.

    Attributes:
        vector: basis vector, or the first of a set.
        cluster: target cluster, None for the vector alone.
        operator: what was done.
        dose: how much of it.
        split: tokens it was measured on.
        on_target: mean over the target.
        off_target: mean over all other tokens.
        off_target_worst: largest mean over the other groups.
        headroom: mean headroom of the target.
        groups: skill -> mean change.
        group_headroom: skill -> mean headroom.
    """

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
class ControlRow:
    """Matched-norm random directions, measured on the target of a damage row; nats per token.

    Attributes:
        vector: the vector whose undone movement they match.
        cluster: target cluster, None for all tokens.
        draws: how many.
        norm: of every displacement.
        on_target_mean: mean over draws and target tokens.
        on_target_max: largest of the draws' means over the target.
        split: tokens it was measured on.
        control: what was drawn.
    """

    vector: int
    cluster: int | None
    draws: int
    norm: float
    on_target_mean: float
    on_target_max: float
    split: str = "select"
    control: str = "random_direction"


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

    def damage_row(self, vector: int, cluster: int | None, split: str) -> DamageRow | None:
        """What undoing the whole movement along a vector costs a target."""
        rows = self.damage_rows(vector, cluster, split)
        return next((row for row in rows if row.dose == 1.0), None)

    def damage_rows(self, vector: int, cluster: int | None, split: str) -> tuple[DamageRow, ...]:
        """The same at every dose, by rising dose."""
        place = (vector, cluster, split)
        found = (row for row in self.damage if (row.vector, row.cluster, row.split) == place)
        return tuple(sorted(found, key=lambda row: row.dose))

    def random_controls(self, vector: int, cluster: int | None) -> tuple[ControlRow, ...]:
        """Random directions of the same norm, measured on a target of the select split."""
        place = ("random_direction", vector, cluster, "select")
        return tuple(c for c in self.controls if (c.control, c.vector, c.cluster, c.split) == place)


@dataclass(frozen=True)
class ModelEntry:
    """``model``; ``precision`` is that of derivatives and all that follows from them."""

    parameters: int
    precision: str = "float32"


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


def read_summary(directory: Path) -> Summary:
    """summary.json of a run directory.

    Raises:
        ValueError: if there is none, or it was written by another version.
    """
    file = directory / "summary.json"
    if not file.exists():
        raise ValueError(f"'{directory}' must hold a finished run (summary.json); run 'polca-edit run' first")
    return load_record(Summary, file)
