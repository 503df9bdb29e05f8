"""Chapters of the page that other experiments add: removals, the causal test, discovery.

A section is a title over blocks; a block is anything with ``__html__``: words, a table, a drawing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from experiments.report.answers import share_cell
from experiments.report.blocks import Section, paragraph
from experiments.report.chapters.discovery import discovery_section
from experiments.report.chapters.undoing import Undone, undoing_blocks
from experiments.report.chapters.verdicts import basis_table, verdict_table
from experiments.report.figures.undo import Returned
from experiments.report.formats import decimal, share
from experiments.report.tables import Cell, Column, table
from experiments.run.store import RunDirectory
from experiments.run.summary.records import Summary
from polca_edit.artifacts import load_record

# -- removals -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refit:
    """What a refit of the outputs gives back; chance is that of the skill's commonest answer."""

    chance: float
    kept: float


@dataclass(frozen=True)
class Removal:
    """One removal in an edit's result file; shares are of headroom, its other keys are ignored.

    ``undone`` and ``returned`` are there where movement was undone and relearning measured.
    """

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
    undone: Undone | None = None
    returned: Returned | None = None


@dataclass(frozen=True)
class RemovalFile:
    """``edits/NAME.result.json``."""

    removals: tuple[Removal, ...]


def removal_section(directory: RunDirectory) -> Section | None:
    """Every edit that ``polca-edit remove`` left in the run."""
    found = [
        (path.name.removesuffix(".result.json"), removal)
        for path in sorted((directory / "edits").glob("*.result.json"))
        for removal in load_record(RemovalFile, path).removals
    ]
    rows = [_removal_cells(name, removal) for name, removal in found]
    if not rows:
        return None
    columns = (
        Column("edit", left=True), Column("skill", left=True), "damage on target", "worst other group",
        "its positive part", "largest KL elsewhere", "accuracy (chance)", "kept after a refit", "norm / rank",
        Column("share of headroom per group", left=True),
    )  # fmt: skip
    text = (
        "Edits fitted, or movement undone, on the select split and judged on the evaluate split. Damage is "
        "in shares of headroom; a refit may change an output bias and permute the answers."
    )
    undone = [
        block
        for name, r in found
        if r.undone is not None
        for block in undoing_blocks(name, r.skill, r.undone, r.groups, r.target_share, r.returned)
    ]
    return Section("Skill removal", (paragraph(text), table(columns, rows), *undone))


def _removal_cells(name: str, removal: Removal) -> list[Cell | str]:
    groups = [f"{name} {share(value)}" for name, value in removal.groups.items() if value is not None]
    return [
        name,
        removal.skill,
        share_cell(removal.target_share),
        share_cell(removal.worst_off_share),
        share_cell(removal.worst_positive_share),
        Cell(decimal(removal.kl, 3), sort=removal.kl),
        Cell(f"{share(removal.accuracy)} ({share(removal.refit.chance)})", sort=removal.accuracy),
        share_cell(removal.refit.kept),
        f"{decimal(removal.norm)} / {'full' if removal.undone else removal.rank}",
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
        "nothing was chosen on. Needed: undoing the movement costs the group more than random edits of its "
        "size. Selective: no other group loses a third of that, and no direction of the span is as selective "
        "at the same total damage. Carrier: inserted alone, the movement brings the skill."
    )
    answers = {name: a.answers for name, a in summary.analyses.items() if a.answers}
    return Section(
        "Causal test",
        (paragraph(text), *([basis_table(answers)] if answers else []), verdict_table(rows, look="cards")),
    )


# -- which chapters a run has ---------------------------------------------------------------------


def sections_of(
    directory: RunDirectory, summary: Summary, hues: Mapping[str, str] | None = None
) -> Iterator[Section]:
    """Every added chapter that the run has records for."""
    if (discovery := discovery_section(directory, hues)) is not None:
        yield discovery
    if (causal := causal_section(summary)) is not None:
        yield causal
    if (removals := removal_section(directory)) is not None:
        yield removals
