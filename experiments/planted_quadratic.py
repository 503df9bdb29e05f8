"""Testbeds T1-T6: landscapes whose every answer is a closed form (float64)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from experiments.planted_base import (
    BedResult,
    Check,
    World,
    assess,
    at_least,
    at_most,
    bed_result,
    holds,
    landscape_subject,
    make_pair,
    orthonormal,
    sequences_of,
    slot_groups,
    within,
    worst,
)
from interventions import controls, edits, measures
from interventions.protocol import PlanSettings, open_session
from polca_edit import allocation
from polca_edit.basis import unlabelled

LAMBDAS = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25], dtype=torch.float64)
MINIMUM = 2.0
NAMES = tuple(f"skill{k}" for k in range(6))


def separable_world(seed: int, *, reached: float, tested: tuple[int, ...] = (0, 5)) -> World:
    """T1: L_k = 1/2 lambda_k (u_k theta - 2)^2 in 2000 dimensions, 40 of them moved in vain."""
    g = torch.Generator().manual_seed(100 + seed)
    frame = orthonormal(46, 2000, g)
    skills, idle = frame[:6], frame[6:]
    target = reached * MINIMUM * skills.sum(0) + torch.randn(40, generator=g, dtype=torch.float64) @ idle
    thetas = [target * (t / 10) for t in range(11)]

    def losses(theta: Tensor, inputs: Tensor) -> Tensor:
        return (0.5 * LAMBDAS * (skills @ theta - MINIMUM) ** 2).expand(len(inputs), 6)

    select, evaluate = sequences_of(6, 6), sequences_of(6, 6, first=6)
    groups = slot_groups(select, NAMES), slot_groups(evaluate, NAMES)
    subject = landscape_subject(losses, thetas, frame[:12], select, evaluate)
    pairs = tuple(make_pair(NAMES[k], (k,), NAMES[k], *groups) for k in tested)
    return World(subject, pairs, *groups)


def _separable_identities(settings: PlanSettings) -> list[Check]:
    """Closed forms of T1 on one seed, all six vectors."""
    world = separable_world(0, reached=1.0)
    session = open_session(world.subject, settings)
    bench, masks = session.evaluate, list(world.evaluate.values())
    room = 0.5 * LAMBDAS.numpy() * MINIMUM**2
    changes = [bench.change(session.undo((k,))) for k in range(6)]
    raw = np.array([[c[m].mean() for m in masks] for c in changes])
    gains = [
        bench.gain(edits.transplant(session.reference, session.theta, session.rows((k,)))) for k in range(6)
    ]
    shares = measures.dissociation_matrix(changes, bench.headroom, masks)
    index = [
        measures.selectivity_index(shares[k, k], float(np.delete(shares[k], k).mean())) for k in range(6)
    ]
    dose = [bench.change(session.undo((0,), a))[masks[0]].mean() - a**2 * room[0] for a in settings.doses]
    series = world.subject.checkpoints
    tiles = [
        edits.rollback_subtract(session.theta, series[a], series[b], session.rows((0, 1)))
        for a, b in ((0, 3), (3, 7), (7, 10))
    ]
    whole = session.undo((0, 1)).delta()
    return [
        at_most("|diagonal of D - 1/2 lambda m^2|", worst(np.diag(raw) - room), 1e-9),
        at_most("|off-diagonal of D|", worst(raw - np.diag(np.diag(raw))), 1e-12),
        at_most("|n - identity|", worst(shares - np.eye(6)), 1e-9),
        at_most("|necessity share - 1|", worst(np.diag(raw) / room - 1), 1e-9),
        at_most(
            "|sufficiency share - 1|",
            worst([g[m].mean() / r - 1 for g, m, r in zip(gains, masks, room, strict=True)]),
            1e-9,
        ),
        at_most("|SI - 1|", worst(np.array(index) - 1), 1e-9),
        at_most("|D(alpha) - alpha^2 D(1)|", worst(dose), 1e-9),
        at_most(
            "|window tiles - whole edit|", float((edits.composed(tiles).delta() - whole).abs().max()), 1e-9
        ),
        *_rotation_shares(session, masks),
    ]


def _rotation_shares(session, masks) -> list[Check]:  # type: ignore[no-untyped-def]
    """95th percentile of n_j / sum n over rotations inside the planted span, loudest and quietest skill."""
    g = torch.Generator().manual_seed(5)
    bench, rows = session.evaluate, session.rows(range(6))
    table = []
    for _ in range(3000):
        change = bench.change(controls.in_span(session.theta, rows, MINIMUM, g))
        table.append([measures.capped_share(change[m].mean(), bench.headroom[m].mean()) for m in masks])
    shares = np.array(table)
    part = shares / shares.sum(1, keepdims=True)
    return [
        within(
            f"95th percentile of in-span share, skill {k}", float(np.percentile(part[:, k], 95)), 0.54, 0.60
        )
        for k in (0, 5)
    ]


def bed_t1(settings: PlanSettings) -> list[BedResult]:
    """T1 at the minimum, and T1b stopped at 70 % of the way."""
    results = []
    found = assess(lambda seed: separable_world(seed, reached=1.0), settings)
    for number, (name, finding) in enumerate(found.items()):
        checks = [
            holds("flag even_response", "even_response" in finding.verdict.flags),
            holds("grade S", "+S" in finding.verdict.grade),
            at_most("p against rotations (c3)", finding.inputs.control_p["c3"] or 1.0, 0.005),
            holds("c6 has no gradient at the minimum", finding.verdict.clauses["c6"] == "not_applicable"),
        ]
        checks += _separable_identities(settings) if number == 0 else []
        results.append(bed_result("T1", name, "causal", finding, checks, "always_causal"))
    partial = assess(lambda seed: separable_world(seed, reached=0.7), settings)
    for name, finding in partial.items():
        curvature = float(LAMBDAS[NAMES.index(name)])
        doses = {a: float(d.estimate) for a, d in finding.evidence[0].doses.items()}
        half = 0.5 * curvature * MINIMUM**2
        closed = {a: half * ((0.7 * (1 - a) - 1) ** 2 - 0.09) for a in doses}
        session = finding.sessions[0]
        forward = session.evaluate.change(session.undo((NAMES.index(name),), -0.3))
        mask = session.evaluate.tokens.position_of.numpy() == NAMES.index(name)
        checks = [
            at_most("|D(1) - .455 lambda m^2|", abs(doses[1.0] - 0.455 * curvature * MINIMUM**2), 1e-9),
            at_most("|D(alpha) - closed form|", worst([doses[a] - closed[a] for a in doses]), 1e-9),
            at_most("D(-.3)", float(forward[mask].mean()), -1e-9),
            holds("no flag even_response", "even_response" not in finding.verdict.flags),
            holds("grade S", "+S" in finding.verdict.grade),
        ]
        results.append(bed_result("T1b", name, "causal", finding, checks, "always_causal"))
    return results


def bed_t2(settings: PlanSettings) -> list[BedResult]:
    """T2: a random symmetric Hessian per token and a straight path."""
    g = torch.Generator().manual_seed(7)
    size, tokens = 8, 40
    draw = torch.randn(tokens, size, size, generator=g, dtype=torch.float64)
    hessians = (draw + draw.transpose(1, 2)) / 2
    slopes = torch.randn(tokens, size, generator=g, dtype=torch.float64)
    end = torch.randn(size, generator=g, dtype=torch.float64)
    rows = orthonormal(5, size, g)
    numbers = torch.arange(tokens).view(8, 5)

    def losses(theta: Tensor, inputs: Tensor) -> Tensor:
        return 0.5 * torch.einsum("i,bpij,j->bp", theta, hessians[inputs], theta) + slopes[inputs] @ theta

    def projected(count: int, scale: float = 1.0) -> allocation.Projections:
        thetas = [end * (t / count) for t in range(count + 1)]
        select = sequences_of(8, 5, inputs=numbers)
        subject = landscape_subject(losses, thetas, rows, select, select, plain=True)
        basis = [unlabelled("planted", rows)]
        return allocation.project(
            subject.objective, subject.checkpoints, basis, select, derivative_scale=scale
        )[0]

    select = sequences_of(8, 5, inputs=numbers)
    subject = landscape_subject(losses, [end * (t / 10) for t in range(11)], rows, select, select, plain=True)
    session = open_session(subject, replace(settings, resamples=10))
    exact = allocation.allocate(projected(10), "trapezoid")
    a = exact.values.sum(0).numpy()
    d = np.stack([session.evaluate.change(session.undo((j,))) for j in range(5)])
    s = np.stack(
        [session.evaluate.gain(edits.transplant(session.reference, end, rows[j : j + 1])) for j in range(5)]
    )
    moved = (rows @ end).numpy()
    bent = np.einsum("ki,mij,j->km", rows.numpy(), hessians.numpy(), end.numpy())
    own = np.einsum("ki,mij,kj->km", rows.numpy(), hessians.numpy(), rows.numpy()) * moved[:, None]
    cross = 0.5 * moved[:, None] * (bent - own)
    errors = [
        worst(allocation.allocate(projected(n), "first_order").values.sum(0).numpy() - a) for n in (20, 40)
    ]
    wrong = allocation.allocate(projected(10, 1.1), "trapezoid")
    surfaced = float(wrong.quadrature_error.sum(0).abs().mean() / wrong.exact.sum(0).abs().mean())
    checks = (
        at_most("|A + (D + S) / 2| per token", worst(a + (d + s) / 2), 1e-9),
        at_most("|(S - D) / 2 - 1/2 d_b sum H d|", worst((s - d) / 2 - cross), 1e-9),
        within("first-order error at half the step", errors[0] / errors[1], 1.8, 2.2),
        at_most("quadrature error of the trapezoid", worst(exact.quadrature_error.numpy()), 1e-9),
        at_least("a wrong derivative surfaces as quadrature error", surfaced, 0.01),
    )
    return [BedResult("T2", "coupled quadratic", "identities", "identities", checks)]


def _axes(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def loop_world(seed: int, *, sign: int) -> World:
    """T3: a closed rectangle in (theta1, theta2) under L = theta1 theta2, while theta3, theta4 learn."""
    g = torch.Generator().manual_seed(300 + seed)
    size = 12
    p, q = 0.6 + 0.4 * torch.rand(2, generator=g, dtype=torch.float64)
    corners = [(0.0, 0.0), (float(p), 0.0), (float(p), float(q)), (0.0, float(q)), (0.0, 0.0)]
    corners = corners[::sign]
    thetas = []
    for leg in range(4):
        for part in range(10):
            theta = torch.zeros(size, dtype=torch.float64)
            for axis in (0, 1):
                start, stop = corners[leg][axis], corners[leg + 1][axis]
                theta[axis] = start + (stop - start) * part / 10
            theta[2:4] = (leg * 10 + part) / 40
            theta[4:] = torch.linspace(0.1, 0.8, size - 4) * (leg * 10 + part) / 40
            thetas.append(theta)
    last = thetas[-1].clone()
    last[:2], last[2:4], last[4:] = 0.0, 1.0, torch.linspace(0.1, 0.8, size - 4)
    thetas.append(last)

    def losses(theta: Tensor, inputs: Tensor) -> Tensor:
        ridge = 0.25 * (theta[0] ** 2 + theta[1] ** 2)
        looped = theta[0] * theta[1] + ridge + 0.5 * (theta[2] - 1) ** 2
        return torch.stack([looped, 0.5 * (theta[3] - 1) ** 2]).expand(len(inputs), 2)

    return _two_slot_world(losses, thetas, _axes(size)[:10], (("loop", (0,), (1, 2)),))


def _two_slot_world(losses, thetas, rows, named, joint=()) -> World:  # type: ignore[no-untyped-def]
    """Target in slot 0, an off-target group in slot 1."""
    select, evaluate = sequences_of(6, 2), sequences_of(6, 2, first=6)
    groups = slot_groups(select, ("C", "U")), slot_groups(evaluate, ("C", "U"))
    subject = landscape_subject(losses, thetas, rows, select, evaluate)
    pairs = tuple(
        make_pair(name, vectors, "C", *groups, partners=partners)
        for name, vectors, partners in (*named, *joint)
    )
    return World(subject, pairs, *groups)


def bed_t3(settings: PlanSettings) -> list[BedResult]:
    """T3: movement that is undone again has attribution and no endpoint effect."""
    results = []
    for sign, word in ((1, "A < 0"), (-1, "A > 0")):
        finding = assess(lambda seed, s=sign: loop_world(seed, sign=s), settings)["loop"]  # type: ignore[misc]
        checks = []
        for evidence, session in zip(finding.evidence, finding.sessions, strict=True):
            corner = session.path[:, :2].max(0)
            checks.append(
                at_most(
                    "|A - (+-area H12)|",
                    abs(evidence.attributed.estimate + sign * corner[0] * corner[1]),
                    1e-9,
                )
            )
        session, edit = finding.sessions[0], finding.sessions[0].undo((0,))
        checks += [
            holds("O1 is the identity bit for bit", torch.equal(edit.apply(session.theta), session.theta)),
            at_most("|D|", worst([finding.inputs.damage.low, finding.inputs.damage.high]), 0.0),
            holds("flag there_and_back", "there_and_back" in finding.verdict.flags),
            at_least("D of O3b at mid-loop", float(finding.evidence[0].rewound or 0.0), 0.02),
            holds("flag undone_later", "undone_later" in finding.verdict.flags),
        ]
        expected = "observational_only" if sign == 1 else "inconclusive"
        results.append(bed_result("T3", word, expected, finding, checks, "never_causal"))
    return results


def _straight(end: Tensor, count: int) -> list[Tensor]:
    return [end * (t / count) for t in range(count + 1)]


def and_world(seed: int) -> World:
    """T4: L = 1/2 (theta1 theta2 - 2)^2, both needed."""
    g = torch.Generator().manual_seed(400 + seed)
    end = torch.randn(12, generator=g, dtype=torch.float64)
    end[:2], end[2] = math.sqrt(2), 1.0

    def losses(theta: Tensor, inputs: Tensor) -> Tensor:
        return torch.stack([0.5 * (theta[0] * theta[1] - 2) ** 2, 0.5 * (theta[2] - 1) ** 2]).expand(
            len(inputs), 2
        )

    return _two_slot_world(losses, _straight(end, 40), _axes(12)[:10], (("AND", (0,), (1,)),))


def bed_t4(settings: PlanSettings) -> list[BedResult]:
    """T4: necessary each, sufficient only together."""
    finding = assess(and_world, settings)["AND"]
    session, bench = finding.sessions[0], finding.sessions[0].evaluate
    mask = bench.tokens.position_of.numpy() == 0
    sets = ((0,), (1,), (0, 1))
    damage = [bench.change(session.undo(j))[mask].mean() for j in sets]
    gain = [
        bench.gain(edits.transplant(session.reference, session.theta, session.rows(j)))[mask].mean()
        for j in sets
    ]
    checks = (
        at_most("|D_1, D_2, D_12 - 2|", worst(np.array(damage) - 2.0), 1e-9),
        at_most("|S_1, S_2|", worst(gain[:2]), 1e-9),
        at_most("|S_12 - 2|", abs(gain[2] - 2.0), 1e-9),
        at_most("|sum of shares - 2|", abs((damage[0] + damage[1]) / 2.0 - 2.0), 1e-9),
        at_most("|J + 1/2|", abs(finding.inputs.interaction + 0.5), 1e-9),
        holds("flag synergy", "synergy" in finding.verdict.flags),
        holds("no grade S", "+S" not in finding.verdict.grade),
    )
    return [bed_result("T4", "AND, one of two", "causal", finding, checks)]


def or_world(seed: int) -> World:
    """T5: L = log(1 + exp(-8 (max(theta1, theta2) - .5))), either is enough."""
    g = torch.Generator().manual_seed(500 + seed)
    end = torch.randn(14, generator=g, dtype=torch.float64) * 0.5
    end[:3] = 1.0

    def losses(theta: Tensor, inputs: Tensor) -> Tensor:
        either = torch.nn.functional.softplus(-8 * (torch.maximum(theta[0], theta[1]) - 0.5))
        return torch.stack([either, 0.5 * (theta[2] - 1) ** 2]).expand(len(inputs), 2)

    return _two_slot_world(
        losses, _straight(end, 40), _axes(14)[:12], (("OR", (0,), (1,)),), (("OR, both", (0, 1), ()),)
    )


def bed_t5(settings: PlanSettings) -> list[BedResult]:
    """T5: redundant alone, necessary together."""
    found = assess(or_world, settings)
    single, both = found["OR"], found["OR, both"]
    session, bench = single.sessions[0], single.sessions[0].evaluate
    mask = bench.tokens.position_of.numpy() == 0
    damage = [bench.change(session.undo(j))[mask].mean() for j in ((0,), (1,), (0, 1))]
    gain = [
        bench.gain(edits.transplant(session.reference, session.theta, session.rows((j,))))[mask].mean()
        for j in (0, 1)
    ]
    checks = (
        at_most("|D_1, D_2|", worst(damage[:2]), 1e-9),
        within("D_12", damage[2], 3.99, 4.01),
        within("S_1", gain[0], 3.99, 4.01),
        within("S_2", gain[1], 3.99, 4.01),
        within("J", single.inputs.interaction, 0.499, 0.501),
        within("A_1", single.inputs.attributed.estimate, -2.02, -1.98),
        holds("flag redundant", "redundant" in single.verdict.flags),
    )
    return [
        bed_result("T5", "OR, one of two", "inconclusive", single, checks, "never_causal"),
        bed_result("T5", "OR, both", "causal", both),
    ]


def void_world(seed: int) -> World:
    """T6: the loss sees only the direction of a block, and the tested vector is its length."""
    g = torch.Generator().manual_seed(600 + seed)
    size = 48
    aim = torch.zeros(3, dtype=torch.float64)
    aim[0] = 1.0
    start, end = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    start[:3] = torch.tensor([0.5, 0.8, 0.3], dtype=torch.float64)
    end[:3], end[3] = 2.0 * aim, 1.0
    end[4:44] = torch.randn(40, generator=g, dtype=torch.float64)
    end[4:44] *= 10 * end[:3].norm() / end[4:44].norm()
    thetas = [start + (end - start) * t / 40 for t in range(41)]

    def losses(theta: Tensor, inputs: Tensor) -> Tensor:
        direction = theta[:3] / theta[:3].norm()
        return torch.stack([2 * (direction - aim).square().sum(), 0.5 * (theta[3] - 1) ** 2]).expand(
            len(inputs), 2
        )

    return _two_slot_world(
        losses, thetas, _axes(size)[[0, 3, 1, 2, *range(4, 12)]], (("length", (0,), (2, 3)),)
    )


def bed_t6(settings: PlanSettings) -> list[BedResult]:
    """T6: void movement damages nothing; pure weight decay is recognised."""
    finding = assess(void_world, settings)["length"]
    session = finding.sessions[0]
    doses = [0.25, 0.5, 0.75, 1.0]
    damage = worst([worst(session.evaluate.change(session.undo((0,), a))) for a in doses])
    share = session.undo((0,)).norm / float(session.theta[:3].norm())
    checks = (
        at_most("max |D| along the void vector", damage, 1e-10),
        within("displacement over norm", share, 0.45, 0.8),
        at_least("decay share of pure decay", _pure_decay_share(), 0.99),
    )
    expected = "observational_only or inconclusive or not_selective"
    return [bed_result("T6", "void movement", expected, finding, checks, "never_causal")]


def _pure_decay_share() -> float:
    """AdamW with zero gradients: all movement is decay."""
    theta = torch.nn.Parameter(torch.linspace(-1, 2, 10, dtype=torch.float64))
    row = torch.nn.functional.normalize(torch.arange(1.0, 11.0, dtype=torch.float64), dim=0)
    optimiser = torch.optim.AdamW([theta], lr=0.01, weight_decay=0.1)
    along, start = [], theta.detach().clone()
    for _ in range(100):
        along.append(float(row @ theta.detach()))
        theta.grad = torch.zeros_like(theta)
        optimiser.step()
    net = float(row @ (theta.detach() - start))
    return measures.decay_part(np.array(along), np.full(100, 0.01), 0.1) / net
