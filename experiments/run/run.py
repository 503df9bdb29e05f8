"""One run from a config to its report, as every verb that runs a pipeline does it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)


def say(text: str) -> None:
    """A plain line, flushed, so that logs can be followed."""
    console.print(text, soft_wrap=True)


def settings_from(assignments: list[str] | None, **given: Any) -> dict[str, Any]:
    """Config overrides from ``--set KEY=VALUE`` and options; ``a__b`` is the key ``a.b``."""
    values: dict[str, Any] = {}
    for assignment in assignments or []:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(
                f"--set needs KEY=VALUE, got '{assignment}'; write for example training.steps=600"
            )
        values[key] = yaml.safe_load(text)
    values.update({key.replace("__", "."): value for key, value in given.items() if value is not None})
    return values


def execute(
    config: str, out: Path, overrides: dict[str, Any], redo: list[str] | None, dry_run: bool
) -> dict[str, Any] | None:
    """Run all stages of a config, write summary and report, print the tables."""
    from experiments.config import load_config
    from experiments.report.answers import print_summary
    from experiments.report.labels import print_labels
    from experiments.report.page import write_report
    from experiments.run import stages as pipeline
    from experiments.run.labels import write_labels
    from experiments.run.summary import write_summary

    started = time.perf_counter()
    resolved = load_config(config, overrides)
    names = pipeline.stage_names(resolved)
    unknown = [name for name in redo or [] if name not in names]
    if unknown:
        raise ValueError(f"--redo needs a stage of this run, one of {names}, got '{unknown[0]}'")
    if dry_run:
        say(f"{out}: would run {', '.join(names)}, summary, report")
        return None
    opened = pipeline.open_run(resolved, out, say)
    say(
        f"polca-edit: task {opened.task.name}, {opened.task.space.size:,} parameters, "
        f"seed {resolved.seed}, into {out}"
    )
    pipeline.run_stages(opened, redo)
    labels = write_labels(opened) if opened.task.name == "text" else {}
    summary = write_summary(opened)
    page = write_report(opened.directory, say)
    say(f"  {'total':<24} {time.perf_counter() - started:7.1f} s")
    print_summary(opened.directory, console)
    print_labels(labels, console)
    say(f"Report: {page}")
    return summary
