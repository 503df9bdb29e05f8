"""The newcomer's question: which vector takes which skill away, and what else does that cost?

The vector of a skill is chosen on the select split, by the share of headroom that undoing it costs the
skill less what it costs the worst other skill. Every number shown is that of the evaluate split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.console import Console

from experiments.report.formats import MISSING, count, decimal, listed, nats, share
from experiments.report.records import Agreement, DamageEntry, Summary, read_summary
from experiments.report.tables import Cell, Column, Table, table
from experiments.report.view import NAMED_F1, SMALL_HEADROOM, read_skills
from polca_edit.artifacts import RunDirectory

#: A skill counts as taken away from this share of its headroom on ...
TAKEN = 0.5
#: ... and another as left alone up to this one.
SPARED = 0.1
#: Clusters of a skill, and clusters in all, that the terminal lists.
PER_SKILL, LISTED = 2, 12
Outcome = Literal["alone", "with others", "not taken"]


@dataclass(frozen=True)
class Answer:
    """What the most selective vector of one skill does to it and to others.

    Attributes:
        skill: its name.
        basis: of the vector.
        vector: index in that basis.
        damage: loss change of the skill's evaluate tokens when the vector is undone, nats.
        share: the same over the skill's headroom.
        worst: the other skill that loses the largest share, of those that share no token with it.
        worst_damage: what that one loses, nats.
        worst_share: the same over its headroom.
        joined: skills that do share tokens with it -> their damage, nats.
    """

    skill: str
    basis: str
    vector: int
    damage: float
    share: float
    worst: str | None
    worst_damage: float | None
    worst_share: float | None
    joined: Mapping[str, float]

    @property
    def outcome(self) -> Outcome:
        """Whether undoing the vector takes the skill away, and whether it takes that skill alone."""
        if self.share < TAKEN:
            return "not taken"
        return "alone" if (self.worst_share or 0.0) <= SPARED else "with others"

    @property
    def sentence(self) -> str:
        """The answer in words."""
        place, cost = f"{self.basis} v{self.vector}", f"{nats(self.damage, 2)} nats ({share(self.share)})"
        other = f"{self.worst} {nats(self.worst_damage, 2)} nats ({share(self.worst_share)})"
        if self.outcome == "not taken":
            told = f"No vector takes {self.skill} away; the most selective one, {place}, costs it {cost}"
            told += f" and {other}." if self.worst else "."
        elif self.worst is None:
            told = f"Undoing {place} costs {self.skill} {cost}; every other skill shares tokens with it."
        elif self.outcome == "alone":
            told = f"Undoing {place} costs {self.skill} {cost} and no other skill more than {other}."
        else:
            told = f"Undoing {place} costs {self.skill} {cost}, but not it alone: it costs {other}."
        hurt = [f"{name} {nats(value, 2)}" for name, value in self.joined.items() if value >= SMALL_HEADROOM]
        return f"{told} Of skills with the same tokens: {listed(hurt)}." if hurt else told


def answers(summary: Summary, skills: Mapping[str, np.ndarray]) -> list[Answer]:
    """One answer for every known skill that has headroom, in order of their names.

    Args:
        summary: a run's summary.
        skills: skill name -> (M,) mask of select tokens, to tell which skills share tokens.
    """
    found = (_best(summary, skill, skills) for skill in sorted(skills))
    return [answer for answer in found if answer is not None]


def _best(summary: Summary, skill: str, skills: Mapping[str, np.ndarray]) -> Answer | None:
    joined = {o for o, mask in skills.items() if o != skill and bool((mask & skills[skill]).any())}
    ranked: list[tuple[float, str, int]] = []
    for name, analysis in summary.analyses.items():
        for vector in analysis.vectors:
            row = analysis.damage_row(vector.vector, None, "select")
            if row is None or (own := share_of(row, skill)) is None:
                continue
            others = [value for _, value in _others(row, skill, joined)]
            ranked.append((min(own, 1.0) - max([0.0, *others]), name, vector.vector))
    # The first of equals: bases and vectors keep their order.
    for _, name, index in sorted(ranked, key=lambda entry: -entry[0]):
        row = summary.analyses[name].damage_row(index, None, "evaluate")
        if row is not None and share_of(row, skill) is not None:
            return _answer(row, skill, name, joined)
    return None


def _answer(row: DamageEntry, skill: str, basis: str, joined: Iterable[str]) -> Answer:
    own = share_of(row, skill)
    worst = max(_others(row, skill, joined), key=lambda pair: pair[1], default=None)
    return Answer(
        skill,
        basis,
        row.vector,
        row.groups[skill],
        own if own is not None else 0.0,
        worst[0] if worst else None,
        row.groups[worst[0]] if worst else None,
        worst[1] if worst else None,
        {name: row.groups[name] for name in sorted(joined) if name in row.groups},
    )


def _others(row: DamageEntry, skill: str, joined: Iterable[str]) -> list[tuple[str, float]]:
    """Skills without a token of this one, with the shares they lose."""
    apart = set(row.groups) - {skill, *joined}
    shares = ((name, share_of(row, name)) for name in sorted(apart))
    return [(name, value) for name, value in shares if value is not None]


def share_of(row: DamageEntry, skill: str) -> float | None:
    """Damage over headroom; None where the skill has no headroom to speak of."""
    room = row.group_headroom.get(skill)
    if skill not in row.groups or room is None or room < SMALL_HEADROOM:
        return None
    return row.groups[skill] / room


# -- the tables -----------------------------------------------------------------------------------

OUTCOMES: dict[Outcome, tuple[str, str]] = {
    "alone": ("yes, it alone", "good"),
    "with others": ("with others", "mixed"),
    "not taken": ("no", "soft"),
}


def answers_table(found: Sequence[Answer], hues: Mapping[str, str]) -> Table:
    """Skill, the vector that takes it away, the damage on it and on the worst other skill, a sentence."""
    rows = []
    for a in found:
        words, look = OUTCOMES[a.outcome]
        worst = (
            MISSING if a.worst is None else f"{a.worst} {nats(a.worst_damage, 2)} ({share(a.worst_share)})"
        )
        rows.append(
            [
                Cell(a.skill, colour=hues.get(a.skill), look="strong"),
                Cell(words, look=look),
                f"{a.basis} v{a.vector}",
                nats_cell(a.damage, 2),
                share_cell(a.share),
                Cell(worst, sort=a.worst_share, colour=hues.get(a.worst or "")),
                Cell(a.sentence, look="sentence"),
            ]
        )
    columns = (
        Column("skill", left=True),
        Column("taken away?", left=True, note=f"yes from {share(TAKEN)} of what was learned on; alone while "
               f"no other skill loses more than {share(SPARED)}"),
        Column("vector undone", left=True),
        Column("damage (nats)", note="mean loss change of the skill's evaluate tokens"),
        Column("of headroom", note="damage over the loss that undoing all training would cost"),
        Column("worst other skill", left=True, note="of the skills that share no token with it"),
        Column("in words", left=True),
    )  # fmt: skip
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
            rule = next(
                (c.rule for c in analysis.evaluate_clusters if (c.vector, c.cluster) == place), MISSING
            )
            ranked.append((margin, name, judged, rule))
    ranked.sort(key=lambda entry: -entry[0])
    rows: list[list[Cell | str]] = []
    for _, name, row, rule in ranked[:LISTED]:
        room = row.headroom if row.headroom is not None and row.headroom >= SMALL_HEADROOM else None
        part = None if room is None or row.on_target is None else row.on_target / room
        damage = [nats_cell(value) for value in (row.on_target, row.off_target, row.off_target_worst)]
        place = f"{name} v{row.vector}·c{row.cluster}"
        rows.append(
            [
                place,
                f"{name} v{row.vector}",
                damage[0],
                share_cell(part),
                *damage[1:],
                Cell(rule, look="rule"),
            ]
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
    summary = read_summary(directory.path)
    console.print(bases_table(summary).terminal())
    console.print(clusters_table(summary).terminal())
    found = answers(summary, read_skills(directory))
    if found:
        console.print(answers_table(found, {}).terminal())
