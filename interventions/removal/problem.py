"""What removing a skill asks for: groups of tokens, headroom, bounds, and losses with their logits.

Shares are of headroom: (loss after - loss before) / (loss at the reference - loss before), where
the reference is the untrained model; a share is undefined where the headroom is not positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interventions.removal.relabelling import fit_relabelling
from polca_edit.parameters import ParameterSpace, call_with
from polca_edit.tokens import TokenSet

#: ``logits(module, inputs)`` -> (B, P, V), one row per prediction slot of the token loss.
LogitFunction = Callable[[nn.Module, Tensor], Tensor]


@dataclass
class Predictor:
    """A module seen as a map from flat weights and sequences to logits of the scored tokens.

    Attributes:
        module: the model; its own weights are never changed by this class.
        space: parameters and their flat order.
        logits: logits of every prediction slot.
        batch_size: sequences per batch where no gradient is taken.
        passes: sequences run so far; a forward with its backward counts as three.
    """

    module: nn.Module
    space: ParameterSpace
    logits: LogitFunction
    batch_size: int = 512
    passes: float = 0.0

    def at(
        self, theta: Float[Tensor, " N"], tokens: TokenSet, *, differentiable: bool = False
    ) -> Float[Tensor, "M V"]:
        """Logits of every scored token, in token order."""
        if differentiable:
            self.passes += 3 * tokens.sequences
            return self._run(theta, tokens.inputs)[tokens.scored]
        self.passes += tokens.sequences
        with torch.no_grad():
            parts = [self._run(theta, tokens.inputs[rows]) for rows in tokens.batches(self.batch_size)]
        return torch.cat(parts)[tokens.scored]

    def _run(self, theta: Tensor, inputs: Tensor) -> Tensor:
        result: Tensor = call_with(self.module, self.space, self.space.unflatten(theta), self.logits, inputs)
        return result


def token_nll(logits: Float[Tensor, "M V"], answers: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """Cross-entropy of each token, nats."""
    return nn.functional.cross_entropy(logits, answers, reduction="none")


def token_kl(before: Float[Tensor, "M V"], after: Float[Tensor, "M V"]) -> Float[Tensor, " M"]:
    """KL(before || after) of each token's prediction, nats."""
    old = before.log_softmax(-1)
    return (old.exp() * (old - after.log_softmax(-1))).sum(-1)


@dataclass(frozen=True)
class GroupRule:
    """Which group each token is in, from inputs alone, and which groups are to be removed.

    Attributes:
        names: group names.
        targets: per group, whether it belongs to the skill.
        assign: token set -> (M,) group index, -1 for tokens in no group.
    """

    names: tuple[str, ...]
    targets: tuple[bool, ...]
    assign: Callable[[TokenSet], Int[Tensor, " M"]]

    def __post_init__(self) -> None:
        if not any(self.targets) or all(self.targets):
            raise ValueError(
                "a removal needs target groups and other groups, "
                f"got targets {list(self.targets)} of {list(self.names)}"
            )

    def is_target(self, groups: Int[Tensor, " M"]) -> Tensor:
        """(M,) whether each token belongs to the skill."""
        return torch.tensor([*self.targets, False])[groups]


def mean_by_group(values: Float[Tensor, " M"], groups: Int[Tensor, " M"], count: int) -> Float[Tensor, " G"]:
    """Mean per group, zero for an empty group; tokens with group -1 are left out. Differentiable."""
    inside = groups >= 0
    sums = values.new_zeros(count).index_add(0, groups[inside], values[inside])
    sizes = torch.bincount(groups[inside], minlength=count).to(values)
    return sums / sizes.clamp_min(1)


@dataclass(frozen=True)
class Limits:
    """What counts as removed, and what others may lose. All shares of headroom.

    Attributes:
        target: damage every target group must reach.
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


@dataclass(frozen=True)
class RemovalProblem:
    """One skill to remove from one set of weights.

    Attributes:
        predictor: the model.
        theta: weights to edit.
        reference: weights before the skill was learned; damage is counted in units of their loss.
        rule: groups.
        batch: fit batch of a step, a pure function of the step.
        select: tokens on which settings and doses are chosen; never the evaluate split.
        limits: bounds.
        skill: name, for records.
    """

    predictor: Predictor
    theta: Float[Tensor, " N"]
    reference: Float[Tensor, " N"]
    rule: GroupRule
    batch: Callable[[int], TokenSet]
    select: TokenSet
    limits: Limits = Limits()
    skill: str = "skill"

    @cached_property
    def select_groups(self) -> Tensor:
        """(M,) group of every select token."""
        return self.rule.assign(self.select)

    @cached_property
    def select_logits(self) -> Tensor:
        """(M, V) original logits on select."""
        return self.predictor.at(self.theta, self.select)

    @cached_property
    def headroom(self) -> Tensor:
        """(G,) loss at the reference minus loss at theta on select, nats.

        Raises:
            ValueError: if a target group has nothing to lose.
        """
        rooms = headroom(self.predictor, self.theta, self.reference, self.rule, self.select)
        for name, target, room in zip(self.rule.names, self.rule.targets, rooms.tolist(), strict=True):
            if target and room <= 0.05:
                raise ValueError(
                    f"a skill must have been learned to be removed, group '{name}' has headroom "
                    f"{room:.3f} nats; train longer or choose another skill"
                )
        return rooms

    @cached_property
    def untrained_refit(self) -> float:
        """What the reference keeps of the skill's headroom under its best output relabelling, on select."""
        skill = self.rule.is_target(self.select_groups)
        answers = self.select.output_of[skill]
        logits = self.predictor.at(self.reference, self.select)[skill]
        left = token_nll(fit_relabelling(logits, answers).apply(logits), answers)
        change = left - token_nll(self.select_logits[skill], answers)
        return float(change.mean()) / self.target_room

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

    @cached_property
    def target_room(self) -> float:
        """Headroom of all the skill's tokens together, nats."""
        sizes = torch.bincount(self.select_groups[self.select_groups >= 0], minlength=len(self.rule.names))
        skill = sizes * torch.tensor(self.rule.targets)
        return float((skill * self.headroom).sum() / skill.sum())

    @property
    def off_groups(self) -> list[int]:
        """Groups outside the skill that have tokens and headroom."""
        return [
            i for i, target in enumerate(self.rule.targets) if not target and float(self.headroom[i]) > 0.05
        ]

    @property
    def target_groups(self) -> list[int]:
        """Groups of the skill."""
        return [i for i, target in enumerate(self.rule.targets) if target]


def headroom(
    predictor: Predictor,
    theta: Float[Tensor, " N"],
    reference: Float[Tensor, " N"],
    rule: GroupRule,
    tokens: TokenSet,
) -> Float[Tensor, " G"]:
    """Per group: mean loss at the reference minus mean loss at theta, nats."""
    groups, answers = rule.assign(tokens), tokens.output_of
    change = token_nll(predictor.at(reference, tokens), answers) - token_nll(
        predictor.at(theta, tokens), answers
    )
    return mean_by_group(change, groups, len(rule.names))


@dataclass(frozen=True)
class Shares:
    """Damage of one edit on one token set, per group.

    Attributes:
        raw: (G,) mean loss change over headroom; NaN without headroom or tokens.
        positive: (G,) mean of the positive part of the token loss change, over headroom.
        kl: (G,) mean KL to the original model, nats.
        accuracy: (G,) share of tokens whose answer has the largest logit.
        targets: which groups belong to the skill.
        target_raw: loss change over headroom of all the skill's tokens together.
        target_accuracy: accuracy of all the skill's tokens together.
    """

    raw: Float[Tensor, " G"]
    positive: Float[Tensor, " G"]
    kl: Float[Tensor, " G"]
    accuracy: Float[Tensor, " G"]
    targets: tuple[bool, ...]
    target_raw: float
    target_accuracy: float

    def _of(self, values: Tensor, target: bool) -> Tensor:
        chosen = values[torch.tensor(self.targets) == target]
        return chosen[~chosen.isnan()]

    @property
    def target(self) -> float:
        """Share of the skill's headroom, capped at 1 (more damage than the headroom is no merit)."""
        return min(self.target_raw, 1.0)

    @property
    def worst_off(self) -> float:
        """Largest signed share over other groups."""
        return float(self._of(self.raw, False).max())

    @property
    def worst_positive(self) -> float:
        """Largest positive-part share over other groups."""
        return float(self._of(self.positive, False).max())

    @property
    def worst_kl(self) -> float:
        """Largest mean KL over other groups, nats."""
        return float(self._of(self.kl, False).max())


def shares_of(
    before: Float[Tensor, "M V"],
    after: Float[Tensor, "M V"],
    answers: Int[Tensor, " M"],
    groups: Int[Tensor, " M"],
    rooms: Float[Tensor, " G"],
    targets: tuple[bool, ...],
) -> Shares:
    """Shares from logits before and after."""
    count = len(rooms)
    change = token_nll(after, answers) - token_nll(before, answers)
    sizes = torch.bincount(groups[groups >= 0], minlength=count)
    valid = (rooms > 0.05) & (sizes > 0)
    scale = torch.where(valid, rooms, torch.full_like(rooms, float("nan")))
    missing = torch.where(sizes > 0, torch.ones_like(rooms), torch.full_like(rooms, float("nan")))
    right = (after.argmax(-1) == answers).to(rooms)
    raw = mean_by_group(change, groups, count)
    skill = sizes * torch.tensor(targets)
    whole = skill.sum().clamp_min(1)
    return Shares(
        raw / scale,
        mean_by_group(change.clamp_min(0), groups, count) / scale,
        mean_by_group(token_kl(before, after), groups, count) * missing,
        mean_by_group(right, groups, count) * missing,
        targets,
        float((skill * raw).sum() / (skill * rooms).sum()),
        float((skill * mean_by_group(right, groups, count)).sum() / whole),
    )


def select_shares(problem: RemovalProblem, theta: Float[Tensor, " N"]) -> Shares:
    """Shares of edited weights on the select split."""
    after = problem.predictor.at(theta, problem.select)
    return shares_of(
        problem.select_logits,
        after,
        problem.select.output_of,
        problem.select_groups,
        problem.headroom,
        problem.rule.targets,
    )


def score(shares: Shares, limits: Limits) -> float:
    """What settings are chosen by, smaller is better: what others lose plus what the target keeps.

    The positive part is used for the others: a signed mean can hide damage behind gains.
    """
    lost = max(shares.worst_off, 0.5 * shares.worst_positive, 0.0)
    total = lost + max(0.0, limits.target - shares.target)
    return total if math.isfinite(total) else math.inf
