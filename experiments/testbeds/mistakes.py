"""Known mistakes that ``selftest --break NAME`` switches in, and the beds that must notice them.

Every one was made once, by us or in print; each replaces one function of the library by a wrong one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from interventions.causal.evidence import Bench, selectivity_of
from interventions.causal.nulls import SpanPool
from interventions.causal.questions import Answer, Pooled
from interventions.causal.statistics import Array, Bits, Interval, Shares, Units, minimum_detectable, rank_p
from polca_edit.allocation.allocate import Allocation, Projections

Function = Callable[..., Any]


@dataclass(frozen=True)
class Mistake:
    """One wrong function in place of a right one.

    Attributes:
        words: what goes wrong.
        place: dotted name of the function that is replaced.
        wrong: makes the wrong function from the right one.
        beds: beds of which at least one check must fail.
    """

    words: str
    place: str
    wrong: Callable[[Function], Function]
    beds: tuple[str, ...]


def _gradient_only(right: Function) -> Function:
    del right
    return lambda hold, theta: theta


def _by_subtraction(right: Function) -> Function:
    def wrong(projections: Projections, rule: Any = "trapezoid", **more: Any) -> Allocation:
        found: Allocation = right(projections, rule, **more)
        return replace(found, residual=found.exact - found.values.sum(1))

    return wrong


def _flipped(right: Function) -> Function:
    def wrong(place: Any, rows: Any, dose: float, **more: Any) -> Any:
        return right(place, rows, -dose, **more)

    return wrong


def _uncapped(right: Function) -> Function:
    del right
    return lambda change, headroom: np.where(headroom > 0, change, 0.0)


def _capped_as_a_group(right: Function) -> Function:
    def wrong(change: Array, headroom: Array, masks: Bits, units: Units) -> Shares:
        found: Shares = right(change, headroom, masks, units)
        room = np.maximum(found.room, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return replace(found, share=np.where(room > 0, np.minimum(found.damage, room) / room, np.nan))

    return wrong


def _among_maxima(right: Function) -> Function:
    del right

    def wrong(values: Sequence[float], nulls: Sequence[Sequence[float]]) -> float:
        # The null of a maximum over ten directions, for one that was named; runs are pooled, not averaged.
        largest = [max(null[i : i + 10]) for null in nulls for i in range(0, len(null), 10)]
        return rank_p(float(np.mean(values)), largest)

    return wrong


def _rest_of_parent_off_target(right: Function) -> Function:
    def wrong(bench: Bench, members: Bits, parent: str | None) -> dict[str, Bits]:
        groups: dict[str, Bits] = right(bench, members, parent)
        if parent is not None and (bench.parents[parent] & ~members).any():
            groups["rest of its parent"] = bench.parents[parent] & ~members
        return groups

    return wrong


def _unmatched(right: Function) -> Function:
    del right

    def wrong(pool: SpanPool, level: float) -> list[Array]:
        del level
        return [np.asarray(curve.changes[0]) for curves in pool.curves for curve in curves]

    return wrong


def _gated_by_its_own_error(right: Function) -> Function:
    def wrong(found: Pooled) -> Answer:
        seen: Answer = right(found)
        return "unclear" if minimum_detectable(found.damage.error) > found.delta else seen

    return wrong


def _percentiles_over_runs(right: Function) -> Function:
    del right

    def wrong(values: Sequence[float]) -> Interval:
        v = np.asarray(values)
        drawn = np.random.default_rng(0).integers(0, len(v), (200, len(v)))
        low, high = np.percentile(v[drawn].mean(1), [2.5, 97.5])
        return Interval(float(v.mean()), float(low), float(high), len(v))

    return wrong


def _tokens_as_units(right: Function) -> Function:
    def wrong(documents: Any, resamples: int, seed: int) -> Units:
        units: Units = right(np.arange(len(documents)), resamples, seed)
        return units

    return wrong


def _label_shuffle(right: Function) -> Function:
    def wrong(
        bench: Bench, pair: Any, change: Array, members: Bits, others: Mapping[str, Bits]
    ) -> tuple[float, tuple[float, ...]]:
        own, _ = right(bench, pair, change, members, others)
        rng, room = np.random.default_rng(0), bench.headroom
        shuffled = [rng.permutation(members) for _ in range(99)]
        return own, tuple(selectivity_of(change, room, mask, {"rest": ~mask}) for mask in shuffled)

    return wrong


def _no_rotated_bases(right: Function) -> Function:
    del right
    return lambda *given: [float("-inf")] * 19


EVIDENCE, QUESTIONS = "interventions.causal.evidence", "interventions.causal.questions"
MISTAKES: dict[str, Mistake] = {
    "gradient_only_blocking": Mistake(
        "blocking takes the direction out of the momentum but never puts the weights back",
        "interventions.blocking.Hold.put_back",
        _gradient_only,
        ("T10", "T8"),
    ),
    "residual_by_subtraction": Mistake(
        "the residual is what is left over, so no quadrature error can ever be seen",
        "polca_edit.allocation.allocate.allocate",
        _by_subtraction,
        ("T2",),
    ),
    "flipped_sign": Mistake(
        "undoing a movement moves on instead of back",
        "interventions.edits.reverse",
        _flipped,
        ("T10", "T1"),
    ),
    "uncapped_shares": Mistake(
        "shares are not capped, so blowing a token up counts as losing more than was learned",
        "interventions.causal.statistics.capped",
        _uncapped,
        ("T10",),
    ),
    "group_level_cap": Mistake(
        "the mean damage of a group is capped instead of each token's, so both sides saturate",
        f"{EVIDENCE}.shares_of",
        _capped_as_a_group,
        ("T10",),
    ),
    "rank_among_maxima": Mistake(
        "a named pair is ranked among the maxima of rotated bases, so power does not rise with runs",
        f"{QUESTIONS}.rank_p_over_runs",
        _among_maxima,
        ("T10",),
    ),
    "same_parent_off_target": Mistake(
        "tokens of the same skill outside the group count as off target",
        f"{EVIDENCE}.Bench.off_target",
        _rest_of_parent_off_target,
        ("T1",),
    ),
    "unmatched_dose": Mistake(
        "directions of the span are compared at whatever damage they happen to do",
        "interventions.causal.nulls.SpanPool.matched",
        _unmatched,
        ("T10",),
    ),
    "power_gate": Mistake(
        "an effect fails for too small a sample by its own standard error, however large it is",
        f"{QUESTIONS}.needed",
        _gated_by_its_own_error,
        ("T10", "T8"),
    ),
    "percentiles_over_runs": Mistake(
        "a percentile bootstrap over two to five runs stands for an interval",
        f"{QUESTIONS}.t_interval",
        _percentiles_over_runs,
        ("T10",),
    ),
    "tokens_as_units": Mistake(
        "tokens are resampled instead of documents",
        "interventions.causal.test.draw_units",
        _tokens_as_units,
        ("T10",),
    ),
    "label_shuffle_null": Mistake(
        "shuffled labels are the null of a selective edit",
        f"{EVIDENCE}._selectivity",
        _label_shuffle,
        ("T7",),
    ),
    "no_rotated_bases": Mistake(
        "permuted clusters alone decide whether the clustered tokens are the ones hurt",
        "interventions.causal.bases._rotated",
        _no_rotated_bases,
        ("T7",),
    ),
}


@contextmanager
def switched_in(name: str | None) -> Iterator[None]:
    """Within the block the named mistake is made; None makes none.

    Raises:
        ValueError: for an unknown name.
    """
    if name is None:
        yield
        return
    if name not in MISTAKES:
        raise ValueError(f"--break must be one of {sorted(MISTAKES)}, got '{name}'")
    mistake = MISTAKES[name]
    owner_name, _, attribute = mistake.place.rpartition(".")
    owner = _resolve(owner_name)
    right = getattr(owner, attribute)
    setattr(owner, attribute, mistake.wrong(right))
    try:
        yield
    finally:
        setattr(owner, attribute, right)


def _resolve(dotted: str) -> ModuleType | type:
    """The module of that name, or the class in one."""
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        module, _, attribute = dotted.rpartition(".")
        found: type = getattr(importlib.import_module(module), attribute)
        return found
