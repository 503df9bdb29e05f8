"""A finished run as the report sees it: its records joined with the tokens they are about.

Everything the report writes comes from records of the run and from tokens.parquet, so it can be drawn
again on a machine that has neither the weights nor the training data. Keys that are not shown are
ignored, so records with further keys can still be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
import yaml
from pyarrow import ArrowInvalid
from safetensors import safe_open
from torch import Tensor

from experiments.run.run_record import RunRecord, read_run_record
from experiments.run.store import RunDirectory
from experiments.run.summary.records import (
    Analysis,
    ClusterEntry,
    ControlRow,
    DamageRow,
    RuleScore,
    Summary,
    read_summary,
)
from polca_edit.allocation.allocate import Allocation, Projections, Rule, allocate
from polca_edit.artifacts import from_plain, load_record
from polca_edit.clusters.breakthroughs import breakthrough_start, fitting_delta

#: Below this many nats a headroom is too small to divide by.
SMALL_HEADROOM = 0.05
#: A cluster carries a skill's name from this F1 of homogeneity and recall on.
NAMED_F1 = 0.5


@dataclass(frozen=True)
class TrainingFile:
    """``training`` of config.yaml."""

    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    record_every: int | None = None
    record: str = "equal"

    @property
    def kept(self) -> str:
        """When weights were kept, in words."""
        if self.record == "equal":
            return f"weights kept every {self.record_every} steps"
        return f"weights kept where the loss moves, at multiples of {self.record_every} steps"


@dataclass(frozen=True)
class DamageFile:
    """``damage`` of config.yaml: the checkpoint that headroom is counted from, by index."""

    reference: int = 0


@dataclass(frozen=True)
class ConfigFile:
    """What the report says of config.yaml."""

    breakthrough_delta: int = 100
    damage: DamageFile = DamageFile()
    training: TrainingFile | None = None
    checkpoints: Any = None

    @property
    def trained_here(self) -> bool:
        """Whether the run made its checkpoints itself."""
        return self.checkpoints is None


def read_config(directory: RunDirectory) -> ConfigFile:
    """config.yaml, its defaults where there is none."""
    path = directory / "config.yaml"
    values = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}
    config: ConfigFile = from_plain(ConfigFile, values)
    return config


@dataclass(frozen=True)
class ClusterView:
    """One cluster with everything the report says about it.

    Attributes:
        basis: label of its basis.
        members: (M,) its tokens.
        entry: its entry in summary.json.
        evaluate: its rule-assigned counterpart on the evaluate split, None where the rule found no token.
        damage: own-vector damage rows on the select split, one per dose, by rising dose.
        damage_evaluate: own-vector damage row on the evaluate split.
        controls: random-direction controls of the same vector and target.
    """

    basis: str
    members: np.ndarray
    entry: ClusterEntry
    evaluate: RuleScore | None = None
    damage: tuple[DamageRow, ...] = ()
    damage_evaluate: DamageRow | None = None
    controls: tuple[ControlRow, ...] = ()

    @property
    def vector(self) -> int:
        """Index in its basis."""
        return self.entry.vector

    @property
    def name(self) -> str:
        """Short name, as in figures."""
        return f"v{self.vector}·c{self.entry.cluster}"

    @property
    def skill(self) -> str | None:
        """The skill whose name it may carry: F1 of homogeneity and recall at least ``NAMED_F1``."""
        return self.entry.label if self.f1 >= NAMED_F1 else None

    @property
    def called(self) -> str:
        """What its tokens are in words, where a description holds (F1 at least ``NAMED_F1``), never cut.

        Records of earlier versions have no descriptions; there it is the skill's name, where it may carry it.
        """
        told = self.entry.name
        if told.startswith("unnamed"):
            most = told.partition(" (")[2]
            return f"unnamed ({most}" if most else "unnamed"
        return told or self.skill or "unnamed"

    @property
    def title(self) -> str:
        """Its place and what it is called."""
        return f"{self.name} {self.called}"

    @property
    def f1(self) -> float:
        """F1 with the nearest skill, 0 where no skill is known."""
        return self.entry.f1(self.entry.label)

    @property
    def at_one(self) -> DamageRow | None:
        """Damage row of the whole movement undone."""
        return next((row for row in self.damage if row.dose == 1.0), None)


@dataclass(frozen=True)
class Curves:
    """Trajectories of one cluster's tokens.

    Attributes:
        steps: (T,) optimiser steps.
        projected: (m, T) projected loss along the cluster's vector, nats.
        exact: (m, T) exact loss of the same tokens, nats.
        starts: (m,) step at which the decrease of each token's projected loss accelerates most.
    """

    steps: np.ndarray
    projected: np.ndarray
    exact: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class AnalysisView:
    """One basis.

    Attributes:
        name: its label.
        entry: its entry under ``analyses`` in summary.json.
        steps: (T,) optimiser steps.
        losses: (T, M) exact loss, nats.
        clusters: every cluster, the best of every label first (:func:`by_interest`).
        damage: (K, M) loss change of each token when a vector's movement is undone, nats.
    """

    name: str
    entry: Analysis
    steps: np.ndarray
    losses: np.ndarray
    clusters: tuple[ClusterView, ...]
    damage: np.ndarray

    def cluster_damage(self, shown: Sequence[ClusterView]) -> tuple[np.ndarray, np.ndarray]:
        """(K, C) damage of every vector on every given cluster, raw and over the cluster's headroom."""
        columns = [self.damage[:, c.members].mean(1, dtype=np.float64) for c in shown]
        raw = np.stack(columns, 1) if shown else np.zeros((len(self.damage), 0))
        rooms = [row.headroom if (row := c.at_one) is not None else None for c in shown]
        return raw, over_headroom(raw, rooms)

    def skill_damage(self, skills: Sequence[str], split: str = "select") -> tuple[np.ndarray, np.ndarray]:
        """(K, S) damage of every vector on every skill, raw and over the skill's headroom."""
        rows = [self.entry.damage_row(v.vector, None, split) for v in self.entry.vectors]
        raw = np.array(
            [[np.nan if row is None else row.groups.get(s, np.nan) for s in skills] for row in rows],
            dtype=float,
        ).reshape(len(rows), len(skills))
        first = next((row for row in rows if row is not None), None)
        return raw, over_headroom(raw, [first.group_headroom.get(s) if first else None for s in skills])

    def most_damaging(self, most: int) -> list[int]:
        """Vectors with the largest damage on any skill (on all tokens where there are none), select split."""

        def largest(row: DamageRow) -> float:
            return max(row.groups.values(), default=row.on_target or 0.0)

        rows = [self.entry.damage_row(v.vector, None, "select") for v in self.entry.vectors]
        found = sorted((row for row in rows if row is not None), key=largest, reverse=True)
        return [row.vector for row in found[:most]]


@dataclass(frozen=True)
class RunView:
    """A whole run as the report sees it.

    Attributes:
        directory: where it lies.
        summary: summary.json.
        run: run.json.
        config: config.yaml.
        tokens: one row per scored select token.
        skills: skill name -> (M,) tokens that have it.
        headroom: (M,) loss that going back to the reference checkpoint would cost each token, nats.
        analyses: one per basis.
    """

    directory: RunDirectory
    summary: Summary
    run: RunRecord
    config: ConfigFile
    tokens: pd.DataFrame
    skills: Mapping[str, np.ndarray]
    headroom: np.ndarray
    analyses: tuple[AnalysisView, ...]

    def common_skills(self, most: int) -> list[str]:
        """The commonest skills, in order of their names."""
        return sorted(sorted(self.skills, key=lambda name: -int(self.skills[name].sum()))[:most])

    def curves(self, shown: Sequence[ClusterView]) -> list[Curves]:
        """Trajectories of the given clusters of one basis; only their vectors are integrated."""
        if not shown:
            return []
        vectors = sorted({view.vector for view in shown})
        projections = load_record(Projections, self.directory.projections(shown[0].basis))
        rule = cast(Rule, self.summary.analyses[shown[0].basis].basis.rule)
        paths = allocate_only(projections, vectors, rule).projected_loss()
        steps = projections.steps
        delta = fitting_delta(self.config.breakthrough_delta, steps)
        result = []
        for view in shown:
            members = torch.from_numpy(view.members)
            own = paths[:, vectors.index(view.vector)].T[members]
            starts = breakthrough_start(own, steps, delta).double().numpy()
            exact = projections.losses.T[members]
            result.append(Curves(steps.numpy(), own.double().numpy(), exact.double().numpy(), starts))
        return result


def allocate_only(projections: Projections, vectors: Sequence[int], rule: Rule) -> Allocation:
    """The allocation of a few vectors, so that a report needs little memory on large runs."""
    index = torch.as_tensor(vectors, dtype=torch.long)

    def columns(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[:, index]

    chosen = replace(
        projections,
        gradients=projections.gradients[:, index],
        displacements=projections.displacements[:, index],
        interior_gradients=columns(projections.interior_gradients),
        mean_gradients=columns(projections.mean_gradients),
        curvatures=columns(projections.curvatures),
    )
    return allocate(chosen, rule)


def over_headroom(raw: np.ndarray, rooms: Sequence[float | None]) -> np.ndarray:
    """Damage over headroom per column; NaN where the headroom is below ``SMALL_HEADROOM`` nats."""
    sizes = np.array(
        [np.nan if room is None or room < SMALL_HEADROOM else room for room in rooms], dtype=float
    )
    return raw / sizes[None] if raw.size else raw


def read_run(directory: RunDirectory) -> RunView:
    """Collect the records of a finished run.

    Raises:
        ValueError: if summary.json or tokens.parquet is missing, damaged, or of another version.
    """
    summary = read_summary(directory.path)
    table = directory / "tokens.parquet"
    if not table.exists():
        raise ValueError(
            f"'{directory.path}' must hold tokens.parquet beside summary.json; run 'polca-edit run' again"
        )
    if not summary.analyses:
        raise ValueError(
            f"'{directory.path}' must hold the analysis of a basis, summary.json has none; run again"
        )
    try:
        tokens, config = pd.read_parquet(table), read_config(directory)
    except (OSError, ArrowInvalid) as error:
        raise ValueError(f"'{table}' must be a parquet file, it is not ({error}); run again") from error
    analyses = tuple(_analysis(directory, name, entry, tokens) for name, entry in summary.analyses.items())
    losses = analyses[0].losses
    return RunView(
        directory,
        summary,
        read_run_record(directory),
        config,
        tokens,
        skill_masks(list(tokens["skills"])),
        losses[config.damage.reference].astype(np.float64) - losses[-1],
        analyses,
    )


def _analysis(directory: RunDirectory, name: str, entry: Analysis, tokens: pd.DataFrame) -> AnalysisView:
    # The rest of the file can be large; curves() reads it for the clusters that are drawn.
    with safe_open(directory.projections(name), framework="np") as stored:
        steps, losses = stored.get_tensor("steps"), stored.get_tensor("losses")
    columns = [f"damage:{name}:{vector.vector}" for vector in entry.vectors]
    damage = np.stack([tokens[column].to_numpy(dtype=np.float64) for column in columns])
    views = [_cluster(name, entry, cluster, tokens) for cluster in entry.clusters]
    return AnalysisView(name, entry, steps, losses, by_interest(views), damage)


def by_interest(views: Sequence[ClusterView]) -> tuple[ClusterView, ...]:
    """The best cluster of every label first, then the second best, and so on; no label: by size."""
    seen: dict[str | None, int] = {}
    rounds: list[tuple[int, ClusterView]] = []
    for view in sorted(views, key=lambda view: (view.f1, view.entry.tokens), reverse=True):
        label = view.entry.label
        rounds.append((seen.get(label, 0) if label is not None else 0, view))
        seen[label] = seen.get(label, 0) + 1
    return tuple(view for _, view in sorted(rounds, key=lambda pair: pair[0]))


def _cluster(basis: str, entry: Analysis, cluster: ClusterEntry, tokens: pd.DataFrame) -> ClusterView:
    place = cluster.vector, cluster.cluster
    return ClusterView(
        basis,
        tokens[f"cluster:{basis}:{cluster.vector}"].to_numpy() == cluster.cluster,
        cluster,
        next((c for c in entry.evaluate_clusters if (c.vector, c.cluster) == place), None),
        entry.damage_rows(*place, "select"),
        entry.damage_row(*place, "evaluate"),
        entry.random_controls(*place),
    )


def skill_masks(lists: Sequence[str]) -> dict[str, np.ndarray]:
    """Skill name -> (M,) mask, from the comma-separated names of each token.

    >>> {name: mask.tolist() for name, mask in skill_masks(["a,b", "b", ""]).items()}
    {'a': [True, False, False], 'b': [True, True, False]}
    """
    found = [{name for name in text.split(",") if name} for text in lists]
    return {name: np.array([name in own for own in found]) for name in sorted(set().union(*found))}


def exact_combinations(skills: Mapping[str, np.ndarray], most: int = 9) -> dict[str, np.ndarray]:
    """Tokens by their exact set of skills: a partition, where the skills themselves overlap.

    A skill ``a@b`` makes its parts ``a`` and ``b`` redundant in the name. The ``most`` commonest
    sets are kept apart, the rest is "other".

    >>> sets = exact_combinations({"carry": np.array([1, 0]) > 0, "10s": np.array([1, 1]) > 0})
    >>> {name: mask.tolist() for name, mask in sets.items()}
    {'10s': [False, True], 'carry + 10s': [True, False]}
    """
    if not skills:
        return {}
    names = list(skills)
    table = np.stack([skills[name] for name in names], 1)
    sets: dict[str, np.ndarray] = {}
    for pattern in np.unique(table, axis=0):
        found = [name for name, has in zip(names, pattern, strict=True) if has]
        parts = {part for name in found if "@" in name for part in name.split("@")}
        label = " + ".join(name for name in found if name not in parts) or "no skill"
        sets[label] = sets.get(label, np.zeros(len(table), dtype=bool)) | (table == pattern).all(1)
    if len(sets) > most:
        kept = sorted(sets, key=lambda name: -int(sets[name].sum()))[: most - 1]
        rest = ~np.any([sets[name] for name in kept], axis=0)
        sets = {**{name: sets[name] for name in kept}, "other": rest}
    return dict(sorted(sets.items(), key=lambda item: (item[0] == "other", item[0])))
