"""Every removal method with its eight settings, the choice on select, and one result format.

A method is a list of settings and a function (problem, setting, steps) -> movement. Settings are
tried with ``trial_steps`` each, the best on select is run again with ``steps``; methods without
steps are run once per setting. The winner is scaled on select to the smallest dose that reaches
the goal, which puts all methods at matched target damage.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.removal.bed import Bed, arithmetic_logits, retrain_without
from interventions.removal import rivals
from interventions.removal.optimise import Fit, FitSettings, constrained
from interventions.removal.problem import RemovalProblem, Shares, score, select_shares, shares_of
from interventions.removal.searches import DOSE_MARGIN, best_single, closed_form, greedy_set, match_dose
from interventions.removal.spans import BLOCK, LEADING, Span, random_like, rotated_within, span_of_rows
from polca_edit.models import cached_activations, replaced_activations


@dataclass(frozen=True)
class Effort:
    """Passes every iterative method gets.

    Attributes:
        trial_steps: optimiser steps of each of the eight settings.
        steps: optimiser steps of the chosen setting.
        search_sums: select sums that forward-only searches use.
    """

    trial_steps: int = 8
    steps: int = 320
    search_sums: int = 200


@dataclass(frozen=True)
class Found:
    """What a method ended with.

    Attributes:
        method: name.
        ours: whether it is an edit of this project.
        delta: (N,) movement at the chosen dose, None where no weight moves.
        rank: coordinates that were free.
        dose: chosen on select.
        setting: chosen on select.
        log: every setting tried, with its select shares.
        seconds: all settings, the final fit and the dose.
        passes: sequences through the model.
        logits: how to predict without a weight edit (activation ablation), else None.
    """

    method: str
    ours: bool
    delta: Float[Tensor, " N"] | None
    rank: int
    dose: float
    setting: dict[str, Any]
    log: list[dict[str, Any]]
    seconds: float
    passes: float
    logits: Callable[[Any], Tensor] | None = None


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


def methods_for(bed: Bed) -> dict[str, tuple[Iterative, int]]:
    """Iterative methods with the rank they search."""
    recorded = bed.span(block=BLOCK, per_block=LEADING)
    generator = torch.Generator().manual_seed(bed.seed + 4242)
    small = span_of_rows(bed.vectors[: bed.settings.trajectory_vectors], "trajectory vectors")
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


def _entry(setting: dict[str, Any], shares: Shares, problem: RemovalProblem) -> dict[str, Any]:
    return {
        **setting,
        "target_share": shares.target,
        "worst_off_share": shares.worst_off,
        "worst_positive_share": shares.worst_positive,
        "score": score(shares, problem.limits),
    }


def _finish(
    problem: RemovalProblem,
    method: str,
    delta: Tensor,
    rank: int,
    setting: dict[str, Any],
    log: list[dict[str, Any]],
    began: float,
    passes: float,
    *,
    matched: bool = True,
) -> Found:
    dose = match_dose(problem, delta, problem.limits.target + DOSE_MARGIN)[0] if matched else 1.0
    return Found(
        method,
        method in OUR_METHODS,
        dose * delta,
        rank,
        dose,
        setting,
        log,
        time.perf_counter() - began,
        problem.predictor.passes - passes,
    )


def iterative(problem: RemovalProblem, method: str, run: Iterative, rank: int, effort: Effort) -> Found:
    """Try eight settings briefly, run the best one in full."""
    began, passes = time.perf_counter(), problem.predictor.passes
    small = _searching(problem, effort)
    log = []
    for setting in settings_of(method):
        trial = run(problem, setting, effort.trial_steps)
        log.append(_entry(asdict(setting), select_shares(small, problem.theta + trial.delta), problem))
    finals = []
    for setting in finalists(method, log):
        final = run(problem, setting, effort.steps)
        entry = _entry(asdict(setting), select_shares(problem, problem.theta + final.delta), problem)
        log.append({"final": True, **entry})
        finals.append((entry["score"], final.delta, setting))
    _, delta, setting = min(finals, key=lambda found: found[0])
    return _finish(problem, method, delta, rank, asdict(setting), log, began, passes)


def finalists(method: str, log: Sequence[dict[str, Any]]) -> list[FitSettings]:
    """The best setting tried; for rivals with a retain term also the best that retains, without a stop.

    Eight trial steps cannot tell whether a rival should stop at the goal or go on repairing what it
    broke, so both are run in full and the better one on select is kept.
    """
    settings = settings_of(method)
    best = settings[min(range(len(log)), key=lambda i: float(log[i]["score"]))]
    if method not in ("GradDiff", "NPO"):
        return [best]
    most = max(setting.retain for setting in settings)
    keeping = [i for i, setting in enumerate(settings) if setting.retain == most]
    on = settings[min(keeping, key=lambda i: float(log[i]["score"]))]
    return [best, replace(on, stop=False)]


def _searching(problem: RemovalProblem, effort: Effort) -> RemovalProblem:
    """The same problem on the first part of select, where many candidates are compared."""
    rows = torch.arange(min(effort.search_sums, problem.select.sequences))
    return replace(problem, select=problem.select.select(rows))


def searches(problem: RemovalProblem, bed: Bed, effort: Effort, method: str) -> Found:
    """Single vectors, greedy sets and the closed form, on the bed's stored vectors."""
    began, passes = time.perf_counter(), problem.predictor.passes
    small, rows = _searching(problem, effort), bed.vectors
    # Dose 1 of a vector is the shift that its curvature says would cost one headroom.
    target = bed.curvature.hessians[problem.target_groups].mean(0).diagonal()
    scales = (
        (2 * float(problem.headroom[problem.target_groups].mean()) / target.abs().clamp_min(0.1))
        .sqrt()
        .clamp(max=2)
    )
    log: list[dict[str, Any]] = []
    if method == "single vector":
        index, shift, shares = best_single(small, rows, scales.tolist())
        delta, rank = shift * rows[index], 1
        setting: dict[str, Any] = {"vector": index, "shift": shift}
        log.append({"tried": len(rows) * 8, **_entry(setting, shares, small)})
    elif method == "greedy set":
        z, shares = greedy_set(small, rows, scales.tolist(), most=3)
        chosen = z.nonzero()[:, 0].tolist()
        delta, rank, setting = z @ rows, len(chosen), {"vectors": chosen}
        log.append({"tried": len(rows) * 4 * 3, **_entry(setting, shares, small)})
    else:
        best: tuple[float, Tensor, dict[str, Any]] | None = None
        for ridge in (1e-4, 1e-2):
            found = closed_form(bed.curvature, problem.rule.targets, problem.headroom, ridge=ridge)
            for number, direction in enumerate(found):
                for sign in (-1.0, 1.0):
                    delta = sign * (direction.to(rows) @ rows)
                    dose, shares = match_dose(
                        small, delta, problem.limits.target + DOSE_MARGIN, largest=3.0, evaluations=5
                    )
                    setting = {"ridge": ridge, "direction": number, "sign": sign, "dose": dose}
                    log.append(_entry(setting, shares, small))
                    if best is None or log[-1]["score"] < best[0]:
                        best = log[-1]["score"], dose * delta, setting
        if best is None:
            raise ValueError(
                "the closed form found no direction with positive target curvature; use another basis"
            )
        delta, rank, setting = best[1], len(rows), best[2]
    return _finish(problem, method, delta, rank, setting, log, began, passes)


def weight_rewind(problem: RemovalProblem) -> Found:
    """Fisher ratio, magnitude, movement times gradient; four shares each."""
    began, passes = time.perf_counter(), problem.predictor.passes
    found = rivals.importance(problem, 24)
    log: list[dict[str, Any]] = []
    best: tuple[float, Tensor, dict[str, Any]] = (float("inf"), torch.zeros_like(problem.theta), {})
    for rule in rivals.RULES:
        for share in (0.001, 0.01, 0.05, 0.2):
            delta = rivals.rewind_weights(problem, found, rule, share)
            shares = select_shares(problem, problem.theta + delta)
            setting: dict[str, Any] = {"rule": rule, "share": share}
            log.append(_entry(setting, shares, problem))
            if log[-1]["score"] < best[0]:
                best = log[-1]["score"], delta, setting
    rank = int((best[1] != 0).sum())
    return _finish(problem, "weight rewind", best[1], rank, best[2], log, began, passes)


def layer_rollback(problem: RemovalProblem) -> Found:
    """Every attention block, MLP and embedding put back, whole or half."""
    began, passes = time.perf_counter(), problem.predictor.passes
    names = problem.predictor.space.names
    parts = sorted({".".join(n.split(".")[:3]) if n.startswith("blocks") else n.split(".")[0] for n in names})
    log: list[dict[str, Any]] = []
    best: tuple[float, Tensor, dict[str, Any]] = (float("inf"), torch.zeros_like(problem.theta), {})
    for part, dose in itertools.product(parts, (0.5, 1.0)):
        delta = dose * rivals.rewind_part(problem, [f"{part}.*"])
        shares = select_shares(problem, problem.theta + delta)
        setting: dict[str, Any] = {"part": part, "dose": dose}
        log.append(_entry(setting, shares, problem))
        if log[-1]["score"] < best[0]:
            best = log[-1]["score"], delta, setting
    return _finish(problem, "layer rollback", best[1], int((best[1] != 0).sum()), best[2], log, began, passes)


def activation_ablation(problem: RemovalProblem) -> Found:
    """Mean ablation of one head or MLP at the skill's positions, through TransformerLens hooks."""
    began, passes = time.perf_counter(), problem.predictor.passes
    predictor, module = problem.predictor, problem.predictor.module
    places = sorted({g // 2 for g in problem.target_groups})
    slots = [7 + place for place in places]
    layers = sorted({int(n.split(".")[1]) for n in predictor.space.names if n.startswith("blocks")})
    heads = int(module.shape.heads)  # type: ignore[union-attr, arg-type]
    hooks: list[tuple[str, int | None]] = [
        (f"blocks.{i}.attn.hook_z", h) for i in layers for h in range(heads)
    ]
    hooks += [
        (f"blocks.{i}.hook_{kind}", None) for i in layers for kind in ("mlp_out", "attn_out", "resid_post")
    ]
    before = problem.select_logits
    log: list[dict[str, Any]] = []
    best: tuple[float, rivals.ActivationAblation | None, dict[str, Any]] = (float("inf"), None, {})

    def predict(ablation: rivals.ActivationAblation, tokens: Any) -> Tensor:
        predictor.passes += tokens.sequences
        with (
            torch.no_grad(),
            predictor.space.substituted(module, problem.theta),
            replaced_activations(module, {ablation.hook: ablation.function()}),
        ):
            return arithmetic_logits(module, tokens.inputs)[tokens.scored]

    with predictor.space.substituted(module, problem.theta):
        cached = cached_activations(module, problem.select.inputs[:, :-1], sorted({h for h, _ in hooks}))
    for hook, head in hooks:
        ablation = rivals.mean_activation(cached, hook, slots, head)
        shares = shares_of(
            before,
            predict(ablation, problem.select),
            problem.select.output_of,
            problem.select_groups,
            problem.headroom,
            problem.rule.targets,
        )
        setting: dict[str, Any] = {"hook": hook, "head": head}
        log.append(_entry(setting, shares, problem))
        if log[-1]["score"] < best[0]:
            best = log[-1]["score"], ablation, setting
    chosen = best[1]
    assert chosen is not None
    return Found(
        "activation ablation",
        False,
        None,
        int(chosen.values.numel()),
        1.0,
        best[2],
        log,
        time.perf_counter() - began,
        predictor.passes - passes,
        lambda tokens: predict(chosen, tokens),
    )


def retrained(problem: RemovalProblem, bed: Bed) -> Found:
    """The gold standard; not tuned and not scaled."""
    began = time.perf_counter()
    delta = retrain_without(bed, problem.rule) - problem.theta
    steps = bed.settings.training.steps
    log = [_entry({"steps": steps}, select_shares(problem, problem.theta + delta), problem)]
    return replace(
        _finish(
            problem,
            "retrained without",
            delta,
            delta.numel(),
            {"steps": steps},
            log,
            began,
            0.0,
            matched=False,
        ),
        passes=3.0 * steps * bed.settings.batch_size,
    )


def run_method(
    method: str,
    problem: RemovalProblem,
    bed: Bed,
    effort: Effort,
    known: dict[str, tuple[Iterative, int]] | None = None,
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
    if method in ("single vector", "greedy set", "closed form"):
        return searches(problem, bed, effort, method)
    if method == "weight rewind":
        return weight_rewind(problem)
    if method == "layer rollback":
        return layer_rollback(problem)
    if method == "activation ablation":
        return activation_ablation(problem)
    if method == "retrained without":
        return retrained(problem, bed)
    known = methods_for(bed) if known is None else known
    if method not in known:
        raise ValueError(f"a method must be one of {OUR_METHODS + RIVALS}, got '{method}'")
    run, rank = known[method]
    return iterative(problem, method, run, rank, effort)
