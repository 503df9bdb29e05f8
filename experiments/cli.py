"""The command line: ``polca-edit demo|run|report|inspect|...``."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from experiments import causal, selftest, text_verbs
from experiments.apply import apply
from experiments.remove import remove

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="From training checkpoints to a causal verdict on each skill, and to an edit that removes it.",
)
console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)

Seed = Annotated[int | None, typer.Option(help="Seed of data, initial weights and every draw.")]
Out = Annotated[Path | None, typer.Option(help="Run directory (default runs/NAME).")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a config key, e.g. --set training.steps=600.")
]
Redo = Annotated[
    list[str] | None, typer.Option("--redo", help="Run this stage again, e.g. --redo clusters:hessian.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the stages that would run, then stop.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.")]


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


@app.command(epilog="Example: `polca-edit demo --seed 3 --out runs/demo-3`")
def demo(seed: Seed = None, out: Out = None, set_: Set = None, dry_run: DryRun = False) -> None:
    """Run the main job on the built-in arithmetic task (minutes on two CPU cores)."""
    execute("demo", out or Path("runs/demo"), settings_from(set_, seed=seed), None, dry_run)


@app.command(
    epilog="Examples: `polca-edit run mini --seed 1` · "
    "`polca-edit run english.yaml --text corpus.jsonl.gz` · "
    "`polca-edit run mine.yaml --checkpoints runs/other/checkpoints`"
)
def run(
    config: Annotated[str, typer.Argument(help="Config file, or a preset by name.")],
    out: Out = None,
    seed: Seed = None,
    text: Annotated[
        str | None, typer.Option(help="Text file for task 'text': plain, jsonl or jsonl.gz.")
    ] = None,
    checkpoints: Annotated[
        str | None, typer.Option(help="Open these checkpoints instead of training.")
    ] = None,
    device: Device = None,
    engine: Annotated[str | None, typer.Option(help="Where derivative work runs: local or ray.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray head node for --engine ray.")] = None,
    set_: Set = None,
    redo: Redo = None,
    dry_run: DryRun = False,
) -> None:
    """Run a config or preset: train or open, bases, projections, clusters, damage, report.

    A run that was stopped goes on where it was; finished stages are not repeated.
    """
    overrides = settings_from(
        set_,
        seed=seed,
        text__file=text,
        checkpoints__directory=checkpoints,
        device=device,
        engine=engine,
        engine_address=address,
    )
    execute(config, out or Path("runs") / Path(config).stem, overrides, redo, dry_run)


def execute(
    config: str, out: Path, overrides: dict[str, Any], redo: list[str] | None, dry_run: bool
) -> dict[str, Any] | None:
    """Run all stages of a config, write summary and report, print the tables."""
    from experiments import pipeline
    from experiments.config import load_config
    from experiments.labelling import describe_labels, label_sections, write_labels
    from experiments.report import write_report
    from experiments.summary import write_summary
    from experiments.tables import print_summary

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
    page = write_report(opened.directory, say, label_sections(opened.directory))
    say(f"  {'total':<24} {time.perf_counter() - started:7.1f} s")
    print_summary(summary, console)
    if labels:
        say(describe_labels(labels))
    say(f"Report: {page}")
    return summary


@app.command(epilog="Example: `polca-edit report runs/demo`")
def report(directory: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Draw report.html and the figures again from a run's records; no model is needed."""
    from experiments.labelling import label_sections
    from experiments.report import write_report
    from experiments.summary import read_summary
    from polca_edit.artifacts import RunDirectory

    read_summary(directory)
    opened = RunDirectory(directory)
    say(f"Report: {write_report(opened, say, label_sections(opened))}")


@app.command(epilog="Example: `polca-edit inspect runs/demo --json | jq .cost`")
def inspect(
    directory: Annotated[Path, typer.Argument(help="A run directory.")],
    json_: Annotated[bool, typer.Option("--json", help="Print summary.json as it is.")] = False,
) -> None:
    """Print what a finished run found."""
    import json

    from experiments.summary import read_summary
    from experiments.tables import print_summary

    summary = read_summary(directory)
    if json_:
        typer.echo(json.dumps(summary, indent=1, sort_keys=True))
    else:
        print_summary(summary, console)


app.command(
    name="test",
    epilog="Example: `polca-edit test runs/demo runs/demo-1 --basis trajectory --out studies/demo`",
)(causal.causal_test)
app.command(
    name="selftest",
    epilog="Examples: `polca-edit selftest` · `polca-edit selftest --bed T1 --break flipped_sign`",
)(selftest.selftest)
app.command(
    name="open", epilog="Example: `polca-edit open trainer-output --text corpus.txt --out runs/mine`"
)(text_verbs.open_checkpoints)
app.command(
    name="remove",
    epilog="Examples: `polca-edit remove runs/demo --skill 10s` · "
    "`polca-edit remove runs/demo --cluster trajectory:1:0 --basis trajectory`",
)(remove)
app.command(
    name="apply",
    epilog="Examples: `polca-edit apply runs/demo/edits/10s.json MODEL --out edited` · "
    "`polca-edit apply runs/demo/edits/10s.json edited --undo --out restored`",
)(apply)
app.command(name="english", epilog="Example: `polca-edit english --text corpus.jsonl.gz --preset demo`")(
    text_verbs.english
)
app.command(name="label", epilog="Example: `polca-edit label runs/mine`")(text_verbs.label)
app.command(name="plan", epilog="Example: `polca-edit plan mini --json`")(text_verbs.plan)


def explain(error: BaseException) -> str:
    """One sentence for an error a user can act on."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; free some space and start again, finished stages are kept"
    if isinstance(error, OSError):
        return f"{error.strerror or error}: '{error.filename}'; check the path and its permissions"
    return " ".join(str(error).split())


def main() -> None:
    """Entry point of ``polca-edit``."""
    run_application(app)


def run_application(command: Any) -> None:
    """Run a typer application or one command function: a user error ends with one sentence, not 0."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not isinstance(command, typer.Typer):
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command()(command)
        command = single
    try:
        command()
    except (ValueError, OSError) as error:
        if os.environ.get("POLCA_EDIT_TRACEBACK"):
            raise
        typer.echo(f"polca-edit: {explain(error)}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("polca-edit: stopped; run the same command again to go on", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
