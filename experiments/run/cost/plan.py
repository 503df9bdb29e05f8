"""``polca-edit plan``: what a run would cost before it is started, on this machine.

Counts follow from the config (:mod:`experiments.run.cost.sizes`), times from a rehearsal of a few seconds
(:mod:`experiments.run.cost.speeds`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from experiments.config import RunConfig
from experiments.run.cost.memory import memory_warnings, peak_bytes, transient_bytes
from experiments.run.cost.rates import Speeds
from experiments.run.cost.sizes import Sizes, sizes_of
from experiments.run.cost.speeds import rehearse
from experiments.run.cost.stages import StageCost, stage_costs
from experiments.run.memory.allocator import settle_allocator
from experiments.run.memory.budget import memory_shares
from experiments.run.run import require_parts
from experiments.run.stages.bases import require_places
from experiments.tasks.stand_in import StandIn, stand_in_of
from experiments.tasks.task import Task, build_task, placed
from interventions.causal.statistics import minimum_detectable
from polca_edit.basis import build
from polca_edit.basis.path import odd_checkpoints
from polca_edit.checkpoints.series import Checkpoints

#: Learning rate times steps between checkpoints above which a trapezoid may miss much. Two arithmetic
#: runs stand behind it: quadrature error 0.2 % at 3e-3; at 1.2e-2 18 % missing, residual included.
COARSE_SPACING = 6e-3
#: The same for Simpson's rule: on the smoke preset its error is 0.6 % at 1.8e-2 and 5 % at 3.6e-2, the
#: trapezoid's 6 % and 30 %.
COARSE_SPACING_SIMPSON = 1.8e-2
#: An opened series is too coarse where a step is more than this times the one before.
COARSE_RATIO = 1.5


@dataclass(frozen=True)
class SmallestEffect:
    """The smallest mean damage a two-sided 5 % test would find with power 0.8.

    Attributes:
        documents: independent documents of the evaluate split.
        in_standard_deviations: the effect in standard deviations between documents.
        nats_per_token: an upper bound of the effect.
    """

    documents: int
    in_standard_deviations: float
    nats_per_token: float | None


@dataclass(frozen=True)
class Budget:
    """Settings that fit a time, or what alone takes longer.

    Attributes:
        fits: whether any setting does.
        seconds: what it takes, or what the smallest one would.
        training_seconds: of that, training, which is not shortened.
        share: of vectors and tokens.
        vectors: basis -> vectors.
        select_sequences: of the select split.
        curvature_sequences: of the curvature split.
    """

    fits: bool
    seconds: float
    training_seconds: float
    share: float | None = None
    vectors: Mapping[str, int] = field(default_factory=dict)
    select_sequences: int | None = None
    curvature_sequences: int | None = None


@dataclass(frozen=True)
class CostPlan:
    """What a run would cost.

    Attributes:
        forward_passes: over the select split.
        forward_sequences: the same in sequences.
        hvps: Hessian-vector products.
        bytes_read: of weights.
        bytes_written: of weights and records.
        peak_bytes: memory.
        transient_bytes: disk that parts and mapped tables take while a basis is built.
        seconds: in all.
        route: how directional derivatives are taken.
        curvature_route: how products with the Hessian are, None where there are none.
        parameters: N.
        checkpoints: T.
        stages: each stage's share.
        smallest_effect: what the evaluate split can show.
        warnings: sentences.
        budget: settings that fit the time asked for.
        advice: sentences on what may do with less.
    """

    forward_passes: float
    forward_sequences: float
    hvps: int
    bytes_read: int
    bytes_written: int
    peak_bytes: int
    transient_bytes: int
    seconds: float
    route: str
    curvature_route: str | None
    parameters: int
    checkpoints: int
    stages: tuple[StageCost, ...]
    smallest_effect: SmallestEffect
    warnings: tuple[str, ...]
    budget: Budget | None = None
    advice: tuple[str, ...] = ()


def recording_advice(config: RunConfig) -> str | None:
    """A line for whoever plans a run that records itself; None where there is nothing to say."""
    t = config.training
    if config.checkpoints is not None or t.record == "adaptive" or t.kept < 7:
        return None
    return (
        f"{t.kept} checkpoints in equal steps are recorded; training.record=adaptive with record_every="
        f"{max(1, t.record_every // 4)} and record_count={t.kept // 2 + 1} may do with half the files"
    )


def gap_warnings(config: RunConfig, steps: Sequence[int]) -> list[str]:
    """Where checkpoints are too far apart for a quadrature over the straight line between them."""
    if config.checkpoints is None:
        t = config.training
        product, simpson = t.learning_rate * t.record_every, config.rule == "simpson"
        bound = COARSE_SPACING_SIMPSON if simpson else COARSE_SPACING
        if product <= bound:
            return []
        fitting = max(1, int(bound / t.learning_rate))
        remedy = f"set training.record_every to {fitting} or less"
        if not simpson and product <= COARSE_SPACING_SIMPSON:
            remedy += ", or rule to simpson"
        return [
            f"learning rate x spacing is {product:.1e}, above {bound:.1e} rule '{config.rule}' misses much "
            f"of the loss change; {remedy}"
        ]
    wide = [
        (a, b) for a, b in zip(steps, steps[1:], strict=False) if b - a > 1 and b > COARSE_RATIO * max(a, 1)
    ]
    if not wide:
        return []
    listed = ", ".join(f"{a}-{b}" for a, b in wide[:12])
    return [
        f"{len(wide)} intervals are wider than half the training before them ({listed}); loss changes there "
        "cannot be attributed along a straight line, leave those steps out or record more"
    ]


def task_to_plan(config: RunConfig) -> tuple[Task, StandIn | None]:
    """The task of a config, around a smaller model where its own is a large one of transformers."""
    if config.task == "text" and config.model.kind == "huggingface":
        from experiments.tasks import text

        stand_in = stand_in_of(config)
        if stand_in is not None:
            return placed(text.build_around(config, stand_in), config), stand_in
    return build_task(config), None


def left_out(config: RunConfig) -> list[str]:
    """What the seconds of a plan leave out."""
    said = []
    uncounted = {b.kind for b in config.measured_bases()} - {"hessian", "trajectory", "random"}
    if uncounted:
        said.append(f"of basis kinds {sorted(uncounted)} only reading is counted, derivatives come on top")
    if config.compiled:
        said.append("times are those of uncompiled derivatives; compiling takes minutes once on top")
    return said


def smallest_effect(task: Task, config: RunConfig, *, measured: bool = True) -> SmallestEffect:
    """The smallest mean damage a two-sided 5 % test would find with power 0.8, on the evaluate split.

    The spread is that of document means of the loss at the initial weights, an upper bound where
    undoing a movement changes losses less than the model's own variation between documents. It is not
    ``measured`` where another model stands in.
    """
    tokens = task.splits.evaluate
    if not measured:
        count = len(tokens.documents.unique())
        return SmallestEffect(count, minimum_detectable(1 / math.sqrt(count)), None)
    losses = task.objective(config).losses(task.space.read(task.module), tokens).double()
    documents = tokens.documents[tokens.sequence_of]
    means = torch.stack([losses[documents == name].mean() for name in documents.unique()])
    spread = float(means.std()) if len(means) > 1 else math.nan
    error = 1 / math.sqrt(len(means))
    effect = minimum_detectable(error)
    return SmallestEffect(len(means), effect, effect * spread if spread == spread else None)


def make_plan(config: RunConfig, folder: Path, budget_seconds: float | None = None) -> CostPlan:
    """The plan of a config.

    Args:
        config: the run.
        folder: where one checkpoint is written and read for timing.
        budget_seconds: also find settings that fit this.
    """
    task, stand_in = task_to_plan(config)
    require_parts(config, task if stand_in is None else replace(task, space=stand_in.space))
    given = task.given_checkpoints(config)
    steps = config.training.recorded if given is None else list(given.steps)
    series = Checkpoints(task.space, tuple(steps), lambda _: {})
    for spec in config.measured_bases():
        if spec.steps is None and spec.kind in build.FROM_THE_WHOLE_SERIES - {"random"}:
            require_places(spec, len(steps))
        elif spec.steps is None and spec.kind in build.AT_SPACED_CHECKPOINTS:
            odd_checkpoints(series).spaced(-(-spec.vectors // spec.per_checkpoint))
    sizes = sizes_of(task, config, steps, None if stand_in is None else stand_in.space)
    memory_shares(config, sizes.parameters)  # a budget that the model alone exceeds is refused at once
    settle_allocator(config, sizes.parameters)
    activations = 1.0 if stand_in is None else stand_in.activations
    speeds, route = rehearse(task, config, sizes, folder, activations)
    effect = smallest_effect(task, config, measured=stand_in is None)
    if stand_in is not None:
        positions, slots = task.splits.select.scored.shape[1] + 1, task.splits.select.scored.sum(1).max()
        work = stand_in.work(positions, int(slots))
        speeds = speeds.of_whole(stand_in.weights, work, stand_in.activations, stand_in.layers)
        # The model itself will be in memory, not the one that stood in for it.
        more = (stand_in.space.size - task.space.size) * config.itemsize
        speeds = replace(speeds, base_bytes=speeds.base_bytes + more)
    sizes = replace(sizes, route=route)
    stages = stage_costs(sizes, speeds, config)
    peak = peak_bytes(sizes, speeds, config)
    forward = sum(stage.forward for stage in stages)
    return CostPlan(
        round(forward / sizes.select, 3),
        forward,
        sum(stage.hvps for stage in stages),
        sum(stage.bytes_read for stage in stages),
        sum(stage.bytes_written for stage in stages),
        peak,
        transient_bytes(sizes, config),
        sum(stage.seconds for stage in stages),
        route,
        speeds.curvature_route,
        sizes.parameters,
        sizes.checkpoints,
        tuple(stages),
        effect,
        (*gap_warnings(config, steps), *memory_warnings(sizes, speeds, config), *left_out(config)),
        None if budget_seconds is None else fit_budget(sizes, speeds, config, budget_seconds),
        tuple(filter(None, [recording_advice(config)])),
    )


def fit_budget(sizes: Sizes, speeds: Speeds, config: RunConfig, seconds: float) -> Budget:
    """The largest share of vectors and tokens that fits a budget; training is not shortened."""
    training = sizes.steps * speeds.training_step
    for share in (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05):
        bases = tuple(basis.fewer(share, 2) for basis in sizes.bases)
        tried = replace(
            sizes,
            bases=bases,
            select=max(8, round(sizes.select * share)),
            select_tokens=max(8, round(sizes.select_tokens * share)),
            curvature=max(8, round(sizes.curvature * share)),
        )
        needed = sum(stage.seconds for stage in stage_costs(tried, speeds, config))
        if needed <= seconds:
            vectors = {spec.label: b.vectors for spec, b in zip(config.bases, bases, strict=True)}
            return Budget(True, needed, training, share, vectors, tried.select, tried.curvature)
    return Budget(False, needed, training)


def describe(found: CostPlan) -> str:
    """The plan as a few lines."""
    effect, budget = found.smallest_effect, found.budget
    nats = "" if effect.nats_per_token is None else f" (at most {effect.nats_per_token:.3f} nats per token)"
    lines = [
        f"{found.parameters:,} parameters, {found.checkpoints} checkpoints, derivatives by route "
        f"{found.route}, Hessian products by {found.curvature_route or 'none'}",
        f"forward passes {found.forward_passes:,.0f} (of the select split), "
        f"Hessian-vector products {found.hvps:,}",
        f"reads {found.bytes_read / 1e9:.2f} GB, writes {found.bytes_written / 1e9:.2f} GB, "
        f"peak memory {found.peak_bytes / 1e9:.1f} GB, disk for a while {found.transient_bytes / 1e9:.2f} GB",
        f"about {found.seconds / 60:.1f} minutes on this machine:",
        *(f"  {stage.stage:<24} {stage.seconds:8.1f} s" for stage in found.stages),
        f"smallest effect a 5 % test finds with power 0.8 on {effect.documents} documents: "
        f"{effect.in_standard_deviations:.2f} standard deviations between documents{nats}",
        *(f"warning: {text}" for text in found.warnings),
        *(f"advice: {text}" for text in found.advice),
    ]
    if budget is not None:
        lines.append(
            f"within the budget: {dict(budget.vectors)} vectors, {budget.select_sequences} select sequences, "
            f"{budget.seconds / 60:.1f} minutes"
            if budget.fits
            else "no setting fits the budget; training and fixed work alone take longer"
        )
    return "\n".join(lines)
