"""Verb ``compare``: two finished runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.application import console, json_result, say, then
from experiments.verbs.options import Json


def compare(
    first: Annotated[Path, typer.Argument(help="A finished run.")],
    second: Annotated[Path, typer.Argument(help="Another run of the same task.")],
    out: Annotated[
        Path | None, typer.Option(help="Write the comparison as one offline page, e.g. compare.html.")
    ] = None,
    json_: Json = None,
) -> None:
    """Say in what two runs differ, and whether the same movements take the same skills away."""
    from experiments.report.compare import compared, in_words, read_pair, tables_of, write_comparison
    from experiments.verbs.guard import check

    if out is not None and out.is_dir():
        raise ValueError(
            f"--out must be a file, '{out}' is a folder; give for example {out / 'compare.html'}"
        )
    for directory in (first, second):
        check(directory)
    views = read_pair(first, second)
    found = compared(*views)
    if not json_result(found, json_):
        for made in tables_of(found, {}):
            console.print(made.terminal())
        say(in_words(found))
    if out is not None:
        say(f"Page: {write_comparison(*views, found, out)}")
    then("test", first, second, "--out", "studies/both")
