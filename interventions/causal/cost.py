"""What a causal test will cost, known before the unseen tokens are opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from interventions.causal.settings import TestSettings
from interventions.controls import ROOM
from polca_edit.clusters.hypotheses import Hypothesis

#: Doses measured per direction of a span, on average (a curve ends where its damage is large enough).
DOSES = 6


@dataclass(frozen=True)
class Cost:
    """Forward passes of one basis of one run.

    Attributes:
        directions: on the null's documents, for directions of the span.
        random: on them, for random edits and transplants.
        observed: on them, for the axes of rotated bases that are observed anew.
        effects: on all unseen tokens, for the edits themselves.
    """

    directions: int
    random: int
    observed: int
    effects: int

    def sequences(self, null_sequences: int, sequences: int) -> int:
        """Sequences through the model, from those of the null's documents and of all unseen tokens."""
        return (self.directions + self.random + self.observed) * null_sequences + self.effects * sequences


def causal_cost(hypotheses: Sequence[Hypothesis], settings: TestSettings) -> Cost:
    """Forward passes of :func:`~interventions.causal.test.measure_run`; directions are an estimate.

    Args:
        hypotheses: pairs.
        settings: draws.
    """
    spans = {pair.basis: len(pair.span) for pair in hypotheses if pair.span is not None}
    rotated = {name: size for name, size in spans.items() if size >= 1 + ROOM}
    movements = {(pair.basis, pair.vectors or pair.name) for pair in hypotheses}
    inserted = len(movements) if settings.transplants else 0
    own = {
        name
        for name in spans
        if len({p.vectors for p in hypotheses if p.basis == name and p.family == "polca"}) >= 3
    }
    return Cost(
        sum(rotated.values()) * settings.rotations * DOSES,
        len(movements) * settings.random_draws + inserted * settings.transplants,
        sum(spans[name] for name in own) * settings.observed_rotations,
        # Undone, inserted, put back halfway; every vector of a basis is undone for A and P.
        len(movements) + inserted + sum(spans.values()),
    )
