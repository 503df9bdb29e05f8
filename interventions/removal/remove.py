"""``remove_skill``: from a split, a target and a recorded span to an edit that takes the target out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from interventions.damage import EvaluatedSplit
from interventions.edits import Edit, from_delta
from interventions.removal.grouped import (
    GroupedSplit,
    GroupRule,
    LogitFunction,
    Predictor,
    Shares,
    at_weights,
    labelled,
    next_token_logits,
)
from interventions.removal.measures import Judgement, judge
from interventions.removal.optimise import FitSettings, constrained, edit_of
from interventions.removal.problem import Limits, RemovalProblem, score
from interventions.removal.searches import DOSE_MARGIN, match_dose
from interventions.removal.spans import Span
from interventions.removal.undo import UNDO_LIMITS, Undo, Undone, undo_skill
from polca_edit.seeds import generator_for
from polca_edit.tokens import TokenSet

#: A skill by the name of its label, a mask of the split's tokens, or groups by a rule of one's own.
Target = str | Bool[Tensor, " M"] | GroupRule
Wanted = TypeVar("Wanted")


@dataclass(frozen=True)
class Budget:
    """How much work a removal may do.

    Attributes:
        steps: optimiser steps of the final fit.
        trial_steps: steps of each tried setting.
        sequences: sequences per step.
        rates: learning rates that are tried; more steps afford smaller ones, which spare the others.
    """

    steps: int
    trial_steps: int
    sequences: int
    rates: tuple[float, ...]

    @property
    def settings(self) -> tuple[FitSettings, ...]:
        """What is tried on select."""
        return tuple(FitSettings(rate, retain, 6.0) for rate in self.rates for retain in (10.0, 25.0))


BUDGETS = {
    "small": Budget(60, 6, 96, (0.006, 0.01)),
    "medium": Budget(150, 10, 128, (0.006, 0.01)),
    "large": Budget(500, 20, 128, (0.003, 0.004)),
}


@dataclass(frozen=True)
class RemovalResult:
    """An edit that removes a skill, and what it does.

    Attributes:
        edit: of the split's final weights.
        skill: what was removed.
        span: kind of span it lies in.
        rank: coordinates that were free.
        setting: chosen on the split; None where movement was undone.
        dose: multiple of the fitted movement, chosen on the split.
        shares: damage on the split it was chosen on.
        passes: sequences through the model, a forward with its backward counting three.
        judged: the same edit on tokens that chose nothing, where they were given.
        undone: windows and repair, where movement was undone.
    """

    edit: Edit
    skill: str
    span: str
    rank: int
    setting: FitSettings | None
    dose: float
    shares: Shares
    passes: float
    judged: Judgement | None = None
    undone: Undone | None = None


def remove_skill(
    split: EvaluatedSplit,
    target: Target,
    how: Span | Undo,
    *,
    logits: LogitFunction = next_token_logits,
    batch: Callable[[int], TokenSet] | None = None,
    limits: Limits | None = None,
    budget: Budget | None = None,
    unseen: TokenSet | None = None,
) -> RemovalResult:
    """Find an edit that takes one skill out and spares the rest.

    Inside a span, coordinates are fitted by a constrained optimisation (see
    :mod:`interventions.removal.optimise`) with a few settings; setting and dose are chosen on the split's
    tokens. By undoing, the movement that taught the skill is taken back and the rest repaired without the
    skill's data (see :mod:`interventions.removal.undo`); windows are chosen on the split's tokens.

    Args:
        split: model, weights, reference and the tokens that choose; never those that judge.
        target: label of the skill in the tokens' ``skills``, (M,) mask of the split's tokens, or a
            :class:`~interventions.removal.grouped.GroupRule`, which also says whose bounds are kept.
        how: where the edit may lie, see :mod:`interventions.removal.spans`, or how movement is undone.
        logits: (module, inputs) -> (B, P, V) logits of the token loss.
        batch: step -> tokens that are fitted on, a pure function of the step; by default draws from the
            split's own sequences. Undoing repairs with it; without it there is no repair.
        limits: damage wanted of the target and allowed elsewhere.
        budget: steps and settings of a fit in a span, ``BUDGETS["medium"]`` by default.
        unseen: tokens that judge the edit.

    Raises:
        ValueError: for an unknown target, one without headroom, a mask together with ``unseen`` or
            ``batch`` (a mask says nothing about other tokens), or logits that do not fit the loss.

    Example:
        >>> found = remove_skill(split, "10s", span, unseen=tokens)  # doctest: +SKIP
        >>> found.judged.target_share, found.judged.worst_off_share  # doctest: +SKIP
        >>> back = remove_skill(split, "10s", Undo("return"), batch=batch)  # doctest: +SKIP
        >>> back.undone.forecast.sentences()  # doctest: +SKIP
    """
    budget = budget or BUDGETS["medium"]
    if isinstance(target, Tensor) and (unseen is not None or batch is not None):
        raise ValueError(
            "a mask names tokens of the split only, so that no other tokens can be fitted or judged; "
            "give the target as a label or a GroupRule"
        )
    tokens, rule = _grouped(split.tokens, target)
    select = GroupedSplit(split.on(tokens), Predictor(split.loss, logits), rule)
    if isinstance(how, Undo):
        return _undone(select, how, batch, limits or UNDO_LIMITS, unseen)
    problem = RemovalProblem(select, batch or draws(tokens, budget.sequences), limits or Limits())
    return _fitted(problem, how, budget, unseen)


def _fitted(problem: RemovalProblem, span: Span, budget: Budget, unseen: TokenSet | None) -> RemovalResult:
    """Settings tried briefly, the best one in full, at the dose that reaches the goal on select."""

    def trial(setting: FitSettings) -> float:
        found = constrained(problem, span, setting, budget.trial_steps)
        return score(problem.select.shares_at(problem.theta + found.delta), problem.limits)

    best = min(budget.settings, key=trial)
    final = constrained(problem, span, best, budget.steps)
    dose, shares = match_dose(problem, final.delta, problem.limits.target + DOSE_MARGIN)
    edit = edit_of(problem, dose * final.delta, "removal", span=span.kind, rank=span.rank)
    result = RemovalResult(
        edit, problem.rule.skill, span.kind, span.rank, best, dose, shares, problem.predictor.passes
    )
    return result if unseen is None else replace(result, judged=judged_edit(problem, edit, unseen))


def _undone(
    select: GroupedSplit,
    undo: Undo,
    batch: Callable[[int], TokenSet] | None,
    limits: Limits,
    unseen: TokenSet | None,
) -> RemovalResult:
    problem, before = RemovalProblem(select, batch or draws(select.tokens, 1), limits), select.predictor.spent
    _ = problem.headroom  # a skill that was never learned is refused before anything is done
    edit, record, shares = undo_skill(problem, undo, repair=batch is not None)
    kind = "all recorded movement" if undo.rows is None else "movement inside a span"
    result = RemovalResult(
        edit,
        select.rule.skill,
        kind,
        edit.rows.shape[1] if undo.rows is None else len(undo.rows),
        None,
        1.0,
        shares,
        problem.predictor.spent - before,
        undone=record,
    )
    return result if unseen is None else replace(result, judged=judged_edit(problem, edit, unseen))


def judged_edit(problem: RemovalProblem, edit: Edit, unseen: TokenSet) -> Judgement:
    """What an edit of the problem's weights does on unseen tokens."""
    moved = edit.moved(problem.theta)
    return judge(problem, problem.select.on(unseen), lambda tokens: problem.predictor.at(moved, tokens))


def missed_bounds(skill: str, judged: Judgement, limits: Limits, *, undone: bool = False) -> tuple[str, ...]:
    """Sentences, one for every bound that a judged edit does not meet.

    Args:
        skill: name of what was removed.
        judged: what the edit does.
        limits: what was asked for.
        undone: whether movement was undone, where windows and repair are the remedy instead of a budget.
    """
    more = "undo an earlier or a longer window" if undone else "give a larger budget or span"
    spare = "repair for more steps, or allow more" if undone else "give a larger budget, or allow more"
    target, off = judged.target_share, judged.worst_off_share
    found = []
    if not target >= limits.target:
        found.append(
            f"{skill}: damage must reach {limits.target:.1%} of the headroom, got {target:.1%}; {more}"
        )
    if not off <= limits.off:
        found.append(
            f"{skill}: another group may lose {limits.off:.2%} of its headroom, the worst loses {off:.2%}; "
            f"{spare}"
        )
    if not judged.kl <= limits.kl:
        found.append(
            f"{skill}: other groups may be {limits.kl:g} nats (KL) from the original, the worst is "
            f"{judged.kl:.3g}; {spare}"
        )
    return tuple(found)


def _grouped(tokens: TokenSet, target: Target) -> tuple[TokenSet, GroupRule]:
    """Tokens and groups of a target; a mask travels with the tokens as a label."""
    if isinstance(target, GroupRule):
        return tokens, target
    if isinstance(target, str):
        if target not in tokens.skills:
            raise ValueError(
                f"a skill must be one the tokens are labelled with, got '{target}'; "
                f"known are {sorted(tokens.skills)}"
            )
        return tokens, labelled(target, [name for name in tokens.skills if name != target])
    name = "(target)"
    return replace(tokens, skills={**tokens.skills, name: target}), labelled(name)


def draws(tokens: TokenSet, size: int, seed: int = 0) -> Callable[[int], TokenSet]:
    """Fit batches from sequences at hand: a fresh draw without replacement at every step."""

    def batch(step: int) -> TokenSet:
        generator = generator_for(seed, "removal fit", step)
        return tokens.select(torch.randperm(tokens.sequences, generator=generator)[:size])

    return batch


def remove_in_order(
    split: EvaluatedSplit,
    targets: Sequence[Wanted],
    remove: Callable[[EvaluatedSplit, Wanted], RemovalResult],
) -> tuple[Edit, list[RemovalResult]]:
    """Remove several skills one after the other; each starts from the weights the last one left.

    Groups already removed have no headroom left at those weights, so they drop out of the others'
    bounds by themselves.

    Args:
        split: of the original weights.
        targets: in order.
        remove: removes one of them, see :func:`remove_skill`.

    Returns:
        All movements together as one edit of the original weights, and the single results.
    """
    moved = torch.zeros_like(split.theta)
    results: list[RemovalResult] = []
    for target in targets:
        results.append(remove(at_weights(split, split.theta + moved) if results else split, target))
        moved = moved + results[-1].edit.delta()
    names = [result.skill for result in results]
    return from_delta(split.movement.base, moved, "removal", provenance={"skills": names}), results
