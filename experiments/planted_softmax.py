"""Testbed T7: the circularity null. Random directions of a softmax regression, and planted ones.

Tokens whose own L_b fell along a random direction are hurt when that movement is undone, so a test
of the tokens alone rejects nearly always. The pipeline null must not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.planted_base import SEEDS, BedResult, at_least, at_most
from interventions import measures
from interventions.evidence import PairEvidence, combine
from interventions.measures import Target
from interventions.protocol import PlanSettings
from interventions.statistics import (
    Array,
    Bits,
    Draws,
    binomial_bound,
    bootstrap,
    resampling_weights,
    sequence_permutation_p,
    sequence_sums,
)
from interventions.verdict import Thresholds, decide

SAMPLES, INPUTS, CLASSES, STEPS, EVERY = 1500, 60, 8, 120, 6
PER_SEQUENCE = 5
SHARE = 0.3
DIRECTIONS = 200
SKIPPED = (
    "minimum_effect",
    "power",
    "headroom",
    "description",
    "positive_control",
    "c3",
    "c4",
    "c6",
    "dose",
    "equivalence",
    "worst_other",
)


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row-wise softmax."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))


@dataclass(frozen=True)
class Regression:
    """One trained softmax regression with its held-out halves.

    Attributes:
        path: (T, CLASSES, INPUTS) weights over training.
        x: split -> inputs; y: split -> one-hot labels.
        errors: split -> (T, M, CLASSES) p - y at every checkpoint.
        rule: (M_E, M_S) from memberships on S to scores on E, a ridge on inputs x label.
        documents: (M,) five samples share one.
    """

    path: NDArray[np.float64]
    x: dict[str, NDArray[np.float64]]
    y: dict[str, NDArray[np.float64]]
    errors: dict[str, NDArray[np.float64]]
    rule: NDArray[np.float64]
    documents: NDArray[np.int64]

    def loss(self, weights: NDArray[np.float64], split: str) -> Array:
        """(M,) losses, nats."""
        logits = self.x[split] @ weights.T
        shifted = logits - logits.max(1, keepdims=True)
        return np.asarray(np.log(np.exp(shifted).sum(1)) - (shifted * self.y[split]).sum(1))

    def attributed(self, row: NDArray[np.float64], split: str) -> Array:
        """(M,) loss allocated to a unit direction (trapezoid), nats."""
        slopes = (self.errors[split] * (self.x[split] @ row.T)).sum(-1)
        moved = np.tensordot(np.diff(self.path, axis=0), row, axes=2)
        return np.asarray(((slopes[:-1] + slopes[1:]) / 2 * moved[:, None]).sum(0))


def train_regression(seed: int) -> Regression:
    """120 full-batch gradient steps on teacher labels."""
    g = np.random.default_rng(7000 + seed)
    teacher = g.normal(size=(CLASSES, INPUTS)) / np.sqrt(INPUTS) * 2

    def draw(count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        x = g.normal(size=(count, INPUTS))
        p = softmax(x @ teacher.T)
        label = (p.cumsum(1) > g.random((count, 1))).argmax(1)
        return x, np.eye(CLASSES)[label]

    data = {name: draw(SAMPLES) for name in ("train", "select", "evaluate")}
    weights, path = np.zeros((CLASSES, INPUTS)), []
    x, y = data["train"]
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            path.append(weights.copy())
        weights = weights - 0.5 * (softmax(x @ weights.T) - y).T @ x / len(x)
    table = np.stack(path)
    splits = ("select", "evaluate")
    errors = {s: softmax(np.einsum("mi,tki->tmk", data[s][0], table)) - data[s][1] for s in splits}

    def features(split: str) -> NDArray[np.float64]:
        own, label = data[split]
        both = (own[:, :, None] * label[:, None, :]).reshape(len(own), -1)
        return np.concatenate([both, label], axis=1)

    f_s, f_e = features("select"), features("evaluate")
    rule = f_e @ np.linalg.solve(f_s.T @ f_s + 100 * np.eye(f_s.shape[1]), f_s.T)
    documents = np.arange(SAMPLES) // PER_SEQUENCE
    return Regression(
        table, {s: data[s][0] for s in splits}, {s: data[s][1] for s in splits}, errors, rule, documents
    )


def top_share(scores: Array, share: float = SHARE) -> Bits:
    """The tokens with the highest scores."""
    return np.asarray(scores >= np.quantile(scores, 1 - share))


def pipeline(run: Regression, row: NDArray[np.float64]) -> tuple[Bits, Array]:
    """Membership on E by a rule learnt on S, and the per-token damage of undoing the direction."""
    own = top_share(-run.attributed(row, "select"))
    members = top_share(run.rule @ (own - own.mean()))
    back = float(np.sum(row * (run.path[-1] - run.path[0])))
    change = run.loss(run.path[-1] - back * row, "evaluate") - run.loss(run.path[-1], "evaluate")
    return members, change


def statistic(change: Array, room: Array, members: Bits) -> float:
    """T of one direction."""
    return float(measures.selectivity(change, room, Target(members)))


def random_row(generator: np.random.Generator) -> NDArray[np.float64]:
    """A uniformly random direction of weight space."""
    row = generator.normal(size=(CLASSES, INPUTS))
    return np.asarray(row / np.linalg.norm(row))


def primary_null(run: Regression, room: Array, change: Array, members: Bits, draws: int, seed: int) -> Array:
    """The primary null of a direction: T of the whole pipeline on independent reference directions."""
    generator = np.random.default_rng(90_000 + seed)
    found = []
    for _ in range(draws):
        other, moved = pipeline(run, random_row(generator))
        found.append(statistic(moved, room, other))
    return np.array(found)


def label_shuffle_null(
    run: Regression, room: Array, change: Array, members: Bits, draws: int, seed: int
) -> Array:
    """The mistake: T of shuffled cluster labels under the same direction."""
    generator = np.random.default_rng(91_000 + seed)
    return np.array([statistic(change, room, generator.permutation(members)) for _ in range(draws)])


def evidence_of(
    run: Regression, row: NDArray[np.float64], name: str, weights: Array, null: Array
) -> PairEvidence:
    """The evidence the verdict rule needs for one direction."""
    members, change = pipeline(run, row)
    room = run.loss(run.path[0], "evaluate") - run.loss(run.path[-1], "evaluate")
    count = weights.shape[1]

    def mean(values: Array, mask: Bits) -> Draws:
        sums = {
            "v": sequence_sums(values, mask, run.documents, count),
            "n": sequence_sums(np.ones_like(values), mask, run.documents, count),
        }
        return bootstrap(sums, lambda t: t["v"] / t["n"], weights)

    damage, headroom = mean(change, members), mean(room, members)
    share = float(measures.capped_share(np.array(damage.estimate), np.array(headroom.estimate)))
    value = statistic(change, room, members)
    return PairEvidence(
        name=name,
        vectors=(0,),
        damage=damage,
        headroom=headroom,
        share=Draws(share, np.full(len(weights), share)),
        raw_share=share,
        effect=Draws(value, np.full(len(weights), value)),
        attributed=mean(run.attributed(row, "evaluate"), members),
        reference={"pipeline": null},
        not_applicable=SKIPPED,
    )


def bed_t7(settings: PlanSettings) -> list[BedResult]:
    """T7: 200 random directions over five seeds, and every class direction as a planted one."""
    runs = [train_regression(seed) for seed in range(SEEDS)]
    count = DIRECTIONS
    weights = resampling_weights(SAMPLES // PER_SEQUENCE, 200, np.random.default_rng(1))
    thresholds = Thresholds(effect_floor=0.0, effect_share=0.0)
    rows = [[random_row(np.random.default_rng(1000 * s + i)) for i in range(count)] for s in range(SEEDS)]
    rooms = [run.loss(run.path[0], "evaluate") - run.loss(run.path[-1], "evaluate") for run in runs]
    kept: dict[int, Array] = {}

    def null_of(seed: int, row: NDArray[np.float64]) -> Array:
        members, change = pipeline(runs[seed], row)
        if primary_null.__name__ != "primary_null" or seed not in kept:
            kept[seed] = primary_null(runs[seed], rooms[seed], change, members, settings.rotations, seed)
        return kept[seed]

    def verdict_of(own: Sequence[NDArray[np.float64]], name: str) -> tuple[str, float]:
        parts = [evidence_of(runs[s], row, name, weights, null_of(s, row)) for s, row in enumerate(own)]
        inputs = combine(parts, seed=settings.seed)
        return decide(inputs, thresholds).verdict, float(inputs.pipeline_p or 1.0)

    found = [verdict_of([rows[s][i] for s in range(SEEDS)], f"random {i}") for i in range(count)]
    causal = sum(v == "causal" for v, _ in found)
    rejected = sum(p < 0.05 for _, p in found)
    aucs, shuffled = _trap(runs[0], rows[0], np.random.default_rng(2))
    bound = binomial_bound(count, 0.05)
    checks = (
        at_least("own-L_b AUC (the trap exists)", float(np.mean(aucs)), 0.8),
        at_least("label shuffle alone rejects", float(np.mean(np.array(shuffled) <= 0.05)), 0.9),
        at_most(f"false causal among {count}", causal, bound),
        at_most(f"bare pipeline rejections among {count}", rejected, bound),
    )
    observed = "null" if causal <= bound else "causal"
    planted = [_class_rows(runs, k) for k in range(CLASSES)]
    powers = [verdict_of(own, f"class {k}")[0] == "causal" for k, own in enumerate(planted)]
    power = float(np.mean(powers))
    return [
        BedResult("T7", "random directions", "null", observed, checks, SKIPPED, "bounded"),
        BedResult(
            "T7",
            "planted class directions",
            "detected",
            "detected" if power >= 0.8 else "missed",
            (at_least("power", power, 0.8),),
            SKIPPED,
        ),
    ]


def _trap(
    run: Regression, rows: Sequence[NDArray[np.float64]], generator: np.random.Generator
) -> tuple[list[float], list[float]]:
    """Damage AUC for membership by own L_b on E, and the label-shuffle p, for 60 random directions."""
    aucs, p_values = [], []
    for row in rows[:60]:
        own = top_share(-run.attributed(row, "evaluate"))
        change = pipeline(run, row)[1]
        aucs.append(measures.detector_auc(change, own))
        p_values.append(sequence_permutation_p(change, own, run.documents, generator, draws=39))
    return aucs, p_values


def _class_rows(runs: Sequence[Regression], label: int) -> list[NDArray[np.float64]]:
    """The direction in which one class's weights moved, per run."""
    rows = []
    for run in runs:
        row = np.zeros((CLASSES, INPUTS))
        row[label] = run.path[-1][label] - run.path[0][label]
        rows.append(row / np.linalg.norm(row))
    return rows
