"""The newcomer's question: which vector takes which skill away, and what else does that cost?

The vector of a skill is chosen on the select split, by the share of headroom that undoing it costs the
skill less what it costs the worst other one. A skill that shares tokens with it is judged by its other
tokens, its *rest*. The numbers shown are those of the evaluate split; rests are known on select alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.console import Console

from experiments.report.formats import MISSING, count, decimal, nats, share
from experiments.report.tables import Cell, Column, Table, table
from experiments.report.view import NAMED_F1, SMALL_HEADROOM, RunView, read_run
from experiments.run.store import RunDirectory
from experiments.run.summary.records import Agreement, DamageRow, Summary

#: A skill counts as taken away from this share of its headroom on ...
TAKEN = 0.5
#: ... and another as left alone up to this one.
SPARED = 0.1
#: A rest of fewer tokens is not judged.
FEWEST = 10
#: Clusters of a skill, and clusters in all, that the terminal lists.
PER_SKILL, LISTED = 2, 12
Outcome = Literal["alone", "with others", "not taken"]


@dataclass(frozen=True)
class Loss:
    """What a group of tokens loses when a vector is undone.

    Attributes:
        group: a skill, or the rest of one.
        damage: mean loss change, nats per token.
        share: the same over the group's headroom.
        split: tokens it was measured on.
    """

    group: str
    damage: float
    share: float
    split: str

    def __str__(self) -> str:
        where = ", select split" if self.split == "select" else ""
        return f"{self.group} {nats(self.damage, 2)} nats ({share(self.share)}{where})"


@dataclass(frozen=True)
class Answer:
    """What the most selective vector of one skill does to it and to others.

    Attributes:
        basis: of the vector.
        vector: index in that basis.
        own: what the skill loses.
        worst: what the other skill, or the rest of one, with the largest share loses.
    """

    basis: str
    vector: int
    own: Loss
    worst: Loss | None

    @property
    def skill(self) -> str:
        """The skill it is about."""
        return self.own.group

    @property
    def outcome(self) -> Outcome:
        """Whether undoing the vector takes the skill away, and whether it takes that skill alone."""
        if self.own.share < TAKEN:
            return "not taken"
        return "alone" if self.worst is None or self.worst.share <= SPARED else "with others"

    @property
    def sentence(self) -> str:
        """The answer in words."""
        place = f"{self.basis} v{self.vector}"
        if self.outcome == "not taken":
            return (
                f"No vector takes {self.skill} away; the one that costs it most, {place}, costs {self.own}."
            )
        told = f"Undoing {place} costs {self.own}"
        if self.worst is None:
            return f"{told}; there is no other skill."
        if self.outcome == "alone":
            return f"{told}, and no other skill loses more than {self.worst}."
        return f"{told}, but not it alone: {self.worst}."


def answers(view: RunView) -> list[Answer]:
    """One answer for every known skill that has headroom, in order of their names."""
    found = (_best(view, skill) for skill in view.skills)
    return [answer for answer in found if answer is not None]


def _best(view: RunView, skill: str) -> Answer | None:
    ranked: list[tuple[tuple[bool, float, float], str, int]] = []
    for analysis in view.analyses:
        for vector in analysis.entry.vectors:
            change = analysis.damage[vector.vector]
            own = _loss(view, change, skill, view.skills[skill])
            if own is None:
                continue
            others = [min(max(loss.share, 0.0), 1.0) for loss, _ in _others(view, change, skill)]
            ranked.append((_selectivity(own.share, others), analysis.name, vector.vector))
    # The first of equals: bases and vectors keep their order.
    for _, name, index in sorted(ranked, key=lambda entry: entry[0], reverse=True):
        row = view.summary.analyses[name].damage_row(index, None, "evaluate")
        own = None if row is None else evaluate_loss(row, skill)
        if row is not None and own is not None:
            return Answer(name, index, own, _worst(view, row, name, skill))
    return None


def _selectivity(own: float, others: Sequence[float]) -> tuple[bool, float, float]:
    """How vectors of a skill are ranked: taken first, then by the worst other loss, then by the mean."""
    if own < TAKEN:
        return False, own, 0.0
    return True, min(own, 1.0) - max(others, default=0.0), -sum(others)


def _worst(view: RunView, row: DamageRow, basis: str, skill: str) -> Loss | None:
    """The largest loss elsewhere: of whole skills on the evaluate split, of rests on the select split."""
    change = next(a for a in view.analyses if a.name == basis).damage[row.vector]
    found = [
        loss if is_rest else evaluate_loss(row, loss.group) for loss, is_rest in _others(view, change, skill)
    ]
    return max((loss for loss in found if loss is not None), key=lambda loss: loss.share, default=None)


def _others(view: RunView, change: np.ndarray, skill: str) -> Iterator[tuple[Loss, bool]]:
    """Other skills on the select split; one that shares tokens with this one by its rest."""
    own = view.skills[skill]
    for name, mask in view.skills.items():
        is_rest = bool((mask & own).any())
        if name == skill or (is_rest and (mask & ~own).sum() < FEWEST):
            continue
        loss = _loss(view, change, f"rest of {name}" if is_rest else name, mask & ~own)
        if loss is not None:
            yield loss, is_rest


def _loss(view: RunView, change: np.ndarray, group: str, mask: np.ndarray) -> Loss | None:
    room = float(view.headroom[mask].mean())
    damage = float(change[mask].mean())
    return None if room < SMALL_HEADROOM else Loss(group, damage, damage / room, "select")


def evaluate_loss(row: DamageRow, skill: str) -> Loss | None:
    """What a skill loses on the evaluate split; None where it has no headroom to speak of."""
    room = row.group_headroom.get(skill)
    if skill not in row.groups or room is None or room < SMALL_HEADROOM:
        return None
    return Loss(skill, row.groups[skill], row.groups[skill] / room, row.split)


# -- the tables -----------------------------------------------------------------------------------

OUTCOMES: dict[Outcome, tuple[str, str]] = {
    "alone": ("yes, alone", "good"),
    "with others": ("with others", "mixed"),
    "not taken": ("no", "soft"),
}


def answers_table(found: Sequence[Answer], hues: Mapping[str, str]) -> Table:
    """Skill, the vector that takes it away, the damage on it and on the worst other skill, a sentence."""
    rows = []
    for a in found:
        words, look = OUTCOMES[a.outcome]
        worst = Cell(MISSING, look="detail")
        if a.worst is not None:
            hue = hues.get(a.worst.group.removeprefix("rest of "))
            told = f"{a.worst.group} {nats(a.worst.damage, 2)} ({share(a.worst.share)})"
            note = f"{a.worst.split} split"
            worst = Cell(told, sort=a.worst.share, look="detail", colour=hue, note=note)
        rows.append(
            [
                Cell(a.skill, colour=hues.get(a.skill), look="strong"),
                Cell(words, look=look),
                Cell(f"{a.basis} v{a.vector}", look="detail"),
                Cell(nats(a.own.damage, 2), sort=a.own.damage, look="detail"),
                share_cell(a.own.share, "detail"),
                worst,
                Cell(a.sentence, look="sentence"),
            ]
        )
    taken = (
        f"yes from {share(TAKEN)} of headroom on; alone while no other skill loses more than {share(SPARED)}"
    )
    columns = (
        Column("skill", left=True),
        Column("taken away?", left=True, note=taken),
        Column("vector undone", left=True),
        Column("damage (nats)", note="mean loss change of the skill's evaluate tokens"),
        Column("of headroom", note="damage over the loss that undoing all training would cost"),
        Column("worst other skill", left=True, note="a skill with the same tokens counts by its rest"),
        Column("in words", left=True),
    )
    return table(columns, rows, "Which vector takes which skill away (evaluate split)", look="cards")


def cluster_answers_table(summary: Summary) -> Table:
    """Where no skill is known: what undoing a cluster's own vector costs it, most selective first."""
    ranked = []
    for name, analysis in summary.analyses.items():
        for cluster in analysis.clusters:
            place = cluster.vector, cluster.cluster
            chosen, judged = (analysis.damage_row(*place, split) for split in ("select", "evaluate"))
            if chosen is None or judged is None or chosen.on_target is None:
                continue
            margin = chosen.on_target - max(chosen.off_target_worst or 0.0, 0.0)
            rules = (c.rule for c in analysis.evaluate_clusters if (c.vector, c.cluster) == place)
            ranked.append((margin, name, judged, next(rules, MISSING)))
    ranked.sort(key=lambda entry: -entry[0])
    rows: list[list[Cell | str]] = []
    for _, name, row, rule in ranked[:LISTED]:
        room = row.headroom if row.headroom is not None and row.headroom >= SMALL_HEADROOM else None
        part = None if room is None or row.on_target is None else row.on_target / room
        own, *others = (nats_cell(value) for value in (row.on_target, row.off_target, row.off_target_worst))
        vector = f"{name} v{row.vector}"
        rows.append(
            [f"{vector}·c{row.cluster}", vector, own, share_cell(part), *others, Cell(rule, look="rule")]
        )
    columns = (
        Column("cluster", left=True), Column("vector undone", left=True), "damage (nats)", "of headroom",
        "all other tokens", "worst other cluster", Column("its tokens, by a rule", left=True),
    )  # fmt: skip
    title = f"What undoing a vector costs its clusters, {len(rows)} of {len(ranked)} (evaluate split)"
    return table(columns, rows, title, look="cards")


def bases_table(summary: Summary) -> Table:
    """How much of the loss change and of the movement each basis accounts for."""
    columns = (
        Column("basis", left=True),
        Column("vectors"),
        Column("exact change", note="nats per token, mean over all scored tokens"),
        Column("attributed"),
        Column("rest of the movement"),
        Column("quadrature error"),
        Column("explained share", note="attributed over exact"),
        Column("movement held, start to end"),
        Column("random walk"),
        Column("movement held, each interval"),
        Column("random walk"),
    )
    rows = []
    for name, analysis in summary.analyses.items():
        change, basis = analysis.loss_change, analysis.basis
        parts = (change.exact, change.attributed, change.residual, change.quadrature_error)
        held = (basis.captured_net, basis.random_walk_net, basis.captured_path, basis.random_walk_path)
        rows.append(
            [
                Cell(name + (" (uses labels)" if basis.supervised else "")),
                count_cell(basis.vectors),
                *(nats_cell(value) for value in parts),
                share_cell(basis.explained_share, "strong"),
                *(share_cell(value) for value in held),
            ]
        )
    return table(columns, rows, "How much of the loss change each basis accounts for (nats per token)")


def share_cell(value: float | None, look: str = "") -> Cell:
    """A share that sorts by its value."""
    return Cell(share(value), sort=value, look=look)


def nats_cell(value: float | None, digits: int = 3) -> Cell:
    """A loss change that sorts by its value."""
    return Cell(nats(value, digits), sort=value)


def count_cell(value: int) -> Cell:
    """A whole number that sorts by its value."""
    return Cell(count(value), sort=value)


def agreement_cells(found: Agreement, label: str | None, keys: Sequence[str]) -> list[Cell]:
    """Agreement with a skill to two decimals; grey, the skill named on request, where F1 is too low."""
    named = found.f1(label) >= NAMED_F1
    note = "" if named or label is None else f"nearest skill: {label}"
    values = [getattr(found, key).get(label) for key in keys]
    return [Cell(decimal(v), sort=v, look="" if named else "soft", note=note) for v in values]


def clusters_table(summary: Summary) -> Table:
    """The clusters that agree best with a known skill, at most two a skill, for the terminal."""
    found = [(name, a, c) for name, a in summary.analyses.items() for c in a.clusters]
    found.sort(key=lambda item: (-item[2].f1(item[2].label), -item[2].tokens))
    rows: list[list[Cell | str]] = []
    shown: dict[str | None, int] = {}
    for name, analysis, c in found:
        if len(rows) == LISTED or (c.label is not None and shown.get(c.label, 0) == PER_SKILL):
            continue
        shown[c.label] = shown.get(c.label, 0) + 1
        hit = analysis.damage_row(c.vector, c.cluster, "select")
        on, off = (None, None) if hit is None else (hit.on_target, hit.off_target)
        skill = c.label if c.label is not None and c.f1(c.label) >= NAMED_F1 else MISSING
        agreement = agreement_cells(c, c.label, ("homogeneity", "recall_all", "lift"))
        rows.append(
            [name, f"v{c.vector}·c{c.cluster}", count(c.tokens), skill, *agreement, nats(on), nats(off)]
        )
    columns = (
        Column("basis", left=True), Column("cluster", left=True), "tokens", Column("skill", left=True),
        "homogeneity", "recall", "lift", "damage on its tokens", "on all others",
    )  # fmt: skip
    title = f"Clusters that agree best with a known skill, {len(rows)} of {len(found)} (select split)"
    return table(columns, rows, title)


def print_summary(directory: RunDirectory, console: Console) -> None:
    """What a run found, in three tables and a sentence for each skill.

    Raises:
        ValueError: if the run is not finished.
    """
    view = read_run(directory)
    console.print(bases_table(view.summary).terminal())
    console.print(clusters_table(view.summary).terminal())
    found = answers(view)
    if found:
        console.print(answers_table(found, {}).terminal())
