"""What a reproduction measures with the model at hand: every basis on both splits."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from experiments.run.run import Run
from experiments.study.measured import Say, fingerprints, kept_projections, on_select, projected
from experiments.study.reproduce.rows import Scoring
from polca_edit.allocation.adaptive import adaptive_plan
from polca_edit.allocation.allocate import Projections
from polca_edit.allocation.quadrature import FixedRule, NodeSlopes, fixed_plan, measure_nodes
from polca_edit.basis.build import KINDS
from polca_edit.basis.record import Basis, capture
from polca_edit.checkpoints.series import Checkpoints

ROTATED = ("trajectory_secant", "loss_weighted", "hessian")
#: Bases that get the full number of vectors; the others get ``ReproductionSettings.others``.
MAIN = ("hessian", "shuffled_hessian", "trajectory", "trajectory_secant", "loss_weighted", "random")


@dataclass(frozen=True)
class ReproductionSettings:
    """Sizes of a reproduction.

    Attributes:
        vectors: K of every basis; None for a quarter of the intervals, at most 50.
        others: K of the bases not in ``MAIN``; None for the same.
        kinds: bases.
        rotated: bases whose span is rotated.
        rivals: whether rival features that need derivatives of their own are measured.
        tolerance: of the adaptive quadrature.
        draws: bootstrap samples of each stability.
        rule: quadrature on evaluate, ``adaptive`` or a fixed rule, which takes fewer places.
        tables: rotations, rival features and the table of quadrature rules, besides the bases.
    """

    vectors: int | None = None
    others: int | None = None
    kinds: tuple[str, ...] = tuple(KINDS)
    rotated: tuple[str, ...] = ROTATED
    rivals: bool = True
    tolerance: float = 0.01
    draws: int = 4
    rule: FixedRule | Literal["adaptive"] = "adaptive"
    tables: bool = True

    def vectors_of(self, kind: str, intervals: int) -> int:
        """K of one basis on a series of so many intervals."""
        count = self.vectors or min(50, intervals // 4)
        return count if kind in MAIN or self.others is None else min(count, self.others)


@dataclass(frozen=True)
class Measured:
    """One basis on both splits.

    Attributes:
        basis: its vectors.
        select: projections on select.
        evaluate: projections on evaluate, with quadrature nodes.
        captured: shares of the net displacement and of the path in its span.
        passes: forward passes over the select tokens that building and projecting it took.
    """

    basis: Basis
    select: Projections
    evaluate: Projections
    captured: tuple[float, float]
    passes: float


def scoring_of(run: Run, settings: ReproductionSettings) -> Scoring:
    """How the rows of a run are made."""
    own = run.settings()
    return Scoring(own.clusters, own.breakthrough_delta, run.config.seed, settings.draws)


def measure_bases(
    run: Run, checkpoints: Checkpoints, settings: ReproductionSettings, say: Say
) -> dict[str, Measured]:
    """Build every basis and project it on both splits; the evaluate split gets quadrature nodes too."""
    intervals, tokens = len(checkpoints) - 1, run.task.splits.evaluate
    counts = {kind: settings.vectors_of(kind, intervals) for kind in settings.kinds}
    select = on_select(run, checkpoints, counts, say)
    bases = [own.basis for own in select.values()]
    started = time.perf_counter()
    ends = projected(run, checkpoints, bases, "evaluate")
    if settings.rule == "adaptive":
        plan, _ = adaptive_plan(
            run.objective, checkpoints, tokens, tokens.skills, tolerance=settings.tolerance
        )
    else:
        plan = fixed_plan(settings.rule, intervals)
    places = plan.interval.tolist(), plan.position.tolist()
    evaluate = kept_projections(
        run,
        "study/nodes",
        (fingerprints(bases), tokens.fingerprint(), checkpoints.steps, places),
        len(bases),
        NodeSlopes,
        lambda mapped: measure_nodes(run.objective, checkpoints, bases, tokens, plan, ends, mapped=mapped),
    )
    say(f"  projected on evaluate in {time.perf_counter() - started:.0f} s, {plan.nodes} places")
    return {
        kind: Measured(own.basis, own.projections, other, capture(own.basis, checkpoints), own.passes)
        for (kind, own), other in zip(select.items(), evaluate, strict=True)
    }
