"""run.json: what a run was made with and what it cost, and every opening of its evaluate split.

Whoever reads the evaluate split calls :func:`open_evaluate` first, with the plan of what will be
looked at. The plan is written down with its hash; a plan that is not the first one is exploratory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.run.keys import SCHEMA, stage_names
from experiments.run.machine import Hardware, this_machine, versions
from experiments.run.store import RunDirectory, StageRecord
from polca_edit.artifacts import load_record, save_record, to_plain
from polca_edit.checkpoints.files import write_json

if TYPE_CHECKING:  # readers of the record, such as the report, need no task and no model
    from experiments.run.run import Run


@dataclass(frozen=True)
class Opening:
    """One plan under which the evaluate split was read.

    Attributes:
        plan: SHA-256 of the plan.
        exploratory: whether another plan had opened the same tokens before.
        by: the verb that read it.
        times: how often under this plan.
        tokens: fingerprint of what was opened: the evaluate split, or sequences drawn anew.
    """

    plan: str
    exploratory: bool
    by: str = "run"
    times: int = 1
    tokens: str = ""


@dataclass(frozen=True)
class RunRecord:
    """What run.json holds.

    Attributes:
        schema: of the record.
        seed: of the run.
        versions: package -> version.
        hardware: processor, cores, threads, accelerator.
        parameters: of the model.
        select_sequences: unit of passes in the summary.
        stages: finished stages and their cost.
        evaluate_openings: plans that opened the evaluate split, in order.
        precision: of derivatives, bases and everything stored of them.
        routes: how derivatives were really taken: ``slopes``, ``products`` (with the Hessian), and under
            ``note`` why a cheaper way was not.
    """

    schema: int = SCHEMA
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Hardware | None = None
    parameters: int = 0
    select_sequences: int = 0
    stages: Mapping[str, StageRecord] = field(default_factory=dict)
    evaluate_openings: tuple[Opening, ...] = ()
    precision: str = "float32"
    routes: Mapping[str, str] = field(default_factory=dict)


def routes_of(run: Run) -> dict[str, str]:
    """Routes that derivatives took in this process; those of earlier ones are kept where it took none."""
    used = {
        "slopes": run.objective.route_used,
        "products": run.objective.curvature_route,
        "note": run.objective.route_note,
    }
    return {name: route for name, route in used.items() if route}


def read_run_record(directory: RunDirectory) -> RunRecord:
    """run.json, empty where there is none yet."""
    path = directory / "run.json"
    return load_record(RunRecord, path) if path.exists() else RunRecord()


def write_run_record(run: Run) -> None:
    """Write versions, seed, hardware and stage costs; openings of the evaluate split are kept."""
    names, before = set(stage_names(run.config)), read_run_record(run.directory)
    record = RunRecord(
        SCHEMA,
        run.config.seed,
        versions(),
        this_machine(),
        run.task.space.size,
        run.task.splits.select.sequences,
        {r.stage: r for r in run.directory.stage_records() if r.stage in names},
        before.evaluate_openings,
        run.config.precision,
        {**before.routes, **routes_of(run)},
    )
    save_record(run.directory / "run.json", record)


def open_evaluate(run: Run, plan: object, by: str = "run") -> Opening:
    """Write a plan and its hash down and count the opening; the evaluate split may be read after that.

    A plan other than the first one on the same tokens is marked exploratory. The plan of ``run`` is
    ``plan.json``, those of other verbs are ``plans/VERB-HASH.json``.

    Args:
        run: the run.
        plan: a record, or plain values, that says what will be looked at; ``tokens`` in it is the
            fingerprint of the tokens, without it they are the evaluate split.
        by: the verb or study that reads the split.

    Example::

        opening = open_evaluate(run, RemovalPlan(skill, method, limits), by="remove")
        damage = EvaluatedSplit(run.objective, run.checkpoints(), run.task.splits.evaluate)
    """
    values: dict[str, Any] = to_plain(plan)
    digest = plan_hash(values)
    evaluate = run.task.splits.evaluate.fingerprint()
    tokens = str(values.get("tokens") or evaluate)
    record = read_run_record(run.directory)
    openings = list(record.evaluate_openings)
    known = next((i for i, opening in enumerate(openings) if opening.plan == digest), None)
    if known is None:
        seen = any((opening.tokens or evaluate) == tokens for opening in openings)
        openings.append(Opening(digest, seen, by, tokens=tokens))
    else:
        openings[known] = replace(openings[known], times=openings[known].times + 1)
    run.directory.unseal()
    write_json(_plan_file(run.directory, by, digest), {**values, "sha256": digest})
    save_record(run.directory / "run.json", replace(record, evaluate_openings=tuple(openings)))
    return openings[-1 if known is None else known]


def plan_hash(values: Mapping[str, Any]) -> str:
    """SHA-256 of a plan as it is written, without its own hash."""
    text = json.dumps(values, indent=1, sort_keys=True) + "\n"
    return hashlib.sha256(text.encode()).hexdigest()


def _plan_file(directory: RunDirectory, by: str, digest: str) -> Path:
    return directory / "plan.json" if by == "run" else directory.path / "plans" / f"{by}-{digest[:12]}.json"
