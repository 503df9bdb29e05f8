"""Names of token groups: a known parent skill and at most two conditions on input features.

A name is only given where it holds: the rule with the best F1 less a penalty per condition, and no name
below F1 = 0.5. The full decision tree (:mod:`polca_edit.clusters.membership`) decides who is in the group
among other tokens; the name says it in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from polca_edit.clusters.hypotheses import TokenGroup
from polca_edit.clusters.membership import fit_rule
from polca_edit.tokens import TokenSet

#: F1 that a further condition must bring, F1 below which a group has no name, and bounds per feature.
PENALTY, LEAST_F1, CUTS = 0.02, 0.5, 24
Bits = NDArray[np.bool_]


@dataclass(frozen=True)
class Description:
    """The best short description of a token group.

    Attributes:
        text: parent and conditions, e.g. ``10s digit, digit sum 5-14``.
        precision: share of the described tokens that are in the group.
        recall: share of the group that is described.
        conditions: how many, the parent not counted.
    """

    text: str
    precision: float
    recall: float
    conditions: int

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0

    @property
    def holds(self) -> bool:
        """Whether it is good enough to be called a name."""
        return self.f1 >= LEAST_F1


def describe_group(tokens: TokenSet, member: Bool[Tensor, " M"]) -> Description:
    """Parent skill plus at most two conditions with the best F1 under a description-length penalty.

    Args:
        tokens: with skills and features; both may be empty.
        member: (M,) the group.
    """
    target = member.numpy().astype(bool)
    parents: dict[str, Bits] = {"": np.ones(len(target), dtype=bool)}
    parents |= {name: mask.numpy().astype(bool) for name, mask in tokens.skills.items()}
    conditions = list(_conditions(tokens.features))
    best = Description("", 0.0, 0.0, 0)
    for name, mask in parents.items():
        words = [_parent_words(name)] if name else []
        for _ in range(3):
            found = _scored(words, mask, target, bool(name))
            if found.f1 - PENALTY * found.conditions > best.f1 - PENALTY * best.conditions:
                best = found
            step = _best_condition(conditions, mask, target, words)
            if step is None:
                break
            mask, words = mask & step[1], [*words, step[0]]
    return best


def _scored(words: list[str], mask: Bits, target: Bits, parent: bool) -> Description:
    both, size = int((mask & target).sum()), int(mask.sum())
    precision = both / size if size else 0.0
    recall = both / max(1, int(target.sum()))
    return Description(", ".join(words) or "all tokens", precision, recall, len(words) - parent)


def _best_condition(
    conditions: list[tuple[str, Bits]], mask: Bits, target: Bits, words: list[str]
) -> tuple[str, Bits] | None:
    """The condition that raises F1 most."""
    inside = np.stack([c for _, c in conditions]) & mask if conditions else np.zeros((0, len(mask)), bool)
    if not len(inside):
        return None
    both, sizes = inside[:, target].sum(1), inside.sum(1)
    f1 = 2 * both / np.maximum(sizes + int(target.sum()), 1)
    index = int(f1.argmax())
    now = 2 * int((mask & target).sum()) / max(int(mask.sum() + target.sum()), 1)
    if f1[index] <= now + 1e-9:
        return None
    return conditions[index]


def _conditions(features: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Bits]]:
    """Ranges of numbers and single values of texts, each with its tokens."""
    for name, raw in features.items():
        values = np.asarray(raw)
        words = name.replace("_", " ")
        if values.dtype.kind == "b":
            yield words, values
            yield f"not {words}", ~values
        elif values.dtype.kind in "iuf":
            yield from _ranges(words, values)
        else:
            texts, counts = np.unique(values.astype(str), return_counts=True)
            for text in texts[np.argsort(-counts, kind="stable")[:60]]:
                yield f"{words} '{text}'", values.astype(str) == text


def _ranges(words: str, values: np.ndarray) -> Iterator[tuple[str, Bits]]:
    levels = np.unique(values)
    if len(levels) > CUTS:
        levels = np.unique(np.quantile(values, np.linspace(0, 1, CUTS), method="nearest"))
    for i, low in enumerate(levels):
        for high in levels[i:]:
            if low == levels[0] and high == levels[-1]:
                continue
            # Bounds that are the feature's own ends are not said.
            if low == high:
                text = f"{words} {low:g}"
            elif low == levels[0]:
                text = f"{words} <= {high:g}"
            elif high == levels[-1]:
                text = f"{words} >= {low:g}"
            else:
                text = f"{words} {low:g}-{high:g}"
            yield text, (values >= low) & (values <= high)


def _parent_words(name: str) -> str:
    """Places are digits."""
    return f"{name} digit" if name.rstrip("s").isdigit() else name


def name_group(tokens: TokenSet, member: Bool[Tensor, " M"], identifier: str, *, seed: int) -> TokenGroup:
    """A group with its name and the loss-free rule that finds it among other tokens.

    Args:
        tokens: with features.
        member: (M,) the group.
        identifier: what it is called where no description holds.
        seed: of the rule.
    """
    return TokenGroup(name_of(tokens, member, identifier), rule=fit_rule(tokens, member, seed=seed))


def name_of(tokens: TokenSet, member: Bool[Tensor, " M"], identifier: str) -> str:
    """The description with precision and recall, or ``unnamed`` with the commonest skill."""
    found = describe_group(tokens, member)
    if found.holds:
        exact = found.precision > 0.995 and found.recall > 0.995
        return found.text if exact else f"{found.text} (P {found.precision:.2f}, R {found.recall:.2f})"
    held = {name: float(mask[member].double().mean()) for name, mask in tokens.skills.items()}
    if not held or not bool(torch.any(member)):
        return f"unnamed {identifier}"
    best = max(held, key=lambda name: held[name])
    return f"unnamed {identifier} ({held[best]:.0%} {_parent_words(best)})"
