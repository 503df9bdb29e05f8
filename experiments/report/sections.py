"""Chapters of the page that other experiments add: removals, the causal test, discovery.

A section is a title over blocks; a block is anything with ``__html__``: words, a table, a drawing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from markupsafe import Markup

from experiments.report.answers import share_cell
from experiments.report.formats import MISSING, decimal, nats, share
from experiments.report.style import Drawing
from experiments.report.tables import Cell, Column, Table, table
from experiments.report.verdicts import basis_table, verdict_table
from experiments.run.store import RunDirectory
from experiments.run.summary.records import Summary
from polca_edit.artifacts import load_record


class Block(Protocol):
    """A part of a section as HTML; whoever makes it escapes what came from data."""

    def __html__(self) -> str: ...


@dataclass(frozen=True)
class Section:
    """A chapter of the page.

    Attributes:
        title: heading.
        blocks: what stands below it, in order.
    """

    title: str
    blocks: Sequence[Block]

    @property
    def drawings(self) -> list[Drawing]:
        """Its figures."""
        return [block for block in self.blocks if isinstance(block, Drawing)]


def paragraph(text: str) -> Markup:
    """A paragraph of plain words."""
    return Markup("<p>{}</p>").format(text)


def note(text: str) -> Markup:
    """A paragraph in small print."""
    return Markup('<p class="note">{}</p>').format(text)


# -- removals -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refit:
    """What a refit of the outputs gives back; chance is that of the skill's commonest answer."""

    chance: float
    kept: float


@dataclass(frozen=True)
class Removal:
    """One removal in an edit's result file; shares are of headroom, its other keys are ignored."""

    skill: str
    target_share: float
    worst_off_share: float
    worst_positive_share: float
    kl: float
    accuracy: float
    norm: float
    rank: int
    refit: Refit
    groups: dict[str, float | None]


@dataclass(frozen=True)
class RemovalFile:
    """``edits/NAME.result.json``."""

    removals: tuple[Removal, ...]


def removal_section(directory: RunDirectory) -> Section | None:
    """Every edit that ``polca-edit remove`` left in the run."""
    rows = [
        _removal_cells(path, removal)
        for path in sorted((directory / "edits").glob("*.result.json"))
        for removal in load_record(RemovalFile, path).removals
    ]
    if not rows:
        return None
    columns = (
        Column("edit", left=True), Column("skill", left=True), "damage on target", "worst other group",
        "its positive part", "largest KL elsewhere", "accuracy (chance)", "kept after a refit", "norm / rank",
        Column("share of headroom per group", left=True),
    )  # fmt: skip
    text = (
        "Edits fitted on the select split and judged on the evaluate split. Damage is in shares of "
        "headroom; a refit may change an output bias and permute the answers."
    )
    return Section("Skill removal", (paragraph(text), table(columns, rows)))


def _removal_cells(path: Path, removal: Removal) -> list[Cell | str]:
    groups = [f"{name} {share(value)}" for name, value in removal.groups.items() if value is not None]
    return [
        path.name.removesuffix(".result.json"),
        removal.skill,
        share_cell(removal.target_share),
        share_cell(removal.worst_off_share),
        share_cell(removal.worst_positive_share),
        Cell(decimal(removal.kl, 3), sort=removal.kl),
        Cell(f"{share(removal.accuracy)} ({share(removal.refit.chance)})", sort=removal.accuracy),
        share_cell(removal.refit.kept),
        f"{decimal(removal.norm)} / {removal.rank}",
        ", ".join(groups),
    ]


# -- the causal test ------------------------------------------------------------------------------


def causal_section(summary: Summary) -> Section | None:
    """The chapter "Causal test": answers about every basis, then one line per pair, family by family."""
    rows = [(name, v) for name, a in summary.analyses.items() for v in a.verdicts]
    if not rows:
        return None
    text = (
        "Pairs of a vector and a token group that were fixed on the select split, tested on tokens that "
        "nothing had used. Needed: undoing the movement costs the group more than random edits of its size. "
        "Selective: no other group loses a third of that, and no direction of the span is as selective at "
        "the same total damage. Carrier: inserted alone, the movement brings the skill."
    )
    answers = {name: a.answers for name, a in summary.analyses.items() if a.answers}
    return Section(
        "Causal test",
        (paragraph(text), *([basis_table(answers)] if answers else []), verdict_table(rows, look="cards")),
    )


# -- discovery ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WindowRow:
    """One stretch of training undone in the final model: skill -> share of headroom lost."""

    start: int
    end: int
    norm: float
    shares: dict[str, float]


@dataclass(frozen=True)
class FoundCluster:
    """Tokens that many partial undo edits hurt alike.

    Attributes:
        name: short name.
        tokens: how many.
        skill: nearest known skill, None where there are none.
        homogeneity: share of its tokens with that skill.
        recall: share of the skill's tokens in it.
        lift: homogeneity over what a random group would have.
    """

    name: str
    tokens: int
    skill: str | None = None
    homogeneity: float | None = None
    recall: float | None = None
    lift: float | None = None


@dataclass(frozen=True)
class AxisRow:
    """A direction of a basis's span whose own movement hurts one skill most selectively when undone."""

    basis: str
    skill: str
    damage: float
    share: float | None
    worst: str | None
    worst_share: float | None


@dataclass(frozen=True)
class Discovery:
    """``discovery.json`` of a run: what undoing training, without a basis chosen before, has found."""

    timeline: tuple[WindowRow, ...] = ()
    clusters: tuple[FoundCluster, ...] = ()
    axes: tuple[AxisRow, ...] = ()


def discovery_section(found: Discovery) -> Section:
    """The chapter "Discovery": timeline, interventional clusters, skill axes; what is empty is left out."""
    blocks: list[Block] = []
    if found.timeline:
        blocks += [
            _heading("Timeline: which stretch of training each skill needs"),
            timeline_table(found.timeline),
        ]
    if found.clusters:
        blocks += [_heading("Tokens that are hurt together"), found_table(found.clusters)]
    if found.axes:
        blocks += [_heading("Skill axes (found with the skill's labels)"), axes_table(found.axes)]
    return Section("Discovery", blocks)


def _heading(text: str) -> Markup:
    return Markup("<h3>{}</h3>").format(text)


def timeline_table(rows: Sequence[WindowRow]) -> Table:
    """Share of headroom that each skill loses when a window's movement is undone."""
    skills = sorted({skill for row in rows for skill in row.shares})
    cells = [
        [
            Cell(f"{row.start} to {row.end}", sort=row.start),
            Cell(decimal(row.norm), sort=row.norm),
            *(share_cell(row.shares.get(skill)) for skill in skills),
        ]
        for row in rows
    ]
    return table(["steps undone", "norm", *skills], cells)


def found_table(rows: Sequence[FoundCluster]) -> Table:
    """Interventional clusters beside the nearest known skill."""
    columns: list[Column | str] = [
        "cluster",
        "tokens",
        Column("nearest skill", left=True),
        "homogeneity",
        "recall",
        "lift",
    ]
    cells: list[list[Cell | str]] = [
        [
            row.name,
            Cell(str(row.tokens), sort=row.tokens),
            row.skill or MISSING,
            *(Cell(decimal(value), sort=value) for value in (row.homogeneity, row.recall, row.lift)),
        ]
        for row in rows
    ]
    return table(columns, cells)


def axes_table(rows: Sequence[AxisRow]) -> Table:
    """Skill axes with what undoing them costs the skill and the worst other one."""
    columns: list[Column | str] = [
        Column("span", left=True), Column("skill", left=True), "damage (nats)", "of headroom",
        Column("worst other skill", left=True), "its share",
    ]  # fmt: skip
    cells: list[list[Cell | str]] = [
        [
            row.basis, row.skill, Cell(nats(row.damage), sort=row.damage), share_cell(row.share),
            row.worst or MISSING, share_cell(row.worst_share),
        ]
        for row in rows
    ]  # fmt: skip
    return table(columns, cells)


# -- which chapters a run has ---------------------------------------------------------------------


def sections_of(directory: RunDirectory, summary: Summary) -> Iterator[Section]:
    """Every added chapter that the run has records for."""
    if (causal := causal_section(summary)) is not None:
        yield causal
    file = directory / "discovery.json"
    if file.exists():
        yield discovery_section(load_record(Discovery, file))
    if (removals := removal_section(directory)) is not None:
        yield removals
