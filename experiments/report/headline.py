"""The first table of the page: what takes each skill away, how sure that is, and what else it costs.

One line a skill, on tokens that nothing had used. Where the run was tested, the line is a verdict of the
causal test, or a skill axis where no vector takes the skill alone and an axis does. Where it was not, the
line is what :mod:`experiments.report.answers` finds on the evaluate split, and says that it is untested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.discover.records import AxesRecord, DiscoverResult, FullAxis, load_discovery
from experiments.report.answers import TAKEN, Answer, answers, share_cell
from experiments.report.formats import MISSING, decimal, listed, nats, number, share
from experiments.report.tables import Cell, Column, Table, table
from experiments.report.view import RunView
from experiments.run.store import RunDirectory
from experiments.run.summary.records import VerdictEntry
from polca_edit.artifacts import load_record

#: Words of the causal test, the strongest first, and how the page shows them.
LOOKS = {"carrier": "good", "selective": "good", "shared": "mixed", "unclear": "soft", "inert": "soft"}
#: Words that say a skill goes alone.
ALONE = ("carrier", "selective")
#: Another group may lose this share of what the target loses, and a null set does as well this often.
LEAKAGE, LEVEL = 1 / 3, 0.05


@dataclass(frozen=True)
class TestedPair:
    """What the page takes from ``rows[]`` of verdicts.json beside the summary's entries."""

    __test__ = False

    name: str
    basis: str
    delta: float | None = None


@dataclass(frozen=True)
class TestFile:
    """verdicts.json: the damage that random edits do, and whether its tokens had been opened before."""

    __test__ = False

    rows: tuple[TestedPair, ...] = ()
    exploratory: bool = False
    sequences: int = 0


@dataclass(frozen=True)
class Found:
    """All that a run knows of what takes its skills away.

    Attributes:
        tested: verdicts.json, None where there is none.
        discovery: discovery.json, None where there is none.
        axes: (basis, target) -> the axis with everything that was measured.
    """

    tested: TestFile | None
    discovery: DiscoverResult | None
    axes: Mapping[tuple[str, str], FullAxis]


@dataclass(frozen=True)
class Line:
    """One line of the first table.

    Attributes:
        skill: it is about.
        what: vector or axis.
        damage: on the skill, nats per token.
        part: of its headroom.
        worst: the other group that loses most, and how much, in words.
        leak: its share of headroom; for a verdict over the target's.
        null: what chance does, in words.
        word: of the causal test, "axis" for an axis, "untested" where nothing was tested.
        sentence: in plain words.
        kind: verdict, axis or untested.
    """

    skill: str
    what: str
    damage: float | None
    part: float | None
    worst: str
    leak: float | None
    null: str
    word: str
    sentence: str
    kind: str

    @property
    def alone(self) -> bool:
        """Whether the skill goes and no other one with it."""
        return self.kind == "axis" or self.word in ALONE or self.word == "untested, alone"


def read_found(directory: RunDirectory) -> Found:
    """Verdicts and axes of a run, from their records."""
    file = directory / "verdicts.json"
    tested = load_record(TestFile, file) if file.exists() else None
    result = load_discovery(directory.path)
    return Found(tested, result, {} if result is None else full_axes(directory, result))


def full_axes(directory: RunDirectory, result: DiscoverResult) -> dict[tuple[str, str], FullAxis]:
    """(basis, target) -> axis, from the records the axes were measured into."""
    found = {}
    for basis in dict.fromkeys(row.basis for row in result.axes):
        path = directory.path / "kept" / "discover" / f"axes-{basis}.safetensors"
        if path.exists():
            found.update({(basis, a.row.target): a for a in load_record(AxesRecord, path).axes})
    return found


def lines(view: RunView, found: Found) -> list[Line]:
    """One line for every known skill of which something is known, in order of their names."""
    untested = {answer.skill: answer for answer in answers(view)}
    made = []
    for skill in view.skills:
        verdict, axis = _verdict_line(view, found, skill), _axis_line(found, skill)
        if verdict is not None and verdict.alone:
            made.append(verdict)
        elif axis is not None:
            made.append(axis)
        elif verdict is not None:
            made.append(verdict)
        elif skill in untested:
            made.append(_untested_line(untested[skill]))
    return made


def _verdict_line(view: RunView, found: Found, skill: str) -> Line | None:
    """The strongest verdict on a whole skill: by its word, then by what leaks, then by its share."""
    rows = [
        (basis, v)
        for basis, analysis in view.summary.analyses.items()
        for v in analysis.verdicts
        if v.family == "skill" and v.group == skill and v.vector is not None
    ]
    if not rows:
        return None
    order = list(LOOKS)

    def strength(row: tuple[str, VerdictEntry]) -> tuple[int, float, float]:
        v = row[1]
        return order.index(v.word), v.leakage if v.leakage is not None else 9e9, -(v.share or 0.0)

    basis, v = min(rows, key=strength)
    worst = MISSING if not v.worst or v.leakage is None else f"{v.worst} (×{decimal(v.leakage)})"
    return Line(
        skill,
        f"{basis} v{v.vector}",
        v.damage,
        v.share,
        worst,
        v.leakage,
        _null_words(found, basis, v),
        v.word,
        v.sentence,
        "verdict",
    )


def _null_words(found: Found, basis: str, v: VerdictEntry) -> str:
    rows = found.tested.rows if found.tested is not None else ()
    delta = next((r.delta for r in rows if (r.basis, r.name) == (basis, v.name)), None)
    told = [] if delta is None else [f"random edits {decimal(delta)}"]
    p = v.p_values.get("S")
    return "; ".join([*told, *([] if p is None else [f"p = {number(p, 2)}"])]) or MISSING


def _axis_line(found: Found, skill: str) -> Line | None:
    """The axis that takes a skill and beats the same search for random token sets; None where none does."""
    if found.discovery is None:
        return None
    rows = [
        row
        for row in found.discovery.axes
        if row.target == skill
        and row.share is not None
        and row.share >= TAKEN
        and (row.worst_other or 0.0) < LEAKAGE * row.share
        and row.null_p is not None
        and row.null_p <= LEVEL
    ]
    if not rows:
        return None
    row = max(rows, key=lambda r: (r.share or 0.0) - (r.worst_other or 0.0))
    full = found.axes.get((row.basis, skill))
    damage = None if full is None else full.effect.damage.estimate
    worst = "" if full is None else f"{full.effect.worst} "
    cost = "" if damage is None else f" costs it {decimal(damage)} nats and"
    sentence = (
        f"Undoing the axis for {skill} in the {row.basis} span{cost} takes {share(row.share)} of what it "
        f"learned; no other group loses more than {share(row.worst_other)}."
    )
    return Line(
        skill,
        f"{row.basis} axis",
        damage,
        row.share,
        f"{worst}{share(row.worst_other)}",
        row.worst_other,
        f"random sets {share(row.null_p95)}; p = {number(row.null_p, 2)}",
        "axis",
        sentence,
        "axis",
    )


def _untested_line(answer: Answer) -> Line:
    worst = answer.worst
    outcome = {"alone": "untested, alone", "with others": "untested, with others", "not taken": "not taken"}
    return Line(
        answer.skill,
        f"{answer.basis} v{answer.vector}",
        answer.own.damage,
        answer.own.share,
        MISSING if worst is None else f"{worst.group} {nats(worst.damage, 2)} ({share(worst.share)})",
        None if worst is None else worst.share,
        MISSING,
        outcome[answer.outcome],
        answer.sentence,
        "untested",
    )


# -- the table and the words ----------------------------------------------------------------------


def headline_table(made: Sequence[Line], hues: Mapping[str, str]) -> Table:
    """Skill, what takes it away, damage, the worst other, the null, the word and a sentence."""
    columns = (
        Column("skill", left=True),
        Column("taken away by", left=True, note="the vector or axis whose recorded movement is undone"),
        Column("damage (nats)", note="mean loss change of the skill's unseen tokens"),
        Column("of headroom", note="share of what undoing all training would cost, capped per token"),
        Column(
            "worst other", left=True, note="the group that loses most besides; × is over the target's share"
        ),
        Column(
            "null",
            left=True,
            note="nats that random edits cost; for an axis, the share its search takes of random sets",
        ),
        Column("word", left=True, note="of the causal test; see below"),
        Column("in words", left=True),
    )
    rows: list[list[Cell | str]] = [
        [
            Cell(line.skill, colour=hues.get(line.skill), look="strong"),
            line.what,
            Cell(nats(line.damage, 2), sort=line.damage),
            share_cell(line.part),
            Cell(line.worst, sort=line.leak, look="beside"),
            Cell(line.null, look="beside"),
            Cell(line.word, look=LOOKS.get(line.word, "good" if line.alone else "soft")),
            Cell(line.sentence, look="sentence"),
        ]
        for line in made
    ]
    # Where nothing was tested there is no null, and its column would only take room.
    empty = [i for i, column in enumerate(columns) if column.heading == "null" and not _told(made)]
    kept = [i for i in range(len(columns)) if i not in empty]
    return table(
        [columns[i] for i in kept],
        [[row[i] for i in kept] for row in rows],
        "What takes each skill away (unseen tokens)",
        look="cards first",
    )


def _told(made: Sequence[Line]) -> bool:
    """Whether any line has a null."""
    return any(line.null != MISSING for line in made)


def headline_words(made: Sequence[Line]) -> list[str]:
    """What was found, in two or three plain sentences."""
    vectors = [
        f"{line.skill} ({line.what}: {nats(line.damage, 2)} nats, worst other {line.worst})"
        for line in made
        if line.alone and line.kind != "axis"
    ]
    axes = [line.skill for line in made if line.kind == "axis"]
    rest = [line.skill for line in made if not line.alone]
    told = [
        f"{len(vectors)} of {len(made)} skills can be taken away alone by undoing one recorded vector"
        + (f": {listed(vectors)}." if vectors else ".")
    ]
    if axes:
        told.append(f"A direction between the vectors takes {listed(axes)} alone.")
    if rest:
        which = "any of them" if len(rest) == len(made) else listed(rest)
        told.append(f"Nothing that was tried takes {which} without others.")
    return told
