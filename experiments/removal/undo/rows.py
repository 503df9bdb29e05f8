"""What is measured of one method on one skill: the model after repair, and how the skill comes back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.stats
import torch
from jaxtyping import Float
from torch import Tensor

from experiments.removal.undo.methods import DISTIL, HELD, Start, TriedSetting
from experiments.removal.undo.place import Place, moved_by
from interventions.blocking import Hold
from interventions.removal.measures import chance_loss, judge, relearn
from interventions.removal.robust import distillation
from interventions.removal.tuning import label_loss, masked_batches, tuned
from interventions.removal.windows import movement_rows

#: Directions of a window's movement that a constrained repair leaves alone.
HELD_RANK = 4
#: Shares of the skill's labels that an attacker has.
FRACTIONS = (0.1, 0.0, 0.01, 1.0)


@dataclass(frozen=True)
class Curve:
    """The skill's loss while training goes on.

    Attributes:
        fraction: of the skill's labels that are given back, beside all labels of everything else.
        rate: multiple of training's learning rate.
        steps: of fine-tuning, batches of the effort's size.
        loss: of the skill on evaluate, nats.
        accuracy: of the skill.
    """

    fraction: float
    rate: float
    steps: tuple[int, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One method on one skill and seed after some steps of repair, judged on the evaluate split.

    Attributes:
        skill: what was removed.
        method: how.
        seed: of the run.
        setting: chosen on select.
        repair_steps: on everything but the skill.
        target_loss: of the skill, nats.
        target_accuracy: of the skill.
        chance: loss of the best constant answer, nats.
        gold_loss: of the model that was never taught the skill, nats; None while it is not measured.
        worst_other_share: largest share of its headroom that another group lost.
        group_shares: group -> the same.
        kept_after_relabelling: share of the damage left by the best relabelling of the outputs.
        relearn: curve with a tenth of the labels, at training's rate.
        relearning: curves with other fractions, and with a tenth at other rates.
        passes: of everything up to the end of repair, a forward with its backward counting three.
        passes_share: of those of the recorded training.
        seconds: of the same.
        measured_seconds: of measuring it.
        edit_norm: length of the whole movement, weight units.
        tried: settings on select.
        gap: mean of 1 - loss / gold's loss over the points of ``relearn`` after the first; None without gold.
        gap_to_ignorance: the same with gold's loss capped at chance: a model that does not know the answer
            need not be confidently wrong.
        predicted: group -> share that the timeline said it would lose with the skill's own window, on select,
            before any repair.
        agreement: rank correlation of that with ``group_shares`` over the groups outside the skill; None
            with fewer than three.
        beyond_gold: largest share that another group lost beyond what it lacks in the model that was never
            taught the skill: what is built on a skill is not learned there either. None without gold.
        half_steps: first step at which half of the way from chance to the trained loss is lost, if any.
    """

    skill: str
    method: str
    seed: int
    setting: str
    repair_steps: int
    target_loss: float
    target_accuracy: float
    chance: float
    gold_loss: float | None
    worst_other_share: float
    group_shares: Mapping[str, float]
    kept_after_relabelling: float
    relearn: Curve
    relearning: tuple[Curve, ...]
    passes: float
    passes_share: float
    seconds: float
    measured_seconds: float
    edit_norm: float
    tried: tuple[TriedSetting, ...]
    gap: float | None = None
    gap_to_ignorance: float | None = None
    half_steps: int | None = None
    predicted: Mapping[str, float] = field(default_factory=dict)
    agreement: float | None = None
    beyond_gold: float | None = None


def repaired_at(
    place: Place, method: str, start: Start, wanted: Sequence[int], teacher: Start | None
) -> dict[int, tuple[Tensor, float, float]]:
    """Weights after each wanted number of repair steps, with the passes and seconds they took.

    Repair is the same for every method: training's optimisation annealed over so many steps, on everything
    but the skill. Noise-and-distil learns from its teacher's outputs instead of from labels.
    """
    if start.finished or not max(wanted):
        return {0: (start.theta, 0.0, 0.0)}
    predictor = place.problem.predictor
    if method == DISTIL:
        assert teacher is not None
        loss = distillation(place.problem, teacher.theta)
    else:
        loss = label_loss(predictor, masked_batches(place.draws("repair"), place.rule))
    rows = movement_rows(place.problem.select, place.own, HELD_RANK) if method == HELD else None
    hold = None if rows is None else Hold(place.run.task.space, start.theta, rows)
    found: dict[int, tuple[Tensor, float, float]] = {}
    for steps in wanted:
        before, began = predictor.spent, time.perf_counter()
        settings = place.repair_settings(steps)
        theta = tuned(predictor, start.theta, loss, settings, hold=hold) if steps else start.theta
        found[steps] = theta.clone(), predictor.spent - before, time.perf_counter() - began
    return found


def curve(place: Place, theta: Float[Tensor, " N"], fraction: float, rate: float = 1.0) -> Curve:
    """The skill's loss on evaluate while the weights are trained on with a share of its labels."""
    effort = place.effort
    steps = effort.relearn_steps if fraction == FRACTIONS[0] else effort.relearn_steps // 2
    points = relearn(
        place.judged,
        theta,
        place.given_back(fraction),
        steps,
        learning_rate=rate * place.rate,
        every=effort.every,
    )
    return Curve(
        fraction,
        rate,
        tuple(p.step for p in points),
        tuple(p.loss for p in points),
        tuple(p.accuracy for p in points),
    )


def measured(
    place: Place,
    method: str,
    start: Start,
    steps: int,
    after: tuple[Tensor, float, float],
    *,
    whole: bool = True,
) -> Row:
    """One row.

    Args:
        place: skill and run.
        method: name.
        start: where repair set in.
        steps: of repair.
        after: weights, passes and seconds of the repair.
        whole: false for a tenth of the labels at training's rate alone.
    """
    began = time.perf_counter()
    theta, passes, seconds = after
    judged, predictor = place.judged, place.problem.predictor
    judgement = judge(place.problem, judged, lambda tokens: predictor.at(theta, tokens))
    spent = start.passes + passes
    first = curve(place, theta, FRACTIONS[0])
    more: list[Curve] = []
    if whole:
        more += [curve(place, theta, fraction) for fraction in FRACTIONS[1:]]
        more += [curve(place, theta, FRACTIONS[0], rate) for rate in place.effort.rates if rate != 1.0]
    return Row(
        place.skill,
        method,
        place.run.config.seed,
        start.setting,
        steps,
        first.loss[0],
        judgement.accuracy,
        chance_loss(judged.tokens.output_of[judged.target]),
        None,
        judgement.worst_off_share,
        judgement.groups,
        judgement.refit.kept,
        first,
        tuple(more),
        spent,
        spent / place.training_passes,
        start.seconds + seconds,
        time.perf_counter() - began,
        moved_by(place, theta),
        start.tried,
        predicted=dict(own.shares) if (own := place.timeline.own(place.skill)) is not None else {},
    )


def gap(losses: Sequence[float], gold: Sequence[float], ceiling: float = float("inf")) -> float:
    """Mean of 1 - loss / gold's over a curve without its first point; never below zero at a point.

    >>> gap([9.0, 1.0, 2.0], [9.0, 2.0, 2.0])
    0.25
    >>> gap([9.0, 1.0, 2.0], [9.0, 4.0, 4.0], ceiling=2.0)
    0.25
    """
    level = np.minimum(np.array(gold[1:]), ceiling)
    return float(np.maximum(0.0, 1 - np.array(losses[1:]) / level).mean())


def agreement(predicted: Mapping[str, float], fell: Mapping[str, float]) -> float | None:
    """Spearman's rank correlation over the groups that are in both; None with fewer than three.

    >>> agreement({"a": 0.1, "b": 0.5, "c": 0.9}, {"a": 0.0, "b": 0.1, "c": 0.7})
    1.0
    """
    names = [n for n in predicted if n in fell and np.isfinite(predicted[n]) and np.isfinite(fell[n])]
    if len(names) < 3:
        return None
    found = scipy.stats.spearmanr([predicted[n] for n in names], [fell[n] for n in names]).statistic
    return None if np.isnan(found) else round(float(found), 12)


def half_lost(steps: Sequence[int], losses: Sequence[float], chance: float, trained: float) -> int | None:
    """First step at which half of the way from chance to the trained model's loss is gone again."""
    level = trained + 0.5 * (chance - trained)
    return next((s for s, loss in zip(steps, losses, strict=True) if loss <= level), None)


def best_attack(row: Row) -> tuple[float, ...]:
    """Lowest loss at each step over an attacker's learning rates, a tenth of the labels."""
    curves = [row.relearn, *(c for c in row.relearning if c.fraction == row.relearn.fraction)]
    return tuple(float(v) for v in torch.tensor([c.loss for c in curves]).min(0).values.tolist())
