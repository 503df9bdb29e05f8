"""Verb ``plan``: what a run would cost, before it is started."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from experiments.application import json_result, say, settings_from, then
from experiments.verbs.options import (
    Device,
    Engine,
    Json,
    Layers,
    Memory,
    Parameters,
    Seed,
    Set,
    Task,
    finite,
)
from experiments.verbs.pipeline import config_for, require_basis, require_used
from experiments.verbs.subsets import confined


def plan(
    config: Annotated[str | None, typer.Argument(help="Config file, or a preset by name.")] = None,
    task: Task = None,
    text: Annotated[str | None, typer.Option(help="Text file for task 'text'.")] = None,
    memory: Memory = None,
    layers: Layers = None,
    parameters: Parameters = None,
    engine: Engine = None,
    budget_minutes: Annotated[
        float | None, typer.Option(min=0.01, max=1e6, callback=finite, help="Find settings that fit this.")
    ] = None,
    seed: Seed = None,
    device: Device = None,
    set_: Set = None,
    json_: Json = None,
) -> None:
    """What a run would cost on this machine: passes, products, bytes, memory, time. Nothing is run."""
    from experiments.config import load_config
    from experiments.run.cost.plan import describe, make_plan
    from experiments.run.memory import parse_memory

    given = {"memory_gb": parse_memory(memory), "engine": engine}
    overrides = settings_from(set_, task=task, seed=seed, device=device, text__file=text, **given)
    named = config_for(config, task)
    resolved = load_config(named, confined(named, overrides, layers, parameters))
    require_used(resolved, text)
    require_basis(resolved)
    with tempfile.TemporaryDirectory() as folder:
        budget = None if budget_minutes is None else 60 * budget_minutes
        found = make_plan(resolved, Path(folder), budget)
    if not json_result(found, json_):
        say(describe(found))
    then("run", *([config] if config else []), *(["--task", task] if task else []))
