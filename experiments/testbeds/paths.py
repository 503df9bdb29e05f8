"""Testbeds T3-T6: movement that comes back, movements needed together or in turn, movement without effect."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.testbeds.base import (
    BedResult,
    BedSettings,
    World,
    assess,
    at_least,
    at_most,
    axes,
    bed_result,
    between,
    flagged,
    holds,
    labelled_pair,
    landscape_split,
    slot_tokens,
    strengths,
    worst,
)
from interventions.edits import project_out, reverse, transplant
from polca_edit.basis.record import unlabelled
from polca_edit.observation import observe
from polca_edit.seeds import generator_for

#: Dimensions, most of them idle, rows of the span, and further skills beside the one that is tested.
SIZE, ROWS, OTHERS = 400, 12, 4
INTERVALS = 20


@dataclass(frozen=True)
class Gate:
    """One skill of a landscape: its loss as a function of all weights, its path, and the pairs tested.

    Attributes:
        name: of the skill.
        loss: theta -> nats (times the document's strength).
        thetas: weights over training, without the other skills' movement.
        pairs: (name, vectors, partners).
    """

    name: str
    loss: Callable[[Tensor], Tensor]
    thetas: Sequence[Tensor]
    pairs: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]


def gate_world(gate: Gate, seed: int, *, room: float, observed: bool = False) -> World:
    """A gate beside four separable skills whose headroom together is the gate's own.

    Coordinates 8 to 11 carry the other skills, all others may be the gate's; beyond ``ROWS`` all are idle.
    """
    generator = generator_for(seed, gate.name)
    idle = 0.2 * torch.randn(SIZE, generator=generator, dtype=torch.float64)
    idle[:ROWS] = 0.0
    idle[8 : 8 + OTHERS] = 1.0
    count = len(gate.thetas) - 1
    thetas = [theta + idle * (t / count) for t, theta in enumerate(gate.thetas)]

    def losses(theta: Tensor, inputs: Tensor) -> Tensor:
        others = room / OTHERS * (theta[8 : 8 + OTHERS] - 1) ** 2
        return inputs * torch.cat([gate.loss(theta)[None], others])

    names = (gate.name, *(f"other{k}" for k in range(OTHERS)))
    split = landscape_split(losses, thetas, slot_tokens(names, strengths(seed, gate.name)))
    span = axes(ROWS, SIZE)
    pairs = tuple(
        labelled_pair(name, span, vectors, gate.name, partners=partners)
        for name, vectors, partners in gate.pairs
    )
    seen = {}
    if observed:
        first = unlabelled("planted", span[:1])  # all that the tested pair needs
        seen["planted"] = observe(split.loss, split.series, first, split.tokens)
    return World(split, pairs, split.tokens.skills, seen)


def _placed(values: Sequence[float]) -> Tensor:
    theta = torch.zeros(SIZE, dtype=torch.float64)
    theta[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return theta


def _straight(end: Sequence[float], start: Sequence[float] | None = None) -> list[Tensor]:
    first, last = _placed(start or [0.0]), _placed(end)
    return [first + (last - first) * (t / INTERVALS) for t in range(INTERVALS + 1)]


def loop_sides(seed: int) -> tuple[float, float]:
    """Sides of the rectangle of T3."""
    p, q = 0.6 + 0.4 * torch.rand(2, generator=generator_for(seed, "T3"), dtype=torch.float64)
    return float(p), float(q)


def loop_world(seed: int, *, sign: int) -> World:
    """T3: a closed rectangle in (theta1, theta2) under L = theta1 theta2, while theta3 learns."""
    p, q = loop_sides(seed)
    corners = [(0.0, 0.0), (p, 0.0), (p, q), (0.0, q), (0.0, 0.0)][::sign]
    thetas = []
    for leg in range(4):
        for part in range(INTERVALS // 4):
            at = [
                a + (b - a) * part * 4 / INTERVALS
                for a, b in zip(corners[leg], corners[leg + 1], strict=True)
            ]
            thetas.append(_placed([*at, leg / 4 + part / INTERVALS]))
    thetas.append(_placed([0.0, 0.0, 1.0]))

    def loss(theta: Tensor) -> Tensor:
        ridge = 0.25 * (theta[0] ** 2 + theta[1] ** 2)
        return theta[0] * theta[1] + ridge + 0.5 * (theta[2] - 1) ** 2

    gate = Gate("loop", loss, thetas, (("loop", (0,), (1, 2)),))
    return gate_world(gate, seed, room=0.5, observed=True)


def bed_t3(settings: BedSettings) -> list[BedResult]:
    """T3: movement that is undone again has attribution and no endpoint effect."""
    results = []
    for sign, variant in ((1, "loop, A < 0"), (-1, "loop, A > 0")):
        found = assess(lambda seed, s=sign: loop_world(seed, sign=s), settings)  # type: ignore[misc]
        row, split = found["loop"], found.worlds[0].split
        area = [
            -sign * math.prod(loop_sides(seed)) * float(world.split.tokens.inputs.mean())
            for seed, world in enumerate(found.worlds)
        ]
        given = [run.attributed if run.attributed is not None else math.nan for run in row.pooled.runs]
        edit = project_out(split, found.worlds[0].pairs[0].rows)
        checks = [
            at_most("|A - (+-area H12)|", worst(np.array(given) - area), 1e-9),
            holds(
                "undoing it is the identity bit for bit", torch.equal(edit.apply(split.theta), split.theta)
            ),
            at_most("|D|", max(abs(row.pooled.damage.low), abs(row.pooled.damage.high)), 0.0),
            flagged(row, "undone_later"),
            at_least("D at its far end", min(run.halfway for run in row.pooled.runs), 0.02),
        ]
        result = bed_result("T3", row, "inert", checks, gate="never")
        results.append(BedResult("T3", variant, "inert", row.word, tuple(checks), "never", result.reason))
    return results


def and_world(seed: int) -> World:
    """T4: L = 1/2 (theta1 theta2 - 2)^2, both needed."""
    both = math.sqrt(2)
    gate = Gate(
        "AND",
        lambda theta: 0.5 * (theta[0] * theta[1] - 2) ** 2,
        _straight([both, both]),
        (("AND, first", (0,), (1,)), ("AND, second", (1,), (0,)), ("AND, both", (0, 1), ())),
    )
    return gate_world(gate, seed, room=2.0)


def or_world(seed: int) -> World:
    """T5: L = log(1 + exp(-8 (max(theta1, theta2) - .5))), either is enough."""
    gate = Gate(
        "OR",
        lambda theta: torch.nn.functional.softplus(-8 * (torch.maximum(theta[0], theta[1]) - 0.5)),
        _straight([1.0, 1.0]),
        (("OR, first", (0,), (1,)), ("OR, second", (1,), (0,)), ("OR, both", (0, 1), ())),
    )
    return gate_world(gate, seed, room=4.0)


def _lost_and_gained(world: World, skill: str, sets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """D and S of the skill under sets of rows, in units of the documents' mean strength."""
    split, span = world.split, axes(ROWS, SIZE)
    group, unit = split.tokens.skills[skill], float(split.tokens.inputs.mean())
    lost = [split.damage(project_out(split, span[list(s)])).change[group].mean() for s in sets]
    gained = [split.gain(transplant(split, span[list(s)]))[group].mean() for s in sets]
    return torch.stack(lost) / unit, torch.stack(gained) / unit


def bed_t4(settings: BedSettings) -> list[BedResult]:
    """T4: necessary each, sufficient only together."""
    found = assess(and_world, settings)
    lost, gained = _lost_and_gained(found.worlds[0], "AND", ((0,), (1,), (0, 1)))
    identities = [
        at_most("|D_1, D_2, D_12 - 2|", worst(lost - 2), 1e-9),
        at_most("|S_1, S_2, S_12 - 2|", worst(gained - torch.tensor([0.0, 0.0, 2.0])), 1e-9),
    ]
    results = []
    for name in ("AND, first", "AND, second"):
        checks = [flagged(found[name], "synergy"), holds("L is no", found[name].answers["L"] == "no")]
        results.append(bed_result("T4", found[name], "selective", [*checks, *identities]))
    alone = holds("no flag synergy", "synergy" not in found["AND, both"].flags)
    return [*results, bed_result("T4", found["AND, both"], "carrier", [alone])]


def bed_t5(settings: BedSettings) -> list[BedResult]:
    """T5: redundant alone, necessary together."""
    found = assess(or_world, settings)
    lost, gained = _lost_and_gained(found.worlds[0], "OR", ((0,), (1,), (0, 1)))
    identities = [
        at_most("|D_1, D_2|", worst(lost[:2]), 1e-9),
        between("D_12", float(lost[2]), 3.99, 4.01),
        between("S_1", float(gained[0]), 3.99, 4.01),
    ]
    results = [
        bed_result("T5", found[name], "inert", [flagged(found[name], "redundant"), *identities], gate="never")
        for name in ("OR, first", "OR, second")
    ]
    return [*results, bed_result("T5", found["OR, both"], "carrier")]


def void_world(seed: int) -> World:
    """T6: the loss sees only the direction of a block, and the tested row is its length.

    The block turns into its first axis while it grows, and the idle movement is larger still.
    """
    aim = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)

    def loss(theta: Tensor) -> Tensor:
        found: Tensor = 2 * (theta[:3] / theta[:3].norm() - aim).square().sum()
        return found

    thetas = _straight([2.0, 0.0, 0.0], start=[0.5, 0.8, 0.3])
    gate = Gate("direction", loss, thetas, (("length", (0,), (1, 2)),))
    return gate_world(gate, seed, room=1.0)


def bed_t6(settings: BedSettings) -> list[BedResult]:
    """T6: void movement damages nothing, however long it is."""
    found = assess(void_world, settings)
    split, row = found.worlds[0].split, found.worlds[0].pairs[0].rows
    lost = [worst(split.damage(reverse(split, row, a)).change) for a in (0.25, 0.5, 0.75, 1.0)]
    length = project_out(split, row).norm / float(split.theta[:3].norm())
    checks = [
        at_most("max |D| along the void row", max(lost), 1e-10),
        at_least("displacement over the block's norm", length, 0.45),
    ]
    return [bed_result("T6", found["length"], "inert", checks, gate="never")]
