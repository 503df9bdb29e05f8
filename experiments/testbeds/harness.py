"""Testbed T10: intervals, ranks, caps and operators, on data drawn anew and against numbers by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from experiments.testbeds.base import (
    BedResult,
    BedSettings,
    Check,
    Landscape,
    World,
    assess,
    at_least,
    at_most,
    axes,
    between,
    holds,
    labelled_pair,
    landscape_split,
    orthonormal,
    slot_tokens,
    worst,
)
from interventions.blocking import Hold
from interventions.causal.evidence import Evidence
from interventions.causal.nulls import SpanPool, total_share
from interventions.causal.questions import judge, pool
from interventions.causal.settings import TestSettings
from interventions.causal.statistics import Interval, benjamini_hochberg, binomial_bound
from interventions.causal.test import causal_test
from interventions.controls import scale_to_damage
from interventions.edits import Movement, displace, project_out, reverse
from polca_edit.clusters.hypotheses import Hypothesis, TokenGroup
from polca_edit.derivatives.lanczos import orthonormalise
from polca_edit.parameters import ParameterSpace
from polca_edit.seeds import generator_for

#: Equal skills of the landscape on which rates are simulated, and its dimensions.
SKILLS, SIZE = 8, 200


def bed_t10(settings: BedSettings) -> list[BedResult]:
    """Every part, each a row of its own."""
    parts: dict[str, Callable[[BedSettings], list[Check]]] = {
        "intervals over runs": over_runs,
        "intervals over documents": over_documents,
        "power rises with runs": power_of_runs,
        "S keeps its level": level_of_s,
        "large effects are needed": large_effects,
        "caps by hand": caps,
        "matched damage": matched,
        "tokens of two groups": overlap,
        "false discoveries": false_discoveries,
        "blocking holds": blocking,
        "vanishing edits": vanishing,
        "invariances": invariances,
    }
    return [BedResult("T10", name, "holds", "holds", tuple(part(settings))) for name, part in parts.items()]


def equal_skills(seed: int, documents: int, *, within: float = 0.0) -> World:
    """Eight skills of equal strength at their minimum, 1/2 h (theta_k - 2)^2, h in [.5, 1.5].

    Args:
        seed: of the documents and of the tested directions.
        documents: how many.
        within: standard deviation of h between the tokens of a document.
    """
    g = generator_for(seed, "T10")
    h = 0.5 + torch.rand(documents, 1, generator=g, dtype=torch.float64)
    h = h + within * torch.randn(documents, SKILLS, generator=g, dtype=torch.float64)
    end = torch.zeros(SIZE, dtype=torch.float64)
    end[:SKILLS] = 2.0

    def losses(theta: Tensor, inputs: Tensor) -> Tensor:
        return 0.5 * inputs * (theta[:SKILLS] - 2.0) ** 2

    split = landscape_split(losses, [end * t / 4 for t in range(5)], slot_tokens(_names(), h))
    turned = orthonormal(SKILLS, SKILLS, g) @ axes(SKILLS, SIZE)
    pairs = [labelled_pair(f"direction {k}", turned, (k,), "skill0") for k in range(4)]
    return World(split, tuple(pairs), split.tokens.skills)


def _names() -> tuple[str, ...]:
    return tuple(f"skill{k}" for k in range(SKILLS))


def evidence_of(damage: float, selectivity: float = 0.5, null: tuple[float, ...] = ()) -> Evidence:
    """A run's evidence of which only damage and selectivity matter."""
    whole = Interval(damage, damage - 1, damage + 1, 50)
    zero = Interval(0.0, 0.0, 0.0, 50)
    return Evidence(100, None, whole, whole, 2.0, False, 0.0, zero, "", {}, selectivity, null)


def over_runs(settings: BedSettings) -> list[Check]:
    """Coverage of the interval that several runs give, on effects drawn anew."""
    rng = np.random.default_rng(11)
    checks = []
    for runs in (2, 3, 5):
        inside = 0
        for values in rng.normal(1.0, 0.7, (1500, runs)):
            found = pool([evidence_of(float(v)) for v in values], settings.test).damage
            inside += found.low <= 1.0 <= found.high
        checks.append(between(f"coverage, {runs} runs", inside / 1500, 0.93, 0.97))
    return checks


def over_documents(settings: BedSettings) -> list[Check]:
    """Coverage of one run's interval where the tokens of a document go together.

    All eight slots form one group: tokens as units would give intervals that are far too short.
    """
    test = replace(settings.test, resamples=300, random_draws=19, rotations=0, transplants=0)
    rows = axes(SKILLS, SIZE)
    inside = 0
    for draw in range(settings.draws):
        split = equal_skills(draw, 60, within=0.1).split
        group = TokenGroup.labelled("all", torch.ones(split.tokens.count, dtype=torch.bool), split.tokens)
        [row] = causal_test(split, [Hypothesis("whole", rows, group)], test).rows
        # 1/2 h 2^2 with a mean strength of 1.
        inside += row.pooled.damage.low <= 2.0 <= row.pooled.damage.high
    slack = 2.5 * np.sqrt(0.05 * 0.95 / settings.draws)
    return [between("coverage over documents", inside / settings.draws, 0.94 - slack, 0.96 + slack)]


def power_of_runs(settings: BedSettings) -> list[Check]:
    """P of S for a fixed true effect of one standard deviation of its null, with 1, 3 and 5 runs."""
    rng = np.random.default_rng(4)

    def power(runs: int) -> float:
        found = 0
        for _ in range(300):
            known = [
                evidence_of(1.0, float(v), tuple(rng.normal(size=99))) for v in rng.normal(1.0, 1.0, runs)
            ]
            p = pool(known, settings.test).p
            found += p is not None and p < 0.05
        return found / 300

    one, three, five = power(1), power(3), power(5)
    return [
        at_least("power gained by a third run", three - one, 0.1),
        at_least("power gained by a fifth run", five - three, 0.02),
        # 1 - Phi(1.645 - sqrt 5)
        between("power with five runs", five, 0.62, 0.82),
    ]


def level_of_s(settings: BedSettings) -> list[Check]:
    """False positives of S: directions drawn anew are no more selective than others of their span."""
    test = replace(settings.test, resamples=100, random_draws=19, rotations=4, transplants=0)
    p_values: list[float] = []
    for draw in range(max(25, settings.draws // 4)):
        world = equal_skills(1000 + draw, 20)
        table = causal_test(world.split, world.pairs, replace(test, seed=draw), parents=world.parents)
        p_values += [row.pooled.p for row in table.rows if row.pooled.p is not None]
    count, rejected = len(p_values), sum(p < 0.05 for p in p_values)
    return [
        at_most(f"rejected among {count} null directions", rejected, binomial_bound(count, 0.05)),
        between("mean p of null directions", float(np.mean(p_values)), 0.4, 0.6),
    ]


def large_effects(settings: BedSettings) -> list[Check]:
    """A large effect is needed however wide its interval; only a no is qualified by power."""
    wide = pool([replace(evidence_of(5.0), damage=Interval(5.0, 1.0, 9.0, 20))], settings.test)
    pair = Hypothesis("p", axes(1, 2), TokenGroup("g"))
    [row] = judge([pair], [wide], settings.test, [(0,)])
    return [holds("5 nats, interval 1 to 9, are needed", row.answers["N"] == "yes")]


def capped_world(seed: int) -> World:
    """Undoing skill 0 makes one of ten tokens of another group lose 9 nats; that group never learned as much.

    Per token the group loses a tenth of its headroom; capped as a group it would lose 90 % of it.
    """
    g = generator_for(seed, "T10 caps")
    spiked = torch.zeros(60, 1, dtype=torch.float64)
    spiked[torch.randperm(60, generator=g)[:6]] = 1.0
    end = torch.zeros(SIZE, dtype=torch.float64)
    end[:SKILLS] = 1.0

    def losses(theta: Tensor, inputs: Tensor) -> Tensor:
        own = (theta[:SKILLS] - 1.0) ** 2
        spike = 9.0 * inputs[:, 0] * (1.0 - theta[0]) ** 2 * theta[1] ** 2
        return own + spike[:, None] * (torch.arange(SKILLS) == 1)

    split = landscape_split(losses, [end * t / 4 for t in range(5)], slot_tokens(_names(), spiked))
    pair = labelled_pair("spiked", axes(SKILLS, SIZE), (0,), "skill0")
    return World(split, (pair,), split.tokens.skills)


def caps(settings: BedSettings) -> list[Check]:
    """Shares of a group against numbers by hand, and the word that hangs on them."""
    row = assess(capped_world, settings)["spiked"]
    other = row.pooled.runs[0].others["skill1"]
    return [
        at_most("|n of the spiked group - .1|", abs(other.share - 0.1), 1e-9),
        at_most("|D of the spiked group - .9|", abs(other.damage.estimate - 0.9), 1e-9),
        at_most("|n of the target - 1|", abs(row.pooled.share.estimate - 1.0), 1e-9),
        holds("the row is a carrier", row.word == "carrier"),
    ]


def matched(settings: BedSettings) -> list[Check]:
    """Directions at one total damage; the dose of a control by bisection."""
    del settings
    g = generator_for(0, "T10 matched")
    h = torch.rand(5, generator=g, dtype=torch.float64) + 0.2
    dose = scale_to_damage(lambda s: float((0.5 * h * s**2).mean()), 0.7)
    split = equal_skills(0, 20).split
    span = SpanPool(split, axes(SKILLS, SIZE), 3, seed=0, lowest=0.02, highest=0.6)
    span.fill()
    room = split.headroom.numpy()
    errors, found = [], 0
    for level in (0.03, 0.1, 0.3):
        totals = [total_share(change, room) for change in span.matched(level)]
        errors += [total / level - 1 for total in totals]
        found += len(totals)
    return [
        at_most("relative error of bisection", abs(float((0.5 * h * dose**2).mean()) / 0.7 - 1), 0.01),
        at_most("relative error of matched directions", worst(errors), 0.01),
        at_least("directions that reach the damage, of 72", found, 60),
    ]


def overlap(settings: BedSettings) -> list[Check]:
    """Tokens of two tested groups are off target for neither."""
    test = replace(settings.test, rotations=0, transplants=0)
    world = equal_skills(0, 40)
    known = world.split.tokens.skills

    def pair(name: str, first: int) -> Hypothesis:
        mask = known[f"skill{first}"] | known[f"skill{first + 1}"]
        rows = axes(SKILLS, SIZE)[first : first + 2]
        return Hypothesis(name, rows, TokenGroup.labelled(name, mask, world.split.tokens))

    table = causal_test(world.split, [pair("first", 0), pair("second", 1)], test)
    others = table.rows[0].pooled.runs[0].others
    return [
        holds("the other group is off target", "second" in others),
        at_most("its damage without the tokens of both", abs(others["second"].damage.estimate), 1e-12),
    ]


def false_discoveries(settings: BedSettings) -> list[Check]:
    """Benjamini-Hochberg against a table by hand."""
    del settings
    given = [0.001, 0.008, 0.039, 0.041, 0.042, 0.06, 0.074, 0.205]
    by_hand = [0.008, 0.032, 0.0672, 0.0672, 0.0672, 0.08, 0.074 * 8 / 7, 0.205]
    return [at_most("adjusted p - by hand", worst(np.array(benjamini_hochberg(given)) - by_hand), 1e-12)]


@dataclass(frozen=True)
class Small:
    """A nonlinear least-squares problem of 30 weights, and one direction of them."""

    module: Landscape
    space: ParameterSpace
    row: Tensor
    start: Tensor

    def train(self, optimiser: torch.optim.Optimizer, after: Callable[[int], None]) -> None:
        """120 steps."""
        for step in range(1, 121):
            optimiser.zero_grad()
            self.module(torch.zeros(1, 1)).mean().backward()
            optimiser.step()
            after(step)


def _small_problem() -> Small:
    g = generator_for(3, "T10 blocking")
    matrix, target = torch.randn(60, 30, generator=g), torch.randn(60, generator=g)
    start = torch.randn(30, generator=g)
    module = Landscape(start, lambda theta, _: ((torch.tanh(matrix @ theta) - target) ** 2)[None])
    row = orthonormalise(torch.randn(1, 30, generator=g))
    return Small(module, ParameterSpace.from_module(module), row, start)


def _optimiser(name: str, module: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    decay = 0.1 if name == "adamw" else 0.0
    return torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=decay)


def blocking(settings: BedSettings) -> list[Check]:
    """A direction held under three optimisers; projecting gradients alone lets it drift."""
    del settings
    checks = []
    for name in ("sgd", "adam", "adamw"):
        small = _small_problem()
        hold = Hold(small.space, small.start, rows=small.row)
        optimiser = _optimiser(name, small.module)
        small.train(optimiser, lambda step: hold(step, small.module, optimiser))  # noqa: B023
        theta = small.space.read(small.module)
        drift = abs(float(small.row[0].double() @ (theta - small.start).double()))
        checks.append(at_most(f"drift over norm, {name}", drift / float(theta.norm()), 1e-6))
        checks.append(holds(f"reported as held, {name}", hold.held))
    checks.append(at_least("gradient-only drift over free drift, AdamW", _gradient_only_drift(), 0.3))
    return checks


def _gradient_only_drift() -> float:
    """|Drift along b| with the gradient projected, over the drift with nothing done (AdamW with decay)."""
    ends = []
    for projected in (False, True):
        small = _small_problem()
        optimiser = _optimiser("adamw", small.module)
        if projected:
            row = small.row[0]
            small.module.theta.register_hook(lambda g: g - (row @ g) * row)  # noqa: B023
        small.train(optimiser, lambda _: None)
        ends.append(abs(float(small.row[0] @ (small.space.read(small.module) - small.start))))
    return ends[1] / ends[0]


def vanishing(settings: BedSettings) -> list[Check]:
    """An edit below the resolution of bf16 weights is lost in them, and kept in float32."""
    del settings
    theta = torch.linspace(1.0, 2.0, 64)
    row = orthonormalise(torch.ones(1, 64))
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        stored = theta.to(dtype).float()
        movement = Movement(stored, torch.zeros_like(stored))
        wanted = displace(movement, row, [1e-4], "small").apply(stored)
        found.append(float((wanted.to(dtype).float() - stored).double().norm()) / 1e-4)
    return [
        at_most("share of a small edit that survives bf16", found[0], 0.99),
        between("share that survives float32", found[1], 0.99, 1.01),
    ]


def invariances(settings: BedSettings) -> list[Check]:
    """Operators against their formula; order and sign of rows change no verdict."""
    g = generator_for(8, "T10 invariances")
    rows = orthonormal(3, 20, g)
    theta, start = torch.randn(2, 20, generator=g, dtype=torch.float64)
    movement = Movement(theta, start)
    once = project_out(movement, rows).apply(theta)
    twice = project_out(Movement(once, start), rows).apply(once)
    turned = project_out(movement, -rows[[1, 2, 0]]).apply(theta)
    unmoved = reverse(movement, rows, 0.0).apply(theta)
    formula = theta - rows.T @ (rows @ (theta - start))
    same = _same_verdict(replace(settings.test, rotations=6))
    return [
        holds("dose zero is the identity", torch.equal(unmoved, theta)),
        at_most("undoing against its formula", worst(once - formula), 1e-12),
        at_most("undoing twice is undoing once", worst(twice - once), 1e-12),
        at_most("order and sign of rows do not matter", worst(turned - once), 1e-12),
        at_most("damage of a row and of its negative", same, 1e-12),
    ]


def _same_verdict(test: TestSettings) -> float:
    """|Difference of D| between a pair and the same pair with its row's sign flipped."""
    world = equal_skills(0, 20)
    [pair] = world.pairs[:1]
    flipped = replace(pair, rows=-pair.rows)
    found = [causal_test(world.split, [p], test, parents=world.parents).rows[0] for p in (pair, flipped)]
    first, second = (row.pooled.damage.estimate for row in found)
    return abs(first - second) if found[0].word == found[1].word else float("inf")
