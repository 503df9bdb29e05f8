"""Testbed T10: the statistics and operators themselves, under nulls and effects of known size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from experiments.planted_base import BedResult, Check, Landscape, at_least, at_most, holds, within, worst
from interventions import controls, edits, measures
from interventions.blocking import Hold
from interventions.measures import Target
from interventions.protocol import PlanSettings
from interventions.statistics import Draws as Sample
from interventions.statistics import (
    benjamini_hochberg,
    equivalent,
    holm,
    resampling_weights,
    sequence_permutation_p,
    sign_flip_p,
    token_permutation_p,
)
from interventions.verdict import VerdictInputs, decide
from polca_edit.curvature import orthonormalise
from polca_edit.parameters import ParameterSpace


def bed_t10(settings: PlanSettings) -> list[BedResult]:
    """All parts (a)-(h), and that a blown-up skill does not beat a removed one."""
    parts = {
        "a: sequences are the unit": _clumped_null(settings),
        "b: blocking holds": _blocking(),
        "c: matched damage": _matched(),
        "d: multiplicity and seeds": _multiplicity(),
        "e: equivalence": _equivalence(),
        "f: vanishing edits": _vanishing(),
        "g: tokens of two clusters": _polygenic(),
        "h: invariances": _invariances(),
        "i: capped shares": _capped(),
    }
    return [BedResult("T10", name, "holds", "holds", tuple(checks)) for name, checks in parts.items()]


def _clumped_null(settings: PlanSettings, runs: int = 400) -> list[Check]:
    rng = np.random.default_rng(settings.seed)
    sequences = np.repeat(np.arange(40), 25)
    ours, naive = [], []
    for _ in range(runs):
        values = np.sqrt(0.2) * rng.normal(size=40).repeat(25) + np.sqrt(0.8) * rng.normal(size=1000)
        mask = (rng.random(1000) < rng.beta(0.5, 0.5, size=40).repeat(25)) & True
        ours.append(sequence_permutation_p(values, mask, sequences, rng, draws=59) <= 0.05)
        naive.append(token_permutation_p(values, mask, rng, draws=59) <= 0.05)
    return [
        within("sequence-level false positives", float(np.mean(ours)), 0.02, 0.085),
        at_least("token-level false positives (regression guard)", float(np.mean(naive)), 0.15),
    ]


def _blocking() -> list[Check]:
    """A random direction of a small network under three optimisers; a gradient-only hold is flagged."""
    checks = []
    for name in ("sgd", "adam", "adamw"):
        drift, scale, held = _train_held(name)
        checks.append(at_most(f"drift over norm, {name}", drift / scale, 1e-6))
        checks.append(holds(f"reported as held, {name}", held))
    gradient_only = _gradient_only_drift()
    checks.append(at_least("gradient-only drift over free drift, AdamW", gradient_only, 0.3))
    return checks


def _small_problem() -> tuple[nn.Module, ParameterSpace, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    matrix = torch.randn(60, 30, generator=g)
    target = torch.randn(60, generator=g)

    def losses(theta: Tensor, inputs: Tensor) -> Tensor:
        return ((torch.tanh(matrix @ theta) - target) ** 2)[None]

    start = torch.randn(30, generator=g)
    module = Landscape(start, losses)
    row = orthonormalise(torch.randn(1, 30, generator=g))
    return module, ParameterSpace.from_module(module), row, start, torch.zeros(1, 1)


def _optimiser(name: str, module: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    decay = 0.1 if name == "adamw" else 0.0
    return torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=decay)


def _train_held(name: str) -> tuple[float, float, bool]:
    module, space, row, start, inputs = _small_problem()
    hold = Hold(space, start, rows=row)
    optimiser = _optimiser(name, module)
    for step in range(1, 121):
        optimiser.zero_grad()
        module(inputs).mean().backward()
        optimiser.step()
        hold(step, module, optimiser)
    drift = abs(float(row[0].double() @ (space.read(module) - start).double()))
    return drift, float(space.read(module).norm()), hold.held


def _gradient_only_drift() -> float:
    """|drift along b| with the gradient projected, over the drift with nothing done (AdamW with decay)."""
    ends = []
    for projected in (False, True):
        module, space, row, start, inputs = _small_problem()
        optimiser = _optimiser("adamw", module)
        for _ in range(120):
            optimiser.zero_grad()
            module(inputs).mean().backward()
            gradient = module.theta.grad
            if projected and isinstance(gradient, Tensor):
                gradient -= (row[0] @ gradient) * row[0]
            optimiser.step()
        ends.append(abs(float(row[0] @ (space.read(module) - start))))
    return ends[1] / ends[0]


def _matched() -> list[Check]:
    g = torch.Generator().manual_seed(4)
    h = torch.randn(5, generator=g, dtype=torch.float64).abs() + 0.2
    found = controls.scale_to_damage(lambda s: float((0.5 * h * s**2).mean()), 0.7)
    return [at_most("relative error of bisection", abs(float((0.5 * h * found**2).mean()) / 0.7 - 1), 0.01)]


def _multiplicity() -> list[Check]:
    table = [0.001, 0.008, 0.039, 0.041, 0.042, 0.06, 0.074, 0.205]
    by_hand_holm = [0.008, 0.056, 0.234, 0.234, 0.234, 0.234, 0.234, 0.234]
    by_hand_bh = [0.008, 0.032, 0.0672, 0.0672, 0.0672, 0.08, 0.074 * 8 / 7, 0.205]
    interval = Sample(1.0, np.full(10, 1.0)).interval()
    three = VerdictInputs(
        interval, interval, 1.0, interval, Sample(-1.0, np.full(10, -1.0)).interval(), seeds=3
    )
    return [
        at_most("Holm against a hand table", worst(holm(table) - np.array(by_hand_holm)), 1e-12),
        at_most(
            "Benjamini-Hochberg against a hand table",
            worst(benjamini_hochberg(table) - np.array(by_hand_bh)),
            1e-12,
        ),
        at_most("|sign flip of five - 1/32|", abs(sign_flip_p([1.0, 2.0, 0.5, 0.1, 3.0]) - 1 / 32), 0.0),
        holds("three seeds are inconclusive", decide(three).verdict == "inconclusive"),
    ]


def _equivalence(runs: int = 300) -> list[Check]:
    """Bootstrap equivalence test on 60 documents of 10 tokens."""
    rng = np.random.default_rng(6)
    margin, passes = 0.01, {0.25: 0, 2.0: 0}
    for scale in passes:
        for _ in range(runs):
            documents = scale * margin + 0.012 * rng.normal(size=60)
            weights = resampling_weights(60, 300, rng)
            passes[scale] += equivalent(
                Sample(float(documents.mean()), weights @ documents / 60).interval(), margin
            )
    return [
        at_least("passes at a quarter of the margin", passes[0.25] / runs, 0.8),
        at_most("passes at twice the margin", passes[2.0] / runs, 0.05),
    ]


def _vanishing() -> list[Check]:
    """An edit below the resolution of bf16 weights must be noticed; the same one in float32 must not."""
    theta = torch.linspace(1.0, 2.0, 64)
    row = orthonormalise(torch.ones(1, 64))
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        stored = theta.to(dtype).float()
        wanted = edits.displace(stored, row, [1e-4], "small").apply(stored)
        reached = float((wanted.to(dtype).float() - stored).double().norm())
        found.append(reached / 1e-4)
    return [
        at_most("share of a small edit that survives bf16", found[0], 0.99),
        within("share that survives float32", found[1], 0.99, 1.01),
    ]


def _polygenic() -> list[Check]:
    """Tokens of two clusters are in neither's off-target set, nor in the dissociation matrix."""
    first = np.array([True, True, True, False, False])
    second = np.array([False, False, True, True, True])
    apart = Target(first, {"second": second}).apart()["second"]
    change = [np.array([1.0, 1.0, 1.0, 0.0, 0.0]), np.array([0.0, 0.0, 1.0, 1.0, 1.0])]
    matrix = measures.dissociation_matrix(change, np.ones(5), [first, second])
    return [
        holds("overlap is out of the other group", apart.tolist() == [False, False, False, True, True]),
        at_most("off-diagonal of the dissociation matrix", worst([matrix[0, 1], matrix[1, 0]]), 0.0),
        holds("rest leaves the overlap out", not Target(first, {"second": second}).rest[2]),
    ]


def _invariances() -> list[Check]:
    g = torch.Generator().manual_seed(8)
    rows = orthonormalise(torch.randn(3, 20, generator=g, dtype=torch.float64))
    theta, start = torch.randn(2, 20, generator=g, dtype=torch.float64)
    once = edits.project_out(theta, start, rows).apply(theta)
    twice = edits.project_out(once, start, rows).apply(once)
    turned = edits.project_out(theta, start, -rows[[1, 2, 0]]).apply(theta)
    expected = theta - rows.T @ (rows @ (theta - start))
    return [
        holds(
            "dose zero is the identity",
            torch.equal(edits.reverse(theta, start, rows, 0.0).apply(theta), theta),
        ),
        at_most("O1 against its formula", worst(once - expected), 1e-12),
        at_most("O1 twice is O1 once", worst(twice - once), 1e-12),
        at_most("order and sign of rows do not matter", worst(turned - once), 1e-12),
    ]


def _capped() -> list[Check]:
    """Blowing a skill up five times over scores no better than removing it, on target and off."""
    members = np.array([True, True, False, False])
    room = np.ones(4)
    removed, blown = np.array([1.0, 1.0, 0.0, 0.0]), np.array([5.0, 5.0, 0.0, 0.0])
    leaking = np.array([5.0, 5.0, 1.0, 1.0])
    target = Target(members)
    return [
        at_most(
            "T blown up - T removed",
            float(measures.selectivity(blown, room, target) - measures.selectivity(removed, room, target)),
            0.0,
        ),
        at_most(
            "T of an edit that ruins both groups", float(measures.selectivity(leaking, room, target)), 0.0
        ),
    ]
