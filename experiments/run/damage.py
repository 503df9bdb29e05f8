"""Exploratory damage on the select split, then the planned table on the evaluate split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.run.damage_rows import DamageRow, damage_row
from experiments.run.stages import ClusterRecord, Run
from interventions.damage import EvaluatedSplit
from interventions.edits import Edit, displace, reverse
from polca_edit.artifacts import load_record
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.files import write_json, write_tensors
from polca_edit.clusters.density import skill_scores
from polca_edit.clusters.membership import fit_rule
from polca_edit.derivatives.lanczos import orthonormalise
from polca_edit.tokens import TokenSet


def evaluated(run: Run, tokens: TokenSet) -> EvaluatedSplit:
    """The run's final weights and reference on a split.

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
    return EvaluatedSplit(run.objective, checkpoints, tokens, (step, checkpoints.steps[-1]), step)


def _undo(place: EvaluatedSplit, row: Tensor, dose: float = 1.0) -> Edit:
    """The net movement along one vector undone to a dose."""
    return reverse(place, row[None], dose, operator="project_out" if dose == 1.0 else "reverse")


def _rows_of_vector(
    place: EvaluatedSplit,
    split: str,
    basis: Basis,
    vector: int,
    masks: dict[int, Tensor],
    others: list[Tensor],
    doses: tuple[float, ...],
) -> tuple[list[DamageRow], Tensor]:
    """All rows of one vector; the per-token damage at dose 1 is returned beside them."""
    everything = torch.ones(place.tokens.count, dtype=torch.bool)
    rows: list[DamageRow] = []
    at_one = torch.zeros(place.tokens.count)
    for dose in sorted({1.0, *doses}):
        damage = place.damage(_undo(place, basis.rows[vector], dose))
        if dose == 1.0:
            at_one = damage.change
        targets: list[tuple[int | None, Tensor]] = [(None, everything), *masks.items()]
        for cluster, target in targets:
            rows.append(
                damage_row(
                    damage,
                    vector=vector,
                    cluster=cluster,
                    split=split,
                    target=target,
                    others=[] if cluster is None else others,
                    groups=place.tokens.skills,
                )
            )
    return rows, at_one


def _random_controls(
    run: Run, place: EvaluatedSplit, basis: Basis, vector: int, masks: dict[int, Tensor]
) -> list[dict[str, Any]]:
    """Matched-norm random directions, both signs drawn; damage of the same targets."""
    draws = run.config.damage.random_draws
    if draws == 0:
        return []
    size = _undo(place, basis.rows[vector]).norm
    generator = torch.Generator().manual_seed(run.config.seed * 7919 + vector)
    changes = []
    for _ in range(draws):
        row = orthonormalise(torch.randn(1, len(place.theta), generator=generator))
        changes.append(place.damage(displace(place, row, [size], "random_direction")).change)
    stack = torch.stack(changes).double()
    everything = torch.ones(place.tokens.count, dtype=torch.bool)
    targets: list[tuple[int | None, Tensor]] = [(None, everything), *masks.items()]
    return [
        {
            "control": "random_direction",
            "vector": vector,
            "cluster": cluster,
            "split": "select",
            "draws": draws,
            "norm": size,
            "on_target_mean": float(stack[:, mask].mean()),
            "on_target_max": float(stack[:, mask].mean(1).max()),
        }
        for cluster, mask in targets
    ]


def run_damage(run: Run, stage: str) -> None:
    """Stage ``damage:NAME``: project_out and reverse along every vector, on the select split."""
    label = stage.partition(":")[2]
    basis = load_record(Basis, run.directory.basis(label))
    record = load_record(ClusterRecord, run.directory.clusters(label))
    path, tokens_path = run.directory.damage(label), run.directory.path / "damage" / f"{label}.safetensors"
    with run.directory.stage(stage, run.key(stage), [path, tokens_path], run.objective.passes):
        place = evaluated(run, run.task.splits.select)
        by_vector = {c.vector: {k: c.members(k) for k in range(c.count)} for c in record.vectors()}
        others = [mask for masks in by_vector.values() for mask in masks.values()]
        rows, controls, per_token = [], [], []
        for vector in tqdm(range(len(basis)), desc=f"damage {label}", disable=None, leave=False):
            found, at_one = _rows_of_vector(
                place, "select", basis, vector, by_vector[vector], others, run.config.damage.doses
            )
            rows.extend(found)
            per_token.append(at_one)
            controls.extend(_random_controls(run, place, basis, vector, by_vector[vector]))
        write_tensors(tokens_path, {"damage": torch.stack(per_token)})
        write_json(path, {"damage": [dataclasses.asdict(r) for r in rows], "controls": controls})


# -- the planned table on the evaluate split -----------------------------------------------------


def make_plan(run: Run) -> dict[str, Any]:
    """What will be looked at on the evaluate split: every cluster whose description transfers."""
    select = run.task.splits.select
    pairs = []
    for spec in run.config.bases:
        record = load_record(ClusterRecord, run.directory.clusters(spec.label))
        for found in record.vectors():
            for cluster in range(found.count):
                rule = fit_rule(select, found.members(cluster), seed=run.config.seed)
                pairs.append(
                    {
                        "basis": spec.label,
                        "vector": found.vector,
                        "cluster": cluster,
                        "rule": rule.description,
                        "rule_auc": None if rule.auc != rule.auc else round(rule.auc, 6),
                    }
                )
    return {
        "operator": "project_out",
        "reference": run.config.damage.reference,
        "dose": 1.0,
        "evaluate_tokens": run.task.splits.evaluate.fingerprint(),
        "pairs": pairs,
    }


def open_evaluate(run: Run, plan: dict[str, Any]) -> dict[str, Any]:
    """Write plan.json and its hash, count the opening, and only then hand out the evaluate split.

    A plan that differs from the first one opened is marked exploratory.
    """
    text = json.dumps(plan, indent=1, sort_keys=True) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    path = run.directory / "run.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    openings = record.get("evaluate_openings", [])
    if digest not in [opening["plan"] for opening in openings]:
        openings.append({"plan": digest, "exploratory": bool(openings)})
    write_json(run.directory / "plan.json", {**plan, "sha256": digest})
    write_json(path, {**record, "evaluate_openings": openings})
    return next(opening for opening in openings if opening["plan"] == digest)


def run_evaluate(run: Run, stage: str) -> None:
    """Stage ``evaluate``: the planned pairs and every vector alone, on the evaluate split."""
    path = run.directory.path / "damage" / "evaluate.json"
    with run.directory.stage(stage, run.key(stage), [path], run.objective.passes):
        opening = open_evaluate(run, make_plan(run))
        tokens, select = run.task.splits.evaluate, run.task.splits.select
        place = evaluated(run, tokens)
        result: dict[str, Any] = {"opening": opening, "bases": {}}
        for spec in run.config.bases:
            basis = load_record(Basis, run.directory.basis(spec.label))
            record = load_record(ClusterRecord, run.directory.clusters(spec.label))
            assigned: dict[int, dict[int, Tensor]] = {}
            scores = []
            for found in record.vectors():
                assigned[found.vector] = {}
                for cluster in range(found.count):
                    rule = fit_rule(select, found.members(cluster), seed=run.config.seed)
                    mask = rule.assign(tokens)
                    if not bool(mask.any()):
                        continue
                    assigned[found.vector][cluster] = mask
                    as_cluster = dataclasses.replace(
                        found, labels=torch.where(mask, 0, -1), dropped=torch.zeros_like(mask)
                    )
                    agreement = skill_scores(as_cluster, 0, tokens.skills)
                    scores.append(
                        {
                            "vector": found.vector,
                            "cluster": cluster,
                            "tokens": int(mask.sum()),
                            "rule": rule.description,
                            "rule_auc": None if rule.auc != rule.auc else rule.auc,
                            **{
                                key: {name: getattr(score, key) for name, score in agreement.items()}
                                for key in ("homogeneity", "recall_all", "lift")
                            },
                        }
                    )
            others = [mask for masks in assigned.values() for mask in masks.values()]
            rows = []
            for vector in range(len(basis)):
                rows.extend(
                    _rows_of_vector(place, "evaluate", basis, vector, assigned[vector], others, (1.0,))[0]
                )
            result["bases"][spec.label] = {"scores": scores, "damage": [dataclasses.asdict(r) for r in rows]}
        write_json(path, result)
