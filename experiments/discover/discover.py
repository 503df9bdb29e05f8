"""The whole of discovery in one run: stages, plan, axes of every span, one result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from experiments.discover.axes import measure_span
from experiments.discover.records import (
    AxesRecord,
    DiscoverPlan,
    DiscoverResult,
    DiscoverSettings,
    TimelineRow,
    discovery_file,
)
from experiments.discover.stages import cluster_rows, load_found, load_timeline
from experiments.run.driver import run_stages
from experiments.run.keys import (
    discovery_stages,
    measured_labels,
    signature_names,
    stage_names,
    window_suffix,
)
from experiments.run.run import Run
from experiments.run.run_record import open_evaluate
from experiments.verdicts.choose import unseen_tokens
from interventions.discovery.timeline import Timeline
from polca_edit.artifacts import save_record


def discover(run: Run, settings: DiscoverSettings, *, workers: int = 1) -> DiscoverResult:
    """Run what is missing, write the plan, measure the axes of every span, and keep the result.

    Only the named bases are built and undone, so that trajectory bases need forward passes alone.

    Args:
        run: any run of this tool; stages that are missing are run.
        settings: of the discovery.
        workers: processes; a span is the unit of work.

    Raises:
        ValueError: for a basis the run does not have, or a run whose config leaves discovery out.
    """
    started = time.perf_counter()
    run.require_bases(settings.bases)
    names = signature_names(run.config, settings.window, settings.bases)
    if not names:
        raise ValueError("discovery needs partial undo edits, the config has discover.edits=0; run with more")
    labels = settings.bases
    built = {"train", *(f"basis:{name}" for name in (*measured_labels(run.config, labels), *labels))}
    if any(spec.rotated for spec in run.config.bases if spec.label in labels):
        built.add("projections")
    stages = [name for name in stage_names(run.config) if name in built]
    run_stages(run, stages=[*stages, *discovery_stages(run.config, settings.window, labels)])
    tokens = unseen_tokens(run, settings.unseen)
    upstream = {name: run.key(f"signatures:{name}") for name in names}
    opening = open_evaluate(run, DiscoverPlan(settings, tokens.fingerprint(), upstream), by="discover")
    spans = _spans(run.directory.path, settings, workers)
    found = [load_found(run, name) for name in names]
    timeline = load_timeline(run, settings.window, labels)
    result = DiscoverResult(
        tuple(row for one in found for row in cluster_rows(run, one)),
        timeline_rows(timeline),
        tuple(axis.row for record in spans.values() for axis in record.axes),
        dict(timeline.learned),
        tuple(f"{d.skill} <- {d.on}" for d in timeline.dependences if d.holds),
        (None if timeline.alignment is None else timeline.alignment.estimate, timeline.p),
        {one.basis: one.outlier_share for one in found},
        {f"{label}: {n}": why for label, record in spans.items() for n, why in record.skipped.items()},
        opening.exploratory,
        time.perf_counter() - started,
    )
    save_record(discovery_file(run.directory.path, window_suffix(settings.window)), result)
    return result


def timeline_rows(timeline: Timeline) -> tuple[TimelineRow, ...]:
    """Every window, in the order equal, doubling, proposed."""
    return tuple(
        TimelineRow(e.window.start, e.window.end, e.norm, dict(e.shares), dict(e.random_shares))
        for e in timeline.effects
    )


def _spans(place: Path, settings: DiscoverSettings, workers: int) -> dict[str, AxesRecord]:
    labels: Sequence[str] = settings.bases
    if workers > 1 and len(labels) > 1:
        with ProcessPoolExecutor(min(workers, len(labels)), mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(measure_span, place, label, settings) for label in labels]
            return {label: job.result() for label, job in zip(labels, jobs, strict=True)}
    return {label: measure_span(place, label, settings, None) for label in labels}
