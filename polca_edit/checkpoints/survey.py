"""What checkpoints a directory holds, in which order, and what in it is none: names and headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from polca_edit.checkpoints.files import damage_of, is_weight_file
from polca_edit.checkpoints.step_names import has_step_word, rounded_step, step_of


@dataclass(frozen=True)
class Revision:
    """One checkpoint on disk.

    Attributes:
        name: file, folder or revision name.
        step: optimiser steps.
        path: file or folder that holds the weights.
    """

    name: str
    step: int
    path: Path


@dataclass(frozen=True)
class Survey:
    """The checkpoints of a directory.

    Attributes:
        kind: ``folders``, ``hub cache`` or ``files``.
        revisions: ordered by step.
        left_out: names that look like checkpoints but say no step.
    """

    kind: str
    revisions: tuple[Revision, ...]
    left_out: tuple[str, ...] = ()

    def sentence(self) -> str:
        """The order in which the checkpoints are read, and what is left out.

        >>> Survey("folders", (Revision("step5", 5, Path("step5")),), ("final",)).sentence()
        "1 checkpoint in order: 5; left out, no step in the name: 'final'"
        """
        steps = [str(revision.step) for revision in self.revisions]
        shown = ", ".join(steps if len(steps) <= 12 else [*steps[:6], "...", *steps[-5:]])
        text = f"{len(steps)} checkpoint{'s' if len(steps) != 1 else ''} in order: {shown}"
        if self.left_out:
            names = ", ".join(f"'{name}'" for name in self.left_out[:6])
            more = f" and {len(self.left_out) - 6} more" if len(self.left_out) > 6 else ""
            text += f"; left out, no step in the name: {names}{more}"
        return text


def find_revisions(
    directory: Path | str, *, names: str = "*", step_pattern: str | None = None
) -> list[Revision]:
    """Checkpoints under a directory, ordered by step; see :func:`survey`."""
    return list(survey(directory, names=names, step_pattern=step_pattern).revisions)


def survey(directory: Path | str, *, names: str = "*", step_pattern: str | None = None) -> Survey:
    """Checkpoints under a directory, ordered by step, and what was left out.

    Understood are a folder per checkpoint (Trainer output, local revisions), a hub cache of one
    model (``refs/`` with one file per revision, ``snapshots/`` with the folders they name), and, where
    no folder is named by step, weight files named by step. Where some names have a word for steps
    (``checkpoint-500``), a name with a lone number (``gpt-2``) is none of them.

    Args:
        directory: where to look.
        names: shell pattern the names must match.
        step_pattern: see :func:`~polca_edit.checkpoints.step_names.step_of`.

    Raises:
        ValueError: if nothing is there, a step is written in thousands, or a step occurs twice.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"a checkpoint directory must exist, '{directory}' does not; check the path")
    if (directory / "key.json").exists():
        raise ValueError(
            f"a recording must have its series.json, that in '{directory}' was stopped early; "
            "run it again to finish it"
        )
    cache = (directory / "refs").is_dir() and (directory / "snapshots").is_dir()
    every = _references(directory) if cache else [(path.name, path) for path in sorted(directory.iterdir())]
    named = [(name, path) for name, path in every if fnmatchcase(name, names) and _may_hold(path)]
    stepped = {name: step_of(name, step_pattern) for name, _ in named}
    if step_pattern is None:
        _ask_about_rounded(named)
        if any(has_step_word(name) for name, path in named if not path.is_file()):
            stepped = {name: step if has_step_word(name) else None for name, step in stepped.items()}
    found = [Revision(name, step, path) for name, path in named if (step := stepped[name]) is not None]
    folders = [revision for revision in found if not revision.path.is_file()]
    if not found:
        alone = (directory / "config.json").exists() or any(map(is_weight_file, directory.iterdir()))
        raise ValueError(
            f"'{directory}' must hold checkpoints named by step, found none matching '{names}'"
            + (" (it looks like one checkpoint itself)" if alone else "")
            + "; give the folder that contains them, or a pattern"
        )
    kept = folders or found
    taken = {revision.name for revision in kept}
    left = tuple(n for n, path in named if n not in taken and (not folders or _looks_whole(path)))
    return Survey("hub cache" if cache else "folders" if folders else "files", tuple(by_step(kept)), left)


def _may_hold(path: Path) -> bool:
    return path.is_dir() or is_weight_file(path) or not path.exists()


def _looks_whole(path: Path) -> bool:
    return is_weight_file(path) or (path.is_dir() and damage_of(path) is None)


def _references(directory: Path) -> list[tuple[str, Path]]:
    """(revision, folder) of a hub cache; pull requests are no revisions of the model's own."""
    root = directory / "refs"
    found = []
    for ref in sorted(path for path in root.rglob("*") if path.is_file()):
        parts = ref.relative_to(root).parts
        if parts[0] != "pr":
            found.append(("/".join(parts), directory / "snapshots" / ref.read_text().strip()))
    return found


def _ask_about_rounded(named: Iterable[tuple[str, Path]]) -> None:
    for name, _ in named:
        if (rounded := rounded_step(name)) is not None:
            raise ValueError(
                f"a step must be a whole number of optimiser steps, '{name}' says '{rounded}'; leave it out "
                "with a name pattern, or give the folders with their steps from Python"
            )


def by_step(revisions: Sequence[Revision]) -> list[Revision]:
    """Ordered by step.

    Raises:
        ValueError: if two have the same step.
    """
    ordered = sorted(revisions, key=lambda revision: revision.step)
    for one, other in zip(ordered, ordered[1:], strict=False):
        if one.step == other.step:
            raise ValueError(
                f"every checkpoint needs its own step, '{one.name}' and '{other.name}' both say {one.step}; "
                "narrow the name pattern or give a step pattern"
            )
    return ordered


def whole_revisions(revisions: Sequence[Revision], *, skip_damaged: bool = False) -> list[Revision]:
    """The readable ones.

    Args:
        revisions: candidates.
        skip_damaged: leave damaged ones out instead of refusing.

    Raises:
        ValueError: naming every damaged checkpoint and what is wrong with it, or if none is whole.
    """
    problems = {r.name: problem for r in revisions if (problem := damage_of(r.path)) is not None}
    if problems and (not skip_damaged or len(problems) == len(revisions)):
        listed = "; ".join(f"'{name}': {problem}" for name, problem in list(problems.items())[:5])
        remedy = "copy them again" if skip_damaged else "copy them again or leave them out with skip_damaged"
        raise ValueError(
            f"every checkpoint must be whole, {len(problems)} of {len(revisions)} are not ({listed}); "
            f"{remedy}"
        )
    return [r for r in revisions if r.name not in problems]
