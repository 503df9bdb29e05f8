"""One eigenpair of the Hessian at a Pythia shape by three programs, each in a process of its own.

``python -m benchmarks.pythia_pair FOLDER --json FILE``, on checkpoints of ``experiments.study.pythia``.

The others take a module that returns (scored logits, words), so they compute logits everywhere and keep the
scored ones, as their users do; ours asks the output layer for the scored positions. All stop at a relative
residual of 1e-2 by their own rule; the residual that counts is measured by one more product of ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from experiments.application import run_application, say
from experiments.report.tables import Table, table
from experiments.run.machine import hardware, peak_rss_bytes, resident_bytes, versions
from experiments.study.pythia.shapes import few_scored, last_folder
from experiments.study.results import show, write_with_tables
from polca_edit.artifacts import to_plain
from polca_edit.basis.hessian import EigenSettings, next_vectors
from polca_edit.checkpoints.huggingface_models import load_causal_lm
from polca_edit.derivatives.objective import Objective
from polca_edit.derivatives.routes import Route
from polca_edit.tokens import TokenSet, next_token_loss

TOLERANCE, SCORED = 1e-2, 10
#: Most products before a program is stopped.
MOST = 160


@dataclass(frozen=True)
class Pair:
    """What one program took for its eigenpair.

    Attributes:
        program: its name.
        eigenvalue: found.
        residual: |H v - lambda v| / lambda, by our product.
        products: with the Hessian.
        processor_seconds: from the loaded model to the pair.
        seconds: by the clock.
        bytes: peak memory beyond the loaded model.
        peak_bytes: of the process.
        problem: why there is no pair, empty where there is one.
    """

    program: str
    eigenvalue: float = float("nan")
    residual: float = float("nan")
    products: int = 0
    processor_seconds: float = float("nan")
    seconds: float = float("nan")
    bytes: int = 0
    peak_bytes: int = 0
    problem: str = ""


Found = tuple[float, Tensor, int]


class ScoredLogits(nn.Module):
    """(scored logits, words) of a fixed choice of slots."""

    def __init__(self, module: nn.Module, scored: Tensor) -> None:
        super().__init__()
        self.module, self.scored = module, scored

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of the scored slots, row after row."""
        logits: Tensor = self.module(inputs).logits[:, :-1]
        return logits[self.scored]


def ours(
    model: nn.Module, tokens: TokenSet, batch: int, route: Route = "auto", coarse: bool = False
) -> Found:
    """Projected Lanczos on the objective's product, as a basis checkpoint takes it."""
    loss = Objective(model, next_token_loss, batch_size=batch, route=route)
    theta = loss.space.read(model)
    settings = EigenSettings(1, TOLERANCE, MOST, coarse=coarse)
    draw = torch.Generator().manual_seed(0)
    found = next_vectors(loss.hessian(theta, tokens, expected=10), theta, [], 0, draw, settings)
    return float(found.eigenvalues[0]), found.rows[0], found.products


def _batches(tokens: TokenSet, batch: int) -> list[tuple[Tensor, Tensor]]:
    """One batch: both libraries take a fixed choice of scored slots."""
    return [(tokens.inputs, tokens.inputs[:, 1:][tokens.scored])]


def by_curvlinops(model: nn.Module, tokens: TokenSet, batch: int) -> Found:
    """Curvlinops' Hessian operator with scipy's eigsh."""
    from curvlinops import HessianLinearOperator  # type: ignore[import-untyped,unused-ignore]

    given = _batches(tokens, batch)
    operator: Any = HessianLinearOperator(
        ScoredLogits(model, tokens.scored),
        nn.CrossEntropyLoss(),
        [p for p in model.parameters() if p.requires_grad],
        given,
        check_deterministic=False,
        num_data=tokens.count,
        batch_size_fn=lambda inputs: int(tokens.count),
    )
    used, size = [0], sum(p.numel() for p in model.parameters() if p.requires_grad)

    def product(vector: np.ndarray) -> np.ndarray:
        used[0] += 1
        image: Tensor = operator @ torch.from_numpy(
            np.ascontiguousarray(vector.reshape(-1), dtype=np.float32)
        )
        return image.numpy()

    linear = LinearOperator((size, size), matvec=product, dtype=np.float32)
    start = torch.randn(size, generator=torch.Generator().manual_seed(0)).numpy()
    values, vectors = eigsh(linear, k=1, which="LA", tol=TOLERANCE, v0=start)
    return float(values[0]), torch.from_numpy(vectors[:, 0].copy()), used[0]


def by_eigenthings(model: nn.Module, tokens: TokenSet, batch: int) -> Found:
    """hessian-eigenthings' Lanczos with 10, 20, 40 ... steps until it reports the tolerance."""
    import hessian_eigenthings as library  # type: ignore[import-untyped,unused-ignore]

    operator: Any = library.HessianOperator(
        ScoredLogits(model, tokens.scored),
        _batches(tokens, batch),
        library.supervised_loss(nn.CrossEntropyLoss()),
    )
    used, steps = 0, 10
    while True:
        found = library.lanczos(
            operator, k=1, max_iter=steps, tol=TOLERANCE, which="LA", seed=0, reorthogonalize=True
        )
        used += steps
        if bool(found.converged[0]) or used >= MOST:
            return float(found.eigenvalues[0]), found.eigenvectors[0].reshape(-1), used
        steps *= 2


PROGRAMS: dict[str, Callable[[nn.Module, TokenSet, int], Found]] = {
    "polca-edit": ours,
    "polca-edit, reverse mode twice": partial(ours, route="double_backward"),
    "polca-edit, reverse mode twice, sought in bfloat16": partial(ours, route="double_backward", coarse=True),
    "curvlinops and eigsh": by_curvlinops,
    "hessian-eigenthings": by_eigenthings,
}


def measured(name: str, folder: Path, sequences: int) -> Pair:
    """One program from the loaded model to its pair."""
    model = load_causal_lm(last_folder(folder))
    tokens = few_scored(sequences, SCORED)
    model(tokens.inputs[:1])  # libraries are loaded, buffers made
    before, clock, started = resident_bytes(), time.process_time(), time.perf_counter()
    try:
        value, vector, products = PROGRAMS[name](model, tokens, sequences)
    except (ImportError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        return Pair(name, problem=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    spent, seconds, peak = time.process_time() - clock, time.perf_counter() - started, peak_rss_bytes()
    loss = Objective(model, next_token_loss, batch_size=sequences, route="double_backward")
    vector = vector.float() / vector.float().norm()
    image = loss.hessian(loss.space.read(model), tokens, expected=1)(vector)
    residual = float((image - value * vector).norm()) / abs(value)
    return Pair(name, value, residual, products, spent, seconds, max(0, peak - before), peak)


def pair_table(found: list[Pair], title: str) -> Table:
    """One row a program."""
    rows = [
        [
            one.program,
            one.problem or f"{one.eigenvalue:.4g}",
            f"{one.residual:.1e}",
            str(one.products),
            f"{one.processor_seconds:.1f}",
            f"{one.bytes / 1e9:.2f}",
            f"{one.peak_bytes / 1e9:.2f}",
        ]
        for one in found
    ]
    heads = [
        "program",
        "eigenvalue",
        "residual",
        "products",
        "processor seconds",
        "GB beyond model",
        "peak GB",
    ]
    return table(heads, rows, title)


def pythia_pair(
    folder: Annotated[Path, typer.Argument(help="Checkpoints of a Pythia shape.")],
    sequences: Annotated[int, typer.Option(min=1, help="Of 64 tokens, ten of them scored.")] = 8,
    program: Annotated[list[str] | None, typer.Option(help="Only these; repeat.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times each program is run, in turn.")] = 1,
    json_: Annotated[Path | None, typer.Option("--json", help="Result file.")] = None,
) -> None:
    """Time one eigenpair to a relative residual of 1e-2 by every program."""
    found = []
    for _ in range(repeats):
        for name in program or PROGRAMS:
            with get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(measured, (name, folder, sequences)))
            say(f"  {found[-1]}")
    title = f"One Hessian eigenpair, {folder.name} shape, {sequences} sequences of 64 tokens"
    shown = [pair_table(found, title)]
    show(shown)
    if json_ is not None:
        value = {
            "schema": "polca-edit/pythia-pair/1",
            "sequences": sequences,
            "scored": SCORED,
            "versions": versions(),
            "hardware": hardware(),
            "pairs": to_plain(found),
        }
        write_with_tables(json_, value, shown)


if __name__ == "__main__":
    run_application(pythia_pair)
