"""Damage: loss change per token under an edit, on one split, in nats per token.

The only damage stack of the project. An :class:`EvaluatedSplit` holds a model, the ends of a recorded
movement and a token set, and computes every loss once; a :class:`Damage` is what one edit did to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interventions.edits import Edit, Movement
from polca_edit.allocation.progress import progress as progress_of
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet, group_means


@runtime_checkable
class Masked(Protocol):
    """Clusters of one vector: they name their own token masks."""

    def masks(self) -> dict[str, Tensor]:
        """Name -> (M,) members."""


#: Masks may come as numpy arrays; that they are boolean and of M entries is checked where they are used.
Groups = Mapping[str, Tensor | np.ndarray] | Sequence[Masked]


def named_groups(groups: Groups, count: int) -> dict[str, Bool[Tensor, " M"]]:
    """Groups by name, each checked against the number of tokens.

    Args:
        groups: name -> (M,) boolean mask, or the clusters of an observation on the same tokens.
        count: M.

    Raises:
        ValueError: for a mask that is not boolean or not of M entries.
    """
    named = (
        dict(groups)
        if isinstance(groups, Mapping)
        else {name: mask for found in groups for name, mask in found.masks().items()}
    )
    checked = {}
    for name, given in named.items():
        mask = torch.as_tensor(given)
        if mask.dtype != torch.bool or mask.shape != (count,):
            raise ValueError(
                f"group '{name}' must be {count} booleans, one per scored token of this split, got "
                f"{tuple(mask.shape)} of {mask.dtype}; carry clusters of other tokens over by rule"
            )
        checked[name] = mask
    return checked


@runtime_checkable
class KeptLosses(Protocol):
    """The damage matrix: rows of losses by edit and tokens, wherever they are kept."""

    def row(
        self, edit: Edit, tokens: TokenSet, compute: Callable[[], Float[Tensor, " M"]]
    ) -> Float[Tensor, " M"]:
        """Loss of every token under an edit, nats; ``compute`` measures one that is not known."""


@dataclass(frozen=True)
class Damage:
    """Loss change per token under one edit.

    Attributes:
        operator: what was done.
        dose: how much of it.
        before: (M,) loss at the base weights, nats.
        after: (M,) loss at the edited weights, nats.
        headroom: (M,) loss at the reference minus loss at the base: what undoing everything costs.
    """

    operator: str
    dose: float
    before: Float[Tensor, " M"]
    after: Float[Tensor, " M"]
    headroom: Float[Tensor, " M"]

    @property
    def change(self) -> Float[Tensor, " M"]:
        """Loss after minus loss before, nats."""
        return self.after - self.before

    def sums(self, groups: Groups) -> dict[str, tuple[float, int]]:
        """(sum, count) of the change per group."""
        return group_means(self.change, named_groups(groups, len(self.before)))

    def by(self, groups: Groups) -> dict[str, float]:
        """Mean change per group, nats per token; NaN for a group without tokens."""
        return {name: total / n if n else float("nan") for name, (total, n) in self.sums(groups).items()}

    def share_by(self, groups: Groups) -> dict[str, float]:
        """Share of its headroom that each group loses, capped per token: sum min(D, G+) / sum G+.

        Negative damage counts; NaN where a group has no headroom.

        >>> import torch
        >>> damage = Damage("any", 1.0, torch.zeros(2), torch.tensor([3.0, 0.0]), torch.tensor([1.0, 1.0]))
        >>> damage.share_by({"both": torch.tensor([True, True])})
        {'both': 0.5}
        """
        room = self.headroom.double().clamp_min(0)
        lost = torch.minimum(self.change.double(), room)
        found = {}
        for name, mask in named_groups(groups, len(self.before)).items():
            total = float(room[mask].sum())
            found[name] = float(lost[mask].sum()) / total if total > 0 else float("nan")
        return found


@dataclass(frozen=True, eq=False)
class EvaluatedSplit:
    """A model, the two ends of a movement, and tokens with their losses, each computed once.

    Attributes:
        loss: the token loss.
        series: recorded weights; the last one is edited.
        tokens: where damage is measured.
        window: (first, last) optimiser step of the movement that edits undo; the whole series by default.
        reference: step from which headroom is counted; the first checkpoint by default.
        matrix: where losses under edits are kept; by default those of single edits stay in memory.

    Raises:
        ValueError: where a step was not recorded, or the window is empty.

    Example:
        >>> split = EvaluatedSplit(loss, series, tokens)  # doctest: +SKIP
        >>> split.damage(project_out(split, basis[3])).by(tokens.skills)  # doctest: +SKIP
    """

    loss: Objective
    series: Checkpoints
    tokens: TokenSet
    window: tuple[int, int] | None = None
    reference: int | None = None
    matrix: KeptLosses | None = None
    _after: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        steps = self.series.steps
        for step in (*(self.window or ()), *(() if self.reference is None else (self.reference,))):
            if step not in steps:
                raise ValueError(
                    f"a window or reference must name recorded steps, {step} is not among {steps[0]} .. "
                    f"{steps[-1]} ({len(steps)} checkpoints); take the nearest one"
                )
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError(
                f"a window must end after it starts, got {self.window[0]}:{self.window[1]}; swap them"
            )

    @cached_property
    def movement(self) -> Movement:
        """What edits undo: the window's movement, in the final weights."""
        start, end = self.window or (self.series.steps[0], self.series.steps[-1])
        last = end == self.series.steps[-1]
        at = self.series.steps.index
        return Movement(self.series[-1], self.series[at(start)], None if last else self.series[at(end)])

    @property
    def theta(self) -> Float[Tensor, " N"]:
        """Final weights, which edits are made for."""
        return self.movement.theta

    @cached_property
    def before(self) -> Float[Tensor, " M"]:
        """Loss at the final weights, nats."""
        return self.loss.losses(self.theta, self.tokens)

    @cached_property
    def reference_loss(self) -> Float[Tensor, " M"]:
        """Loss at the reference, nats."""
        step = self.series.steps[0] if self.reference is None else self.reference
        return self.loss.losses(self.series[self.series.steps.index(step)], self.tokens)

    @cached_property
    def start_loss(self) -> Float[Tensor, " M"]:
        """Loss at the window's start, nats: what a transplant improves on."""
        first = self.series.steps[0] if self.window is None else self.window[0]
        reference = self.series.steps[0] if self.reference is None else self.reference
        return (
            self.reference_loss if first == reference else self.loss.losses(self.movement.start, self.tokens)
        )

    @property
    def headroom(self) -> Float[Tensor, " M"]:
        """Loss at the reference minus loss at the final weights, nats."""
        return self.reference_loss - self.before

    def after(self, edit: Edit) -> Float[Tensor, " M"]:
        """Loss of every token at the edited final weights; an edit seen before costs nothing.

        Raises:
            ValueError: if the edit was made for other weights.
        """
        edit.require_base(self.movement.base)
        if edit.key not in self._after:
            self._after[edit.key] = self._losses(edit, self.theta)
        return self._after[edit.key]

    def damage(self, edit: Edit) -> Damage:
        """Loss change of every token under an edit of the final weights."""
        return Damage(edit.operator, edit.dose, self.before, self.after(edit), self.headroom)

    def changes(
        self, edits: Iterable[Edit], *, progress: Callable[[int], None] | None = None
    ) -> Float[Tensor, "E M"]:
        """Damage of many edits, one row each, float64; kept in the damage matrix if there is one.

        Args:
            edits: of the final weights; drawn one after another.
            progress: called with the number of edits done.
        """
        rows = []
        for edit in progress_of(edits, "edits") if progress is None else edits:
            edit.require_base(self.movement.base)
            rows.append((self._losses(edit, self.theta) - self.before).double())
            if progress is not None:
                progress(len(rows))
        return torch.stack(rows) if rows else torch.zeros(0, self.tokens.count, dtype=torch.float64)

    def gain(self, edit: Edit) -> Float[Tensor, " M"]:
        """Loss that an edit of the window's start takes away (sufficiency), nats.

        Raises:
            ValueError: if the edit was not made for the weights at the window's start.
        """
        edit.require_base(self.movement.source)
        return self.start_loss - self._losses(edit, self.movement.start)

    def on(self, tokens: TokenSet) -> EvaluatedSplit:
        """The same movement on other tokens."""
        return replace(self, tokens=tokens)

    def _losses(self, edit: Edit, theta: Float[Tensor, " N"]) -> Float[Tensor, " M"]:
        """Loss of every token at edited weights, from the matrix where it is kept."""

        def measured() -> Float[Tensor, " M"]:
            return self.loss.losses(edit.moved(theta), self.tokens)

        return measured() if self.matrix is None else self.matrix.row(edit, self.tokens, measured)
