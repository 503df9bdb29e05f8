"""Verbs ``discover`` and ``axis``."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.application import console, say

if TYPE_CHECKING:
    from experiments.discover.records import AxisRow, DiscoverSettings
    from experiments.run.run import Run

Window = Annotated[str | None, typer.Option(help="Undo the movement of steps START:END only.")]
Groups = Annotated[
    Path | None, typer.Option(help="Token groups: .npz or JSON, name -> booleans over the select tokens.")
]
Json = Annotated[str | None, typer.Option("--json", help="Write the result to FILE, or - .")]
Unseen = Annotated[int | None, typer.Option(help="Sequences drawn anew; 0: the evaluate split.")]


def discover(
    directory: Annotated[Path, typer.Argument(help="A run directory.")],
    basis: Annotated[list[str] | None, typer.Option(help="Span of the axes; repeat. Default: all.")] = None,
    unseen: Unseen = None,
    nulls: Annotated[int, typer.Option(help="Random token sets that get the same search.")] = 39,
    window: Window = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default one per core.")] = None,
    json_: Json = None,
) -> None:
    """Find skills by what undoing training does: timeline, clusters without labels, axes.

    Examples: `polca-edit discover runs/demo` · `polca-edit discover runs/demo --basis hessian --json -`
    """
    from experiments.config import parse_window
    from experiments.discover.discover import discover as run_discovery
    from experiments.discover.records import DiscoverSettings
    from experiments.report.chapters.discovery import print_discovery
    from experiments.run.guard import existing
    from experiments.run.run import load_run

    run = load_run(directory, say)
    labels = tuple(basis or [spec.label for spec in run.config.measured_bases()])
    settings = DiscoverSettings(
        labels, _unseen(run.task.unseen is not None, unseen), nulls=nulls, window=parse_window(window)
    )
    with existing(directory):
        result = run_discovery(run, settings, workers=workers or min(os.cpu_count() or 1, len(labels)))
    if not _written(result, json_):
        print_discovery(result, console)
        say(f"Result: {directory / 'discovery.json'}; next: polca-edit report {directory}")


def axis(
    directory: Annotated[Path, typer.Argument(help="A run directory.")],
    target: Annotated[str, typer.Option(help="Skill, or 'found N' for an interventional cluster.")],
    basis: Annotated[list[str] | None, typer.Option(help="Span; repeat. Default: all.")] = None,
    rank: Annotated[int, typer.Option(help="Axes, each orthogonal to those before it.")] = 1,
    limit: Annotated[float | None, typer.Option(help="Share that another group may lose at most.")] = None,
    refine: Annotated[int, typer.Option(help="Steps on the true losses.")] = 60,
    unseen: Unseen = None,
    nulls: Annotated[int, typer.Option(help="Random token sets that get the same search.")] = 39,
    window: Window = None,
    groups: Groups = None,
    json_: Json = None,
) -> None:
    """Search the axis whose own undone movement takes one group, and save it as an edit.

    Examples: `polca-edit axis runs/demo --target 10s --basis hessian` ·
    `polca-edit axis runs/demo --target carry@10s --window 600:720`
    """
    from experiments.config import parse_window
    from experiments.discover.records import DiscoverSettings
    from experiments.report.chapters.discovery import print_axes
    from experiments.run.groups import with_groups
    from experiments.run.guard import existing
    from experiments.run.run import load_run
    from interventions.discovery.axes import AxisSettings

    run = with_groups(load_run(directory, say), groups, say)
    labels = tuple(basis or [spec.label for spec in run.config.measured_bases()])
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
    with existing(directory):
        rows = _axes(run, settings, target)
    if not _written(rows, json_, key="axes"):
        print_axes(rows, console)


def _axes(run: Run, settings: DiscoverSettings, target: str) -> list[AxisRow]:
    """The rows of one target's axis in every span; each axis is saved as an edit."""
    from experiments.discover.axes import axis_basis, measure_span
    from experiments.discover.records import DiscoverPlan
    from experiments.run.driver import run_stages
    from experiments.run.keys import discovery_stages, signature_names, window_suffix
    from experiments.run.run_record import open_evaluate
    from experiments.verdicts.choose import split_of, unseen_tokens
    from interventions.edit_files import save_edit
    from interventions.edits import project_out

    directory = run.directory.path
    run_stages(run, stages=discovery_stages(run.config, settings.window))
    upstream = {n: run.key(f"signatures:{n}") for n in signature_names(run.config, settings.window)}
    tokens = unseen_tokens(run, settings.unseen).fingerprint()
    open_evaluate(run, DiscoverPlan(settings, tokens, upstream), by="axis")
    rows = []
    for label in settings.bases:
        record = measure_span(directory, label, settings, None)
        for name, why in record.skipped.items():
            raise ValueError(f"'{name}' has no axis in basis '{label}': {why}; take another target")
        rows += [found.row for found in record.axes]
        split = split_of(run, run.task.splits.select, settings.window)
        edit = project_out(split, axis_basis(run, label, record, target), axis=target, basis=label)
        named = target.replace(" ", "-").replace("@", "-")
        file = directory / "edits" / f"axis-{label}-{named}{window_suffix(settings.window)}"
        say(f"Edit: {save_edit(file, edit, run.task.space)}")
    return rows


def blocking(
    directory: Annotated[Path, typer.Argument(help="A run directory with axes (verb discover).")],
    target: Annotated[list[str], typer.Option(help="Skill whose axis is held still; repeat.")],
    basis: Annotated[str, typer.Option(help="Span of the axes.")] = "hessian",
    branches: Annotated[int, typer.Option(help="Data orders; every arm is trained on each.")] = 10,
    workers: Annotated[int | None, typer.Option(help="Processes; default one per core.")] = None,
    json_: Json = None,
) -> None:
    """Train again with axes, or the whole span, held still: does learning need them? Resumable.

    Example: `polca-edit blocking runs/demo --target 10s --target 1s --branches 10`
    """
    from experiments.discover.blocking import BlockingSettings, blocking_study
    from experiments.report.chapters.discovery import print_blocking
    from experiments.run.guard import existing
    from experiments.run.run import load_run

    run = load_run(directory, say)
    settings = BlockingSettings(basis, tuple(target), branches)
    with existing(directory):
        result = blocking_study(run, settings, workers=workers or (os.cpu_count() or 1))
    if not _written(result, json_):
        print_blocking(result, console)
        say(f"Result: {directory / 'blocking.json'}")


def _unseen(can_draw: bool, asked: int | None) -> int:
    return asked if asked is not None else (1000 if can_draw else 0)


def _written(result: object, target: str | None, key: str | None = None) -> bool:
    """Whether the result went to a file or to standard output as JSON."""
    from polca_edit.artifacts import to_plain
    from polca_edit.checkpoints.files import write_json

    if target is None:
        return False
    values = to_plain(result) if key is None else {key: to_plain(result)}
    if target == "-":
        typer.echo(json.dumps(values, indent=1, sort_keys=True))
    else:
        write_json(Path(target), values)
    return True
