"""``polca-edit remove``: an edit inside recorded movement that takes one skill or cluster out of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from experiments.config import parse_window
from experiments.report.page import write_report
from experiments.run.machine import hardware, versions
from experiments.run.run import Run, load_run
from experiments.run.run_record import open_evaluate
from experiments.run.stages.clusters import ClusterRecord
from experiments.verbs.groups import with_groups
from experiments.verbs.guard import existing
from interventions.damage import EvaluatedSplit
from interventions.edit_files import save_edit
from interventions.edits import Edit
from interventions.removal.grouped import (
    GroupedSplit,
    GroupRule,
    LogitFunction,
    Predictor,
    labelled,
)
from interventions.removal.measures import Judgement
from interventions.removal.optimise import FitSettings
from interventions.removal.problem import Limits, RemovalProblem
from interventions.removal.remove import (
    BUDGETS,
    Budget,
    RemovalResult,
    judged_edit,
    missed_bounds,
    remove_in_order,
    remove_skill,
)
from interventions.removal.spans import (
    BLOCK,
    LEADING,
    Span,
    span_by_tensor,
    span_of_rows,
    stacked_displacements,
)
from polca_edit.artifacts import load_record, to_plain
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.files import write_json
from polca_edit.clusters.membership import fit_rule
from polca_edit.seeds import generator_for
from polca_edit.tokens import TokenSet

# -- what is removed -------------------------------------------------------------------------------


def skill_groups(run: Run, skill: str) -> GroupRule:
    """Groups of a named skill: those of the task's partition, or the skill against all others.

    Raises:
        ValueError: for a skill the run does not know.
    """
    partition = run.task.partition
    if partition is not None and skill in partition.skills:
        return partition.rule(skill)
    known = run.task.splits.select.skills
    if skill not in known:
        raise ValueError(f"a skill must be one this run labels, got '{skill}'; known are {sorted(known)}")
    return labelled(skill, [name for name in known if name != skill])


def cluster_groups(run: Run, cluster: str) -> GroupRule:
    """Members of one cluster by its rule on input features; everyone else by partition, or one group.

    No skill label decides membership, and the rule never sees a loss, so it holds on any tokens.

    Args:
        run: the run.
        cluster: BASIS:VECTOR:CLUSTER.

    Raises:
        ValueError: for a cluster that is not named so, or does not exist.
    """
    basis, *numbers = cluster.split(":")
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise ValueError(f"--cluster needs BASIS:VECTOR:CLUSTER, got '{cluster}'; for example hessian:3:0")
    vector, index = (int(number) for number in numbers)
    labels = load_record(ClusterRecord, run.directory.clusters(basis)).labels
    if not vector < len(labels) or not bool((labels[vector] == index).any()):
        raise ValueError(f"cluster {cluster} does not exist in this run; see 'polca-edit inspect'")
    rule = fit_rule(run.task.splits.select, labels[vector] == index, seed=run.config.seed)
    partition = run.task.partition
    rest = ("(rest)",) if partition is None else partition.names

    def assign(tokens: TokenSet) -> Tensor:
        ones = torch.ones(tokens.count, dtype=torch.long)
        groups = ones if partition is None else partition.assign(tokens) + 1
        groups[rule.assign(tokens)] = 0
        return groups

    return GroupRule((cluster, *rest), (True, *[False] * len(rest)), assign, cluster)


def fit_stream(run: Run, size: int) -> Callable[[int], TokenSet]:
    """Batches for the fit: new sequences that training may see, or draws from curvature and select."""
    fresh = run.task.fresh
    parts = (run.task.splits.curvature, run.task.splits.select)

    def batch(step: int) -> TokenSet:
        generator = generator_for(run.config.seed, "removal fit", step)
        if fresh is not None:
            return fresh(size, generator)
        part = parts[step % 2]
        return part.select(torch.randperm(part.sequences, generator=generator)[:size])

    return batch


def edit_span(run: Run, basis: str | None, window: tuple[int, int] | None = None) -> Span:
    """All recorded displacements and Hessian vectors by groups of neurons, or one stored basis.

    Args:
        run: with checkpoints.
        basis: name of a stored basis.
        window: steps of the displacements that are taken; Hessian vectors are left out then.
    """
    if basis is not None:
        return span_of_rows(load_record(Basis, run.directory.basis(basis)).rows, f"basis {basis}")
    checkpoints = run.observed(window)
    rows = stacked_displacements([checkpoints[index].clone() for index in range(len(checkpoints))])
    if window is not None:
        return span_by_tensor(
            rows,
            run.task.space,
            f"movement of steps {window[0]} to {window[1]} by groups of neurons",
            block=BLOCK,
            per_block=LEADING,
        )
    stored = [run.directory.basis(b.label) for b in run.config.bases if b.kind == "hessian"]
    rows = torch.cat([rows, *(load_record(Basis, path).rows for path in stored if path.exists())])
    return span_by_tensor(
        rows, run.task.space, "recorded movement by groups of neurons", block=BLOCK, per_block=LEADING
    )


# -- removing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemovalPlan:
    """What ``remove`` will look at on the evaluate split, written down before it is opened.

    Attributes:
        targets: skills or clusters, in order.
        limits: bounds asked for.
        budget: of every fit.
        span: where edits may lie.
        evaluate_tokens: fingerprint of the split.
    """

    targets: tuple[str, ...]
    limits: Limits
    budget: Budget
    span: str
    evaluate_tokens: str


@dataclass(frozen=True, kw_only=True)
class Removal(Judgement):
    """One removal as the result file and the report have it; the judgement is of the evaluate split.

    Attributes:
        skill: what was removed.
        span: kind of span.
        rank: its coordinates.
        norm: length of the movement.
        dose: chosen on select.
        setting: chosen on select.
        passes: sequences through the model.
        together: what the edit of all skills does to this one, where several were removed.
    """

    skill: str
    span: str
    rank: int
    norm: float
    dose: float
    setting: FitSettings
    passes: float
    together: Judgement | None = None

    @classmethod
    def of(cls, result: RemovalResult, together: Judgement | None) -> Removal:
        """Of a judged result."""
        assert result.judged is not None
        return cls(
            **vars(result.judged),
            skill=result.skill,
            span=result.span,
            rank=result.rank,
            norm=result.edit.norm,
            dose=result.dose,
            setting=result.setting,
            passes=result.passes,
            together=together,
        )


@dataclass(frozen=True)
class RemovalFile:
    """``edits/NAME.result.json``.

    Attributes:
        removals: in order.
        plan: written before the evaluate split was opened.
        exploratory: whether another plan had opened the split before.
        missed: sentences, one for every bound that was asked for and not met.
        versions: of packages.
        hardware: of the machine.
        seed: of the run.
    """

    removals: tuple[Removal, ...]
    plan: RemovalPlan
    exploratory: bool
    missed: tuple[str, ...]
    versions: Mapping[str, str]
    hardware: Mapping[str, object]
    seed: int


def logits_of(run: Run) -> LogitFunction:
    """The task's logits.

    Raises:
        ValueError: for a task without.
    """
    if run.task.logits is None:
        raise ValueError(
            f"removal measures accuracy and KL, task '{run.task.name}' gives no logits; return 'logits' in "
            "its TaskDefinition"
        )
    return run.task.logits


def removed(
    run: Run, rules: Sequence[GroupRule], plan: RemovalPlan, span: Span
) -> tuple[Edit, list[Removal]]:
    """Every target removed in order and judged on the evaluate split, which the caller has opened."""
    logits = logits_of(run)
    splits, batch = run.task.splits, fit_stream(run, plan.budget.sequences)
    split = EvaluatedSplit(run.objective, run.checkpoints(), splits.select)

    def one(place: EvaluatedSplit, rule: GroupRule) -> RemovalResult:
        return remove_skill(
            place,
            rule,
            span,
            logits=logits,
            batch=batch,
            limits=plan.limits,
            budget=plan.budget,
            unseen=splits.evaluate,
        )

    edit, results = remove_in_order(split, rules, one)
    predictor = Predictor(run.objective, logits)
    together = [
        judged_edit(RemovalProblem(GroupedSplit(split, predictor, rule), batch), edit, splits.evaluate)
        if len(rules) > 1
        else None
        for rule in rules
    ]
    return edit, [Removal.of(*pair) for pair in zip(results, together, strict=True)]


def remove(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    skill: Annotated[
        list[str] | None, typer.Option(help="Skill by name; several are removed in order.")
    ] = None,
    cluster: Annotated[str | None, typer.Option(help="BASIS:VECTOR:CLUSTER instead of a skill.")] = None,
    budget: Annotated[str, typer.Option(help="small, medium or large.")] = "medium",
    basis: Annotated[
        str | None,
        typer.Option(help="Search this basis's span only (default: all recorded movement)."),
    ] = None,
    window: Annotated[str | None, typer.Option(help="Search the movement of steps START:END only.")] = None,
    groups: Annotated[
        Path | None, typer.Option(help="Token groups: .npz or JSON, name -> booleans over the select tokens.")
    ] = None,
    target: Annotated[float, typer.Option(min=0.0, max=1.0, help="Damage wanted, share of headroom.")] = 0.99,
    off: Annotated[float, typer.Option(min=0.0, help="Damage allowed to any other group.")] = 0.005,
    kl: Annotated[float, typer.Option(min=0.0, help="KL to the original allowed, nats.")] = 0.05,
    out: Annotated[Path | None, typer.Option(help="Edit file (default RUN/edits/NAME).")] = None,
) -> None:
    """Find an edit that removes one skill, and judge it on the evaluate split.

    The edit is written in any case; where it misses a bound, the command says which and ends with 1.
    """
    if bool(skill) == (cluster is not None):
        raise ValueError("give either --skill NAME or --cluster BASIS:VECTOR:CLUSTER")
    if budget not in BUDGETS:
        raise ValueError(f"--budget must be one of {', '.join(BUDGETS)}, got '{budget}'")
    if basis is not None and window is not None:
        raise ValueError("--basis and --window both say where to search, got both; give one of them")
    opened = with_groups(load_run(run), groups, typer.echo)
    logits_of(opened)
    if cluster is not None:
        rules = [cluster_groups(opened, cluster)]
    else:
        rules = [skill_groups(opened, name) for name in skill or []]
    names = tuple(rule.skill for rule in rules)
    span, tokens = edit_span(opened, basis, parse_window(window)), opened.task.splits.evaluate.fingerprint()
    plan = RemovalPlan(names, Limits(target, off, kl), BUDGETS[budget], span.kind, tokens)
    path = out or run / "edits" / "+".join(n.replace(":", "-").replace("@", "-at-") for n in names)
    with existing(run):
        opening = open_evaluate(opened, plan, by="remove")
        edit, removals = removed(opened, rules, plan, span)
        record = _written(opened, path, edit, removals, plan, opening.exploratory)
        if path.parent == run / "edits" and (run / "summary.json").exists():
            write_report(opened.directory, lambda _: None)
    if record.missed:
        for sentence in record.missed:
            typer.echo(f"polca-edit: {sentence}", err=True)
        raise typer.Exit(1)


def _written(
    run: Run, path: Path, edit: Edit, removals: Sequence[Removal], plan: RemovalPlan, exploratory: bool
) -> RemovalFile:
    """Write the edit and its result file, and say what it does."""
    sentences = tuple(
        sentence
        for removal in removals
        for sentence in missed_bounds(removal.skill, removal.together or removal, plan.limits)
    )
    edit = replace(edit, provenance={**edit.provenance, "results": to_plain(removals)})
    written = save_edit(path, edit, run.task.space)
    record = RemovalFile(
        tuple(removals), plan, exploratory, sentences, versions(), hardware(), run.config.seed
    )
    write_json(written.with_suffix(".result.json"), to_plain(record))
    for removal in removals:
        typer.echo(
            f"{removal.skill}: target {removal.target_share:.1%} of headroom, worst other group "
            f"{removal.worst_off_share:+.2%}, accuracy {removal.accuracy:.1%} (chance "
            f"{removal.refit.chance:.1%}), {removal.refit.kept:.0%} of the damage stays after a refit"
        )
    typer.echo(f"Edit: {written}")
    return record
