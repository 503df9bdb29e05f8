"""Verbs ``discover`` and ``axis``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.application import console, json_result, say, then, would
from experiments.verbs.options import (
    Bases,
    Directory,
    DryRun,
    Groups,
    Json,
    Nulls,
    Unseen,
    Window,
    Workers,
    finite,
)

if TYPE_CHECKING:
    from experiments.discover.records import AxisRow, DiscoverSettings
    from experiments.run.run import Run


def discover(
    directory: Directory,
    basis: Bases = None,
    unseen: Unseen = None,
    nulls: Nulls = 39,
    window: Window = None,
    workers: Workers = None,
    dry_run: DryRun = False,
    json_: Json = None,
) -> None:
    """Find skills by what undoing training does: timeline, clusters without labels, axes."""
    from experiments.config import parse_window
    from experiments.discover.discover import discover as run_discovery
    from experiments.discover.records import DiscoverSettings
    from experiments.report.chapters.discovery import print_discovery
    from experiments.run.run import load_run
    from experiments.verbs.guard import existing
    from experiments.verdicts.choose import unseen_tokens

    run = load_run(directory, say)
    labels = _bases(run, basis)
    settings = DiscoverSettings(
        labels, _unseen(run.task.unseen is not None, unseen), nulls=nulls, window=parse_window(window)
    )
    run.require_bases(labels)
    run.observed(settings.window)
    if dry_run:
        unseen_tokens(run, settings.unseen)
        return would(
            f"{directory}: would find axes in {', '.join(labels)}, with {nulls} null searches each", json_
        )
    with existing(directory):
        result = run_discovery(run, settings, workers=workers or min(os.cpu_count() or 1, len(labels)))
    if not json_result(result, json_):
        print_discovery(result, console)
    say(f"Result: {directory / 'discovery.json'}")
    then("test", directory)


def axis(
    directory: Directory,
    target: Annotated[str, typer.Option(help="Skill, or 'found N' for an interventional cluster.")],
    basis: Bases = None,
    rank: Annotated[int, typer.Option(min=1, help="Axes, each orthogonal to those before it.")] = 1,
    limit: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, callback=finite, help="Share that another group may lose at most."),
    ] = None,
    refine: Annotated[int, typer.Option(min=0, max=10**5, help="Steps on the true losses.")] = 60,
    unseen: Unseen = None,
    nulls: Nulls = 39,
    window: Window = None,
    groups: Groups = None,
    dry_run: DryRun = False,
    json_: Json = None,
) -> None:
    """Search the axis whose own undone movement takes one group, and save it as an edit."""
    from experiments.config import parse_window
    from experiments.discover.records import DiscoverSettings
    from experiments.discover.targets import require_target
    from experiments.report.chapters.discovery import print_axes
    from experiments.run.run import load_run
    from experiments.verbs.groups import with_groups
    from experiments.verbs.guard import existing
    from experiments.verdicts.choose import unseen_tokens
    from interventions.discovery.axes import AxisSettings

    run = with_groups(load_run(directory, say), groups, say)
    labels = _bases(run, basis)
    settings = DiscoverSettings(
        labels,
        _unseen(run.task.unseen is not None, unseen),
        nulls=nulls,
        window=parse_window(window),
        groups=None if groups is None else str(groups.absolute()),
    )
    searched = replace(settings.axis, refine=refine, rank=rank, limit=limit)
    assert isinstance(searched, AxisSettings)
    settings = replace(settings, axis=searched, targets=(target,))
    run.require_bases(labels)
    run.observed(settings.window)
    if settings.window is None:
        require_target(run, target)
    if dry_run:
        unseen_tokens(run, settings.unseen)
        return would(f"{directory}: would search the axis of '{target}' in {', '.join(labels)}", json_)
    with existing(directory):
        rows, edits = _axes(run, settings, target)
    if not json_result({"axes": rows, "edits": [str(path) for path in edits]}, json_):
        print_axes(rows, console)
    then("apply", edits[0], run.directory.last_weights or "MODEL", "--out", "edited")


def _axes(run: Run, settings: DiscoverSettings, target: str) -> tuple[list[AxisRow], list[Path]]:
    """The rows of one target's axis in every span, and the edits as which the axes are saved."""
    from experiments.discover.axes import axis_basis, measure_span
    from experiments.discover.records import DiscoverPlan
    from experiments.run.driver import run_stages
    from experiments.run.keys import discovery_stages, signature_names, window_suffix
    from experiments.run.run_record import open_evaluate
    from experiments.verdicts.choose import split_of, unseen_tokens
    from interventions.edit_files import save_edit
    from interventions.edits import project_out

    directory = run.directory.path
    run_stages(run, stages=discovery_stages(run.config, settings.window, settings.bases))
    upstream = {
        n: run.key(f"signatures:{n}") for n in signature_names(run.config, settings.window, settings.bases)
    }
    tokens = unseen_tokens(run, settings.unseen).fingerprint()
    open_evaluate(run, DiscoverPlan(settings, tokens, upstream), by="axis")
    rows, edits = [], []
    for label in settings.bases:
        record = measure_span(directory, label, settings, None)
        for name, why in record.skipped.items():
            raise ValueError(f"'{name}' has no axis in basis '{label}': {why}; take another target")
        rows += [found.row for found in record.axes]
        split = split_of(run, run.task.splits.select, settings.window)
        edit = project_out(split, axis_basis(run, label, record, target), axis=target, basis=label)
        named = target.replace(" ", "-").replace("@", "-")
        file = directory / "edits" / f"axis-{label}-{named}{window_suffix(settings.window)}"
        edits.append(save_edit(file, edit, run.task.space))
        say(f"Edit: {edits[-1]}")
    return rows, edits


def blocking(
    directory: Directory,
    target: Annotated[list[str], typer.Option(help="Skill whose axis is held still; repeat.")],
    basis: Annotated[str, typer.Option(help="Span of the axes.")] = "hessian",
    branches: Annotated[int, typer.Option(help="Data orders; every arm is trained on each.")] = 10,
    begin: Annotated[
        str, typer.Option(help="Held from the start, from just before the skill's window, or both.")
    ] = "both",
    workers: Workers = None,
    json_: Json = None,
) -> None:
    """Train again with axes of verb discover, or the whole span, held still: does learning need them?

    A study that was stopped goes on where it was.
    """
    from experiments.discover.blocking import BlockingSettings, blocking_study
    from experiments.discover.targets import require_target
    from experiments.report.chapters.discovery import blocking_table, print_blocking
    from experiments.run.run import load_run
    from experiments.study.results import publish
    from experiments.verbs.guard import existing

    run = load_run(directory, say)
    settings = BlockingSettings(basis, tuple(dict.fromkeys(target)), branches, begin=begin)
    run.require_bases([basis])
    for name in settings.targets:
        require_target(run, name)
    with existing(directory):
        result = blocking_study(run, settings, workers=workers or (os.cpu_count() or 1))
    if json_ is not None:
        publish(Path(json_), "blocking/2", run.config, [run.config.seed], result, [blocking_table(result)])
    if json_ != "-":
        print_blocking(result, console)
    say(f"Result: {directory / 'blocking.json'}")
    then("report", directory)


def _bases(run: Run, asked: list[str] | None) -> tuple[str, ...]:
    """Bases by name, each once."""
    return tuple(dict.fromkeys(asked or [spec.label for spec in run.config.measured_bases()]))


def _unseen(can_draw: bool, asked: int | None) -> int:
    return asked if asked is not None else (1000 if can_draw else 0)
