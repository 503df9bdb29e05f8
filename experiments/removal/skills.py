"""Skills of the arithmetic task as groups of tokens: output digit, split by whether a carry comes in."""

from __future__ import annotations

from experiments.tasks.arithmetic import (
    GROUPS,
    SKILL_GROUPS,
    assign_groups,
    first_and_second,
    token_set,
)
from experiments.tasks.task import Partition
from interventions.removal.grouped import GroupRule
from interventions.removal.problem import Limits
from polca_edit.tokens import TokenSet

#: Bounds the project set itself: digits at 99 % and 0.5 %, carries at 90 % and 2 % (aimed at: as digits).
REQUIRED = {skill: Limits(0.90, 0.02) if "@" in skill else Limits(0.99, 0.005) for skill in SKILL_GROUPS}


def skill_rule(skill: str) -> GroupRule:
    """Groups with the given skill as target.

    Raises:
        ValueError: for an unknown skill.
    """
    return Partition(GROUPS, assign_groups, SKILL_GROUPS).rule(skill)


def commuted(tokens: TokenSet) -> TokenSet:
    """``b + a`` for every ``a + b``: the same skills on other inputs."""
    first, second = first_and_second(tokens)
    return token_set(second, first)


__all__ = ["GROUPS", "REQUIRED", "SKILL_GROUPS", "assign_groups", "commuted", "skill_rule"]
