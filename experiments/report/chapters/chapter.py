"""The chapter of one basis: attribution, vectors, clusters, what undoing them costs, tokens in context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.report.answers import agreement_cells, count_cell, nats_cell, share_cell
from experiments.report.chapters.grouping import TOKENS, Group, polca_group
from experiments.report.figures import damage as figures_damage
from experiments.report.figures import run as figures
from experiments.report.figures.damage import DosePanel, cell_text, largest_of
from experiments.report.formats import MISSING, count, decimal, number, share
from experiments.report.style import Drawing
from experiments.report.tables import Cell, Column, Table, table
from experiments.report.view import AnalysisView, ClusterView, Curves, RunView, exact_combinations
from polca_edit.clusters.medoid import nearest_to_medoid

MOST_CURVES = 8
MOST_CLUSTERS = 40
MOST_COLUMNS = 12
MOST_DOSED_VECTORS = 4
MOST_SKILLS = 16


@dataclass(frozen=True)
class Chapter:
    """What the template shows of one basis.

    Attributes:
        view: the basis.
        listed: clusters in the tables, the best of every skill first.
        vectors: table of its vectors.
        clusters: table of the listed clusters on the select split.
        transferred: the same on the evaluate split, by rules.
        on_skills: map of the damage of every vector on every skill, beside random directions.
        on_clusters: map of the damage of every vector on every listed cluster; None without clusters.
        groups: the listed clusters with their tokens, for the chapter that opens them.
        drawings: figures by kind.
    """

    view: AnalysisView
    listed: tuple[ClusterView, ...]
    vectors: Table
    clusters: Table
    transferred: Table
    on_skills: Table
    on_clusters: Table | None
    groups: tuple[Group, ...]
    drawings: Mapping[str, Drawing]


def chapter(view: RunView, analysis: AnalysisView, hues: Mapping[str, str]) -> Chapter:
    """Everything the template needs for one basis."""
    listed = analysis.clusters[:MOST_CLUSTERS]
    drawn = listed[:MOST_CURVES]
    paths = view.curves(listed)
    curves = paths[: len(drawn)]
    starts = {c.name: float(own.starts.mean()) for c, own in zip(listed, paths, strict=True)}
    return Chapter(
        analysis,
        listed,
        vectors_table(analysis),
        clusters_table(listed, starts, hues),
        transferred_table(listed, hues),
        skills_map(view, analysis),
        clusters_map(analysis, listed[:MOST_COLUMNS]) if listed else None,
        tuple(_group(view, cluster, own) for cluster, own in zip(listed, paths, strict=True)),
        drawings(view, analysis, listed, curves, hues),
    )


# -- tables ---------------------------------------------------------------------------------------


def vectors_table(analysis: AnalysisView) -> Table:
    """Every vector with its origin, size and residual, and what clustering made of it."""
    entry = analysis.entry
    size = "squared singular value" if entry.basis.kind == "trajectory" else "eigenvalue"
    columns: list[Column | str] = [
        "vector",
        "taken at step",
        size,
        "eigen-residual",
        Column("kept", left=True),
    ]
    columns += ["dropped tokens", "outliers", "clusters"]
    rows = []
    for v in entry.vectors:
        found = sum(cluster.vector == v.vector for cluster in analysis.clusters)
        unsure = "warn" if v.residual is not None and v.residual > 0.1 else ""
        rows.append(
            [
                Cell(f"v{v.vector}", sort=v.vector, look="" if v.kept else "soft"),
                Cell(MISSING if v.origin is None else str(v.origin), sort=v.origin),
                Cell(number(v.eigenvalue), sort=v.eigenvalue),
                Cell(number(v.residual, 2), sort=v.residual, look=unsure),
                "yes" if v.kept else "no, rises",
                count_cell(v.dropped_tokens),
                share_cell(v.outlier_share if v.kept else None),
                count_cell(found),
            ]
        )
    return table(columns, rows)


def skill_cell(cluster: ClusterView, hues: Mapping[str, str]) -> Cell:
    """The skill whose name a cluster may carry."""
    skill = cluster.skill
    return Cell(MISSING, look="soft") if skill is None else Cell(skill, colour=hues.get(skill))


SKILL = Column("skill", left=True, note="named from F1 0.5 of homogeneity and recall on")


def clusters_table(
    listed: Sequence[ClusterView], starts: Mapping[str, float], hues: Mapping[str, str]
) -> Table:
    """Clusters on the select split: agreement with skills, breakthrough, damage of their own vector."""
    columns: list[Column | str] = [
        Column("cluster", left=True), Column("its tokens are", left=True), "tokens", SKILL, "F1",
        "homogeneity", "recall", "recall (clustered only)", "lift", "breakthrough",
        Column("hidden", left=True),
        "damage on its tokens", "on all others", "worst other cluster", "headroom",
    ]  # fmt: skip
    rows = []
    for c in listed:
        row, start = c.at_one, starts.get(c.name)
        damage: list[float | None] = [None] * 4
        if row is not None:
            damage = [row.on_target, row.off_target, row.off_target_worst, row.headroom]
        keys = ("homogeneity", "recall_all", "recall_paper", "lift")
        rows.append(
            [
                Cell(c.name),
                Cell(c.called, look="named soft" if c.called.startswith("unnamed") else "named"),
                count_cell(c.entry.tokens),
                skill_cell(c, hues),
                Cell(decimal(c.f1 if c.entry.label else None), sort=c.f1),
                *agreement_cells(c.entry, c.entry.label, keys),
                Cell(MISSING if start is None else f"{start:.0f}", sort=start),
                "yes" if c.entry.hidden_breakthrough else "no",
                *(nats_cell(value) for value in damage),
            ]
        )
    return table(columns, rows)


def transferred_table(listed: Sequence[ClusterView], hues: Mapping[str, str]) -> Table:
    """Clusters on the evaluate split, where a rule that saw no loss says which tokens belong."""
    columns: list[Column | str] = [
        Column("cluster", left=True), Column("rule", left=True), "rule AUC", "tokens", SKILL, "homogeneity",
        "recall", "lift", "damage on its tokens", "on all others", "headroom",
    ]  # fmt: skip
    rows: list[list[Cell | str]] = []
    for c in listed:
        found, row = c.evaluate, c.damage_evaluate
        if found is None:
            rows.append([c.name, Cell("the rule assigns no evaluate token", look="soft"), *[MISSING] * 9])
            continue
        damage = (None,) * 3 if row is None else (row.on_target, row.off_target, row.headroom)
        rows.append(
            [
                c.name,
                Cell(found.rule, look="rule"),
                Cell(decimal(found.rule_auc), sort=found.rule_auc),
                count_cell(found.tokens),
                skill_cell(c, hues),
                *agreement_cells(found, c.skill, ("homogeneity", "recall_all", "lift")),
                *(nats_cell(value) for value in damage),
            ]
        )
    return table(columns, rows)


def skills_map(view: RunView, analysis: AnalysisView) -> Table:
    """Damage of every vector on all tokens of both splits, on every skill, and what chance costs."""
    skills = view.common_skills(MOST_COLUMNS)
    raw, relative = analysis.skill_damage(skills)
    largest = largest_of(raw)
    rows = []
    for v, values, shares in zip(analysis.entry.vectors, raw, relative, strict=True):
        everything = [analysis.entry.damage_row(v.vector, None, split) for split in ("select", "evaluate")]
        drawn = analysis.entry.random_controls(v.vector, None)
        means = [c.on_target_mean for c in drawn if c.on_target_mean is not None]
        most = [c.on_target_max for c in drawn if c.on_target_max is not None]
        rows.append(
            [
                Cell(v.title, sort=v.vector),
                *(nats_cell(None if row is None else row.on_target) for row in everything),
                nats_cell(float(np.mean(means)) if means else None),
                nats_cell(max(most, default=None)),
                *(map_cell(value, part, largest) for value, part in zip(values, shares, strict=True)),
            ]
        )
    columns: list[Column | str] = [
        Column("vector", left=True), "all tokens", "all tokens, evaluate",
        Column("random directions, mean", note="of the same size, over all tokens"),
        Column("random directions, largest", note="of the same size, over all tokens"), *skills,
    ]  # fmt: skip
    return table(columns, rows)


def clusters_map(analysis: AnalysisView, listed: Sequence[ClusterView]) -> Table:
    """Damage of every vector (columns) on every given cluster (rows); a cluster's own vector is framed."""
    raw, relative = analysis.cluster_damage(listed)
    largest = largest_of(raw)
    vectors = analysis.entry.vectors
    rows = []
    for cluster, values, shares in zip(listed, raw.T, relative.T, strict=True):
        cells = [
            map_cell(value, part, largest, "own" if cluster.vector == v.vector else "")
            for value, part, v in zip(values, shares, vectors, strict=True)
        ]
        rows.append([Cell(cluster.name), Cell(cluster.called, look="named"), *cells])
    heads = [Column(f"v{v.vector}", note=v.title) for v in vectors]
    return table([Column("cluster", left=True), Column("its tokens are", left=True), *heads], rows)


def map_cell(value: float, part: float, largest: float, look: str = "") -> Cell:
    """Damage in nats, shaded by its size; its share of the headroom is shown on request."""
    if not np.isfinite(value):
        return Cell(MISSING)
    note = f"{share(part)} of headroom" if np.isfinite(part) else "too little headroom for a share"
    return Cell(cell_text(value), sort=float(value), look=look, note=note, shade=float(value) / largest)


def _group(view: RunView, cluster: ClusterView, curves: Curves) -> Group:
    """A cluster with the tokens nearest the medoid of its projected trajectories."""
    near = cluster.members.nonzero()[0][nearest_to_medoid(curves.projected, TOKENS)]
    words = (
        f"The {len(near)} of {count(cluster.entry.tokens)} tokens nearest the medoid of its trajectories; "
        f"damage: loss change when vector {cluster.vector} is undone (nats)."
    )
    return polca_group(view, cluster, near.tolist(), words)


# -- figures --------------------------------------------------------------------------------------


def drawings(
    view: RunView,
    analysis: AnalysisView,
    listed: Sequence[ClusterView],
    curves: Sequence[Curves],
    hues: Mapping[str, str],
) -> dict[str, Drawing]:
    """The figures of one basis that have something to show, by kind."""
    made: dict[str, Drawing] = {}

    def add(kind: str, caption: str, figure: figures.Figure) -> None:
        made[kind] = Drawing(f"{analysis.name}-{kind}", caption, figure)

    skills, drawn, basis = view.common_skills(MOST_SKILLS), listed[: len(curves)], analysis.entry.basis
    change = figures.loss_change(analysis.entry.loss_change, basis, skills, hues)
    add("loss-change", figures.LOSS_CHANGE_CAPTION, change)
    if drawn:
        shown = figures.cluster_curves(drawn, curves, basis.flat_after, hues)
        add("curves", figures.CURVES_CAPTION, shown)
        panels = [figures_damage.cluster_doses(cluster) for cluster in drawn]
        add("doses-clusters", figures_damage.CLUSTER_DOSE_CAPTION, figures_damage.dose_curves(panels))
        if view.skills:
            sets = exact_combinations(view.skills)
            add("composition", figures.COMPOSITION_CAPTION, figures.composition(sets, listed, hues))
    doses = _vector_panels(analysis, skills, hues)
    if doses:
        caption = figures_damage.VECTOR_DOSE_CAPTION.format(count=len(doses))
        add("doses-vectors", caption, figures_damage.dose_curves(doses))
    return made


def _vector_panels(analysis: AnalysisView, skills: Sequence[str], hues: Mapping[str, str]) -> list[DosePanel]:
    titles = {v.vector: v.title for v in analysis.entry.vectors}
    return [
        figures_damage.vector_doses(analysis, v, titles[v], skills, hues)
        for v in analysis.most_damaging(MOST_DOSED_VECTORS)
    ]
