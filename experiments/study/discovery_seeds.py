"""Discovery in several seeds on one page: clusters, timeline, axes, beside what was asked of them.

``polca-edit study discovery runs/demo runs/demo-1 ... --json docs/results/discovery-demo.json``
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from sklearn.metrics import adjusted_rand_score

from experiments.config import load_config
from experiments.discover.records import AxisRow, DiscoverResult, load_discovery
from experiments.discover.stages import load_found, load_timeline
from experiments.report.formats import decimal, share
from experiments.report.tables import Table, table
from experiments.run.keys import signature_names
from experiments.run.run import Run, load_run
from experiments.study.groupings import best_groups
from experiments.study.results import publish, show
from experiments.verbs.guard import require_different
from experiments.verbs.options import Result
from polca_edit.clusters.density import OUTLIER


@dataclass(frozen=True)
class ClusterSeed:
    """Interventional clusters of all bases together in one run, on select.

    Attributes:
        seed: of the run.
        clusters: how many.
        outliers: share of tokens in none.
        rand: adjusted Rand index with the task's partition over clustered tokens.
        best: skill -> (homogeneity, recall) of its best cluster.
    """

    seed: int
    clusters: int
    outliers: float
    rand: float
    best: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class WindowSeed:
    """A skill's own window undone in one run, on select.

    Attributes:
        seed: of the run.
        skill: whose fall the window is.
        start: its first step.
        end: its last step.
        own: share that the skill loses.
        worst: largest share that another part of the partition loses, and its name.
        random: largest share that any part loses to random movements of the same norm.
        order: rank among the skills by the step at which half of the fall is done, first 0.
    """

    seed: int
    skill: str
    start: int
    end: int
    own: float
    worst: tuple[float, str]
    random: float
    order: int


@dataclass(frozen=True)
class AxisSeed:
    """One axis in one run: :class:`~experiments.discover.records.AxisRow` and the seed."""

    seed: int
    basis: str
    target: str
    share: float | None
    worst_other: float | None
    rest_of_parent: float | None
    null_p: float | None
    free_share: float | None
    free_worst_other: float | None


@dataclass(frozen=True)
class DiscoverySeeds:
    """Everything beside config, seeds, versions and hardware."""

    clusters: tuple[ClusterSeed, ...]
    windows: tuple[WindowSeed, ...]
    axes: tuple[AxisSeed, ...]
    seconds: tuple[float, ...]


def cluster_seed(run: Run) -> ClusterSeed:
    """Of the last signature stage, in which all bases are undone side by side."""
    tokens = run.task.splits.select
    labels = load_found(run, signature_names(run.config)[-1]).labels.numpy()
    parts = np.stack([tokens.skills[name].numpy() for name in run.task.parents])
    inside = labels != OUTLIER
    rand = float(adjusted_rand_score(parts.argmax(0)[inside], labels[inside])) if inside.any() else 0.0
    best = best_groups([labels], tokens.skills)
    found = {name: (one.homogeneity, one.recall) for name, one in best.items()}
    return ClusterSeed(run.config.seed, int(labels.max(initial=-1)) + 1, float((~inside).mean()), rand, found)


def window_seeds(run: Run) -> list[WindowSeed]:
    """Every part of the task's partition with the window of its own fall."""
    timeline, names = load_timeline(run), list(run.task.parents)
    learned = sorted(names, key=lambda name: timeline.learned.get(name) or run.config.training.steps)
    rows = []
    for skill in names:
        effect = timeline.own(skill)
        if effect is None:
            continue
        others = {name: effect.shares[name] for name in names if name != skill and name in effect.shares}
        worst = max(others, key=lambda name: others[name])
        random = [effect.random_shares[name] for name in names if name in effect.random_shares]
        rows.append(
            WindowSeed(
                run.config.seed,
                skill,
                effect.window.start,
                effect.window.end,
                effect.shares[skill],
                (others[worst], worst),
                max(random, default=float("nan")),
                learned.index(skill),
            )
        )
    return rows


def axis_seed(seed: int, row: AxisRow) -> AxisSeed:
    """A row with its seed."""
    kept = {name: value for name, value in asdict(row).items() if name in AxisSeed.__dataclass_fields__}
    return AxisSeed(seed=seed, **kept)


def cluster_table(rows: Sequence[ClusterSeed]) -> Table:
    """One line a seed."""
    skills = list(rows[0].best)
    lines = [
        [
            str(row.seed),
            str(row.clusters),
            share(row.outliers),
            decimal(row.rand),
            *(f"{decimal(row.best[s][0])} / {decimal(row.best[s][1])}" for s in skills),
        ]
        for row in rows
    ]
    title = "Interventional clusters of all bases together: homogeneity / recall of the best one per skill"
    return table(["seed", "clusters", "outliers", "Rand index", *skills], lines, title)


def window_table(rows: Sequence[WindowSeed]) -> Table:
    """One line a skill and seed."""
    lines = [
        [
            row.skill,
            str(row.seed),
            f"{row.start}-{row.end}",
            f"{row.order + 1}.",
            decimal(row.own),
            f"{decimal(row.worst[0])} ({row.worst[1]})",
            decimal(row.random),
        ]
        for row in sorted(rows, key=lambda row: (row.skill, row.seed))
    ]
    headings = ("skill", "seed", "its window", "learned", "it loses", "worst other", "random movement")
    return table(list(headings), lines, "Each skill's own window undone in the final model: shares lost")


def axis_table(rows: Sequence[AxisSeed]) -> Table:
    """Means over seeds with the range, known skills only."""
    lines = []
    known = [row for row in rows if not row.target.startswith("found")]
    for basis, target in dict.fromkeys((row.basis, row.target) for row in known):
        own = [row for row in known if (row.basis, row.target) == (basis, target)]
        ps = [row.null_p for row in own if row.null_p is not None]
        lines.append(
            [
                basis,
                target,
                _spread(row.share for row in own),
                _spread(row.worst_other for row in own),
                _spread(row.rest_of_parent for row in own),
                f"{sum(p < 0.05 for p in ps)} of {len(ps)}",
                _spread(row.free_share for row in own),
                _spread(row.free_worst_other for row in own),
            ]
        )
    headings = (
        "span",
        "target",
        "lost",
        "worst other",
        "rest of parent",
        "p < .05",
        "free edit",
        "its worst",
    )
    return table(list(headings), lines, "Skill axes on unseen tokens: mean (least to most) over seeds")


def _spread(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{decimal(statistics.fmean(known))} ({decimal(min(known))} to {decimal(max(known))})"


def _discovered(run: Run) -> DiscoverResult:
    """What verb discover found in a run.

    Raises:
        ValueError: where it has not been run.
    """
    place = run.directory.path
    result = load_discovery(place)
    if result is None:
        raise ValueError(f"'{place}' has no axes, they are gathered here; run polca-edit discover {place}")
    return result


def discovery_seeds(
    runs: Annotated[list[Path], typer.Argument(help="Runs that `polca-edit discover` has finished.")],
    json_: Result = None,
) -> None:
    """Gather the discovery of several seeds: clusters, timeline, axes."""
    require_different(runs)
    torch.set_num_threads(1)
    opened = sorted((load_run(place, say=lambda _: None) for place in runs), key=lambda run: run.config.seed)
    clusters, windows, axes, seconds = [], [], [], []
    results = [_discovered(run) for run in opened]
    for run, result in zip(opened, results, strict=True):
        clusters.append(cluster_seed(run))
        windows += window_seeds(run)
        axes += [axis_seed(run.config.seed, row) for row in result.axes]
        seconds.append(result.seconds)
    found = DiscoverySeeds(tuple(clusters), tuple(windows), tuple(axes), tuple(seconds))
    tables = [cluster_table(clusters), window_table(windows), axis_table(axes)]
    show(tables)
    config = load_config(runs[0] / "config.yaml")
    publish(json_, "discovery-seeds/1", config, [run.config.seed for run in opened], found, tables)
