"""Testbeds T1 and T2: separable and coupled quadratics, every answer a closed form (float64)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from experiments.testbeds.base import (
    Assessed,
    BedResult,
    BedSettings,
    Check,
    World,
    assess,
    at_least,
    at_most,
    axes,
    bed_result,
    between,
    labelled_pair,
    landscape_split,
    orthonormal,
    slot_tokens,
    strengths,
    worst,
)
from interventions.controls import random_frame
from interventions.damage import EvaluatedSplit
from interventions.edits import Movement, composed, displace, project_out, reverse, rollback, transplant
from polca_edit.allocation import allocate as allocation
from polca_edit.basis.record import unlabelled
from polca_edit.clusters.density import ClusterSettings
from polca_edit.clusters.hypotheses import Hypothesis, TokenGroup
from polca_edit.observation import ObserveSettings, observe
from polca_edit.seeds import generator_for
from polca_edit.tokens import TokenSet

LAMBDAS = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25], dtype=torch.float64)
MINIMUM = 2.0
SKILLS = tuple(f"skill{k}" for k in range(6))
#: Where T1b stops, as a share of the way to the minimum.
STOPPED = 0.7
DOSES = (-0.3, 0.25, 0.5, 0.75, 1.0, 1.5)


def separable_world(seed: int, *, reached: float, observed: bool = False) -> World:
    """T1: L_k = 1/2 h lambda_k (u_k theta - 2)^2 in 2000 dimensions, 40 of them moved in vain.

    h is the strength of a document. Rows: the six skills and six of the idle directions.
    """
    g = generator_for(seed, "T1")
    # Along axes other skills' projected losses stay at zero exactly; elsewhere their rounding is clustered.
    frame = axes(46, 2000) if observed else orthonormal(46, 2000, g)
    skills, span = frame[:6], frame[:12]
    target = reached * MINIMUM * skills.sum(0) + torch.randn(40, generator=g, dtype=torch.float64) @ frame[6:]

    def losses(theta: Tensor, inputs: Tensor) -> Tensor:
        return inputs * (0.5 * LAMBDAS * (skills @ theta - MINIMUM) ** 2)

    thetas = [target * (t / 10) for t in range(11)]
    split = landscape_split(losses, thetas, slot_tokens(SKILLS, strengths(seed, "T1")))
    pairs = [labelled_pair(SKILLS[k], span, (k,), SKILLS[k]) for k in range(6)]
    pairs.append(_half_a_parent(span, split.tokens))
    if not observed:
        return World(split, tuple(pairs), split.tokens.skills)
    return _observed_world(split, span, seed)


def _half_a_parent(span: Tensor, tokens: TokenSet) -> Hypothesis:
    """Skill 0 in every other document: lost as a whole, so not for the half rather than for its rest."""
    half = tokens.skills["skill0"] & (tokens.sequence_of % 2 == 0)
    group = TokenGroup.labelled("half of skill0", half, tokens)
    return Hypothesis("half of skill0", span[:1], group, "own", "planted", (0,), span=span)


def _observed_world(split: EvaluatedSplit, span: Tensor, seed: int) -> World:
    """POLCA's own pairs of the planted rows, found on other documents (question A)."""
    select = replace(slot_tokens(SKILLS, strengths(seed, "T1 select")), features={})
    select, unseen = (
        replace(t, features={"slot": t.position_of.numpy().astype(str)}) for t in (select, split.tokens)
    )
    settings = ObserveSettings(clusters=ClusterSettings(min_cluster_share=0.1, algorithm="generic"))
    seen = observe(split.loss, split.series, unlabelled("planted", span), select, settings)
    return World(split.on(unseen), seen.hypotheses(), unseen.skills, {"planted": seen})


def room_of(world: World) -> np.ndarray:
    """(6,) headroom of every skill: 1/2 mean(h) lambda m^2."""
    return 0.5 * float(world.split.tokens.inputs.mean()) * LAMBDAS.numpy() * MINIMUM**2


def separable_identities(draws: int) -> list[Check]:
    """Closed forms of T1 in one run, all six vectors.

    Args:
        draws: rotations inside the planted span.
    """
    world = separable_world(0, reached=1.0)
    split, room = world.split, room_of(world)
    rows = torch.cat([pair.rows for pair in world.pairs[:6]])
    groups = split.tokens.skills
    damages = [split.damage(project_out(split, row)) for row in rows]
    raw = np.array([list(d.by(groups).values()) for d in damages])
    shares = np.array([list(d.share_by(groups).values()) for d in damages])
    gains = [split.gain(transplant(split, row)) for row in rows]
    own = [float(g[groups[name]].mean()) for g, name in zip(gains, SKILLS, strict=True)]
    doses = [split.damage(reverse(split, rows[0], a)).by(groups)["skill0"] for a in DOSES]
    theta, series = split.theta, split.series
    tiles = [rollback(Movement(theta, series[a], series[b]), rows[:2]) for a, b in ((0, 3), (3, 7), (7, 10))]
    whole = project_out(split, rows[:2]).delta()
    return [
        at_most("|diagonal of D - 1/2 lambda m^2|", worst(np.diag(raw) - room), 1e-9),
        at_most("|off-diagonal of D|", worst(raw - np.diag(np.diag(raw))), 1e-12),
        at_most("|n - identity|", worst(shares - np.eye(6)), 1e-9),
        at_most("|share gained by insertion - 1|", worst(np.array(own) / room - 1), 1e-9),
        at_most("|D(alpha) - alpha^2 D(1)|", worst(np.array(doses) - np.square(DOSES) * room[0]), 1e-9),
        at_most("|tiles of windows - whole edit|", worst(composed(tiles).delta() - whole), 1e-9),
        *_shares_in_span(split, rows, draws),
    ]


def _shares_in_span(split: EvaluatedSplit, rows: Tensor, draws: int) -> list[Check]:
    """95th percentile of n_j / sum n over rotations of the planted span: loud and quiet skills alike."""
    g = generator_for(0, "T1 rotations")
    table = []
    for _ in range(draws):
        row = random_frame(len(rows), 1, g) @ rows
        damage = split.damage(displace(split, row, [MINIMUM], "in_span"))
        table.append(list(damage.share_by(split.tokens.skills).values()))
    part = np.array(table) / np.array(table).sum(1, keepdims=True)
    slack = 2.0 / np.sqrt(draws)
    return [
        between(
            f"95th percentile of the in-span share, skill {k}",
            float(np.percentile(part[:, k], 95)),
            0.57 - slack,
            0.57 + slack,
        )
        for k in (0, 5)
    ]


def stopped_identities(found: Assessed, skill: int) -> list[Check]:
    """Closed forms of T1b: half of the damage's curve is that of a parabola left of its minimum."""
    split, room = found.worlds[0].split, room_of(found.worlds[0])[skill]
    row = found.worlds[0].pairs[skill].rows
    closed = room * ((STOPPED * (1 - np.array(DOSES)) - 1) ** 2 - (1 - STOPPED) ** 2)
    seen = [split.damage(reverse(split, row, a)).by(split.tokens.skills)[SKILLS[skill]] for a in DOSES]
    return [
        at_most("|D(alpha) - closed form|", worst(np.array(seen) - closed), 1e-9),
        at_most("D(-.3), moved on instead of back", seen[0], -1e-9),
    ]


def bed_t1(settings: BedSettings) -> list[BedResult]:
    """T1 at the minimum, T1b stopped at 70 % of the way, half a parent, and the basis as a whole."""
    results = []
    whole = assess(lambda seed: separable_world(seed, reached=1.0), settings)
    rooms = [room_of(world) for world in whole.worlds]
    for k, name in enumerate(SKILLS):
        row = whole[name]
        checks = [
            at_most("|D - 1/2 lambda m^2|", abs(row.pooled.damage.estimate - np.mean(rooms, 0)[k]), 1e-9),
            at_most("p of S", row.adjusted_p if row.adjusted_p is not None else 1.0, 0.01),
            at_most("leakage", row.pooled.leakage.high, 1e-9),
        ]
        checks += separable_identities(3 * settings.draws) if k == 0 else []
        results.append(bed_result("T1", row, "carrier", checks, gate="always"))
    row = whole["half of skill0"]
    apart = Check("W is no", float(row.answers["W"] == "no"), "= 1", row.answers["W"] == "no")
    results.append(bed_result("T1", row, "carrier", [apart]))
    results.append(_answers("T1", "P of the basis", "yes", [b.special.answer for b in whole.table.bases]))
    partial = assess(lambda seed: separable_world(seed, reached=STOPPED), settings)
    results += [
        bed_result("T1b", partial[name], "carrier", stopped_identities(partial, k), gate="always")
        for k, name in enumerate(SKILLS)
    ]
    seen = assess(lambda seed: separable_world(seed, reached=1.0, observed=True), settings, runs=(0,))
    results.append(_answers("T1", "A of the basis", "yes", [b.aligned.answer for b in seen.table.bases]))
    return results


def _answers(bed: str, variant: str, expected: str, answers: Sequence[str]) -> BedResult:
    """A row for a question about a basis, asked in every run."""
    return BedResult(bed, variant, expected, " ".join(sorted(set(answers))) or "not asked")


def bed_t2(settings: BedSettings) -> list[BedResult]:
    """T2: a random symmetric Hessian per token and a straight path; nothing is drawn."""
    del settings
    g = generator_for(0, "T2")
    size, count = 8, 40
    draw = torch.randn(count, size, size, generator=g, dtype=torch.float64)
    hessians = (draw + draw.transpose(1, 2)) / 2
    slopes = torch.randn(count, size, generator=g, dtype=torch.float64)
    end = torch.randn(size, generator=g, dtype=torch.float64)
    rows = orthonormal(5, size, g)
    tokens = slot_tokens([f"slot{k}" for k in range(5)], torch.arange(count).view(8, 5))

    def losses(theta: Tensor, inputs: Tensor) -> Tensor:
        return 0.5 * torch.einsum("i,bpij,j->bp", theta, hessians[inputs], theta) + slopes[inputs] @ theta

    def projected(intervals: int, scale: float = 1.0) -> allocation.Projections:
        split = landscape_split(losses, [end * (t / intervals) for t in range(intervals + 1)], tokens)
        basis = [unlabelled("planted", rows)]
        return allocation.project(split.loss, split.series, basis, tokens, derivative_scale=scale)[0]

    split = landscape_split(losses, [end * (t / 10) for t in range(11)], tokens)
    exact = allocation.allocate(projected(10), "trapezoid")
    given = exact.values.sum(0).numpy()
    lost = np.stack([split.damage(project_out(split, row)).change.numpy() for row in rows])
    gained = np.stack([split.gain(transplant(split, row)).numpy() for row in rows])
    moved = (rows @ end).numpy()
    bent = np.einsum("ki,mij,j->km", rows.numpy(), hessians.numpy(), end.numpy())
    own = np.einsum("ki,mij,kj->km", rows.numpy(), hessians.numpy(), rows.numpy()) * moved[:, None]
    cross = 0.5 * moved[:, None] * (bent - own)
    errors = [
        worst(allocation.allocate(projected(n), "first_order").values.sum(0).numpy() - given)
        for n in (20, 40)
    ]
    wrong = allocation.allocate(projected(10, 1.1), "trapezoid")
    surfaced = float(wrong.quadrature_error.sum(0).abs().mean() / wrong.exact.sum(0).abs().mean())
    checks = (
        at_most("|A + (D + S) / 2| per token", worst(given + (lost + gained) / 2), 1e-9),
        at_most("|(S - D) / 2 - 1/2 d_b sum H d|", worst((gained - lost) / 2 - cross), 1e-9),
        between("first-order error at half the step", errors[0] / errors[1], 1.8, 2.2),
        at_most("quadrature error of the trapezoid", worst(exact.quadrature_error.numpy()), 1e-9),
        at_least("a wrong derivative surfaces as quadrature error", surfaced, 0.01),
    )
    return [BedResult("T2", "coupled quadratic", "identities", "identities", checks)]
