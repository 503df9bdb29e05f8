"""Two finished runs side by side: what differs in their settings, and whether they found the same.

Only records are read. A verdict is about one trained model, so two runs that agree say more than one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from experiments.report.answers import share_cell
from experiments.report.chapters.grouping import interventional_groups
from experiments.report.figures.run import both_losses
from experiments.report.formats import MISSING, count, decimal, listed
from experiments.report.headline import LOOKS, Line, lines, read_found
from experiments.report.page import environment, skill_colours
from experiments.report.style import Drawing
from experiments.report.tables import Cell, Column, Table, table
from experiments.report.view import RunView, read_run
from experiments.run.store import RunDirectory
from polca_edit.checkpoints.files import write_atomically

SCHEMA = "polca-edit/comparison/1"
CURVES_CAPTION = (
    "Exact loss of the select tokens of each skill over training: {first} solid, {second} dashed, all tokens "
    "in the darkest line."
)


@dataclass(frozen=True)
class Setting:
    """A key of config.yaml on which the runs differ; None where a run does not have it."""

    key: str
    first: str | None
    second: str | None


@dataclass(frozen=True)
class Side:
    """One run's line of the first table; None where it says nothing of the skill."""

    what: str
    word: str
    damage: float | None
    share: float | None
    alone: bool


@dataclass(frozen=True)
class SkillPair:
    """A skill in both runs.

    Attributes:
        skill: name.
        first: what takes it away there.
        second: the same in the other run.
        polca: best F1 of a POLCA cluster with it, in either run.
        interventional: best F1 of an interventional cluster; None where a run has none.
    """

    skill: str
    first: Side | None
    second: Side | None
    polca: tuple[float, float]
    interventional: tuple[float | None, float | None]

    @property
    def agree(self) -> str:
        """Whether the runs say the same: the skill goes alone in both, in neither, or in one."""
        if self.first is None or self.second is None:
            return "judged in neither" if self.first is self.second else "judged in one"
        if self.first.alone != self.second.alone:
            return "alone in one"
        return "alone in both" if self.first.alone else "alone in neither"


@dataclass(frozen=True)
class BasisPair:
    """A basis that both runs have: (first, second) of each number."""

    basis: str
    explained_share: tuple[float | None, float | None]
    clusters: tuple[int, int]
    aligned: tuple[str, str]
    special: tuple[str, str]


@dataclass(frozen=True)
class Comparison:
    """What ``polca-edit compare --json`` writes.

    Attributes:
        runs: the two directories.
        settings: keys that differ.
        skills: that either run knows.
        bases: that both have.
        schema: of the file.
    """

    runs: tuple[str, str]
    settings: tuple[Setting, ...]
    skills: tuple[SkillPair, ...]
    bases: tuple[BasisPair, ...]
    schema: str = SCHEMA


def read_pair(first: Path, second: Path) -> tuple[RunView, RunView]:
    """Two finished runs of one task.

    Raises:
        ValueError: for one run given twice, or runs that share neither task nor skill.
    """
    if first.resolve() == second.resolve():
        raise ValueError(f"compare needs two runs, got '{first}' twice; give another run directory")
    one, other = read_run(RunDirectory(first)), read_run(RunDirectory(second))
    tasks = one.summary.task, other.summary.task
    if tasks[0] != tasks[1] and not set(one.skills) & set(other.skills):
        raise ValueError(
            f"two runs can be compared where they share a task or a skill, got tasks '{tasks[0]}' and "
            f"'{tasks[1]}' without a common skill; give runs of one task"
        )
    return one, other


def compared(one: RunView, other: RunView) -> Comparison:
    """Everything that two runs say of the same settings, skills and bases."""
    sides = [_sides(view) for view in (one, other)]
    fits = [_fits(view) for view in (one, other)]
    skills = []
    for skill in sorted(set(one.skills) | set(other.skills)):
        polca = tuple(fit[0].get(skill, 0.0) for fit in fits)
        found = tuple(fit[1].get(skill) for fit in fits)
        skills.append(
            SkillPair(
                skill, sides[0].get(skill), sides[1].get(skill), (polca[0], polca[1]), (found[0], found[1])
            )
        )
    bases = []
    for name, a in one.summary.analyses.items():
        b = other.summary.analyses.get(name)
        if b is not None:
            answers = [(x.answers.get("A", MISSING), x.answers.get("P", MISSING)) for x in (a, b)]
            bases.append(
                BasisPair(
                    name,
                    (a.basis.explained_share, b.basis.explained_share),
                    (len(a.clusters), len(b.clusters)),
                    (answers[0][0], answers[1][0]),
                    (answers[0][1], answers[1][1]),
                )
            )
    runs = str(one.directory.path), str(other.directory.path)
    return Comparison(runs, _settings(one.directory, other.directory), tuple(skills), tuple(bases))


def _sides(view: RunView) -> dict[str, Side]:
    return {line.skill: _side(line) for line in lines(view, read_found(view.directory))}


def _side(line: Line) -> Side:
    return Side(line.what, line.word, line.damage, line.part, line.alone)


def _fits(view: RunView) -> tuple[dict[str, float], dict[str, float]]:
    """Skill -> best F1 of POLCA's clusters, and of interventional ones."""
    polca = {
        skill: max((c.entry.f1(skill) for a in view.analyses for c in a.clusters), default=0.0)
        for skill in view.skills
    }
    groups = [group for _, found in interventional_groups(view) for group in found]
    acted = {skill: max(group.f1.get(skill, 0.0) for group in groups) for skill in view.skills if groups}
    return polca, acted


def _settings(one: RunDirectory, other: RunDirectory) -> tuple[Setting, ...]:
    first, second = (_flat(yaml.safe_load(_text(d / "config.yaml"))) for d in (one, other))
    keys = sorted(set(first) | set(second))
    return tuple(Setting(k, first.get(k), second.get(k)) for k in keys if first.get(k) != second.get(k))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _flat(value: object, key: str = "") -> dict[str, str]:
    """Dotted keys of nested settings.

    >>> _flat({"seed": 3, "bases": [{"kind": "hessian"}]})
    {'seed': '3', 'bases.0.kind': 'hessian'}
    """
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list):
        inner = {str(i): v for i, v in enumerate(value)}.items()
    else:
        return {} if value is None and not key else {key: MISSING if value is None else str(value)}
    return {k: v for name, own in inner for k, v in _flat(own, f"{key}.{name}".lstrip(".")).items()}


# -- tables and the page --------------------------------------------------------------------------


def run_names(found: Comparison) -> tuple[str, str]:
    """Short names of the runs; their paths where those are the same."""
    first, second = (Path(run).name for run in found.runs)
    return (first, second) if first != second else found.runs


def settings_table(found: Comparison) -> Table:
    """Settings that differ."""
    names = run_names(found)
    rows = [[s.key, s.first or MISSING, s.second or MISSING] for s in found.settings]
    return table([Column(h, left=True) for h in ("setting", *names)], rows, "Settings that differ")


def skills_table(found: Comparison, hues: Mapping[str, str]) -> Table:
    """What takes each skill away in either run, and whether they agree."""
    names = run_names(found)
    columns: list[Column | str] = [Column("skill", left=True)]
    for name in names:
        columns += [
            Column(f"{name}: taken by", left=True),
            Column(f"{name}: word", left=True),
            f"{name}: share",
        ]
    columns.append(Column("goes alone?", left=True))
    rows: list[list[Cell | str]] = []
    for pair in found.skills:
        cells: list[Cell | str] = [Cell(pair.skill, colour=hues.get(pair.skill), look="strong")]
        for side in (pair.first, pair.second):
            if side is None:
                cells += [MISSING] * 3
            else:
                cells += [side.what, Cell(side.word, look=LOOKS.get(side.word, "")), share_cell(side.share)]
        rows.append([*cells, Cell(pair.agree, look="strong")])
    return table(columns, rows, "What takes each skill away, in either run")


def clusters_table(found: Comparison, hues: Mapping[str, str]) -> Table:
    """Best F1 of either kind of cluster with each skill, in either run."""
    names = run_names(found)
    heads = [f"{kind}, {name}" for kind in ("POLCA", "interventional") for name in names]
    rows = [
        [
            Cell(pair.skill, colour=hues.get(pair.skill), look="strong"),
            *(Cell(decimal(v), sort=v) for v in (*pair.polca, *pair.interventional)),
        ]
        for pair in found.skills
    ]
    return table([Column("skill", left=True), *heads], rows, "Best cluster of each skill (F1)")


def bases_table(found: Comparison) -> Table:
    """Explained share, clusters and answers of the bases that both runs have."""
    names = run_names(found)
    heads: list[Column | str] = [Column("basis", left=True)]
    for label in ("explained share", "clusters"):
        heads += [f"{label}, {name}" for name in names]
    for label in ("clustered tokens hurt?", "axes special?"):
        heads += [Column(f"{label} {name}", left=True) for name in names]
    rows = [
        [
            Cell(pair.basis),
            *(share_cell(value) for value in pair.explained_share),
            *(Cell(count(value), sort=value) for value in pair.clusters),
            *(Cell(answer) for answer in (*pair.aligned, *pair.special)),
        ]
        for pair in found.bases
    ]
    return table(heads, rows, "Bases of both runs")


def tables_of(found: Comparison, hues: Mapping[str, str]) -> list[Table]:
    """Every table that has something to show, for the terminal and for the page."""
    made = [settings_table(found), skills_table(found, hues), clusters_table(found, hues), bases_table(found)]
    return [each for each in made if each.rows]


def in_words(found: Comparison) -> str:
    """The comparison in two sentences."""
    names = run_names(found)
    judged = [pair for pair in found.skills if pair.agree != "judged in neither"]
    agree = [pair.skill for pair in judged if pair.agree in ("alone in both", "alone in neither")]
    differ = [pair.skill for pair in judged if pair.skill not in agree]
    count = len(found.settings)
    told = f"{names[0]} and {names[1]} differ in {count} setting{'' if count == 1 else 's'}."
    if judged:
        told += f" They agree on {len(agree)} of {len(judged)} skills on whether one goes alone"
        told += f", not on {listed(differ)}." if differ else "."
    return told


def write_comparison(one: RunView, other: RunView, found: Comparison, path: Path) -> Path:
    """One page with the tables and both runs' losses; neither run is changed."""
    hues, names = skill_colours([*one.skills, *other.skills]), run_names(found)
    curves = both_losses([(v.analyses[0].steps, _groups(v)) for v in (one, other)], names, hues)
    caption = CURVES_CAPTION.format(first=names[0], second=names[1])
    page = environment().get_template("compare.html.j2").render(
        title=f"{names[0]} and {names[1]}",
        words=in_words(found),
        runs=found.runs,
        tables=tables_of(found, hues),
        drawing=Drawing("losses of both runs", caption, curves),
    )  # fmt: skip
    write_atomically(path, lambda part: part.write_text(page, encoding="utf-8"))
    return path


def _groups(view: RunView) -> dict[str, np.ndarray]:
    losses = view.analyses[0].losses
    own = {name: losses[:, mask].mean(1, dtype=np.float64) for name, mask in view.skills.items()}
    return {**own, "all tokens": losses.mean(1, dtype=np.float64)}
