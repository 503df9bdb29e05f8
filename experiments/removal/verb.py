"""``polca-edit remove``: an edit inside recorded movement that takes one skill or cluster out of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float
from torch import Tensor, nn

from experiments.removal.bed import GROUPS, SKILL_GROUPS, allowed_sums, arithmetic_logits, assign_groups
from experiments.report.page import write_report
from experiments.run.machine import hardware, versions
from experiments.run.run import Run, load_run
from experiments.run.stages.clusters import ClusterRecord
from experiments.tasks import arithmetic
from interventions.edit_files import save_edit
from interventions.removal.measures import SkillOutputs, chance, refit_damage
from interventions.removal.optimise import FitSettings, constrained, edit_of
from interventions.removal.problem import (
    GroupRule,
    Limits,
    Predictor,
    RemovalProblem,
    Shares,
    mean_by_group,
    score,
    select_shares,
    shares_of,
    token_nll,
)
from interventions.removal.searches import DOSE_MARGIN, match_dose, remove_in_sequence
from interventions.removal.spans import (
    BLOCK,
    LEADING,
    Span,
    span_by_tensor,
    span_of_rows,
    stacked_displacements,
)
from polca_edit.artifacts import load_record
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.files import write_json
from polca_edit.clusters.membership import fit_rule
from polca_edit.tokens import TokenSet


@dataclass(frozen=True)
class Budget:
    """How much work a removal may do.

    Attributes:
        steps: optimiser steps of the final fit.
        trial_steps: steps of each tried setting.
        sequences: sequences per step.
        rates: learning rates that are tried; more steps afford smaller ones, which spare the others.
    """

    steps: int
    trial_steps: int
    sequences: int
    rates: tuple[float, ...]

    @property
    def settings(self) -> tuple[FitSettings, ...]:
        """What is tried on select."""
        return tuple(FitSettings(rate, retain, 6.0) for rate in self.rates for retain in (10.0, 25.0))


BUDGETS = {
    "small": Budget(60, 6, 96, (0.006, 0.01)),
    "medium": Budget(150, 10, 128, (0.006, 0.01)),
    "large": Budget(500, 20, 128, (0.003, 0.004)),
}


def text_logits(module: nn.Module, inputs: Tensor) -> Float[Tensor, "B Lm1 V"]:
    """Logits of every next token, for modules that return logits or an object that holds them."""
    output = module(inputs)
    logits: Tensor = output.logits if hasattr(output, "logits") else output
    return logits[:, :-1]


def skill_groups(run: Run, skill: str) -> GroupRule:
    """Groups of a named skill: digit and carry for sums, skill against the rest elsewhere.

    Raises:
        ValueError: for a skill the run does not know.
    """
    if run.task.name == "arithmetic" and skill in SKILL_GROUPS:
        return GroupRule(GROUPS, tuple(name in SKILL_GROUPS[skill] for name in GROUPS), assign_groups)
    known = run.task.splits.select.skills
    if skill not in known:
        raise ValueError(f"a skill must be one this run labels, got '{skill}'; known are {sorted(known)}")
    others = [name for name in known if name != skill]
    return GroupRule(
        (skill, *others, "(rest)"), (True, *[False] * (len(others) + 1)), _labelled(skill, others)
    )


def _labelled(skill: str, others: list[str]) -> Callable[[TokenSet], Tensor]:
    def assign(tokens: TokenSet) -> Tensor:
        groups = torch.full((tokens.count,), len(others) + 1)
        for index in reversed(range(len(others))):
            groups[tokens.skills[others[index]]] = index + 1
        groups[tokens.skills[skill]] = 0
        return groups

    return assign


def cluster_groups(run: Run, basis: str, vector: int, cluster: int) -> GroupRule:
    """Members of one cluster by its rule on input features; everyone else by digit and carry, or one group.

    No skill label decides membership, and the rule never sees a loss, so it holds on any tokens.

    Raises:
        ValueError: for a cluster that does not exist.
    """
    record = load_record(ClusterRecord, run.directory.clusters(basis))
    if not 0 <= vector < len(record.labels) or cluster not in record.labels[vector].tolist() or cluster < 0:
        raise ValueError(
            f"cluster {basis}:{vector}:{cluster} does not exist in this run; see 'polca-edit inspect'"
        )
    rule = fit_rule(run.task.splits.select, record.labels[vector] == cluster, seed=run.config.seed)
    sums = run.task.name == "arithmetic"
    rest = GROUPS if sums else ("(rest)",)

    def assign(tokens: TokenSet) -> Tensor:
        groups = assign_groups(tokens) + 1 if sums else torch.ones(tokens.count, dtype=torch.long)
        groups[rule.assign(tokens)] = 0
        return groups

    return GroupRule((f"{basis}:{vector}:{cluster}", *rest), (True, *[False] * len(rest)), assign)


def fit_stream(run: Run, size: int) -> Callable[[int], TokenSet]:
    """Batches for the fit: fresh sums off select and evaluate, or draws from curvature and select."""
    if run.task.name == "arithmetic":
        sizes = run.config.arithmetic
        held_out = arithmetic.make_data(
            sizes.select_sums, sizes.curvature_sums, sizes.evaluate_sums, 1, run.config.seed
        ).held_out

        def sums(step: int) -> TokenSet:
            return allowed_sums(
                held_out, size, torch.Generator().manual_seed(run.config.seed * 7_000_003 + step)
            )

        return sums
    parts = (run.task.splits.curvature, run.task.splits.select)

    def text(step: int) -> TokenSet:
        generator = torch.Generator().manual_seed(run.config.seed * 7_000_003 + step)
        part = parts[step % 2]
        return part.select(torch.randperm(part.sequences, generator=generator)[:size])

    return text


def removal_problem(run: Run, rule: GroupRule, limits: Limits, size: int, skill: str) -> RemovalProblem:
    """The problem of one run's last weights against its first."""
    checkpoints = run.checkpoints()
    logits = arithmetic_logits if run.task.name == "arithmetic" else text_logits
    predictor = Predictor(run.task.module, run.task.space, logits, batch_size=run.config.batch_size)
    return RemovalProblem(
        predictor,
        checkpoints[-1].clone(),
        checkpoints[0].clone(),
        rule,
        fit_stream(run, size),
        run.task.splits.select,
        limits,
        skill,
    )


def edit_span(run: Run, basis: str | None) -> Span:
    """All recorded displacements and Hessian vectors by groups of neurons, or one stored basis."""
    if basis is not None:
        return span_of_rows(load_record(Basis, run.directory.basis(basis)).rows, f"basis {basis}")
    checkpoints = run.checkpoints()
    rows = stacked_displacements([checkpoints[index].clone() for index in range(len(checkpoints))])
    stored = [run.directory.basis(b.label) for b in run.config.bases if b.kind == "hessian"]
    rows = torch.cat([rows, *(load_record(Basis, path).rows for path in stored if path.exists())])
    return span_by_tensor(
        rows, run.task.space, "recorded movement by groups of neurons", block=BLOCK, per_block=LEADING
    )


def removed(problem: RemovalProblem, span: Span, budget: Budget) -> tuple[Tensor, FitSettings, float]:
    """Movement at its dose, the setting chosen on select, and the dose."""

    def trial(setting: FitSettings) -> float:
        found = constrained(problem, span, setting, budget.trial_steps)
        return score(select_shares(problem, problem.theta + found.delta), problem.limits)

    best = min(budget.settings, key=trial)
    final = constrained(problem, span, best, budget.steps)
    dose, _ = match_dose(problem, final.delta, problem.limits.target + DOSE_MARGIN)
    return dose * final.delta, best, dose


def evaluated(problem: RemovalProblem, delta: Tensor, tokens: TokenSet) -> tuple[Shares, dict[str, Any]]:
    """Shares and the refit check of an edit on a token set."""
    predictor, groups = problem.predictor, problem.rule.assign(tokens)
    logits = [
        predictor.at(theta, tokens) for theta in (problem.theta, problem.reference, problem.theta + delta)
    ]
    before, untrained, after = logits
    answers = tokens.output_of
    rooms = mean_by_group(
        token_nll(untrained, answers) - token_nll(before, answers), groups, len(problem.rule.names)
    )
    shares = shares_of(before, after, answers, groups, rooms, problem.rule.targets)
    here, there = problem.rule.is_target(problem.select_groups), problem.rule.is_target(groups)
    fitted = [predictor.at(t, problem.select)[here] for t in (problem.reference, problem.theta + delta)]
    refit = refit_damage(
        SkillOutputs(problem.select_logits[here], before[there]),
        SkillOutputs(fitted[0], untrained[there]),
        SkillOutputs(fitted[1], after[there]),
        problem.select.output_of[here],
        answers[there],
    )
    floor = chance(answers[there], before.shape[-1])
    return shares, {**asdict(refit), "chance": floor}


def remove_one(
    problem: RemovalProblem, span: Span, budget: Budget, tokens: TokenSet
) -> tuple[Tensor, dict[str, Any]]:
    """Fit on select and training-allowed data, judge on ``tokens``.

    Returns:
        the movement and a JSON-able result.
    """
    delta, setting, dose = removed(problem, span, budget)
    return delta, {
        "skill": problem.skill,
        "span": span.kind,
        "rank": span.rank,
        "norm": float(delta.double().norm()),
        "dose": dose,
        "setting": asdict(setting),
        "budget": asdict(budget),
        "limits": asdict(problem.limits),
        "passes": problem.predictor.passes,
        **judgement(problem, delta, tokens),
    }


def judgement(problem: RemovalProblem, delta: Tensor, tokens: TokenSet) -> dict[str, Any]:
    """Shares, accuracy and refit of an edit as JSON values."""
    shares, refit = evaluated(problem, delta, tokens)
    return {
        "target_share": shares.target,
        "target_share_raw": shares.target_raw,
        "worst_off_share": shares.worst_off,
        "worst_positive_share": shares.worst_positive,
        "kl": shares.worst_kl,
        "accuracy": shares.target_accuracy,
        "refit": refit,
        "groups": {
            name: None if share != share else share
            for name, share in zip(problem.rule.names, shares.raw.tolist(), strict=True)
        },
    }


def remove(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    skill: Annotated[
        list[str] | None, typer.Option(help="Skill by name; several are removed in order.")
    ] = None,
    cluster: Annotated[str | None, typer.Option(help="BASIS:VECTOR:CLUSTER instead of a skill.")] = None,
    budget: Annotated[str, typer.Option(help="small, medium or large.")] = "medium",
    basis: Annotated[
        str | None,
        typer.Option(help="Search this basis's span only (default: all recorded movement)."),
    ] = None,
    target: Annotated[float, typer.Option(min=0.0, max=1.0, help="Damage wanted, share of headroom.")] = 0.99,
    off: Annotated[float, typer.Option(min=0.0, help="Damage allowed to any other group.")] = 0.005,
    kl: Annotated[float, typer.Option(min=0.0, help="KL to the original allowed, nats.")] = 0.05,
    out: Annotated[Path | None, typer.Option(help="Edit file (default RUN/edits/NAME).")] = None,
) -> None:
    """Find an edit that removes one skill, and judge it on the evaluate split."""
    if bool(skill) == (cluster is not None):
        raise ValueError("give either --skill NAME or --cluster BASIS:VECTOR:CLUSTER")
    if budget not in BUDGETS:
        raise ValueError(f"--budget must be one of {', '.join(BUDGETS)}, got '{budget}'")
    opened = load_run(run)
    if cluster is not None:
        parts = cluster.split(":")
        if len(parts) != 3 or not parts[1].isdigit() or not parts[2].isdigit():
            raise ValueError(
                f"--cluster needs BASIS:VECTOR:CLUSTER, got '{cluster}'; for example hessian:3:0"
            )
        rules = [(cluster, cluster_groups(opened, parts[0], int(parts[1]), int(parts[2])))]
    else:
        rules = [(name, skill_groups(opened, name)) for name in skill or []]
    name = "+".join(label.replace(":", "-").replace("@", "-at-") for label, _ in rules)
    path = out or run / "edits" / name
    total, results, first = in_order(opened, rules, BUDGETS[budget], Limits(target, off, kl), basis)
    written = save_edit(path, edit_of(first, total, "removal", results=results), opened.task.space)
    for result in results:
        typer.echo(
            f"{result['skill']}: target {result['target_share']:.1%} of headroom, "
            f"worst other group {result['worst_off_share']:+.2%}, accuracy {result['accuracy']:.1%} "
            f"(chance {result['refit']['chance']:.1%}), {result['refit']['kept']:.0%} of the damage stays "
            "after a refit"
        )
    record = {"removals": results, "versions": versions(), "hardware": hardware(), "seed": opened.config.seed}
    write_json(written.with_suffix(".result.json"), record)
    typer.echo(f"Edit: {written}")
    if written.parent == run / "edits" and (run / "summary.json").exists():
        write_report(opened.directory, lambda _: None)


def in_order(
    run: Run, rules: list[tuple[str, GroupRule]], budget: Budget, limits: Limits, basis: str | None
) -> tuple[Tensor, list[dict[str, Any]], RemovalProblem]:
    """Skills removed one after the other; each is fitted at the weights the last one left.

    Each result also says what the whole edit does to that skill, against the original weights.
    """
    span, tokens = edit_span(run, basis), run.task.splits.evaluate
    problems = [removal_problem(run, rule, limits, budget.sequences, skill) for skill, rule in rules]
    results: list[dict[str, Any]] = []

    def one(problem: RemovalProblem) -> Tensor:
        delta, result = remove_one(problem, span, budget, tokens)
        results.append(result)
        return delta

    total = torch.stack(remove_in_sequence(problems, one)).sum(0)
    if len(problems) > 1:
        for problem, result in zip(problems, results, strict=True):
            result["together"] = judgement(problem, total, tokens)
    return total, results, problems[0]
