"""What ``validate`` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SCHEMA = "polca-edit/validate/1"


@dataclass(frozen=True)
class CaseRow:
    """One tested pair of one run.

    Attributes:
        case: name.
        twin: whether it is the twin.
        seed: of the run.
        basis: ``declared`` (the stretches of training), ``hessian``, ``trajectory`` ...
        family: how the pair was chosen.
        pair: movement and group.
        truth: carrier, selective, or no (neither).
        word: of the verdict.
        answers: question -> answer; D is not asked.
        share: of the group's headroom lost.
        leakage: largest share of another group over it.
        damage: nats per token.
        p: of S, corrected over the table; None where nothing in the span reaches the damage.
        selectivity: share less the largest share of another group.
        sentence: in plain words.
        passed: whether the word agrees with the truth.
    """

    case: str
    twin: bool
    seed: int
    basis: str
    family: str
    pair: str
    truth: str
    word: str
    answers: Mapping[str, str]
    share: float
    leakage: float
    damage: float
    p: float | None
    selectivity: float
    sentence: str
    passed: bool


@dataclass(frozen=True)
class Rung:
    """One axis of a mixing ladder.

    Attributes:
        degrees: between the axis and the block it is tested for.
        other: block it is mixed with.
        selectivity: of the undone movement for the axis's block, on unseen tokens.
        leakage: largest share of another group over the target's.
        word: of the verdict.
    """

    degrees: float
    other: str
    selectivity: float
    leakage: float
    word: str


@dataclass(frozen=True)
class RunRows:
    """Everything measured in one run.

    Attributes:
        declared: the row with a known truth, on the declared movement.
        others: the same group along other bases and by other choosers, where no truth is known.
        ladder: mixed axes, empty in most cases.
        extra: further numbers of a case, by name.
        train_seconds: of training.
        test_seconds: of bases, discovery and test.
    """

    declared: CaseRow
    others: tuple[CaseRow, ...]
    ladder: tuple[Rung, ...]
    extra: Mapping[str, float]
    train_seconds: float
    test_seconds: float
