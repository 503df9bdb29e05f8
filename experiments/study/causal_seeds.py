"""The causal test of several seeds on one page: words by family, answers about bases, one map.

``polca-edit study causal runs/demo runs/demo-1 ... --json docs/results/causal-demo.json``
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from experiments.application import say
from experiments.config import load_config
from experiments.report.chapters.verdicts import FAMILIES
from experiments.report.figures.seeds import Map, seeds_figure
from experiments.report.formats import decimal, nats, share
from experiments.report.style import Drawing
from experiments.report.tables import Table, table
from experiments.study.results import publish, show, to_terminal
from experiments.verbs.guard import require_different
from experiments.verbs.options import Result
from experiments.verdicts.records import BasisRow, CausalResult, ControlRow, VerdictRow
from polca_edit.artifacts import load_record

#: Words in the order of what they claim.
WORDS = ("carrier", "selective", "shared", "inert", "unclear")
#: Words that say yes to N and S.
FOUND = ("carrier", "selective")


@dataclass(frozen=True)
class FamilyRow:
    """One family of one basis of one run.

    Attributes:
        seed: of the run.
        basis: label.
        family: polca, interventional or skill.
        pairs: how many were tested.
        words: word -> pairs.
    """

    seed: int
    basis: str
    family: str
    pairs: int
    words: Mapping[str, int]


@dataclass(frozen=True)
class SkillRow:
    """A known skill, with the vector that costs it most on select, on unseen tokens of one run."""

    seed: int
    basis: str
    skill: str
    vector: int | None
    word: str
    damage: float | None
    share: float | None
    leakage: float | None
    worst: str
    grades: tuple[str, ...]


@dataclass(frozen=True)
class CausalSeeds:
    """What the result file holds beside config, seeds, versions and hardware.

    Attributes:
        families: words by family, run and basis.
        bases: answers A and P of every basis and run.
        skills: every known skill.
        controls: planted rules and their twins.
        found: pairs called selective or carrier, per (basis, family) over all runs.
        seconds: per run, of the causal test.
        exploratory: runs whose unseen tokens had been opened under another plan before.
        sequences: unseen sequences a run.
    """

    families: tuple[FamilyRow, ...]
    bases: tuple[BasisRow, ...]
    skills: tuple[SkillRow, ...]
    controls: tuple[ControlRow, ...]
    found: Mapping[str, tuple[int, int]]
    seconds: tuple[float, ...]
    exploratory: tuple[int, ...]
    sequences: int


def collect(results: Mapping[int, CausalResult]) -> CausalSeeds:
    """All runs' results as one record.

    Args:
        results: seed -> result of one run.
    """
    families = tuple(row for seed, one in results.items() for row in _families(seed, one.rows))
    keys = dict.fromkeys((row.basis, row.family) for row in families)
    found = {}
    for basis, family in keys:
        own = [row for row in families if (row.basis, row.family) == (basis, family)]
        yes = sum(row.words.get(word, 0) for row in own for word in FOUND)
        found[f"{basis} {family}"] = (yes, sum(row.pairs for row in own))
    return CausalSeeds(
        families,
        tuple(answer for one in results.values() for answer in one.bases),
        tuple(
            _skill(seed, row) for seed, one in results.items() for row in one.rows if row.family == "skill"
        ),
        tuple(control for one in results.values() for control in one.controls),
        found,
        tuple(one.seconds for one in results.values()),
        tuple(seed for seed, one in results.items() if one.exploratory),
        next(iter(results.values())).sequences,
    )


def _families(seed: int, rows: Sequence[VerdictRow]) -> Iterator[FamilyRow]:
    for basis, family in dict.fromkeys((row.basis, row.family) for row in rows):
        own = [row for row in rows if (row.basis, row.family) == (basis, family)]
        yield FamilyRow(seed, basis, family, len(own), dict(Counter(row.word for row in own)))


def _skill(seed: int, row: VerdictRow) -> SkillRow:
    return SkillRow(
        seed,
        row.basis,
        row.group,
        row.vector,
        row.word,
        row.damage,
        row.share,
        row.leakage,
        row.worst,
        row.grades,
    )


def family_table(found: CausalSeeds) -> Table:
    """One line per basis and family, all runs together."""
    lines = []
    for basis, family in dict.fromkeys((row.basis, row.family) for row in found.families):
        own = [row for row in found.families if (row.basis, row.family) == (basis, family)]
        counts = [sum(row.words.get(word, 0) for row in own) for word in WORDS]
        pairs = sum(row.pairs for row in own)
        lines.append([basis, FAMILIES[family], str(pairs), *map(str, counts)])
    return table(["basis", "pairs come from", "pairs", *WORDS], lines, "Words by family, all runs")


def answer_table(found: CausalSeeds) -> Table:
    """A and P of every basis and run."""
    lines = [
        [
            row.basis,
            str(row.seed),
            row.A,
            decimal(row.A_p, 3),
            decimal(row.A_rotated_p, 3),
            row.P,
            decimal(row.P_p, 3),
            decimal(row.P_statistic),
            decimal(row.P_null_median),
        ]
        for row in sorted(found.bases, key=lambda row: (row.basis, row.seed))
    ]
    headings = ("basis", "seed", "A", "p permuted", "p rotated", "P", "p", "three best axes", "rotated axes")
    return table(list(headings), lines, "Are clustered tokens the ones hurt (A)? Are the axes special (P)?")


def skill_table(found: CausalSeeds) -> Table:
    """Every known skill of every run and basis."""
    lines = [
        [
            row.basis,
            row.skill,
            str(row.seed),
            "" if row.vector is None else str(row.vector),
            nats(row.damage, 2),
            share(row.share),
            f"{row.worst} (x{decimal(row.leakage)})" if row.worst and row.leakage is not None else "–",
            " ".join([row.word, *row.grades]),
        ]
        for row in sorted(found.skills, key=lambda row: (row.basis, row.skill, row.seed))
    ]
    headings = ("basis", "skill", "seed", "vector", "nats", "share", "hurts most besides", "word")
    return table(list(headings), lines, "Known skills and the vector that costs them most on select")


def damage_map_of(seed: int, basis: str, rows: Sequence[VerdictRow], groups: Sequence[str]) -> Map:
    """The map of one basis, put together from the rows of its pairs."""
    own = [row for row in rows if row.basis == basis and row.vector is not None]
    vectors = sorted({row.vector for row in own if row.vector is not None})
    shares = np.full((len(vectors), len(groups)), np.nan)
    words = {}
    for row in own:
        assert row.vector is not None
        at = vectors.index(row.vector)
        known = {name: other.share for name, other in row.others.items()} | {row.group: row.share}
        for column, name in enumerate(groups):
            if known.get(name) is not None:
                shares[at, column] = known[name]
        if row.family == "skill" and row.group in groups:
            words[row.vector, row.group] = row.word
    return Map(f"{basis}, seed {seed}", tuple(vectors), tuple(groups), shares, words)


def causal_seeds(
    runs: Annotated[list[Path], typer.Argument(help="Runs that `polca-edit test` has tested, one a seed.")],
    json_: Result = None,
) -> None:
    """Gather the causal tests of several seeds: words by family, answers about bases, one figure."""
    require_different(runs)
    results = {}
    for place in runs:
        file = place / "verdicts.json"
        if not file.exists():
            raise ValueError(f"'{place}' must have been tested, it has no verdicts.json; run polca-edit test")
        results[load_config(place / "config.yaml").seed] = load_record(CausalResult, file)
    results = dict(sorted(results.items()))
    found = collect(results)
    tables = [family_table(found), answer_table(found), skill_table(found)]
    show(tables)
    passed = sum(control.passed for control in found.controls)
    say(f"positive controls passed: {passed} of {len(found.controls)}")
    publish(json_, "causal-seeds/1", load_config(runs[0] / "config.yaml"), list(results), found, tables)
    if json_ is not None and not to_terminal(json_):
        bases = list(dict.fromkeys(row.basis for row in found.bases))
        groups = list(dict.fromkeys(row.skill for row in found.skills))
        maps = [
            damage_map_of(seed, basis, one.rows, groups) for basis in bases for seed, one in results.items()
        ]
        drawing = Drawing(json_.stem, "", seeds_figure(maps, len(results)))
        drawing.write_png(json_.with_suffix(".png"))
