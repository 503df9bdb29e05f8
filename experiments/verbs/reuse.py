"""Whether a directory that holds a run may be written with these settings, and what would be done there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.config import RunConfig, load_config
from experiments.run.keys import PATHS, stage_names
from experiments.run.run import Run

#: Values of ``--redo`` that allow other settings: what they change, or everything, is run again.
CHANGED, ALL = "changed", "all"
#: Settings of the machine, which no result depends on beyond rounding.
MACHINE = frozenset(
    {
        "device",
        "threads",
        "engine",
        "engine_address",
        "vector_block",
        "token_shard",
        "parameter_block",
        "batch_size",
        "basis_memory_gb",
        "compiled",
    }
)


def stages_to_redo(config: RunConfig, redo: Sequence[str] | None) -> list[str]:
    """Names of the stages that ``--redo`` asks for.

    Raises:
        ValueError: for a name that is no stage of this config.
    """
    names, asked = stage_names(config), list(redo or [])
    unknown = [name for name in asked if name not in (*names, CHANGED, ALL)]
    if unknown:
        raise ValueError(
            f"--redo needs a stage of this run, one of {names}, or '{CHANGED}' or '{ALL}', got '{unknown[0]}'"
        )
    return names if ALL in asked else [name for name in asked if name != CHANGED]


def refuse_other_settings(config: RunConfig, out: Path, redo: Sequence[str] | None) -> None:
    """A run that is there with another seed or other settings stays as it is, unless ``--redo`` allows.

    Settings that no result depends on, and paths whose contents are compared instead, may differ.

    Raises:
        ValueError: with the first setting that differs, both values and what to do.
    """
    file = out / "config.yaml"
    if not file.is_file() or {CHANGED, ALL} & set(redo or []):
        return
    try:
        before = load_config(file)
    except ValueError:  # damaged, and written anew by the run
        return
    found = _differences(before.model_dump(mode="json"), config.model_dump(mode="json"))
    if found:
        key, old, new = found[0]
        more = f" and {len(found) - 1} other settings differ" if len(found) > 1 else ""
        raise ValueError(
            f"'{out}' holds a run with {key} {_short(old)}, got {_short(new)}{more}; choose another --out, "
            f"or pass --redo {CHANGED} to run again what that changes"
        )


def would_run(run: Run, redo: Sequence[str]) -> tuple[list[str], list[str]]:
    """Stages that would be run, and stages that are finished and kept."""
    names = stage_names(run.config)
    todo = [n for n in names if n in redo or not run.directory.finished(n, run.key(n))]
    return todo, [name for name in names if name not in todo]


def _differences(before: Any, after: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted key, old and new value of every setting that differs."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [(where, before, after)]
    left_out = {f"{section}.{key}" for section, keys in PATHS.items() for key in keys} | MACHINE
    found: list[tuple[str, Any, Any]] = []
    for key in dict.fromkeys([*before, *after]):
        name = f"{where}.{key}" if where else key
        if name not in left_out:
            found += _differences(before.get(key), after.get(key), name)
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
