"""Signatures: what many random partial undo edits do to every token, and what windows of training do to it.

A partial undo edit takes back a random share of the movement along a random half of a basis's vectors.
Nothing but recorded movement is taken back, so a signature says what each token owes to which movement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor

from interventions.causal.statistics import Array
from interventions.damage import EvaluatedSplit
from interventions.discovery.windows import Window, equal_windows
from interventions.edits import Edit, Movement, displace, rollback
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.lanczos import exact_length
from polca_edit.seeds import generator_for

#: Pairs of tokens whose distances are compared between halves of the edits.
PAIRS = 20_000


@dataclass(frozen=True)
class EditSettings:
    """Which edits are drawn, and how many.

    Attributes:
        undone: share of the vectors that an edit undoes, each by a dose drawn from 0 to 1.
        batch: edits a basis that are added at a time.
        most: edits a basis at the most.
        stable: agreement of two halves of the edits at which no more are drawn.
        pieces: equal pieces of training; every contiguous run of them is one window. 0: no windows.
        scale: damage below which the signed logarithm is linear, nats.
        components: principal components of the embedding.
        seed: of every draw.
    """

    undone: float = 0.5
    batch: int = 40
    most: int = 160
    stable: float = 0.95
    pieces: int = 10
    scale: float = 0.01
    components: int = 12
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Signatures:
    """Damage of every token under many edits.

    Attributes:
        changes: (E, M) under partial undo edits, nats.
        sources: (E,) name of the basis that each edit is of.
        windows: (P, M) with every contiguous window of training undone, nats.
        spans: (P,) those windows.
        headroom: (M,) nats.
        stability: (edits a basis, agreement of two halves of the edits) as they were added.
    """

    changes: NDArray[np.float64]
    sources: tuple[str, ...]
    windows: NDArray[np.float64]
    spans: tuple[Window, ...]
    headroom: Array
    stability: tuple[tuple[int, float], ...]

    def joined(self, other: Signatures) -> Signatures:
        """The edits of two bases side by side, on the same tokens; windows and stability of the first."""
        return Signatures(
            np.concatenate([self.changes, other.changes]),
            (*self.sources, *other.sources),
            self.windows,
            self.spans,
            self.headroom,
            self.stability,
        )


def partial_undo_edits(
    split: EvaluatedSplit, basis: Basis, count: int, generator: torch.Generator, *, undone: float = 0.5
) -> Iterator[Edit]:
    """Random partial undo edits of a basis: doses and subsets drawn.

    Args:
        split: whose movement is undone.
        basis: K rows.
        count: edits.
        generator: of the draws.
        undone: chance of each vector to be in an edit.
    """
    along = split.movement.along(basis.rows)
    for _ in range(count):
        dose = torch.rand(len(along), generator=generator, dtype=torch.float64)
        chosen = torch.rand(len(along), generator=generator, dtype=torch.float64) < undone
        yield displace(split, basis, -(dose * chosen * along), "partial_undo")


def window_changes(
    split: EvaluatedSplit, pieces: int, series: Checkpoints | None = None
) -> tuple[tuple[Window, ...], NDArray[np.float64]]:
    """Damage of every contiguous window of training undone whole; two checkpoints are held at a time.

    Args:
        split: final model and tokens.
        pieces: equal pieces of training.
        series: whose intervals they are cut from; default the split's own.
    """
    series = split.series if series is None else series
    at = series.steps.index
    cuts = equal_windows(series.steps, pieces) if pieces else []
    spans = [Window(a.start, b.end) for i, a in enumerate(cuts) for b in cuts[i:]]
    edits = (rollback(Movement(split.theta, series[at(span.start)], series[at(span.end)])) for span in spans)
    return tuple(spans), np.asarray(split.changes(edits).numpy())


def signatures(
    split: EvaluatedSplit, bases: Mapping[str, Basis], settings: EditSettings | None = None
) -> Signatures:
    """Draw partial undo edits of every basis until two halves of them agree.

    Args:
        split: tokens of the exploration (select).
        bases: name -> basis; each gets as many edits.
        settings: of the draws.

    Raises:
        ValueError: without a basis that holds movement.
    """
    settings = settings or EditSettings()
    if not bases:
        raise ValueError("signatures need a basis whose movement is undone, got none; give one or more")
    for name, basis in bases.items():
        moved = exact_length(split.movement.displacement)
        if not float(split.movement.along(basis.rows).norm()) > 1e-9 * moved:
            raise ValueError(f"basis '{name}' holds none of the recorded movement; take another")
    draws = {name: generator_for(settings.seed, "partial_undo", name) for name in bases}
    found: dict[str, list[Tensor]] = {name: [] for name in bases}
    stability: list[tuple[int, float]] = []
    while not stability or (stability[-1][1] < settings.stable and stability[-1][0] < settings.most):
        done = stability[-1][0] if stability else 0
        batch = min(settings.batch, settings.most - done)
        for name, basis in bases.items():
            edits = partial_undo_edits(split, basis, batch, draws[name], undone=settings.undone)
            found[name].append(split.changes(edits))
        tables = [torch.cat(parts).numpy() for parts in found.values()]
        stability.append((done + batch, halves_agree(tables, settings)))
    spans, windows = window_changes(split, settings.pieces)
    return Signatures(
        np.concatenate([torch.cat(parts).numpy() for parts in found.values()]),
        tuple(name for name, parts in found.items() for _ in range(sum(map(len, parts)))),
        windows,
        spans,
        split.headroom.double().numpy(),
        tuple(stability),
    )


def signed_log(changes: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """Sign(D) log(1 + |D| / scale): linear near zero, so that small and large damage both count.

    >>> signed_log(np.array([[0.0, 1.0, -1.0]]), 1.0).round(3).tolist()
    [[0.0, 0.693, -0.693]]
    """
    return np.asarray(np.sign(changes) * np.log1p(np.abs(changes) / scale))


def standardised(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows with mean zero and standard deviation one; a constant row becomes zeros."""
    centred = table - table.mean(1, keepdims=True)
    return np.asarray(centred / np.maximum(centred.std(1, keepdims=True), 1e-9))


def embedded(changes: NDArray[np.float64], settings: EditSettings) -> Float[np.ndarray, "M d"]:
    """Tokens in the leading components of their standardised signatures."""
    table = standardised(signed_log(changes, settings.scale).T)
    count = min(settings.components, *table.shape)
    return np.asarray(PCA(count, random_state=0).fit_transform(table))


def halves_agree(tables: list[NDArray[np.float64]], settings: EditSettings) -> float:
    """Correlation of token distances between the even and the odd edits of every basis."""
    halves = [embedded(np.concatenate([t[side::2] for t in tables]), settings) for side in (0, 1)]
    generator = np.random.default_rng(settings.seed)
    one, two = generator.integers(0, len(halves[0]), size=(2, PAIRS))
    apart = [np.linalg.norm(half[one] - half[two], axis=1) for half in halves]
    if min(float(a.std()) for a in apart) == 0:
        return 0.0
    return float(np.corrcoef(*apart)[0, 1])
