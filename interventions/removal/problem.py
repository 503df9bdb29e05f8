"""What removing a skill asks for: a split with groups, fit batches, and bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interventions.removal.grouped import (
    LEAST_HEADROOM,
    GroupedSplit,
    GroupRule,
    Predictor,
    Shares,
    token_nll,
)
from interventions.removal.relabelling import fit_relabelling
from polca_edit.tokens import TokenSet


@dataclass(frozen=True)
class Limits:
    """What counts as removed, and what others may lose. Shares are of headroom.

    Attributes:
        target: damage all the skill's tokens together must reach.
        off: signed mean damage any other group may take.
        kl: mean KL to the original model that any other group may take, nats.
    """

    target: float = 0.99
    off: float = 0.005
    kl: float = 0.05

    @property
    def positive(self) -> float:
        """Bound on the mean of the positive part: twice the bound on the signed mean."""
        return 2 * self.off


def score(shares: Shares, limits: Limits) -> float:
    """What settings are chosen by, smaller is better: what others lose plus what the target keeps.

    The positive part is used for the others: a signed mean can hide damage behind gains.
    """
    lost = max(shares.worst_off, 0.5 * shares.worst_positive, 0.0)
    total = lost + max(0.0, limits.target - shares.target)
    return total if math.isfinite(total) else math.inf


@dataclass(frozen=True)
class Prepared:
    """One fit batch with everything that does not depend on the edit.

    Attributes:
        tokens: the batch.
        groups: (m,) group of each token.
        target: (m,) tokens of the skill.
        before: (m, V) original logits.
        nll_before: (m,) original loss.
    """

    tokens: TokenSet
    groups: Int[Tensor, " m"]
    target: Bool[Tensor, " m"]
    before: Float[Tensor, "m V"]
    nll_before: Float[Tensor, " m"]


@dataclass(frozen=True, eq=False)
class RemovalProblem:
    """One skill to remove from one set of weights.

    Attributes:
        select: tokens on which settings and doses are chosen, with the weights to edit; never the
            evaluate split.
        batch: fit batch of a step, a pure function of the step.
        limits: bounds.
    """

    select: GroupedSplit
    batch: Callable[[int], TokenSet]
    limits: Limits = Limits()

    @property
    def theta(self) -> Float[Tensor, " N"]:
        """Weights to edit."""
        return self.select.split.theta

    @property
    def predictor(self) -> Predictor:
        """Logits."""
        return self.select.predictor

    @property
    def rule(self) -> GroupRule:
        """Groups."""
        return self.select.rule

    @cached_property
    def headroom(self) -> Float[Tensor, " G"]:
        """Mean headroom per group on select, nats.

        Raises:
            ValueError: if a target group has nothing to lose.
        """
        rooms = self.select.headroom
        for index in self.target_groups:
            if not float(rooms[index]) > LEAST_HEADROOM:
                raise ValueError(
                    f"a skill must have been learned to be removed, group '{self.rule.names[index]}' has "
                    f"headroom {float(rooms[index]):.3f} nats; train longer or choose another skill"
                )
        return rooms

    @cached_property
    def target_room(self) -> float:
        """Headroom of all the skill's tokens together, nats."""
        _ = self.headroom
        return self.select.target_headroom

    @cached_property
    def untrained_refit(self) -> float:
        """What the reference keeps of the skill's headroom under its best output relabelling, on select."""
        skill = self.select.target
        answers, logits = self.select.tokens.output_of[skill], self.select.untrained[skill]
        left = token_nll(fit_relabelling(logits, answers).apply(logits), answers)
        return float((left - self.select.split.before[skill]).mean()) / self.target_room

    def prepared(self, step: int) -> Prepared:
        """The fit batch of a step; kept, because every method and setting sees the same batches."""
        if step not in self._prepared:
            tokens = self.batch(step)
            groups = self.rule.assign(tokens)
            before = self.predictor.at(self.theta, tokens)
            self._prepared[step] = Prepared(
                tokens, groups, self.rule.is_target(groups), before, token_nll(before, tokens.output_of)
            )
        return self._prepared[step]

    @cached_property
    def _prepared(self) -> dict[int, Prepared]:
        return {}

    @property
    def off_groups(self) -> list[int]:
        """Groups outside the skill that have tokens and headroom."""
        return [
            index
            for index, target in enumerate(self.rule.targets)
            if not target and float(self.headroom[index]) > LEAST_HEADROOM
        ]

    @property
    def target_groups(self) -> list[int]:
        """Groups of the skill."""
        return [index for index, target in enumerate(self.rule.targets) if target]

    def on_first(self, sequences: int) -> RemovalProblem:
        """The same problem on the first sequences of select, where many candidates are compared."""
        tokens = self.select.tokens
        rows = torch.arange(min(sequences, tokens.sequences))
        return replace(self, select=self.select.on(tokens.select(rows)))
