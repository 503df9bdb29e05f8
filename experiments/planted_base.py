"""What all testbeds share: checks, landscapes with a known answer, and the test run on them.

A landscape is a module whose only parameter is a vector, with a token loss written down; so a bed
takes the same path through derivatives, edits, controls, statistics and verdict as a trained model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from interventions import nulls
from interventions.edits import weights_fingerprint
from interventions.evidence import PairEvidence, combine
from interventions.measures import Target
from interventions.protocol import (
    ControlBank,
    Pair,
    PlanSettings,
    Session,
    Subject,
    attributed_losses,
    fill_bank,
    mark_crossovers,
    measure_pair,
    open_session,
)
from interventions.statistics import Array, Bits
from interventions.verdict import Verdict, VerdictInputs, decide
from polca_edit.allocation import Projections, project
from polca_edit.basis import unlabelled
from polca_edit.checkpoints import Checkpoints
from polca_edit.derivatives import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet

SEEDS = 5


@dataclass(frozen=True)
class Check:
    """One number a bed must meet."""

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


def within(name: str, value: float, low: float, high: float) -> Check:
    """Passed where low <= value <= high."""
    return Check(name, float(value), f"in [{low:g}, {high:g}]", bool(low <= value <= high))


def holds(name: str, value: bool) -> Check:
    """A fact, as 1 or 0."""
    return Check(name, float(value), "= 1", bool(value))


@dataclass(frozen=True)
class BedResult:
    """One bed (or variant, or pair of it) with what was expected and seen.

    Attributes:
        bed: T1 ... T10.
        variant: which variant or pair.
        expected: verdict expected, or ``identities``; several allowed ones are joined by " or ".
        observed: verdict seen.
        checks: numbers.
        not_applicable: clauses declared not to apply; never counted as passed.
        gate: ``never_causal``, ``always_causal`` or empty: part of the release gate.
        reason: the verdict's sentence.
    """

    bed: str
    variant: str
    expected: str
    observed: str
    checks: tuple[Check, ...] = ()
    not_applicable: tuple[str, ...] = ()
    gate: str = ""
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Verdict as expected and every check met."""
        return self.observed in self.expected.split(" or ") and all(c.passed for c in self.checks)


class Landscape(nn.Module):
    """A vector of parameters, and the loss of every token written as a function of it."""

    def __init__(self, start: Tensor, losses: Callable[[Tensor, Tensor], Tensor]) -> None:
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


def landscape_values(module: nn.Module, theta: Tensor, inputs: Tensor) -> Tensor:
    """(B, P) losses of a landscape at any weights."""
    assert isinstance(module, Landscape)
    found: Tensor = module.losses(theta, inputs)
    return found


@dataclass
class LandscapeObjective(Objective):
    """The same numbers as :class:`Objective` without its set-up cost, for losses of a plain vector.

    Every token's gradient is kept per checkpoint, so that hundreds of reference bases cost one
    matrix product each. A test holds it against :class:`Objective`.

    Attributes:
        uniform: all sequences have the same losses, so one is computed.
    """

    uniform: bool = False
    gradients: dict[tuple[str, str], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def losses(self, theta: Tensor, tokens: TokenSet) -> Tensor:
        """(M,) loss of every token."""
        with torch.no_grad():
            given = tokens.inputs[:1] if self.uniform else tokens.inputs
            found = landscape_values(self.module, theta, given)
            return found.expand(tokens.scored.shape)[tokens.scored]

    def directional(
        self, theta: Tensor, rows: Tensor, tokens: TokenSet, *, expected: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses and <row, gradient> of every token, from kept gradients."""
        key = weights_fingerprint(theta), tokens.fingerprint()
        if key not in self.gradients:
            self.gradients[key] = self._measure(theta, tokens)
        losses, gradients = self.gradients[key]
        return losses, rows @ gradients.T

    def _measure(self, theta: Tensor, tokens: TokenSet) -> tuple[Tensor, Tensor]:
        given = tokens.inputs[:1] if self.uniform else tokens.inputs

        def of_one(point: Tensor, one: Tensor) -> Tensor:
            found = landscape_values(self.module, point, one[None])
            return found[0]

        table = torch.func.vmap(torch.func.jacrev(of_one), in_dims=(None, 0))(theta.detach(), given)
        scored = tokens.scored
        with torch.no_grad():
            values = landscape_values(self.module, theta, given)
        return values.expand(scored.shape)[scored], table.expand(*scored.shape, -1)[scored]


def sequences_of(count: int, slots: int, *, first: int = 0, inputs: Tensor | None = None) -> TokenSet:
    """``count`` one-document sequences whose every slot is scored; inputs default to sequence numbers."""
    numbers = torch.arange(first, first + count)
    given = numbers[:, None] if inputs is None else inputs
    return TokenSet(given, torch.ones(count, slots, dtype=torch.bool), numbers)


def slot_groups(tokens: TokenSet, names: Sequence[str]) -> dict[str, Bits]:
    """Group k holds the tokens of slot k."""
    slots = tokens.position_of.numpy()
    return {name: slots == index for index, name in enumerate(names)}


@dataclass(frozen=True)
class World:
    """One seed of a bed: the run, the pairs to test, and the groups known on both splits."""

    subject: Subject
    pairs: tuple[Pair, ...]
    select: Mapping[str, Bits]
    evaluate: Mapping[str, Bits]


def landscape_subject(
    losses: Callable[[Tensor, Tensor], Tensor],
    thetas: Sequence[Tensor],
    rows: Tensor,
    select: TokenSet,
    evaluate: TokenSet,
    *,
    plain: bool = False,
    uniform: bool = True,
) -> Subject:
    """A subject from a loss written down and a path of weights.

    ``uniform``: all sequences have the same losses. ``plain``: derivatives by :class:`Objective` itself.
    """
    module = Landscape(thetas[0], losses)
    space = ParameterSpace.from_module(module)
    series = Checkpoints.in_memory(space, list(range(len(thetas))), list(thetas))
    kind = Objective(module, space, landscape_loss, route="jvp")
    if not plain:
        kind = LandscapeObjective(module, space, landscape_loss, route="jvp", uniform=uniform)
    return Subject(kind, series, rows, select, evaluate)


def make_pair(
    name: str,
    vectors: Sequence[int],
    group: str,
    select: Mapping[str, Bits],
    evaluate: Mapping[str, Bits],
    **more: object,
) -> Pair:
    """A pair whose target is a known group and whose others are all other groups."""

    def target(groups: Mapping[str, Bits]) -> Target:
        return Target(groups[group], {k: v for k, v in groups.items() if k != group})

    clauses = ("positive_control", *more.pop("not_applicable", ()))  # type: ignore[misc]
    return Pair(name, tuple(vectors), target(evaluate), target(select), not_applicable=clauses, **more)  # type: ignore[arg-type]


def projections_of(subject: Subject, rows: Tensor) -> Projections:
    """Projections of rows on the select split."""
    return project(subject.objective, subject.checkpoints, [unlabelled("planted", rows)], subject.select)[0]


def references(world: World, session: Session, rank: int) -> dict[str, Array]:
    """c7: rotated and random bases for single vectors, random parts of the span for joint sets."""
    settings, rows, bench = session.settings, world.subject.rows, session.ranked
    there = {name: session.on_ranked(Target(mask)).members for name, mask in world.evaluate.items()}
    generator = torch.Generator().manual_seed(settings.seed + 17)
    if rank > 1:
        targets = [Target(mask) for mask in there.values()]
        draws = settings.rotations
        found = nulls.subspace_effects(bench, rows, rank, targets, draws=draws, generator=generator)
        return {"rotation": found}
    choose = nulls.labelled_choice(world.select, there, settings.pairs)
    own = projections_of(world.subject, rows)
    return {
        "rotation": nulls.rotation_maxima(
            bench, rows, own, choose, draws=settings.rotations, generator=generator
        ),
        "random": nulls.random_maxima(
            bench,
            lambda drawn: projections_of(world.subject, drawn),
            choose,
            vectors=len(rows),
            draws=settings.random_bases,
            generator=generator,
        ),
    }


def measure_world(world: World, settings: PlanSettings) -> tuple[Session, list[PairEvidence]]:
    """Evidence for every pair of one seed."""
    session = open_session(world.subject, settings)
    by_rank: dict[int, dict[str, Array]] = {}
    banks: dict[tuple[int, ...], ControlBank] = {}
    found = []
    for pair in world.pairs:
        rank = len(pair.vectors)
        if rank not in by_rank:
            by_rank[rank] = references(world, session, rank)
        if pair.vectors not in banks:
            shared = [p.evaluate for p in world.pairs if p.vectors == pair.vectors]
            banks[pair.vectors] = fill_bank(session, pair.vectors, shared)
        attributed = attributed_losses(session, pair.vectors, session.ranked.tokens)
        found.append(measure_pair(session, pair, banks[pair.vectors], attributed, by_rank[rank]))
    return session, mark_crossovers(session, world.pairs, found)


@dataclass(frozen=True)
class Finding:
    """A pair's verdict over all seeds of a bed, with what led to it."""

    verdict: Verdict
    inputs: VerdictInputs
    evidence: tuple[PairEvidence, ...]
    sessions: tuple[Session, ...] = field(repr=False, default=())


def assess(make: Callable[[int], World], settings: PlanSettings, seeds: int = SEEDS) -> dict[str, Finding]:
    """The whole test on every seed of a bed, pairs matched by name."""
    by_name: dict[str, list[PairEvidence]] = {}
    sessions = []
    for seed in range(seeds):
        own = PlanSettings(**{**settings.__dict__, "seed": settings.seed + seed})
        session, found = measure_world(make(seed), own)
        if isinstance(session.subject.objective, LandscapeObjective):
            session.subject.objective.gradients.clear()
        sessions.append(session)
        for evidence in found:
            by_name.setdefault(evidence.name, []).append(evidence)
    result = {}
    for name, evidence_list in by_name.items():
        inputs = combine(evidence_list, stop_after=settings.stop_after, seed=settings.seed)
        verdict = decide(inputs, settings.thresholds)
        result[name] = Finding(verdict, inputs, tuple(evidence_list), tuple(sessions))
    return result


def bed_result(
    bed: str, variant: str, expected: str, finding: Finding, checks: Sequence[Check] = (), gate: str = ""
) -> BedResult:
    """A result row from a finding."""
    skipped = tuple(
        sorted(n for n, outcome in finding.verdict.clauses.items() if outcome == "not_applicable")
    )
    observed = finding.verdict.verdict
    return BedResult(bed, variant, expected, observed, tuple(checks), skipped, gate, finding.verdict.reason)


def orthonormal(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, size) orthonormal float64 rows."""
    drawn = torch.randn(size, count, generator=generator, dtype=torch.float64)
    rows: Tensor = torch.linalg.qr(drawn)[0].T.contiguous()
    return rows


def worst(values: Sequence[float] | Sequence[Array] | Array | Tensor) -> float:
    """Largest absolute value."""
    return float(np.abs(np.asarray(values)).max())
