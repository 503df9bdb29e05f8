"""Stages ``damage:NAME``: exploratory damage on the select split, beside random directions of equal norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from experiments.run.run import Run
from experiments.run.stages.clusters import load_clusters
from experiments.run.stages.damage_rows import DamageRecord, damage_row
from experiments.run.summary.records import ControlRow, DamageRow
from interventions.damage import EvaluatedSplit
from interventions.edits import Edit, displace, reverse
from polca_edit.allocation.progress import progress
from polca_edit.artifacts import load_record, save_record
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.files import write_tensors
from polca_edit.derivatives.lanczos import orthonormalise
from polca_edit.seeds import generator_for
from polca_edit.tokens import TokenSet

#: Cluster number -> (M,) tokens, of one vector.
Masks = Mapping[int, Tensor]


def evaluated(run: Run, tokens: TokenSet, window: tuple[int, int] | None = None) -> EvaluatedSplit:
    """The run's final weights and its reference on a split.

    Args:
        run: with checkpoints.
        tokens: where losses are measured.
        window: of the movement that is undone; default the config's, then from the reference to the end.

    Raises:
        ValueError: if the reference checkpoint does not exist or is the last one.
    """
    checkpoints = run.checkpoints()
    index = run.config.damage.reference
    if index >= len(checkpoints) - 1:
        raise ValueError(
            f"damage.reference must be below {len(checkpoints) - 1}, got {index}; use an earlier checkpoint"
        )
    step = checkpoints.steps[index]
    window = window or run.config.window or (step, checkpoints.steps[-1])
    return EvaluatedSplit(run.objective, checkpoints, tokens, window, step)


def undo(place: EvaluatedSplit, row: Tensor, dose: float = 1.0) -> Edit:
    """The net movement along one vector undone to a dose (O1, O2)."""
    return reverse(place, row[None], dose, operator="project_out" if dose == 1.0 else "reverse")


def vector_rows(
    place: EvaluatedSplit,
    split: str,
    basis: Basis,
    masks: Sequence[Masks],
    doses: Sequence[float],
) -> tuple[list[list[DamageRow]], Tensor]:
    """Damage rows of every vector, alone and for each of its clusters, and (K, M) damage at dose 1.

    Args:
        place: where damage is measured.
        split: its name in the rows.
        basis: whose rows are made whole one at a time.
        masks: clusters of each vector on these tokens.
        doses: besides 1.
    """
    everything = torch.ones(place.tokens.count, dtype=torch.bool)
    others = [mask for own in masks for mask in own.values()]
    rows: list[list[DamageRow]] = []
    at_one: list[Tensor] = []
    for vector in progress(range(len(basis)), f"damage {split}"):
        rows.append([])
        row = basis[vector].rows[0]
        for dose in sorted({1.0, *doses}):
            damage = place.damage(undo(place, row, dose))
            if dose == 1.0:
                at_one.append(damage.change)
            targets: list[tuple[int | None, Tensor]] = [(None, everything), *masks[vector].items()]
            rows[-1] += [
                damage_row(
                    damage,
                    vector=vector,
                    cluster=cluster,
                    split=split,
                    target=target,
                    others=[] if cluster is None else others,
                    groups=place.tokens.skills,
                )
                for cluster, target in targets
            ]
    return rows, torch.stack(at_one)


def random_controls(
    run: Run, place: EvaluatedSplit, row: Tensor, vector: int, masks: Masks
) -> list[ControlRow]:
    """Random directions as long as the vector's undone movement, both signs drawn; the same targets."""
    draws = run.config.damage.random_draws
    if draws == 0:
        return []
    size = undo(place, row).norm
    generator = generator_for(run.config.seed, "random_direction", vector)

    def drawn() -> Edit:
        direction = orthonormalise(torch.randn(1, len(place.theta), generator=generator))
        return displace(place, direction, [size], "random_direction")

    changes = place.changes(drawn() for _ in range(draws))
    everything = torch.ones(place.tokens.count, dtype=torch.bool)
    targets: list[tuple[int | None, Tensor]] = [(None, everything), *masks.items()]
    return [
        ControlRow(
            vector,
            cluster,
            draws,
            size,
            float(changes[:, mask].mean()),
            float(changes[:, mask].mean(1).max()),
        )
        for cluster, mask in targets
    ]


def run_damage(run: Run, stage: str) -> None:
    """Undo and reverse the movement along every vector of a basis, on the select split."""
    label = stage.partition(":")[2]
    outputs = [run.directory.damage(label), run.directory.token_damage(label)]
    with run.directory.stage(stage, run.key(stage), outputs, run.objective.passes):
        basis = load_record(Basis, run.directory.basis(label))
        masks = [{k: c.members(k) for k in range(c.count)} for c in load_clusters(run, label)]
        place = evaluated(run, run.task.splits.select)
        rows, at_one = vector_rows(place, "select", basis, masks, run.config.damage.doses)
        controls = [
            control
            for vector, own in enumerate(masks)
            for control in random_controls(run, place, basis[vector].rows[0], vector, own)
        ]
        flat = tuple(row for own in rows for row in own)
        write_tensors(outputs[1], {"damage": at_one})
        save_record(outputs[0], DamageRecord(flat, tuple(controls)))
