"""Axes of one span of a run: searched on select, judged on unseen tokens, followed in time and place."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from experiments.discover.records import AxesRecord, AxisRow, DiscoverSettings, FullAxis
from experiments.discover.stages import load_found
from experiments.discover.targets import Aim, aims_of, first_sequences, null_pools
from experiments.run.keys import signature_names, window_suffix
from experiments.run.run import Run, load_run
from experiments.verbs.groups import with_groups
from experiments.verdicts.choose import split_of, unseen_tokens
from interventions.causal.statistics import Interval
from interventions.damage import EvaluatedSplit
from interventions.discovery.axes import SkillAxis, find_axes, measured, narrowed, searched
from interventions.discovery.axis_nulls import AxisNull, free_edit, ranked, statistic
from interventions.discovery.search import AxisTarget, DirectionLibrary
from interventions.discovery.when_where import paths, when_and_where
from interventions.localise import components
from polca_edit.allocation.progress import progress
from polca_edit.artifacts import load_record
from polca_edit.basis.record import Basis, unlabelled


def measure_span(place: Path, label: str, settings: DiscoverSettings, threads: int | None = 1) -> AxesRecord:
    """Axes of one span, read back where they were measured before with the same key.

    Args:
        place: run directory with finished signatures.
        label: of the basis.
        settings: of the discovery.
        threads: of torch; None leaves them.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    run = with_groups(load_run(place, say=lambda _: None), settings.groups)
    if threads is not None:
        torch.set_num_threads(threads)
    name = f"discover/axes-{label}{window_suffix(settings.window)}"
    upstream = [
        run.key(f"signatures:{n}") for n in signature_names(run.config, settings.window, settings.bases)
    ]
    own = replace(settings, bases=(label,))
    key = run.key_for(name, own, run.key(f"basis:{label}"), upstream)
    return run.directory.kept(name, key, AxesRecord, lambda: find_span(run, label, own), run.objective.passes)


def axis_basis(run: Run, label: str, record: AxesRecord, target: str) -> Basis:
    """The axis of one target as a basis of one vector, marked supervised.

    Raises:
        ValueError: for a target without an axis.
    """
    names = [axis.row.target for axis in record.axes]
    if target not in names:
        raise ValueError(f"basis '{label}' has axes of {names}, got '{target}'; run discover or axis for it")
    basis = load_record(Basis, run.directory.basis(label))
    row = record.units[names.index(target)].to(basis.rows) @ basis.rows
    return replace(unlabelled(f"axis:{target}", row[None]), supervised=True)


def find_span(run: Run, label: str, settings: DiscoverSettings) -> AxesRecord:
    """Search, compare with null sets and free edits, follow through training and the model."""
    basis = load_record(Basis, run.directory.basis(label))
    search = split_of(run, run.task.splits.select, settings.window)
    unseen = split_of(run, unseen_tokens(run, settings.unseen), settings.window)
    names = signature_names(run.config, settings.window, settings.bases)
    found = load_found(run, names[-1]) if names else None
    aims, skipped = aims_of(run, search, unseen, found, settings.targets)
    if not aims:
        return AxesRecord(torch.zeros(0, len(basis), dtype=torch.float64), (), skipped)
    started = time.perf_counter()
    library = DirectionLibrary(search, basis.rows)
    judge, kept = first_sequences(unseen, settings.null_unseen)
    near = [replace(aim, unseen=narrowed(aim.unseen, kept)) for aim in aims]
    near = [
        replace(aim, parents={n: (one, two[kept]) for n, (one, two) in aim.parents.items()}) for aim in near
    ]
    pools = null_pools(near, search, judge, settings.nulls, seed=run.config.seed)
    sets = [pair for _, pool in pools for pair in pool]
    axes = find_axes(library, [aim.search for aim in aims], settings.axis, [one for one, _ in sets])
    nulls = _nulls(library, judge, near, axes, pools, settings)
    shared = (time.perf_counter() - started) / len(aims)
    full = _followed(run, label, (search, unseen), aims, axes, nulls, settings, shared)
    return AxesRecord(torch.stack([axis.units[0] for axis in axes]), full, skipped)


def _nulls(
    library: DirectionLibrary,
    judge: EvaluatedSplit,
    near: list[Aim],
    axes: list[SkillAxis],
    pools: list[tuple[list[int], list[tuple[AxisTarget, AxisTarget]]]],
    settings: DiscoverSettings,
) -> dict[int, AxisNull]:
    """Target number -> its rank among the null sets of its pool, on unseen tokens."""
    if not pools:
        return {}
    weights = settings.axis.weights
    sets = [pair for _, pool in pools for pair in pool]
    units = torch.cat(
        [torch.stack([a.searched for a in axes]), searched(library, [one for one, _ in sets], weights)]
    )
    aimed = [*(aim.unseen for aim in near), *(two for _, two in sets)]
    values = statistic(aimed, units, DirectionLibrary(judge, library.rows))
    found, first = {}, len(near)
    for numbers, pool in pools:
        null = values[first : first + len(pool)]
        first += len(pool)
        for number in numbers:
            found[number] = ranked(values[number], null)
    return found


def _followed(
    run: Run,
    label: str,
    splits: tuple[EvaluatedSplit, EvaluatedSplit],
    aims: list[Aim],
    axes: list[SkillAxis],
    nulls: Mapping[int, AxisNull],
    settings: DiscoverSettings,
    shared: float,
) -> tuple[FullAxis, ...]:
    """Unseen effect, free contrast, when and where of every axis."""
    search, unseen = splits
    part, kept = first_sequences(search, settings.part)
    room = part.headroom.double().clamp_min(0).numpy()
    if not all((room * aim.search.members[kept]).sum() > 0 for aim in aims):
        # A rare target may have nothing in the first sequences.
        part, kept = first_sequences(search, search.tokens.sequences)
    rows = torch.cat([axis.basis.rows[:1] for axis in axes])
    along = paths(search.series, rows)
    losses = torch.stack(
        [
            part.loss.losses(theta, part.tokens)
            for theta in map(part.series.__getitem__, range(len(part.series)))
        ]
    )
    parts = components(run.task.space)
    made = []
    pairs = list(zip(aims, axes, strict=True))
    for number, (aim, axis) in enumerate(progress(pairs, f"axes in {label}: when and where")):
        started = time.perf_counter()
        effect = measured(axis, unseen, aim.unseen)
        local = narrowed(aim.search, kept)
        free = free_edit(part, local, axis.edit.norm, settings.axis.weights)
        contrast = measured(free, unseen, aim.unseen)
        when = when_and_where(
            part,
            rows[number],
            torch.from_numpy(local.members),
            parts,
            losses=losses,
            path=along[:, number],
            windows=run.config.discover.windows,
        )
        null = nulls.get(number)
        row = AxisRow(
            label,
            aim.search.name,
            len(axis.units),
            _estimate(effect.share),
            _estimate(effect.worst_other),
            _estimate(effect.rest_of_parent),
            None if null is None else null.p,
            None if null is None else null.p95,
            _estimate(contrast.share),
            _estimate(contrast.worst_other),
            shared + time.perf_counter() - started,
        )
        select = {name: value for name, value in axis.shares.items() if math.isfinite(value)}
        made.append(FullAxis(row, effect, select, null, contrast, when, axis.edit.norm, aim.parent))
    return tuple(made)


def _estimate(interval: Interval | None) -> float | None:
    """The value, None where there is none."""
    return None if interval is None or not math.isfinite(interval.estimate) else interval.estimate
