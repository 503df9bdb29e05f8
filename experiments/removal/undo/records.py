"""Records of ``remove``: the plan written down before the evaluate split is opened, and the result file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from experiments.removal.undo.remove import Adapted, Returned
from interventions.removal.measures import Judgement
from interventions.removal.optimise import FitSettings
from interventions.removal.problem import Limits
from interventions.removal.remove import Budget, RemovalResult
from interventions.removal.undo import Undone


@dataclass(frozen=True)
class RemovalPlan:
    """What ``remove`` will look at on the evaluate split, written down before it is opened.

    Attributes:
        targets: skills or clusters, in order.
        limits: bounds asked for.
        budget: of every fit.
        span: where edits may lie.
        evaluate_tokens: fingerprint of the split.
        method: of removal.
        windows: undone, where they were given.
        repair_steps: of undoing, 0 without repair.
    """

    targets: tuple[str, ...]
    limits: Limits
    budget: Budget
    span: str
    evaluate_tokens: str
    method: str = "span"
    windows: tuple[str, ...] = ()
    repair_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Removal(Judgement):
    """One removal as the result file and the report have it; the judgement is of the evaluate split.

    Attributes:
        skill: what was removed.
        span: kind of span.
        rank: its coordinates.
        norm: length of the movement.
        dose: chosen on select.
        setting: chosen on select; None where movement was undone.
        passes: sequences through the model.
        together: what the edit of all skills does to this one, where several were removed.
        undone: windows, repair and what was said first, where movement was undone.
        returned: the skill under an attacker's training, where that was measured.
        adapter: the edit's low-rank part and its effect, where one was asked for.
    """

    skill: str
    span: str
    rank: int
    norm: float
    dose: float
    setting: FitSettings | None
    passes: float
    together: Judgement | None = None
    undone: Undone | None = None
    returned: Returned | None = None
    adapter: Adapted | None = None

    @classmethod
    def of(cls, result: RemovalResult, together: Judgement | None) -> Removal:
        """Of a judged result."""
        assert result.judged is not None
        return cls(
            **vars(result.judged),
            skill=result.skill,
            span=result.span,
            rank=result.rank,
            norm=result.edit.norm,
            dose=result.dose,
            setting=result.setting,
            passes=result.passes,
            together=together,
            undone=result.undone,
        )


@dataclass(frozen=True)
class RemovalFile:
    """``edits/NAME.result.json``.

    Attributes:
        removals: in order.
        plan: written before the evaluate split was opened.
        exploratory: whether another plan had opened the split before.
        missed: sentences, one for every bound that was asked for and not met.
        versions: of packages.
        hardware: of the machine.
        seed: of the run.
    """

    removals: tuple[Removal, ...]
    plan: RemovalPlan
    exploratory: bool
    missed: tuple[str, ...]
    versions: Mapping[str, str]
    hardware: Mapping[str, object]
    seed: int
