"""What Pythia shapes cost: scored-only logits, vectors held, and the plan against a run that was made.

``python -m experiments.study.pythia --shape 14m --json docs/results/pythia-14m.json``

A GPTNeoX model of the shape is drawn and trained for a few steps on random text; nothing is downloaded.
Every piece of work is done in a process of its own, so that its peak memory is its own. Times are processor
seconds of interleaved pairs, only their ratio is meant.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from experiments.application import run_application, say
from experiments.config import RunConfig, load_config
from experiments.report.tables import Table, table
from experiments.run.cost.plan import make_plan
from experiments.run.driver import run_stages
from experiments.run.machine import peak_rss_bytes, resident_bytes
from experiments.run.parts import mapped_rows
from experiments.run.run import open_run
from experiments.study.results import publish, show
from experiments.verbs.pipeline import open_overrides
from polca_edit.basis.path import trajectory_basis
from polca_edit.checkpoints.huggingface_models import load_causal_lm
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import LanczosSettings, projected_lanczos
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet, next_token_loss

#: Width, layers, heads of the Pythia models; the vocabulary is 50,304 and the MLP four times as wide.
SHAPES = {"14m": (128, 6, 4), "31m": (256, 6, 8), "70m": (512, 6, 8), "160m": (768, 12, 12)}
VOCABULARY, LENGTH, SCORED, SEQUENCES = 50_304, 64, 16, 8
VECTORS, CHECKPOINTS, PRODUCTS = 3, 8, 8


@dataclass(frozen=True)
class Cost:
    """Peak memory of one piece of work in its own process.

    Attributes:
        bytes: peak beyond what was resident before it began.
        vectors: the same in vectors of N float32 entries.
        seconds: processor time.
        notes: what it found: routes, losses, products.
    """

    bytes: int
    vectors: float
    seconds: float
    notes: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class PythiaResult:
    """One shape.

    Attributes:
        shape: its name.
        parameters: N.
        costs: piece of work -> what it took.
        product_ratio: seconds of a product with logits everywhere over one with the scored ones, by pair.
        loss_difference: largest difference of the two ways' losses, nats.
        slope_difference: of a Hessian-vector product, relative to its norm.
        plan: quantity -> (planned, measured); empty where no run was made.
    """

    shape: str
    parameters: int
    costs: dict[str, Cost]
    product_ratio: tuple[float, ...]
    loss_difference: float
    slope_difference: float
    plan: dict[str, tuple[float, float]]


def everywhere(module: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The loss that cannot be asked for slots, so that logits are computed at all positions."""
    return next_token_loss(module, inputs)


def train(shape: str, folder: Path) -> None:
    """A few AdamW steps on text with repeated halves, a checkpoint folder after each."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    width, layers, heads = SHAPES[shape]
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=128,
        )
    )
    draw = torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(CHECKPOINTS):
        model.save_pretrained(folder / f"checkpoint-{step + 1}")
        ids = torch.randint(1000, (2, 16), generator=draw).repeat(1, 2)
        next_token_loss(model, ids).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    text = np.random.default_rng(2).integers(1, 1000, (60 * 70,)).astype(np.int64)
    text[::70] = 0
    np.save(folder / "text.npy", text)


def few_scored() -> TokenSet:
    """``SCORED`` of the slots of every sequence."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(1000, (SEQUENCES, LENGTH), generator=draw)
    scored = torch.zeros(SEQUENCES, LENGTH - 1, dtype=torch.bool)
    for row in scored:
        row[torch.randperm(LENGTH - 1, generator=draw)[:SCORED]] = True
    return TokenSet.from_ids(ids, scored=scored)


def series_of(folder: Path) -> tuple[torch.nn.Module, Checkpoints]:
    """The last model and the series."""
    model = load_causal_lm(folder / f"checkpoint-{CHECKPOINTS}")
    return model, open_checkpoints(folder, model, names="checkpoint-*")


def measured(work: Callable[[], dict[str, object]], size: int) -> Cost:
    """Peak memory beyond what is resident now."""
    before, started = resident_bytes(), time.process_time()
    notes = work()
    peak = max(0, peak_rss_bytes() - before)
    return Cost(peak, peak / (4 * size), time.process_time() - started, notes)


def product(folder: Path, *, scored: bool) -> Cost:
    """One linearisation and one Hessian-vector product."""
    model, series = series_of(folder)
    loss = Objective(model, next_token_loss if scored else everywhere, batch_size=4, route="double_backward")
    theta, tokens = series[len(series) - 1], few_scored()

    def work() -> dict[str, object]:
        loss.hessian(theta, tokens)(theta)
        return {"route": loss.curvature_route, "batch_bytes": loss.batch_bytes}

    return measured(work, loss.space.size)


def trajectory(folder: Path) -> Cost:
    """A trajectory basis from streamed displacements."""
    _, series = series_of(folder)

    def work() -> dict[str, object]:
        basis = trajectory_basis(series, VECTORS)
        return {"vectors": len(basis), "checkpoints": len(series)}

    return measured(work, series.space.size)


def lanczos(folder: Path, *, mapped: bool) -> Cost:
    """Products with a diagonal operator, so that the Krylov vectors alone count."""
    size = sum(p.numel() for p in load_causal_lm(folder / "checkpoint-1").parameters())
    diagonal, numbers = torch.linspace(0, 1, size), count()

    def work() -> dict[str, object]:
        with tempfile.TemporaryDirectory(dir=folder) as place:

            def table_in_file(rows: int, width: int) -> torch.Tensor:
                return mapped_rows(Path(place) / str(next(numbers)), rows, width)

            found = projected_lanczos(
                lambda vector: diagonal * vector,
                diagonal,
                1,
                torch.Generator().manual_seed(0),
                LanczosSettings(1e-9, PRODUCTS),
                allocate=(lambda k, n: mapped_rows(Path(place) / str(next(numbers)), k, n))
                if mapped
                else None,
            )
        return {"products": found.products}

    return measured(work, size)


PARTS: dict[str, Callable[[Path], Cost]] = {
    "product, logits at scored slots": partial(product, scored=True),
    "product, logits everywhere": partial(product, scored=False),
    f"trajectory basis, {VECTORS} vectors of {CHECKPOINTS} checkpoints": trajectory,
    f"Lanczos, {PRODUCTS} products": partial(lanczos, mapped=False),
    f"Lanczos, {PRODUCTS} products, tables mapped": partial(lanczos, mapped=True),
}


def apart(work: Callable[..., Any], *given: object) -> Any:
    """One piece of work in a process of its own, forked so that libraries are loaded once."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(work, *given).result()


def compared(folder: Path, pairs: int) -> tuple[int, list[float], float, float]:
    """N, ratios of a product's seconds by pair, and how far losses and products are apart."""
    model, series = series_of(folder)
    theta, tokens = series[len(series) - 1], few_scored()
    ways = [Objective(model, f, batch_size=4, route="double_backward") for f in (next_token_loss, everywhere)]
    losses = [way.losses(theta, tokens) for way in ways]
    vector = series[len(series) - 1] - series[0]
    ratios, images = [], []
    maps = [way.hessian(theta, tokens) for way in ways]
    for pair in range(pairs):
        taken = [0.0, 0.0]
        for number in (0, 1) if pair % 2 == 0 else (1, 0):
            started = time.process_time()
            image = maps[number](vector)
            taken[number] = time.process_time() - started
            if pair == 0:
                images.append(image)
        ratios.append(taken[1] / taken[0])
    gap = float((images[0] - images[1]).norm() / images[1].norm())
    return theta.numel(), ratios, float((losses[0] - losses[1]).abs().max()), gap


def run_config(folder: Path) -> RunConfig:
    """A whole run on the folder: two Hessian and three trajectory vectors."""
    overrides = open_overrides(folder, str(folder / "text.npy"), names="checkpoint-*")
    overrides |= {"text.select_sequences": 8, "text.curvature_sequences": 8, "text.evaluate_sequences": 8}
    overrides |= {"text.separator": 0, "batch_size": 4, "discover.edits": 4, "damage.random_draws": 1}
    overrides |= {"text.max_documents": None, "damage.doses": [0.5]}
    overrides["bases"] = [{"kind": "hessian", "vectors": 2}, {"kind": "trajectory", "vectors": VECTORS}]
    return load_config("huggingface", overrides)


def planned(folder: Path) -> Cost:
    """The plan of the run."""
    config = run_config(folder)

    def work() -> dict[str, object]:
        with tempfile.TemporaryDirectory() as place:
            found = make_plan(config, Path(place))
        routes = {"route": found.route, "curvature_route": found.curvature_route}
        return {"hvps": found.hvps, "peak": found.peak_bytes, "read": found.bytes_read, **routes}

    return measured(work, 1)


def done(folder: Path) -> Cost:
    """The run itself, up to its projections."""
    config = run_config(folder)

    def work() -> dict[str, object]:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            run = open_run(config, Path(place) / "run", say=lambda _: None)
            run_stages(run, stages=["basis:hessian", "basis:trajectory", "projections"])
            stages = {record.stage: record for record in run.directory.stage_records()}
        hvps = stages["basis:hessian"].passes["hvp"] / run.task.splits.curvature.sequences
        routes = {"route": run.objective.route_used, "curvature_route": run.objective.curvature_route}
        return {"hvps": hvps, "peak": peak_rss_bytes(), **routes}

    return measured(work, 1)


PARTS |= {"plan": planned, "run": done}


def result_table(found: PythiaResult) -> Table:
    """One row a piece of work."""
    rows = [[name, f"{cost.bytes / 1e9:.2f}", f"{cost.vectors:.1f}"] for name, cost in found.costs.items()]
    title = (
        f"Pythia {found.shape} shape, {found.parameters:,} parameters: peak memory in its own process; a "
        f"product with logits everywhere takes {statistics.median(found.product_ratio):.2f} times the "
        f"processor time of one with the {SCORED} scored of {LENGTH - 1} slots"
    )
    return table(["work", "GB", "vectors of N"], rows, title)


def pythia(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "14m",
    pairs: Annotated[int, typer.Option(help="Interleaved pairs of products.")] = 3,
    with_run: Annotated[bool, typer.Option(help="Also a run, to compare the plan with.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Checkpoints made before; default new ones.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Result file.")] = None,
) -> None:
    """Measure a Pythia shape."""
    if shape not in SHAPES:
        raise ValueError(f"--shape must be one of {sorted(SHAPES)}, got '{shape}'")
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or Path(scratch)
        if not (place / "text.npy").exists():
            apart(train, shape, place)  # nothing here differentiates before the last fork
        costs: dict[str, Cost] = {}
        for name in PARTS if with_run else [name for name in PARTS if name not in ("plan", "run")]:
            costs[name] = apart(PARTS[name], place)
            say(f"  {name}: {costs[name].bytes / 1e9:.2f} GB, {costs[name].vectors:.1f} vectors")
        size, ratios, losses, gap = apart(compared, place, pairs)
        plan = {}
        if with_run:
            one, other = costs.pop("plan").notes, costs.pop("run").notes
            plan = {key: (float(str(one[key])), float(str(other[key]))) for key in ("hvps", "peak")}
            say(f"  plan {one}, run {other}")
        config = run_config(place)
    found = PythiaResult(shape, size, costs, tuple(ratios), losses, gap, plan)
    show([result_table(found)])
    say(f"losses differ by {losses:.1e} nats, products by {gap:.1e}; plan (planned, measured): {plan}")
    publish(json_, "pythia/1", config, [0], found, [result_table(found)])


if __name__ == "__main__":
    run_application(pythia)
