"""Pairs of a movement and a token group, both decided before any unseen token is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polca_edit.clusters.membership import MembershipRule
from polca_edit.tokens import TokenSet

#: Where pairs come from; a user's own pairs are a fourth family.
FAMILIES = ("polca", "interventional", "skill", "own")


@dataclass(frozen=True)
class TokenGroup:
    """A group of tokens that can be found again among tokens whose losses nobody has looked at.

    Attributes:
        name: what it is called everywhere.
        rule: who is in it by input features (never a loss).
        skill: or the name of a known label of the token set.
        masks: or, per token set (by fingerprint), its (M,) members as the user labelled them.
    """

    name: str
    rule: MembershipRule | None = None
    skill: str | None = None
    masks: Mapping[str, Bool[Tensor, " M"]] = field(default_factory=dict)

    def on(self, tokens: TokenSet) -> Bool[Tensor, " M"]:
        """Members among tokens.

        Raises:
            ValueError: if these tokens have no such label, or were not the ones labelled.
        """
        if self.rule is not None:
            return self.rule.assign(tokens)
        if self.skill is not None:
            if self.skill not in tokens.skills:
                raise ValueError(
                    f"group '{self.name}' is a label of the tokens, these have {sorted(tokens.skills)[:8]}; "
                    "label them or take another group"
                )
            return tokens.skills[self.skill]
        mask = self.masks.get(tokens.fingerprint())
        if mask is None:
            raise ValueError(
                f"group '{self.name}' was given for other tokens than these; give its mask for this split"
            )
        return mask

    @classmethod
    def labelled(cls, name: str, mask: Bool[Tensor, " M"], tokens: TokenSet) -> TokenGroup:
        """A group from a mask on known tokens.

        Raises:
            ValueError: for a mask that is not (M,) booleans.
        """
        if mask.dtype != torch.bool or mask.shape != (tokens.count,):
            raise ValueError(
                f"group '{name}' must be {tokens.count} booleans, one per scored token, got "
                f"{tuple(mask.shape)} of {mask.dtype}"
            )
        return cls(name, masks={tokens.fingerprint(): mask})


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """The movement along some rows matters to a group of tokens, and to that group only.

    Attributes:
        name: of the pair.
        rows: (k, N) orthonormal; the edit undoes the recorded movement along them.
        group: the tokens.
        family: where the pair comes from.
        basis: name of the basis the rows come from.
        vectors: their indices in it; empty for a skill axis.
        cluster: identifier of the cluster in ``clusters[]``, None for a known skill or a user's group.
        parent: name of the parent the group lies in, None if there is none.
        partners: (p, N) further rows that may share the work: redundancy and synergy are read off the
            joint edit.
        span: (K, N) rows of the whole basis, from which directions of equal damage are drawn.
        searched_p: p of a search that found the rows, against the same search on null sets; None where the
            rows were not searched for.
        supervised: whether labels went into the rows.
        why: why this pair was chosen.
    """

    name: str
    rows: Float[Tensor, "k N"]
    group: TokenGroup
    family: str = "own"
    basis: str = ""
    vectors: tuple[int, ...] = ()
    cluster: int | None = None
    parent: str | None = None
    partners: Float[Tensor, "p N"] | None = None
    span: Float[Tensor, "K N"] | None = None
    searched_p: float | None = None
    supervised: bool = False
    why: str = ""

    @property
    def moved(self) -> str:
        """What is undone, in words."""
        if not self.vectors:
            return self.name.partition(" | ")[0]
        return f"{self.basis} {'+'.join(map(str, self.vectors))}"


@dataclass(frozen=True)
class Unchosen:
    """A pair that is not tested, and why."""

    name: str
    reason: str
