"""Options that several verbs have, written once so that each means the same everywhere.

This module imports nothing heavy: ``--help`` reads it (:mod:`experiments.verbs.signature`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer


def finite(value: float | None) -> float | None:
    """The value of a number option, which ranges alone do not keep from being NaN.

    Raises:
        typer.BadParameter: for NaN and infinity.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"must be a finite number, got {value}; give another")
    return value


def bound(help_: str, most: float | None = None) -> Any:
    """An option that takes a finite number from 0 on."""
    return typer.Option(min=0.0, max=most, callback=finite, help=help_)


Directory = Annotated[Path, typer.Argument(help="A run directory.")]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE|-", help="The result as JSON, to FILE or to the terminal (-)."),
]
#: ``--json`` of a study.
Result = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        help="The result as JSON, to FILE (tables beside it) or to the terminal (-).",
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of data, initial weights and every draw.")]
Out = Annotated[Path | None, typer.Option(help="Run directory (default runs/NAME, with a seed NAME-SEED).")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a config key, e.g. --set training.steps=600."),
]
Redo = Annotated[
    list[str] | None,
    typer.Option(
        "--redo",
        metavar="STAGE",
        help="Run a stage again though it is finished, e.g. clusters:hessian; repeat. 'changed': run again "
        "what other settings change; 'all': everything.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, stop.")]
Task = Annotated[str | None, typer.Option(help="Your own task, FILE.py:FUNCTION, or a shipped one by name.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.")]
Window = Annotated[
    str | None, typer.Option(metavar="START:END", help="Only the movement of these training steps.")
]
Bases = Annotated[list[str] | None, typer.Option("--basis", help="Basis by name; repeat. Default: all.")]
Groups = Annotated[
    Path | None, typer.Option(help="Token groups: .npz or JSON, name -> booleans over the select tokens.")
]
Unseen = Annotated[int | None, typer.Option(min=0, help="Sequences drawn anew; 0: the evaluate split.")]
Nulls = Annotated[int, typer.Option(min=0, max=10**4, help="Random token sets that get the same search.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default one per core.")]
Engine = Annotated[str | None, typer.Option(help="Where derivative work runs: local or ray.")]
Memory = Annotated[str | None, typer.Option(help="Memory of the whole run, e.g. 16GB or 800MB.")]
Layers = Annotated[str | None, typer.Option(help="Vectors in these layers only, e.g. 3-5 or 0,2.")]
Parameters = Annotated[str | None, typer.Option(help="Vectors in parameters of this pattern, e.g. '*.bias'.")]
