"""Tables of causal verdicts: for the page and for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console

from experiments.report.formats import MISSING, decimal, nats, share
from experiments.report.tables import Cell, Column, Table, table
from experiments.run.summary.records import VerdictEntry

#: Order of the families of a table, and what they are called.
FAMILIES = {
    "polca": "POLCA's own cluster",
    "interventional": "found by undoing",
    "skill": "known skill, worst vector",
    "own": "your own pair",
}
WORDS = {"not asked": MISSING}
LETTERS = {"yes": "y", "no": "n", "unclear": "?"}
#: Words of rows that a terminal only counts.
QUIET = ("inert", "unclear")


def verdict_table(rows: Sequence[tuple[str, VerdictEntry]], *, look: str = "", title: str = "") -> Table:
    """One line per pair.

    Args:
        rows: (basis, verdict).
        look: CSS classes.
        title: above the terminal's table.
    """
    columns: list[Column | str] = [
        Column("undone", left=True),
        Column("hurts", left=True),
        "by (nats)",
        "of headroom",
        Column("hurts most besides", left=True, note="largest share of another group, over the target's"),
        Column("needed", note="N: more than random edits of its size"),
        Column("selective", note="S: and no other group by a third of it"),
        Column("within", note="W: the group rather than the rest of its digit"),
        Column("carries", note="L: inserted alone, it brings the skill"),
        Column("word", left=True),
        Column("pair", left=True),
    ]
    order = list(FAMILIES)
    ordered = sorted(rows, key=lambda r: (order.index(r[1].family), r[0], -(r[1].damage or 0.0)))
    return table(columns, [_cells(basis, verdict) for basis, verdict in ordered], look=look, title=title)


def _cells(basis: str, v: VerdictEntry) -> list[Cell | str]:
    leak = "" if v.leakage is None or not v.worst else f"{v.worst} ({decimal(v.leakage)})"
    interval = v.intervals.get("damage")
    note = "" if interval is None else f"{decimal(interval[0])} to {decimal(interval[1])}; {v.sentence}"
    return [
        basis if v.vector is None else f"{basis} {v.vector}",
        v.group,
        Cell(nats(v.damage, 2), sort=v.damage, note=note),
        Cell(share(v.share), sort=v.share),
        Cell(leak or MISSING, sort=v.leakage),
        *(WORDS.get(v.answers.get(q, "not asked"), v.answers.get(q, MISSING)) for q in ("N", "S", "W", "L")),
        Cell(v.word, look="strong", note=v.sentence),
        FAMILIES[v.family],
    ]


def brief_table(rows: Sequence[tuple[str, VerdictEntry]]) -> Table:
    """The same in seven columns for a terminal, rows that hurt nothing left out."""
    columns: list[Column | str] = [
        Column("undone", left=True),
        Column("hurts", left=True),
        "nats",
        "share",
        Column("and besides", left=True),
        Column("N S W L", left=True),
        Column("word", left=True),
    ]
    cells: list[list[Cell | str]] = []
    for basis, v in rows:
        undone = basis if v.vector is None else f"{basis} {v.vector}"
        letters = " ".join(LETTERS.get(v.answers.get(q, "not asked"), "-") for q in ("N", "S", "W", "L"))
        besides = MISSING if v.leakage is None or not v.worst else f"{v.worst} (x{decimal(v.leakage)})"
        cells.append([undone, v.group, nats(v.damage, 1), share(v.share), besides, letters, v.word])
    return table(columns, cells, title="Causal test, unseen tokens (rows that hurt nothing left out)")


def basis_table(answers: Mapping[str, Mapping[str, str]]) -> Table:
    """A and P of every basis."""
    columns: list[Column | str] = [
        Column("basis", left=True),
        Column("are clustered tokens the ones hurt? (A)", left=True),
        Column("are its axes special? (P)", left=True),
    ]
    return table(columns, [[name, a.get("A", MISSING), a.get("P", MISSING)] for name, a in answers.items()])


def print_verdicts(
    rows: Sequence[tuple[str, VerdictEntry]], answers: Mapping[str, Mapping[str, str]], console: Console
) -> None:
    """The table, the sentences of what was found, and the answers about the bases."""
    told = [row for row in rows if row[1].word not in QUIET]
    console.print(brief_table(told).terminal())
    for family, words in FAMILIES.items():
        found = Counter(verdict.word for _, verdict in rows if verdict.family == family)
        if found:
            counts = ", ".join(f"{number} {word}" for word, number in found.most_common())
            console.print(f"  {words}: {counts}", highlight=False, markup=False)
    for _, verdict in rows:
        if verdict.word in ("selective", "carrier"):
            console.print(f"  {verdict.word}: {verdict.sentence}", highlight=False, markup=False)
    for name, given in answers.items():
        text = f"  basis {name}: clustered tokens are the ones hurt: {given['A']}; axes special: {given['P']}"
        console.print(text, highlight=False, markup=False)
