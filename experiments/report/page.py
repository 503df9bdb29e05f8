"""report.html: one self-contained page, and its figures as PNG, drawn from a run's records.

No model is built. Later experiments add their own chapters as :class:`Section`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from experiments.report import figures, figures_damage
from experiments.report.figures import Drawing
from experiments.report.formats import count, highlighted, nats, number, share
from experiments.report.records import (
    AnalysisView,
    ClusterView,
    Curves,
    RunView,
    random_controls,
    read_run,
)
from experiments.report.tokens import exact_combinations, nearest_to_medoid
from experiments.run.store import RunDirectory
from polca_edit.checkpoints.files import write_atomically

MOST_CURVES = 8
MOST_CLUSTERS = 24
MOST_COLUMNS = 12
MOST_CONTEXTS = 6
MOST_DOSED_VECTORS = 4
MOST_SKILLS = 16
MOST_ROWS = 40
TOKENS_PER_CLUSTER = 10

TASKS = {
    "arithmetic": "adding two three-digit numbers (the four digits of the answer are scored)",
    "text": "predicting the next token of a text",
}


@dataclass(frozen=True)
class Section:
    """A chapter that another module adds to the report.

    Attributes:
        title: heading.
        html: its body; trusted, so whoever makes it escapes what came from data.
        figures: drawn below the body and written as PNG like all others.
    """

    title: str
    html: str
    figures: Sequence[Drawing] = ()


def write_report(
    directory: RunDirectory, say: Callable[[str], None] = print, extra_sections: Sequence[Section] = ()
) -> Path:
    """Draw ``report.html`` and ``figures/*.png`` of a finished run.

    ``figures/`` belongs to the report: pictures that this run no longer has are removed.

    Args:
        directory: a run with summary.json.
        say: told about clusters that are not shown.
        extra_sections: chapters of other experiments, appended before the notes on method.

    Raises:
        ValueError: if the run has no summary yet.
    """
    view = read_run(directory)
    bases = [basis_context(view, analysis) for analysis in view.analyses]
    hidden = sum(basis["not_shown"] for basis in bases)
    if hidden:
        say(f"  report: {hidden} smaller clusters are listed in summary.json but not drawn")
    overview = training_drawing(view)
    drawings = [overview, *(d for b in bases for d in b["drawings"].values())]
    drawings += [d for section in extra_sections for d in section.figures]
    names = [d.name for d in drawings]
    if len(set(names)) != len(names):
        raise ValueError(f"every figure of a report needs its own name, got {sorted(names)}; rename one")
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            view=view,
            summary=view.summary,
            task=TASKS.get(view.summary["task"], f"'{view.summary['task']}'"),
            learning=view.config.get("training") or {},
            trained=view.config.get("checkpoints") is None,
            losses=(float(view.analyses[0].losses[0].mean()), float(view.analyses[0].losses[-1].mean())),
            steps=view.analyses[0].steps.tolist(),
            cost=cost_rows(view),
            bases=bases,
            overview=overview,
            extra_sections=extra_sections,
        )
    )
    write_figures(directory / "figures", drawings)
    path = directory / "report.html"
    write_atomically(path, lambda part: part.write_text(page, encoding="utf-8"))
    return path


def write_figures(folder: Path, drawings: Sequence[Drawing]) -> None:
    """Every drawing as PNG; PNGs of an earlier report that are not drawn any more are removed."""
    for drawing in drawings:
        write_atomically(folder / f"{drawing.name}.png", _bytes_writer(drawing.png()))
    names = {f"{drawing.name}.png" for drawing in drawings}
    for path in folder.glob("*.png"):
        if path.name not in names:
            os.remove(path)


def _bytes_writer(content: bytes) -> Callable[[Path], object]:
    return lambda part: part.write_bytes(content)


def environment() -> Environment:
    """Templates with the report's number formats; a missing value is an error, not a blank."""
    text = (resources.files("experiments.report") / "templates" / "report.html.j2").read_text(
        encoding="utf-8"
    )
    made = Environment(
        loader=DictLoader({"report.html.j2": text}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(nats=nats, share=share, number=number, count=count, highlighted=highlighted)
    return made


# -- what each part shows -------------------------------------------------------------------------


def cost_rows(view: RunView) -> list[dict[str, Any]]:
    """Seconds, passes over the select split and peak memory of every stage, in the order they ran."""
    unit = max(float(view.run.get("select_sequences", 1)), 1.0)
    stages = view.run.get("stages", {})
    kinds = ("train", "basis", "projections", "clusters", "damage", "evaluate")
    order = {name: i for i, name in enumerate(kinds)}
    return [
        {
            "stage": name,
            "seconds": stages[name]["seconds"],
            "passes": {kind: value / unit for kind, value in stages[name]["passes"].items()},
            "memory": stages[name]["peak_rss_bytes"] / 1e9,
        }
        for name in sorted(stages, key=lambda n: (order.get(n.partition(":")[0], len(order)), n))
    ]


def training_drawing(view: RunView) -> Drawing:
    """Exact loss of every skill over training."""
    first = view.analyses[0]
    names = shown_skills(view)
    groups = {name: view.skills[name] for name in names}
    tau = first.entry["basis"]["flat_after"]
    figure = figures.training_losses(first.steps, first.losses, groups, tau)
    caption = (
        "Exact loss of the select tokens over training, for each skill and for all tokens. After the "
        "dotted line at most 5 % of the mean loss's total fall is left."
    )
    if len(names) < len(view.skills):
        caption += f" {len(view.skills) - len(names)} rarer skills are not shown, here and below."
    return Drawing("training", caption, figure)


def shown_skills(view: RunView, most: int = MOST_SKILLS) -> list[str]:
    """The commonest skills, in order of their names."""
    commonest = sorted(view.skills, key=lambda name: -int(view.skills[name].sum()))[:most]
    return sorted(commonest)


def basis_context(view: RunView, analysis: AnalysisView) -> dict[str, Any]:
    """Everything the template needs for one basis."""
    listed = analysis.clusters[:MOST_CLUSTERS]
    drawn = listed[:MOST_CURVES]
    curves = view.curves(drawn)
    found_per_vector = {v["vector"]: 0 for v in analysis.entry["vectors"]}
    for cluster in analysis.clusters:
        found_per_vector[cluster.vector] += 1
    return {
        "name": analysis.name,
        "entry": analysis.entry,
        "clusters": listed,
        "not_shown": len(analysis.clusters) - len(listed),
        "found": len(analysis.clusters),
        "found_per_vector": found_per_vector,
        "skills": shown_skills(view, MOST_COLUMNS),
        "vectors_alone": [
            (v, analysis.vector_rows(v, "select"), analysis.vector_rows(v, "evaluate"))
            for v in most_damaging(analysis, MOST_DOSED_VECTORS)
        ],
        "drawings": basis_drawings(view, analysis, listed, curves),
        "curves_not_shown": len(listed) - len(drawn),
        "starts": {c.name: float(curve.starts.mean()) for c, curve in zip(drawn, curves, strict=True)},
        "contexts": [
            cluster_contexts(view, analysis, cluster, curve)
            for cluster, curve in list(zip(drawn, curves, strict=True))[:MOST_CONTEXTS]
        ],
    }


def cluster_contexts(
    view: RunView, analysis: AnalysisView, cluster: ClusterView, curves: Curves
) -> dict[str, Any]:
    """The tokens nearest the medoid of a cluster's projected trajectories."""
    rows = cluster.members.nonzero()[0][nearest_to_medoid(curves.projected, TOKENS_PER_CLUSTER)]
    return {
        "cluster": cluster,
        "rows": [
            {
                "context": view.tokens["context"].iloc[row],
                "skills": view.tokens["skills"].iloc[row].replace(",", ", "),
                "damage": float(analysis.damage[cluster.vector, row]),
            }
            for row in rows
        ],
    }


def basis_drawings(
    view: RunView, analysis: AnalysisView, listed: Sequence[ClusterView], curves: Sequence[Curves]
) -> dict[str, Drawing]:
    """The figures of one basis that have something to show, by kind."""
    name, entry = analysis.name, analysis.entry
    skills = shown_skills(view)
    drawn, columns = listed[: len(curves)], listed[:MOST_COLUMNS]
    names = [vector_name(v) for v in entry["vectors"]]
    framed = {c.vector for c in columns}
    rows = sorted(framed | set(most_damaging(analysis, MOST_ROWS - len(framed))))
    row_names = [names[v] for v in rows]
    fewer = len(names) - len(rows)
    rest = f" {fewer} vectors with less damage are not shown." if fewer else ""
    made: dict[str, Drawing] = {}

    def add(kind: str, caption: str, figure: figures.Figure) -> None:
        made[kind] = Drawing(f"{name}-{kind}", caption, figure)

    change = shown_groups(entry["loss_change"], skills)
    add("loss-change", figures.LOSS_CHANGE_CAPTION, figures.loss_change(name, change, entry["basis"]))
    if drawn:
        tau, explained = entry["basis"]["flat_after"], entry["basis"]["explained_share"]
        add("curves", figures.CURVES_CAPTION, figures.cluster_curves(name, explained, drawn, curves, tau))
        if view.skills:
            sets = exact_combinations(view.skills)
            add("composition", figures.COMPOSITION_CAPTION, figures.composition(sets, listed))
        raw, relative = analysis.cluster_damage(columns)
        own = [(rows.index(c.vector), index) for index, c in enumerate(columns) if c.vector in rows]
        titles = [f"{cluster.name} {cluster.entry['label'] or ''}".rstrip() for cluster in columns]
        figure = figures_damage.damage_matrix(raw[rows], relative[rows], row_names, titles, own)
        add("damage-clusters", figures_damage.CLUSTER_DAMAGE_CAPTION + rest, figure)
        panels = [figures_damage.cluster_doses(cluster) for cluster in drawn]
        add("doses-clusters", figures_damage.CLUSTER_DOSE_CAPTION, figures_damage.dose_curves(panels))
    if view.skills:
        raw, relative = analysis.skill_damage(skills)
        figure = figures_damage.damage_matrix(raw[rows], relative[rows], row_names, skills)
        add("damage-skills", figures_damage.SKILL_DAMAGE_CAPTION + rest, figure)
    vectors = most_damaging(analysis, MOST_DOSED_VECTORS)
    doses = [
        figures_damage.vector_doses(analysis, v, names[v], skills, random_controls(entry, v, None))
        for v in vectors
    ]
    if doses:
        caption = figures_damage.VECTOR_DOSE_CAPTION.format(count=len(doses))
        add("doses-vectors", caption, figures_damage.dose_curves(doses))
    return made


def shown_groups(change: Mapping[str, Any], skills: Sequence[str]) -> dict[str, Any]:
    """A loss_change entry with the shown skills only."""
    return {**change, "per_group": {k: v for k, v in change["per_group"].items() if k in skills}}


def vector_name(entry: Mapping[str, Any]) -> str:
    """Row title of a vector: its index and the step it was taken at."""
    return f"v{entry['vector']}" + ("" if entry["origin"] is None else f" (step {entry['origin']})")


def most_damaging(analysis: AnalysisView, most: int) -> list[int]:
    """Vectors with the largest damage on any skill (on all tokens where there are none), select split."""

    def largest(row: Mapping[str, Any]) -> float:
        return max(row["groups"].values(), default=row["on_target"] or 0.0)

    rows = [
        r
        for r in analysis.entry["damage"]
        if r["cluster"] is None and r["split"] == "select" and r["dose"] == 1.0
    ]
    return [int(r["vector"]) for r in sorted(rows, key=largest, reverse=True)[:most]]
