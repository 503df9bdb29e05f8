"""Verb ``doctor``: prints what a folder of checkpoints holds."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.application import json_result, say, then
from experiments.verbs.options import Json

if TYPE_CHECKING:
    from experiments.verbs.doctor.examine import Diagnosis


def doctor(
    folder: Annotated[Path, typer.Argument(help="Checkpoints of any kind, or one checkpoint.")],
    text: Annotated[str | None, typer.Option(help="Text of the run, for its time.")] = None,
    base: Annotated[Path | None, typer.Option(help="Pretrained model that was tuned.")] = None,
    names: Annotated[str, typer.Option(help="Checkpoint names, e.g. 'step*'.")] = "*",
    step_pattern: Annotated[str | None, typer.Option(help="Regular expression, group 1 is the step.")] = None,
    preset: Annotated[str, typer.Option(help="Config file or preset of the run.")] = "huggingface",
    json_: Json = None,
) -> None:
    """Open a checkpoint folder of any kind and print what was found; not 0 where it does not open rightly."""
    from experiments.config import load_config
    from experiments.verbs.doctor.examine import Question, examine
    from experiments.verbs.doctor.outlook import outlook

    load_config(preset)
    if base is not None and not base.exists():
        raise ValueError(f"--base must exist, '{base}' does not; check the path")
    asked = Question(folder, base, names, step_pattern)
    found = examine(asked)
    if not found.problems:
        try:
            found = replace(found, plan=outlook(found, asked, text, preset))
        except ValueError as error:
            found = replace(found, problems=(f"a run could not be started: {error}",))
    json_result(found, json_)
    for line in lines(found):
        say(line)
    if found.problems:
        more = f" (and {len(found.problems) - 1} more above)" if len(found.problems) > 1 else ""
        raise ValueError(f"'{folder}' does not open rightly: {found.problems[0]}{more}")
    if found.model is None:  # weights alone: a config says the model
        return then("run", "CONFIG", "--checkpoints", folder)
    then("open", folder, "--text", text or "FILE", *(["--base", base] if base else []))


def lines(found: Diagnosis) -> list[str]:
    """A diagnosis for the reader, one fact a line."""
    rows = [
        ("folder", found.folder),
        ("kind", found.kind),
        ("order", found.order),
        *_stored(found),
        *_model(found),
        ("losses", _agreement(found)),
        ("spacing", _spacing(found)),
        *(("problem", problem) for problem in found.problems),
        *(("would run" if number == 0 else "", line) for number, line in enumerate(found.plan)),
    ]
    return [f"{head:<11} {text}" for head, text in rows if text]


def _stored(found: Diagnosis) -> list[tuple[str, str]]:
    """Dtypes, prefixes, spellings and missing names over all checkpoints."""
    every = found.checkpoints
    dtypes = sorted({dtype for one in every for dtype in one.dtypes})
    prefixes = list(dict.fromkeys(prefix for one in every for prefix in one.prefixes))
    respelled, ignored = max(one.respelled for one in every), max(one.ignored for one in every)
    odd = [one for one in every if one.missing or one.unknown]
    by_library = [one for one in odd if one.problem is None]
    missing = [f"{one.name}: '{one.missing[0]}'" for one in odd if one.missing and one.problem]
    return [
        ("dtype", ", ".join(dtypes)),
        ("prefixes", f"{', '.join(prefixes)} (stripped)" if prefixes else "none"),
        ("spellings", f"{respelled} tensors under older or shorter names" if respelled else ""),
        ("renamed", f"by transformers in {len(by_library)} checkpoints" if by_library else ""),
        ("ignored", f"{ignored} buffers of older releases" if ignored else ""),
        ("missing", ", ".join(missing[:4]) if missing else "nothing" if found.model else "not known"),
    ]


def _model(found: Diagnosis) -> list[tuple[str, str]]:
    model = found.model
    if model is None:
        return [("model", "weights alone, or none that transformers can build")]
    context = "any length" if model.context is None else f"context {model.context:,}"
    tied = "; ".join(" = ".join(group) for group in model.tied) or "nothing"
    if model.tied_by_config and not model.tied and found.kind != "adapters":
        tied += " (config.json says tied, the file holds an untied head, which is used)"
    return [
        ("model", f"{model.name}, {model.parameters:,} parameters that training moves, {context}"),
        ("tied", tied),
        ("tokenizer", model.tokenizer),
    ]


def _agreement(found: Diagnosis) -> str:
    pairs = [(abs(one.ours - one.library), one) for one in found.checkpoints if one.ours and one.library]
    if not pairs:
        return "not compared (no model of transformers)" if found.model is None else "not compared"
    worst, one = max(pairs, key=lambda pair: pair[0])
    return (
        f"{len(pairs)} of {len(found.checkpoints)} checkpoints agree with transformers, largest difference "
        f"{worst:.1e} nats per token ('{one.name}': {one.ours:.6f} here, {one.library:.6f} there)"
    )


def _spacing(found: Diagnosis) -> str:
    gaps = found.gaps
    if not gaps:
        return "one checkpoint"
    return f"{min(gaps):,} to {max(gaps):,} steps between checkpoints, median {statistics.median(gaps):,.0f}"
