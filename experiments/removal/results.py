"""Result files of the removal study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from experiments.removal.comparison import Match, matched_damage
from experiments.removal.found import Effort, Setting, Tried
from experiments.removal.rows import DoseCurve, RelearningCurve, Row
from experiments.removal.skills import REQUIRED, SKILL_GROUPS
from interventions.removal.problem import Limits

SCHEMA = "polca-edit/remove-skill/2"


@dataclass(frozen=True)
class Log:
    """Settings that a method tried on one skill and seed.

    Attributes:
        skill: what was removed.
        method: how.
        seed: of the model.
        chosen: on select.
        tried: every setting.
    """

    skill: str
    method: str
    seed: int
    chosen: Setting
    tried: tuple[Tried, ...]


@dataclass(frozen=True)
class Part:
    """What some of a study's jobs found."""

    rows: tuple[Row, ...] = ()
    pareto: tuple[DoseCurve, ...] = ()
    relearning: tuple[RelearningCurve, ...] = ()
    log: tuple[Log, ...] = ()

    def __add__(self, other: Part) -> Part:
        """Both."""
        return Part(
            self.rows + other.rows,
            self.pareto + other.pareto,
            self.relearning + other.relearning,
            self.log + other.log,
        )

    def ordered(self) -> Part:
        """By seed and skill, methods in the order they were run."""
        order = {skill: index for index, skill in enumerate(SKILL_GROUPS)}
        return Part(
            *(
                tuple(sorted(getattr(self, item.name), key=lambda e: (e.seed, order[e.skill])))
                for item in fields(self)
            )
        )


@dataclass(frozen=True, kw_only=True)
class StudyResult(Part):
    """One result file.

    Attributes:
        preset: of model and data.
        effort: passes of every iterative method.
        config: of the trained runs, but for their seeds.
        seeds: one model each.
        versions: of packages.
        hardware: of the machine.
        workers: processes.
        wall_seconds: from start to end.
        cpu_seconds: of all rows.
        required: skill -> bounds that rows are checked against.
        matched_damage: our best edits beside the best rivals.
        schema: of the file.
    """

    preset: str
    effort: Effort
    config: Mapping[str, object]
    seeds: tuple[int, ...]
    versions: Mapping[str, str]
    hardware: Mapping[str, object]
    workers: int
    wall_seconds: float
    cpu_seconds: float
    required: Mapping[str, Limits]
    matched_damage: tuple[Match, ...]
    schema: str = SCHEMA

    @classmethod
    def of(cls, part: Part, **given: Any) -> StudyResult:
        """The parts in order, compared."""
        part = part.ordered()
        return cls(
            **vars(part),
            **given,
            cpu_seconds=sum(row.cpu_seconds for row in part.rows),
            required=REQUIRED,
            matched_damage=tuple(matched_damage(part.rows)),
        )
