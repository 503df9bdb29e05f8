"""Part-of-speech labels that count: clusters of gold-tagged tokens against random token sets of their sizes.

``polca-edit study english-labels runs/english --json docs/results/english-labels-demo.json``, for a run with
a tagged probe (``polca-edit english --text wiki.jsonl.gz --probe en_ewt-ud-dev.conllu.gz``). The rule is that
of arXiv 2506.15872, appendix E.2, on the select tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from experiments.discover.stages import load_found, signatures_file
from experiments.report.formats import decimal, share
from experiments.report.tables import Table, table
from experiments.run.keys import signature_names
from experiments.run.run import Run, load_run
from experiments.run.stages.clusters import load_clusters
from experiments.study.results import publish, show
from experiments.verbs.guard import require_different
from experiments.verbs.options import Result
from polca_edit.allocation.allocate import Projections
from polca_edit.artifacts import load_record
from polca_edit.clusters.density import VectorClusters, cluster_trajectories
from polca_edit.clusters.features import exact_loss
from polca_edit.clusters.labels import tag_places
from polca_edit.seeds import generator_for
from polca_edit.text.conllu import GoldTags

#: Vector -> its clusters' members as indices of tokens. What has no vectors is one.
Members = Mapping[int, Sequence[np.ndarray]]


@dataclass(frozen=True)
class LabelRow:
    """One way of clustering.

    Attributes:
        seed: of the run.
        way: what was clustered.
        clusters: how many.
        labelled: of them, with a simple label.
        chance: the same for random token sets of their sizes, mean over draws.
        p: share of draws, the clusters among them, that have at least as many.
        vectors: that were clustered; what has no vectors counts as one.
        vectors_labelled: of them, those with a labelled cluster.
        vectors_chance: the same by chance, mean over draws.
        vectors_p: as ``p``.
        labels: "vector:cluster" -> place and tags in words, where there is one.
    """

    seed: int
    way: str
    clusters: int
    labelled: int
    chance: float
    p: float
    vectors: int
    vectors_labelled: int
    vectors_chance: float
    vectors_p: float
    labels: Mapping[str, str]


def label_row(seed: int, way: str, grams: np.ndarray, members: Members, draws: int) -> LabelRow:
    """How many clusters and vectors have a label, beside random sets of the same sizes.

    The clusters of one vector share no token, and neither do the random sets that stand for them.

    Args:
        seed: of the run.
        way: what was clustered.
        grams: (M, 4) tags of every token and the three before it.
        members: the clusters.
        draws: of random sets.
    """
    found = {
        f"{vector}:{number}": tag_places(grams[rows])
        for vector, clusters in members.items()
        for number, rows in enumerate(clusters)
    }
    labelled = [key for key, places in found.items() if any(places)]
    with_label = len({key.partition(":")[0] for key in labelled})
    generator = generator_for(seed, "english-labels", way)
    drawn = np.array([_by_chance(grams, members, generator) for _ in range(draws)])
    ahead = (drawn >= [len(labelled), with_label]).sum(0)
    return LabelRow(
        seed,
        way,
        len(found),
        len(labelled),
        float(drawn[:, 0].mean()),
        float(1 + ahead[0]) / (1 + draws),
        len(members),
        with_label,
        float(drawn[:, 1].mean()),
        float(1 + ahead[1]) / (1 + draws),
        {key: words_of(found[key]) for key in labelled},
    )


def _by_chance(grams: np.ndarray, members: Members, generator: torch.Generator) -> tuple[int, int]:
    """(labelled sets, vectors with one) when every cluster's tokens are drawn at random."""
    sets = vectors = 0
    for clusters in members.values():
        order, at, here = torch.randperm(len(grams), generator=generator).numpy(), 0, 0
        for rows in clusters:
            here += any(tag_places(grams[order[at : at + len(rows)]]))
            at += len(rows)
        sets, vectors = sets + here, vectors + bool(here)
    return sets, vectors


def words_of(places: Sequence[Sequence[str]]) -> str:
    """A label in words.

    >>> words_of([(), (), ("DET",), ("NOUN", "ADJ")])
    '1 before: DET, token: NOUN|ADJ'
    """
    last = len(places) - 1
    named = ((f"{last - i} before" if i < last else "token", tags) for i, tags in enumerate(places))
    return ", ".join(f"{name}: {'|'.join(tags)}" for name, tags in named if tags)


def ways(run: Run) -> Iterator[tuple[str, Members]]:
    """Name and clusters of every way: POLCA's, those of undoing, those of the exact losses."""
    for spec in run.config.bases:
        yield f"POLCA {spec.label}", _vectors(load_clusters(run, spec.label))
    for name in signature_names(run.config):
        if signatures_file(run, name).exists():
            found = load_found(run, name)
            yield f"undoing {name}", {0: [m.numpy().nonzero()[0] for m in found.clusters.values()]}
    stored = load_record(Projections, run.directory.projections(run.config.measured_bases()[0].label))
    yield "exact loss", _vectors(cluster_trajectories(exact_loss(stored).paths, run.settings().clusters))


def _vectors(found: Sequence[VectorClusters]) -> Members:
    return {
        own.vector: [own.members(number).numpy().nonzero()[0] for number in range(own.count)]
        for own in found
        if own.kept
    }


def tagged(run: Run) -> GoldTags:
    """Gold tags of the select tokens.

    Raises:
        ValueError: for a run without a tagged probe.
    """
    if run.task.tags is None:
        raise ValueError(
            f"run '{run.directory.path}' must have gold tags, it has none; make it with --probe FILE.conllu"
        )
    return run.task.tags


def labels_table(rows: Sequence[LabelRow]) -> Table:
    """One line a way."""
    lines = [
        [
            row.way,
            str(row.seed),
            f"{row.labelled} of {row.clusters}",
            share(row.labelled / row.clusters) if row.clusters else "–",
            share(row.chance / row.clusters) if row.clusters else "–",
            decimal(row.p, 3),
            f"{row.vectors_labelled} of {row.vectors}",
            share(row.vectors_chance / row.vectors) if row.vectors else "–",
            decimal(row.vectors_p, 3),
        ]
        for row in rows
    ]
    headings = ["clustered", "seed", "clusters with a label", "share", "random sets", "p"]
    return table(
        [*headings, "vectors with one", "random sets", "p"],
        lines,
        "Simple labels by part of speech (at most 2 tags cover 70 % of the cluster at one of 4 places)",
    )


def words_table(rows: Sequence[LabelRow]) -> Table:
    """Every label that was found."""
    lines = [[row.way, str(row.seed), key, text] for row in rows for key, text in row.labels.items()]
    return table(["clustered", "seed", "cluster", "label"], lines, "The labels")


def english_labels(
    runs: Annotated[list[Path], typer.Argument(help="Runs on a text with a tagged probe, one a seed.")],
    draws: Annotated[int, typer.Option(min=1, max=10**5, help="Draws of random token sets.")] = 200,
    json_: Result = None,
) -> None:
    """How many clusters of English tokens have a simple part-of-speech label, beside chance."""
    require_different(runs)
    rows: list[LabelRow] = []
    for place in runs:
        run = load_run(place, say=lambda _: None)
        grams = np.array(tagged(run).grams, dtype=str)
        rows += [label_row(run.config.seed, way, grams, members, draws) for way, members in ways(run)]
    tables = [labels_table(rows), words_table(rows)]
    show(tables)
    config = load_run(runs[0], say=lambda _: None).config
    publish(json_, "english-labels/1", config, sorted({row.seed for row in rows}), {"rows": rows}, tables)
