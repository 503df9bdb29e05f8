"""What one method's edit of one skill does on the evaluate split: row, dose curve, relearning curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from experiments.removal.bed import Bed, relearning_batches, with_own_digits
from experiments.removal.found import Found
from experiments.removal.methods import OUR_METHODS
from experiments.removal.skills import REQUIRED, commuted
from interventions.removal.grouped import GroupedSplit
from interventions.removal.measures import Judgement, RelearningPoint, judge, relearn
from interventions.removal.problem import RemovalProblem

DOSES = (0.25, 0.5, 0.75, 1.0, 1.25)
RELEARNING = {"others only": 0.0, "1 % of the skill's data": 0.01, "10 % of the skill's data": 0.1}


@dataclass(frozen=True, kw_only=True)
class Row(Judgement):
    """One method on one skill and seed, judged on the evaluate split.

    Attributes:
        skill: what was removed.
        method: how.
        seed: of model, data and training.
        ours: whether it is an edit of this project.
        supervised: every method here is given the skill's labels.
        commuted_target_share: damage of the skill on b + a for the first sums a + b.
        own_digits_accuracy: of the skill where the model goes on from its own earlier digits; None
            where no weight moves.
        own_digits_accuracy_before: the same of the original weights.
        edit_norm: length of the movement, None where no weight moves.
        edit_rank: coordinates that were free.
        dose: chosen on select.
        seconds: settings, fit and dose.
        passes: sequences through the model, a forward with its backward counting three.
        checks: bound -> whether it is met.
        cpu_seconds: all that was done for this row.
    """

    skill: str
    method: str
    seed: int
    ours: bool
    supervised: bool = True
    commuted_target_share: float
    own_digits_accuracy: float | None
    own_digits_accuracy_before: float
    edit_norm: float | None
    edit_rank: int
    dose: float
    seconds: float
    passes: float
    checks: Mapping[str, bool]
    cpu_seconds: float = 0.0

    @property
    def met(self) -> bool:
        """Whether every bound is met."""
        return all(self.checks.values())


@dataclass(frozen=True)
class DosePoint:
    """Shares on evaluate at one multiple of an edit."""

    dose: float
    target_share: float
    worst_off_share: float
    worst_positive_share: float
    kl: float


@dataclass(frozen=True)
class DoseCurve:
    """One method's Pareto front on one skill and seed; no points where no weight moves."""

    skill: str
    method: str
    seed: int
    points: tuple[DosePoint, ...]


@dataclass(frozen=True)
class RelearningCurve:
    """One method's edited model while it is trained on again.

    Attributes:
        skill: what was removed.
        method: how.
        seed: of the model.
        data: what data comes back.
        points: by step.
    """

    skill: str
    method: str
    seed: int
    data: str
    points: tuple[RelearningPoint, ...]


@dataclass(frozen=True, eq=False)
class Place:
    """The evaluate split of one problem, with everything that does not depend on the edit.

    Attributes:
        bed: model and data.
        problem: what was removed.
    """

    bed: Bed
    problem: RemovalProblem

    @cached_property
    def judged(self) -> GroupedSplit:
        """Evaluate split."""
        return self.problem.select.on(self.bed.data.splits.evaluate)

    @cached_property
    def few(self) -> GroupedSplit:
        """The first sums, for measures that need several forward passes."""
        tokens = self.judged.tokens
        return self.judged.on(tokens.select(torch.arange(min(400, tokens.sequences))))

    @cached_property
    def swapped(self) -> GroupedSplit:
        """``b + a`` of the first sums."""
        return self.judged.on(commuted(self.few.tokens))

    @cached_property
    def own_before(self) -> float:
        """:meth:`own_digits` of the original weights."""
        return self.own_digits(self.problem.theta)

    def own_digits(self, theta: Tensor) -> float:
        """Accuracy on the skill when the model goes on from its own earlier digits."""
        own = with_own_digits(self.problem.predictor, self.few.tokens, theta)
        right = self.problem.predictor.at(theta, own).argmax(-1) == own.output_of
        return float(right[self.few.target].double().mean())

    def row(self, found: Found) -> Row:
        """Everything that is measured of one edit."""
        problem = self.problem
        judgement = judge(problem, self.judged, lambda tokens: found.edited(problem, tokens))
        swapped = self.swapped.shares(found.edited(problem, self.swapped.tokens))
        return Row(
            **vars(judgement),
            skill=problem.rule.skill,
            method=found.method,
            seed=self.bed.seed,
            ours=found.method in OUR_METHODS,
            commuted_target_share=swapped.target,
            own_digits_accuracy=None if found.delta is None else self.own_digits(problem.theta + found.delta),
            own_digits_accuracy_before=self.own_before,
            edit_norm=None if found.delta is None else float(found.delta.double().norm()),
            edit_rank=found.rank,
            dose=found.dose,
            seconds=found.seconds,
            passes=found.passes,
            checks=checks_of(judgement, problem.rule.skill),
        )

    def doses(self, found: Found) -> DoseCurve:
        """Shares on evaluate over doses of the chosen edit."""
        points = []
        for dose in DOSES if found.delta is not None else ():
            assert found.delta is not None
            shares = self.judged.shares_at(self.problem.theta + dose * found.delta)
            point = DosePoint(dose, shares.target, shares.worst_off, shares.worst_positive, shares.worst_kl)
            points.append(point)
        return DoseCurve(self.problem.rule.skill, found.method, self.bed.seed, tuple(points))

    def relearning(self, found: Found, steps: int) -> list[RelearningCurve]:
        """The edited model under the three kinds of fine-tuning data."""
        assert found.delta is not None
        rule = self.problem.rule
        curves = []
        for name, share in RELEARNING.items():
            points = relearn(
                self.few,
                self.problem.theta + found.delta,
                relearning_batches(self.bed, rule, share),
                steps,
                learning_rate=self.bed.run.config.training.learning_rate,
                every=max(1, steps // 4),
            )
            curves.append(RelearningCurve(rule.skill, found.method, self.bed.seed, name, tuple(points)))
        return curves


def checks_of(judgement: Judgement, skill: str) -> dict[str, bool]:
    """The bounds the project set itself for a skill, and whether a judgement meets them."""
    required = REQUIRED[skill]
    return {
        "target_share": judgement.target_share >= required.target,
        "worst_off_share": judgement.worst_off_share <= required.off,
        "worst_positive_share": judgement.worst_positive_share <= required.positive,
        "accuracy": judgement.accuracy <= judgement.refit.chance + 0.05,
        "refit": judgement.refit.kept >= 0.9,
    }
