"""The chapter "Discovery" and its tables: timeline, interventional clusters, skill axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from experiments.discover.records import (
    AxisRow,
    ClusterRow,
    DiscoverResult,
    FullAxis,
    TimelineRow,
    load_discovery,
    timeline_file,
)
from experiments.report.answers import share_cell
from experiments.report.blocks import Block, Section, heading, note, paragraph
from experiments.report.chapters.figures_discovery import (
    AXES_CAPTION,
    TIMELINE_CAPTION,
    axes_figure,
    timeline_figure,
)
from experiments.report.formats import MISSING, decimal, listed
from experiments.report.headline import full_axes
from experiments.report.style import Drawing, colours
from experiments.report.tables import Cell, Column, Table, table
from experiments.report.view import NAMED_F1
from experiments.run.store import RunDirectory
from interventions.discovery.timeline import Timeline
from polca_edit.artifacts import load_record

if TYPE_CHECKING:
    # The study runs models; a page only reads what it found.
    from experiments.discover.blocking import BlockedStudy

#: Parts of the model in the map of where an axis acts.
MOST_PARTS = 10


def discovery_section(directory: RunDirectory, hues: Mapping[str, str] | None = None) -> Section | None:
    """Timeline and skill axes of a run, with when and where; None where it has neither."""
    blocks: list[Block] = []
    path = timeline_file(directory.path)
    if path.exists():
        blocks += _timeline_blocks(load_record(Timeline, path), hues)
    result = load_discovery(directory.path)
    if result is not None and result.axes:
        blocks += _axis_blocks(directory, result, hues)
    return Section("Skill axes: when and where", blocks) if blocks else None


def own_hues(names: Iterable[str], hues: Mapping[str, str] | None) -> Mapping[str, str]:
    """The page's colours; where only this chapter is drawn, colours of the groups with a known skill."""
    return hues if hues is not None else colours(sorted(n for n in names if not n.startswith("found ")))


def _timeline_blocks(timeline: Timeline, hues: Mapping[str, str] | None) -> list[Block]:
    needs: dict[str, list[str]] = {}
    for d in timeline.dependences:
        if d.holds and not (d.on + d.skill).count("found "):
            needs.setdefault(d.on, []).append(d.skill)
    held = [f"{on} by {listed(skills)}" for on, skills in needs.items()]
    found = None if timeline.alignment is None else timeline.alignment.estimate
    words = (
        f"Windows take what was learned in or after them: alignment {decimal(found, 3)}, "
        f"p = {decimal(timeline.p, 3)} among shuffled windows."
    )
    figure = timeline_figure(timeline, own_hues(timeline.curves, hues))
    return [
        heading("Timeline: which stretch of training each skill needs"),
        Drawing("causal timeline", TIMELINE_CAPTION, figure),
        paragraph(words),
        *(
            [paragraph("The window in which a skill was learned is needed: of " + "; of ".join(held) + ".")]
            if held
            else []
        ),
    ]


def _axis_blocks(
    directory: RunDirectory, result: DiscoverResult, hues: Mapping[str, str] | None
) -> list[Block]:
    blocks: list[Block] = [
        heading("Skill axes (found with the skill's tokens)"),
        paragraph(
            "The direction of each span whose own recorded movement, undone, takes one group and leaves the "
            "others; searched on select tokens, measured on unseen ones. The null is the same search for "
            "random token sets with a rule; the free edit may move anywhere and has the same norm."
        ),
        axes_table(result.axes, full_axes(directory, result)),
    ]
    if result.exploratory:
        blocks.append(note("Another plan had opened these unseen tokens before: the axes are exploratory."))
    by_span: dict[str, dict[str, FullAxis]] = {}
    for (basis, target), full in full_axes(directory, result).items():
        by_span.setdefault(basis, {})[target] = full
    for basis, axes in by_span.items():
        whens = {target: full.when for target, full in axes.items()}
        shown = {name: when for name, when in whens.items() if not name.startswith("found ")}
        figure = axes_figure(shown or whens, own_hues(shown or whens, hues))
        blocks += [
            heading(f"When and where the axes of the {basis} span act"),
            Drawing(f"axes in {basis}", AXES_CAPTION.format(basis=basis), figure),
            paragraph(
                "When: share of the group lost if only that stretch's movement along its axis is undone."
            ),
            parts_table({name: when.windows for name, when in whens.items()}, hues or {}),
            paragraph("Where: share of the effect that each part of the model holds, the largest parts."),
            parts_table({name: when.parts for name, when in whens.items()}, hues or {}, MOST_PARTS),
        ]
    return blocks


def parts_table(
    found: Mapping[str, Mapping[str, float]], hues: Mapping[str, str], most: int | None = None
) -> Table:
    """A shaded map of targets by windows or parts, those with the largest sum where there are too many."""
    names = list(dict.fromkeys(name for own in found.values() for name in own))
    if most is not None:
        total = {name: sum(max(own.get(name, 0.0), 0.0) for own in found.values()) for name in names}
        names = sorted(names, key=lambda name: -total[name])[:most]
    rows = [
        [
            Cell(target, colour=hues.get(target), look="strong"),
            *(
                Cell(decimal(v), sort=v, shade=None if v is None else max(-1.0, min(v, 1.0)))
                for v in (own.get(name) for name in names)
            ),
        ]
        for target, own in found.items()
    ]
    return table([Column("target", left=True), *names], rows)


def nearest(row: ClusterRow) -> str | None:
    """The skill that a cluster agrees with best; None where no skill is known."""
    return max(row.f1, key=lambda name: row.f1[name], default=None)


def cluster_table(rows: Sequence[ClusterRow], title: str = "") -> Table:
    """Interventional clusters; one carries a skill's name where it fits well enough."""
    columns: list[Column | str] = [
        Column("undone", left=True), "cluster", "tokens", Column("nearest skill", left=True), "homogeneity",
        "recall", "F1", Column("what its tokens share", left=True),
    ]  # fmt: skip
    cells: list[list[Cell | str]] = []
    for row in rows:
        skill = nearest(row)
        scores = [None if skill is None else part[skill] for part in (row.homogeneity, row.recall, row.f1)]
        cells.append(
            [
                row.basis,
                Cell(str(row.cluster), sort=row.cluster),
                Cell(str(row.tokens), sort=row.tokens),
                skill if skill is not None and row.f1[skill] >= NAMED_F1 else MISSING,
                *(Cell(decimal(value), sort=value) for value in scores),
                row.name or MISSING,
            ]
        )
    return table(columns, cells, title=title)


def timeline_table(rows: Sequence[TimelineRow], title: str = "") -> Table:
    """Share of headroom that each group loses when a window's movement is undone."""
    names = list(dict.fromkeys(name for row in rows for name in row.shares))
    cells = [
        [
            Cell(f"{row.start} to {row.end}", sort=row.start),
            Cell(decimal(row.norm), sort=row.norm),
            *(share_cell(row.shares.get(name)) for name in names),
        ]
        for row in rows
    ]
    return table(["steps undone", "norm", *names], cells, title=title)


def axes_table(
    rows: Sequence[AxisRow], full: Mapping[tuple[str, str], FullAxis] | None = None, title: str = ""
) -> Table:
    """Skill axes: what undoing them takes, beside nulls and the free edit, and when and where."""
    columns: list[Column | str] = [
        Column("span", left=True), Column("target", left=True), "share lost", "worst other", "rest of parent",
        Column("null p", note="the same search for random token sets"), "null 95 %", "free edit",
        "its worst other", Column("when", left=True), Column("where", left=True),
    ]  # fmt: skip
    cells: list[list[Cell | str]] = []
    for row in rows:
        found = (full or {}).get((row.basis, row.target))
        cells.append(
            [
                row.basis,
                row.target,
                *(share_cell(value) for value in (row.share, row.worst_other, row.rest_of_parent)),
                Cell(decimal(row.null_p, 3), sort=row.null_p),
                share_cell(row.null_p95),
                share_cell(row.free_share),
                share_cell(row.free_worst_other),
                MISSING if found is None else f"steps {found.when.peak}",
                MISSING if found is None else found.when.place,
            ]
        )
    return table(columns, cells, title=title)


def print_axes(rows: Sequence[AxisRow], console: Console) -> None:
    """The table of axes on the terminal."""
    console.print(axes_table(rows, title="Skill axes").terminal())


def print_discovery(result: DiscoverResult, console: Console) -> None:
    """Timeline, clusters and axes on the terminal."""
    console.print(
        timeline_table(result.timeline, title="Timeline: share lost when a stretch is undone").terminal()
    )
    if result.clusters:
        console.print(cluster_table(result.clusters, title="Interventional clusters").terminal())
    if result.axes:
        print_axes(result.axes, console)


def _worst_above(above: Mapping[str, float]) -> str:
    if not above:
        return MISSING
    worst = max(above, key=lambda name: above[name])
    return f"{worst} {decimal(above[worst])}"


def blocking_table(study: BlockedStudy) -> Table:
    """One line per arm and target: delay and final gap beyond shams, with intervals over branches."""
    columns: list[Column | str] = [
        Column("held", left=True), Column("skill", left=True), "directions", "of net movement", "learned in",
        Column("later than free, beyond shams (steps)", left=True), Column("final gap (nats)", left=True),
        "no later", Column("worst other, above free", left=True),
    ]  # fmt: skip
    cells: list[list[Cell | str]] = [
        [
            row.arm,
            row.target,
            str(row.rank),
            share_cell(row.carried),
            f"{row.learned} of {study.settings.branches}",
            f"{decimal(row.delay.estimate, 0)} [{decimal(row.delay.low, 0)}, {decimal(row.delay.high, 0)}]",
            f"{decimal(row.gap.estimate)} [{decimal(row.gap.low)}, {decimal(row.gap.high)}]",
            "yes" if row.negligible else "no",
            _worst_above(row.above),
        ]
        for row in study.rows
    ]
    return table(columns, cells, title="Training again with directions held still")


def print_blocking(study: BlockedStudy, console: Console) -> None:
    """The table, and when free arms learn."""
    console.print(blocking_table(study).terminal())
    for target, found in study.free.items():
        console.print(
            f"  free arms: {target} half learned at step {found.estimate:.0f} "
            f"[{found.low:.0f}, {found.high:.0f}], "
            f"scatter {study.scatter[target]:.0f} steps between data orders"
        )
