"""The paper's arithmetic tables beside ours, and every basis and rotation in one table.

``python -m experiments.reproduce.verb --preset demo --seeds 1 --json FILE``
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.console import Console
from torch import Tensor

from experiments.application import run_application, settings_from
from experiments.config import RunConfig, load_config
from experiments.reproduce.claims import judge_claims
from experiments.reproduce.measure import Measured, Say, Settings, measure_bases, rotations_of, trained
from experiments.reproduce.rivals import (
    quadrature_table,
    rival_rows,
    second_order_error,
    with_second_order,
)
from experiments.reproduce.rows import (
    TokenSplits,
    carry_fields,
    cluster_variants,
    over_seeds,
    projected,
    share_fields,
)
from experiments.reproduce.tables import print_tables
from experiments.run.machine import hardware, versions
from experiments.run.run import open_run
from polca_edit.allocation.allocate import allocate
from polca_edit.allocation.quadrature import FixedRule
from polca_edit.checkpoints.files import write_json
from polca_edit.clusters.density import ClusterSettings

NUMBERS = (
    "explained_share",
    "worst_group_share_error",
    "quadrature_error",
    "captured_net",
    "captured_path",
    "carry_homogeneity",
    "recall_all",
    "recall_paper",
    "f1",
    "hidden_share",
    "outlier_share",
    "stability",
    "validity",
    "passes",
)
SCHEMA = "polca-edit/reproduce/1"

#: Config changes and settings by preset. ``demo`` must end in twenty minutes on two cores, so it has
#: 60 intervals, the bases that are not in the main comparison get 8 vectors and evaluate 150 sums;
#: ``mini`` leaves the dear bases to ``demo``.
PRESETS: dict[str, tuple[dict[str, Any], Settings]] = {
    "smoke": (
        {"training.record_every": 3},
        Settings(3, None, ("hessian", "trajectory_secant", "random"), ("trajectory_secant",), draws=2),
    ),
    "demo": (
        {"arithmetic.evaluate_sums": 150, "training.record_every": 20, "training.state_every": 200},
        Settings(others=8),
    ),
    "mini": (
        {"arithmetic.select_sums": 250},
        Settings(12, None, ("hessian", "shuffled_hessian", "trajectory_secant", "loss_weighted", "random")),
    ),
    "paper": ({}, Settings(50)),
}


def basis_row(
    name: str,
    rotation: str,
    measured: Measured,
    splits: TokenSplits,
    clusters: ClusterSettings,
    *,
    seed: int,
    delta: int,
    draws: int,
    supervised: bool = False,
) -> dict[str, Any]:
    """One row of the table of bases."""
    paths = projected(measured.select), projected(measured.evaluate)
    clustered = cluster_variants(*paths, splits, clusters, seed=seed)
    quadrature = allocate(measured.evaluate, "quadrature")
    return {
        "basis": name,
        "rotation": rotation,
        "supervised": supervised or measured.basis.supervised,
        "seed": seed,
        "vectors": len(measured.basis),
        **share_fields(quadrature, splits.evaluate),
        "captured_net": measured.captured[0],
        "captured_path": measured.captured[1],
        **carry_fields(
            clustered, paths[0], measured.select, splits, clusters, delta=delta, seed=seed, draws=draws
        ),
        "passes": measured.passes,
        "worst_residual": _worst(measured.basis.residuals),
    }


def _worst(values: Tensor) -> float | None:
    known = values[~values.isnan()]
    return float(known.max()) if len(known) else None


def basis_rows(
    measured: dict[str, Measured], splits: TokenSplits, config: RunConfig, settings: Settings, say: Say
) -> list[dict[str, Any]]:
    """Every basis, and every rotation of the chosen spans."""
    clusters = ClusterSettings(**config.clusters.model_dump())
    options = {"seed": config.seed, "delta": config.breakthrough_delta, "draws": settings.draws}
    rows = []
    for name, own in measured.items():
        started = time.perf_counter()
        rows.append(basis_row(name, "none", own, splits, clusters, **options))  # type: ignore[arg-type]
        if settings.tables and name in settings.rotated:
            for label, rotation in rotations_of(own, splits, config.seed).items():
                turned = replace(
                    own,
                    basis=own.basis.rotated(rotation, label, supervised=label == "contrastive"),
                    select=own.select.rotated(rotation),
                    evaluate=own.evaluate.rotated(rotation),
                )
                rows.append(basis_row(name, label, turned, splits, clusters, **options))  # type: ignore[arg-type]
        say(f"  rows of {name:<20} {time.perf_counter() - started:6.1f} s")
    return rows


def reproduce_seed(config: RunConfig, settings: Settings, out: Path, say: Say) -> dict[str, Any]:
    """All tables of one seed."""
    started = time.perf_counter()
    run = open_run(config, out, say)
    checkpoints = trained(run, say)
    splits = TokenSplits(run.task.splits.select, run.task.splits.evaluate)
    measured, report = measure_bases(run, checkpoints, settings, say)
    result: dict[str, Any] = {
        "seed": config.seed,
        "rows": basis_rows(measured, splits, config, settings, say),
        "features": [],
        "second_order": None,
        "adaptive": report,
    }
    result["quadrature"] = []
    if settings.tables and "hessian" in measured:
        hessian, curved = measured["hessian"], None
        if settings.rivals:
            curved = with_second_order(run.objective, checkpoints, hessian, run.task.splits.curvature)
            result["second_order"] = second_order_error(
                run.objective, checkpoints, hessian.basis, curved[0], splits.select
            )
        result["features"] = rival_rows(run, checkpoints, measured, curved, splits, settings)
        say(f"  rival features done at {time.perf_counter() - started:.0f} s")
    if settings.tables:
        result["quadrature"] = quadrature_table(
            run.objective, checkpoints, splits.evaluate, settings.tolerance
        )
    result["seconds"] = time.perf_counter() - started
    return result


def _finished(file: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """A seed's numbers if they were measured with this config and these settings."""
    if not file.exists():
        return None
    part: dict[str, Any] = json.loads(file.read_text())
    return part if part.get("asked") == json.loads(json.dumps(asked)) else None


def run_reproduction(
    preset: str,
    seeds: Sequence[int],
    file: Path | None,
    out: Path,
    settings: Settings,
    say: Say,
    **changes: Any,
) -> dict[str, Any]:
    """Every seed in turn; the file is written after each; a seed finished with these settings is kept."""
    overrides = {**PRESETS[preset][0], **changes}
    parts = []
    for seed in seeds:
        config = load_config(preset, {**overrides, "seed": seed, "bases": [{"kind": "trajectory"}]})
        folder = out / f"seed{seed}"
        asked = {"config": config.model_dump(mode="json"), "settings": dataclasses.asdict(settings)}
        kept = _finished(folder / "reproduce.json", asked)
        say(f"seed {seed}" + (", kept" if kept else ""))
        part = kept or {**reproduce_seed(config, settings, folder, say), "asked": asked}
        write_json(folder / "reproduce.json", part)
        shutil.rmtree(folder / "parts", ignore_errors=True)
        parts.append(part)
        result = {
            "schema": SCHEMA,
            "preset": preset,
            "config": config.model_dump(mode="json"),
            "settings": dataclasses.asdict(settings),
            "seeds": [p["seed"] for p in parts],
            "versions": versions(),
            "hardware": hardware(),
            "rows": [row for p in parts for row in p["rows"]],
            "over_seeds": over_seeds([row for p in parts for row in p["rows"]], NUMBERS),
            "features": [row for p in parts for row in p["features"]],
            "quadrature": [{"seed": p["seed"], **row} for p in parts for row in p["quadrature"]],
            "second_order": [{"seed": p["seed"], **(p["second_order"] or {})} for p in parts],
            "claims": judge_claims(parts),
            "seconds": [p["seconds"] for p in parts],
        }
        if file is not None:
            write_json(file, json.loads(json.dumps(result)))
    return result


def reproduce(
    preset: Annotated[str, typer.Option(help="demo, mini or paper.")] = "demo",
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.", min=1)] = 1,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
    out: Annotated[Path, typer.Option(help="Where checkpoints go; finished training is kept.")] = Path(
        "runs/reproduce"
    ),
    bases: Annotated[str | None, typer.Option(help="Only these bases, separated by commas.")] = None,
    first_seed: Annotated[int, typer.Option(help="The first seed.", min=0)] = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a config key, e.g. training.record_every=6.")
    ] = None,
    rule: Annotated[
        str, typer.Option(help="Quadrature on evaluate: adaptive, simpson, gauss2, gauss3 ...")
    ] = "adaptive",
    tables: Annotated[
        bool, typer.Option(help="Also rotations, rival features and the table of quadrature rules.")
    ] = True,
    rivals: Annotated[bool, typer.Option(help="Also the dear rival features (Eq. 6, saliency ...).")] = True,
) -> None:
    """The paper's Tables 1 and 8-12 beside ours, and every basis and rotation."""
    if preset not in PRESETS:
        raise ValueError(f"a reproduction preset must be one of {sorted(PRESETS)}, got '{preset}'")
    known = ("adaptive", *get_args(FixedRule))
    if rule not in known:
        raise ValueError(f"--rule must be one of {', '.join(known)}, got '{rule}'; correct the name")
    settings = replace(PRESETS[preset][1], rule=cast(Any, rule), tables=tables, rivals=rivals)
    if bases is not None:
        settings = replace(settings, kinds=tuple(name.strip() for name in bases.split(",")))
    console = Console(highlight=False, width=160)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    given = range(first_seed, first_seed + seeds)
    changes = settings_from(set_)
    print_tables(run_reproduction(preset, given, json_, out / preset, settings, say, **changes), console)


if __name__ == "__main__":
    run_application(reproduce)
