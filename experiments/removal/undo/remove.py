"""What ``remove`` needs to undo training: options to settings, what is said first, what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from experiments.config import parse_window
from experiments.run.run import Run
from interventions.damage import EvaluatedSplit
from interventions.discovery.axes import skill_axis
from interventions.discovery.windows import Window
from interventions.edits import Edit
from interventions.lora import adapter_edit, low_rank
from interventions.removal.grouped import GroupedSplit, GroupRule, LogitFunction, Predictor
from interventions.removal.measures import chance_loss, relearn
from interventions.removal.problem import Limits
from interventions.removal.tuning import masked_batches
from interventions.removal.undo import Undo, Undone, decided, foreseen, repair_settings
from interventions.removal.windows import check_windows, group_masks, skill_timeline
from polca_edit.artifacts import load_record
from polca_edit.basis.path import trajectory_basis
from polca_edit.basis.record import Basis
from polca_edit.seeds import generator_for
from polca_edit.tokens import TokenSet

#: ``--method`` of the verb: fits inside a span, and undoing.
METHODS = ("span", "axis", "rollback", "return")
#: Trajectory vectors in which an axis is searched.
AXIS_VECTORS = 12
#: Least and most steps of a repair that nobody asked for.
REPAIR_STEPS = (20, 400)
#: Share of labels that the attack of the report gives back.
GIVEN_BACK = 0.1


def windows_of(given: Sequence[str]) -> tuple[Window, ...]:
    """Windows as they are written on the command line.

    >>> [str(w) for w in windows_of(["10:20", "40:60"])]
    ['10:20', '40:60']
    """
    steps = [parse_window(text) for text in given]
    return tuple(Window(*pair, "given") for pair in steps if pair is not None)


@dataclass(frozen=True)
class UndoOptions:
    """What the command line asks of undoing.

    Attributes:
        method: one of :data:`METHODS`.
        windows: START:END each; empty: chosen.
        steps: of repair; None: a tenth of the recorded steps.
        relearn: steps of the attack that is measured, 0 for none.
        lora: rank of the adapter that is measured, None for none.
        compare: windows that nobody gave are compared by short probes.

    Raises:
        ValueError: for an unknown method, or options that a fit inside a span does not take.
    """

    method: str
    windows: tuple[str, ...] = ()
    steps: int | None = None
    relearn: int = 0
    lora: int | None = None
    compare: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}, got '{self.method}'")
        if self.method == "span" and (self.relearn or self.lora):
            raise ValueError(
                "--relearn and --lora belong to undoing, got --method span; "
                "give --method return, rollback or axis"
            )


def undo_of(run: Run, options: UndoOptions) -> Undo:
    """Settings of a run: its own optimisation with a fresh optimiser, for so many steps of repair.

    Raises:
        ValueError: for a window that was not recorded.
    """
    t, rate = run.config.training, training_rate(run)
    windows = windows_of(options.windows)
    check_windows(run.checkpoints(), windows)
    steps = repair_steps(run) if options.steps is None else options.steps
    training = repair_settings(steps, rate, weight_decay=t.weight_decay, betas=t.betas, seed=run.config.seed)
    every = max(1, min(10, steps))
    kind = "rollback" if options.method == "axis" else options.method
    return Undo(kind, windows, training=training, every=every, seed=run.config.seed, compare=options.compare)


def training_rate(run: Run) -> float:
    """Learning rate of the recorded training: the config's, or the last one that opened checkpoints tell."""
    # Opened checkpoints may say what they were trained with; a config that trains nothing does not know.
    rates = [rate for rate in run.checkpoints().learning_rates or () if rate > 0]
    return rates[-1] if rates and run.config.checkpoints is not None else run.config.training.learning_rate


def repair_steps(run: Run) -> int:
    """Steps of repair that nobody asked for: a tenth of the recorded steps, between the bounds."""
    series = run.checkpoints()
    return min(max((series.steps[-1] - series.steps[0]) // 10, REPAIR_STEPS[0]), REPAIR_STEPS[1])


def axis_undo(run: Run, rule: GroupRule, logits: LogitFunction, undo: Undo, basis: str | None) -> Undo:
    """Undoing along the skill's own axis: of a stored basis, or of the leading trajectory vectors.

    Args:
        run: the run.
        rule: what is to be removed.
        logits: of the run's loss.
        undo: settings; its windows, or the whole run, are what is undone along the axis.
        basis: name of a stored basis; None takes trajectory vectors.
    """
    select = _select(run, rule, logits)
    groups, split, series = group_masks(select), select.split, select.split.series
    span = (
        trajectory_basis(series, min(AXIS_VECTORS, len(series) - 1))
        if basis is None
        else load_record(Basis, run.directory.basis(basis))
    )
    target = groups.pop(rule.skill)
    axis = skill_axis(split, span, target, groups)
    windows = undo.windows or (Window(series.steps[0], series.steps[-1], "whole"),)
    return replace(undo, windows=windows, rows=axis.basis.rows)


def repair_batches(
    run: Run, rule: GroupRule, fresh: Callable[[int], TokenSet], size: int
) -> Callable[[int], TokenSet] | None:
    """What repair may train on: sequences training may see, else the curvature split; None where neither says
    which tokens are the skill.

    Select chooses when repair ends, so it is never trained on.

    Args:
        run: the run.
        rule: which tokens are the skill.
        fresh: new sequences, where the task can draw them.
        size: sequences a batch.
    """
    if run.task.fresh is not None:
        return fresh
    part = run.task.splits.curvature
    try:
        rule.assign(part)
    except KeyError:  # labels that only the held-out tokens carry
        return None

    def batch(step: int) -> TokenSet:
        generator = generator_for(run.config.seed, "removal repair", step)
        return part.select(torch.randperm(part.sequences, generator=generator)[:size])

    return batch


def _select(run: Run, rule: GroupRule, logits: LogitFunction) -> GroupedSplit:
    split = EvaluatedSplit(run.objective, run.checkpoints(), run.task.splits.select)
    return GroupedSplit(split, Predictor(run.objective, logits), rule)


def with_timeline(run: Run, rule: GroupRule, logits: LogitFunction, undo: Undo, limits: Limits) -> Undo:
    """The settings with what was learned when and what will be undone: said first, and not measured twice."""
    select = _select(run, rule, logits)
    return decided(select, undo, skill_timeline(select, seed=undo.seed), limits)


def said_first(run: Run, rule: GroupRule, logits: LogitFunction, undo: Undo, *, data: bool) -> list[str]:
    """What cannot be had, measured before anything is trained.

    Args:
        run: the run.
        rule: what is to be removed.
        logits: of the run's loss.
        undo: settings with their timeline.
        data: whether there is anything to repair with.
    """
    assert undo.timeline is not None
    said = foreseen(_select(run, rule, logits), undo, undo.timeline)
    trained = run.config.training.steps if run.config.checkpoints is None else None
    probes = 4 * 2 * undo.probe if undo.compare and not undo.windows and undo.training.steps else 0
    steps = undo.training.steps + probes if data else 0
    cost = f"repair and its choice take up to {steps} training steps"
    if trained:
        cost += f", {steps / trained:.0%} of the recorded training"
    if not data:
        cost = "there is no data to repair with: what falls stays fallen"
    elif not undo.training.steps:
        cost = "no repair was asked for: what falls stays fallen"
    return [*said.sentences(), cost]


@dataclass(frozen=True)
class Adapted:
    """An edit as a low-rank adapter, and what of its effect that leaves.

    Attributes:
        rank: of every matrix, at the most.
        norm_share: of the edit's squared norm that the adapter holds.
        target_share: headroom that the skill loses with the adapter.
        worst_off_share: largest share another group loses with it.
    """

    rank: int
    norm_share: float
    target_share: float
    worst_off_share: float


def adapted(run: Run, judged: GroupedSplit, edit: Edit, rank: int) -> tuple[Edit, Adapted]:
    """The part of an edit that a LoRA adapter of a rank holds, and its measured effect.

    Args:
        run: gives the parameters.
        judged: tokens that judge.
        edit: of the run's last checkpoint.
        rank: of the adapter.

    Raises:
        ValueError: for an edit that moves no weight matrix.
    """
    space, module = run.task.space, run.task.module
    part = adapter_edit(low_rank(edit, space, rank, module), edit, space, module)
    shares = judged.shares_at(part.moved(judged.split.theta))
    inside = (part.norm / edit.norm) ** 2
    return part, Adapted(rank, inside, shares.target, shares.worst_off)


@dataclass(frozen=True)
class Returned:
    """The skill after an attack that trains on everything, with a share of the skill's labels.

    Attributes:
        given_back: share of labels.
        steps: of fine-tuning at training's rate.
        loss: nats, from the edited model on.
        accuracy: of the skill.
        chance: loss of the best constant answer, nats.
        before: loss of the skill before the edit, nats.
    """

    given_back: float
    steps: tuple[int, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    chance: float
    before: float


def returned(
    judged: GroupedSplit,
    edit: Edit,
    batch: Callable[[int], TokenSet],
    undo: Undo,
    steps: int,
    rate: float,
) -> Returned:
    """How fast the skill comes back: relearning on other batches than repair saw.

    Args:
        judged: tokens that judge, with the original weights.
        edit: of them.
        batch: step -> tokens.
        undo: gives the seed, and which batches repair saw.
        steps: of the attack.
        rate: its learning rate, training's own.
    """
    later = undo.training.steps + 1000
    given = masked_batches(lambda step: batch(later + step), judged.rule, GIVEN_BACK, seed=undo.seed)
    points = relearn(
        judged,
        edit.moved(judged.split.theta),
        given,
        steps,
        learning_rate=rate,
        every=max(1, steps // 8),
    )
    return Returned(
        GIVEN_BACK,
        tuple(p.step for p in points),
        tuple(p.loss for p in points),
        tuple(p.accuracy for p in points),
        chance_loss(judged.tokens.output_of[judged.target]),
        float(judged.split.before[judged.target].double().mean()),
    )


def told(undone: Undone | None, back: Returned | None, held: Adapted | None) -> list[str]:
    """What was done and measured, in words."""
    lines = []
    if undone is not None:
        windows = ", ".join(str(window) for window in undone.windows)
        lines.append(
            f"undone: steps {windows} (norm {undone.undone_norm:.3g}), repair {undone.repair_steps} steps "
            f"(norm {undone.repair_norm:.3g}), {undone.seconds:.0f} s"
        )
    if back is not None:
        path = ", ".join(f"{loss:.2f}" for loss in back.loss)
        steps = ", ".join(str(step) for step in back.steps)
        lines.append(
            f"with {back.given_back:.0%} of its labels given back: loss {path} after {steps} steps "
            f"(best constant answer {back.chance:.2f}, before the edit {back.before:.2f})"
        )
    if held is not None:
        lines.append(
            f"as an adapter of rank {held.rank}: {held.norm_share:.0%} of the squared norm, target "
            f"{held.target_share:.1%} of headroom, worst other group {held.worst_off_share:+.2%}"
        )
    return lines
