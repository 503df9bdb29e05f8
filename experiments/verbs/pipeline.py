"""Verbs that run the pipeline: ``demo``, ``run``, ``open`` and ``english``, from a config to its report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.application import console, json_result, say, settings_from, then
from experiments.verbs.options import (
    Device,
    DryRun,
    Engine,
    Json,
    Layers,
    Memory,
    Out,
    Parameters,
    Redo,
    Seed,
    Set,
    Task,
    Window,
)
from experiments.verbs.subsets import confined

if TYPE_CHECKING:
    from experiments.config import RunConfig
    from experiments.run.run import Run


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


def require_used(config: RunConfig, text: str | None, address: str | None = None) -> None:
    """Options that a config would not read are refused.

    Raises:
        ValueError: for a text where the task reads none, or a head node where nothing is sent to it.
    """
    from experiments.tasks import own_task

    if text is not None and config.task != "text" and own_task(config.task) is None:
        raise ValueError(
            f"--text is for tasks that read one, task '{config.task}' does not, got '{text}'; leave it out, "
            "or take preset english-demo"
        )
    if address is not None and config.engine != "ray":
        raise ValueError(f"--address is for --engine ray, got engine '{config.engine}'; add --engine ray")


def require_basis(config: RunConfig) -> None:
    """A run looks along the vectors of some basis.

    Raises:
        ValueError: for a config with none.
    """
    if not config.bases:
        raise ValueError("a run needs a basis, 'bases' is empty; name one, e.g. kind: trajectory")


def default_out(config: str, task: str | None = None, seed: int | None = None) -> Path:
    """``runs/NAME``, of the user's file where there is one; another seed has a directory of its own.

    >>> [default_out("demo", seed=seed).as_posix() for seed in (None, 0, 3)]
    ['runs/demo', 'runs/demo', 'runs/demo-3']
    """
    from experiments.tasks import own_task

    own = own_task(task) if task is not None else None
    name = Path(config).stem if own is None else own.file.stem
    return Path("runs") / (f"{name}-{seed}" if seed else name)


#: Preset of the English experiment by its short name.
ENGLISH_PRESETS = {"demo": "english-demo", "mini": "english-mini", "paper": "english-paper"}


def execute(
    config: str,
    out: Path,
    overrides: dict[str, Any],
    redo: list[str] | None = None,
    dry_run: bool = False,
    json_: str | None = None,
    light: bool = False,
) -> dict[str, Any] | None:
    """Run all stages of a config, write summary and report, print the tables.

    Args:
        config: file or preset.
        out: run directory.
        overrides: dotted keys that win over the config's.
        redo: stages to run again, ``changed`` or ``all``.
        dry_run: check everything, say what would be done, and stop.
        json_: where the summary goes besides, a file or ``-``.
        light: add axes and a causal test with few draws, unless the run has been tested already.

    Returns:
        the summary's plain values, None for a dry run.

    Raises:
        ValueError: for settings that do not hold, or a directory that holds a run with others.
    """
    from experiments.config import load_config
    from experiments.verbs.reuse import refuse_other_settings, stages_to_redo

    resolved = load_config(config, overrides)
    require_basis(resolved)
    again = stages_to_redo(resolved, redo)
    refuse_other_settings(resolved, out, redo)
    if dry_run:
        _tell_what_would_run(resolved, out, again, json_)
        return None
    return _carried_out(resolved, out, again, json_, light)


def _carried_out(
    resolved: RunConfig, out: Path, again: list[str], json_: str | None, light: bool
) -> dict[str, Any]:
    """Every stage, the summary and the report, told as they come."""
    from experiments.report.answers import print_summary
    from experiments.report.labels import print_labels
    from experiments.report.page import write_report
    from experiments.run.driver import run_stages
    from experiments.run.run import open_run
    from experiments.run.stages.labels import write_labels
    from experiments.run.summary.write import write_summary
    from experiments.verbs.guard import writing

    started = time.perf_counter()
    with writing(out, repairs=True):
        opened = open_run(resolved, out, say)
        say(
            f"polca-edit: task {opened.task.name}, {opened.task.space.size:,} parameters, "
            f"seed {resolved.seed}, into {out}"
        )
        run_stages(opened, again)
        if light:
            _light_answers(opened)
        labels = write_labels(opened) if opened.task.name == "text" else {}
        summary = write_summary(opened)
        page = write_report(opened.directory, say)
    say(f"  {'total':<24} {time.perf_counter() - started:7.1f} s")
    print_summary(opened.directory, console)
    print_labels(labels, console)
    json_result(summary, json_)
    say(f"Report: {page}")
    then("test", out)
    return summary


def _light_answers(run: Run) -> None:
    """Axes and a causal test with few draws, unless the run has been tested already."""
    from experiments.verbs.light import light_answers

    if not (run.directory / "verdicts.json").exists():
        light_answers(run)


def _tell_what_would_run(config: RunConfig, out: Path, again: list[str], json_: str | None) -> None:
    """The stages that would be run and those that are kept, from the run as it is; nothing is written."""
    from experiments.run.run import preview_run
    from experiments.verbs.reuse import would_run

    todo, kept = would_run(preview_run(config, out), again)
    say(f"{out}: would run {', '.join(todo) or 'no stage'}, then summary and report")
    if kept:
        say(f"  done before, kept: {', '.join(kept)}")
    json_result({"run": str(out), "would_run": todo, "kept": kept}, json_)


def demo(
    seed: Seed = None,
    out: Out = None,
    device: Device = None,
    set_: Set = None,
    redo: Redo = None,
    dry_run: DryRun = False,
    json_: Json = None,
) -> None:
    """Run the main job on the built-in arithmetic task (minutes on two CPU cores)."""
    overrides = settings_from(set_, seed=seed, device=device)
    place = out or default_out("demo", None, seed)
    execute("demo", place, overrides, redo, dry_run, json_, light=True)


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
    window: Window = None,
    device: Device = None,
    engine: Engine = None,
    memory: Memory = None,
    layers: Layers = None,
    parameters: Parameters = None,
    address: Annotated[str | None, typer.Option(help="Ray head node for --engine ray.")] = None,
    set_: Set = None,
    redo: Redo = None,
    dry_run: DryRun = False,
    json_: Json = None,
) -> None:
    """Run a config or preset: train or open, bases, projections, clusters, damage, report.

    A run that was stopped goes on where it was; finished stages are not repeated.
    """
    from experiments.config import load_config
    from experiments.run.memory.budget import parse_memory

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
        memory_gb=parse_memory(memory),
        engine_address=address,
    )
    require_used(load_config(named, overrides), text, address)
    overrides = confined(named, overrides, layers, parameters)
    execute(named, out or default_out(named, task, seed), overrides, redo, dry_run, json_)


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

    if (folder / "series.json").exists():
        raise ValueError(
            f"open reads checkpoints that transformers knows, '{folder}' is a recording of weights alone; "
            f"give a config with the model: polca-edit run CONFIG --checkpoints {folder}"
        )
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
    memory: Memory = None,
    layers: Layers = None,
    parameters: Parameters = None,
    engine: Engine = None,
    seed: Seed = None,
    device: Device = None,
    set_: Set = None,
    redo: Redo = None,
    dry_run: DryRun = False,
    json_: Json = None,
) -> None:
    """Analyse Hugging Face checkpoints: Trainer folders, Pythia or OLMo revisions, adapters."""
    from experiments.run.memory.budget import parse_memory

    overrides = open_overrides(
        folder,
        text,
        base=base,
        names=names,
        step_pattern=step_pattern,
        skip_damaged=skip_damaged,
        preset=preset,
    )
    given = {"memory_gb": parse_memory(memory), "engine": engine}
    overrides.update(settings_from(set_, seed=seed, device=device, **given))
    overrides = confined(preset, overrides, layers, parameters)
    target = out or default_out(folder.resolve().name + ".yaml", None, seed)
    execute(preset, target, overrides, redo, dry_run, json_)


def english(
    preset: Annotated[str, typer.Option(help="demo, mini or paper.")] = "demo",
    text: Annotated[str | None, typer.Option(help="Text: plain, jsonl(.gz) or .npy ids.")] = None,
    probe: Annotated[str | None, typer.Option(help="CoNLL-U file with gold tags, for labels.")] = None,
    out: Out = None,
    seed: Seed = None,
    device: Device = None,
    set_: Set = None,
    redo: Redo = None,
    dry_run: DryRun = False,
    json_: Json = None,
) -> None:
    """The English experiment on a text: tokenizer, training, POLCA, clusters, labels, damage, report."""
    if preset not in ENGLISH_PRESETS:
        raise ValueError(f"--preset must be one of {sorted(ENGLISH_PRESETS)}, got '{preset}'")
    overrides = settings_from(set_, seed=seed, text__file=text, text__probe=probe, device=device)
    named = ENGLISH_PRESETS[preset]
    execute(named, out or default_out(named, None, seed), overrides, redo, dry_run, json_)
