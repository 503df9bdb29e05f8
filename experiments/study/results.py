"""One result file a study: what its tables need, with config, seeds, versions and hardware."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.application import console, json_result
from experiments.config import RunConfig
from experiments.report.tables import Table
from experiments.run.machine import hardware, versions
from polca_edit.artifacts import to_plain
from polca_edit.checkpoints.files import write_atomically


def publish(
    file: Path | None,
    study: str,
    config: RunConfig,
    seeds: Sequence[int],
    contents: object,
    tables: Sequence[Table],
) -> None:
    """Write a study's result as JSON, and its tables as Markdown beside it.

    Args:
        file: the JSON, ``-`` for standard output; None writes nothing.
        study: name and version of what is in it, ``NAME/NUMBER``.
        config: of its first run.
        seeds: of its runs.
        contents: what else the file holds: a record, whose fields become keys, or a mapping.
        tables: made from them.
    """
    if file is None:
        return
    value = {
        "schema": f"polca-edit/{study}",
        "config": config.model_dump(mode="json"),
        "seeds": list(seeds),
        "versions": versions(),
        "hardware": hardware(),
        **to_plain(contents),
    }
    write_with_tables(file, value, tables)


def write_with_tables(file: Path, value: object, tables: Sequence[Table]) -> None:
    """A study's result as JSON and its tables as Markdown beside it; ``-`` prints the JSON alone."""
    json_result(value, str(file))
    if not to_terminal(file):
        text = "\n".join(f"{table.title}\n\n{table.markdown()}" for table in tables)
        write_atomically(file.with_suffix(".md"), lambda part: part.write_text(text) and None)


def to_terminal(file: Path | None) -> bool:
    """Whether ``--json -`` was asked for."""
    return file is not None and str(file) == "-"


def show(tables: Sequence[Table]) -> None:
    """Print tables."""
    for table in tables:
        console.print(table.terminal())
