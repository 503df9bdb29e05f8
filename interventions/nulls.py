"""The pipeline null (c7): the whole choice of pairs and the test, run again on reference bases.

Choosing tokens because their loss fell along b and then undoing b is circular; a test of the tokens
alone rejects for random directions too. So every reference basis goes through the same allocation,
filters, clustering, description and pair choice on the select split, and its pairs through the same
operator on the evaluate split. What is compared is the largest T over its pairs (max-T).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from interventions import measures
from interventions.controls import random_frame
from interventions.edits import project_out
from interventions.evidence import Bench
from interventions.measures import Target
from interventions.statistics import Array, Bits
from polca_edit.allocation import Projections, allocate
from polca_edit.curvature import orthonormalise
from polca_edit.membership import MembershipRule


@dataclass(frozen=True)
class Choice:
    """One pair a pipeline chose on the select split.

    Attributes:
        vector: index in the basis that went in.
        name: skill or membership rule.
        select: the cluster where it was found.
        evaluate: the cluster by its rule on the evaluate split.
        rule_auc: of the rule, None where known by construction.
        score: what the choice was ranked by.
        rule: what decides membership, None where known by construction.
    """

    vector: int
    name: str
    select: Target
    evaluate: Target
    rule_auc: float | None
    score: float
    rule: MembershipRule | None = None


#: The pipeline from stored projections to chosen pairs; must not look at evaluate losses.
Chooser = Callable[[Projections], Sequence[Choice]]


def rotations(count: int, draws: int, generator: torch.Generator) -> Iterator[Float[Tensor, "K K"]]:
    """Uniformly random rotations of a span (QR of a Gaussian matrix with the signs fixed)."""
    for _ in range(draws):
        q, r = torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=torch.float64))
        yield q * r.diagonal().sign()


def largest_effect(bench: Bench, rows: Float[Tensor, "K N"], choices: Sequence[Choice]) -> float:
    """Largest T over the chosen pairs of one basis; -1 (the least possible by far) where none was chosen."""
    found = [-1.0]
    changes: dict[int, Array] = {}
    for choice in choices:
        if choice.vector not in changes:
            row = rows[choice.vector : choice.vector + 1]
            changes[choice.vector] = bench.change(project_out(bench.theta, bench.reference, row))
        value = float(measures.selectivity(changes[choice.vector], bench.headroom, choice.evaluate))
        if np.isfinite(value):
            found.append(value)
    return max(found)


def rotation_maxima(
    bench: Bench,
    rows: Float[Tensor, "K N"],
    projections: Projections,
    choose: Chooser,
    *,
    draws: int,
    generator: torch.Generator,
) -> Array:
    """Largest T of each rotated basis; derivatives come from stored projections without a pass."""
    found = []
    for rotation in rotations(len(rows), draws, generator):
        turned = rotation.T.to(rows) @ rows
        found.append(largest_effect(bench, turned, choose(projections.rotated(rotation))))
    return np.array(found)


def random_maxima(
    bench: Bench,
    project_rows: Callable[[Tensor], Projections],
    choose: Chooser,
    *,
    vectors: int,
    draws: int,
    generator: torch.Generator,
) -> Array:
    """Largest T of each random orthonormal basis of all weight space; ``project_rows`` measures it."""
    found = []
    for _ in range(draws):
        drawn = torch.randn(vectors, bench.theta.shape[0], generator=generator, dtype=bench.theta.dtype)
        rows = orthonormalise(drawn)
        found.append(largest_effect(bench, rows, choose(project_rows(rows))))
    return np.array(found)


def subspace_effects(
    bench: Bench,
    rows: Float[Tensor, "K N"],
    rank: int,
    targets: Sequence[Target],
    *,
    draws: int,
    generator: torch.Generator,
) -> Array:
    """Largest T over all targets of random ``rank``-dimensional parts of a span, their movement undone.

    The reference for a joint set of vectors (A6). Every target counts, not only chosen ones, so the
    maxima are at least those of any choice.
    """
    found = []
    for _ in range(draws):
        frame = random_frame(len(rows), rank, generator).to(rows)
        change = bench.change(project_out(bench.theta, bench.reference, frame @ rows))
        found.append(max(float(measures.selectivity(change, bench.headroom, target)) for target in targets))
    return np.array(found)


def labelled_choice(select: Mapping[str, Bits], evaluate: Mapping[str, Bits], count: int) -> Chooser:
    """A pipeline for tasks whose groups are known: pairs ranked by the share of headroom allocated.

    For every vector and group the score is minus the allocated loss over the group's exact loss
    fall on the select split; the best ``count`` pairs are chosen.
    """

    def choose(projections: Projections) -> list[Choice]:
        allocation = allocate(projections, "trapezoid")
        allocated = allocation.values.sum(0).double().numpy()
        fall = -allocation.exact.sum(0).double().numpy()
        found = []
        for name, mask in select.items():
            room = float(fall[mask].mean())
            if room <= 0:
                continue
            apart = {other: m for other, m in select.items() if other != name}
            there = {other: m for other, m in evaluate.items() if other != name}
            for vector in range(len(allocated)):
                score = -float(allocated[vector, mask].mean()) / room
                found.append(
                    Choice(vector, name, Target(mask, apart), Target(evaluate[name], there), None, score)
                )
        return sorted(found, key=lambda c: -c.score)[:count]

    return choose


def calibrate(values: Sequence[float], nulls: Sequence[Array]) -> NDArray[np.float64]:
    """Bare p-value of each value against its own independent null (A8)."""
    from interventions.statistics import rank_p

    return np.array([rank_p(value, null) for value, null in zip(values, nulls, strict=True)])


def leave_one_out(maxima: Array) -> NDArray[np.float64]:
    """Rank p of every reference basis among the others: the basis is the unit.

    >>> leave_one_out(np.array([3.0, 1.0, 2.0])).round(3).tolist()
    [0.333, 1.0, 0.667]
    """
    return np.array([(1 + np.sum(np.delete(maxima, i) >= v)) / len(maxima) for i, v in enumerate(maxima)])
