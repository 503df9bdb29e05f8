"""A trained run of the arithmetic task as a place to remove skills from: problems, spans, relearning data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experiments.config import RunConfig, load_config
from experiments.removal.skills import GROUPS, assign_groups, skill_rule
from experiments.run.run import Run, open_run
from experiments.run.stages.training import trained_series, training_settings
from experiments.tasks import arithmetic
from experiments.tasks.arithmetic import (
    ArithmeticData,
    data_of,
    first_and_second,
    first_and_second_of,
    output_logits,
    token_set,
)
from interventions.damage import EvaluatedSplit
from interventions.removal.grouped import GroupedSplit, GroupRule, Predictor
from interventions.removal.problem import Limits, RemovalProblem
from interventions.removal.rivals import masked_loss
from interventions.removal.searches import GroupCurvature, group_curvature
from interventions.removal.spans import Span, span_by_tensor, stacked_displacements
from polca_edit.basis.hessian import EigenSettings, hessian_basis
from polca_edit.basis.path import trajectory_basis
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import orthonormalise
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.seeds import generator_for
from polca_edit.tokens import TokenSet
from polca_edit.training import train


@dataclass(frozen=True)
class BedSettings:
    """A run to train, and the samples and vectors that removal takes from it.

    Attributes:
        config: model, data and training; its bases are not used.
        fit_sums: sums of one fit step.
        hessian_vectors: checkpoints from which one Hessian vector each is taken.
        trajectory_vectors: leading trajectory vectors.
        curvature_sample: first curvature sums that derivatives are taken on.
    """

    config: RunConfig
    fit_sums: int = 128
    hessian_vectors: int = 12
    trajectory_vectors: int = 16
    curvature_sample: int = 64


def preset_bed(
    preset: str,
    *,
    select_sums: int = 1000,
    hessian_vectors: int = 12,
    overrides: Mapping[str, object] | None = None,
) -> BedSettings:
    """A bed with the model and training of an arithmetic preset; the splits are the bed's own."""
    sums = {"select_sums": select_sums, "curvature_sums": 250, "evaluate_sums": 1000}
    own = {f"arithmetic.{name}": count for name, count in sums.items()}
    return BedSettings(load_config(preset, {**own, **(overrides or {})}), hessian_vectors=hessian_vectors)


@dataclass(frozen=True)
class BedVectors:
    """What removal derives from a trained run once.

    Attributes:
        rows: (K, N) orthonormal: trajectory vectors, then Hessian vectors.
        gradients: (G, K) mean gradient of each group along the rows at the last checkpoint.
        hessians: (G, K, K) curvature of each group in the rows.
    """

    rows: Float[Tensor, "K N"]
    gradients: Float[Tensor, "G K"]
    hessians: Float[Tensor, "G K K"]


@dataclass(frozen=True, eq=False)
class Bed:
    """One trained run with everything a removal is stated in.

    Attributes:
        settings: sizes.
        run: model, data, checkpoints and store.
        predictor: counts the passes of every problem stated on this bed.
    """

    settings: BedSettings
    run: Run
    predictor: Predictor = field(repr=False)

    @property
    def seed(self) -> int:
        """Of model, data and training."""
        return self.run.config.seed

    @property
    def space(self) -> ParameterSpace:
        """Parameters of the model."""
        return self.run.task.space

    @cached_property
    def data(self) -> ArithmeticData:
        """Splits, and what training may draw."""
        return data_of(self.run.config)

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """Recorded weights, all in memory."""
        series = self.run.checkpoints()
        return open_checkpoints({step: series[i] for i, step in enumerate(series.steps)}, self.space)

    @cached_property
    def thetas(self) -> list[Float[Tensor, " N"]]:
        """Recorded weights, first and last included."""
        return [self.checkpoints[index] for index in range(len(self.checkpoints))]

    @cached_property
    def vectors(self) -> BedVectors:
        """Vectors and curvature, made once for these weights and settings and kept in the run."""
        settings = (
            self.settings.hessian_vectors,
            self.settings.trajectory_vectors,
            self.settings.curvature_sample,
        )
        return self.run.directory.kept(
            "removal/vectors",
            self.run.key_for("removal/vectors", settings),
            BedVectors,
            lambda: _vectors(self),
            self.run.objective.passes,
        )

    @property
    def curvature(self) -> GroupCurvature:
        """Per-group quadratic model in the vectors at the last checkpoint."""
        return GroupCurvature(self.vectors.gradients, self.vectors.hessians)

    def problem(self, skill: str, limits: Limits | None = None) -> RemovalProblem:
        """Remove ``skill`` from the last checkpoint; fit batches are fresh sums off both held-out splits."""
        split = EvaluatedSplit(self.run.objective, self.checkpoints, self.data.splits.select)
        select = GroupedSplit(split, self.predictor, skill_rule(skill))
        return RemovalProblem(select, self.fit_batch, limits or Limits())

    def fit_batch(self, step: int) -> TokenSet:
        """Sums of one fit step, the same for every method."""
        generator = generator_for(self.seed, "removal fit", step)
        return self.data.allowed(self.settings.fit_sums, generator)

    def span(self, *, block: int | None = None, per_block: int | None = None) -> Span:
        """Recorded displacements and Hessian vectors, cut to each tensor or to groups of its rows."""
        hessian = self.vectors.rows[self.settings.trajectory_vectors :]
        rows = torch.cat([stacked_displacements(self.thetas), hessian])
        return span_by_tensor(rows, self.space, "recorded movement", per_block=per_block, block=block)


def open_bed(
    seed: int, settings: BedSettings, folder: Path, say: Callable[[str], None] = lambda text: None
) -> Bed:
    """The bed of one seed under a folder; its run is trained if it is not there with these very settings."""
    config = settings.config.model_copy(update={"seed": seed})
    run = open_run(config, folder / f"seed-{seed}", say)
    trained_series(run)
    bed = Bed(settings, run, Predictor(run.objective, output_logits))
    say(f"  seed {seed}: {len(bed.thetas)} checkpoints, {len(bed.vectors.rows)} vectors with their curvature")
    return bed


def _vectors(bed: Bed) -> BedVectors:
    task, settings, series = bed.run.task, bed.settings, bed.checkpoints
    objective = Objective(task.module, task.token_loss, task.space, batch_size=settings.curvature_sample)
    objective.passes = bed.run.objective.passes
    sample = task.splits.curvature.select(torch.arange(settings.curvature_sample))
    count = settings.hessian_vectors
    eigen = EigenSettings(tolerance=3e-2, max_products=12, seed=bed.seed)
    hessian = hessian_basis(objective, series, sample, count, eigen)
    trajectory = trajectory_basis(series, settings.trajectory_vectors)
    rows = orthonormalise(torch.cat([trajectory.rows, hessian.rows]))
    curvature = _curvature(objective, bed.thetas[-1], sample, rows)
    return BedVectors(rows, curvature.gradients, curvature.hessians)


def _curvature(objective: Objective, theta: Tensor, sample: TokenSet, vectors: Tensor) -> GroupCurvature:
    groups = assign_groups(sample)
    weights = [(groups == g).to(theta) / (groups == g).sum().clamp_min(1) for g in range(len(GROUPS))]
    products = [objective.hessian(theta, sample, weights=w, expected=len(vectors)) for w in weights]
    return group_curvature(
        lambda g, v: products[g](v),
        lambda g: objective.mean_gradient(theta, sample, weights=weights[g])[1],
        vectors,
        len(GROUPS),
    )


# -- training again ----------------------------------------------------------------------------------


def retrain_without(bed: Bed, rule: GroupRule) -> Float[Tensor, " N"]:
    """The gold standard: training from the same start and data order, the skill's tokens not scored."""
    module = copy.deepcopy(bed.run.task.module)

    def loss(model: nn.Module, step: int) -> Tensor:
        inputs = bed.data.batch(step)
        groups = rule.assign(token_set(*first_and_second_of(inputs)))
        return masked_loss(arithmetic.token_loss(model, inputs).flatten(), groups, rule.targets)

    train(module, loss, training_settings(bed.run.config))
    return bed.space.read(module)


def relearning_batches(
    bed: Bed, rule: GroupRule, share: float, size: int = 64
) -> Callable[[int], tuple[TokenSet, Tensor]]:
    """Batches of off-target tokens plus the skill's tokens of a fixed pool of sums.

    Args:
        bed: data.
        rule: which tokens are the skill.
        share: of the sums seen in training whose skill tokens are given back; 0 for none.
        size: sums per batch; half come from the pool where there is one.
    """
    training = bed.run.config.training
    pool_size = round(share * training.steps * training.batch_size)
    pool = bed.data.allowed(max(pool_size, 1), generator_for(bed.seed, "relearning pool"))

    def batch(step: int) -> tuple[TokenSet, Tensor]:
        generator = generator_for(bed.seed, "relearning", step)
        drawn = min(size // 2, pool.sequences) if pool_size else 0
        fresh = bed.data.allowed(size - drawn, generator)
        picked = torch.randint(0, pool.sequences, (drawn,), generator=generator)
        a, b = first_and_second(fresh)
        c, d = first_and_second(pool)
        tokens = token_set(torch.cat([a, c[picked]]), torch.cat([b, d[picked]]))
        from_pool = tokens.sequence_of >= size - drawn
        return tokens, from_pool | ~rule.is_target(rule.assign(tokens))

    return batch


def with_own_digits(predictor: Predictor, tokens: TokenSet, theta: Float[Tensor, " N"]) -> TokenSet:
    """The same sums, each digit predicted after the model's own earlier digits; answers stay true."""
    inputs = tokens.inputs.clone()
    for place in range(3):
        logits = predictor.at(theta, replace(tokens, inputs=inputs)).view(tokens.sequences, 4, -1)
        inputs[:, -4 + place] = logits[:, place].argmax(-1)
    return replace(tokens, inputs=inputs)
