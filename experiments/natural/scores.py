"""How often the tool says yes where yes is true: rates per question, words, the ladder's ROC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sklearn.metrics import roc_auc_score, roc_curve

from experiments.natural.records import CaseRow, RunRows

QUESTIONS = ("N", "S", "W", "L", "D")
#: An axis nearer to its own block than this is a yes on the ladder, one farther off a no.
HALF_MIXED = 22.5


@dataclass(frozen=True)
class Rate:
    """Share of yes among the rows where a question was asked.

    Attributes:
        yes: rows with a yes.
        asked: rows where it was asked.
    """

    yes: int
    asked: int

    @property
    def share(self) -> float:
        """Yes over asked; NaN where it was never asked."""
        return self.yes / self.asked if self.asked else float("nan")


@dataclass(frozen=True)
class Ladder:
    """Selectivity as a score for "this axis is one task's own".

    Attributes:
        auc: area under the ROC, nearer than half mixed against farther.
        false_positive: of the curve.
        true_positive: of the curve.
        concordance: of two axes of one run and target at different angles, how often the purer one scores
            higher (ties half).
        by_degrees: angle -> mean selectivity.
        words: angle -> word -> count.
        rungs: how many axes.
    """

    auc: float
    false_positive: tuple[float, ...]
    true_positive: tuple[float, ...]
    concordance: float
    by_degrees: Mapping[str, float]
    words: Mapping[str, Mapping[str, int]]
    rungs: int


@dataclass(frozen=True)
class Failure:
    """A declared row whose word is not the truth, and the question at fault."""

    case: str
    twin: bool
    seed: int
    word: str
    question: str
    sentence: str


def rate(rows: Sequence[CaseRow], question: str) -> Rate:
    """Yes-rate of one question; ``N+S`` asks for both."""
    wanted = question.split("+")
    asked = [r for r in rows if all(r.answers.get(q, "not asked") != "not asked" for q in wanted)]
    return Rate(sum(all(r.answers[q] == "yes" for q in wanted) for r in asked), len(asked))


def rates(rows: Sequence[CaseRow]) -> dict[str, dict[str, Rate]]:
    """``cases`` and ``twins`` -> question -> rate."""
    halves = {"cases": [r for r in rows if not r.twin], "twins": [r for r in rows if r.twin]}
    return {
        name: {question: rate(half, question) for question in (*QUESTIONS, "N+S")}
        for name, half in halves.items()
    }


def rates_by_case(rows: Sequence[CaseRow]) -> dict[str, dict[str, dict[str, Rate]]]:
    """Case -> ``cases`` and ``twins`` -> question -> rate."""
    names = dict.fromkeys(row.case for row in rows)
    return {name: rates([row for row in rows if row.case == name]) for name in names}


def rates_by_chooser(rows: Sequence[CaseRow], targets: Mapping[str, str]) -> dict[str, dict[str, Rate]]:
    """``basis family`` -> ``cases`` and ``twins`` -> rate of N and S for the case's own group.

    Args:
        rows: along bases of which no truth is known.
        targets: case -> group.
    """
    own = [row for row in rows if row.pair.endswith(f"| {targets[row.case]}")]
    names = dict.fromkeys(f"{row.basis} {row.family}" for row in own)
    return {
        name: {
            half: rate([r for r in own if f"{r.basis} {r.family}" == name and r.twin == twin], "N+S")
            for half, twin in (("cases", False), ("twins", True))
        }
        for name in names
    }


def confusion(rows: Sequence[CaseRow]) -> dict[str, dict[str, int]]:
    """Truth -> word -> count."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        words = found.setdefault(row.truth, {})
        words[row.word] = words.get(row.word, 0) + 1
    return found


def failures(rows: Sequence[CaseRow]) -> list[Failure]:
    """Rows that did not pass, each with the first question that was answered wrongly."""
    found = []
    for row in rows:
        if row.passed:
            continue
        wanted = [q for q in ("N", "S", "L") if row.truth == "carrier" or q != "L"]
        wrong = next((q for q in wanted if row.answers[q] != "yes"), "none")
        question = "N and S both yes" if row.twin else f"{wrong}: {row.answers.get(wrong, '')}"
        found.append(Failure(row.case, row.twin, row.seed, row.word, question, row.sentence))
    return found


def ladder(runs: Sequence[RunRows]) -> Ladder | None:
    """The ROC over every mixed axis of every run; None without a ladder."""
    rungs = [rung for run in runs for rung in run.ladder]
    if not rungs:
        return None
    apart = [rung for rung in rungs if rung.degrees != HALF_MIXED]
    truth = [rung.degrees < HALF_MIXED for rung in apart]
    score = [rung.selectivity for rung in apart]
    false, true, _ = roc_curve(truth, score)
    agree, pairs = 0.0, 0
    for run in runs:
        for one in run.ladder:
            for two in run.ladder:
                if one.other == two.other and one.degrees < two.degrees:
                    agree += (one.selectivity > two.selectivity) + 0.5 * (one.selectivity == two.selectivity)
                    pairs += 1
    angles = sorted({rung.degrees for rung in rungs})
    at = {angle: [r for r in rungs if r.degrees == angle] for angle in angles}
    words = {
        f"{angle:g}": {
            word: sum(r.word == word for r in some) for word in dict.fromkeys(r.word for r in some)
        }
        for angle, some in at.items()
    }
    means = {f"{angle:g}": sum(r.selectivity for r in some) / len(some) for angle, some in at.items()}
    auc = float(roc_auc_score(truth, score))
    return Ladder(auc, tuple(false.tolist()), tuple(true.tolist()), agree / pairs, means, words, len(rungs))
