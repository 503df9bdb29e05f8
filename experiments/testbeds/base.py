"""What all testbeds share: checks, landscapes with a known answer, and the causal test run on them.

A landscape is a module whose only parameter is a vector, with a token loss written down; so a bed takes
the same path through losses, edits, nulls, statistics and words as a trained model. Landscapes of few
dimensions lie in many idle ones, as skills do in networks: a random edit of the same norm is harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from interventions.causal.questions import Verdict
from interventions.causal.settings import TestSettings
from interventions.causal.statistics import Array
from interventions.causal.test import CausalTable, judge_runs, measure_run
from interventions.damage import EvaluatedSplit
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.clusters.hypotheses import Hypothesis, TokenGroup
from polca_edit.derivatives.objective import Objective
from polca_edit.observation import Observation
from polca_edit.seeds import generator_for
from polca_edit.tokens import TokenSet


@dataclass(frozen=True)
class BedSettings:
    """How much a self-test draws.

    Attributes:
        test: draws and thresholds of the causal test.
        seeds: runs of each bed.
        directions: random directions of T7, over all its runs.
        draws: data sets drawn anew where a rate is simulated.
        observed: rotated bases that are observed and clustered anew (T7).
    """

    test: TestSettings
    seeds: int
    directions: int
    draws: int
    observed: int


@dataclass(frozen=True)
class Check:
    """One number a bed must meet.

    Attributes:
        name: what it is.
        value: what was found.
        bound: what is asked, in words.
        passed: whether it is met.
    """

    name: str
    value: float
    bound: str
    passed: bool


def at_most(name: str, value: float, bound: float) -> Check:
    """Passed where value <= bound."""
    return Check(name, float(value), f"<= {bound:g}", bool(value <= bound))


def at_least(name: str, value: float, bound: float) -> Check:
    """Passed where value >= bound."""
    return Check(name, float(value), f">= {bound:g}", bool(value >= bound))


def between(name: str, value: float, low: float, high: float) -> Check:
    """Passed where low <= value <= high."""
    return Check(name, float(value), f"in [{low:g}, {high:g}]", bool(low <= value <= high))


def holds(name: str, value: bool) -> Check:
    """A fact, as 1 or 0."""
    return Check(name, float(value), "= 1", bool(value))


def flagged(row: Verdict, flag: str) -> Check:
    """Whether a row carries a flag."""
    return holds(f"flag {flag}", flag in row.flags)


@dataclass(frozen=True)
class BedResult:
    """One bed (or variant, or pair of it) with what was expected and seen.

    Attributes:
        bed: T1 ... T10.
        variant: which variant or pair.
        expected: word expected, or ``identities``, ``holds``, ``not yes``.
        observed: what was seen.
        checks: numbers.
        gate: ``never``: not even once may it be called selective or carrier; ``always``: it must be
            called carrier; empty: no part of the release gate beyond passing.
        reason: the row's sentence.
    """

    bed: str
    variant: str
    expected: str
    observed: str
    checks: tuple[Check, ...] = ()
    gate: str = ""
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Word as expected and every check met."""
        return self.observed == self.expected and all(c.passed for c in self.checks)


class Landscape(nn.Module):
    """A vector of parameters, and the loss of every token written as a function of it."""

    def __init__(self, start: Float[Tensor, " N"], losses: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.theta = nn.Parameter(start.clone())
        self.losses = losses

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, P) losses, nats."""
        return self.losses(self.theta, inputs)


def landscape_loss(module: nn.Module, inputs: Tensor) -> Tensor:
    """Token loss of a landscape."""
    losses: Tensor = module(inputs)
    return losses


def landscape_split(
    losses: Callable[[Tensor, Tensor], Tensor], thetas: Sequence[Tensor], tokens: TokenSet
) -> EvaluatedSplit:
    """A split from a loss written down and a path of weights."""
    module = Landscape(thetas[0], losses)
    objective = Objective(module, landscape_loss, batch_size=4096, route="jvp")
    series = open_checkpoints(dict(enumerate(thetas)), objective.space)
    return EvaluatedSplit(objective, series, tokens)


def slot_tokens(names: Sequence[str], inputs: Tensor) -> TokenSet:
    """One document per row of ``inputs`` with a scored slot per name, which labels it."""
    count = len(inputs)
    tokens = TokenSet(inputs, torch.ones(count, len(names), dtype=torch.bool), torch.arange(count))
    return replace(tokens, skills={name: tokens.position_of == k for k, name in enumerate(names)})


def strengths(seed: int, bed: str, documents: int = 50) -> Tensor:
    """(documents, 1) factors on a document's losses, .5 to 1.5: documents differ, answers do not."""
    generator = generator_for(seed, bed, "strengths")
    return 0.5 + torch.rand(documents, 1, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class World:
    """One run of a bed.

    Attributes:
        split: model, path and unseen tokens.
        pairs: what is tested.
        parents: partition of the tokens.
        observations: basis name -> observation, where there is one.
    """

    split: EvaluatedSplit
    pairs: tuple[Hypothesis, ...]
    parents: Mapping[str, Tensor]
    observations: Mapping[str, Observation] = field(default_factory=dict)


def labelled_pair(
    name: str,
    span: Tensor,
    vectors: Sequence[int],
    skill: str,
    *,
    partners: Sequence[int] = (),
) -> Hypothesis:
    """The movement along some rows of a span and a group that the tokens are labelled with."""
    shared = span[list(partners)] if partners else None
    group = TokenGroup(skill, skill=skill)
    rows = span[list(vectors)]
    return Hypothesis(name, rows, group, "own", "planted", tuple(vectors), partners=shared, span=span)


@dataclass(frozen=True)
class Assessed:
    """The table of a bed over its runs, and the runs."""

    table: CausalTable
    worlds: tuple[World, ...]

    def __getitem__(self, name: str) -> Verdict:
        """The row of a pair."""
        return next(row for row in self.table.rows if row.name == name)


def assess(
    make: Callable[[int], World], settings: BedSettings, runs: Sequence[int] | None = None
) -> Assessed:
    """The causal test on every run of a bed, pairs matched by name."""
    seeds = range(settings.seeds) if runs is None else runs
    worlds = tuple(make(seed) for seed in seeds)
    measured = [
        measure_run(
            world.split,
            world.pairs,
            replace(settings.test, seed=settings.test.seed + 1000 * seed),
            parents=world.parents,
            observations=world.observations,
            seed=seed,
        )
        for seed, world in zip(seeds, worlds, strict=True)
    ]
    return Assessed(judge_runs(measured, settings.test), worlds)


def bed_result(
    bed: str, row: Verdict, expected: str, checks: Sequence[Check] = (), *, gate: str = ""
) -> BedResult:
    """A result row from a verdict."""
    return BedResult(bed, row.name, expected, row.word, tuple(checks), gate, row.sentence)


def orthonormal(count: int, size: int, generator: torch.Generator) -> Float[Tensor, "count size"]:
    """Random orthonormal float64 rows."""
    drawn = torch.randn(size, count, generator=generator, dtype=torch.float64)
    rows: Tensor = torch.linalg.qr(drawn)[0].T.contiguous()
    return rows


def axes(count: int, size: int) -> Float[Tensor, "count size"]:
    """The first coordinate axes, float64."""
    return torch.eye(count, size, dtype=torch.float64)


def worst(values: Sequence[float] | Sequence[Array] | Array | Tensor) -> float:
    """Largest absolute value."""
    return float(np.abs(np.asarray(values)).max())
