"""Verbs that run the pipeline: ``demo``, ``run``, ``open`` and ``english``, from a config to its report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.application import console, say, settings_from

Seed = Annotated[int | None, typer.Option(help="Seed of data, initial weights and every draw.")]
Out = Annotated[Path | None, typer.Option(help="Run directory (default runs/NAME).")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a config key, e.g. --set training.steps=600.")
]
Redo = Annotated[
    list[str] | None, typer.Option("--redo", help="Run this stage again, e.g. --redo clusters:hessian.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the stages that would run, then stop.")]
Task = Annotated[str | None, typer.Option(help="Your own task, FILE.py:FUNCTION, or a shipped one by name.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.")]


def config_for(config: str | None, task: str | None) -> str:
    """The config that is meant where only a task was given.

    Raises:
        ValueError: where nothing says what to run.
    """
    from experiments.config import preset_names
    from experiments.tasks import own_task

    if config is not None:
        return config
    if task is None:
        raise ValueError(f"give a config file, a preset of {preset_names()}, or --task FILE.py:FUNCTION")
    if own_task(task) is not None:
        return "own"
    if task in preset_names():
        return task
    raise ValueError(
        f"task '{task}' has no preset of its name; give a config as well, one of {preset_names()}"
    )


def default_out(config: str, task: str | None) -> Path:
    """``runs/NAME``, of the user's file where there is one."""
    from experiments.tasks import own_task

    own = own_task(task) if task is not None else None
    return Path("runs") / (Path(config).stem if own is None else own.file.stem)


#: Preset of the English experiment by its short name.
ENGLISH_PRESETS = {"demo": "english-demo", "mini": "english-mini", "paper": "english-paper"}


def execute(
    config: str,
    out: Path,
    overrides: dict[str, Any],
    redo: list[str] | None = None,
    dry_run: bool = False,
) -> dict[str, Any] | None:
    """Run all stages of a config, write summary and report, print the tables.

    Returns:
        the summary's plain values, None for a dry run.
    """
    from experiments.config import load_config
    from experiments.report.answers import print_summary
    from experiments.report.labels import print_labels
    from experiments.report.page import write_report
    from experiments.run.driver import run_stages
    from experiments.run.guard import writing
    from experiments.run.keys import stage_names
    from experiments.run.labels import write_labels
    from experiments.run.run import open_run
    from experiments.run.summary.write import write_summary

    started = time.perf_counter()
    resolved = load_config(config, overrides)
    names = stage_names(resolved)
    unknown = [name for name in redo or [] if name not in names]
    if unknown:
        raise ValueError(f"--redo needs a stage of this run, one of {names}, got '{unknown[0]}'")
    if dry_run:
        say(f"{out}: would run {', '.join(names)}, summary, report")
        return None
    with writing(out, repairs=True):
        opened = open_run(resolved, out, say)
        say(
            f"polca-edit: task {opened.task.name}, {opened.task.space.size:,} parameters, "
            f"seed {resolved.seed}, into {out}"
        )
        run_stages(opened, redo or ())
        labels = write_labels(opened) if opened.task.name == "text" else {}
        summary = write_summary(opened)
        page = write_report(opened.directory, say)
    say(f"  {'total':<24} {time.perf_counter() - started:7.1f} s")
    print_summary(opened.directory, console)
    print_labels(labels, console)
    say(f"Report: {page}")
    return summary


def demo(seed: Seed = None, out: Out = None, set_: Set = None, dry_run: DryRun = False) -> None:
    """Run the main job on the built-in arithmetic task (minutes on two CPU cores).

    Example: `polca-edit demo --seed 3 --out runs/demo-3`
    """
    execute("demo", out or Path("runs/demo"), settings_from(set_, seed=seed), None, dry_run)


def run(
    config: Annotated[
        str | None, typer.Argument(help="Config file, or a preset by name; --task alone takes 'own'.")
    ] = None,
    task: Task = None,
    out: Out = None,
    seed: Seed = None,
    text: Annotated[
        str | None, typer.Option(help="Text file for task 'text': plain, jsonl or jsonl.gz.")
    ] = None,
    checkpoints: Annotated[
        str | None, typer.Option(help="Open these checkpoints instead of training.")
    ] = None,
    window: Annotated[
        str | None, typer.Option(help="Observe and undo the training of steps START:END only.")
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

    Examples: `polca-edit run mini --seed 1` ·
    `polca-edit run english.yaml --text corpus.jsonl.gz` ·
    `polca-edit run mine.yaml --checkpoints runs/other/checkpoints` ·
    `polca-edit run --task my_task.py:build --set training.steps=600`
    """
    named = config_for(config, task)
    overrides = settings_from(
        set_,
        task=task,
        seed=seed,
        text__file=text,
        checkpoints__directory=checkpoints,
        window=window,
        device=device,
        engine=engine,
        engine_address=address,
    )
    execute(named, out or default_out(named, task), overrides, redo, dry_run)


def open_overrides(
    folder: Path,
    text: str,
    *,
    base: Path | None = None,
    names: str = "*",
    step_pattern: str | None = None,
    skip_damaged: bool = False,
    preset: str = "huggingface",
) -> dict[str, Any]:
    """Config overrides for a folder of checkpoints.

    Bases with more vectors than checkpoints allow are cut to what there is.

    Args:
        folder: Trainer output, folder of revisions, or hub cache of one model.
        text: text file.
        base: pretrained model: reference of a fine-tuning run, base of adapters.
        names: shell pattern of checkpoint names.
        step_pattern: regular expression whose first group is the step.
        skip_damaged: leave incomplete checkpoints out.
        preset: config the overrides will go on.

    Raises:
        ValueError: for a folder without readable checkpoints, or adapters without a base.
    """
    from experiments.config import load_config
    from polca_edit.checkpoints.huggingface import base_of_adapter, is_adapter
    from polca_edit.checkpoints.survey import survey, whole_revisions

    found = survey(folder, names=names, step_pattern=step_pattern)
    revisions = whole_revisions(found.revisions, skip_damaged=skip_damaged)
    last = revisions[-1].path
    adapted = is_adapter(last)
    model = base or (base_of_adapter(last) if adapted else last)
    if model is None:
        raise ValueError(f"'{last}' holds an adapter, its pretrained model is needed; pass --base FOLDER")
    # With a reference the series has one checkpoint more; a basis needs one fewer than the series has.
    usable = len(revisions) if adapted or base is not None else len(revisions) - 1
    bases = [
        spec.model_copy(update={"vectors": min(spec.vectors, max(1, usable))}).model_dump(mode="json")
        for spec in load_config(preset).bases
    ]
    return {
        "model.kind": "huggingface",
        "model.path": str(model),
        "text.file": text,
        "checkpoints.directory": str(folder),
        "checkpoints.pattern": names,
        "checkpoints.step_pattern": step_pattern,
        "checkpoints.reference": None if base is None or adapted else str(base),
        "checkpoints.skip_damaged": skip_damaged,
        "bases": bases,
    }


def open_checkpoints(
    folder: Annotated[Path, typer.Argument(help="Trainer output, folder of revisions, or hub cache.")],
    text: Annotated[str, typer.Option(help="Text: plain, jsonl(.gz), .npy ids or a datasets folder.")],
    out: Annotated[Path | None, typer.Option(help="Run directory (default runs/FOLDER).")] = None,
    base: Annotated[Path | None, typer.Option(help="Pretrained model that was tuned; step 0.")] = None,
    names: Annotated[str, typer.Option(help="Checkpoint names, e.g. 'step*'.")] = "*",
    step_pattern: Annotated[str | None, typer.Option(help="Regular expression, group 1 is the step.")] = None,
    skip_damaged: Annotated[bool, typer.Option(help="Leave incomplete checkpoints out.")] = False,
    preset: Annotated[str, typer.Option(help="Config file or preset for everything else.")] = "huggingface",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a config key.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the stages, then stop.")] = False,
) -> None:
    """Analyse Hugging Face checkpoints: Trainer folders, Pythia or OLMo revisions, adapters.

    Examples: `polca-edit open my-trainer-output --text corpus.jsonl` ·
    `polca-edit open pythia-14m --names 'step*' --text pile.jsonl.gz` ·
    `polca-edit open lora-output --base gpt2-folder --text notes.txt`
    """
    overrides = open_overrides(
        folder,
        text,
        base=base,
        names=names,
        step_pattern=step_pattern,
        skip_damaged=skip_damaged,
        preset=preset,
    )
    for assignment in set_ or []:
        overrides.update(settings_from([assignment]))
    execute(preset, out or Path("runs") / folder.resolve().name, overrides, None, dry_run)


def english(
    preset: Annotated[str, typer.Option(help="demo, mini or paper.")] = "demo",
    text: Annotated[str | None, typer.Option(help="Text: plain, jsonl(.gz) or .npy ids.")] = None,
    probe: Annotated[str | None, typer.Option(help="CoNLL-U file with gold tags, for labels.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory (default runs/english-PRESET).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data, weights and draws.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a config key.")] = None,
    redo: Annotated[list[str] | None, typer.Option("--redo", help="Run this stage again.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the stages, then stop.")] = False,
) -> None:
    """The English experiment on a text: tokenizer, training, POLCA, clusters, labels, damage, report.

    Examples: `polca-edit english --preset demo --text wiki.jsonl.gz --out runs/english`
    """
    if preset not in ENGLISH_PRESETS:
        raise ValueError(f"--preset must be one of {sorted(ENGLISH_PRESETS)}, got '{preset}'")
    overrides = settings_from(set_, seed=seed, text__file=text, text__probe=probe, device=device)
    target = out or Path("runs") / f"english-{preset}"
    execute(ENGLISH_PRESETS[preset], target, overrides, redo, dry_run)
