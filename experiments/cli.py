"""The command line: ``polca-edit demo|run|report|inspect|...``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from experiments import verbs as text_verbs
from experiments.application import run_application, single
from experiments.removal.apply import apply
from experiments.removal.verb import remove
from experiments.run.run import console, execute, say, settings_from

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="From training checkpoints to a causal verdict on each skill, and to an edit that removes it.",
)

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


@app.command(epilog="Example: `polca-edit report runs/demo`")
def report(directory: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Draw report.html and the figures again from a run's records; no model is needed."""
    from experiments.report.page import write_report
    from experiments.run.store import RunDirectory

    say(f"Report: {write_report(RunDirectory(directory), say)}")


@app.command(epilog="Example: `polca-edit inspect runs/demo --json | jq .cost`")
def inspect(
    directory: Annotated[Path, typer.Argument(help="A run directory.")],
    json_: Annotated[bool, typer.Option("--json", help="Print summary.json as it is.")] = False,
) -> None:
    """Print what a finished run found."""
    import json

    from experiments.report.answers import print_summary
    from experiments.run.store import RunDirectory
    from experiments.run.summary import read_summary

    if json_:
        typer.echo(json.dumps(read_summary(directory), indent=1, sort_keys=True))
    else:
        print_summary(RunDirectory(directory), console)


app.command(name="open")(text_verbs.open_checkpoints)
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
app.command(name="english")(text_verbs.english)
app.command(name="label")(text_verbs.label)
app.command(name="plan")(text_verbs.plan)

#: Studies: verb -> (module, function, what it does). They are imported when they run, not for --help.
STUDIES = {
    "reproduce": ("reproduce.verb", "reproduce", "The paper's tables beside ours, every basis and rotation."),
    "robustness": ("study.robustness", "robustness", "Which conclusions survive other settings."),
    "carry-signal": ("study.carry_signal", "carry_signal", "Where the published carry signal lives."),
    "demo-table": ("study.demo_table", "demo_table", "Several demo seeds beside the demo's targets."),
    "paper-scale": ("study.paper_scale", "paper_scale", "The paper-scale experiment with its timing."),
    "remove-skill": ("removal.study", "remove_skill_study", "Skill removal: our edits and today's rivals."),
}


def _register_study(verb: str) -> None:
    module, function, text = STUDIES[verb]

    def study(context: typer.Context) -> None:
        found = getattr(importlib.import_module(f"experiments.{module}"), function)
        single(found)(args=context.args, prog_name=f"polca-edit {verb}")

    options = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(
        name=verb,
        help=f"{text} (`{verb} --help` has its options.)",
        context_settings=options,
        add_help_option=False,
    )(study)


for _verb in STUDIES:
    _register_study(_verb)


def main() -> None:
    """Entry point of ``polca-edit``."""
    run_application(app)


if __name__ == "__main__":
    main()
