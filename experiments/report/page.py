"""report.html: one self-contained page, and its figures as SVG and CSV, drawn from a run's records.

The first screen answers the newcomer's question, which vector takes which skill away and what else that
costs; the evidence follows, cost and versions come last. No model is built.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from experiments.report.answers import SPARED, TAKEN, bases_table, cluster_answers_table
from experiments.report.blocks import Section
from experiments.report.chapters.chapter import MOST_COLUMNS, MOST_CURVES, MOST_SKILLS, Chapter, chapter
from experiments.report.chapters.grouping import grouping_section
from experiments.report.figures import damage as figures_damage
from experiments.report.figures import run as figures
from experiments.report.formats import count, decimal, listed, nats, number, share
from experiments.report.headline import Found, Line, headline_table, headline_words, lines, read_found
from experiments.report.labels import label_section
from experiments.report.sections import sections_of
from experiments.report.style import Drawing, colours, theme_css
from experiments.report.tables import Cell, Column, Table, table
from experiments.report.view import RunView, read_run
from experiments.run.machine import peak_rss_bytes
from experiments.run.store import RunDirectory
from experiments.tasks import TASKS
from polca_edit.checkpoints.files import write_atomically

#: Vectors of all bases together in the first map.
MOST_ROWS = 40
STAGES = ("train", "basis", "projections", "clusters", "damage", "evaluate")
#: Drawing as a stage.
STAGE = "report"
PASSES = ("forward", "backward", "tangent", "hvp")


def write_report(
    directory: RunDirectory, say: Callable[[str], None] = print, added: Sequence[Section] = ()
) -> Path:
    """Draw ``report.html`` and ``figures/*.svg``, each with its numbers as CSV, of a finished run.

    ``figures/`` belongs to the report: pictures that this run no longer has are removed. Drawing is a stage
    of its own: its seconds are told, stand on the page and in ``stages/report.json``.

    Args:
        directory: a run with summary.json.
        say: told about clusters that are not shown, and how long drawing took.
        added: chapters beside those the run has records for.

    Raises:
        ValueError: if the run has no summary yet, or two figures have one title.
    """
    started = time.perf_counter()
    view = read_run(directory)
    parts = _parts(view, added)
    hidden = sum(len(c.view.clusters) - len(c.listed) for c in parts.chapters)
    if hidden:
        say(f"  report: {hidden} smaller clusters are listed in summary.json but not drawn")
    names = [drawing.name for drawing in parts.drawings]
    if len(set(names)) != len(names):
        raise ValueError(f"every figure of a report needs its own title, got {sorted(names)}; rename one")
    write_figures(directory / "figures", parts.drawings)
    page = _rendered(view, parts, started)
    path = directory / "report.html"
    write_atomically(path, lambda part: part.write_text(page, encoding="utf-8"))
    seconds = time.perf_counter() - started
    directory.note(STAGE, STAGE, [], seconds=seconds, passes={})
    say(f"  {STAGE:<24} {seconds:7.1f} s")
    return path


@dataclass(frozen=True)
class _Parts:
    """Everything of the page that comes from records.

    Attributes:
        hues: skill -> colour.
        found: verdicts and axes.
        lines: of the first table.
        first: figures of the first screen.
        chapters: one per basis.
        sections: in the order of the page, added ones last.
        labels: the chapter on labels, None where nothing was labelled.
    """

    hues: Mapping[str, str]
    found: Found
    lines: Sequence[Line]
    first: Sequence[Drawing]
    chapters: Sequence[Chapter]
    sections: Sequence[Section]
    labels: Section | None

    @property
    def drawings(self) -> list[Drawing]:
        """Every figure of the page."""
        sections = [*self.sections, *([self.labels] if self.labels else [])]
        drawn = [*self.first, *(d for c in self.chapters for d in c.drawings.values())]
        return [*drawn, *(d for section in sections for d in section.drawings)]


def _parts(view: RunView, added: Sequence[Section]) -> _Parts:
    hues, found = skill_colours(view.skills), read_found(view.directory)
    chapters = [chapter(view, analysis, hues) for analysis in view.analyses]
    grouping = grouping_section(view, [group for c in chapters for group in c.groups], hues)
    sections = [*([grouping] if grouping else []), *sections_of(view.directory, view.summary, hues), *added]
    return _Parts(
        hues,
        found,
        lines(view, found),
        overview(view, hues),
        chapters,
        sections,
        label_section(view.directory),
    )


def _rendered(view: RunView, parts: _Parts, started: float) -> str:
    made, tested = parts.lines, parts.found.tested
    table_ = headline_table(made, parts.hues) if made else cluster_answers_table(view.summary)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            view=view,
            summary=view.summary,
            subtitle=subtitle(view),
            lead=lead(view, made),
            answers=table_,
            known=bool(made),
            tested=any(line.kind != "untested" for line in made),
            fresh=tested is None or tested.fresh,
            exploratory=tested is not None and tested.fresh and tested.exploratory,
            overview=parts.first,
            sections=parts.sections,
            labels=parts.labels,
            chapters=parts.chapters,
            bases=bases_table(view.summary),
            cost=cost_table(view, started),
            facts=facts(view),
            bounds={"taken": TAKEN, "spared": SPARED, "curves": MOST_CURVES, "columns": MOST_COLUMNS},
        )
    )


def write_figures(folder: Path, drawings: Sequence[Drawing]) -> None:
    """Every drawing as SVG and its numbers as CSV; files of an earlier report are removed."""
    written = {path for drawing in drawings for path in drawing.write(folder)}
    for ending in ("svg", "csv", "png"):
        for path in set(folder.glob(f"*.{ending}")) - written:
            os.remove(path)


def environment() -> Environment:
    """Templates with the report's number formats; a missing value is an error, not a blank."""
    made = Environment(
        loader=PackageLoader("experiments.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(nats=nats, share=share, number=number, count=count, decimal=decimal)
    made.globals["theme_css"] = Markup(theme_css())
    return made


def skill_colours(names: Iterable[str]) -> dict[str, str]:
    """One colour a skill, the same on every page that has the same skills."""
    return colours(sorted(set(names)))


# -- the first screen -----------------------------------------------------------------------------


def subtitle(view: RunView) -> str:
    """Task, size and seed."""
    known = TASKS.get(view.summary.task)
    task = f"task '{view.summary.task}'" if known is None else known.about
    return f"{task} · {count(view.summary.model.parameters)} parameters · seed {view.summary.seed}"


def lead(view: RunView, found: Sequence[Line]) -> Markup:
    """What was found, in plain words."""
    first, tokens = view.analyses[0], view.summary.tokens
    losses = [float(first.losses[end].mean(dtype=np.float64)) for end in (0, -1)]
    vectors = [f"{count(a.entry.basis.vectors)} {a.name}" for a in view.analyses]
    # Of opened checkpoints nobody knows what they were trained on.
    apart = " kept out of training" if view.config.trained_here else ""
    text = Markup(
        "{} Over steps {} to {} ({} checkpoints) its mean loss on {} tokens{} went from {} to {} nats. "
        "The movement of its weights was split along directions ({}); the movement along each one was then "
        "undone in the trained model, and the loss of every token measured again."
    ).format(
        f"A model of {count(view.summary.model.parameters)} parameters "
        + ("was trained." if view.config.trained_here else "was opened from its training checkpoints."),
        first.steps[0],
        first.steps[-1],
        count(tokens.checkpoints),
        count(tokens.select),
        apart,
        decimal(losses[0], 3),
        decimal(losses[1], 3),
        listed(vectors),
    )
    if not found:
        return _clusters_found(view) + " " + text
    bold, *rest = headline_words(found)
    return Markup("<b>{}</b> {} ").format(bold, " ".join(rest)) + text


def _clusters_found(view: RunView) -> Markup:
    total = sum(len(a.clusters) for a in view.analyses)
    return Markup("<b>{} groups of tokens</b> moved together along one of these directions.").format(
        count(total)
    )


def overview(view: RunView, hues: Mapping[str, str]) -> list[Drawing]:
    """Loss curves of every skill, and the map of every vector against every skill beside them."""
    first, names = view.analyses[0], view.common_skills(MOST_SKILLS)
    groups = {name: view.skills[name] for name in names}
    tau = first.entry.basis.flat_after
    caption = figures.TRAINING_CAPTION
    if len(names) < len(view.skills):
        caption += f" Showing {len(names)} of {len(view.skills)} skills, the commonest, here and below."
    curves = figures.training_losses(first.steps, first.losses, groups, hues, tau)
    made = [Drawing("training", caption, curves)]
    if names and any(analysis.most_damaging(1) for analysis in view.analyses):
        made.append(overview_map(view, names, hues))
    return made


def overview_map(view: RunView, skills: Sequence[str], hues: Mapping[str, str]) -> Drawing:
    """Damage of the most damaging vectors of all bases on every skill, on the evaluate split."""
    most = max(MOST_ROWS // len(view.analyses), 1)
    rows, values, total = [], [], 0
    for analysis in view.analyses:
        raw, _ = analysis.skill_damage(skills, "evaluate")
        kept = sorted(analysis.most_damaging(most))
        total += len(raw)
        rows += [f"{analysis.name} v{v}" for v in kept]
        values.append(raw[kept])
    told = f" Showing {len(rows)} of {total} vectors." if len(rows) < total else ""
    figure = figures_damage.damage_map(np.concatenate(values), rows, skills, hues)
    return Drawing("damage-overview", figures_damage.OVERVIEW_CAPTION + told, figure)


# -- cost and versions ----------------------------------------------------------------------------


def cost_table(view: RunView, started: float) -> Table:
    """Seconds, passes over the select split and peak memory of every stage, in the order they ran.

    The report's own seconds are those since ``started``; they are not part of the measurements' sum.
    """
    unit = max(float(view.run.select_sequences), 1.0)
    order = {name: place for place, name in enumerate(STAGES)}
    names = sorted(view.run.stages, key=lambda n: (order.get(n.partition(":")[0], len(order)), n))
    rows = []
    for name in names:
        stage = view.run.stages[name]
        passes = {kind: value / unit for kind, value in stage.passes.items()}
        rows.append([Cell(name), *_cost_cells(stage.seconds, passes, stage.peak_rss_bytes)])
    rows.append([Cell(STAGE), *_cost_cells(time.perf_counter() - started, {}, peak_rss_bytes())])
    cost = view.summary.cost
    heads: list[Column | str] = [
        Column("stage", left=True),
        "seconds",
        "forward",
        "backward",
        "tangent",
        "Hessian products",
    ]
    made = table([*heads, "peak memory (GB)"], rows)
    total = (
        Cell("together, without the report"),
        *_cost_cells(cost.seconds, cost.passes, cost.peak_rss_bytes),
    )
    return Table(made.columns, made.rows, total=total)


def _cost_cells(seconds: float, passes: Mapping[str, float], memory: int) -> list[Cell]:
    spent = [seconds, *(passes.get(kind, 0.0) for kind in PASSES)]
    return [
        *(Cell(decimal(value, 1), sort=value) for value in spent),
        Cell(decimal(memory / 1e9), sort=float(memory)),
    ]


def facts(view: RunView) -> dict[str, str]:
    """Training, machine, versions and tokens of a run."""
    found: dict[str, str] = {}
    training, machine = view.config.training, view.run.hardware
    if view.config.trained_here and training is not None and training.learning_rate is not None:
        found["Training"] = (
            f"{training.steps} steps, batch {training.batch_size}, learning rate {training.learning_rate}, "
            f"weight decay {training.weight_decay}, {training.kept}"
        )
    if machine is not None:
        extra = f", {machine.accelerator}" if machine.accelerator else ""
        found["Machine"] = (
            f"{machine.processor}, {machine.cores} cores, {machine.torch_threads} threads{extra}"
        )
    if view.run.versions:
        found["Versions"] = ", ".join(f"{name} {version}" for name, version in view.run.versions.items())
    tokens = view.summary.tokens
    found["Tokens"] = f"{count(tokens.select)} select, {count(tokens.evaluate)} evaluate"
    found["Plan"] = view.summary.evaluate.plan
    return found
