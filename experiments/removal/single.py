"""Removal methods without an optimiser in the loop: vectors, closed form, rewinds, ablation, retraining."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.removal.bed import Bed, retrain_without
from experiments.removal.found import Choice, Effort, Found, Setting, Tried, Work, best_of, scaled, tried
from experiments.tasks.arithmetic import output_logits
from interventions.removal import rivals
from interventions.removal.grouped import Shares
from interventions.removal.problem import RemovalProblem
from interventions.removal.searches import DOSE_MARGIN, best_single, closed_form, greedy_set, match_dose
from polca_edit.models import cached_activations, replaced_activations
from polca_edit.tokens import TokenSet


def _scales(problem: RemovalProblem, bed: Bed) -> list[float]:
    """Per vector the shift that its curvature says would cost one headroom."""
    target = bed.curvature.hessians[problem.target_groups].mean(0).diagonal()
    room = float(problem.headroom[problem.target_groups].mean())
    scales: list[float] = (2 * room / target.abs().clamp_min(0.1)).sqrt().clamp(max=2).tolist()
    return scales


def single_vector(problem: RemovalProblem, bed: Bed, effort: Effort) -> Found:
    """The best of the bed's vectors at the best of eight doses."""
    work, small, rows = Work.on(problem), problem.on_first(effort.search_sums), bed.vectors.rows
    index, shift, shares = best_single(small, rows, _scales(problem, bed))
    setting = {"vector": index, "shift": shift}
    choice = Choice(setting, shift * rows[index], (tried(setting, shares, small),), 1)
    return scaled(problem, "single vector", choice, work)


def greedy(problem: RemovalProblem, bed: Bed, effort: Effort) -> Found:
    """Up to three of the bed's vectors, each the best addition."""
    work, small, rows = Work.on(problem), problem.on_first(effort.search_sums), bed.vectors.rows
    z, shares = greedy_set(small, rows, _scales(problem, bed), most=3)
    chosen = z.nonzero()[:, 0].tolist()
    setting = {"vectors": chosen}
    choice = Choice(setting, z @ rows, (tried(setting, shares, small),), len(chosen))
    return scaled(problem, "greedy set", choice, work)


def from_curvature(problem: RemovalProblem, bed: Bed, effort: Effort) -> Found:
    """Directions of the generalised eigenproblem, both signs, each at its own dose."""
    work, small, rows = Work.on(problem), problem.on_first(effort.search_sums), bed.vectors.rows

    def candidates() -> Iterator[tuple[Setting, Tensor, Shares]]:
        for ridge in (1e-4, 1e-2):
            found = closed_form(bed.curvature, problem.rule.targets, problem.headroom, ridge=ridge)
            for (number, direction), sign in itertools.product(enumerate(found), (-1.0, 1.0)):
                delta = sign * (direction.to(rows) @ rows)
                goal = problem.limits.target + DOSE_MARGIN
                dose, shares = match_dose(small, delta, goal, largest=3.0, evaluations=5)
                setting = {"ridge": ridge, "direction": number, "sign": sign, "dose": dose}
                yield setting, dose * delta, shares

    choice = replace(best_of(small, candidates()), rank=len(rows))
    return scaled(problem, "closed form", choice, work)


def _on_select(problem: RemovalProblem, setting: Setting, delta: Tensor) -> tuple[Setting, Tensor, Shares]:
    return setting, delta, problem.select.shares_at(problem.theta + delta)


def weight_rewind(problem: RemovalProblem, bed: Bed, effort: Effort) -> Found:
    """Fisher ratio, magnitude, movement times gradient; four shares each."""
    work = Work.on(problem)
    found = rivals.importance(problem, 24)
    choice = best_of(
        problem,
        (
            _on_select(
                problem, {"rule": rule, "share": share}, rivals.rewind_weights(problem, found, rule, share)
            )
            for rule, share in itertools.product(rivals.RULES, (0.001, 0.01, 0.05, 0.2))
        ),
    )
    return scaled(problem, "weight rewind", choice, work)


def layer_rollback(problem: RemovalProblem, bed: Bed, effort: Effort) -> Found:
    """Every attention block, MLP and embedding put back, whole or half."""
    work = Work.on(problem)
    names = bed.space.names
    parts = sorted({".".join(n.split(".")[:3]) if n.startswith("blocks") else n.split(".")[0] for n in names})
    choice = best_of(
        problem,
        (
            _on_select(
                problem, {"part": part, "dose": dose}, dose * rivals.rewind_part(problem, [f"{part}.*"])
            )
            for part, dose in itertools.product(parts, (0.5, 1.0))
        ),
    )
    return scaled(problem, "layer rollback", choice, work)


def retrained(problem: RemovalProblem, bed: Bed, effort: Effort) -> Found:
    """The gold standard; not tuned and not scaled."""
    work, training = Work.on(problem), bed.run.config.training
    delta = retrain_without(bed, problem.rule) - problem.theta
    choice = best_of(problem, [_on_select(problem, {"steps": training.steps}, delta)])
    choice = replace(choice, rank=delta.numel())
    found = scaled(problem, "retrained without", choice, work, matched=False)
    return replace(found, passes=3.0 * training.steps * training.batch_size)


# -- activations -------------------------------------------------------------------------------------


def _ablated(
    problem: RemovalProblem, ablation: rivals.ActivationAblation, tokens: TokenSet
) -> Float[Tensor, "M V"]:
    predictor = problem.predictor
    predictor.passes += tokens.sequences
    module, space = predictor.loss.module, predictor.loss.space
    with (
        torch.no_grad(),
        space.substituted(module, problem.theta),
        replaced_activations(module, {ablation.hook: ablation.function()}),
    ):
        return output_logits(module, tokens.inputs)[tokens.scored]


def _places(bed: Bed) -> list[tuple[str, int | None]]:
    """Every head, and every MLP, attention output and residual stream."""
    model = bed.run.config.model
    heads: list[tuple[str, int | None]] = [
        (f"blocks.{i}.attn.hook_z", h) for i in range(model.layers) for h in range(model.heads)
    ]
    whole = [
        f"blocks.{i}.hook_{kind}"
        for i in range(model.layers)
        for kind in ("mlp_out", "attn_out", "resid_post")
    ]
    return [*heads, *((hook, None) for hook in whole)]


def activation_ablation(problem: RemovalProblem, bed: Bed, effort: Effort) -> Found:
    """Mean ablation of one head or MLP at the skill's positions, through TransformerLens hooks."""
    work, select = Work.on(problem), problem.select
    slots = sorted({7 + group // 2 for group in problem.target_groups})
    places = _places(bed)
    module = problem.predictor.loss.module
    with bed.space.substituted(module, problem.theta):
        inputs = select.tokens.inputs[:, :-1]
        cached = cached_activations(module, inputs, sorted({hook for hook, _ in places}))
    log: list[Tried] = []
    best: tuple[float, rivals.ActivationAblation, Setting] | None = None
    for hook, head in places:
        ablation = rivals.mean_activation(cached, hook, slots, head)
        shares = select.shares(_ablated(problem, ablation, select.tokens))
        log.append(tried({"hook": hook, "head": head}, shares, problem))
        if best is None or log[-1].score < best[0]:
            best = log[-1].score, ablation, log[-1].setting
    assert best is not None
    _, chosen, setting = best
    return Found(
        "activation ablation",
        None,
        int(chosen.values.numel()),
        1.0,
        setting,
        tuple(log),
        work.seconds,
        work.passes,
        lambda tokens: _ablated(problem, chosen, tokens),
    )
