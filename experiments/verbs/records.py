"""Verbs that read a finished run: ``report``, ``inspect`` and ``label``."""

from __future__ import annotations

from typing import Annotated

import typer

from experiments.application import console, json_result, say, then
from experiments.verbs.options import Directory, Json


def report(directory: Directory, json_: Json = None) -> None:
    """Draw report.html and the figures again from a run's records; no model is needed."""
    from experiments.report.page import write_report
    from experiments.run.store import RunDirectory
    from experiments.verbs.guard import existing

    with existing(directory):
        RunDirectory(directory).require_whole()
        page = write_report(RunDirectory(directory), say)
    json_result({"report": str(page)}, json_)
    say(f"Report: {page}")
    then("inspect" if (directory / "verdicts.json").exists() else "test", directory)


def inspect(directory: Directory, json_: Json = None) -> None:
    """Print what a finished run found; as JSON, its summary.json."""
    from experiments.report.answers import print_summary
    from experiments.run.store import RunDirectory
    from experiments.run.summary.write import summary_values
    from experiments.verbs.guard import check

    check(directory)
    if not json_result(summary_values(directory), json_):
        print_summary(RunDirectory(directory), console)
    then("report" if (directory / "verdicts.json").exists() else "test", directory)


def label(
    directory: Directory,
    transfer: Annotated[
        str | None,
        typer.Option(help="Another text: do the labels hold there? (labels/transfer.json)"),
    ] = None,
    sequences: Annotated[int, typer.Option(min=4, help="Sequences of that text.")] = 32,
    json_: Json = None,
) -> None:
    """Label the clusters of a run from what their tokens share, and draw the report again."""
    from experiments.report.labels import print_labels, transferred_table
    from experiments.report.page import write_report
    from experiments.run.run import load_run
    from experiments.run.stages.labels import transferred_labels, write_labels
    from experiments.run.summary.write import write_summary
    from experiments.tasks.text import transfer_tokens
    from experiments.verbs.guard import existing
    from polca_edit.artifacts import to_plain
    from polca_edit.checkpoints.files import write_json

    run = load_run(directory)
    if transfer is not None:
        other = transfer_tokens(run.config, transfer, sequences, run.task.tokenizer)
        rows = [row for b in run.config.bases for row in transferred_labels(run, b.label, other)]
        found = {"text": transfer, "rows": to_plain(rows)}
        with existing(directory):
            write_json(run.directory.path / "labels" / "transfer.json", found)
        if not json_result(found, json_):
            console.print(transferred_table(rows).terminal())
        then("inspect", directory)
        return
    with existing(directory):
        labels = write_labels(run)
        write_summary(run)
        page = write_report(run.directory, say)
    if not json_result(labels, json_):
        print_labels(labels, console)
    say(f"Report: {page}")
    then("inspect", directory)
