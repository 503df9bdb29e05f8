"""Ways of grouping tokens on the paper's own measure: attribution, losses, gradients, perturbation, undoing.

``polca-edit study groupings runs/demo runs/demo-1 ... --json docs/results/groupings-demo.json``

Every way sees the select split only, and no label. Settings are the run's (or the paper's, where so named);
none is fitted here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from experiments.application import say
from experiments.config import load_config
from experiments.discover.stages import load_found, signature_settings, token_groups, window_record
from experiments.report.formats import decimal, share
from experiments.report.tables import Table, table
from experiments.run.keys import signature_names
from experiments.run.run import Run, load_run
from experiments.run.stages.bases import build_basis
from experiments.run.stages.damage import evaluated
from experiments.study.results import publish, show
from experiments.verbs.guard import require_different
from experiments.verbs.options import Result
from interventions.controls import random_like
from interventions.damage import EvaluatedSplit
from interventions.discovery.partial_undo import Signatures, signatures
from interventions.discovery.signatures import SignatureSettings, clustered
from interventions.edits import project_out
from polca_edit.allocation.allocate import Projections, allocate
from polca_edit.artifacts import load_record
from polca_edit.basis.record import Basis, random_basis
from polca_edit.clusters.density import OUTLIER, ClusterSettings, VectorClusters, cluster_trajectories
from polca_edit.clusters.features import exact_loss, fisher
from polca_edit.derivatives.lanczos import lengths
from polca_edit.seeds import generator_for

#: The paper's settings (arXiv 2506.15872, section 4) beside those of the run.
PAPER = ClusterSettings()
#: Most bytes that the gradients of all tokens may take; larger ones are left out, and that is said.
GRADIENT_BYTES = 8 << 30
Labels = np.ndarray


@dataclass(frozen=True)
class Agreement:
    """The group that fits a skill best by F1.

    Attributes:
        homogeneity: share of the group with the skill.
        recall: share of the skill in the group.
        f1: harmonic mean.
    """

    homogeneity: float
    recall: float
    f1: float


@dataclass(frozen=True)
class GroupingRow:
    """One way of grouping in one run.

    Attributes:
        seed: of the run.
        way: what was clustered.
        groups: clusters in all.
        outliers: share of tokens in none; over vectors, their mean.
        rand: adjusted Rand index with the partition of the tokens over clustered tokens; over vectors, the
            best; None where the task names no partition.
        skills: skill -> best group.
        seconds: of clustering and of what it needs beside the run's own records.
    """

    seed: int
    way: str
    groups: int
    outliers: float
    rand: float | None
    skills: Mapping[str, Agreement]
    seconds: float


def best_groups(partitions: Sequence[Labels], skills: Mapping[str, Tensor]) -> dict[str, Agreement]:
    """Skill -> the group of any partition with the largest F1.

    >>> import torch
    >>> best_groups([np.array([0, 0, 1, -1])], {"a": torch.tensor([True, True, True, False])})["a"]
    Agreement(homogeneity=1.0, recall=0.6666666666666666, f1=0.8)
    """
    found = {}
    for name, mask in skills.items():
        skill = mask.numpy().astype(bool)
        best = Agreement(0.0, 0.0, 0.0)
        for labels in partitions:
            for group in range(int(labels.max(initial=-1)) + 1):
                members = labels == group
                both, size = int((members & skill).sum()), int(members.sum())
                f1 = 2 * both / (size + int(skill.sum())) if size + int(skill.sum()) else 0.0
                if f1 > best.f1:
                    best = Agreement(both / size, both / int(skill.sum()), f1)
        found[name] = best
    return found


def rand_index(partitions: Sequence[Labels], truth: Labels | None) -> float | None:
    """Best adjusted Rand index with the truth over the clustered tokens of a partition."""
    if truth is None:
        return None
    scores = [
        float(adjusted_rand_score(truth[labels != OUTLIER], labels[labels != OUTLIER]))
        for labels in partitions
        if (labels != OUTLIER).any()
    ]
    return max(scores, default=0.0)


# -- the ways ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ground:
    """What every way starts from.

    Attributes:
        run: finished.
        split: its select tokens.
        settings: of signatures.
    """

    run: Run
    split: EvaluatedSplit
    settings: SignatureSettings


def ways(ground: Ground) -> Iterator[tuple[str, Callable[[], list[Labels]]]]:
    """Name and clustering of every way; a partition per vector, one in all, or none where it cannot be."""
    run = ground.run
    own = run.settings().clusters
    first = run.config.measured_bases()[0].label

    @cache
    def stored(label: str) -> Projections:
        return load_record(Projections, run.directory.projections(label))

    @cache
    def attributed(label: str) -> Tensor:
        return allocate(stored(label), run.config.rule).projected_loss()

    def polca(label: str, settings: ClusterSettings) -> list[Labels]:
        return _trajectories(attributed(label), settings)

    for spec in run.config.measured_bases():
        yield f"POLCA {spec.label}", partial(polca, spec.label, own)
        yield f"POLCA {spec.label}, paper's settings", partial(polca, spec.label, PAPER)
    yield "exact loss", lambda: _trajectories(exact_loss(stored(first)).paths, own)
    yield "exact loss, paper's settings", lambda: _trajectories(exact_loss(stored(first)).paths, PAPER)
    no_fall = replace(own, drop_rising_tokens=False, drop_rising_vectors=False)
    yield f"Fisher {first}", lambda: _trajectories(fisher(stored(first)).paths, no_fall)
    size = ground.split.tokens.count * ground.split.loss.space.size * ground.split.theta.element_size()
    most = f"{GRADIENT_BYTES / 1e9:.0f} GB"
    large = f"  token gradients are left out: they would take {size / 1e9:.0f} GB, more than {most}"
    fitting = size <= GRADIENT_BYTES
    yield "gradients, spectral (quanta)", lambda: [quanta(ground)] if fitting else _left_out(large)
    yield "random perturbations (loss kernel)", lambda: [loss_kernel(ground)]
    for name in signature_names(run.config):
        yield f"undoing {name}", partial(_found, run, name)
    yield "undoing a random span", lambda: [undoing(ground, "random", random_span(ground))]
    yield "undoing loss_weighted", lambda: [undoing(ground, "loss_weighted", weighted(ground))]


def _left_out(reason: str) -> list[Labels]:
    say(reason)
    return []


def _found(run: Run, name: str) -> list[Labels]:
    return [load_found(run, name).labels.numpy()]


def _trajectories(paths: Tensor, settings: ClusterSettings) -> list[Labels]:
    return [_labels(found) for found in cluster_trajectories(paths, settings)]


def _labels(found: VectorClusters) -> Labels:
    return found.labels.numpy() if found.kept else np.full(len(found.labels), OUTLIER)


def quanta(ground: Ground) -> Labels:
    """Spectral clustering of the final model's token gradients by cosine (Michaud et al. 2023, section 5)."""
    split = ground.split
    gradients = split.loss.token_gradients(split.theta, split.tokens)
    gradients /= lengths(gradients).to(gradients)[:, None].clamp_min(1e-12)
    alike = (gradients @ gradients.T).clamp_min(0).double().numpy()
    model = SpectralClustering(ground.settings.clusters, affinity="precomputed", random_state=0)
    return np.asarray(model.fit_predict(alike), dtype=np.int64)


def loss_kernel(ground: Ground) -> Labels:
    """Losses under random weight noise in place of undone movement (arXiv 2509.26537), clustered alike.

    As many perturbations as a basis has edits, each of the norm, placement and spectrum of a partial undo
    of the first basis: what differs from a signature is the direction alone.
    """
    run, split, edits = ground.run, ground.split, ground.settings.edits
    basis = load_record(Basis, run.directory.basis(run.config.measured_bases()[0].label))
    like, generator = project_out(split, basis), generator_for(edits.seed, "loss_kernel")
    drawn = (random_like(split, like, generator, space=split.loss.space) for _ in range(edits.most))
    changes = split.changes(drawn).numpy()
    room = split.headroom.double().numpy()
    none = np.zeros((0, changes.shape[1]))
    signed = Signatures(changes, ("noise",) * len(changes), none, (), room, ((len(changes), 1.0),))
    return clustered(signed, "noise", ground.settings).labels.numpy()


def undoing(ground: Ground, name: str, basis: Basis) -> Labels:
    """Interventional clusters of a basis that is not among the run's."""
    signed = signatures(ground.split, {name: basis}, replace(ground.settings.edits, pieces=0))
    windows = window_record(ground.run, ground.split)
    signed = replace(signed, windows=windows.changes.double().numpy(), spans=windows.spans)
    return clustered(signed, name, ground.settings).labels.numpy()


def random_span(ground: Ground) -> Basis:
    """As many random directions as the first basis has vectors: next to nothing moved along them."""
    size = ground.run.config.measured_bases()[0].vectors
    return random_basis(ground.split.loss.space.size, size, generator_for(0, "random_span"))


def weighted(ground: Ground) -> Basis:
    """Displacements weighted by the loss they went with."""
    spec = ground.run.config.measured_bases()[0].model_copy(update={"kind": "loss_weighted"})
    return build_basis(ground.run, spec, ground.run.checkpoints(), Path())


# -- the table -----------------------------------------------------------------------------------------


def grouping_rows(run: Run, only: Sequence[str] = ()) -> list[GroupingRow]:
    """Every way in one run, or those whose names begin with one of ``only``.

    Raises:
        ValueError: where no way's name begins so, or none of those can be taken.
    """
    split = evaluated(run, run.task.splits.select)
    skills = token_groups(split.tokens)
    truth: Labels | None = None
    names = run.task.parents or ([] if split.tokens.skills else list(skills))
    if names:
        table_of = np.stack([skills[name].numpy() for name in names])
        truth = np.where(table_of.any(0), table_of.argmax(0), len(names))
    rows = []
    known = []
    for way, make in ways(Ground(run, split, signature_settings(run))):
        known.append(way)
        if only and not way.startswith(tuple(only)):
            continue
        started = time.perf_counter()
        partitions = make()
        if not partitions:
            continue
        used = [labels for labels in partitions if (labels != OUTLIER).any()]
        rows.append(
            GroupingRow(
                run.config.seed,
                way,
                sum(int(labels.max(initial=-1)) + 1 for labels in partitions),
                statistics.fmean(float((labels == OUTLIER).mean()) for labels in used) if used else 1.0,
                rand_index(partitions, truth),
                best_groups(partitions, skills),
                time.perf_counter() - started,
            )
        )
        say(f"  seed {run.config.seed}: {way}, {rows[-1].groups} groups, {rows[-1].seconds:.0f} s")
    if not rows and any(way.startswith(tuple(only)) for way in known):
        raise ValueError(
            f"a way must fit into memory, {list(only)} does not in run {run.directory.path}; leave it out"
        )
    if not rows:
        raise ValueError(f"--only must begin the name of a way, one of {known}, got {list(only)}; correct it")
    return rows


def groupings_table(rows: Sequence[GroupingRow]) -> Table:
    """One line a way: means over runs; homogeneity / recall of the best group per skill."""
    skills = list(rows[0].skills)
    lines = []
    for way in dict.fromkeys(row.way for row in rows):
        own = [row for row in rows if row.way == way]
        cells = []
        for skill in skills:
            known = [row.skills[skill] for row in own]
            cells.append(
                f"{decimal(statistics.fmean(k.homogeneity for k in known))} / "
                f"{decimal(statistics.fmean(k.recall for k in known))}"
            )
        rands = [row.rand for row in own if row.rand is not None]
        f1 = statistics.fmean(row.skills[skill].f1 for row in own for skill in skills)
        lines.append(
            [
                way,
                decimal(statistics.fmean(row.groups for row in own), 1),
                share(statistics.fmean(row.outliers for row in own)),
                decimal(statistics.fmean(rands)) if rands else "–",
                decimal(f1),
                *cells,
            ]
        )
    headings = ("clustered", "groups", "outliers", "Rand index", "mean F1", *skills)
    return table(list(headings), lines, "Best group per skill: homogeneity / recall, means over runs")


def seeds_table(rows: Sequence[GroupingRow]) -> Table:
    """Interventional clusters against POLCA's, one line a way and run."""
    skills = list(rows[0].skills)
    lines = [
        [
            row.way,
            str(row.seed),
            share(row.outliers),
            decimal(row.rand),
            *(f"{decimal(row.skills[s].homogeneity)} / {decimal(row.skills[s].recall)}" for s in skills),
        ]
        for row in sorted(rows, key=lambda row: (row.way, row.seed))
        if row.way.startswith(("undoing", "POLCA")) and "paper" not in row.way
    ]
    return table(["clustered", "seed", "outliers", "Rand index", *skills], lines, "The same, run by run")


def groupings(
    runs: Annotated[list[Path], typer.Argument(help="Finished runs of one config, one a seed.")],
    only: Annotated[
        list[str] | None, typer.Option(help="Ways whose names begin so, e.g. 'POLCA'; repeat. Default all.")
    ] = None,
    json_: Result = None,
) -> None:
    """Compare ways of grouping tokens by how well their groups agree with known skills."""
    require_different(runs)
    rows: list[GroupingRow] = []
    for place in runs:
        rows += grouping_rows(load_run(place, say=lambda _: None), only or ())
    tables = [groupings_table(rows), seeds_table(rows)]
    show(tables)
    seeds = sorted({row.seed for row in rows})
    publish(json_, "groupings/1", load_config(runs[0] / "config.yaml"), seeds, {"rows": rows}, tables)
