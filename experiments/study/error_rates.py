"""How often the causal test says yes where yes is false, and where it is true.

``polca-edit study errors runs/demo ... --draws 60 --power 200 --json FILE``

Two kinds of twins on real runs, both through the chooser (select) and on unseen tokens: groups with shuffled
labels, which no movement can be selective for, and random halves of a known skill, which no movement takes
*rather than the rest* (W). And a simulation of the power that the test promises: a vector that removes 60 %
of one skill and 5 % of all others, 1,000 sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from scipy.stats import binom, binomtest
from torch import Tensor

from experiments.application import say
from experiments.config import load_config
from experiments.report.formats import share
from experiments.report.tables import Table, table
from experiments.run.run import Run, load_run
from experiments.study.results import publish, show
from experiments.testbeds.base import axes, landscape_split, slot_tokens
from experiments.verbs.guard import require_different
from experiments.verbs.options import Result
from experiments.verdicts.choose import parents_of, select_shares, split_of, unseen_tokens
from interventions.causal.hypotheses import hardest_hit
from interventions.causal.settings import TestSettings
from interventions.causal.test import causal_test
from polca_edit.artifacts import load_record
from polca_edit.basis.record import Basis
from polca_edit.clusters.hypotheses import Hypothesis, TokenGroup
from polca_edit.seeds import generator_for

#: Draws of the test itself: insertion and rotated observations are not in question.
SETTINGS = TestSettings(observed_rotations=0, transplants=0)
SKILLS = ("a", "b", "c", "d")
#: Shares that the simulated vector removes, of the first skill and of every other.
TAKEN, ELSEWHERE = 0.6, 0.05


@dataclass(frozen=True)
class Rate:
    """How often a word or an answer was given.

    Attributes:
        case: what was tested.
        seed: of the run; None for the simulation.
        basis: label; empty for the simulation.
        draws: pairs.
        yes: of them, those with the answer in question.
        low: 95 % Clopper-Pearson bound of the rate.
        high: likewise.
        bound: most yes that a rate of 5 % gives with 97.5 % (false positives), None for power.
    """

    case: str
    seed: int | None
    basis: str
    draws: int
    yes: int
    low: float
    high: float
    bound: int | None

    @classmethod
    def of(
        cls, case: str, draws: int, yes: int, *, seed: int | None = None, basis: str = "", false: bool = True
    ) -> Rate:
        """With its binomial bounds."""
        exact = binomtest(yes, draws).proportion_ci(method="exact")

        bound = int(binom.ppf(0.975, draws, 0.05)) if false else None
        return cls(case, seed, basis, draws, yes, float(exact.low), float(exact.high), bound)


def twin_rates(run: Run, label: str, draws: int) -> list[Rate]:
    """Shuffled labels (selective or carrier), and random halves of a skill (W), on one basis of one run."""
    basis = load_record(Basis, run.directory.basis(label))
    select, unseen = run.task.splits.select, unseen_tokens(run, 1000)
    generator = generator_for(run.config.seed, "error_rates", label)
    names = list(run.task.parents or select.skills)
    groups: dict[str, tuple[Tensor, Tensor]] = {}
    for draw in range(draws):
        skill = names[draw % len(names)]
        sides = [tokens.skills[skill] for tokens in (select, unseen)]
        shuffled, half = [], []
        for mask in sides:
            order = torch.randperm(len(mask), generator=generator)
            shuffled.append(mask[order])
            half.append(mask & (torch.rand(len(mask), generator=generator) < 0.5))
        groups[f"shuffled {draw}"] = (shuffled[0], shuffled[1])
        groups[f"half {draw}"] = (half[0], half[1])
    shares = select_shares(run, label, basis, {name: pair[0] for name, pair in groups.items()}, None)
    made = {name: TokenGroup.labelled(name, pair[1], unseen) for name, pair in groups.items()}
    pairs = hardest_hit(shares, made, basis, basis_name=label, family="own")
    found = {"shuffled": 0, "half": 0}
    # Each group alone: tested groups are off target for one another.
    for kind in found:
        own = [pair for pair in pairs if pair.group.name.startswith(kind)]
        split = split_of(run, unseen)
        rows = causal_test(split, own, SETTINGS, parents=parents_of(run, unseen) or None).rows
        if kind == "shuffled":
            found[kind] = sum(row.word in ("selective", "carrier") for row in rows)
        else:
            found[kind] = sum(row.answers["W"] == "yes" for row in rows)
    seed = run.config.seed
    return [
        Rate.of("shuffled labels called selective", draws, found["shuffled"], seed=seed, basis=label),
        Rate.of("random half of a skill, W yes", draws, found["half"], seed=seed, basis=label),
    ]


def simulated_word(seed: int, taken: float, elsewhere: float) -> str:
    """The word of one vector in one simulated run of 1,000 sequences.

    Token i of skill j loses 1/2 h_i (r_i (theta - m))^2, with strengths h of lognormal spread one and
    readings r_i = e_j + 0.2 noise in the span; the vector's coordinates are such that undoing it takes the
    shares asked for. Most of weight space reads nothing, as in a trained model.
    """
    g = generator_for(seed, "power")
    size, span, count = 400, 12, 1000
    moved = torch.zeros(size, dtype=torch.float64)
    moved[: len(SKILLS)] = 2.0
    moved[5:span] = 0.3 * torch.randn(span - 5, generator=g, dtype=torch.float64)
    # Undoing u moves coordinate j by u_j <u, m>; the share lost is (u_j <u, m> / m_j)^2.
    wanted = torch.tensor([taken] + [elsewhere] * (len(SKILLS) - 1), dtype=torch.float64).sqrt()
    row = torch.zeros(size, dtype=torch.float64)
    row[: len(SKILLS)] = wanted / wanted.sum().sqrt()
    # Coordinate 4 never moves and takes up the rest of the length.
    row[4] = (1 - row.square().sum()).clamp_min(0).sqrt()
    rows = torch.linalg.qr(torch.cat([row[None], axes(span, size)]).T)[0].T[:span].contiguous()
    rows[0] = row
    strength = torch.randn(count, len(SKILLS), 1, generator=g, dtype=torch.float64).exp()
    noise = 0.2 * torch.randn(count, len(SKILLS), size, generator=g, dtype=torch.float64)
    noise[..., span:] = 0.0
    reading = torch.eye(len(SKILLS), size, dtype=torch.float64) + noise

    def losses(theta: Tensor, inputs: Tensor) -> Tensor:
        away: Tensor = inputs[..., 1:] @ (theta - moved)
        return 0.5 * inputs[..., 0] * away**2

    tokens = slot_tokens(SKILLS, torch.cat([strength, reading], 2))
    split = landscape_split(losses, [moved * (t / 4) for t in range(5)], tokens)
    pair = Hypothesis("simulated", row[None], TokenGroup("a", skill="a"), "own", "b", (0,), span=rows)
    [verdict] = causal_test(split, [pair], replace(SETTINGS, seed=seed), parents=tokens.skills).rows
    return verdict.word


def power_rates(draws: int) -> list[Rate]:
    """The promised case, and its twin in which every skill loses the same."""
    yes = {TAKEN: 0, ELSEWHERE: 0}
    for seed in range(draws):
        yes[TAKEN] += simulated_word(seed, TAKEN, ELSEWHERE) in ("selective", "carrier")
        yes[ELSEWHERE] += simulated_word(seed, 0.3, 0.3) in ("selective", "carrier")
    return [
        Rate.of(f"simulated: {TAKEN:.0%} of one, {ELSEWHERE:.0%} of others", draws, yes[TAKEN], false=False),
        Rate.of("simulated: 30% of every skill", draws, yes[ELSEWHERE]),
    ]


def totals(rates: Sequence[Rate]) -> list[Rate]:
    """All runs and bases together."""
    found: dict[str, list[Rate]] = {}
    for rate in rates:
        found.setdefault(rate.case, []).append(rate)
    return [
        Rate.of(
            case,
            sum(r.draws for r in own),
            sum(r.yes for r in own),
            basis="all",
            false=own[0].bound is not None,
        )
        for case, own in found.items()
    ]


def rate_table(rates: Sequence[Rate]) -> Table:
    """One line a case."""
    lines = [
        [
            rate.case,
            "–" if rate.seed is None else str(rate.seed),
            rate.basis or "–",
            str(rate.draws),
            str(rate.yes),
            f"{share(rate.low)} to {share(rate.high)}",
            "–" if rate.bound is None else f"{rate.bound}",
        ]
        for rate in rates
    ]
    headings = ("case", "seed", "basis", "draws", "yes", "95 % interval", "most at a rate of 5 %")
    return table(list(headings), lines, "How often the causal test says yes")


def error_rates(
    runs: Annotated[list[Path], typer.Argument(help="Finished runs, one a seed.")],
    draws: Annotated[int, typer.Option(min=4, help="Twins of each kind a basis.")] = 60,
    power: Annotated[int, typer.Option(min=0, help="Simulated runs.")] = 200,
    json_: Result = None,
) -> None:
    """False positives of the causal test on twins, and its power by simulation."""
    require_different(runs)
    rates: list[Rate] = []
    for place in runs:
        run = load_run(place, say=lambda _: None)
        for spec in run.config.measured_bases():
            rates += twin_rates(run, spec.label, draws)
            say(f"  seed {run.config.seed}, {spec.label}: {[rate.yes for rate in rates[-2:]]} of {draws}")
    if power:
        rates += power_rates(power)
    every: Mapping[str, object] = {"rates": rates, "totals": totals(rates)}
    tables = [rate_table([*rates, *totals(rates)])]
    show(tables)
    seeds = sorted({int(rate.seed) for rate in rates if rate.seed is not None})
    publish(json_, "error-rates/1", load_config(runs[0] / "config.yaml"), seeds, every, tables)
