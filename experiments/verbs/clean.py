"""Verb ``clean``: frees the disk space of what a run can make again."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from experiments.application import json_result, say, then
from experiments.verbs.options import Directory, DryRun, Json


def clean(
    directory: Directory,
    checkpoints: Annotated[
        bool,
        typer.Option("--checkpoints", help="Also recorded weights; only report and inspect still work then."),
    ] = False,
    damage: Annotated[
        bool,
        typer.Option("--damage", help="Also the damage matrix; the next test measures it again."),
    ] = False,
    dry_run: DryRun = False,
    json_: Json = None,
) -> None:
    """Delete what interrupted work has left and, where asked for, the recorded weights.

    Config, plans, verdicts, summary, report and edits always stay. A stage whose files are gone is run
    again by the next ``polca-edit run`` with the same config; so is training, without its weights.
    """
    from experiments.verbs.guard import existing, require_run

    require_run(directory)
    with nullcontext() if dry_run else existing(directory):
        found = leftovers(directory)
        if checkpoints:
            found += sorted((directory / "checkpoints").glob("*.safetensors"))
        if damage:
            found += sorted((directory / "damage" / "matrix").glob("*.safetensors"))
        sizes = {path: size_of(path) for path in found}
        if not dry_run:
            for path in found:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    names = [path.relative_to(directory).as_posix() for path in found]
    megabytes = sum(sizes.values()) / 1e6
    word = "would free" if dry_run else "freed"
    if not json_result({"files": names, "bytes": sum(sizes.values()), "deleted": not dry_run}, json_):
        for path, name in zip(found, names, strict=True):
            say(f"  {name:<44} {sizes[path] / 1e6:10.1f} MB")
    say(f"{directory}: {word} {megabytes:.1f} MB in {len(found)} files and folders")
    if dry_run:
        return
    then("run", directory / "config.yaml", "--out", directory) if checkpoints else then("inspect", directory)


def leftovers(directory: Path) -> list[Path]:
    """Files that a killed process had not finished, and parts of stages that were interrupted."""
    halves = [path for path in directory.rglob(".*.part") if path.is_file()]
    parts = [path for path in directory.rglob("*.parts") if path.is_dir()]
    return sorted({*halves, *parts})


def size_of(path: Path) -> int:
    """Bytes of a file, or of everything in a folder."""
    if path.is_dir():
        return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
    return path.stat().st_size
