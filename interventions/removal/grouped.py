"""An evaluated split seen with groups of tokens and with logits.

Losses, headroom and damage are those of :class:`~interventions.damage.EvaluatedSplit`. What stands here
is what a token loss cannot give: KL to the original model, accuracy, and gradients through the logits.
A share is a ratio of means, (loss after - loss before) over (loss at the reference - loss before); the
capped share is :meth:`~interventions.damage.Damage.share_by`. Below :data:`LEAST_HEADROOM` a group has
no share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interventions.damage import Damage, EvaluatedSplit
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import call_with
from polca_edit.tokens import TokenSet

#: ``logits(module, inputs)`` -> (B, P, V), one row per prediction slot of the token loss.
LogitFunction = Callable[[nn.Module, Tensor], Tensor]

#: Nats; a group that training taught less has no share.
LEAST_HEADROOM = 0.05


def next_token_logits(module: nn.Module, inputs: Int[Tensor, "B L"]) -> Float[Tensor, "B Lm1 V"]:
    """Logits of every next token, for modules that return logits or an object that holds them."""
    output = module(inputs)
    logits: Tensor = output.logits if hasattr(output, "logits") else output
    return logits[:, :-1]


def token_nll(logits: Float[Tensor, "M V"], answers: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """Cross-entropy of each token, nats."""
    return nn.functional.cross_entropy(logits, answers, reduction="none")


def token_kl(before: Float[Tensor, "M V"], after: Float[Tensor, "M V"]) -> Float[Tensor, " M"]:
    """KL(before || after) of each token's prediction, nats."""
    old = before.log_softmax(-1)
    return (old.exp() * (old - after.log_softmax(-1))).sum(-1)


def mean_by_group(values: Float[Tensor, " M"], groups: Int[Tensor, " M"], count: int) -> Float[Tensor, " G"]:
    """Mean per group, zero for an empty group; tokens with group -1 are left out. Differentiable."""
    inside = groups >= 0
    sums = values.new_zeros(count).index_add(0, groups[inside], values[inside])
    sizes = torch.bincount(groups[inside], minlength=count).to(values)
    return sums / sizes.clamp_min(1)


# -- the model and the groups ----------------------------------------------------------------------


@dataclass
class Predictor:
    """The module of an objective seen as a map from flat weights and sequences to logits of scored tokens.

    Weights and logits are on the CPU; the module's own device sees them only inside a pass.

    Attributes:
        loss: module, parameters and batch size; the module's own weights are never changed.
        logits: logits of every prediction slot.
        passes: sequences run so far; a forward with its backward counts as three.
    """

    loss: Objective
    logits: LogitFunction
    passes: float = 0.0

    @property
    def spent(self) -> float:
        """Passes of this predictor and of its objective's losses and gradients."""
        return self.passes + self.loss.passes.forward + 2 * self.loss.passes.backward

    def at(
        self, theta: Float[Tensor, " N"], tokens: TokenSet, *, differentiable: bool = False
    ) -> Float[Tensor, "M V"]:
        """Logits of every scored token, in token order; with ``differentiable`` in one batch."""
        if differentiable:
            self.passes += 3 * tokens.sequences
            return self._run(theta, tokens.inputs)[tokens.scored]
        self.passes += tokens.sequences
        with torch.no_grad():
            parts = [self._run(theta, tokens.inputs[rows]) for rows in tokens.batches(self.loss.batch_size)]
        return torch.cat(parts)[tokens.scored]

    def _run(self, theta: Tensor, inputs: Tensor) -> Tensor:
        space, device = self.loss.space, self.loss.device
        values = space.unflatten(theta.to(device))
        result: Tensor = call_with(self.loss.module, space, values, self.logits, inputs.to(device))
        return result.to(theta.device)


@dataclass(frozen=True)
class GroupRule:
    """Which group each token is in, from inputs alone, and which groups are to be removed.

    Attributes:
        names: group names.
        targets: per group, whether it belongs to the skill.
        assign: token set -> (M,) group index, -1 for tokens in no group.
        skill: name of what is removed, for records.
    """

    names: tuple[str, ...]
    targets: tuple[bool, ...]
    assign: Callable[[TokenSet], Int[Tensor, " M"]]
    skill: str = "skill"

    def __post_init__(self) -> None:
        if not any(self.targets) or all(self.targets):
            raise ValueError(
                "a removal needs target groups and other groups, "
                f"got targets {list(self.targets)} of {list(self.names)}"
            )

    def is_target(self, groups: Int[Tensor, " M"]) -> Bool[Tensor, " M"]:
        """Whether each token belongs to the skill."""
        return torch.tensor([*self.targets, False])[groups]

    def masks(self, groups: Int[Tensor, " M"]) -> dict[str, Bool[Tensor, " M"]]:
        """Members of every group."""
        return {name: groups == index for index, name in enumerate(self.names)}


def labelled(skill: str, others: Sequence[str] = ()) -> GroupRule:
    """Groups from the labels of a token set: the skill, other skills in their order, and all the rest.

    A token with several labels counts for the skill, then for the first of the others.

    Args:
        skill: label that is removed.
        others: labels that have bounds of their own.
    """
    names = (skill, *others)

    def assign(tokens: TokenSet) -> Tensor:
        groups = torch.full((tokens.count,), len(names))
        for index in reversed(range(len(names))):
            groups[tokens.skills[names[index]]] = index
        return groups

    return GroupRule((*names, "(rest)"), (True, *[False] * len(names)), assign, skill)


# -- damage of logits ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """Damage of one edit on one split, per group; NaN where a group has no tokens or no headroom.

    Attributes:
        raw: group -> mean loss change over headroom.
        positive: group -> mean of the positive part of the token loss change, over headroom.
        kl: group -> mean KL to the original model, nats.
        accuracy: group -> share of tokens whose answer has the largest logit.
        others: names of the groups outside the skill.
        target: loss change over headroom of all the skill's tokens together; above 1 where the edit
            makes them worse than the reference does.
        target_capped: share of its headroom that the skill loses, capped per token.
        target_accuracy: accuracy of all the skill's tokens together.
    """

    raw: Mapping[str, float]
    positive: Mapping[str, float]
    kl: Mapping[str, float]
    accuracy: Mapping[str, float]
    others: tuple[str, ...]
    target: float
    target_capped: float
    target_accuracy: float

    def _worst(self, values: Mapping[str, float]) -> float:
        return max((values[name] for name in self.others if not math.isnan(values[name])), default=0.0)

    @property
    def worst_off(self) -> float:
        """Largest signed share over other groups, 0 if none is left to hurt."""
        return self._worst(self.raw)

    @property
    def worst_positive(self) -> float:
        """Largest positive-part share over other groups."""
        return self._worst(self.positive)

    @property
    def worst_kl(self) -> float:
        """Largest mean KL over other groups, nats."""
        return self._worst(self.kl)


@dataclass(frozen=True, eq=False)
class GroupedSplit:
    """An evaluated split with its groups and logits; all that does not depend on an edit is kept.

    Attributes:
        split: losses and headroom.
        predictor: logits, of the same module.
        rule: groups.
    """

    split: EvaluatedSplit
    predictor: Predictor
    rule: GroupRule

    @property
    def tokens(self) -> TokenSet:
        """Tokens of the split."""
        return self.split.tokens

    @cached_property
    def reference(self) -> Float[Tensor, " N"]:
        """Weights from which headroom is counted."""
        series, step = self.split.series, self.split.reference
        return series[0 if step is None else series.steps.index(step)]

    @cached_property
    def groups(self) -> Int[Tensor, " M"]:
        """Group of every token."""
        return self.rule.assign(self.tokens)

    @cached_property
    def target(self) -> Bool[Tensor, " M"]:
        """Tokens of the skill."""
        return self.rule.is_target(self.groups)

    @cached_property
    def before(self) -> Float[Tensor, "M V"]:
        """Logits of the weights that are edited.

        Raises:
            ValueError: if the token loss is not the cross-entropy of these logits.
        """
        logits = self.predictor.at(self.split.theta, self.tokens)
        apart = float((token_nll(logits, self.tokens.output_of) - self.split.before).abs().max())
        if not apart <= 1e-2:
            raise ValueError(
                "the token loss must be the cross-entropy of the logits on the tokens' outputs, the two are "
                f"up to {apart:.3g} nats apart; pass the 'logits' function of this loss"
            )
        return logits

    @cached_property
    def untrained(self) -> Float[Tensor, "M V"]:
        """Logits of the reference."""
        return self.predictor.at(self.reference, self.tokens)

    @cached_property
    def headroom(self) -> Float[Tensor, " G"]:
        """Mean headroom per group, nats."""
        return mean_by_group(self.split.headroom, self.groups, len(self.rule.names))

    @property
    def target_headroom(self) -> float:
        """Headroom of all the skill's tokens together, nats."""
        return float(self.split.headroom[self.target].double().mean())

    def shares(self, after: Float[Tensor, "M V"]) -> Shares:
        """Shares of logits after an edit."""
        answers, masks = self.tokens.output_of, self.rule.masks(self.groups)
        damage = Damage("logits", 1.0, self.split.before, token_nll(after, answers), self.split.headroom)
        worse = replace(damage, after=damage.before + damage.change.clamp_min(0))
        right = (after.argmax(-1) == answers).double()
        kl = token_kl(self.before, after)
        room = {
            name: float(value) if bool(masks[name].any()) and float(value) > LEAST_HEADROOM else float("nan")
            for name, value in zip(self.rule.names, self.headroom, strict=True)
        }

        def means(values: Tensor) -> dict[str, float]:
            return {name: float(values[mask].double().mean()) for name, mask in masks.items()}

        skill = {"skill": self.target}
        return Shares(
            {name: value / room[name] for name, value in damage.by(masks).items()},
            {name: value / room[name] for name, value in worse.by(masks).items()},
            means(kl),
            means(right),
            tuple(n for n, target in zip(self.rule.names, self.rule.targets, strict=True) if not target),
            damage.by(skill)["skill"] / self.target_headroom,
            damage.share_by(skill)["skill"],
            float(right[self.target].mean()),
        )

    def shares_at(self, theta: Float[Tensor, " N"]) -> Shares:
        """Shares of edited weights."""
        return self.shares(self.predictor.at(theta, self.tokens))

    def on(self, tokens: TokenSet) -> GroupedSplit:
        """The same weights and groups on other tokens."""
        return replace(self, split=self.split.on(tokens))

    def at(self, theta: Float[Tensor, " N"]) -> GroupedSplit:
        """The same tokens and reference, other weights to edit."""
        return replace(self, split=at_weights(self.split, theta))


def at_weights(split: EvaluatedSplit, theta: Float[Tensor, " N"]) -> EvaluatedSplit:
    """The same tokens and reference with other final weights, as they are after an earlier edit."""
    series = split.series
    reference = series[0 if split.reference is None else series.steps.index(split.reference)]
    ends = open_checkpoints({0: reference, 1: theta}, series.space)
    return EvaluatedSplit(split.loss, ends, split.tokens)
