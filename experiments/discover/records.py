"""What discovery keeps in a run and what its verbs write. No model is needed to read any of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from interventions.discovery.axes import AxisEffect, AxisSettings
from interventions.discovery.axis_nulls import AxisNull
from interventions.discovery.when_where import WhenWhere
from interventions.discovery.windows import Window
from polca_edit.artifacts import load_record

SCHEMA = "polca-edit/discovery/1"


@dataclass(frozen=True)
class WindowRecord:
    """Damage on select of every contiguous window of training undone whole.

    Attributes:
        changes: (P, M) nats.
        spans: (P,) the windows.
    """

    changes: Tensor
    spans: tuple[Window, ...]


@dataclass(frozen=True)
class SignatureRecord:
    """Signatures and interventional clusters of one basis, or of several together.

    Attributes:
        changes: (E, M) damage on select under partial undo edits, nats.
        sources: (E,) basis of each edit.
        labels: (M,) cluster of each token, -1 outside.
        parts: (M,) group before groups of one skill were joined.
        inner: (M,) group of a cluster clustered again.
        stability: (edits a basis, agreement of two halves).
    """

    changes: Tensor
    sources: tuple[str, ...]
    labels: Tensor
    parts: Tensor
    inner: Tensor
    stability: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class ClusterRow:
    """``clusters[]``: one interventional cluster on select beside every known skill.

    Attributes:
        basis: names of the vectors that were undone, several joined by ``+``.
        cluster: number, largest first.
        tokens: members.
        name: parent and at most two conditions with precision and recall, or "unnamed N".
        homogeneity: skill -> share of the cluster's tokens with it.
        recall: skill -> share of its tokens in the cluster.
        f1: skill -> harmonic mean of the two.
    """

    basis: str
    cluster: int
    tokens: int
    name: str
    homogeneity: dict[str, float]
    recall: dict[str, float]
    f1: dict[str, float]


@dataclass(frozen=True)
class ClusterFile:
    """Interventional clusters of one stage, for whoever has no tokens at hand.

    Attributes:
        basis: names of the vectors that were undone.
        clusters: largest first.
        outliers: share of tokens in none.
        edits: partial undo edits in all.
        stability: (edits a basis, agreement of two halves).
    """

    basis: str
    clusters: tuple[ClusterRow, ...]
    outliers: float
    edits: int
    stability: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TimelineRow:
    """``timeline[]``: one window undone in the final model, on select."""

    start: int
    end: int
    norm: float
    shares: dict[str, float]
    random_shares: dict[str, float]


@dataclass(frozen=True)
class AxisRow:
    """``axes[]``: one skill axis on unseen tokens; a share is None where there is no headroom.

    Attributes:
        basis: span it lies in.
        target: skill, or ``found:CLUSTER`` for an interventional cluster.
        rank: axes.
        share: of the target's headroom lost when the first axis is undone, capped per token.
        worst_other: largest share lost by another group.
        rest_of_parent: share lost by the rest of the target's parent; None without one.
        null_p: rank among the same search for random token sets; None where no set could be drawn.
        null_p95: 95th percentile of the null sets' statistic.
        free_share: share lost to a free edit of equal rank and norm.
        free_worst_other: largest share another group loses to it.
        seconds: of search and measurement.
    """

    basis: str
    target: str
    rank: int
    share: float | None
    worst_other: float | None
    rest_of_parent: float | None
    null_p: float | None
    null_p95: float | None
    free_share: float | None
    free_worst_other: float | None
    seconds: float


@dataclass(frozen=True)
class FullAxis:
    """An axis with everything that was measured.

    Attributes:
        row: the promised numbers.
        effect: on unseen tokens, with intervals.
        select: group -> share lost on the tokens of the search.
        null: against null sets; None where none could be drawn.
        free: the free edit on unseen tokens.
        when: over training and over the parts of the model, on select.
        norm: of the undone movement, weight units.
        parent: parent of the target; None without one.
    """

    row: AxisRow
    effect: AxisEffect
    select: dict[str, float]
    null: AxisNull | None
    free: AxisEffect
    when: WhenWhere
    norm: float
    parent: str | None = None


@dataclass(frozen=True)
class AxesRecord:
    """The axes of one span.

    Attributes:
        units: (A, K) coordinates of the first axes in the basis.
        axes: in the same order.
        skipped: target -> why it has no axis.
    """

    units: Tensor
    axes: tuple[FullAxis, ...]
    skipped: dict[str, str]


@dataclass(frozen=True)
class DiscoverSettings:
    """What ``discover`` looks at.

    Attributes:
        bases: spans in which axes are searched.
        unseen: sequences drawn anew on which axes are measured; 0 takes the evaluate split.
        null_unseen: how many of these the null sets are judged on.
        nulls: null sets a kind of target; 0 leaves them out.
        axis: of the search.
        part: select sequences on which free edits are fitted and axes cut by time and place.
        window: steps of the movement that is undone; None: the whole run.
        targets: only these skills; None: every known skill and every found cluster.
        groups: file of token groups that join the labels.
    """

    bases: tuple[str, ...]
    unseen: int = 1000
    null_unseen: int = 250
    nulls: int = 39
    axis: AxisSettings = field(default_factory=AxisSettings)
    part: int = 64
    window: tuple[int, int] | None = None
    targets: tuple[str, ...] | None = None
    groups: str | None = None


@dataclass(frozen=True)
class DiscoverPlan:
    """What is looked at on the unseen tokens, written down before they are.

    Attributes:
        settings: of the discovery.
        tokens: fingerprint of the unseen tokens.
        clusters: keys of the stages whose clusters become targets.
    """

    settings: DiscoverSettings
    tokens: str
    clusters: dict[str, str]


@dataclass(frozen=True)
class DiscoverResult:
    """What ``polca-edit discover --json`` writes.

    Attributes:
        clusters: every interventional cluster.
        timeline: every window.
        axes: every axis.
        learned: group -> step at which half of its fall is done.
        depends: "skill <- other" for every skill that falls with another's window and not the reverse.
        alignment: of windows with learning, and its p among shuffled windows.
        outliers: basis -> share of tokens in no interventional cluster.
        skipped: "basis: target" -> why it has no axis.
        exploratory: whether another plan had opened the unseen tokens before.
        seconds: of the whole verb.
        schema: of the file.
    """

    clusters: tuple[ClusterRow, ...]
    timeline: tuple[TimelineRow, ...]
    axes: tuple[AxisRow, ...]
    learned: dict[str, int | None]
    depends: tuple[str, ...]
    alignment: tuple[float | None, float]
    outliers: dict[str, float]
    skipped: dict[str, str]
    exploratory: bool
    seconds: float
    schema: str = SCHEMA


def cluster_file(directory: Path, name: str) -> Path:
    """Where the rows of a stage ``signatures:NAME`` lie."""
    return directory / "discover" / f"clusters-{name}.json"


def timeline_file(directory: Path, suffix: str = "") -> Path:
    """Where the timeline of a run lies, or that of a window."""
    return directory / "discover" / f"timeline{suffix}.json"


def discovery_file(directory: Path, suffix: str = "") -> Path:
    """Where a run keeps its result, or that of a window."""
    return directory / f"discovery{suffix}.json"


def load_discovery(directory: Path) -> DiscoverResult | None:
    """The result of ``polca-edit discover`` in a run; None where it was not run."""
    path = discovery_file(directory)
    return load_record(DiscoverResult, path) if path.exists() else None
