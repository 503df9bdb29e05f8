"""What a basis of some weights could see, beside what it would cost.

``polca-edit study gauge runs/demo --layers 1 --parameters '*mlp*' --json FILE``

Two shares of a finished run: of the squared movement that lies in the chosen weights, and of the mean loss
change that the movement in them explains (trapezoid rule on mean gradients of the curvature sample, so no
basis has to be built). With ``--sketch`` a third: of the squared norm of the last checkpoint's Hessian, from
random products, with its error. Two prices, measured here: bytes of a stored row, seconds of a product.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from torch import Tensor

from experiments.report.formats import share
from experiments.report.tables import Table, table
from experiments.run.run import load_run
from experiments.study.results import publish, show
from experiments.verbs.options import Directory, Layers, Parameters, Result
from experiments.verbs.subsets import patterns_of
from polca_edit.allocation.allocate import explained_share
from polca_edit.basis.sketch import SketchedNorm, norm_share, sketched_norm
from polca_edit.basis.subsets import Subset, taken
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.seeds import generator_for
from polca_edit.tokens import TokenSet

#: Products that are timed of each kind, in turns.
REPEATS = 5


@dataclass(frozen=True)
class Gauge:
    """One choice of weights.

    Attributes:
        name: which weights.
        weights: how many.
        moved_net: share of the squared net movement that lies in them.
        moved_path: the same of each interval, mean over intervals.
        exact: change of the mean loss of the sample over the run, nats.
        explained: what the movement in these weights explains of it by the trapezoid rule, nats.
        explained_share: explained / exact, None where |exact| < 0.01.
        row_bytes: of a stored row.
        product_seconds: of a Hessian-vector product, median.
        curvature: squared norm of the Hessian between these weights at the last checkpoint; None where it was
            not asked for.
    """

    name: str
    weights: int
    moved_net: float
    moved_path: float
    exact: float
    explained: float
    explained_share: float | None
    row_bytes: int
    product_seconds: float
    curvature: SketchedNorm | None = None


def moved_shares(checkpoints: Checkpoints, inside: Subset | None) -> tuple[float, float]:
    """Shares of the squared movement inside: of the net one, and mean over the intervals that move."""

    def squares(moved: Tensor) -> tuple[float, float]:
        part = taken(moved, inside).double().square().sum()
        return float(part), float(moved.double().square().sum())

    part, whole = squares(checkpoints[-1] - checkpoints[0])
    each = [squares(checkpoints[i + 1] - checkpoints[i]) for i in range(len(checkpoints) - 1)]
    shares = [p / w for p, w in each if w > 0]
    return part / whole if whole > 0 else 0.0, sum(shares) / len(shares) if shares else 0.0


def explained_within(
    objective: Objective, checkpoints: Checkpoints, tokens: TokenSet, insides: list[Subset | None]
) -> tuple[float, list[float]]:
    """Exact change of the mean loss, nats, and per choice of weights what their movement explains of it.

    One gradient a checkpoint serves every choice.
    """
    found = [0.0] * len(insides)
    first, gradient = objective.mean_gradient(checkpoints[0], tokens)
    last = first
    for index in range(1, len(checkpoints)):
        moved = (checkpoints[index] - checkpoints[index - 1]).double()
        last, following = objective.mean_gradient(checkpoints[index], tokens)
        slope = (gradient.double() + following.double()) / 2
        for number, inside in enumerate(insides):
            found[number] += float(taken(slope, inside) @ taken(moved, inside))
        gradient = following
    return last - first, found


def product_seconds(
    objective: Objective, theta: Tensor, tokens: TokenSet, insides: list[Subset | None]
) -> list[float]:
    """Median seconds of a Hessian-vector product for every choice, timed in turns after one each."""
    products = [objective.hessian(theta, tokens, expected=1, inside=inside) for inside in insides]
    vectors = [torch.ones_like(taken(theta, inside)) for inside in insides]
    seconds: list[list[float]] = [[] for _ in insides]
    for repeat in range(REPEATS + 1):
        for number, (product, vector) in enumerate(zip(products, vectors, strict=True)):
            started = time.perf_counter()
            product(vector)
            if repeat:
                seconds[number].append(time.perf_counter() - started)
    return [statistics.median(each) for each in seconds]


def sketched_curvature(
    objective: Objective, theta: Tensor, tokens: TokenSet, inside: Subset | None, probes: int, seed: int
) -> SketchedNorm | None:
    """The Hessian's squared norm between some weights, half as many products for its large part as probes."""
    if not probes:
        return None
    rank = max(1, probes // 2)
    product = objective.hessian(theta, tokens, expected=2 * rank + probes, inside=inside)
    draw = generator_for(seed, "sketched_curvature")
    return sketched_norm(product, taken(theta, inside), draw, rank=rank, probes=probes)


def gauges(
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    named: dict[str, Subset | None],
    *,
    probes: int = 0,
    seed: int = 0,
) -> list[Gauge]:
    """Every choice of weights, measured on one sample.

    Args:
        objective: the token loss.
        checkpoints: the series.
        tokens: the sample.
        named: name -> entries, None for all.
        probes: random products by which the share of the curvature is estimated; 0 leaves it out.
        seed: of their draws.
    """
    insides = list(named.values())
    exact, explained = explained_within(objective, checkpoints, tokens, insides)
    theta = checkpoints[-1]
    seconds = product_seconds(objective, theta, tokens, insides)
    found = []
    for number, (name, inside) in enumerate(named.items()):
        count = checkpoints.space.size if inside is None else inside.count
        net, path = moved_shares(checkpoints, inside)
        part = explained_share(explained[number], exact)
        size = count * theta.element_size()
        bent = sketched_curvature(objective, theta, tokens, inside, probes, seed)
        found.append(
            Gauge(name, count, net, path, exact, explained[number], part, size, seconds[number], bent)
        )
    return found


def gauge_table(found: list[Gauge]) -> Table:
    """One line a choice, the last one of all weights; prices as shares of its."""
    whole = found[-1]
    lines = [
        [
            each.name,
            f"{each.weights:,}",
            share(each.weights / whole.weights),
            share(each.moved_net),
            share(each.moved_path),
            f"{each.explained:+.3f} of {each.exact:+.3f}",
            "–" if each.explained_share is None else share(each.explained_share),
            *([_curvature_share(each.curvature, whole.curvature)] if whole.curvature else []),
            share(each.row_bytes / whole.row_bytes),
            f"{1000 * each.product_seconds:.1f} ms",
            share(each.product_seconds / whole.product_seconds),
        ]
        for each in found
    ]
    headings = ["weights", "count", "of all", "net movement", "path", "explained (nats)", "share"]
    headings += ["curvature (95 %)"] if whole.curvature else []
    headings += ["bytes a row, of all", "product", "of all"]
    return table(headings, lines, "What a basis of some weights could see, and its price")


def _curvature_share(part: SketchedNorm | None, whole: SketchedNorm | None) -> str:
    found = None if part is None or whole is None else norm_share(part, whole)
    return "–" if found is None else f"{share(found[0])} ± {share(found[1])}"


def gauge(
    directory: Directory,
    layers: Layers = None,
    parameters: Parameters = None,
    sketch: Annotated[
        int, typer.Option(help="Random probes for the share of the Hessian's norm; 0 leaves it out.")
    ] = 0,
    json_: Result = None,
) -> None:
    """Movement and loss change in some of the weights, beside what a basis of them would cost."""
    if layers is None and parameters is None:
        raise ValueError("study gauge needs the weights to measure; give --layers, --parameters or both")
    if sketch < 0 or sketch == 1:
        raise ValueError(f"--sketch must be 0, or 2 and more so that its error is known, got {sketch}")
    run = load_run(directory, say=lambda _: None)
    patterns = patterns_of(layers, parameters)
    named = {" ".join(patterns): Subset.of_mask(run.task.space.mask(patterns)), "all weights": None}
    sample = run.task.splits.curvature
    found = gauges(run.objective, run.observed(), sample, named, probes=sketch, seed=run.config.seed)
    tables = [gauge_table(found)]
    show(tables)
    publish(json_, "gauge/1", run.config, [run.config.seed], {"gauges": found}, tables)
