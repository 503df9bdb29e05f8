"""Where in the model an edit's effect passes: activations of one model given to another.

The activation side of :mod:`interventions.localise`, through TransformerLens hooks, and how the two agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor, nn

from interventions.causal.statistics import Array, Bits, rank_p
from interventions.damage import EvaluatedSplit
from interventions.edits import Edit
from interventions.localise import (
    CONV_WRITES,
    WRITES,
    HeadLayout,
    head_layout,
    heads,
    layer_of,
    localise,
)

Hooks = dict[str, Callable[[Tensor], Tensor]]


def _target_loss(split: EvaluatedSplit, members: Bits, sequences: int) -> Callable[[], float]:
    """Mean loss of the target's tokens among the first sequences, at the module's present weights."""
    loss, module = split.loss, split.loss.module
    part = split.tokens.select(torch.arange(min(sequences, split.tokens.sequences)))
    target = torch.from_numpy(np.ascontiguousarray(members[: part.count]))
    if not bool(target.any()):
        raise ValueError(
            f"activation patching needs target tokens in the first {sequences} sequences, got none"
        )

    def measured() -> float:
        with torch.no_grad():
            found: Tensor = loss.token_loss(module, part.inputs.to(loss.device)).cpu()[part.scored]
        return float(found[target].double().mean())

    return measured


@contextmanager
def _weights(split: EvaluatedSplit, theta: Float[Tensor, " N"], hooks: Hooks) -> Iterator[None]:
    """The split's module with some weights and with functions at its hooks."""
    # TransformerLens takes seconds to import; parameters are localised without it.
    from polca_edit.models import replaced_activations

    module = split.loss.module
    with split.loss.space.substituted(module, theta), replaced_activations(module, hooks):
        yield


def _recorded(
    split: EvaluatedSplit, theta: Float[Tensor, " N"], names: Sequence[str], target_loss: Callable[[], float]
) -> tuple[float, dict[str, Tensor]]:
    """The target's loss at some weights, and the activations at the named hooks."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def same(value: Tensor) -> Tensor:
            kept[name] = value.detach().clone()
            return value

        return same

    with _weights(split, theta, {name: keep(name) for name in names}):
        return target_loss(), kept


def _hooks_of(module: nn.Module, pattern: str) -> list[str]:
    """Names of the hooks that a pattern finds.

    Raises:
        ValueError: where there are none.
    """
    from polca_edit.models import hook_names

    found = [name for name in hook_names(module) if re.search(pattern, name)]
    if not found:
        raise ValueError(
            f"activation patching needs a model with hooks '{pattern}', this one has none; "
            "localise by parameters"
        )
    return found


def patch_activations(
    split: EvaluatedSplit,
    edit: Edit,
    members: Bits,
    *,
    names: Sequence[str] | None = None,
    sequences: int = 64,
) -> dict[str, float]:
    """Share of an edit's damage that one activation of the edited model carries into the original.

    The original model runs with one hook's activation replaced by the edited model's; the target's
    loss change over the whole damage is the component's share (1 for the last residual stream). The
    first ``sequences`` sequences are used, in one batch.

    Args:
        split: its module must be a model with hooks.
        edit: an edit of the split's final weights.
        members: (M,) target tokens.
        names: hooks; by default all attention outputs, MLP outputs and residual streams.
        sequences: at most this many.

    Raises:
        ValueError: if the module has no hooks, or no target token is among the sequences.
    """
    pattern = r"(attn_out|mlp_out|resid_post)$"
    chosen = list(names) if names is not None else _hooks_of(split.loss.module, pattern)
    target_loss = _target_loss(split, members, sequences)
    edited, kept = _recorded(split, edit.apply(split.theta), chosen, target_loss)
    base, _ = _recorded(split, split.theta, (), target_loss)

    def given(name: str) -> float:
        with _weights(split, split.theta, {name: lambda value: kept[name]}):
            return target_loss()

    return {
        name: (given(name) - base) / (edited - base) if edited != base else float("nan") for name in chosen
    }


# -- heads ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadEffect:
    """One head's part in an edit's damage; shares of the whole edit's damage to the target.

    Attributes:
        layer: block number.
        head: number in its block.
        weights: what editing the head's weights alone costs.
        weights_left: what is missing when all weights but the head's are edited.
        output: what the edited model's output of the head costs the original model.
        output_left: what is missing when the edited model gets the original's output of the head.
    """

    layer: int
    head: int
    weights: float
    weights_left: float
    output: float
    output_left: float


@dataclass(frozen=True)
class Agreement:
    """Rank correlation of two localisations over heads.

    Attributes:
        rho: Spearman's.
        p: one-sided, among pairings of the heads at random.
        same_top: whether both name the same head first.
    """

    rho: float
    p: float
    same_top: bool


@dataclass(frozen=True)
class HeadMap:
    """Every head of one model for one edit and group of tokens.

    Attributes:
        whole: damage of the whole edit to the group, nats per token.
        together: share of it that editing all heads' weights, and no other, costs.
        together_left: share that is missing when all weights but those of all heads are edited.
        effects: head by head.
        alone: agreement of ``weights`` and ``output``.
        left_out: agreement of ``weights_left`` and ``output_left``.
    """

    whole: float
    together: float
    together_left: float
    effects: tuple[HeadEffect, ...]
    alone: Agreement
    left_out: Agreement


def rank_agreement(one: Sequence[float], two: Sequence[float], *, draws: int = 9999) -> Agreement:
    """Spearman correlation with its permutation p.

    >>> found = rank_agreement([0.1, 0.5, 0.2, 0.9, 0.3, 0.7], [1.0, 5.0, 2.0, 9.0, 3.0, 7.0])
    >>> round(found.rho, 3), found.p < 0.01, found.same_top
    (1.0, True, True)

    Args:
        one: a value a head.
        two: the same heads, in the same order.
        draws: permutations.

    Raises:
        ValueError: for fewer than three heads, or unequal numbers.
    """
    if len(one) != len(two) or len(one) < 3:
        raise ValueError(
            f"a rank correlation needs at least three heads on both sides, got {len(one)} and {len(two)}"
        )
    first, second = (_standard(values) for values in (one, two))
    generator = np.random.default_rng(0)
    pairings = generator.permuted(np.tile(second, (draws, 1)), axis=1)
    # Rounding must not split ties between the value and a draw that equals it.
    null = np.round(pairings @ first, 9)
    rho = float(np.round(second @ first, 9))
    return Agreement(rho, rank_p(rho, null), int(np.argmax(one)) == int(np.argmax(two)))


def _standard(values: Sequence[float]) -> Array:
    """Ranks of mean zero and length one; zeros where all are equal."""
    ranks = rankdata(values) - (len(values) + 1) / 2
    length = float(np.linalg.norm(ranks))
    return np.asarray(ranks / length if length > 0 else ranks)


def head_map(split: EvaluatedSplit, edit: Edit, members: Bits, layout: HeadLayout | None = None) -> HeadMap:
    """Which heads carry an edit's damage: by their weights, and by what they write.

    A head's output is its part of the attention output, mixed values through its columns of the output map
    (without the bias), so that an edit of those columns is seen too. All sequences go through in one batch.

    Args:
        split: its module must have ``attn.hook_z`` and ``hook_attn_out``; tokens of the measurement.
        edit: an edit of the split's final weights.
        members: (M,) target tokens.
        layout: how attention is cut into heads; by default what the model's config says.

    Raises:
        ValueError: for a model without these hooks or heads, or an edit that costs the target nothing.
    """
    layout = layout or head_layout(split.loss.module)
    parts = heads(split.loss.space, layout)
    edited = edit.apply(split.theta)
    by_weights = localise(split, edit, members, parts)
    target_loss = _target_loss(split, members, split.tokens.sequences)
    after, written = _outputs(split, edited, layout, target_loss)
    before, kept = _outputs(split, split.theta, layout, target_loss)
    whole = after - before
    if not whole > 0:
        raise ValueError(
            "heads are compared by their part in an edit's damage, which must be positive, got "
            f"{whole:.3g} nats; take an edit that costs the target something"
        )
    effects = []
    for part, effect in zip(parts, by_weights.parts, strict=True):
        head = int(part.name.removeprefix("head "))
        change = written[part.layer][head] - kept[part.layer][head]
        given = _added(split, split.theta, part.layer, change, target_loss)
        taken = _added(split, edited, part.layer, -change, target_loss)
        alone, without = effect.damage, by_weights.whole - effect.without
        values = (alone, without, given - before, after - taken)
        effects.append(HeadEffect(part.layer, head, *(value / whole for value in values)))
    every = torch.stack([part.mask for part in parts]).any(0)

    def cost(mask: Tensor) -> float:
        return float(split.damage(edit.restricted(mask)).change.numpy()[members].mean())

    return HeadMap(
        whole,
        cost(every) / whole,
        (by_weights.whole - cost(~every)) / whole,
        tuple(effects),
        rank_agreement([e.weights for e in effects], [e.output for e in effects]),
        rank_agreement([e.weights_left for e in effects], [e.output_left for e in effects]),
    )


def _added(
    split: EvaluatedSplit,
    theta: Float[Tensor, " N"],
    layer: int,
    change: Float[Tensor, "B L D"],
    target_loss: Callable[[], float],
) -> float:
    """The target's loss with something added to one layer's attention output."""
    [name] = _hooks_of(split.loss.module, rf"\.{layer}\.hook_attn_out$")
    with _weights(split, theta, {name: lambda value: value + change}):
        return target_loss()


def _outputs(
    split: EvaluatedSplit, theta: Float[Tensor, " N"], layout: HeadLayout, target_loss: Callable[[], float]
) -> tuple[float, dict[int, Float[Tensor, "H B L D"]]]:
    """The target's loss at some weights, and what each head of each layer adds to the residual stream."""
    space = split.loss.space
    hooks = _hooks_of(split.loss.module, r"attn\.hook_z$")
    loss, kept = _recorded(split, theta, hooks, target_loss)
    tensors = space.unflatten(theta)
    found = {}
    for hook in hooks:
        layer = layer_of(hook)
        [matrix] = [
            tensors[name] if WRITES.search(name) else tensors[name].T
            for name in space.names
            if layer_of(name) == layer and (WRITES.search(name) or CONV_WRITES.search(name))
        ]
        columns = matrix.reshape(len(matrix), layout.count, -1)
        mixed = kept[hook].reshape(*kept[hook].shape[:2], layout.count, -1)
        found[layer] = torch.einsum("blhd,mhd->hblm", mixed, columns.to(mixed))
    return loss, found
