"""Verb ``plan``: what a run would cost, before it is started."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from experiments.application import settings_from
from experiments.verbs.pipeline import Task, config_for


def plan(
    config: Annotated[str | None, typer.Argument(help="Config file, or a preset by name.")] = None,
    task: Task = None,
    text: Annotated[str | None, typer.Option(help="Text file for task 'text'.")] = None,
    budget_minutes: Annotated[float | None, typer.Option(help="Find settings that fit this.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a config key.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a run would cost on this machine: passes, products, bytes, memory, time. Nothing is run.

    Examples: `polca-edit plan mini` · `polca-edit plan --task my_task.py:build` ·
    `polca-edit plan english --text wiki.jsonl.gz --budget-minutes 20`
    """
    from experiments.config import load_config
    from experiments.run.cost.plan import describe, make_plan
    from polca_edit.artifacts import to_plain

    resolved = load_config(config_for(config, task), settings_from(set_, task=task, text__file=text))
    with tempfile.TemporaryDirectory() as folder:
        budget = None if budget_minutes is None else 60 * budget_minutes
        found = make_plan(resolved, Path(folder), budget)
    if json_:
        typer.echo(json.dumps(to_plain(found), indent=1, sort_keys=True))
        return
    typer.echo(describe(found))
