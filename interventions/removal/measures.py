"""Whether a skill is gone: damage on unseen tokens, refit of the outputs, and how fast it comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.removal.grouped import GroupedSplit, token_nll
from interventions.removal.problem import RemovalProblem
from interventions.removal.relabelling import fit_relabelling
from interventions.removal.tuning import MaskedBatches, label_loss, tuned
from polca_edit.tokens import TokenSet
from polca_edit.training import TrainingSettings


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
        chance: accuracy of the best constant answer.
    """

    kept: float
    kept_scaled: float
    accuracy: float
    kept_of_untrained: float
    chance: float


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
    floor = chance(truth, original.judged.shape[-1])
    return RefitResult(plain, kept(edited, True)[0], accuracy, kept(untrained, False)[0], floor)


# -- judgement -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """What an edit does on tokens that neither its fit nor its settings saw.

    Attributes:
        target_share: loss change of the skill's tokens over their headroom, a ratio of means.
        target_capped: share of its headroom that the skill loses, capped per token.
        worst_off_share: largest signed share of another group.
        worst_positive_share: largest positive-part share of another group.
        kl: largest mean KL to the original model of another group, nats.
        accuracy: of the skill's tokens.
        refit: what stays after a relabelling of the outputs, and what chance scores.
        groups: group -> share of headroom lost, NaN without headroom.
        group_accuracy: group -> accuracy.
    """

    target_share: float
    target_capped: float
    worst_off_share: float
    worst_positive_share: float
    kl: float
    accuracy: float
    refit: RefitResult
    groups: Mapping[str, float]
    group_accuracy: Mapping[str, float]


def judge(
    problem: RemovalProblem, judged: GroupedSplit, edited: Callable[[TokenSet], Float[Tensor, "M V"]]
) -> Judgement:
    """Judge an edit on other tokens than those it was chosen on; the relabelling is fitted on select.

    Args:
        problem: what was removed.
        judged: the same weights and groups on unseen tokens, ``problem.select.on(tokens)``.
        edited: logits of the edited model.
    """
    select, here, there = problem.select, problem.select.target, judged.target
    after = edited(judged.tokens)
    shares = judged.shares(after)
    refit = refit_damage(
        SkillOutputs(select.before[here], judged.before[there]),
        SkillOutputs(select.untrained[here], judged.untrained[there]),
        SkillOutputs(edited(select.tokens)[here], after[there]),
        select.tokens.output_of[here],
        judged.tokens.output_of[there],
    )
    return Judgement(
        shares.target,
        shares.target_capped,
        shares.worst_off,
        shares.worst_positive,
        shares.worst_kl,
        shares.target_accuracy,
        refit,
        shares.raw,
        shares.accuracy,
    )


# -- relearning ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RelearningPoint:
    """State of the skill after some fine-tuning steps.

    Attributes:
        step: fine-tuning steps.
        target_share: damage of the skill still there, over its headroom, not capped.
        accuracy: of the skill's tokens.
        loss: mean loss of the skill's tokens, nats.
    """

    step: int
    target_share: float
    accuracy: float
    loss: float = math.nan


def relearn(
    judged: GroupedSplit,
    start: Float[Tensor, " N"],
    batch: MaskedBatches,
    steps: int,
    *,
    learning_rate: float,
    every: int,
) -> list[RelearningPoint]:
    """Fine-tune edited weights and watch the skill.

    Args:
        judged: tokens the skill is watched on, with the original weights and the reference.
        start: weights after the edit.
        batch: step -> (tokens, (m,) which of them are trained on), steps from 1.
        steps: fine-tuning steps.
        learning_rate: constant, AdamW without decay.
        every: spacing of the points.
    """
    points: list[RelearningPoint] = []
    before, room = float(judged.split.before[judged.target].double().mean()), judged.target_headroom
    answers = judged.tokens.output_of[judged.target]

    def watch(theta: Tensor) -> dict[str, float]:
        logits = judged.predictor.at(theta, judged.tokens)[judged.target]
        loss = float(token_nll(logits, answers).double().mean())
        right = float((logits.argmax(-1) == answers).double().mean())
        at = min(len(points) * every, steps)
        points.append(RelearningPoint(at, (loss - before) / room, right, loss))
        return {}

    settings = TrainingSettings(steps, learning_rate, weight_decay=0.0, warmup=0)
    tuned(judged.predictor, start, label_loss(judged.predictor, batch), settings, every=every, watch=watch)
    return points


def chance_loss(answers: Int[Tensor, " M"]) -> float:
    """Loss of the best constant prediction: the entropy of the answers' shares, nats.

    >>> round(chance_loss(torch.tensor([0, 1, 2, 3])), 4)
    1.3863
    """
    shares = torch.bincount(answers).double() / len(answers)
    return float(-(shares[shares > 0] * shares[shares > 0].log()).sum())
