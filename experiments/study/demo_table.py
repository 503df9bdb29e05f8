"""What several seeds of one arithmetic config found, beside the targets of the demo.

``python -m experiments.study.demo_table runs/demo runs/demo-1 ... --json FILE``
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from experiments.application import run_application, say
from experiments.config import load_config
from experiments.report.formats import decimal, nats, share
from experiments.report.tables import Table, table
from experiments.run.run_record import read_run_record
from experiments.run.store import RunDirectory
from experiments.run.summary.records import (
    Agreement,
    Analysis,
    ClusterEntry,
    DamageRow,
    Summary,
    read_summary,
)
from experiments.study.results import publish, show
from experiments.verbs.guard import require_different
from experiments.verbs.options import Result

#: The digits, of which an edit should hurt one alone.
DIGITS = ("1000s", "100s", "10s", "1s")
#: Skill that is learned first by every model and says little.
EASY = "1000s"
#: A selective vector costs its digit at least this much, nats, and another at most this share of that.
COSTLY, SPARED = 1.0, 0.05


@dataclass(frozen=True)
class Fit:
    """How a set of tokens agrees with one skill.

    Attributes:
        homogeneity: share of its tokens with the skill.
        recall_all: share of all tokens with the skill.
        lift: homogeneity over the skill's share of all tokens.
    """

    homogeneity: float
    recall_all: float
    lift: float

    @classmethod
    def of(cls, entry: Agreement, skill: str) -> Fit:
        """From an entry of summary.json."""
        return cls(entry.homogeneity[skill], entry.recall_all[skill], entry.lift[skill])


#: What a cluster must reach to count, and the smallest share of all tokens.
BOUNDS, SMALLEST = Fit(0.9, 0.3, 1.5), 0.05


@dataclass(frozen=True)
class BestCluster:
    """The cluster nearest to all bounds for a skill other than the easy one, chosen on select.

    Attributes:
        basis: of its vector.
        vector: index in the basis.
        cluster: index along the vector.
        skill: it agrees with.
        met: whether all bounds are met on select.
        share: of all select tokens.
        select: agreement where it was chosen.
        evaluate: agreement of the tokens that its rule assigns; None where it assigns none.
        rule_auc: of that rule.
    """

    basis: str
    vector: int
    cluster: int
    skill: str
    met: bool
    share: float
    select: Fit
    evaluate: Fit | None
    rule_auc: float | None


@dataclass(frozen=True)
class SelectiveVector:
    """The vector whose undoing costs one digit at least 1 nat and the worst other digit least of that.

    It is chosen on select; the numbers are those of evaluate.

    Attributes:
        basis: it is of.
        vector: index.
        skill: the digit.
        on: loss change of that digit, nats.
        off: loss change of the worst other digit, nats.
        share: positive part of off over on; None where nothing is lost.
    """

    basis: str
    vector: int
    skill: str
    on: float
    off: float
    share: float | None


@dataclass(frozen=True)
class DemoRow:
    """One finished run.

    Attributes:
        run: name of its directory.
        seed: its seed.
        seconds: of all stages.
        threads: of torch; None where it was not noted.
        peak_rss_bytes: peak memory.
        quadrature_share: basis -> quadrature error over the exact change.
        explained_share: basis -> attributed over exact.
        cluster: best one, None without clusters.
        vector: most selective one, None where none costs a digit 1 nat.
    """

    run: str
    seed: int
    seconds: float
    threads: int | None
    peak_rss_bytes: int
    quadrature_share: dict[str, float]
    explained_share: dict[str, float | None]
    cluster: BestCluster | None
    vector: SelectiveVector | None


def reached(fit: Fit, size: float) -> float:
    """Product of the reached fractions of the bounds, 1 where all are met.

    >>> reached(Fit(0.9, 0.15, 3.0), 0.05)
    0.5
    """
    product = min(size / SMALLEST, 1.0)
    for name, bound in asdict(BOUNDS).items():
        product *= min(getattr(fit, name) / bound, 1.0)
    return product


def best_cluster(summary: Summary) -> BestCluster | None:
    """The cluster that reaches most of the bounds; of equals, the one with the larger agreement."""
    best: tuple[tuple[float, float], BestCluster] | None = None
    for name, analysis in summary.analyses.items():
        for entry in analysis.clusters:
            size = entry.tokens / summary.tokens.select
            for skill in (known for known in entry.homogeneity if known != EASY):
                fit = Fit.of(entry, skill)
                rank = reached(fit, size), fit.homogeneity * fit.recall_all
                if best is None or rank > best[0]:
                    best = rank, _described(name, analysis, entry, skill, size)
    return best[1] if best else None


def _described(name: str, analysis: Analysis, entry: ClusterEntry, skill: str, size: float) -> BestCluster:
    fit, place = Fit.of(entry, skill), (entry.vector, entry.cluster)
    again = next((c for c in analysis.evaluate_clusters if (c.vector, c.cluster) == place), None)
    return BestCluster(
        name,
        *place,
        skill,
        reached(fit, size) == 1.0,
        size,
        fit,
        Fit.of(again, skill) if again else None,
        again.rule_auc if again else None,
    )


def most_selective(summary: Summary) -> SelectiveVector | None:
    """The most selective vector of all bases."""

    def damaged(row: DamageRow | None) -> dict[str, float]:
        return {name: row.groups[name] for name in DIGITS if name in row.groups} if row else {}

    def worst_other(parts: dict[str, float], skill: str) -> float:
        return max(value for name, value in parts.items() if name != skill)

    def candidates() -> Iterator[tuple[float, str, int, str]]:
        for name, analysis in summary.analyses.items():
            for vector in analysis.vectors:
                parts = damaged(analysis.damage_row(vector.vector, None, "select"))
                skill = max(parts, key=lambda key: parts[key], default=None)
                if skill is not None and len(parts) > 1 and parts[skill] >= COSTLY:
                    off = max(worst_other(parts, skill), 0.0)
                    yield off / parts[skill], name, vector.vector, skill

    chosen = min(candidates(), key=lambda entry: entry[0], default=None)
    if chosen is None:
        return None
    _, name, index, skill = chosen
    parts = damaged(summary.analyses[name].damage_row(index, None, "evaluate"))
    if skill not in parts:
        return None
    on, off = parts[skill], worst_other(parts, skill)
    return SelectiveVector(name, index, skill, on, off, max(off, 0.0) / on if on > 0 else None)


def demo_row(run: Path) -> DemoRow:
    """One row from a run's records.

    Raises:
        ValueError: if the run is not finished.
    """
    summary, record = read_summary(run), read_run_record(RunDirectory(run))
    changes = {name: analysis.loss_change for name, analysis in summary.analyses.items()}
    return DemoRow(
        run.name,
        summary.seed,
        summary.cost.seconds,
        record.hardware.torch_threads if record.hardware else None,
        summary.cost.peak_rss_bytes,
        {name: change.quadrature_error / change.exact for name, change in changes.items()},
        {name: analysis.basis.explained_share for name, analysis in summary.analyses.items()},
        best_cluster(summary),
        most_selective(summary),
    )


def seeds_table(rows: Sequence[DemoRow]) -> Table:
    """One line a seed."""
    lines = []
    for row in rows:
        found, vector = row.cluster, row.vector
        words = ["–", "–", "none"]
        if found is not None:
            words[0] = f"{found.skill} {_fit(found.select)}" + (" met" if found.met else "")
            words[1] = _fit(found.evaluate) if found.evaluate else "–"
        if vector is not None:
            words[2] = f"{vector.skill} {nats(vector.on, 2)}, others {nats(vector.off)}"
        lines.append(
            [
                str(row.seed),
                f"{row.seconds:.0f}",
                f"{row.peak_rss_bytes / 1e9:.1f}",
                share(max(abs(value) for value in row.quadrature_share.values())),
                share(row.explained_share.get("trajectory")),
                *words,
            ]
        )
    headings = ("seed", "seconds", "GB", "quadrature error", "explained (trajectory)", "best cluster, select")
    return table(
        [*headings, "the same, rule on evaluate", "most selective vector, evaluate"],
        lines,
        "Seeds beside the targets of the demo (h homogeneity, r recall, l lift)",
    )


def _fit(fit: Fit) -> str:
    return f"h {decimal(fit.homogeneity)} r {decimal(fit.recall_all)} l {decimal(fit.lift, 1)}"


def demo_table(
    runs: Annotated[list[Path], typer.Argument(help="Finished run directories, one per seed.")],
    json_: Result = None,
) -> None:
    """Print what each seed reached beside the targets, and write it."""
    require_different(runs)
    rows = sorted((demo_row(run) for run in runs), key=lambda row: row.seed)
    clusters_met = sum(row.cluster is not None and row.cluster.met for row in rows)
    shares = [row.vector.share for row in rows if row.vector is not None]
    vectors_met = sum(value is not None and value <= SPARED for value in shares)
    tables = [seeds_table(rows)]
    show(tables)
    say(f"cluster bounds met by {clusters_met} of {len(rows)} seeds, vector bounds by {vectors_met}")
    contents = {
        "bounds": BOUNDS,
        "smallest": SMALLEST,
        "clusters_met": clusters_met,
        "vectors_met": vectors_met,
        "median_seconds": statistics.median(row.seconds for row in rows),
        "rows": rows,
    }
    config = load_config(runs[0] / "config.yaml")
    publish(json_, "demo-table/2", config, [row.seed for row in rows], contents, tables)


if __name__ == "__main__":
    run_application(demo_table)
