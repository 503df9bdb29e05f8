"""What a removal method ends with, and how the best of several candidates is chosen on select."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from interventions.removal.grouped import Predictor, Shares
from interventions.removal.problem import RemovalProblem, score
from interventions.removal.searches import DOSE_MARGIN, match_dose
from polca_edit.tokens import TokenSet

#: One setting of a method; which fields there are depends on the method.
Setting = Mapping[str, object]


@dataclass(frozen=True)
class Effort:
    """Passes every iterative method gets.

    Attributes:
        trial_steps: optimiser steps of each of the eight settings.
        steps: optimiser steps of the chosen setting.
        search_sums: select sums that forward-only searches use.
    """

    trial_steps: int = 8
    steps: int = 320
    search_sums: int = 200


@dataclass(frozen=True)
class Tried:
    """One setting that was tried, with its shares on select.

    Attributes:
        setting: of the method.
        target_share: loss change of the skill over its headroom.
        worst_off_share: largest signed share of another group.
        worst_positive_share: largest positive-part share of another group.
        score: what is chosen by, smaller is better.
        final: whether it was run with all steps.
    """

    setting: Setting
    target_share: float
    worst_off_share: float
    worst_positive_share: float
    score: float
    final: bool = False


def tried(setting: Setting, shares: Shares, problem: RemovalProblem, *, final: bool = False) -> Tried:
    """The record of one setting."""
    value = score(shares, problem.limits)
    return Tried(setting, shares.target, shares.worst_off, shares.worst_positive, value, final)


@dataclass(frozen=True)
class Found:
    """What a method ended with.

    Attributes:
        method: name.
        delta: (N,) movement at the chosen dose, None where no weight moves.
        rank: coordinates that were free.
        dose: chosen on select.
        setting: chosen on select.
        log: every setting tried, with its select shares.
        seconds: all settings, the final fit and the dose.
        passes: sequences through the model.
        logits: how to predict without a weight edit (activation ablation), else None.
    """

    method: str
    delta: Float[Tensor, " N"] | None
    rank: int
    dose: float
    setting: Setting
    log: tuple[Tried, ...]
    seconds: float
    passes: float
    logits: Callable[[TokenSet], Tensor] | None = None

    def edited(self, problem: RemovalProblem, tokens: TokenSet) -> Float[Tensor, "M V"]:
        """Logits of the edited model."""
        if self.delta is None:
            assert self.logits is not None
            return self.logits(tokens)
        return problem.predictor.at(problem.theta + self.delta, tokens)


@dataclass(frozen=True)
class Work:
    """Time and passes since it was made.

    Attributes:
        predictor: counts the passes.
    """

    predictor: Predictor
    began: float = field(default_factory=time.perf_counter)
    before: float = 0.0

    @classmethod
    def on(cls, problem: RemovalProblem) -> Work:
        """From now on, for the predictor of a problem; what all its methods share is done before."""
        _ = problem.headroom, problem.select.before
        return cls(problem.predictor, before=problem.predictor.passes)

    @property
    def seconds(self) -> float:
        """Wall-clock time so far."""
        return time.perf_counter() - self.began

    @property
    def passes(self) -> float:
        """Sequences through the model so far."""
        return self.predictor.passes - self.before


@dataclass(frozen=True)
class Choice:
    """The candidate with the best score on select.

    Attributes:
        setting: of the method.
        delta: (N,) movement.
        rank: coordinates that were free, None for as many as the movement has nonzero weights.
        log: every candidate.
    """

    setting: Setting
    delta: Float[Tensor, " N"]
    log: tuple[Tried, ...]
    rank: int | None = None


def best_of(problem: RemovalProblem, candidates: Iterable[tuple[Setting, Tensor, Shares]]) -> Choice:
    """The movement with the best score, of candidates that come with their shares on select.

    Raises:
        ValueError: for no candidate with a finite score.
    """
    log: list[Tried] = []
    best: tuple[Setting, Tensor] | None = None
    least = float("inf")
    for setting, delta, shares in candidates:
        log.append(tried(setting, shares, problem))
        if log[-1].score < least:
            least, best = log[-1].score, (setting, delta)
    if best is None:
        raise ValueError("a method needs at least one candidate with a finite score, got none")
    return Choice(best[0], best[1], tuple(log))


def scaled(
    problem: RemovalProblem, method: str, choice: Choice, work: Work, *, matched: bool = True
) -> Found:
    """The choice at the dose that reaches the goal on select with least harm (1 if not ``matched``)."""
    goal = problem.limits.target + DOSE_MARGIN
    dose = match_dose(problem, choice.delta, goal)[0] if matched else 1.0
    rank = int((choice.delta != 0).sum()) if choice.rank is None else choice.rank
    return Found(
        method,
        dose * choice.delta,
        rank,
        dose,
        choice.setting,
        choice.log,
        work.seconds,
        work.passes,
    )
