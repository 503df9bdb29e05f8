"""Reference bases of the pipeline null (c7): rotated, random, and from a shuffled training order.

Rotations are free: derivatives come from stored projections. The random and the shuffled-Hessian bases
do not depend on the basis under test, only on its number of vectors, so their largest effects are kept
in the run directory and serve every basis of the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interventions import nulls
from interventions.nulls import Choice, Chooser
from interventions.protocol import Session
from interventions.statistics import Array
from interventions.verdict import Outcome
from polca_edit.allocation import Projections
from polca_edit.artifacts import key_of
from polca_edit.checkpoints import Checkpoints, write_json
from polca_edit.curvature import orthonormalise, projected_lanczos

if TYPE_CHECKING:
    from experiments.causal_runs import RunTest

#: Bytes of random directions held for one pass over the checkpoints: many share a pass's fixed part.
HELD_BYTES = 1 << 30


def reference_maxima(test: RunTest, session: Session) -> dict[str, Array]:
    """Family -> largest T per reference basis; a family with no bases asked for is left out."""
    settings = test.settings
    generator = torch.Generator().manual_seed(settings.seed + 17)
    found = {
        "rotation": nulls.rotation_maxima(
            session.ranked,
            test.basis.rows,
            test.projections,
            ranked_choice(test, session),
            draws=settings.rotations,
            generator=generator,
        )
    }
    if settings.random_bases:
        found["random"] = _kept(test, "random", settings.random_bases, lambda: random_family(test, session))
    if settings.shuffled_bases:
        found["shuffled_hessian"] = _kept(
            test, "shuffled_hessian", settings.shuffled_bases, lambda: shuffled_family(test, session)
        )
    return found


def ranked_choice(test: RunTest, session: Session) -> Chooser:
    """The run's pipeline, its targets cut to the tokens on which effects are ranked."""

    def choose(projections: Projections) -> list[Choice]:
        return [replace(c, evaluate=session.on_ranked(c.evaluate)) for c in test.choose(projections)]

    return choose


def family_gates(families: Sequence[str]) -> dict[str, Outcome]:
    """A family that was not drawn is a control that did not run, and forbids ``causal`` (A1)."""
    wanted = ("rotation", "random", "shuffled_hessian")
    return {f"c7 {name.replace('_', ' ')} bases": "not_run" for name in wanted if name not in families}


def _kept(test: RunTest, family: str, draws: int, measure: Callable[[], Array]) -> Array:
    """The family's maxima from the run directory, or measured and kept there."""
    run, settings = test.run, test.settings
    splits = run.task.splits
    key = key_of(
        1,
        family,
        draws,
        len(test.basis),
        run.key("train"),
        asdict(run.settings()),
        [
            settings.seed,
            settings.pairs,
            settings.reference,
            settings.thresholds.rule_auc,
            settings.reference_intervals,
            settings.ranked,
        ],
        [split.fingerprint() for split in (splits.curvature, splits.select, splits.evaluate)],
    )
    path = run.directory.path / "references" / f"{family}-{key[:16]}.json"
    if path.exists():
        record = json.loads(path.read_text())
        if record["key"] == key:
            return np.array(record["maxima"])
    maxima = measure()
    write_json(path, {"key": key, "family": family, "vectors": len(test.basis), "maxima": maxima.tolist()})
    return maxima


def spaced_out(series: Checkpoints, intervals: int) -> Checkpoints:
    """At most ``intervals`` intervals of a series, both ends included."""
    every = max(1, -(-(len(series) - 1) // intervals))
    return series.subset(sorted({*range(0, len(series), every), len(series) - 1}))


def random_family(test: RunTest, session: Session) -> Array:
    """Largest T of random orthonormal bases of all weight space; several share each pass."""
    count, wanted = len(test.basis), test.settings.random_bases
    generator = torch.Generator().manual_seed(test.settings.seed + 19)
    size, choose = test.run.task.space.size, ranked_choice(test, session)
    found: list[float] = []
    while len(found) < wanted:
        together = min(max(1, HELD_BYTES // (4 * size * count)), wanted - len(found))
        draws = [orthonormalise(torch.randn(count, size, generator=generator)) for _ in range(together)]
        joint = measured_rows(test, session, torch.cat(draws))
        for number, own in enumerate(draws):
            lines = torch.eye(len(draws) * count, dtype=torch.float64)[number * count : (number + 1) * count]
            found.append(nulls.largest_effect(session.ranked, own, choose(mixed(joint, lines))))
    return np.array(found)


def shuffled_family(test: RunTest, session: Session) -> Array:
    """Largest T of Hessian bases whose basis checkpoints are taken in random order.

    Every basis checkpoint's K leading Ritz pairs are found once (Lanczos, at most three products a pair);
    a reference basis is Algorithm 1 on these low-rank Hessians, inside their joint span. So all bases
    share the products, and one pass of the joint span's derivatives.
    """
    run, count = test.run, len(test.basis)
    generator = torch.Generator().manual_seed(test.settings.seed + 21)
    series = session.subject.checkpoints
    taken = min(count, len(series) - 1)
    places = series.subset([round((i + 1) * (len(series) - 1) / taken) for i in range(taken)])
    leading: list[Tensor] = []
    values: list[Tensor] = []
    for index in range(len(places)):
        product = run.objective.hessian(places[index], run.task.splits.curvature, expected=8 * taken)
        start = leading[-1] if leading else None
        found_values, vectors = leading_pairs(product, run.task.space.size, count, start, generator)
        leading.append(vectors)
        values.append(found_values)
    joint = orthonormalise(torch.cat(leading))
    hessians = []
    for vectors, eigenvalues in zip(leading, values, strict=True):
        inside = (vectors @ joint.T).double()
        hessians.append(inside.T @ (eigenvalues[:, None] * inside))
    projections = measured_rows(test, session, joint)
    per, choose = -(-count // taken), ranked_choice(test, session)
    found = []
    for _ in range(test.settings.shuffled_bases):
        order = torch.randperm(taken, generator=generator).tolist()
        lines = algorithm_one([hessians[i] for i in order], per)[:count]
        rows = lines.to(joint) @ joint
        found.append(nulls.largest_effect(session.ranked, rows, choose(mixed(projections, lines))))
    return np.array(found)


def leading_pairs(
    product: Callable[[Tensor], Tensor],
    size: int,
    count: int,
    start: Float[Tensor, "s N"] | None,
    generator: torch.Generator,
) -> tuple[Float[Tensor, " K"], Float[Tensor, "K N"]]:
    """``count`` leading Ritz pairs of a symmetric operator, descending.

    Lanczos goes on until a third of them have converged, or three products a pair are spent; the
    others are the best its Krylov space holds.
    """
    krylov: list[Tensor] = []
    images: list[Tensor] = []

    def noted(vector: Tensor) -> Tensor:
        image = product(vector)
        krylov.append(vector.cpu())
        images.append(image.cpu())
        return image

    wanted, most = max(1, count // 3), 3 * count
    projected_lanczos(
        noted, size, wanted, generator=generator, start=start, tolerance=1e-2, max_products=most
    )
    basis = torch.stack(krylov)
    projected = basis.double() @ torch.stack(images).double().T
    values, coefficients = torch.linalg.eigh((projected + projected.T) / 2)
    top = torch.argsort(values, descending=True)[:count]
    return values[top], coefficients[:, top].T.to(basis) @ basis


def algorithm_one(hessians: Sequence[Float[Tensor, "Q Q"]], per: int) -> Float[Tensor, "K Q"]:
    """Leading ``per`` eigenvectors of Pi H Pi, one small matrix after another; Pi takes off those before.

    >>> algorithm_one([torch.diag(torch.tensor([3.0, 2.0, 1.0]))] * 2, 1).abs().argmax(1).tolist()
    [0, 1]
    """
    size = len(hessians[0])
    rows = torch.zeros(0, size, dtype=torch.float64)
    for hessian in hessians:
        # A basis of the complement, so that a vector taken before is no candidate at eigenvalue zero.
        free = torch.linalg.qr(torch.cat([rows.T, torch.eye(size, dtype=torch.float64)], 1))[0][
            :, len(rows) :
        ]
        _, vectors = torch.linalg.eigh(free.T @ hessian.double() @ free)
        rows = torch.cat([rows, (free @ vectors[:, -per:].flip(1)).T])
    return rows


def measured_rows(test: RunTest, session: Session, rows: Float[Tensor, "R N"]) -> Projections:
    """Projections of many rows on the select split, on at most ``reference_intervals`` intervals.

    Residual parts are left zero: the choice of pairs does not read them.
    """
    part = spaced_out(session.subject.checkpoints, test.settings.reference_intervals)
    losses, slopes = [], []
    for index in range(len(part)):
        value, slope = test.run.objective.directional(
            part[index], rows, test.run.task.splits.select, expected=len(rows) * len(part)
        )
        losses.append(value)
        slopes.append(slope)
    moves = torch.stack([rows @ (part[i + 1] - part[i]) for i in range(len(part) - 1)])
    none, flat = torch.zeros(len(moves), len(losses[0])), torch.zeros(len(moves))
    return Projections(
        torch.tensor(part.steps), torch.stack(losses), torch.stack(slopes), moves, none, none, flat, flat
    )


def mixed(projections: Projections, lines: Float[Tensor, "K R"]) -> Projections:
    """Projections onto combinations of the measured rows; no model is needed."""
    weights = lines.to(projections.gradients)
    return replace(
        projections,
        gradients=torch.einsum("kr,trm->tkm", weights, projections.gradients),
        displacements=projections.displacements @ weights.T,
    )
