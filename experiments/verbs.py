"""``polca-edit open``, ``english`` and ``plan``: from checkpoints or a text to a report, and its cost.

Models are imported when a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.config import load_config

#: Preset of the English experiment by its short name.
ENGLISH_PRESETS = {"demo": "english-demo", "mini": "english-mini", "paper": "english-paper"}


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
    from polca_edit.checkpoints.huggingface import base_of_adapter, is_adapter
    from polca_edit.checkpoints.opening import find_revisions, whole_revisions

    revisions = find_revisions(folder, names=names, step_pattern=step_pattern)
    last = whole_revisions(revisions, skip_damaged=skip_damaged)[-1].path
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
    from experiments.run.run import execute, settings_from

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
    from experiments.run.run import execute, settings_from

    if preset not in ENGLISH_PRESETS:
        raise ValueError(f"--preset must be one of {sorted(ENGLISH_PRESETS)}, got '{preset}'")
    overrides = settings_from(set_, seed=seed, text__file=text, text__probe=probe, device=device)
    target = out or Path("runs") / f"english-{preset}"
    execute(ENGLISH_PRESETS[preset], target, overrides, redo, dry_run)


def label(
    directory: Annotated[Path, typer.Argument(help="A finished run.")],
    transfer: Annotated[
        str | None,
        typer.Option(help="Another text: do the labels hold there? (labels/transfer.json)"),
    ] = None,
    sequences: Annotated[int, typer.Option(min=4, help="Sequences of that text.")] = 32,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Label the clusters of a run from what their tokens share, and draw the report again.

    Examples: `polca-edit label runs/english-demo` ·
    `polca-edit label runs/english-demo --transfer wikitext2/valid.txt`
    """
    import json

    from experiments.report.labels import print_labels, transferred_table
    from experiments.report.page import write_report
    from experiments.run.labels import transferred_labels, write_labels
    from experiments.run.run import console
    from experiments.run.stages import load_run
    from experiments.run.summary import write_summary
    from experiments.tasks.text import transfer_tokens
    from polca_edit.artifacts import to_plain
    from polca_edit.checkpoints.files import write_json

    run = load_run(directory)
    if transfer is not None:
        other = transfer_tokens(run.config, transfer, sequences)
        rows = [row for b in run.config.bases for row in transferred_labels(run, b.label, other)]
        found = {"text": transfer, "rows": to_plain(rows)}
        write_json(run.directory.path / "labels" / "transfer.json", found)
        console.print(transferred_table(rows).terminal())
        return
    labels = write_labels(run)
    write_summary(run)
    page = write_report(run.directory, typer.echo)
    if json_:
        typer.echo(json.dumps(to_plain(labels), indent=1, sort_keys=True))
    else:
        print_labels(labels, console)
        typer.echo(f"Report: {page}")


def plan(
    config: Annotated[str, typer.Argument(help="Config file, or a preset by name.")],
    text: Annotated[str | None, typer.Option(help="Text file for task 'text'.")] = None,
    budget_minutes: Annotated[float | None, typer.Option(help="Find settings that fit this.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a config key.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a run would cost on this machine: passes, products, bytes, memory, time. Nothing is run.

    Examples: `polca-edit plan mini` · `polca-edit plan english --text wiki.jsonl.gz --budget-minutes 20`
    """
    import json
    import tempfile

    from experiments.run.cost import describe, make_plan
    from experiments.run.run import settings_from

    resolved = load_config(config, settings_from(set_, text__file=text))
    with tempfile.TemporaryDirectory() as folder:
        budget = None if budget_minutes is None else 60 * budget_minutes
        found = make_plan(resolved, Path(folder), budget)
    if json_:
        typer.echo(json.dumps(found, indent=1, sort_keys=True))
        return
    typer.echo(describe(found))
