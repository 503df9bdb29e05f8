"""Verb ``test``: the causal test of one run, or of several seeds together."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from experiments.application import console, say


def causal_test(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, several seeds of one config.")],
    basis: Annotated[list[str] | None, typer.Option(help="Basis to test; repeat. Default: all.")] = None,
    unseen: Annotated[int | None, typer.Option(help="Sequences drawn anew; 0: the evaluate split.")] = None,
    window: Annotated[str | None, typer.Option(help="Undo the movement of steps START:END only.")] = None,
    groups: Annotated[
        Path | None, typer.Option(help="Token groups: .npz or JSON, name -> booleans over the select tokens.")
    ] = None,
    rotations: Annotated[int, typer.Option(min=20, help="Rotations of each span (S, P).")] = 39,
    draws: Annotated[int, typer.Option(help="Random edits per movement (N).")] = 39,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes; default one per core.")] = None,
    json_: Annotated[str | None, typer.Option("--json", help="Write the result to FILE, or - .")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of a study over several runs.")] = None,
) -> None:
    """Does the model need each movement for its tokens (N), and for them only (S)? One row per pair.

    Pairs are fixed on the select split: POLCA's own clusters, and every known skill with the vector that
    costs it most there. They are tested on tokens that nothing has used. A word per row: inert, shared,
    selective, carrier (the movement inserted alone brings the skill), unclear.

    Examples: `polca-edit test runs/demo` ·
    `polca-edit test runs/demo runs/demo-1 --basis hessian --out studies/demo --json -`
    """
    from experiments.config import parse_window
    from experiments.report.chapters.verdicts import print_verdicts
    from experiments.run.groups import with_groups
    from experiments.run.guard import existing
    from experiments.run.run import load_run
    from experiments.run.summary.records import TestedFile
    from experiments.run.summary.write import write_summary
    from experiments.verdicts.study import StudySettings, run_study, write_result
    from interventions.causal.settings import TestSettings
    from polca_edit.artifacts import from_plain, save_record, to_plain

    if len(runs) > 1 and out is None:
        raise ValueError("a study of several runs needs a folder of its own; pass --out studies/NAME")
    if groups is not None and len(runs) > 1:
        raise ValueError("--groups belong to the tokens of one run, got several runs; test them one by one")
    first = with_groups(load_run(runs[0], say=lambda _: None), groups)
    labels = tuple(basis or [spec.label for spec in first.config.bases])
    wanted = unseen if unseen is not None else (1000 if first.task.unseen is not None else 0)
    given = None if groups is None else str(groups.absolute())
    settings = StudySettings(labels, wanted, parse_window(window), groups=given)
    if first.task.plant is None or wanted == 0:
        why = "the task plants no rule" if first.task.plant is None else "it needs sequences drawn anew"
        say(f"  left out: the positive control, {why}")
    if first.task.unseen is None:
        say("  the task draws no unseen sequences: tested on its evaluate split")
    test = TestSettings(rotations=rotations, random_draws=draws, seed=seed)
    settings = replace(settings, test=test)
    with ExitStack() as held:
        for place in runs:
            held.enter_context(existing(place))
        result = run_study(runs, settings, workers=workers or min(os.cpu_count() or 1, 8), say=say)
        write_result(result, out or runs[0])
        if out is None:
            write_summary(first)
    if json_ == "-":
        typer.echo(json.dumps(to_plain(result), indent=1, sort_keys=True))
        return
    if json_:
        save_record(Path(json_), result)
    shown = from_plain(TestedFile, to_plain(result))
    answers = {b.basis: {"A": b.A, "P": b.P} for b in shown.bases}
    for control in result.controls:
        say(
            f"  positive control, seed {control.seed}: planted rule {control.planted}, its twin with "
            f"shuffled labels {control.twin}: {'passed' if control.passed else 'FAILED'}"
        )
    print_verdicts([(row.basis, row.entry()) for row in shown.rows], answers, console)
    say(f"Result: {(out or runs[0]) / 'verdicts.json'}; next: polca-edit report {runs[0]}")
