"""Verbs that read a finished run: ``report``, ``inspect`` and ``label``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from experiments.application import console, say


def report(directory: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Draw report.html and the figures again from a run's records; no model is needed.

    Example: `polca-edit report runs/demo`
    """
    from experiments.report.page import write_report
    from experiments.run.guard import existing
    from experiments.run.store import RunDirectory

    with existing(directory):
        RunDirectory(directory).require_whole()
        say(f"Report: {write_report(RunDirectory(directory), say)}")


def inspect(
    directory: Annotated[Path, typer.Argument(help="A run directory.")],
    json_: Annotated[bool, typer.Option("--json", help="Print summary.json as it is.")] = False,
) -> None:
    """Print what a finished run found.

    Example: `polca-edit inspect runs/demo --json | jq .cost`
    """
    from experiments.report.answers import print_summary
    from experiments.run.guard import check
    from experiments.run.store import RunDirectory
    from experiments.run.summary.write import summary_values

    check(directory)
    if json_:
        typer.echo(json.dumps(summary_values(directory), indent=1, sort_keys=True))
    else:
        print_summary(RunDirectory(directory), console)


def label(
    directory: Annotated[Path, typer.Argument(help="A finished run.")],
    transfer: Annotated[
        str | None,
        typer.Option(help="Another text: do the labels hold there? (labels/transfer.json)"),
    ] = None,
    sequences: Annotated[int, typer.Option(min=4, help="Sequences of that text.")] = 32,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Label the clusters of a run from what their tokens share, and draw the report again.

    Examples: `polca-edit label runs/english-demo` ·
    `polca-edit label runs/english-demo --transfer wikitext2/valid.txt`
    """
    from experiments.report.labels import print_labels, transferred_table
    from experiments.report.page import write_report
    from experiments.run.guard import existing
    from experiments.run.labels import transferred_labels, write_labels
    from experiments.run.run import load_run
    from experiments.run.summary.write import write_summary
    from experiments.tasks.text import transfer_tokens
    from polca_edit.artifacts import to_plain
    from polca_edit.checkpoints.files import write_json

    run = load_run(directory)
    if transfer is not None:
        other = transfer_tokens(run.config, transfer, sequences, run.task.tokenizer)
        rows = [row for b in run.config.bases for row in transferred_labels(run, b.label, other)]
        found = {"text": transfer, "rows": to_plain(rows)}
        with existing(directory):
            write_json(run.directory.path / "labels" / "transfer.json", found)
        console.print(transferred_table(rows).terminal())
        return
    with existing(directory):
        labels = write_labels(run)
        write_summary(run)
        page = write_report(run.directory, typer.echo)
    if json_:
        typer.echo(json.dumps(to_plain(labels), indent=1, sort_keys=True))
    else:
        print_labels(labels, console)
        typer.echo(f"Report: {page}")
