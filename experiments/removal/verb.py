"""``polca-edit remove``: an edit inside recorded movement that takes one skill or cluster out of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from experiments.application import json_result, say, then, would
from experiments.config import parse_window
from experiments.removal.undo.records import Removal, RemovalFile, RemovalPlan
from experiments.removal.undo.remove import (
    UndoOptions,
    adapted,
    axis_undo,
    repair_batches,
    returned,
    said_first,
    told,
    training_rate,
    undo_of,
    with_timeline,
)
from experiments.report.page import write_report
from experiments.run.machine import hardware, versions
from experiments.run.run import Run, load_run
from experiments.run.run_record import open_evaluate
from experiments.verbs.groups import with_groups
from experiments.verbs.guard import existing
from experiments.verbs.options import DryRun, Groups, Json, bound
from experiments.verbs.targets import cluster_groups, edit_span, fit_stream, skill_groups
from interventions.damage import EvaluatedSplit
from interventions.edit_files import save_edit
from interventions.edits import Edit
from interventions.removal.grouped import (
    GroupedSplit,
    GroupRule,
    LogitFunction,
    Predictor,
)
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
    Span,
)
from interventions.removal.undo import UNDO_LIMITS, Undo
from polca_edit.artifacts import to_plain
from polca_edit.checkpoints.files import write_json
from polca_edit.tokens import TokenSet

Batches = Callable[[int], TokenSet]
#: Sequences of a repair batch.
REPAIR_SEQUENCES = 64

# -- removing ----------------------------------------------------------------------------------------


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
    run: Run, rules: Sequence[GroupRule], plan: RemovalPlan, how: Span | Undo, batch: Batches | None
) -> tuple[Edit, list[Removal]]:
    """Every target removed in order and judged on the evaluate split, which the caller has opened."""
    logits, splits = logits_of(run), run.task.splits
    split = EvaluatedSplit(run.objective, run.checkpoints(), splits.select)

    def one(place: EvaluatedSplit, rule: GroupRule) -> RemovalResult:
        return remove_skill(
            place,
            rule,
            how,
            logits=logits,
            batch=batch,
            limits=plan.limits,
            budget=plan.budget,
            unseen=splits.evaluate,
        )

    edit, results = remove_in_order(split, rules, one)
    if len(results) == 1:  # with its own provenance
        edit = results[0].edit
    predictor = Predictor(run.objective, logits)
    fits = batch or fit_stream(run, plan.budget.sequences)
    together = [
        judged_edit(RemovalProblem(GroupedSplit(split, predictor, rule), fits), edit, splits.evaluate)
        if len(rules) > 1
        else None
        for rule in rules
    ]
    return edit, [Removal.of(*pair) for pair in zip(results, together, strict=True)]


def _how(
    run: Run,
    rules: Sequence[GroupRule],
    options: UndoOptions,
    budget: Budget,
    basis: str | None,
    limits: Limits,
) -> tuple[Span | Undo, Batches | None]:
    """Where an edit may lie or what is undone, and its batches; what undoing costs is said first."""
    run.require_bases([basis] if basis is not None else [])
    fits = fit_stream(run, budget.sequences)
    if options.method == "span":
        if len(options.windows) > 1 or (basis is not None and options.windows):
            raise ValueError("--basis and --window both say where to search, got several; give one of them")
        return edit_span(run, basis, parse_window(next(iter(options.windows), None))), fits
    if len(rules) > 1:
        raise ValueError(
            f"--method {options.method} takes out one skill at a time, got {len(rules)}; give one --skill"
        )
    (rule,) = rules
    undo = undo_of(run, options)
    batch = repair_batches(run, rule, fits, REPAIR_SEQUENCES)
    if options.method == "axis":
        undo = axis_undo(run, rule, logits_of(run), undo, basis)
    undo = with_timeline(run, rule, logits_of(run), undo, limits)
    for sentence in said_first(run, rule, logits_of(run), undo, data=batch is not None):
        say(f"  {sentence}")
    return undo, batch


def _afterwards(
    run: Run,
    rule: GroupRule,
    edit: Edit,
    removal: Removal,
    how: Undo,
    batch: Batches | None,
    options: UndoOptions,
) -> Removal:
    """The result with an attack and an adapter measured, where they were asked for and can be."""
    split = EvaluatedSplit(run.objective, run.checkpoints(), run.task.splits.evaluate)
    judged = GroupedSplit(split, Predictor(run.objective, logits_of(run)), rule)
    back = None
    if options.relearn and batch is not None:
        back = returned(judged, edit, batch, how, options.relearn, training_rate(run))
    elif options.relearn:
        say("  relearning is not measured: only held-out tokens are labelled, there is nothing to train on")
    held = adapted(run, judged, edit, options.lora)[1] if options.lora else None
    return replace(removal, returned=back, adapter=held)


def remove(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    skill: Annotated[
        list[str] | None, typer.Option(help="Skill by name; several are removed in order.")
    ] = None,
    cluster: Annotated[str | None, typer.Option(help="BASIS:VECTOR:CLUSTER, or 'found N', instead.")] = None,
    budget: Annotated[str, typer.Option(help="small, medium or large.")] = "medium",
    basis: Annotated[
        str | None,
        typer.Option(help="Search this basis's span only (default: all recorded movement)."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="span (a fit), or undo training: return, rollback, axis.")
    ] = "span",
    window: Annotated[
        list[str] | None,
        typer.Option(help="Steps START:END to search or undo; undone windows are chosen by default."),
    ] = None,
    repair: Annotated[
        int | None,
        typer.Option(min=0, help="Training steps without the skill after undoing (a tenth of training's)."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare windows by short probes instead of by the rule.")
    ] = False,
    relearn: Annotated[int, typer.Option(min=0, help="Steps of an attack that is measured.")] = 0,
    lora: Annotated[int | None, typer.Option(min=1, help="Measure the edit's part of this rank.")] = None,
    target: Annotated[float | None, bound("Damage wanted, share of headroom (.99; undoing .9).", 1)] = None,
    off: Annotated[float | None, bound("Damage allowed to any other group (.005; undoing .02).")] = None,
    kl: Annotated[float | None, bound("KL to the original allowed, nats (.05; undoing 1).")] = None,
    groups: Groups = None,
    out: Annotated[Path | None, typer.Option(help="Edit file (default RUN/edits/NAME).")] = None,
    dry_run: DryRun = False,
    json_: Json = None,
) -> None:
    """Find an edit that removes one skill, and judge it on the evaluate split.

    The edit is written in any case; where it misses a bound, the command says which and ends with 1.
    """
    options = UndoOptions(method, tuple(window or ()), repair, relearn, lora, compare)
    chosen, limits = _budget(budget), _limits(method, target, off, kl)
    opened = with_groups(load_run(run), groups, say)
    logits_of(opened)
    rules = _rules(opened, skill or [], cluster)
    how, batch = _how(opened, rules, options, chosen, basis, limits)
    names = tuple(rule.skill for rule in rules)
    plan = _plan(opened, names, limits, chosen, how, options)
    path = out or run / "edits" / _file_name(names)
    if dry_run:
        by = f"{method} ({budget})" if isinstance(how, Span) else method
        return would(f"{path}: would take out {', '.join(names)} by {by}, judged on evaluate", json_)
    with existing(run):
        opening = open_evaluate(opened, plan, by="remove")
        edit, removals = removed(opened, rules, plan, how, batch)
        if isinstance(how, Undo):
            removals = [_afterwards(opened, rules[0], edit, removals[0], how, batch, options)]
        record = _written(opened, path, edit, removals, plan, opening.exploratory)
        _reported(opened, path)
    json_result(record, json_)
    _ended(opened, path, record)


def _ended(run: Run, path: Path, record: RemovalFile) -> None:
    """The next command; a bound that was missed is said, and ends the verb with 1."""
    then("apply", path.with_suffix(".json"), run.directory.last_weights or "MODEL", "--out", "edited")
    for sentence in record.missed:
        typer.echo(f"polca-edit: {sentence}", err=True)
    if record.missed:
        raise typer.Exit(1)


def _reported(run: Run, path: Path) -> None:
    """The run's report with the edit in it, where the edit lies in the run."""
    place = run.directory.path
    if path.parent == place / "edits" and (place / "summary.json").exists():
        write_report(run.directory, lambda _: None)


def _budget(name: str) -> Budget:
    if name not in BUDGETS:
        raise ValueError(f"--budget must be one of {', '.join(BUDGETS)}, got '{name}'")
    return BUDGETS[name]


def _file_name(names: Sequence[str]) -> str:
    """A skill or cluster by a name that files may have; several joined by ``+``."""
    return "+".join(name.replace(":", "-").replace("@", "-at-").replace(" ", "-") for name in names)


def _rules(run: Run, skills: Sequence[str], cluster: str | None) -> list[GroupRule]:
    """Groups of what was asked for."""
    if bool(skills) == (cluster is not None):
        raise ValueError("give either --skill NAME or --cluster CLUSTER")
    if cluster is not None:
        return [cluster_groups(run, cluster)]
    return [skill_groups(run, name) for name in dict.fromkeys(skills)]


def _limits(method: str, target: float | None, off: float | None, kl: float | None) -> Limits:
    """Bounds that were asked for, else those of the method."""
    usual = Limits() if method == "span" else UNDO_LIMITS
    return Limits(
        usual.target if target is None else target,
        usual.off if off is None else off,
        usual.kl if kl is None else kl,
    )


def _plan(
    run: Run, names: tuple[str, ...], limits: Limits, budget: Budget, how: Span | Undo, options: UndoOptions
) -> RemovalPlan:
    tokens = run.task.splits.evaluate.fingerprint()
    if isinstance(how, Span):
        return RemovalPlan(names, limits, budget, how.kind, tokens)
    windows = tuple(str(window) for window in how.windows)
    return RemovalPlan(
        names, limits, budget, "recorded movement", tokens, options.method, windows, how.training.steps
    )


def _written(
    run: Run, path: Path, edit: Edit, removals: Sequence[Removal], plan: RemovalPlan, exploratory: bool
) -> RemovalFile:
    """Write the edit and its result file, and say what it does."""
    sentences = tuple(
        sentence
        for removal in removals
        for sentence in missed_bounds(
            removal.skill, removal.together or removal, plan.limits, undone=removal.undone is not None
        )
    )
    edit = replace(edit, provenance={**edit.provenance, "results": to_plain(removals)})
    written = save_edit(path, edit, run.task.space)
    record = RemovalFile(
        tuple(removals), plan, exploratory, sentences, versions(), hardware(), run.config.seed
    )
    write_json(written.with_suffix(".result.json"), to_plain(record))
    for removal in removals:
        for sentence in told(removal.undone, removal.returned, removal.adapter):
            say(f"  {sentence}")
        say(
            f"{removal.skill}: target {removal.target_share:.1%} of headroom, worst other group "
            f"{removal.worst_off_share:+.2%}, accuracy {removal.accuracy:.1%} (chance "
            f"{removal.refit.chance:.1%}), {removal.refit.kept:.0%} of the damage stays after a refit"
        )
    say(f"Edit: {written}")
    return record
