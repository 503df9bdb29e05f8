"""One result file a study: what its tables need, with config, seeds, versions and hardware."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.application import console
from experiments.config import RunConfig
from experiments.report.tables import Table
from experiments.run.machine import hardware, versions
from polca_edit.artifacts import to_plain
from polca_edit.checkpoints.files import write_atomically, write_json


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
        file: the JSON; None writes nothing.
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
    write_json(file, value)
    text = "\n".join(f"{table.title}\n\n{table.markdown()}" for table in tables)
    write_atomically(file.with_suffix(".md"), lambda part: part.write_text(text) and None)


def show(tables: Sequence[Table]) -> None:
    """Print tables."""
    for table in tables:
        console.print(table.terminal())
