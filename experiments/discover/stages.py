"""Stages ``signatures:NAME`` and ``timeline`` of a run, on the select split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.discover.records import (
    ClusterFile,
    ClusterRow,
    SignatureRecord,
    WindowRecord,
    cluster_file,
    timeline_file,
)
from experiments.run.keys import Labels, Window, signature_names, timeline_stage, window_of, window_suffix
from experiments.run.run import Run
from experiments.run.stages.damage import evaluated
from interventions.damage import EvaluatedSplit
from interventions.discovery.partial_undo import (
    EditSettings,
    Signatures,
    halves_agree,
    signatures,
    window_changes,
)
from interventions.discovery.signatures import Found, SignatureSettings, clustered
from interventions.discovery.timeline import Timeline, TimelineSettings, causal_timeline
from polca_edit.allocation.allocate import Projections
from polca_edit.artifacts import load_record, save_record
from polca_edit.basis.record import Basis
from polca_edit.clusters.names import name_of
from polca_edit.tokens import TokenSet

#: Feature of text whose levels are the groups of a timeline where no skill is known.
CLASS = "shape"


def signatures_file(run: Run, name: str) -> Path:
    """Where the signatures of one or several bases lie."""
    return run.directory.path / "discover" / f"signatures-{name}.safetensors"


def signature_settings(run: Run) -> SignatureSettings:
    """Settings of signatures and clusters; all but the number of edits and windows are fixed."""
    given = run.config.discover
    edits = EditSettings(
        batch=min(40, max(1, given.edits)), most=given.edits, pieces=given.windows, seed=run.config.seed
    )
    return SignatureSettings(edits, seed=run.config.seed)


def run_signatures(run: Run, stage: str) -> None:
    """Undo at random, cluster what is hurt alike; several bases are joined from their own stages."""
    name = stage.partition(":")[2]
    plain, window = window_of(name)
    path = signatures_file(run, name)
    settings = signature_settings(run)
    rows = cluster_file(run.directory.path, name)
    # Before the stage, with a split of its own: what a stopped stage finds done must not change its count.
    windows = window_record(run, evaluated(run, run.task.splits.select, window), window)
    with run.directory.stage(stage, run.key(stage), [path, rows], run.objective.passes):
        split = evaluated(run, run.task.splits.select, window)
        alone = plain.split("+")
        signed = _joined(run, alone, window) if len(alone) > 1 else _drawn(run, split, plain, settings)
        signed = replace(signed, windows=windows.changes.double().numpy(), spans=windows.spans)
        found = clustered(signed, name, settings)
        save_record(
            path,
            SignatureRecord(
                torch.from_numpy(signed.changes).float(),
                signed.sources,
                found.labels,
                found.parts,
                found.inner,
                signed.stability,
            ),
        )
        written = tuple(cluster_rows(run, found))
        save_record(rows, ClusterFile(name, written, found.outlier_share, found.edits, signed.stability))


def _drawn(run: Run, split: EvaluatedSplit, label: str, settings: SignatureSettings) -> Signatures:
    basis = load_record(Basis, run.directory.basis(label))
    return signatures(split, {label: basis}, replace(settings.edits, pieces=0))


def _joined(run: Run, labels: list[str], window: Window) -> Signatures:
    """The edits of several bases side by side, as their stages left them."""
    names = [f"{label}{window_suffix(window)}" for label in labels]
    records = [load_record(SignatureRecord, signatures_file(run, name)) for name in names]
    room = evaluated(run, run.task.splits.select).headroom.double().numpy()
    tables = [record.changes.double().numpy() for record in records]
    fewest = min(map(len, tables))
    agreement = halves_agree(tables, signature_settings(run).edits)
    return Signatures(
        np.concatenate(tables),
        tuple(source for record in records for source in record.sources),
        np.zeros((0, tables[0].shape[1])),
        (),
        room,
        ((fewest, agreement),),
    )


def window_record(run: Run, split: EvaluatedSplit, window: Window = None) -> WindowRecord:
    """Contiguous windows undone on select, those of all of training or those inside a window; once each."""
    name = f"discover/windows{window_suffix(window)}"
    series = run.observed(window)
    pieces = min(run.config.discover.windows, len(series) - 1)
    depends = pieces, run.config.damage.reference, *([] if window is None else [window])

    def compute() -> WindowRecord:
        spans, changes = window_changes(split, pieces, series)
        return WindowRecord(torch.from_numpy(changes).float(), spans)

    return run.directory.kept(name, run.key_for(name, *depends), WindowRecord, compute, run.objective.passes)


def load_found(run: Run, name: str, split: EvaluatedSplit | None = None) -> Found:
    """Interventional clusters of a finished stage; with a split they can become hypotheses."""
    record = load_record(SignatureRecord, signatures_file(run, name))
    plain, _ = window_of(name)
    bases = {n: load_record(Basis, run.directory.basis(n)) for n in plain.split("+")} if split else {}
    return Found(
        name,
        record.labels,
        record.parts,
        record.inner,
        record.stability,
        len(record.changes),
        split,
        bases,
    )


def token_groups(tokens: TokenSet) -> dict[str, Tensor]:
    """Known skills; where there are none, the levels of a simple input feature; else all tokens."""
    if tokens.skills:
        return {name: mask for name, mask in tokens.skills.items() if bool(mask.any())}
    if CLASS in tokens.features:
        values = np.asarray(tokens.features[CLASS]).astype(str)
        names, counts = np.unique(values, return_counts=True)
        kept = names[np.argsort(-counts, kind="stable")[:8]]
        return {str(name): torch.from_numpy(values == name) for name in kept}
    return {"all tokens": torch.ones(tokens.count, dtype=torch.bool)}


def run_timeline(run: Run, stage: str) -> None:
    """Undo every window in the final model: shares lost by each skill and each interventional cluster."""
    plain, window = window_of(stage)
    some = plain.partition(":")[2]
    names = signature_names(run.config, window, some.split("+") if some else None)
    path = _timeline_path(run, stage)
    with run.directory.stage(stage, run.key(stage), [path], run.objective.passes):
        split, series = evaluated(run, run.task.splits.select, window), run.observed(window)
        groups = token_groups(split.tokens)
        found = load_found(run, names[-1])
        groups |= {f"found {name}": mask for name, mask in found.clusters.items()}
        known = known_losses(run, split, series.steps)
        pieces = min(run.config.discover.windows, len(series) - 1)
        settings = TimelineSettings(windows=pieces, seed=run.config.seed)
        save_record(path, causal_timeline(split, series, groups, settings, losses=known))


def known_losses(run: Run, split: EvaluatedSplit, steps: tuple[int, ...]) -> Tensor | None:
    """(T, M) exact losses of the select tokens where projections hold them; None where there are none."""
    path = run.directory.projections(run.config.measured_bases()[0].label)
    if not path.exists():
        return None
    projections = load_record(Projections, path)
    known = projections.steps.tolist()
    at = [known.index(step) for step in steps if step in known]
    whole = len(at) == len(steps) and projections.losses.shape[1] == split.tokens.count
    return projections.losses[at] if whole else None


def load_timeline(run: Run, window: Window = None, labels: Labels = None) -> Timeline:
    """The timeline of a finished stage."""
    return load_record(Timeline, _timeline_path(run, timeline_stage(run.config, window, labels)))


def _timeline_path(run: Run, stage: str) -> Path:
    return timeline_file(run.directory.path, stage.removeprefix("timeline").replace(":", "-"))


def cluster_rows(run: Run, found: Found) -> list[ClusterRow]:
    """Every cluster of a stage beside the known skills."""
    tokens = run.task.splits.select
    return [cluster_row(tokens, found.basis, int(name), members) for name, members in found.clusters.items()]


def cluster_row(tokens: TokenSet, basis: str, cluster: int, members: Tensor) -> ClusterRow:
    """Agreement of one token group with every skill, and its name."""
    homogeneity: dict[str, float] = {}
    recall: dict[str, float] = {}
    f1: dict[str, float] = {}
    for skill, mask in tokens.skills.items():
        both, own, all_ = int((members & mask).sum()), int(members.sum()), int(mask.sum())
        homogeneity[skill] = both / own if own else 0.0
        recall[skill] = both / all_ if all_ else 0.0
        f1[skill] = 2 * both / (own + all_) if own + all_ else 0.0
    name = name_of(tokens, members, f"found:{cluster}")
    return ClusterRow(basis, cluster, int(members.sum()), name, homogeneity, recall, f1)
