"""Edits that take one skill out: constrained optimisation of span coordinates, and simpler searches.

The optimised edit solves, over span coordinates z,

    minimise   mean KL to the original model outside the skill  +  confusion on the skill
    subject to damage of the skill                          >= goal   (share of headroom)
               signed and positive-part damage of the others <= eps, 2 eps
               KL of every other group                       <= kappa

by an augmented Lagrangian (Nocedal & Wright 2006, eq. 17.65): bounds are constraints with their own
multipliers, not penalty weights to be guessed. Confusion is the cross-entropy of the prediction
to the uniform distribution: a skill is gone when the outputs do not depend on it, not when they
are confidently wrong, which a relabelling of the outputs would undo.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.edits import Edit, from_delta
from interventions.removal.grouped import LEAST_HEADROOM, mean_by_group, token_kl, token_nll
from interventions.removal.problem import Limits, RemovalProblem
from interventions.removal.relabelling import Refit, fit_relabelling
from interventions.removal.spans import Movable, Span
from polca_edit.allocation.progress import progress
from polca_edit.tokens import TokenSet


@dataclass(frozen=True)
class Batch:
    """One fit batch with what every objective needs, already evaluated.

    Attributes:
        problem: what is being removed.
        tokens: the batch.
        groups: (m,) group of each token.
        target: (m,) tokens of the skill.
        before: (m, V) original logits.
        after: (m, V) logits at the moving weights, differentiable.
        nll_before: (m,) original loss.
        nll_after: (m,) loss, differentiable.
    """

    problem: RemovalProblem
    tokens: TokenSet
    groups: Tensor
    target: Tensor
    before: Tensor
    after: Tensor
    nll_before: Tensor
    nll_after: Tensor

    def mean(self, values: Float[Tensor, " m"]) -> Float[Tensor, " G"]:
        """Mean per group."""
        return mean_by_group(values, self.groups, len(self.problem.rule.names))

    def shares(self) -> Float[Tensor, " G"]:
        """Loss change over headroom per group (groups without headroom are not meaningful)."""
        return self.mean(self.nll_after - self.nll_before) / self.problem.headroom.clamp_min(LEAST_HEADROOM)

    def target_share(self) -> Float[Tensor, ""]:
        """Loss change of the skill's tokens over their headroom."""
        change = (self.nll_after - self.nll_before)[self.target]
        return change.sum() / max(len(change), 1) / self.problem.target_room


@dataclass(frozen=True)
class Multipliers:
    """State of the augmented Lagrangian.

    Attributes:
        values: (C,) multipliers, not negative.
        weight: mu, the quadratic weight.
        rate: share of mu c added to the multipliers each step; below 1 because c is a batch estimate.
    """

    values: Float[Tensor, " C"]
    weight: float
    rate: float = 0.1

    def term(self, violations: Float[Tensor, " C"]) -> Tensor:
        """(max(0, lambda + mu c)^2 - lambda^2) / (2 mu), summed; differentiable in c."""
        pushed = (self.values + self.weight * violations).clamp_min(0)
        return ((pushed.square() - self.values.square()) / (2 * self.weight)).sum()

    def updated(self, violations: Float[Tensor, " C"]) -> Multipliers:
        """Lambda <- max(0, lambda + rate mu c)."""
        moved = (self.values + self.rate * self.weight * violations.detach()).clamp_min(0)
        return replace(self, values=moved)


@dataclass(frozen=True)
class FitSettings:
    """One setting of an iterative method; the fields a method does not use are ignored.

    Attributes:
        learning_rate: Adam's, per coordinate, with warm-up and cosine decay.
        retain: weight of the retain term outside the skill.
        confusion: weight of the uniform-output term on the skill.
        strength: method's own knob (gamma of GradDiff, beta of NPO, task-vector multiple ...).
        stop: end a rival's fit once the batch's target damage reaches the goal; its retain term does not
            get to repair anything then, but unbounded ascent ends in time.
    """

    learning_rate: float = 0.02
    retain: float = 5.0
    confusion: float = 0.5
    strength: float = 1.0
    stop: bool = True


Loss = Callable[[Batch], Tensor]


@dataclass
class ConstrainedLoss:
    """The augmented Lagrangian of one fit; keeps its multipliers between steps.

    Two constraints say that the skill is gone. The damage must reach the goal; and what is left of
    it under the best relabelling of the outputs (bias and permutation, refitted as the fit goes
    on) must reach what the untrained model keeps under the same refit. Confusion comes first and
    these constraints later: from the start, the shortest way to damage is a confidently wrong
    answer (a carry that is always forgotten), which a permutation undoes, and the fit stays there.

    Attributes:
        settings: weights of the minimised part.
        limits: bounds.
        steps: optimiser steps of the whole fit.
        margin: share of each bound that the fit allows itself on its own batches.
        goal: target share the fit aims at.
        confusion_first: share of the steps before the skill's constraints enter.
        target_weight: mu of the skill's constraints.
        others_weight: mu of the other groups' constraints.
        refit_every: steps between refits of the relabelling.
    """

    settings: FitSettings
    limits: Limits
    steps: int
    margin: float = 0.5
    goal: float = 1.02
    confusion_first: float = 0.4
    target_weight: float = 10.0
    others_weight: float = 20.0
    refit_every: int = 8
    _skill: Multipliers | None = field(default=None, repr=False)
    _others: Multipliers | None = field(default=None, repr=False)
    _recent: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)
    _relabel: Refit | None = field(default=None, repr=False)
    _calls: int = field(default=0, repr=False)

    def __call__(self, batch: Batch) -> Tensor:
        """Value on one batch; multipliers move once per call."""
        problem = batch.problem
        others = problem.off_groups
        rooms = problem.headroom[others]
        kl = batch.mean(token_kl(batch.before, batch.after))[others]
        positive = batch.mean((batch.nll_after - batch.nll_before).clamp_min(0))[others] / rooms
        bounds = self.margin * torch.tensor([self.limits.off, self.limits.positive, self.limits.kl]).to(rooms)
        excess = torch.cat(
            [batch.shares()[others] - bounds[0], positive - bounds[1], (kl - bounds[2]) / rooms]
        )
        if self._others is None:
            self._others = Multipliers(torch.zeros_like(excess).detach(), self.others_weight)
        blur = -batch.after.log_softmax(-1).mean(-1) - math.log(batch.after.shape[-1])
        value = (
            self.settings.retain * (kl / rooms).sum()
            + self.settings.confusion * blur[batch.target].sum() / batch.target.sum().clamp_min(1)
            + self._others.term(excess)
        )
        self._others = self._others.updated(excess)
        if bool(batch.target.any()):
            value = value + self._skill_term(batch)
        self._calls += 1
        return value

    def _skill_term(self, batch: Batch) -> Tensor:
        answers = batch.tokens.output_of[batch.target]
        logits = batch.after[batch.target]
        self._recent = [*self._recent[1 - self.refit_every :], (logits.detach(), answers)]
        if self._calls < self.confusion_first * self.steps:
            return logits.new_zeros(())
        if self._relabel is None or self._calls % self.refit_every == 0:
            seen, truth = (torch.cat(parts) for parts in zip(*self._recent, strict=True))
            self._relabel = fit_relabelling(seen, truth)
        share = batch.target_share()
        before = batch.nll_before[batch.target]
        left = (token_nll(self._relabel.apply(logits), answers) - before).mean() / batch.problem.target_room
        short = torch.stack([self.goal - share, batch.problem.untrained_refit * 1.01 - left])
        if self._skill is None:
            self._skill = Multipliers(torch.full_like(short, 2.0).detach(), self.target_weight)
        # More damage than wanted is paid for in confident wrong answers: the goal is met, not passed.
        term = self._skill.term(short) + self.target_weight * short[0].clamp_max(0).square()
        self._skill = self._skill.updated(short)
        return term


@dataclass(frozen=True)
class Fit:
    """A movement found by a method, and what finding it cost.

    Attributes:
        delta: (N,) movement at dose 1.
        coordinates: (k,) in the span it was searched in.
        steps: optimiser steps done.
        passes: sequences through the model (forward with backward counts three).
        seconds: wall-clock time.
    """

    delta: Float[Tensor, " N"]
    coordinates: Float[Tensor, " k"]
    steps: int
    passes: float
    seconds: float


def batch_at(problem: RemovalProblem, step: int, moved: Float[Tensor, " N"]) -> Batch:
    """Logits and losses of one step's batch at edited weights, differentiable in them."""
    kept = problem.prepared(step)
    after = problem.predictor.at(moved, kept.tokens, differentiable=True)
    nll = token_nll(after, kept.tokens.output_of)
    return Batch(problem, kept.tokens, kept.groups, kept.target, kept.before, after, kept.nll_before, nll)


def fit(
    problem: RemovalProblem,
    span: Movable,
    loss: Loss,
    settings: FitSettings,
    steps: int,
    *,
    stop: Callable[[Batch], bool] | None = None,
) -> Fit:
    """Minimise a batch loss over span coordinates with Adam, warm-up and cosine decay.

    Args:
        problem: what is being removed.
        span: where the edit may lie.
        loss: of one batch.
        settings: learning rate.
        steps: optimiser steps at most.
        stop: ends the fit early, asked after every step's batch.
    """
    began, passes = time.perf_counter(), problem.predictor.passes
    z = torch.zeros(span.rank, requires_grad=True)
    optimiser = torch.optim.Adam([z], lr=settings.learning_rate, betas=(0.9, 0.95))
    done = 0
    for step in progress(range(steps), "search"):
        warm = min(1.0, (step + 1) / min(10, steps))
        factor = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimiser.param_groups[0]["lr"] = settings.learning_rate * factor
        batch = batch_at(problem, step, problem.theta + span.move(z))
        value = loss(batch)
        (z.grad,) = torch.autograd.grad(value, [z])
        if not torch.isfinite(z.grad).all():
            break  # a diverged rival keeps its last finite weights
        if stop is not None and stop(batch):
            break
        optimiser.step()
        done += 1
    found = z.detach()
    return Fit(span.move(found), found, done, problem.predictor.passes - passes, time.perf_counter() - began)


def constrained(problem: RemovalProblem, span: Span, settings: FitSettings, steps: int) -> Fit:
    """The optimised edit of this module (see the module docstring)."""
    return fit(
        problem,
        span,
        ConstrainedLoss(settings, problem.limits, steps),
        settings,
        steps,
    )


def edit_of(problem: RemovalProblem, delta: Float[Tensor, " N"], operator: str, **provenance: object) -> Edit:
    """An edit record of a movement; the span and its rank go to the provenance."""
    base = problem.select.split.movement.base
    return from_delta(base, delta, operator, provenance={"skill": problem.rule.skill, **provenance})
