"""The chapter "Discovery" and its tables: timeline, interventional clusters, skill axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from experiments.discover.blocking import BlockedStudy
from experiments.discover.records import (
    AxesRecord,
    AxisRow,
    ClusterFile,
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
    AXIS_CAPTION,
    TIMELINE_CAPTION,
    axis_figure,
    timeline_figure,
)
from experiments.report.formats import MISSING, decimal
from experiments.report.style import Drawing, colours
from experiments.report.tables import Cell, Column, Table, table
from experiments.report.view import NAMED_F1
from experiments.run.store import RunDirectory
from interventions.discovery.timeline import Timeline
from polca_edit.artifacts import load_record

#: Axis figures are drawn for at most this many axes a span.
MOST_FIGURES = 8


def discovery_section(directory: RunDirectory) -> Section | None:
    """What a run has of discovery; None where it has nothing."""
    blocks: list[Block] = []
    path = timeline_file(directory.path)
    if path.exists():
        blocks += _timeline_blocks(load_record(Timeline, path))
    files = [
        load_record(ClusterFile, p) for p in sorted((directory.path / "discover").glob("clusters-*.json"))
    ]
    if files:
        blocks += _cluster_blocks(files)
    result = load_discovery(directory.path)
    if result is not None and result.axes:
        blocks += _axis_blocks(directory, result)
    return Section("Discovery", blocks) if blocks else None


def _timeline_blocks(timeline: Timeline) -> list[Block]:
    hues = colours(sorted(name for name in timeline.curves if not name.startswith("found ")))
    held = [f"{d.skill} needs the window of {d.on}" for d in timeline.dependences if d.holds]
    found = None if timeline.alignment is None else timeline.alignment.estimate
    words = (
        f"Windows take what was learned in or after them: alignment {decimal(found, 3)}, "
        f"p = {decimal(timeline.p, 3)} among shuffled windows."
    )
    return [
        heading("Timeline: which stretch of training each skill needs"),
        Drawing("causal timeline", TIMELINE_CAPTION, timeline_figure(timeline, hues)),
        paragraph(words),
        *([paragraph("Order of dependence: " + "; ".join(held) + ".")] if held else []),
    ]


def _cluster_blocks(files: Sequence[ClusterFile]) -> list[Block]:
    rows = [row for file in files for row in file.clusters]
    words = "; ".join(
        f"{file.basis}: {len(file.clusters)} clusters, {100 * file.outliers:.0f} % of tokens in none, "
        f"{file.edits} edits, halves agree to {decimal(file.stability[-1][1])}"
        for file in files
    )
    return [
        heading("Tokens that are hurt together, found without labels"),
        paragraph(
            "Tokens grouped by what many random partial undo edits do to them; groups that the same "
            "stretches of training carry are one cluster. Known skills came in afterwards."
        ),
        cluster_table(rows),
        note(words + "."),
    ]


def _axis_blocks(directory: RunDirectory, result: DiscoverResult) -> list[Block]:
    blocks: list[Block] = [
        heading("Skill axes (found with the skill's tokens)"),
        paragraph(
            "The direction of each span whose own recorded movement, undone, takes one group and leaves the "
            "others; searched on select tokens, measured on unseen ones. The null is the same search for "
            "random token sets with a rule; the free edit may move anywhere and has the same norm."
        ),
        axes_table(result.axes, _full(directory, result)),
    ]
    drawn: dict[str, int] = {}
    for (basis, target), full in _full(directory, result).items():
        drawn[basis] = drawn.get(basis, 0) + 1
        if drawn[basis] <= MOST_FIGURES:
            title = f"axis {target} in {basis}"
            blocks.append(
                Drawing(title, AXIS_CAPTION.format(target=target, basis=basis), axis_figure(full.when))
            )
    return blocks


def _full(directory: RunDirectory, result: DiscoverResult) -> dict[tuple[str, str], FullAxis]:
    """(basis, target) -> axis, from the records the axes were measured into."""
    found = {}
    for basis in dict.fromkeys(row.basis for row in result.axes):
        path = directory.path / "kept" / "discover" / f"axes-{basis}.safetensors"
        if path.exists():
            found.update({(basis, a.row.target): a for a in load_record(AxesRecord, path).axes})
    return found


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


def print_blocking(study: BlockedStudy, console: Console) -> None:
    """One line per arm and target: delay and final gap beyond shams, with intervals over branches."""
    columns: list[Column | str] = [
        Column("held", left=True), Column("skill", left=True), "directions", "of net movement", "learned in",
        Column("later than free, beyond shams (steps)", left=True), Column("final gap (nats)", left=True),
        "no later", "others alike",
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
            "yes" if row.others_equivalent else "no",
        ]
        for row in study.rows
    ]
    console.print(table(columns, cells, title="Blocking").terminal())
    for target, found in study.free.items():
        console.print(
            f"  free arms: {target} half learned at step {found.estimate:.0f} "
            f"[{found.low:.0f}, {found.high:.0f}], "
            f"scatter {study.scatter[target]:.0f} steps between data orders"
        )
