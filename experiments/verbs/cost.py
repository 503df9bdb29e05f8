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
from experiments.verbs.pipeline import config_for, open_overrides, require_basis, require_used
from experiments.verbs.subsets import confined


def plan(
    config: Annotated[str | None, typer.Argument(help="Config file, or a preset by name.")] = None,
    task: Task = None,
    text: Annotated[str | None, typer.Option(help="Text file for task 'text'.")] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Of a run that opens these checkpoints instead of training.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Pretrained model that was tuned; step 0.")] = None,
    names: Annotated[str, typer.Option(help="Checkpoint names, e.g. 'step*'.")] = "*",
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
    """What a run would cost on this machine: passes, products, bytes, memory, time. Nothing is run.

    With --checkpoints and the preset huggingface, what polca-edit open would cost.
    """
    from experiments.config import load_config
    from experiments.run.cost.plan import describe, make_plan
    from experiments.run.memory.budget import parse_memory

    given = {"memory_gb": parse_memory(memory), "engine": engine}
    overrides = settings_from(set_, task=task, seed=seed, device=device, text__file=text, **given)
    named = config_for(config, task)
    overrides = opened_overrides(named, checkpoints, text, base, names) | overrides
    resolved = load_config(named, confined(named, overrides, layers, parameters))
    require_used(resolved, text)
    require_basis(resolved)
    with tempfile.TemporaryDirectory() as folder:
        budget = None if budget_minutes is None else 60 * budget_minutes
        found = make_plan(resolved, Path(folder), budget)
    if not json_result(found, json_):
        say(describe(found))
    if checkpoints is not None and resolved.model.kind == "huggingface":
        then("open", checkpoints, *(["--text", text] if text else []))
    else:
        then("run", *([config] if config else []), *(["--task", task] if task else []))


def opened_overrides(
    named: str, checkpoints: Path | None, text: str | None, base: Path | None, names: str
) -> dict[str, object]:
    """What ``open`` (Hugging Face folders) or ``run --checkpoints`` would set for a folder.

    Raises:
        ValueError: where there is no text to open checkpoints of a language model on, or an option that only
            a folder gives a meaning.
    """
    from experiments.config import load_config

    if checkpoints is None:
        if base is not None or names != "*":
            option = "--base" if base is not None else "--names"
            raise ValueError(f"{option} goes with --checkpoints, got none; add --checkpoints FOLDER")
        return {}
    if load_config(named).model.kind != "huggingface":
        return {"checkpoints.directory": str(checkpoints), "checkpoints.pattern": names}
    if text is None:
        raise ValueError("checkpoints of a language model are opened on a text, got none; pass --text FILE")
    return open_overrides(checkpoints, text, base=base, names=names, preset=named)
