"""O6: the most damage that a movement inside a span can do to a cluster, beside equal spans without a claim.

Optimal edits at random places can work as well as at located ones (arXiv 2502.11447), so the damage of
an optimised edit means nothing alone: the same search with the same rank, radius and steps is run in
random parts of the basis and along random directions of parameter space.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interventions import controls, measures
from interventions.edits import Edit, displace
from interventions.evidence import Bench, tensor_mask
from interventions.measures import Target
from interventions.protocol import Pair, Session
from interventions.statistics import Array, Bits, rank_p
from polca_edit.allocation import coordinates
from polca_edit.curvature import orthonormalise

#: Ascent steps from each of the two starting points.
STEPS = 4
#: Nats that a nat of loss outside the cluster counts against a nat inside.
OFF_WEIGHT = 1.0


@dataclass(frozen=True)
class Optimised:
    """Damage of the optimised edit on the evaluate split.

    Attributes:
        rank: of the span.
        radius: bound on the movement's norm, that of O1.
        norm: reached.
        damage: mean over the cluster, nats per token.
        effect: T of the optimised edit.
        rotated: T of the same search in random parts of the basis; empty where it is too small to rotate.
        random: T of the same search along random directions.
        rotated_p: rank of ``effect`` among ``rotated``; None without any.
        random_p: the same among ``random``.
    """

    rank: int
    radius: float
    norm: float
    damage: float
    effect: float
    rotated: tuple[float, ...]
    random: tuple[float, ...]
    rotated_p: float | None
    random_p: float | None


def optimise(
    bench: Bench,
    target: Target,
    rows: Float[Tensor, "k N"],
    radius: float,
    *,
    steps: int = STEPS,
    off_weight: float = OFF_WEIGHT,
) -> Edit:
    """Maximise L_C(theta + rows' z) - off_weight max(0, L_U(theta + rows' z) - L_U(theta)), |z| <= radius.

    Projected ascent along the normalised gradient with falling steps, from the movement of these rows
    undone and from its opposite, both at full radius; the best point visited is taken. The protocol's
    penalty on KL is here one on the loss outside, which every token loss has.

    Args:
        bench: split the search sees.
        target: cluster and rest on that split.
        rows: orthonormal.
        radius: largest norm of the movement.
        steps: of each ascent.
        off_weight: of the loss outside.

    Raises:
        ValueError: if the cluster or its rest is empty on this split.
    """
    inside, outside = target.members, target.rest
    if not inside.any() or not outside.any():
        raise ValueError("an optimised edit needs tokens in the cluster and outside, one is empty; skip it")
    base = float(bench.before[outside].mean())
    back = coordinates(rows, bench.reference - bench.theta).double()
    start = back if float(back.norm()) > 0 else torch.ones_like(back)
    best, chosen = -np.inf, torch.zeros_like(start)
    for sign in (1.0, -1.0):
        z = sign * radius * start / start.norm()
        for step in range(steps + 1):
            theta = bench.theta + z.to(rows) @ rows
            loss = bench.loss(theta)
            harm = float(loss[outside].mean()) - base
            value = float(loss[inside].mean()) - off_weight * max(0.0, harm)
            if value > best:
                best, chosen = value, z
            if step == steps:
                break
            gradient = _gradient(bench, theta, rows, inside, outside, off_weight * (harm > 0))
            if float(gradient.norm()) == 0:
                break
            z = z + radius * (1 - step / steps) * gradient / gradient.norm()
            z = z * min(1.0, radius / max(float(z.norm()), 1e-30))
    return displace(bench.theta, rows, chosen, "optimised", radius=radius, steps=steps)


def _gradient(
    bench: Bench, theta: Tensor, rows: Tensor, inside: Bits, outside: Bits, off_weight: float
) -> Float[Tensor, " k"]:
    weights = tensor_mask(inside).to(theta.dtype) / inside.sum()
    weights = weights - off_weight * tensor_mask(outside).to(theta.dtype) / outside.sum()
    gradient = bench.objective.mean_gradient(theta, bench.tokens, weights)[1]
    return coordinates(rows, gradient.cpu()).double()


def optimised_effect(session: Session, pair: Pair, *, draws: int, seed: int = 0) -> Optimised | None:
    """Search on select, measure on evaluate, in the pair's span and in ``draws`` spans of each control.

    None where O1 moves nothing or the cluster is empty on select.

    Args:
        session: the open run.
        pair: its vectors span the search.
        draws: control spans of each family.
        seed: of the control spans.
    """
    radius = session.undo(pair.vectors).norm
    if radius == 0 or not pair.select.members.any() or not pair.select.rest.any():
        return None
    basis, rank = session.subject.rows, len(pair.vectors)
    generator = torch.Generator().manual_seed(seed * 32_452_843 + pair.vectors[0])

    bench, target = session.ranked, session.on_ranked(pair.evaluate)

    def measured(rows: Tensor) -> tuple[Edit, Array, float]:
        edit = optimise(session.select, pair.select, rows, radius)
        change = bench.change(edit)
        return edit, change, float(measures.selectivity(change, bench.headroom, target))

    edit, change, effect = measured(session.rows(pair.vectors))
    rotated: list[float] = []
    if len(basis) >= rank + controls.ROOM:
        for _ in range(draws):
            frame = controls.random_frame(len(basis), rank, generator).to(basis)
            rotated.append(measured(frame @ basis)[2])
    drawn = (torch.randn(rank, basis.shape[1], generator=generator, dtype=basis.dtype) for _ in range(draws))
    random = [measured(orthonormalise(rows))[2] for rows in drawn]
    return Optimised(
        rank=rank,
        radius=radius,
        norm=edit.norm,
        damage=float(change[target.members].mean()),
        effect=effect,
        rotated=tuple(rotated),
        random=tuple(random),
        rotated_p=rank_p(effect, np.array(rotated)) if rotated else None,
        random_p=rank_p(effect, np.array(random)) if random else None,
    )
