"""Testbed T7: circularity. Random directions of a softmax regression, and planted ones.

Tokens whose own projected loss fell along a random direction are hurt when that movement is undone (what
POLCA gives a vector is -(D + S) / 2), so a test of shuffled labels rejects nearly always. The words must
not, and question A, which observes rotated bases anew, must see that a random basis is nothing special.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from experiments.testbeds.base import BedResult, BedSettings, Check, at_least, at_most, orthonormal
from interventions.causal.bases import Aligned
from interventions.causal.evidence import selectivity_of
from interventions.causal.questions import Verdict
from interventions.causal.statistics import Array, Bits, binomial_bound, rank_p
from interventions.causal.test import causal_test
from interventions.damage import EvaluatedSplit
from interventions.edits import project_out
from polca_edit.basis.record import unlabelled
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.clusters.density import ClusterSettings
from polca_edit.clusters.hypotheses import Hypothesis, TokenGroup
from polca_edit.derivatives.objective import Objective
from polca_edit.observation import ObserveSettings, observe
from polca_edit.seeds import generator_for
from polca_edit.tokens import TokenSet

SAMPLES, CLUMPED, INPUTS, CLASSES, STEPS, EVERY = 1000, 600, 60, 8, 120, 6
PER_DOCUMENT, PROTOTYPES = 5, 10
#: Share of tokens that make a direction's cluster, and directions of one random basis.
SHARE, VECTORS = 0.3, 10
Table = NDArray[np.float64]


@dataclass(frozen=True)
class Samples:
    """Inputs (n, INPUTS), labels (n,), and the prototype each input was drawn around (n,)."""

    x: Table
    label: NDArray[np.int64]
    prototype: NDArray[np.int64]

    @property
    def one_hot(self) -> Table:
        """(n, CLASSES)."""
        return np.eye(CLASSES)[self.label]

    def tokens(self) -> TokenSet:
        """Documents of five samples, with the prototype and label as features."""
        joined = torch.from_numpy(np.concatenate([self.x, self.label[:, None]], axis=1))
        count = len(self.x) // PER_DOCUMENT
        return TokenSet(
            joined.view(count, PER_DOCUMENT, INPUTS + 1),
            torch.ones(count, PER_DOCUMENT, dtype=torch.bool),
            torch.arange(count),
            features={"prototype": self.prototype.astype(str), "label": self.label.astype(str)},
        )


def softmax(logits: Table) -> Table:
    """Over the last axis."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))


def token_loss(module: nn.Module, inputs: Tensor) -> Tensor:
    """(B, P) cross-entropies of a linear classifier."""
    logits: Tensor = module(inputs[..., :INPUTS])
    label = inputs[..., INPUTS].long()
    return -logits.log_softmax(-1).gather(-1, label[..., None])[..., 0]


@dataclass(frozen=True)
class Regression:
    """One trained softmax regression with its halves.

    Attributes:
        path: (T, CLASSES, INPUTS) weights over training.
        select: samples on which clusters are found.
        evaluate: unseen samples.
        split: the trained model on the unseen samples.
    """

    path: Table
    select: Samples
    evaluate: Samples
    split: EvaluatedSplit

    def attributed(self, row: Table) -> Array:
        """(M,) loss allocated to a unit direction on select (trapezoid), nats."""
        x, wanted = self.select.x, self.select.one_hot
        slopes = ((softmax(np.einsum("mi,tki->tmk", x, self.path)) - wanted) * (x @ row.T)).sum(-1)
        moved = np.tensordot(np.diff(self.path, axis=0), row, axes=2)
        return np.asarray(((slopes[:-1] + slopes[1:]) / 2 * moved[:, None]).sum(0))

    def members(self, row: Table) -> Bits:
        """Unseen tokens of a direction's cluster: a ridge on input x label, learnt from select's own L_b."""
        own = top_share(-self.attributed(row)).astype(np.float64)
        known, unseen = _features(self.select), _features(self.evaluate)
        fitted = np.linalg.solve(known.T @ known + 100 * np.eye(known.shape[1]), known.T @ (own - own.mean()))
        return top_share(unseen @ fitted)


def _features(samples: Samples) -> Table:
    both = (samples.x[:, :, None] * samples.one_hot[:, None, :]).reshape(len(samples.x), -1)
    return np.concatenate([both, samples.one_hot], axis=1)


def top_share(scores: Array) -> Bits:
    """The tokens with the highest scores."""
    return np.asarray(scores >= np.quantile(scores, 1 - SHARE))


def train_regression(seed: int, *, clumped: bool) -> Regression:
    """120 full-batch gradient steps on teacher labels.

    Args:
        seed: of teacher and data.
        clumped: inputs lie around a few prototypes, so that any direction finds clusters (question A).
    """
    g = np.random.default_rng([seed, int(clumped)])
    teacher = 2 * g.normal(size=(CLASSES, INPUTS)) / np.sqrt(INPUTS)
    centres = g.normal(size=(PROTOTYPES, INPUTS))

    count = CLUMPED if clumped else SAMPLES

    def draw() -> Samples:
        prototype = g.integers(PROTOTYPES, size=count)
        x = g.normal(size=(count, INPUTS))
        x = centres[prototype] + 0.3 * x if clumped else x
        chance = softmax(x @ teacher.T).cumsum(1)
        return Samples(x, (chance > g.random((count, 1))).argmax(1), prototype)

    data, select, evaluate = draw(), draw(), draw()
    weights, path = np.zeros((CLASSES, INPUTS)), []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            path.append(weights.copy())
        weights = weights - 0.5 * (softmax(data.x @ weights.T) - data.one_hot).T @ data.x / count
    module = nn.Linear(INPUTS, CLASSES, bias=False, dtype=torch.float64)
    loss = Objective(module, token_loss, batch_size=4096)
    flat = {EVERY * t: torch.from_numpy(point).flatten() for t, point in enumerate(path)}
    split = EvaluatedSplit(loss, open_checkpoints(flat, loss.space), evaluate.tokens())
    return Regression(np.stack(path), select, evaluate, split)


def pairs_of(run: Regression, rows: Tensor, basis: str) -> list[Hypothesis]:
    """Every row with its own cluster, as POLCA pairs them."""
    return [
        Hypothesis(
            f"{basis} {k}",
            row[None],
            TokenGroup.labelled(f"cluster of {basis} {k}", torch.from_numpy(found), run.split.tokens),
            "polca",
            basis,
            (k,),
            span=rows,
        )
        for k, row in enumerate(rows)
        for found in [run.members(row.view(CLASSES, INPUTS).numpy())]
    ]


def tested(run: Regression, pairs: Sequence[Hypothesis], settings: BedSettings, seed: int) -> list[Verdict]:
    """One table of one run; rotated bases are left to question A's own bed."""
    test = replace(settings.test, seed=seed, null_documents=80, rotations=8, observed_rotations=0)
    return list(causal_test(run.split, pairs, test).rows)


def _called(rows: Sequence[Verdict]) -> int:
    return sum(row.word in ("selective", "carrier") for row in rows)


def label_shuffle_p(run: Regression, pair: Hypothesis, generator: np.random.Generator) -> tuple[float, float]:
    """(p against shuffled labels under the same edit, AUC of damage for membership): the trap."""
    damage = run.split.damage(project_out(run.split, pair.rows))
    change, room = damage.change.numpy(), run.split.headroom.numpy()
    members = pair.group.on(run.split.tokens).numpy()

    def statistic(mask: Bits) -> float:
        return selectivity_of(change, room, mask, {"rest": ~mask})

    null = np.array([statistic(generator.permutation(members)) for _ in range(39)])
    return rank_p(statistic(members), null), float(roc_auc_score(members, change))


def class_rows(run: Regression) -> Tensor:
    """(CLASSES, N) the directions in which each class's weights moved."""
    moved = run.path[-1] - run.path[0]
    rows = np.zeros((CLASSES, CLASSES, INPUTS))
    for label in range(CLASSES):
        rows[label, label] = moved[label] / np.linalg.norm(moved[label])
    return torch.from_numpy(rows.reshape(CLASSES, -1))


def bed_t7(settings: BedSettings) -> list[BedResult]:
    """T7: random directions, every class direction as a planted one, and A on random bases."""
    runs = [train_regression(seed, clumped=False) for seed in range(settings.seeds)]
    bases = -(-settings.directions // (VECTORS * len(runs)))
    random, trap = [], []
    rng = np.random.default_rng(2)
    for seed, run in enumerate(runs):
        g = generator_for(seed, "T7")
        rows = [orthonormal(VECTORS, CLASSES * INPUTS, g) for _ in range(bases)]
        pairs = [pair for number, own in enumerate(rows) for pair in pairs_of(run, own, f"random{number}")]
        random += tested(run, pairs, settings, seed)
        trap += [label_shuffle_p(run, pair, rng) for pair in pairs]
    planted = [
        row
        for seed, run in enumerate(runs)
        for row in tested(run, pairs_of(run, class_rows(run), "class"), settings, seed)
    ]
    return [_random_result(random, trap), _planted_result(planted), _aligned_result(settings)]


def _random_result(random: Sequence[Verdict], trap: Sequence[tuple[float, float]]) -> BedResult:
    count, called = len(random), _called(random)
    bound = binomial_bound(count, 0.05)
    checks = (
        at_least("AUC of damage for the own cluster (the trap exists)", _mean([a for _, a in trap]), 0.8),
        at_least("shuffled labels alone reject", _mean([p < 0.05 for p, _ in trap]), 0.9),
        at_least("needed by the own cluster", _mean([r.answers["N"] == "yes" for r in random]), 0.1),
        at_most(f"selective or carrier among {count}", called, bound),
    )
    observed = "chance" if called <= bound else "selective"
    return BedResult("T7", f"{count} random directions", "chance", observed, checks, "never")


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _planted_result(planted: Sequence[Verdict]) -> BedResult:
    power = _called(planted) / len(planted)
    check = at_least("power", power, 0.8)
    observed = "selective" if check.passed else "missed"
    return BedResult("T7", f"{len(planted)} class directions", "selective", observed, (check,))


def aligned_in(seed: int, settings: BedSettings, *, planted: bool) -> Aligned:
    """A for one basis of one run on clumped inputs, through the whole chooser.

    Args:
        seed: of the run.
        settings: of the self-test.
        planted: the basis is that of the class directions instead of a random one.
    """
    run = train_regression(seed, clumped=True)
    drawn = orthonormal(CLASSES, CLASSES * INPUTS, generator_for(seed, "T7 basis"))
    rows = class_rows(run) if planted else drawn
    clusters = ClusterSettings(drop_rising_vectors=False, min_samples_share=0.02, algorithm="generic")
    basis = unlabelled("random", rows)
    seen = observe(
        run.split.loss, run.split.series, basis, run.select.tokens(), ObserveSettings(clusters=clusters)
    )
    test = replace(settings.test, rotations=0, transplants=0, seed=seed, observed_rotations=settings.observed)
    table = causal_test(run.split, seen.hypotheses(), test, observations={"random": seen})
    return table.bases[0].aligned


def _aligned_result(settings: BedSettings) -> BedResult:
    found = [aligned_in(seed, settings, planted=False) for seed in range(settings.seeds)]
    yes = sum(a.answer == "yes" for a in found)
    checks: list[Check] = [
        at_most("bases that A calls special", yes, binomial_bound(len(found), 0.05)),
        at_least(
            "permuted clusters alone reject (the trap)",
            _mean([a.p is not None and a.p < 0.05 for a in found]),
            0.9,
        ),
        at_least("rotated bases observed", min(len(a.rotated) for a in found), settings.observed // 2),
    ]
    observed = "not yes" if checks[0].passed else "yes"
    return BedResult("T7", "A of random bases", "not yes", observed, tuple(checks), "never")
