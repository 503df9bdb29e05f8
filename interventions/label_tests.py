"""A user's label against a cluster: how well it describes it, and which of the two the effect follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from interventions.evidence import Bench
from interventions.statistics import Array, Bits, Draws, Interval


@dataclass(frozen=True)
class LabelTest:
    """Agreement of a label and a cluster, and the damage on their four overlaps.

    Attributes:
        precision: share of the cluster's tokens with the label.
        recall: share of the label's tokens in the cluster.
        lift: precision over the label's base rate.
        damage: ``both``, ``label only``, ``cluster only``, ``neither`` -> damage, nats (absent where empty).
        difference: damage of label-only tokens minus cluster-only tokens, nats; None where one is empty.
        follows: what the effect follows; ``same tokens`` where the two cannot be told apart.
        description: the same in words.
    """

    precision: float
    recall: float
    lift: float
    damage: dict[str, Interval]
    difference: Interval | None
    follows: Literal["label", "cluster", "neither", "undecided", "same tokens"]
    description: str


def label_test(
    bench: Bench, change: Array, cluster: Bits, label: Bits, *, name: str, smallest: int = 10
) -> LabelTest:
    """Does undoing a movement hurt the label's tokens or the cluster's, where they differ?

    Args:
        bench: the split.
        change: (M,) damage of the edit, nats.
        cluster: (M,) cluster by its membership rule.
        label: (M,) the user's label.
        name: of the label.
        smallest: tokens an overlap must have to be compared.

    Raises:
        ValueError: for a label that does not have one value per token, or no token.
    """
    if label.shape != cluster.shape:
        raise ValueError(
            f"a label needs one value per scored token, {len(cluster)}, got {len(label)}; label this split"
        )
    if not label.any() or not cluster.any():
        raise ValueError(
            f"label '{name}' and cluster must each hold a token, got {label.sum()} and {cluster.sum()}"
        )
    both = label & cluster
    precision, recall = both.sum() / cluster.sum(), both.sum() / label.sum()
    sets = {
        "both": both,
        "label only": label & ~cluster,
        "cluster only": cluster & ~label,
        "neither": ~label & ~cluster,
    }
    draws = {key: bench.mean(change, mask) for key, mask in sets.items() if mask.sum() >= smallest}
    difference = None
    follows: Literal["label", "cluster", "neither", "undecided", "same tokens"] = "same tokens"
    if "label only" in draws and "cluster only" in draws:
        a, b = draws["label only"], draws["cluster only"]
        difference = Draws(a.estimate - b.estimate, a.draws - b.draws).interval()
        follows = "label" if difference.low > 0 else "cluster" if difference.high < 0 else "undecided"
    elif "label only" in draws or "cluster only" in draws:
        follows = _against_neither(draws)
    words = {
        "label": "where they differ, the damage follows the label",
        "cluster": "where they differ, the damage follows the cluster",
        "neither": "tokens outside both are hurt as much",
        "undecided": "where they differ, the damage does not tell them apart",
        "same tokens": "label and cluster hold nearly the same tokens",
    }
    description = (
        f"'{name}' covers {100 * precision:.0f} % of the cluster and {100 * recall:.0f} % of its own tokens "
        f"are in it; {words[follows]}."
    )
    return LabelTest(
        float(precision),
        float(recall),
        float(precision / label.mean()),
        {key: value.interval() for key, value in draws.items()},
        difference,
        follows,
        description,
    )


def _against_neither(draws: dict[str, Draws]) -> Literal["label", "cluster", "neither", "undecided"]:
    """One contains the other: is the wider one's extra part hurt more than tokens outside both?"""
    wider = "label only" if "label only" in draws else "cluster only"
    narrower: Literal["label", "cluster"] = "cluster" if wider == "label only" else "label"
    if "both" not in draws:
        return "undecided"
    gap = Draws(draws["both"].estimate - draws[wider].estimate, draws["both"].draws - draws[wider].draws)
    if gap.interval().low > 0:
        return (
            narrower  # the extra tokens of the wider set are hurt less: the narrower set carries the effect
        )
    if "neither" not in draws:
        return "undecided"
    out = Draws(
        draws[wider].estimate - draws["neither"].estimate, draws[wider].draws - draws["neither"].draws
    )
    if out.interval().low > 0:
        return "label" if wider == "label only" else "cluster"
    return "neither" if np.isfinite(out.estimate) and out.interval().high <= 0 else "undecided"
