"""Which pairs a recorded run is tested on: the pipeline from stored projections to named pairs.

The same function serves the run's own basis and every reference basis of the pipeline null.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import sklearn
import torch

from interventions.measures import Target
from interventions.nulls import Choice, Chooser
from interventions.protocol import Pair
from interventions.statistics import Bits
from polca_edit.allocation import Projections
from polca_edit.breakthroughs import breakthrough_start, fitting_delta
from polca_edit.membership import fit_rule
from polca_edit.observe import ObserveSettings, analyse
from polca_edit.tokens import TokenSet


@dataclass(frozen=True)
class ChoiceSettings:
    """How pairs are chosen on the select split.

    Attributes:
        observe: allocation and clustering.
        count: pairs kept (m).
        rule_auc: least AUC of a membership rule.
        seed: of the rule's folds.
        smallest: tokens a cluster must have on the select split and where effects are ranked.
        ranked: documents of the evaluate split on which effects are ranked; 0: all.
    """

    observe: ObserveSettings
    count: int
    rule_auc: float
    seed: int
    smallest: int = 20
    ranked: int = 0


def skill_name(members: Bits, tokens: TokenSet, description: str) -> str:
    """The known skill with the best F1, or the rule's words where none reaches 0.5."""
    best, score = description, 0.5
    for name, labels in tokens.skills.items():
        skill = labels.numpy()
        both = int((members & skill).sum())
        f1 = 2 * both / max(1, int(members.sum()) + int(skill.sum()))
        if f1 > score:
            best, score = name, f1
    return best


def cluster_chooser(select: TokenSet, evaluate: TokenSet, settings: ChoiceSettings) -> Chooser:
    """Allocation, filters, HDBSCAN, membership rule, then pairs by -A mass times the rule's AUC.

    Only input features of the evaluate split are read, never a loss. One pair per name is kept.
    """
    ranked = evaluate.of_first_documents(settings.ranked or evaluate.sequences).numpy()
    outputs = select.output_of if settings.observe.clusters.by_output else None

    def choose(projections: Projections) -> list[Choice]:
        # Features and trajectories are finite by construction; checking them again is a third of the work.
        with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
            return chosen_from(projections)

    def chosen_from(projections: Projections) -> list[Choice]:
        observation = analyse(projections, settings.observe, outputs)
        allocated = observation.allocation.values.sum(0).double().numpy()
        candidates = []
        for found in observation.clusters:
            for cluster in range(found.count):
                members = found.members(cluster).numpy()
                if members.sum() >= settings.smallest:
                    candidates.append((-float(allocated[found.vector, members].sum()), found.vector, members))
        candidates.sort(key=lambda c: -c[0])
        chosen: dict[str, Choice] = {}
        # Rules are fitted for the heaviest candidates only; three per wanted pair leave room for duplicates.
        for mass, vector, members in candidates[: 3 * settings.count]:
            if mass <= 0:
                break
            rule = fit_rule(select, torch.from_numpy(members), seed=settings.seed)
            there = rule.assign(evaluate).numpy()
            inside = there[ranked]
            if not rule.auc >= settings.rule_auc or inside.sum() < settings.smallest or inside.all():
                continue
            name = skill_name(there, evaluate, rule.description)
            choice = Choice(
                vector, name, Target(members), Target(there), float(rule.auc), mass * float(rule.auc), rule
            )
            if name not in chosen or chosen[name].score < choice.score:
                chosen[name] = choice
        return sorted(chosen.values(), key=lambda c: -c.score)[: settings.count]

    return choose


def as_pairs(
    choices: Sequence[Choice],
    projections: Projections,
    select: TokenSet,
    evaluate: TokenSet,
    partition: Sequence[str],
    *,
    supervised: bool,
    delta: int,
) -> list[Pair]:
    """Pairs with their off-target groups: the other chosen clusters and the known partition."""
    pairs = []
    for choice in choices:
        here, there = (
            _groups(choice, choices, select, partition),
            _groups(choice, choices, evaluate, partition, on="evaluate"),
        )
        names = [n for n in there if n in here]
        pairs.append(
            Pair(
                choice.name,
                (choice.vector,),
                replace(choice.evaluate, others={n: there[n] for n in names}),
                replace(choice.select, others={n: here[n] for n in names}),
                choice.rule_auc,
                partners(choice, projections),
                breakthrough_window(choice, projections, delta),
                supervised=supervised,
                rule=choice.rule,
            )
        )
    return pairs


def _groups(
    choice: Choice, choices: Sequence[Choice], tokens: TokenSet, partition: Sequence[str], on: str = "select"
) -> dict[str, Bits]:
    groups: dict[str, Bits] = {}
    target = choice.evaluate if on == "evaluate" else choice.select
    for name in partition:
        if name in tokens.skills:
            groups[f"group {name}"] = tokens.skills[name].numpy()
    for other in choices:
        if other.name != choice.name:
            groups[f"cluster {other.name}"] = (other.evaluate if on == "evaluate" else other.select).members
    return {name: mask for name, mask in groups.items() if (mask & ~target.members).sum() >= 20}


def partners(choice: Choice, projections: Projections, count: int = 3) -> tuple[int, ...]:
    """The vectors that the cluster's tokens were given most loss fall by, besides its own."""
    from polca_edit.allocation import allocate

    values = allocate(projections, "trapezoid").values.sum(0)[:, torch.from_numpy(choice.select.members)]
    order = torch.argsort(values.double().mean(1)).tolist()
    return tuple(v for v in order if v != choice.vector)[:count]


def breakthrough_window(choice: Choice, projections: Projections, delta: int) -> tuple[int, int] | None:
    """(first, last) checkpoint of the cluster's breakthrough, from its mean projected loss on select."""
    from polca_edit.allocation import allocate

    paths = allocate(projections, "trapezoid").projected_loss()[:, choice.vector]
    curve = paths[:, torch.from_numpy(choice.select.members)].mean(1)
    steps = projections.steps
    width = fitting_delta(delta, steps)
    start = int(breakthrough_start(curve[None], steps, width)[0])
    first = int((steps - start).abs().argmin())
    last = int((steps - (start + width)).abs().argmin())
    return (first, last) if last > first else None


def declared_nulls(pairs: Sequence[Pair], count: int, vectors: int, seed: int) -> list[Pair]:
    """Pairs of a chosen cluster with a vector it was not chosen for, drawn at random."""
    rng = np.random.default_rng(seed)
    used = {pair.vectors[0] for pair in pairs}
    free = [v for v in range(vectors) if v not in used]
    found: list[Pair] = []
    for index, pair in enumerate(pairs[:count]):
        wrong = free or [v for v in used if v != pair.vectors[0]]
        if not wrong:
            break
        vector = int(rng.choice(wrong))
        found.append(
            replace(pair, name=f"null {index + 1}: {pair.name}", vectors=(vector,), window=None, partners=())
        )
    return found
