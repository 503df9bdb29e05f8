"""The causal test: pairs in, one table of verdicts out. No run directory is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from interventions.causal.bases import BasisAnswer, aligned_tokens, special_axes
from interventions.causal.evidence import Bench, Evidence, measure, recorded_paths
from interventions.causal.nulls import SpanPool, matched_level
from interventions.causal.questions import Verdict, judge, pool
from interventions.causal.settings import TestSettings
from interventions.causal.statistics import Array, Bits, draw_units
from interventions.damage import EvaluatedSplit, Groups, named_groups
from interventions.edits import project_out
from polca_edit.clusters.hypotheses import Hypothesis, Unchosen
from polca_edit.derivatives.lanczos import coordinates, exact_length
from polca_edit.observation import Observation
from polca_edit.tokens import TokenSet

#: Total shares over which directions of a span are measured: below, curves are straight lines; above, an
#: edit takes more than half of everything and is not selective whatever it is compared with.
LEVELS = (0.01, 0.6)
#: Called with what is done and how much of it: (name, done, of).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measured:
    """One run's evidence, before any judging.

    Attributes:
        pairs: what was tested.
        evidence: pair name -> evidence.
        bases: answers A and P of every basis.
        untested: pairs that could not be tested on this split, with the reason.
        seed: of the run.
    """

    pairs: tuple[Hypothesis, ...]
    evidence: Mapping[str, Evidence]
    bases: tuple[BasisAnswer, ...]
    untested: tuple[Unchosen, ...]
    seed: int = 0


@dataclass(frozen=True)
class CausalTable:
    """The answer of a causal test.

    Attributes:
        rows: one verdict per pair.
        bases: answers A and P per basis and run.
        untested: pairs left out, with the reason.
        settings: of the test.
    """

    rows: tuple[Verdict, ...]
    bases: tuple[BasisAnswer, ...]
    untested: tuple[Unchosen, ...]
    settings: TestSettings

    def __str__(self) -> str:
        """The sentences, family by family."""
        lines = [f"{row.word:<10} {row.sentence}" for row in self.rows]
        lines += [f"A {b.aligned.answer}, P {b.special.answer}: basis {b.basis}" for b in self.bases]
        return "\n".join([*lines, *(f"not tested: {u.name} ({u.reason})" for u in self.untested)])


def causal_test(
    split: EvaluatedSplit,
    hypotheses: Sequence[Hypothesis],
    settings: TestSettings | None = None,
    *,
    parents: Groups | None = None,
    observations: Mapping[str, Observation] | None = None,
    progress: Progress | None = None,
) -> CausalTable:
    """Test pairs of a movement and a token group on unseen tokens.

    Args:
        split: a model, its checkpoints and unseen tokens; its window is what edits undo.
        hypotheses: pairs, decided on other tokens.
        settings: draws and thresholds.
        parents: partition of the tokens (digits, token classes): other parents are off target, the rest of
            a group's own parent is reported apart. Without one, every other token is off target.
        observations: basis name -> observation on select, so that rotated bases can be observed anew (A);
            one of the unseen tokens themselves gives each pair's attribution A_C, beside its damage.
        progress: told what is measured.

    Returns:
        One row per pair with its answers, word, intervals and a sentence.

    Raises:
        ValueError: for parents that overlap, or no pair.

    Example:
        >>> table = causal_test(split, seen.hypotheses(), TestSettings())  # doctest: +SKIP
        >>> print(table)  # doctest: +SKIP
    """
    settings = settings or TestSettings()
    found = measure_run(
        split, hypotheses, settings, parents=parents, observations=observations, progress=progress
    )
    return judge_runs([found], settings)


def judge_runs(runs: Sequence[Measured], settings: TestSettings) -> CausalTable:
    """Evidence of one or more runs as one table; pairs of the same name are one pair over its runs."""
    first: dict[str, Hypothesis] = {}
    for run in runs:
        for pair in run.pairs:
            first.setdefault(pair.name, pair)
    having = {name: [run for run in runs if name in run.evidence] for name in first}
    pairs = [pair for name, pair in first.items() if having[name]]
    pooled = [pool([run.evidence[p.name] for run in having[p.name]], settings, p.searched_p) for p in pairs]
    seeds = [tuple(run.seed for run in having[p.name]) for p in pairs]
    return CausalTable(
        tuple(judge(pairs, pooled, settings, seeds)),
        tuple(answer for run in runs for answer in run.bases),
        tuple(left for run in runs for left in run.untested),
        settings,
    )


def measure_run(
    split: EvaluatedSplit,
    hypotheses: Sequence[Hypothesis],
    settings: TestSettings,
    *,
    parents: Groups | None = None,
    observations: Mapping[str, Observation] | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> Measured:
    """Everything that opens the unseen tokens of one run (see :func:`causal_test`)."""
    pairs, members, left = _testable(split, hypotheses, settings)
    bench = open_bench(split, pairs, members, settings, parents)
    say = progress or (lambda *_: None)
    own_axes = {n: o.basis.rows for n, o in (observations or {}).items() if o.basis is not None}
    _fill_pools(bench, pairs, own_axes, say)
    evidence: dict[str, Evidence] = {}
    for number, pair in enumerate(pairs):
        say("pairs", number, len(pairs))
        seen = (observations or {}).get(pair.basis)
        given = attributed_by(seen, pair.vectors, split.tokens) if seen and pair.vectors else None
        evidence[pair.name] = measure(bench, pair, members[pair.name], given)
    answers = []
    for name, span in bench.pools.items():
        own = [p for p in pairs if p.basis == name and p.family == "polca" and len(p.vectors) == 1]
        seen = (observations or {}).get(name)
        answers.append(
            BasisAnswer(
                name,
                special_axes(bench, span, settings),
                aligned_tokens(bench, own, members, seen, settings),
            )
        )
        say("bases", len(answers), len(bench.pools))
    return Measured(tuple(pairs), evidence, tuple(answers), tuple(left), seed)


def _testable(
    split: EvaluatedSplit, hypotheses: Sequence[Hypothesis], settings: TestSettings
) -> tuple[list[Hypothesis], dict[str, Bits], list[Unchosen]]:
    """Pairs that this split can test, their tokens, and why the others cannot be."""
    if not hypotheses:
        raise ValueError("a causal test needs at least one pair, got none; choose some on other tokens")
    names = [pair.name for pair in hypotheses]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"pairs need different names, '{twice}' occurs twice; rename one")
    pairs: list[Hypothesis] = []
    members: dict[str, Bits] = {}
    left: list[Unchosen] = []
    size = exact_length(split.movement.displacement)
    first = split.tokens.of_first_documents(settings.null_documents).numpy()
    for pair in hypotheses:
        mask = pair.group.on(split.tokens).numpy().astype(bool)
        moved = float(split.movement.along(pair.rows).norm())
        if mask.sum() < settings.least:
            left.append(
                Unchosen(pair.name, f"{int(mask.sum())} unseen tokens, {settings.least} are asked for")
            )
        elif not mask[first].any():
            # Without a token there are no random edits to compare with, and N would be judged by the floor.
            why = (
                f"no token in the first {settings.null_documents} documents, where random edits are measured"
            )
            left.append(Unchosen(pair.name, f"{why}; mix the documents, or raise null_documents"))
        elif moved <= 1e-7 * size and size > 0 and not _came_back(split, pair.rows):
            left.append(Unchosen(pair.name, f"its rows moved by {moved:.2g} only"))
        else:
            pairs.append(pair)
            members[pair.name] = mask
    return pairs, members, left


def _came_back(split: EvaluatedSplit, rows: Tensor) -> bool:
    """Whether the coordinates moved in between although they ended where they began."""
    middle = split.series[len(split.series) // 2] - split.movement.start
    return float(coordinates(rows, middle).norm()) > 1e-7 * exact_length(middle)


def open_bench(
    split: EvaluatedSplit,
    pairs: Sequence[Hypothesis],
    members: Mapping[str, Bits],
    settings: TestSettings,
    parents: Groups | None = None,
) -> Bench:
    """What the pairs of one run share: losses, resampling of documents, parents, the null's tokens.

    Raises:
        ValueError: for parents that overlap.
    """
    tokens = split.tokens
    named = named_groups(parents or {}, tokens.count)
    partition = {name: mask.numpy() for name, mask in named.items()}
    if partition and int(np.sum(list(partition.values()), axis=0).max()) > 1:
        raise ValueError("parents must not share tokens, these do; give groups that exclude each other")
    kept = tokens.of_first_documents(settings.null_documents)
    rows = torch.unique(tokens.sequence_of[kept])
    return Bench(
        split,
        settings,
        draw_units(tokens.documents[tokens.sequence_of].numpy(), settings.resamples, settings.seed),
        partition,
        {pair.group.name: members[pair.name] for pair in pairs},
        split.on(tokens.select(rows)),
        kept.numpy(),
        recorded_paths(split, pairs),
    )


def _fill_pools(bench: Bench, pairs: Sequence[Hypothesis], axes: Mapping[str, Tensor], say: Progress) -> None:
    """One pool of in-span directions per basis, measured over the total damages that its pairs do."""
    settings, room = bench.settings, bench.headroom
    spans = {pair.basis: pair.span for pair in pairs if pair.span is not None}
    for name, span in spans.items():
        own = [p for p in pairs if p.basis == name]
        levels = [matched_level(bench.change(project_out(bench.split, p.rows)), room) for p in own]
        known = [level for level in levels if level > 0] or [0.1]
        pool_of = SpanPool(
            bench.nulls,
            span,
            settings.rotations,
            settings.seed + 5,
            lowest=max(LEVELS[0], min(known)),
            highest=min(LEVELS[1], 1.1 * max(known)),
            axes=axes.get(name),
        )
        bench.pools[name] = pool_of
        pool_of.fill(partial(_told, say, f"directions of {name}", settings.rotations))


def _told(say: Progress, name: str, total: int, done: int) -> None:
    say(name, done, total)


def attributed_by(observation: Observation, vectors: Sequence[int], tokens: TokenSet) -> Array | None:
    """(M,) loss change that POLCA gives some vectors, where the observation is of these tokens."""
    if observation.tokens.fingerprint() != tokens.fingerprint():
        return None
    given = observation.allocation.values.sum(0)[list(vectors)].sum(0)
    return np.asarray(given.double().numpy())
