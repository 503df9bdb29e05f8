"""The paper's own comparison: rival trajectories, quadrature rules, the second-order term of Eq. 6."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from experiments.run.run import Run
from experiments.study.reproduce.measure import Measured, ReproductionSettings, scoring_of
from experiments.study.reproduce.rows import FeatureRow, Paths, TokenSplits, carry_columns
from polca_edit.allocation.adaptive import adaptive_plan
from polca_edit.allocation.allocate import Projections, Rule, allocate, project
from polca_edit.allocation.quadrature import FixedRule, fixed_plan, measure_nodes
from polca_edit.basis.record import Basis, unlabelled
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.clusters import features
from polca_edit.tokens import TokenSet

RULES: tuple[FixedRule, ...] = ("trapezoid", "trapezoid2", "simpson", "gauss2", "gauss3")
#: Half the distance of the central differences that Eq. 6's term is checked with, weight units.
HALF_STEP = 1e-2


@dataclass(frozen=True)
class QuadratureRow:
    """Completeness error of one rule over the whole run, evaluate split, nats per token.

    Attributes:
        seed: of the run.
        rule: its name.
        places: nodes on the path.
        mean_error: error of the mean change; intervals may cancel.
        mean_error_no_cancelling: sum over intervals of the size of the mean error.
        worst_group: the skill group with the largest error.
        worst_group_error: its error.
        worst_group_exact: its exact change.
        median_token_error: median size over tokens.
        median_token_exact: the same of the exact change.
        met: whether the adaptive rule reached its tolerance; None for fixed rules.
    """

    seed: int
    rule: str
    places: int
    mean_error: float
    mean_error_no_cancelling: float
    worst_group: str
    worst_group_error: float
    worst_group_exact: float
    median_token_error: float
    median_token_exact: float
    met: bool | None = None


@dataclass(frozen=True)
class SecondOrderError:
    """Table 12: Eq. 6's second-order term against the true one.

    Attributes:
        seed: of the run.
        rmse: root mean square error, nats.
        scale: root mean square of the true term, nats.
        relative_rmse: rmse over scale.
        cosine: of both terms over all tokens, vectors and intervals looked at.
    """

    seed: int
    rmse: float
    scale: float
    relative_rmse: float
    cosine: float


def rival_families(
    run: Run, checkpoints: Checkpoints, measured: dict[str, Measured], curved: list[Projections] | None
) -> dict[str, Paths]:
    """Tables 1 and 8-11: rival trajectories and orders of POLCA on the Hessian basis.

    Args:
        run: the model and its splits.
        checkpoints: the recorded series.
        measured: every basis; ``hessian`` must be among them.
        curved: the Hessian's projections on select and evaluate with the terms of Eq. 6. Without them
            only the families that stored projections give are returned.
    """
    objective, splits = run.objective, run.task.splits
    stored = curved or [measured["hessian"].select, measured["hessian"].evaluate]
    families: dict[str, Paths] = {}

    def add(name: str, make: Callable[[Projections, TokenSet], features.Trajectories]) -> None:
        both = [make(p, t) for p, t in zip(stored, (splits.select, splits.evaluate), strict=True)]
        families[name] = Paths(both[0].paths, both[1].paths, both[0].falls)

    def along(rule: Rule) -> Callable[[Projections, TokenSet], features.Trajectories]:
        return lambda p, t: features.Trajectories(rule, allocate(p, rule).projected_loss(), True)

    add("exact_loss", lambda p, t: features.exact_loss(p))
    add("loss_change", lambda p, t: features.loss_change(p))
    add("fisher", lambda p, t: features.fisher(p))
    add("first_order", lambda p, t: features.first_order(p))
    if curved is not None:
        add("polca", along("second_order"))
    add("polca_trapezoid", along("trapezoid"))
    if "parameter_axes" in measured:
        axes = measured["parameter_axes"]
        lca = [features.parameter_lca(own) for own in (axes.select, axes.evaluate)]
        families["lca"] = Paths(lca[0].paths, lca[1].paths, lca[0].falls)
    if curved is not None:
        sample = splits.curvature
        probes = [sample.select(rows) for rows in torch.arange(sample.sequences).chunk(8)]
        rates = list(checkpoints.learning_rates) if checkpoints.learning_rates else None
        hook = f"blocks.{run.config.model.layers - 1}.hook_resid_post"
        add("saliency", lambda p, t: features.input_saliency(objective, checkpoints, t))
        add("influence", lambda p, t: features.gradient_influence(objective, checkpoints, t, probes, rates))
        add("activations", lambda p, t: features.hidden_activations(objective, checkpoints, t, hook, 8))
    return families


def rival_rows(
    run: Run,
    checkpoints: Checkpoints,
    measured: dict[str, Measured],
    curved: list[Projections] | None,
    settings: ReproductionSettings,
) -> tuple[FeatureRow, ...]:
    """Every rival family in the clustering of the bases; ``curved`` as in :func:`rival_families`."""
    splits = TokenSplits(run.task.splits.select, run.task.splits.evaluate)
    scoring, losses = scoring_of(run, settings), measured["hessian"].select
    families = rival_families(run, checkpoints, measured, curved)
    return tuple(
        FeatureRow(name, run.config.seed, carry_columns(paths, losses, splits, scoring))
        for name, paths in families.items()
    )


def quadrature_rows(run: Run, checkpoints: Checkpoints, tolerance: float) -> tuple[QuadratureRow, ...]:
    """Completeness error against the number of places, rule by rule (the same for every basis)."""
    objective, tokens = run.objective, run.task.splits.evaluate
    nothing = unlabelled("path", torch.zeros(0, objective.space.size))
    ends = project(objective, checkpoints, [nothing], tokens)
    adaptive, report = adaptive_plan(objective, checkpoints, tokens, tokens.skills, tolerance=tolerance)
    plans = {rule: fixed_plan(rule, len(checkpoints) - 1) for rule in RULES} | {"adaptive": adaptive}
    rows = []
    for rule, plan in plans.items():
        filled = measure_nodes(objective, checkpoints, [nothing], tokens, plan, ends)[0]
        allocation = allocate(filled, "quadrature")
        error, change = allocation.quadrature_error.double(), allocation.exact.double()
        groups = {n: float(error.sum(0)[m].mean()) for n, m in tokens.skills.items() if bool(m.any())}
        worst = max(groups, key=lambda n: abs(groups[n]))
        rows.append(
            QuadratureRow(
                run.config.seed,
                rule,
                plan.nodes,
                mean_error=float(error.sum(0).mean()),
                mean_error_no_cancelling=float(error.mean(1).abs().sum()),
                worst_group=worst,
                worst_group_error=groups[worst],
                worst_group_exact=float(change.sum(0)[tokens.skills[worst]].mean()),
                median_token_error=float(error.sum(0).abs().median()),
                median_token_exact=float(change.sum(0).abs().median()),
                met=report.met if rule == "adaptive" else None,
            )
        )
    return tuple(rows)


def second_order_error(
    run: Run, checkpoints: Checkpoints, basis: Basis, curved: Projections
) -> SecondOrderError:
    """Table 12: Eq. 6's second-order term against 1/2 d^2 b'H_x b (central differences of slopes).

    Five vectors, ten intervals, all select tokens; errors relative to the true term's root mean square.
    """
    estimate = allocate(curved, "second_order").values - allocate(curved, "first_order").values
    tokens, size = run.task.splits.select, len(checkpoints) - 1
    intervals = [round(i * (size - 1) / min(9, size - 1)) for i in range(min(10, size))]
    pairs = []
    for t in intervals:
        theta = checkpoints[t]
        for v in list(range(0, len(basis), max(1, len(basis) // 5)))[:5]:
            move = HALF_STEP * basis.rows[v]
            ahead, behind = (
                run.objective.directional(place, basis.rows[v : v + 1], tokens)[1][0]
                for place in (theta + move, theta - move)
            )
            true = (ahead - behind) / (2 * HALF_STEP) / 2 * curved.displacements[t, v] ** 2
            pairs.append(torch.stack([estimate[t, v].double(), true.double()]))
    found, true = torch.cat(pairs, 1)
    scale, rmse = float(true.square().mean().sqrt()), float((found - true).square().mean().sqrt())
    cosine = float(nn.functional.cosine_similarity(found, true, dim=0))
    return SecondOrderError(run.config.seed, rmse, scale, rmse / max(scale, 1e-300), cosine)
