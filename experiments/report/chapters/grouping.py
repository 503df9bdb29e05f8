"""Two ways of grouping tokens side by side: by how they were learned (POLCA), and by what undoing hurts.

Every cluster of either kind can be opened: its tokens in context, with what each loses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from markupsafe import Markup

from experiments.discover.records import ClusterFile, ClusterRow, SignatureRecord
from experiments.report.answers import nats_cell
from experiments.report.blocks import Block, Section, heading, note, paragraph
from experiments.report.chapters.discovery import nearest
from experiments.report.chapters.verdicts import FAMILIES
from experiments.report.formats import MISSING, count, decimal, highlighted
from experiments.report.style import file_name
from experiments.report.tables import Cell, Column, Table, table
from experiments.report.view import NAMED_F1, ClusterView, RunView
from polca_edit.artifacts import load_record

#: Tokens shown of a cluster.
TOKENS = 10


@dataclass(frozen=True)
class Opened:
    """The tokens of one cluster, below the row they belong to.

    Attributes:
        identifier: of the element on the page.
        title: of the cluster.
        words: which tokens these are.
        rows: context, skills, damage.
    """

    identifier: str
    title: str
    words: str
    rows: Table

    def __html__(self) -> str:
        """A folded part of the page; a button in a table opens it in place."""
        return Markup(
            '<details class="tokens" id="{}"><summary>{}</summary><p class="note">{}</p>{}</details>'
        ).format(self.identifier, self.title, self.words, Markup(self.rows.__html__()))


@dataclass(frozen=True)
class Group:
    """One cluster of either kind.

    Attributes:
        kind: POLCA or interventional.
        place: its basis, vector and number.
        called: what its tokens are, where a description holds.
        tokens: how many.
        f1: skill -> agreement.
        skill: nearest skill.
        opened: its tokens; None where the records do not say which they are.
    """

    kind: str
    place: str
    called: str
    tokens: int
    f1: Mapping[str, float]
    skill: str | None
    opened: Opened | None

    @property
    def fit(self) -> float:
        """F1 with the nearest skill."""
        return 0.0 if self.skill is None else self.f1.get(self.skill, 0.0)

    def cell(self) -> Cell:
        """Its place, as a button that opens its tokens."""
        if self.opened is None:
            return Cell(self.place)
        text = Markup('<button type="button" class="open" data-opens="{}" aria-expanded="false">{}</button>')
        return Cell(text.format(self.opened.identifier, self.place))


def tokens_table(tokens: pd.DataFrame, near: Sequence[int], change: np.ndarray) -> Table:
    """Tokens in context, with their skills and what undoing costs each."""
    rows = [
        [
            Cell(highlighted(tokens["context"].iloc[row]), look="context"),
            tokens["skills"].iloc[row].replace(",", ", ") or MISSING,
            nats_cell(float(change[row])),
        ]
        for row in near
    ]
    return table([Column("context", left=True), Column("skills", left=True), "damage"], rows, look="small")


# -- both kinds -----------------------------------------------------------------------------------


def polca_group(view: RunView, cluster: ClusterView, near: Sequence[int], words: str) -> Group:
    """One of POLCA's clusters, with its tokens in the given order."""
    analysis = next(a for a in view.analyses if a.name == cluster.basis)
    place = f"{cluster.basis} {cluster.name}"
    opened = Opened(
        f"tokens-{file_name(place)}",
        f"{cluster.basis} {cluster.title}",
        words,
        tokens_table(view.tokens, near, analysis.damage[cluster.vector]),
    )
    f1 = {skill: cluster.entry.f1(skill) for skill in cluster.entry.homogeneity}
    return Group(
        "POLCA", place, cluster.called, cluster.entry.tokens, f1, cluster.entry.label if f1 else None, opened
    )


def interventional_groups(view: RunView) -> Iterator[tuple[ClusterFile, list[Group]]]:
    """Interventional clusters of every span, largest first."""
    for path in sorted((view.directory.path / "discover").glob("clusters-*.json")):
        file = load_record(ClusterFile, path)
        stored = path.with_name(path.name.replace("clusters-", "signatures-")).with_suffix(".safetensors")
        signed = load_record(SignatureRecord, stored) if stored.exists() else None
        yield file, [_interventional(view, row, signed) for row in file.clusters]


def _interventional(view: RunView, row: ClusterRow, signed: SignatureRecord | None) -> Group:
    called = row.name if not row.name.startswith("unnamed") else _unnamed(row.name)
    place = f"{row.basis} i{row.cluster}"
    opened = None
    if signed is not None and len(signed.labels) == len(view.tokens):
        member = (signed.labels == row.cluster).numpy()
        change = signed.changes.double().numpy().mean(0)
        near = np.flatnonzero(member)[np.argsort(-change[member], kind="stable")[:TOKENS]]
        words = (
            f"The {len(near)} of {count(row.tokens)} tokens that lose most, mean loss change over "
            f"{len(signed.changes)} partial undo edits (nats)."
        )
        rows = tokens_table(view.tokens, near.tolist(), change)
        opened = Opened(f"tokens-{file_name(place)}", f"{place} {called}", words, rows)
    return Group("interventional", place, called, row.tokens, row.f1, nearest(row), opened)


def _unnamed(name: str) -> str:
    most = name.partition(" (")[2]
    return f"unnamed ({most}" if most else "unnamed"


# -- the chapter ----------------------------------------------------------------------------------


def grouping_section(view: RunView, polca: Sequence[Group], hues: Mapping[str, str]) -> Section | None:
    """POLCA's clusters against interventional ones, skill by skill, then every cluster to open."""
    files = list(interventional_groups(view))
    groups = [*polca, *(group for _, found in files for group in found)]
    if not groups:
        return None
    blocks: list[Block] = [
        paragraph(
            "POLCA groups tokens by how their loss fell along one vector: observation. Interventional "
            "clusters group tokens by what many random partial undo edits cost them: action. Neither saw "
            "a label; known skills came in afterwards."
        )
    ]
    if view.skills and files:
        blocks += [heading("Best cluster of either kind for each skill"), best_table(view, groups, hues)]
    if (words := _families(view)) is not None:
        blocks.append(paragraph(words))
    blocks += [
        heading("Every cluster, the best of each skill first: open one for its tokens"),
        groups_table(groups, hues),
    ]
    total = sum(len(a.clusters) for a in view.analyses)
    told = f"POLCA's: showing {len(polca)} of {total}. " if len(polca) < total else ""
    stability = "; ".join(
        f"{file.basis}: {100 * file.outliers:.0f} % of tokens in no cluster, {file.edits} edits, "
        f"halves agree to {decimal(file.stability[-1][1])}"
        for file, _ in files
        if file.stability
    )
    told += "F1 of homogeneity and recall with the nearest skill."
    blocks.append(note(f"{told} {stability}." if stability else told))
    opened = [group.opened for group in groups if group.opened is not None]
    inside = Markup("").join(Markup(part.__html__()) for part in opened)
    blocks.append(
        Markup(
            '<details id="all-tokens"><summary>Tokens in context, {} clusters</summary>{}</details>'
        ).format(len(opened), inside)
    )
    return Section("POLCA's clusters and interventional ones", blocks)


def best_table(view: RunView, groups: Sequence[Group], hues: Mapping[str, str]) -> Table:
    """For each skill the best cluster of either kind, by F1 with that skill."""
    columns: list[Column | str] = [
        Column("skill", left=True),
        Column("POLCA's best", left=True), Column("its tokens", left=True), "F1",
        Column("interventional best", left=True), Column("its tokens", left=True), "F1",
    ]  # fmt: skip
    rows: list[list[Cell | str]] = []
    for skill in view.common_skills(len(view.skills)):
        cells: list[Cell | str] = [Cell(skill, colour=hues.get(skill), look="strong")]
        for kind in ("POLCA", "interventional"):
            own = [g for g in groups if g.kind == kind and g.f1.get(skill)]
            best = max(own, key=lambda g: g.f1[skill], default=None)
            if best is None:
                cells += [Cell(MISSING, look="soft")] * 3
                continue
            value = best.f1[skill]
            look = "strong" if value >= NAMED_F1 else "soft"
            cells += [
                Cell(best.place, look="place"),
                Cell(best.called, look="named"),
                Cell(decimal(value), sort=value, look=look),
            ]
        rows.append(cells)
    return table(columns, rows)


def _families(view: RunView) -> str | None:
    """How often each way of choosing pairs found a movement that takes its tokens alone."""
    told = []
    for family, words in FAMILIES.items():
        found = Counter(
            v.word for a in view.summary.analyses.values() for v in a.verdicts if v.family == family
        )
        if found:
            alone = found["selective"] + found["carrier"]
            told.append(f"{words}: {alone} of {sum(found.values())} pairs")
    return f"Selective or carrier in the causal test: {'; '.join(told)}." if told else None


def best_of_each_first(groups: Sequence[Group]) -> list[Group]:
    """The best fit of every skill, then the second of every skill, and so on."""
    ranked = sorted(groups, key=lambda group: -group.fit)
    before: Counter[str | None] = Counter()
    rank = []
    for group in ranked:
        rank.append(before[group.skill])
        before[group.skill] += 1
    order = sorted(range(len(ranked)), key=lambda i: rank[i])
    return [ranked[i] for i in order]


def groups_table(groups: Sequence[Group], hues: Mapping[str, str]) -> Table:
    """Every cluster with its kind, its name where it holds, and the nearest skill; the best of each first."""
    columns: list[Column | str] = [
        Column("cluster", left=True), Column("found by", left=True), Column("its tokens are", left=True),
        "tokens", Column("nearest skill", left=True), "F1",
    ]  # fmt: skip
    rows: list[list[Cell | str]] = [
        [
            group.cell(),
            group.kind,
            Cell(group.called, look="named soft" if group.called.startswith("unnamed") else "named"),
            Cell(count(group.tokens), sort=group.tokens),
            Cell(group.skill or MISSING, colour=hues.get(group.skill or "")),
            Cell(decimal(group.fit), sort=group.fit, look="" if group.fit >= NAMED_F1 else "soft"),
        ]
        for group in best_of_each_first(groups)
    ]
    return table(columns, rows, look="many")
