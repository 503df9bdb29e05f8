"""What a removal is about: groups of a skill or cluster, batches for the fit, and the span of the edit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from experiments.discover.stages import load_found, signatures_file
from experiments.run.keys import signature_names
from experiments.run.run import Run
from experiments.run.stages.clusters import ClusterRecord
from interventions.removal.grouped import GroupRule, labelled
from interventions.removal.spans import (
    BLOCK,
    LEADING,
    Span,
    span_by_tensor,
    span_of_rows,
    stacked_displacements,
)
from polca_edit.artifacts import load_record
from polca_edit.basis.record import Basis
from polca_edit.clusters.membership import fit_rule
from polca_edit.seeds import generator_for
from polca_edit.tokens import TokenSet

#: Before the name of an interventional cluster.
FOUND = "found "


def skill_groups(run: Run, skill: str) -> GroupRule:
    """Groups of a named skill: those of the task's partition, or the skill against all others.

    Raises:
        ValueError: for a skill the run does not know.
    """
    partition = run.task.partition
    if partition is not None and skill in partition.skills:
        return partition.rule(skill)
    known = run.task.splits.select.skills
    if skill not in known:
        raise ValueError(f"a skill must be one this run labels, got '{skill}'; known are {sorted(known)}")
    return labelled(skill, [name for name in known if name != skill])


def cluster_groups(run: Run, cluster: str) -> GroupRule:
    """Members of one cluster by its rule on input features; everyone else by partition, or one group.

    No skill label decides membership, and the rule never sees a loss, so it holds on any tokens.

    Args:
        run: the run.
        cluster: BASIS:VECTOR:CLUSTER, or ``found NAME`` for an interventional one.

    Raises:
        ValueError: for a cluster that is not named so, or does not exist.
    """
    members = _found_members(run, cluster) if cluster.startswith(FOUND) else _members(run, cluster)
    rule = fit_rule(run.task.splits.select, members, seed=run.config.seed)
    partition = run.task.partition
    rest = ("(rest)",) if partition is None else partition.names

    def assign(tokens: TokenSet) -> Tensor:
        ones = torch.ones(tokens.count, dtype=torch.long)
        groups = ones if partition is None else partition.assign(tokens) + 1
        groups[rule.assign(tokens)] = 0
        return groups

    return GroupRule((cluster, *rest), (True, *[False] * len(rest)), assign, cluster)


def _found_members(run: Run, cluster: str) -> Tensor:
    """(M,) tokens of an interventional cluster of all bases together, as the report names it."""
    names = signature_names(run.config)
    if not names or not signatures_file(run, names[-1]).exists():
        raise ValueError(
            f"--cluster {cluster} needs interventional clusters, this run has none; "
            f"run polca-edit discover {run.directory.path} first"
        )
    clusters = load_found(run, names[-1]).clusters
    name = cluster.removeprefix(FOUND)
    if name not in clusters:
        raise ValueError(f"--cluster must be one of {[FOUND + known for known in clusters]}, got '{cluster}'")
    return clusters[name]


def _members(run: Run, cluster: str) -> Tensor:
    """(M,) tokens of one cluster of one vector."""
    basis, *numbers = cluster.split(":")
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise ValueError(
            f"--cluster needs BASIS:VECTOR:CLUSTER or 'found NAME', got '{cluster}'; for example hessian:3:0"
        )
    run.require_bases([basis], "the basis of --cluster")
    vector, index = (int(number) for number in numbers)
    labels = load_record(ClusterRecord, run.directory.clusters(basis)).labels
    if not vector < len(labels) or not bool((labels[vector] == index).any()):
        raise ValueError(f"cluster {cluster} does not exist in this run; see 'polca-edit inspect'")
    members: Tensor = labels[vector] == index
    return members


def fit_stream(run: Run, size: int) -> Callable[[int], TokenSet]:
    """Batches for the fit: new sequences that training may see, or draws from curvature and select."""
    fresh = run.task.fresh
    parts = (run.task.splits.curvature, run.task.splits.select)

    def batch(step: int) -> TokenSet:
        generator = generator_for(run.config.seed, "removal fit", step)
        if fresh is not None:
            return fresh(size, generator)
        part = parts[step % 2]
        return part.select(torch.randperm(part.sequences, generator=generator)[:size])

    return batch


def edit_span(run: Run, basis: str | None, window: tuple[int, int] | None = None) -> Span:
    """All recorded displacements and Hessian vectors by groups of neurons, or one stored basis.

    Args:
        run: with checkpoints.
        basis: name of a stored basis.
        window: steps of the displacements that are taken; Hessian vectors are left out then.
    """
    if basis is not None:
        return span_of_rows(load_record(Basis, run.directory.basis(basis)).rows, f"basis {basis}")
    checkpoints = run.observed(window)
    rows = stacked_displacements([checkpoints[index].clone() for index in range(len(checkpoints))])
    if window is not None:
        return span_by_tensor(
            rows,
            run.task.space,
            f"movement of steps {window[0]} to {window[1]} by groups of neurons",
            block=BLOCK,
            per_block=LEADING,
        )
    stored = [run.directory.basis(b.label) for b in run.config.bases if b.kind == "hessian"]
    rows = torch.cat([rows, *(load_record(Basis, path).rows for path in stored if path.exists())])
    return span_by_tensor(
        rows, run.task.space, "recorded movement by groups of neurons", block=BLOCK, per_block=LEADING
    )
