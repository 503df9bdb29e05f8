"""One skill of one run with all that its methods share: problem, timeline, data, retraining."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.removal.verb import logits_of
from experiments.run.run import Run
from experiments.run.stages.training import training_settings
from experiments.tasks.arithmetic import data_of, first_and_second_of, token_set
from experiments.verbs.targets import skill_groups
from interventions.blocking import BranchPoint, open_branch_point
from interventions.damage import EvaluatedSplit
from interventions.discovery.timeline import Timeline
from interventions.discovery.windows import Window
from interventions.removal.grouped import GroupedSplit, GroupRule, Predictor
from interventions.removal.problem import RemovalProblem
from interventions.removal.tuning import MaskedBatches, label_loss, masked_batches, tuned
from interventions.removal.undo import UNDO_LIMITS, repair_settings
from interventions.removal.windows import skill_timeline
from polca_edit.checkpoints.files import SeriesFolder
from polca_edit.seeds import generator_for
from polca_edit.tokens import TokenSet
from polca_edit.training import TrainingSettings


@dataclass(frozen=True)
class Effort:
    """What every method gets.

    Attributes:
        sums: of every fit, repair and relearning batch.
        trial_steps: of each setting that is tried.
        fit_steps: of the chosen one.
        relearn_steps: of an attack with some labels; half of it with none, few or all of them.
        every: steps between points of a relearning curve.
        rates: an attacker's learning rates, multiples of training's.
        axis_directions: random directions that the search of skill axes measures.
        noise: shares of noise that noise-and-distil tries.
    """

    sums: int = 64
    trial_steps: int = 8
    fit_steps: int = 60
    relearn_steps: int = 160
    every: int = 20
    rates: tuple[float, ...] = (0.4, 1.0, 4.0)
    axis_directions: int = 48
    noise: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)


@dataclass(frozen=True, eq=False)
class Place:
    """A skill to take out of a run's last checkpoint.

    Attributes:
        run: trained, with its optimiser states.
        skill: name.
        effort: of every method.
    """

    run: Run
    skill: str
    effort: Effort

    @cached_property
    def rule(self) -> GroupRule:
        """Groups of the skill and of everything else."""
        return skill_groups(self.run, self.skill)

    @cached_property
    def problem(self) -> RemovalProblem:
        """Bounds of undoing, select, and batches for fits and repair."""
        split = EvaluatedSplit(self.run.objective, self.run.checkpoints(), self.run.task.splits.select)
        predictor = Predictor(self.run.objective, logits_of(self.run))
        return RemovalProblem(GroupedSplit(split, predictor, self.rule), self.draws("fit"), UNDO_LIMITS)

    @cached_property
    def judged(self) -> GroupedSplit:
        """The evaluate split."""
        return self.problem.select.on(self.run.task.splits.evaluate)

    @cached_property
    def _timed(self) -> tuple[Timeline, float]:
        before = self.problem.predictor.spent
        return skill_timeline(self.problem.select), self.problem.predictor.spent - before

    @property
    def timeline(self) -> Timeline:
        """What was learned when, on select."""
        return self._timed[0]

    @property
    def timeline_passes(self) -> float:
        """What the timeline cost, in sequences through the model."""
        return self._timed[1]

    @cached_property
    def own(self) -> Window:
        """The window of the skill's fall."""
        effect = self.timeline.own(self.skill)
        if effect is None:
            raise ValueError(
                f"'{self.skill}' has no window in this run; train longer or choose another skill"
            )
        return effect.window

    def draws(self, purpose: str) -> Callable[[int], TokenSet]:
        """Sequences that training may see, a pure function of purpose and step.

        Raises:
            ValueError: for a task that cannot draw them.
        """
        fresh, seed, size = self.run.task.fresh, self.run.config.seed, self.effort.sums
        if fresh is None:
            raise ValueError(f"a study of removal needs new training data, '{self.run.task.name}' draws none")
        return lambda step: fresh(size, generator_for(seed, "removal study", purpose, step))

    def given_back(self, share: float) -> MaskedBatches:
        """Relearning batches with a share of the skill's labels."""
        return masked_batches(self.draws("relearning"), self.rule, share, seed=self.run.config.seed)

    @property
    def rate(self) -> float:
        """Training's learning rate."""
        return self.run.config.training.learning_rate

    def repair_settings(self, steps: int) -> TrainingSettings:
        """The same for every method: training's optimisation annealed, with a fresh optimiser."""
        t, seed = self.run.config.training, self.run.config.seed
        decay, betas = t.weight_decay, t.betas
        return repair_settings(steps, t.learning_rate, weight_decay=decay, betas=betas, seed=seed)

    @property
    def training_passes(self) -> float:
        """Sequences through the model in training, a forward with its backward counting three."""
        return 3.0 * self.run.config.training.steps * self.run.config.training.batch_size

    def trained_without(self, start: int = 0) -> Float[Tensor, " N"]:
        """The recorded run again from a step on, same data order, the skill's tokens not scored.

        Args:
            start: the latest recorded optimiser state at or before it is taken; 0 trains from the start.
        """
        data, predictor = data_of(self.run.config), self.problem.predictor

        def batch(step: int) -> TokenSet:
            return token_set(*first_and_second_of(data.batch(step)))

        folder, space = SeriesFolder(self.run.directory.checkpoints), self.run.task.space
        states = [step for step in folder.state_steps() if step <= start]
        point = (
            open_branch_point(folder, space, start)
            if states
            else BranchPoint(0, self.run.checkpoints()[0].clone(), {})
        )
        loss = label_loss(predictor, masked_batches(batch, self.rule))
        return tuned(predictor, point, loss, training_settings(self.run.config))


def moved_by(place: Place, theta: Float[Tensor, " N"]) -> float:
    """Length of the movement from the run's last checkpoint, weight units."""
    return float(torch.linalg.vector_norm((theta - place.problem.theta).double()))
