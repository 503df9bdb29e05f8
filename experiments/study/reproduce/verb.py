"""The paper's arithmetic tables beside ours, and every basis and rotation in one table.

``python -m experiments.study.reproduce.verb --preset demo --seeds 1 --json FILE``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from experiments.application import run_application, say, settings_from
from experiments.config import load_config
from experiments.run.run import open_run
from experiments.study.measured import Say
from experiments.study.reproduce.claims import judge_claims
from experiments.study.reproduce.measure import ReproductionSettings
from experiments.study.reproduce.seed import SeedTables, seed_tables
from experiments.study.reproduce.tables import Reproduction, reproduction_tables
from experiments.study.results import publish, show
from experiments.verbs.options import Result
from polca_edit.allocation.quadrature import FixedRule
from polca_edit.basis.build import KINDS

#: Config changes and settings by preset. ``demo`` must end in twenty minutes on two cores, so it has
#: 60 intervals, the bases that are not in the main comparison get 8 vectors and evaluate 150 sums;
#: ``mini`` leaves the dear bases to ``demo``.
PRESETS: dict[str, tuple[dict[str, Any], ReproductionSettings]] = {
    "smoke": (
        {"training.record_every": 3},
        ReproductionSettings(
            3, None, ("hessian", "trajectory_secant", "random"), ("trajectory_secant",), draws=2
        ),
    ),
    "demo": (
        {"arithmetic.evaluate_sums": 150, "training.record_every": 20, "training.state_every": 200},
        ReproductionSettings(others=8),
    ),
    "mini": (
        {"arithmetic.select_sums": 250},
        ReproductionSettings(
            12, None, ("hessian", "shuffled_hessian", "trajectory_secant", "loss_weighted", "random")
        ),
    ),
    "paper": ({}, ReproductionSettings(50)),
}


def gathered(parts: Sequence[SeedTables]) -> Reproduction:
    """All seeds as one result."""
    rows = tuple(row for part in parts for row in part.rows)
    features = tuple(row for part in parts for row in part.features)
    return Reproduction(
        {str(part.seed): part.settings for part in parts},
        rows,
        features,
        tuple(row for part in parts for row in part.quadrature),
        tuple(part.second_order for part in parts if part.second_order is not None),
        judge_claims(rows, features),
        tuple(part.seconds for part in parts),
    )


def run_reproduction(
    preset: str,
    seeds: Sequence[int],
    file: Path | None,
    out: Path,
    settings: ReproductionSettings,
    say: Say,
    **changes: Any,
) -> Reproduction:
    """Every seed in turn; the file is written after each; a seed finished with these settings is kept."""
    overrides = {**PRESETS[preset][0], **changes, "bases": [{"kind": "trajectory"}]}
    parts: list[SeedTables] = []
    for seed in seeds:
        run = open_run(load_config(preset, {**overrides, "seed": seed}), out / f"seed{seed}", say)
        parts.append(seed_tables(run, settings, say))
        found = gathered(parts)
        publish(file, "reproduce/2", run.config, seeds[: len(parts)], found, reproduction_tables(found))
    return found


def reproduce(
    preset: Annotated[str, typer.Option(help="demo, mini or paper.")] = "demo",
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.", min=1)] = 1,
    json_: Result = None,
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
        wanted = tuple(name.strip() for name in bases.split(","))
        unknown = next((name for name in wanted if name not in KINDS), None)
        if unknown is not None:
            raise ValueError(f"--bases must be some of {sorted(KINDS)}, got '{unknown}'; correct the name")
        settings = replace(settings, kinds=wanted)
    given = range(first_seed, first_seed + seeds)
    found = run_reproduction(preset, given, json_, out / preset, settings, say, **settings_from(set_))
    show(reproduction_tables(found))


if __name__ == "__main__":
    run_application(reproduce)
