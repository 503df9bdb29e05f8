"""The chapter of one basis: attribution, vectors, clusters, what undoing them costs, tokens in context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.report import figures, figures_damage
from experiments.report.answers import agreement_cells, count_cell, nats_cell, share_cell
from experiments.report.figures_damage import DosePanel, Map
from experiments.report.formats import MISSING, decimal, highlighted, number
from experiments.report.style import Drawing
from experiments.report.tables import Cell, Column, Table, table
from experiments.report.view import AnalysisView, ClusterView, Curves, RunView, exact_combinations
from polca_edit.clusters.medoid import nearest_to_medoid

MOST_CURVES = 8
MOST_CLUSTERS = 24
MOST_COLUMNS = 12
MOST_CONTEXTS = 6
MOST_DOSED_VECTORS = 4
MOST_SKILLS = 16
MOST_ROWS = 40
TOKENS_PER_CLUSTER = 10


@dataclass(frozen=True)
class Chapter:
    """What the template shows of one basis.

    Attributes:
        view: the basis.
        listed: clusters in the tables, the best of every skill first.
        vectors: table of its vectors.
        clusters: table of the listed clusters on the select split.
        transferred: the same on the evaluate split, by rules.
        undone: damage of the most damaging vectors on both splits; None where no skill is known.
        contexts: cluster title -> tokens nearest its medoid.
        drawings: figures by kind.
    """

    view: AnalysisView
    listed: tuple[ClusterView, ...]
    vectors: Table
    clusters: Table
    transferred: Table
    undone: Table | None
    contexts: Mapping[str, Table]
    drawings: Mapping[str, Drawing]


def chapter(view: RunView, analysis: AnalysisView, hues: Mapping[str, str]) -> Chapter:
    """Everything the template needs for one basis."""
    listed = analysis.clusters[:MOST_CLUSTERS]
    drawn = listed[:MOST_CURVES]
    curves = view.curves(drawn)
    starts = {c.name: float(own.starts.mean()) for c, own in zip(drawn, curves, strict=True)}
    pairs = list(zip(drawn, curves, strict=True))[:MOST_CONTEXTS]
    return Chapter(
        analysis,
        listed,
        vectors_table(analysis),
        clusters_table(listed, starts, hues),
        transferred_table(listed, hues),
        undone_table(view, analysis) if view.skills else None,
        {cluster.title: contexts_table(view, analysis, cluster, own) for cluster, own in pairs},
        drawings(view, analysis, listed, curves, hues),
    )


# -- tables ---------------------------------------------------------------------------------------


def vectors_table(analysis: AnalysisView) -> Table:
    """Every vector with its origin, size and residual, and what clustering made of it."""
    entry = analysis.entry
    size = "squared singular value" if entry.basis.kind == "trajectory" else "eigenvalue"
    columns = ["vector", "taken at step", size, "eigen-residual", Column("kept", left=True)]
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
    columns = [
        Column("cluster", left=True), "tokens", SKILL, "F1", "homogeneity", "recall",
        "recall (clustered only)", "lift", "breakthrough", Column("hidden", left=True),
        "damage on its tokens", "on all others", "worst other cluster", "headroom",
    ]  # fmt: skip
    rows = []
    for c in listed:
        row, start = c.at_one, starts.get(c.name)
        damage = (None,) * 4
        if row is not None:
            damage = (row.on_target, row.off_target, row.off_target_worst, row.headroom)
        keys = ("homogeneity", "recall_all", "recall_paper", "lift")
        rows.append(
            [
                Cell(c.name),
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
    columns = [
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


def undone_table(view: RunView, analysis: AnalysisView) -> Table:
    """Damage of the most damaging vectors on every skill, on the split they were picked on and the other."""
    skills = view.common_skills(MOST_COLUMNS)
    rows = []
    for vector in analysis.most_damaging(MOST_DOSED_VECTORS):
        for split in ("select", "evaluate"):
            row = analysis.entry.damage_row(vector, None, split)
            if row is not None:
                cells = [nats_cell(row.on_target), *(nats_cell(row.groups.get(skill)) for skill in skills)]
                rows.append([Cell(f"v{vector}"), Cell(split), *cells])
    return table([Column("vector", left=True), Column("split", left=True), "all tokens", *skills], rows)


def contexts_table(view: RunView, analysis: AnalysisView, cluster: ClusterView, curves: Curves) -> Table:
    """The tokens nearest the medoid of a cluster's projected trajectories."""
    near = cluster.members.nonzero()[0][nearest_to_medoid(curves.projected, TOKENS_PER_CLUSTER)]
    rows = [
        [
            Cell(highlighted(view.tokens["context"].iloc[row]), look="context"),
            view.tokens["skills"].iloc[row].replace(",", ", ") or MISSING,
            nats_cell(float(analysis.damage[cluster.vector, row])),
        ]
        for row in near
    ]
    return table([Column("context", left=True), Column("skills", left=True), "damage"], rows)


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
    for kind, (caption, figure) in _maps(analysis, listed[:MOST_COLUMNS], skills, hues).items():
        add(kind, caption, figure)
    doses = _vector_panels(analysis, skills, hues)
    if doses:
        caption = figures_damage.VECTOR_DOSE_CAPTION.format(count=len(doses))
        add("doses-vectors", caption, figures_damage.dose_curves(doses))
    return made


def _maps(
    analysis: AnalysisView, columns: Sequence[ClusterView], skills: Sequence[str], hues: Mapping[str, str]
) -> dict[str, tuple[str, figures.Figure]]:
    """Maps of damage against clusters and against skills, with their captions."""
    names = [v.title for v in analysis.entry.vectors]
    framed = {c.vector for c in columns}
    rows = sorted(framed | set(analysis.most_damaging(MOST_ROWS - len(framed))))
    shown = [names[v] for v in rows]
    rest = f" Showing {len(rows)} of {len(names)} vectors." if len(rows) < len(names) else ""
    made = {}
    if columns:
        raw, relative = analysis.cluster_damage(columns)
        own = [(rows.index(c.vector), index) for index, c in enumerate(columns)]
        titles = [cluster.heading for cluster in columns]
        by_title = {c.heading: hues[c.skill] for c in columns if c.skill is not None and c.skill in hues}
        figure = figures_damage.damage_matrix(Map(raw[rows], shown, titles, by_title, own), relative[rows])
        made["damage-clusters"] = (figures_damage.CLUSTER_DAMAGE_CAPTION + rest, figure)
    if skills:
        raw, relative = analysis.skill_damage(skills)
        figure = figures_damage.damage_matrix(Map(raw[rows], shown, skills, hues), relative[rows])
        made["damage-skills"] = (figures_damage.SKILL_DAMAGE_CAPTION + rest, figure)
    return made


def _vector_panels(analysis: AnalysisView, skills: Sequence[str], hues: Mapping[str, str]) -> list[DosePanel]:
    titles = {v.vector: v.title for v in analysis.entry.vectors}
    return [
        figures_damage.vector_doses(analysis, v, titles[v], skills, hues)
        for v in analysis.most_damaging(MOST_DOSED_VECTORS)
    ]
