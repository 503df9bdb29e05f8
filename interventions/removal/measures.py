"""Whether a skill is gone: refit of the outputs, other tasks that use it, and how fast it comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.removal.problem import RemovalProblem, token_nll
from interventions.removal.relabelling import fit_relabelling
from interventions.removal.spans import whole_space
from polca_edit.tokens import TokenSet


def chance(answers: Int[Tensor, " M"], classes: int) -> float:
    """Accuracy of the best constant answer, at least 1 / classes.

    >>> chance(torch.tensor([0, 0, 1, 2]), 10)
    0.5
    """
    return max(1 / classes, float(torch.bincount(answers, minlength=classes).max()) / len(answers))


@dataclass(frozen=True)
class RefitResult:
    """What is left of the damage after relabelling fitted on select, judged on other tokens.

    Attributes:
        kept: share of the skill's damage left (damage capped at the headroom).
        kept_scaled: the same when a multiple of the logits is refitted too (stricter than asked).
        accuracy: of the skill's tokens after the relabelling.
        kept_of_untrained: share of the headroom left for the reference model under the same refit:
            what a model that knows nothing scores. Low where few answers occur (a digit that is
            0 or 1 is half known from an output bias alone).
    """

    kept: float
    kept_scaled: float
    accuracy: float
    kept_of_untrained: float


@dataclass(frozen=True)
class SkillOutputs:
    """Logits of the skill's tokens, on the tokens the refit is fitted on and on those it is judged on.

    Attributes:
        fitted: (m, V) on select.
        judged: (n, V) on the judging tokens.
    """

    fitted: Float[Tensor, "m V"]
    judged: Float[Tensor, "n V"]


def refit_damage(
    original: SkillOutputs,
    untrained: SkillOutputs,
    edited: SkillOutputs,
    answers: Int[Tensor, " m"],
    truth: Int[Tensor, " n"],
) -> RefitResult:
    """Fit one relabelling of the skill's outputs on select, measure how much damage it leaves.

    Args:
        original: the model before the edit.
        untrained: the reference model.
        edited: the model after the edit.
        answers: (m,) true answers on select.
        truth: (n,) true answers on the judging tokens.
    """

    def loss(logits: Tensor) -> float:
        return float(token_nll(logits, truth).double().mean())

    before = loss(original.judged)
    room = loss(untrained.judged) - before

    def kept(outputs: SkillOutputs, with_scale: bool) -> tuple[float, float]:
        relabelled = fit_relabelling(outputs.fitted, answers, with_scale=with_scale).apply(outputs.judged)
        damage = min(loss(outputs.judged) - before, room)
        accuracy = float((relabelled.argmax(-1) == truth).double().mean())
        return (loss(relabelled) - before) / max(damage, 1e-9), accuracy

    plain, accuracy = kept(edited, False)
    return RefitResult(plain, kept(edited, True)[0], accuracy, kept(untrained, False)[0])


# -- relearning ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RelearningPoint:
    """State of the skill after some fine-tuning steps.

    Attributes:
        step: fine-tuning steps.
        target_share: damage of the skill still there, over its headroom, not capped.
        accuracy: of the skill's tokens.
    """

    step: int
    target_share: float
    accuracy: float


def relearn(
    problem: RemovalProblem,
    start: Float[Tensor, " N"],
    batch: Callable[[int], tuple[TokenSet, Tensor]],
    steps: int,
    *,
    learning_rate: float,
    every: int,
    judge: TokenSet,
) -> list[RelearningPoint]:
    """Fine-tune edited weights and watch the skill.

    Args:
        problem: what was removed.
        start: weights after the edit.
        batch: step -> (tokens, (m,) which of them are trained on).
        steps: fine-tuning steps.
        learning_rate: constant, AdamW without decay.
        every: spacing of the points.
        judge: tokens the skill is watched on.
    """
    predictor, span = problem.predictor, whole_space(start.numel())
    theta = start.clone().requires_grad_()
    optimiser = torch.optim.AdamW([theta], lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    skill = problem.rule.is_target(problem.rule.assign(judge))
    answers = judge.output_of[skill]
    base = token_nll(predictor.at(problem.theta, judge)[skill], answers).mean()
    room = token_nll(predictor.at(problem.reference, judge)[skill], answers).mean() - base
    points = []
    for step in range(steps + 1):
        if step % every == 0:
            logits = predictor.at(theta.detach(), judge)[skill]
            share = (token_nll(logits, answers).mean() - base) / room
            right = (logits.argmax(-1) == answers).double().mean()
            points.append(RelearningPoint(step, float(share), float(right)))
        if step == steps:
            break
        tokens, trained = batch(step)
        losses = token_nll(predictor.at(span.move(theta), tokens, differentiable=True), tokens.output_of)
        value = losses[trained].sum() / trained.sum().clamp_min(1)
        (theta.grad,) = torch.autograd.grad(value, [theta])
        optimiser.step()
    return points


# -- portability -----------------------------------------------------------------------------------------


def own_answers_loss(
    problem: RemovalProblem,
    edited: Float[Tensor, " N"],
    generate: Callable[[Tensor], TokenSet],
    tokens: TokenSet,
) -> tuple[float, float]:
    """Accuracy per skill when the model must go on from its own earlier outputs, (before, after).

    Args:
        problem: what was removed.
        edited: weights after the edit.
        generate: flat weights -> tokens whose context is the model's own output and whose
            answers are still the true ones.
        tokens: the original tokens, for their groups (same order).
    """
    target = problem.rule.is_target(problem.rule.assign(tokens))
    result = []
    for theta in (problem.theta, edited):
        own = generate(theta)
        right = problem.predictor.at(theta, own).argmax(-1) == tokens.output_of
        result.append(float(right[target].float().mean()))
    return result[0], result[1]
