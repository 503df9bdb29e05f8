"""Verb ``test``: the causal test of one run, or of several seeds together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.application import console, json_result, say, then, would
from experiments.verbs.guard import require_different
from experiments.verbs.options import Bases, DryRun, Groups, Json, Unseen, Window, Workers

if TYPE_CHECKING:
    from experiments.verdicts.records import CausalResult


def causal_test(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, several seeds of one config.")],
    basis: Bases = None,
    unseen: Unseen = None,
    window: Window = None,
    groups: Groups = None,
    rotations: Annotated[int, typer.Option(min=20, max=10**4, help="Rotations of each span (S, P).")] = 39,
    draws: Annotated[int, typer.Option(max=10**5, help="Random edits per movement (N).")] = 39,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of every draw.")] = 0,
    workers: Workers = None,
    dry_run: DryRun = False,
    json_: Json = None,
    out: Annotated[Path | None, typer.Option(help="Folder of a study over several runs.")] = None,
) -> None:
    """Does the model need each movement for its tokens (N), and for them only (S)? One row per pair.

    Pairs are fixed on the select split: POLCA's own clusters, and interventional clusters and known skills
    with the vector that costs them most there. They are tested on tokens that nothing has used. A word per
    row: inert, shared, selective, carrier (the movement inserted alone brings the skill), unclear.
    """
    from experiments.config import parse_window
    from experiments.run.run import load_run
    from experiments.run.summary.write import write_summary
    from experiments.verbs.groups import with_groups
    from experiments.verbs.guard import existing
    from experiments.verdicts.study import StudySettings, planned_study, run_study, write_result
    from interventions.causal.settings import TestSettings

    _require_places(runs, out, groups)
    first = with_groups(load_run(runs[0], say=lambda _: None), groups)
    labels = tuple(dict.fromkeys(basis or [spec.label for spec in first.config.bases]))
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
    if dry_run:
        return would(f"  would measure {planned_study(runs, settings)}", json_)
    place = out or runs[0]
    with ExitStack() as held:
        for one in runs:
            held.enter_context(existing(one))
        result = run_study(runs, settings, workers=workers or min(os.cpu_count() or 1, 8), say=say)
        write_result(result, place)
        # A run of which only some stages were made has no summary to add the verdicts to.
        if place == runs[0] and (first.directory / "summary.json").exists():
            write_summary(first)
    if not json_result(result, json_):
        _told(result)
    say(f"Result: {place / 'verdicts.json'}")
    then("report", runs[0])


def _require_places(runs: Sequence[Path], out: Path | None, groups: Path | None) -> None:
    """Where a result may go: into the one run that is tested, or into a folder that is no run.

    Raises:
        ValueError: for anything else, a run given twice, or groups of one run's tokens given to several runs.
    """
    require_different(runs)
    if len(runs) > 1 and out is None:
        raise ValueError("a study of several runs needs a folder of its own; pass --out studies/NAME")
    if groups is not None and len(runs) > 1:
        raise ValueError("--groups belong to the tokens of one run, got several runs; test them one by one")
    if out is not None and not out.is_dir() and out.exists():
        raise ValueError(f"--out must be a folder, '{out}' is a file; choose another")
    if out is not None and (out / "config.yaml").exists():
        raise ValueError(
            f"--out must be a folder of the study's own, '{out}' is a run and keeps its own result; choose "
            "another, or leave --out away to test one run"
        )


def _told(result: CausalResult) -> None:
    """A table with its sentences."""
    from experiments.report.chapters.verdicts import print_verdicts
    from experiments.run.summary.records import TestedFile
    from experiments.verdicts.records import MISSED
    from polca_edit.artifacts import from_plain, to_plain

    shown = from_plain(TestedFile, to_plain(result))
    answers = {b.basis: {"A": b.A, "P": b.P} for b in shown.bases}
    for control in result.controls:
        say(
            f"  positive control, seed {control.seed}: planted rule {control.planted}, its twin with "
            f"shuffled labels {control.twin}: {'passed' if control.passed else 'FAILED'}"
            + (f" ({control.sentence})" if control.planted == MISSED else "")
        )
    print_verdicts([(row.basis, row.entry()) for row in shown.rows], answers, console)
