"""Every removal method with its eight settings, the choice on select, and one result format.

A method is a list of settings and a function (problem, setting, steps) -> movement. Settings are
tried with ``trial_steps`` each, the best on select is run again with ``steps``; methods without
steps are run once per setting. The winner is scaled on select to the smallest dose that reaches
the goal, which puts all methods at matched target damage.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

from experiments.removal import single
from experiments.removal.bed import Bed
from experiments.removal.found import Choice, Effort, Found, Tried, Work, scaled, tried
from interventions.removal import rivals
from interventions.removal.optimise import Fit, FitSettings, constrained
from interventions.removal.problem import RemovalProblem
from interventions.removal.spans import BLOCK, LEADING, Span, random_like, rotated_within, span_of_rows
from polca_edit.seeds import generator_for

Iterative = Callable[[RemovalProblem, FitSettings, int], Fit]
OUR_METHODS = (
    "span optimised",
    "tensor span optimised",
    "16 vectors optimised",
    "single vector",
    "greedy set",
    "closed form",
)
RIVALS = (
    "random span",
    "rotated span",
    "gradient ascent",
    "GradDiff",
    "NPO",
    "task vector",
    "weight rewind",
    "layer rollback",
    "activation ablation",
    "retrained without",
)


def settings_of(method: str) -> list[FitSettings]:
    """The eight settings of an iterative method."""
    spans = {
        # Of 0.004, 0.01 and 0.02 the smallest left the others half as damaged on select (recorded rows).
        "span optimised": (0.003, 0.004),
        "tensor span optimised": (0.01, 0.02),
        "16 vectors optimised": (0.03, 0.1),
        "random span": (0.006, 0.01),
        "rotated span": (0.003, 0.004),
    }
    grids: dict[str, tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]] = {
        # learning rate, retain, confusion, strength
        "gradient ascent": ((3e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 4e-3), (0.0,), (0.0,), (1.0,)),
        "GradDiff": ((3e-4, 1e-3), (1.0, 5.0), (0.0,), (0.3, 1.0)),
        "NPO": ((3e-4, 1e-3), (0.0, 3.0), (0.0,), (0.1, 0.5)),
        "task vector": ((1e-4, 5e-4), (0.0,), (0.0,), (0.5, 1.0, 2.0, 4.0)),
    }
    grid = (spans[method], (10.0, 25.0), (6.0, 12.0), (1.0,)) if method in spans else grids[method]
    return [FitSettings(*values) for values in itertools.product(*grid)]


def iterative_methods(bed: Bed) -> dict[str, tuple[Iterative, int]]:
    """Iterative methods with the rank they search."""
    recorded = bed.span(block=BLOCK, per_block=LEADING)
    generator = generator_for(bed.seed, "removal spans")
    small = span_of_rows(bed.vectors.rows[: bed.settings.trajectory_vectors], "trajectory vectors")
    randomised = random_like(recorded, generator)
    rotated = rotated_within(recorded, bed.span(block=BLOCK), generator)

    def inside(span: Span) -> tuple[Iterative, int]:
        return lambda problem, setting, steps: constrained(problem, span, setting, steps), span.rank

    size = bed.space.size
    return {
        "span optimised": inside(recorded),
        "tensor span optimised": inside(bed.span()),
        "16 vectors optimised": inside(small),
        "random span": inside(randomised),
        "rotated span": inside(rotated),
        "gradient ascent": (rivals.gradient_ascent, size),
        "GradDiff": (rivals.grad_diff, size),
        "NPO": (rivals.npo, size),
        "task vector": (rivals.task_vector, size),
    }


def iterative(problem: RemovalProblem, method: str, run: Iterative, rank: int, effort: Effort) -> Found:
    """Try eight settings briefly, run the best one in full."""
    work, small = Work.on(problem), problem.on_first(effort.search_sums)
    log = []
    for setting in settings_of(method):
        trial = run(problem, setting, effort.trial_steps)
        shares = small.select.shares_at(problem.theta + trial.delta)
        log.append(tried(asdict(setting), shares, problem))
    finals = []
    for setting in finalists(method, log):
        final = run(problem, setting, effort.steps)
        shares = problem.select.shares_at(problem.theta + final.delta)
        log.append(tried(asdict(setting), shares, problem, final=True))
        finals.append((log[-1].score, final.delta, setting))
    _, delta, setting = min(finals, key=lambda found: found[0])
    return scaled(problem, method, Choice(asdict(setting), delta, tuple(log), rank), work)


def finalists(method: str, log: Sequence[Tried]) -> list[FitSettings]:
    """The best setting tried; for rivals with a retain term also the best that retains, without a stop.

    Eight trial steps cannot tell whether a rival should stop at the goal or go on repairing what it
    broke, so both are run in full and the better one on select is kept.
    """
    settings = settings_of(method)
    best = settings[min(range(len(log)), key=lambda i: log[i].score)]
    if method not in ("GradDiff", "NPO"):
        return [best]
    most = max(setting.retain for setting in settings)
    keeping = [i for i, setting in enumerate(settings) if setting.retain == most]
    on = settings[min(keeping, key=lambda i: log[i].score)]
    return [best, replace(on, stop=False)]


#: Methods without optimiser steps in the loop: (problem, bed, effort) -> what they found.
DIRECT: dict[str, Callable[[RemovalProblem, Bed, Effort], Found]] = {
    "single vector": single.single_vector,
    "greedy set": single.greedy,
    "closed form": single.from_curvature,
    "weight rewind": single.weight_rewind,
    "layer rollback": single.layer_rollback,
    "activation ablation": single.activation_ablation,
    "retrained without": single.retrained,
}


def run_method(
    method: str,
    problem: RemovalProblem,
    bed: Bed,
    effort: Effort,
    known: Mapping[str, tuple[Iterative, int]] | None = None,
) -> Found:
    """One method on one problem.

    Args:
        method: name.
        problem: what to remove.
        bed: the model it is stated on.
        effort: passes.
        known: iterative methods of this bed, if they are built already.

    Raises:
        ValueError: for an unknown method.
    """
    if method in DIRECT:
        return DIRECT[method](problem, bed, effort)
    known = iterative_methods(bed) if known is None else known
    if method not in known:
        raise ValueError(f"a method must be one of {OUR_METHODS + RIVALS}, got '{method}'")
    run, rank = known[method]
    return iterative(problem, method, run, rank, effort)
