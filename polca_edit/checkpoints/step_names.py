"""Which names of files, folders and revisions say a step, and which numbers in them are none.

A number counts where a word for steps stands before it (``checkpoint-500``), or where it is the whole
name or its only number and last part (``7.pt``, ``model-100.pt``). Sizes (``70m``), precisions (``fp16``),
versions (``-v1``), metric values (``loss3.95``), shards and dates are no steps.
"""

from __future__ import annotations

import re
from pathlib import Path

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

#: What follows a whole step: no further digit or letter, no decimals, no group of thousands.
_END = r"(?![A-Za-z0-9])(?!\.\d)(?![_,]\d{3}(?!\d))"
#: How a step is written in the names of files, folders and revisions, most specific first.
STEP_PATTERNS = tuple(
    rf"(?<![A-Za-z]){word}[-_=]*(\d+){_END}"
    for word in ("checkpoint", "(?:global[-_]?)?step", "iter(?:ation)?", "ckpt", "epoch")
)
#: A step in a unit of its own, such as ``step10k``.
_ROUNDED = re.compile(r"(?<![A-Za-z])(?:checkpoint|step|iter(?:ation)?|ckpt)[-_=]*(\d+(?:\.\d+)?[kKmMbB])\b")
#: Lightning's mark of a second file for the same step.
_VERSION = re.compile(r"-v\d+$")
#: Words before a number that say it is something else.
_NO_STEP = re.compile(
    r"(loss|acc|accuracy|ppl|perplexity|bleu|rouge|f1|auc|score|metric|val|eval|best|fold|seed|rank|shard|part|"
    r"version|lr|bs|batch|gpu|size|layer|layers|of|top|run|trial|gpt|llama|phi|opt|qwen|gemma|t5)\d*$",
    re.IGNORECASE,
)


def stem_of(name: str) -> str:
    """The last part of a path without a suffix of weight files and Lightning's ``-v1``."""
    stem = Path(name).name
    for suffix in WEIGHT_SUFFIXES:
        stem = stem.removesuffix(suffix)
    return _VERSION.sub("", stem)


def step_of(name: str, pattern: str | None = None) -> int | None:
    """Optimiser steps named by a checkpoint file, folder or revision, None where no number is one.

    >>> [step_of(n) for n in ("checkpoint-500", "step1000-tokens4B", "stage1-step20-tokens1B", "7.pt")]
    [500, 1000, 20, 7]
    >>> [step_of(n) for n in ("step100_loss3.95.pt", "epoch=3-step=20-v1.ckpt", "tiny-70m-final", "fp16")]
    [100, 20, None, None]

    Args:
        name: for example ``checkpoint-500``, ``step1000-tokens4B`` or ``runs/step30.pt``.
        pattern: regular expression whose first group is the step; default :data:`STEP_PATTERNS` and then a
            lone number.

    Raises:
        ValueError: for a pattern that is no regular expression with a group of digits.
    """
    if pattern is not None:
        return _by_pattern(name, pattern)
    stem = stem_of(name)
    for candidate in STEP_PATTERNS:
        found = re.search(candidate, stem)
        if found:
            return int(found.group(1))
    return _lone_number(stem)


def has_step_word(name: str) -> bool:
    """Whether a word for steps stands before the number, so that it is no part of a name.

    >>> has_step_word("checkpoint-500"), has_step_word("500")
    (True, False)
    """
    return any(re.search(candidate, stem_of(name)) for candidate in STEP_PATTERNS)


def rounded_step(name: str) -> str | None:
    """A step that is written in thousands or millions, which may be rounded; None for every other name.

    >>> rounded_step("step10k"), rounded_step("step1000")
    ('10k', None)
    """
    found = _ROUNDED.search(stem_of(name))
    return found.group(1) if found else None


def _by_pattern(name: str, pattern: str) -> int | None:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"a step pattern must be a regular expression, '{pattern}' is none ({error}); "
            r"write for example 'ckpt-(\d+)'"
        ) from error
    if compiled.groups < 1:
        raise ValueError(
            f"a step pattern must have a group around the step, '{pattern}' has none; "
            r"write for example 'ckpt-(\d+)'"
        )
    stem = Path(name).name
    for suffix in WEIGHT_SUFFIXES:
        stem = stem.removesuffix(suffix)
    found = compiled.search(stem)
    if found is None or found.group(1) is None:
        return None
    if not found.group(1).isdecimal():
        raise ValueError(
            f"the first group of a step pattern must match digits, '{pattern}' matched "
            f"'{found.group(1)}' in '{name}'; move the group around the number"
        )
    return int(found.group(1))


def _lone_number(stem: str) -> int | None:
    """The number of a name that holds no other and ends with it."""
    parts = re.split(r"[-_= ]+", stem)
    numbers = [part for part in parts if part.isdecimal()]
    if len(numbers) != 1 or parts[-1] != numbers[0]:
        return None
    return None if len(parts) > 1 and _NO_STEP.search(parts[-2]) else int(numbers[0])
