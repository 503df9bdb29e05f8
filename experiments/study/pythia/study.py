"""What Pythia shapes cost: pieces of work, a whole run, and the plan beside it.

``python -m experiments.study.pythia --shape 14m --folder DIR --json docs/results/pythia-14m.json``

A GPTNeoX model of the shape is drawn and trained for a few steps on text made here; nothing is downloaded.
Every piece is done in a process of its own, so that its peak memory is its own, and kept in ``DIR/pieces``: a
study that was stopped goes on where it was. Seconds are also given as processor seconds, because a machine
that others use stretches those of the clock.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from experiments.application import say
from experiments.config import RunConfig
from experiments.report.tables import Table, table
from experiments.run.memory.budget import parse_memory
from experiments.study.pythia.kept import Cost, apart, kept, piece_path
from experiments.study.pythia.pieces import PIECES, one_vector, planned
from experiments.study.pythia.shapes import (
    AMOUNTS,
    SERIES,
    SHAPES,
    Amount,
    counted,
    draw_model,
    outline,
    run_config,
    train,
)
from experiments.study.pythia.whole import whole_run
from experiments.study.results import publish, show

#: Shapes that are too large to train here: one checkpoint and vector, and the plan; the plan alone.
MEASURED_ONCE, PLANNED_ONLY = ("410m",), ("1b",)


@dataclass(frozen=True)
class Compared:
    """One quantity of a stage as the plan has it and as it was.

    Attributes:
        planned: by the plan.
        measured: of the run.
    """

    planned: float
    measured: float


@dataclass(frozen=True)
class PythiaResult:
    """One shape.

    Attributes:
        shape: its name.
        parameters: N.
        amount: how much the run looks at.
        memory_gb: budget of the run, None for none.
        pieces: piece of work -> what it took.
        run: stage -> what it took; empty where no run was made.
        plan: what the plan took, and as its notes what it says.
        compared: quantity -> plan beside run.
    """

    shape: str
    parameters: int
    amount: Amount
    memory_gb: float | None
    pieces: Mapping[str, Cost]
    run: Mapping[str, Cost]
    plan: Cost
    compared: Mapping[str, Compared]


def plan_beside_run(plan: Cost, run: Mapping[str, Cost]) -> dict[str, Compared]:
    """Products, bytes, memory and seconds of the stages that both have.

    Seconds are by the clock that the plan was timed with: for one of processors a stage's are multiplied by
    the processor seconds that its process got in a second. They leave out opening the run, which every
    process here does anew.
    """
    measured = {name: _of(cost, "stage_seconds") * _share(plan, cost) for name, cost in run.items()}
    stages = [name for name in run if f"{name} seconds" in plan.notes]
    found = {
        "products": Compared(_of(plan, "hvps"), sum(_of(run[name], "hvps") for name in stages)),
        "bytes read": Compared(
            sum(_of(plan, f"{name} read") for name in stages),
            sum(_of(run[name], "bytes_read") for name in stages),
        ),
        "bytes written": Compared(
            sum(_of(plan, f"{name} written") for name in stages),
            sum(_of(run[name], "bytes_written") for name in stages),
        ),
        "peak memory": Compared(_of(plan, "peak_bytes"), max(run[name].peak_bytes for name in stages)),
        "seconds": Compared(
            sum(_of(plan, f"{name} seconds") for name in stages),
            sum(measured[name] for name in stages),
        ),
    }
    for name in stages:
        seconds = _of(plan, f"{name} seconds")
        found[f"seconds of {name}"] = Compared(seconds, measured[name])
    return found


def _share(plan: Cost, cost: Cost) -> float:
    """Seconds of the plan's clock that a piece got in one of the wall's: 1, or those of processors."""
    return 1.0 if plan.notes.get("clock") == "wall" else cost.processor_seconds / cost.seconds


def _of(cost: Cost, note: str) -> float:
    value = cost.notes.get(note)
    return 0.0 if value is None else float(value)


def tables(found: PythiaResult) -> list[Table]:
    """One row a piece of work, one a stage, one a quantity of the plan."""
    head = f"Pythia {found.shape} shape, {found.parameters:,} parameters"
    costs = {**found.pieces, **{f"run: {name}": cost for name, cost in found.run.items()}}
    costs["plan"] = found.plan
    rows = [
        [
            name,
            f"{cost.seconds:.1f}",
            f"{cost.processor_seconds:.1f}",
            f"{cost.peak_bytes / 1e9:.2f}",
            f"{cost.bytes / (4 * found.parameters):.1f}",
        ]
        for name, cost in costs.items()
    ]
    result = [
        table(
            ["work", "seconds", "processor seconds", "peak GB", "vectors of N"],
            rows,
            f"{head}: every piece in its own process",
        )
    ]
    if found.compared:
        quantities = [
            [
                name,
                f"{c.planned:.4g}",
                f"{c.measured:.4g}",
                f"{c.planned / c.measured:.2f}" if c.measured else "",
            ]
            for name, c in found.compared.items()
        ]
        result.append(
            table(["quantity", "planned", "measured", "ratio"], quantities, f"{head}: plan beside run")
        )
    return result


def pythia(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "14m",
    folder: Annotated[Path | None, typer.Option(help="Checkpoints, run and finished pieces.")] = None,
    memory: Annotated[str, typer.Option(help="Budget of the run, e.g. 8GB.")] = "8GB",
    amount: Annotated[str, typer.Option(help=f"One of {', '.join(AMOUNTS)}.")] = "full",
    finished: Annotated[bool, typer.Option(help="Tabulate what is finished; measure nothing more.")] = False,
    with_run: Annotated[bool, typer.Option(help="Also the run; without it pieces and plan alone.")] = True,
    json_: Annotated[Path | None, typer.Option("--json", help="Result file.")] = None,
) -> None:
    """Measure a Pythia shape; finished pieces are read back."""
    if shape not in SHAPES:
        raise ValueError(f"--shape must be one of {sorted(SHAPES)}, got '{shape}'")
    if amount not in AMOUNTS:
        raise ValueError(f"--amount must be one of {sorted(AMOUNTS)}, got '{amount}'")
    place, wanted = folder or Path("runs") / f"pythia-{shape}", AMOUNTS[amount]
    place.mkdir(parents=True, exist_ok=True)
    memory_gb = parse_memory(memory)
    done = place / "pieces"
    whole: dict[str, Cost] = {}
    if shape in PLANNED_ONLY:
        outline(shape, place, wanted)
        pieces: dict[str, Cost] = {}
    elif shape in MEASURED_ONCE:
        if not (place / "text.npy").exists():
            apart(draw_model, shape, place)
        pieces = {"one checkpoint and vector": kept(done, "one vector", one_vector, place, memory_gb)}
        outline(shape, place / "outline", wanted)
    else:
        if not (place / "text.npy").exists():
            apart(train, shape, place, wanted)
        todo = [n for n in PIECES if not finished or piece_path(done, n).exists()]
        pieces = {name: kept(done, name, PIECES[name], place) for name in todo}
    planning = place / "outline" if shape in MEASURED_ONCE else place
    plan = kept(done, f"plan {wanted.name} {memory}", partial(planned, planning, wanted), memory_gb)
    if with_run and shape not in (*MEASURED_ONCE, *PLANNED_ONLY):
        whole = whole_run(place, wanted, memory_gb, finished=finished)
    beside = plan_beside_run(plan, whole) if whole else {}
    size = counted(planning)
    found = PythiaResult(shape, size, wanted, memory_gb, pieces, whole, plan, beside)
    shown = tables(found)
    show(shown)
    say(f"Kept: {done} ({os.cpu_count()} cores)")
    publish(json_, "pythia/2", published(run_config(planning, wanted, memory_gb), shape), [0], found, shown)


def published(config: RunConfig, shape: str) -> RunConfig:
    """The config with folders named after the shape instead of where they lay."""
    assert config.checkpoints is not None
    assert config.model.path is not None
    name = f"pythia-{shape}"
    return config.model_copy(
        update={
            "checkpoints": config.checkpoints.model_copy(update={"directory": f"{name}/{SERIES}"}),
            "model": config.model.model_copy(
                update={"path": f"{name}/{SERIES}/{Path(config.model.path).name}"}
            ),
            "text": config.text.model_copy(update={"file": f"{name}/text.npy"}),
        }
    )
