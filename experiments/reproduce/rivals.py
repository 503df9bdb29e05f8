"""The paper's own comparison: rival trajectories, quadrature rules, the second-order term of Eq. 6."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from experiments.reproduce.measure import Measured, Settings
from experiments.reproduce.rows import TokenSplits, carry_fields, cluster_variants, projected
from experiments.run.stages import Run
from polca_edit.allocation.allocate import Projections, allocate, project, second_order_terms
from polca_edit.allocation.quadrature import FixedRule, adaptive_plan, fixed_plan, measure_nodes
from polca_edit.basis.record import Basis, unlabelled
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.clusters import features
from polca_edit.clusters.density import ClusterSettings
from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet

#: Sequences of the curvature sample that Eq. 6's mean terms are taken on: one Hessian-vector product
#: per vector and checkpoint is its dearest part.
CURVATURE_SUMS = 64
RULES: tuple[FixedRule, ...] = ("trapezoid", "trapezoid2", "simpson", "gauss2", "gauss3")


def rival_rows(
    run: Run,
    checkpoints: Checkpoints,
    measured: dict[str, Measured],
    with_curvature: tuple[Projections, Projections] | None,
    splits: TokenSplits,
    settings: Settings,
) -> list[dict[str, Any]]:
    """Tables 1 and 8-11: rival trajectories and orders of POLCA on the Hessian basis, same clustering.

    Without ``settings.rivals`` only those that stored projections give.
    """
    objective, config = run.objective, run.config
    hessian = measured["hessian"]
    families: list[tuple[str, features.Trajectories, features.Trajectories]] = []

    def add(name: str, make: Callable[[Projections, TokenSet], features.Trajectories]) -> None:
        stored = with_curvature or (hessian.select, hessian.evaluate)
        pair = [make(p, t) for p, t in zip(stored, (splits.select, splits.evaluate), strict=True)]
        families.append((name, pair[0], pair[1]))

    add("exact_loss", lambda p, t: features.exact_loss(p))
    add("loss_change", lambda p, t: features.loss_change(p))
    add("fisher", lambda p, t: features.fisher(p))
    add("first_order", lambda p, t: features.first_order(p))
    if with_curvature is not None:
        add("polca", lambda p, t: features.Trajectories("polca", projected(p, "second_order"), True))
    add("polca_trapezoid", lambda p, t: features.Trajectories("trapezoid", projected(p), True))
    if "parameter_axes" in measured:
        axes = measured["parameter_axes"]
        families.append(("lca", features.parameter_lca(axes.select), features.parameter_lca(axes.evaluate)))
    if settings.rivals:
        add("saliency", lambda p, t: features.input_saliency(objective, checkpoints, t))
        probes = _probes(run.task.splits.curvature, 8)
        rates = list(checkpoints.learning_rates) if checkpoints.learning_rates else None
        add("influence", lambda p, t: features.gradient_influence(objective, checkpoints, t, probes, rates))
        hook = f"blocks.{config.model.layers - 1}.hook_resid_post"
        add("activations", lambda p, t: features.hidden_activations(objective, checkpoints, t, hook, 8))
    clusters = ClusterSettings(**config.clusters.model_dump())
    rows = []
    for name, select, evaluate in families:
        clustered = cluster_variants(
            select.paths, evaluate.paths, splits, clusters, falls=select.falls, seed=config.seed
        )
        fields = carry_fields(
            clustered,
            select.paths,
            hessian.select,
            splits,
            clusters,
            delta=config.breakthrough_delta,
            seed=config.seed,
            draws=settings.draws,
        )
        rows.append({"feature": name, "seed": config.seed, **fields})
    return rows


def with_second_order(
    objective: Objective, checkpoints: Checkpoints, measured: Measured, curvature: TokenSet
) -> tuple[Projections, Projections]:
    """Projections on select and evaluate with the mean terms of Eq. 6."""
    sample = curvature.select(torch.arange(min(CURVATURE_SUMS, curvature.sequences)))
    means, curvatures = second_order_terms(objective, checkpoints, measured.basis, sample)
    return (
        replace(measured.select, mean_gradients=means, curvatures=curvatures),
        replace(measured.evaluate, mean_gradients=means, curvatures=curvatures),
    )


def _probes(tokens: TokenSet, count: int) -> list[TokenSet]:
    """Equal consecutive parts of a sample of training sequences."""
    return [tokens.select(rows) for rows in torch.arange(tokens.sequences).chunk(count)]


def quadrature_table(
    objective: Objective, checkpoints: Checkpoints, tokens: TokenSet, tolerance: float
) -> list[dict[str, Any]]:
    """Completeness error against the number of places, rule by rule (the same for every basis)."""
    nothing = unlabelled("path", torch.zeros(0, objective.space.size))
    ends = project(objective, checkpoints, [nothing], tokens)
    adaptive, report = adaptive_plan(objective, checkpoints, tokens, tokens.skills, tolerance=tolerance)
    plans = {rule: fixed_plan(rule, len(checkpoints) - 1) for rule in RULES} | {"adaptive": adaptive}
    rows = []
    for rule, plan in plans.items():
        filled = measure_nodes(objective, checkpoints, [nothing], tokens, plan, ends)[0]
        allocation = allocate(filled, "quadrature")
        error = allocation.quadrature_error.double()
        change = allocation.exact.double()
        groups = {n: float(error.sum(0)[m].mean()) for n, m in tokens.skills.items() if bool(m.any())}
        worst = max(groups, key=lambda n: abs(groups[n]))
        rows.append(
            {
                "rule": rule,
                "places": plan.nodes,
                "mean_error": float(error.sum(0).mean()),
                "mean_error_no_cancelling": float(error.mean(1).abs().sum()),
                "worst_group": worst,
                "worst_group_error": groups[worst],
                "worst_group_exact": float(change.sum(0)[tokens.skills[worst]].mean()),
                "median_token_error": float(error.sum(0).abs().median()),
                "median_token_exact": float(change.sum(0).abs().median()),
                "met": report.met if rule == "adaptive" else None,
                "unresolved": list(report.unresolved) if rule == "adaptive" else None,
            }
        )
    return rows


def second_order_error(
    objective: Objective, checkpoints: Checkpoints, basis: Basis, select: Projections, tokens: TokenSet
) -> dict[str, Any]:
    """Table 12: Eq. 6's second-order term against 1/2 d^2 b'H_x b (central differences of slopes).

    Five vectors, ten intervals, all tokens; errors relative to the true term's root mean square.
    """
    estimate = allocate(select, "second_order").values - allocate(select, "first_order").values
    size = len(checkpoints) - 1
    intervals = [round(i * (size - 1) / min(9, size - 1)) for i in range(min(10, size))]
    vectors = list(range(0, len(basis), max(1, len(basis) // 5)))[:5]
    pairs = []
    for t in intervals:
        theta = checkpoints[t]
        for v in vectors:
            row = basis.rows[v]
            h = 1e-2
            sides = [objective.directional(theta + s * h * row, row[None], tokens)[1][0] for s in (1, -1)]
            true = (sides[0] - sides[1]) / (2 * h) / 2 * select.displacements[t, v] ** 2
            pairs.append(torch.stack([estimate[t, v].double(), true.double()]))
    found, true = torch.cat(pairs, 1)
    scale = float(true.square().mean().sqrt())
    return {
        "rmse": float((found - true).square().mean().sqrt()),
        "scale": scale,
        "relative_rmse": float((found - true).square().mean().sqrt()) / max(scale, 1e-300),
        "cosine": float(nn.functional.cosine_similarity(found, true, dim=0)),
    }
