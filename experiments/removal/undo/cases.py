"""``polca-edit study removal-cases``: removal by undoing where the model that was never taught is known.

A skill whose data enter training at a known step, and a backdoor: the case's twin is the same training
without the skill's data, so its weights are the gold model. Undoing and its rivals get the same repair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from experiments.application import say
from experiments.config import RunConfig
from experiments.config.sections import TrainingConfig
from experiments.natural.case import Case, Natural
from experiments.natural.cases import CASES
from experiments.natural.columns import BATCH
from experiments.natural.kept import Job, recording_key, recording_of
from experiments.natural.measure import MeasureSettings
from experiments.removal.undo.methods import GOLD, METHODS, SETTINGS, Clock, Start, fitted
from experiments.removal.undo.place import Effort, Place
from experiments.removal.undo.remove import repair_steps
from experiments.removal.undo.rows import Row, measured
from experiments.removal.undo.study import VERSION, chosen, with_gold
from experiments.removal.undo.tables import over
from experiments.removal.verb import logits_of
from experiments.report.formats import decimal, share
from experiments.report.tables import Column, Table, table
from experiments.run.run import Run
from experiments.run.store import RunDirectory
from experiments.study.results import publish, show, to_terminal
from experiments.verbs.options import Result
from interventions.discovery.windows import Window
from interventions.removal.optimise import FitSettings
from interventions.removal.remove import remove_skill
from interventions.removal.undo import Undo, repaired

#: Cases whose twin was never taught the target, and whose loss has logits.
NAMES = ("later_skill", "backdoor")
#: Ways by undoing -> method, and whether it begins where the skill's data entered instead of by the timeline.
UNDONE: Mapping[str, tuple[str, bool]] = {
    "rollback and repair": ("rollback", False),
    "return and repair": ("return", False),
    "rollback of the data's steps": ("rollback", True),
    "return to before the data": ("return", True),
}
RIVALS = ("GradDiff", "NPO", "gradient ascent")
#: Training's rate in the demo, for which the study's settings of rivals were written.
DEMO_RATE = 2.5e-4
WAYS = (GOLD, "untouched", *UNDONE, *RIVALS)
#: Gap to gold's relearning curve that counts as reached.
GOAL = 0.2


@dataclass(frozen=True)
class CaseSettings:
    """What every method gets, and how often select is looked at during repair."""

    effort: Effort = Effort()
    every: int = 10


def run_of(case: Case, seed: int, out: Path) -> tuple[Run, Natural]:
    """One case trained, or read back, as a run that the study's methods take.

    Args:
        case: with a task that draws new data and gives logits.
        seed: of the run.
        out: folder that runs are kept in.
    """
    natural, recording = case.build(seed, False), recording_of(case.name, False, seed, out)
    made = recording_key(Job(case.name, False, seed, out, MeasureSettings()))
    t, task = natural.training, natural.task
    config = RunConfig(
        seed=seed,
        training=TrainingConfig(
            steps=t.steps,
            batch_size=BATCH,
            learning_rate=t.learning_rate,
            weight_decay=t.weight_decay,
            betas=t.betas,
            warmup=t.warmup,
            record_every=natural.every,
        ),
    )
    task = replace(task, open_checkpoints=lambda: recording.series(task.space))
    directory = RunDirectory(out / case.name / f"removal-{seed}")
    return Run(directory, config, task, task.objective(config), say, made), natural


def never_taught(place: Place, case: Case) -> Start:
    """The gold model: the twin, trained anew so that its seconds are known."""
    clock = Clock.on(place)
    theta = case.build(place.run.config.seed, True).recorded().thetas[-1]
    return clock.start(theta, "the twin", finished=True, more=place.training_passes)


def undone(place: Place, natural: Natural, way: str, settings: CaseSettings) -> tuple[Start, int]:
    """Undone and repaired by the library's own call; windows from the timeline, or from the data's steps."""
    method, known = UNDONE[way]
    _ = Clock.on(place)  # what all methods share is computed before
    windows = (Window(*natural.window, "data"),) if known else ()
    steps = repair_steps(place.run)
    undo = Undo(
        method,
        windows,
        training=place.repair_settings(steps),
        every=settings.every,
        seed=place.run.config.seed,
    )
    split = place.problem.select.split
    found = remove_skill(split, place.rule, undo, logits=logits_of(place.run), batch=place.draws("repair"))
    assert found.undone is not None
    words = ", ".join(str(window) for window in found.undone.windows)
    theta = found.edit.moved(place.problem.theta)
    return Start(theta, words, (), found.passes, found.undone.seconds, True), found.undone.repair_steps


def rival_settings(way: str, rate: float) -> list[FitSettings]:
    """The study's four settings, their rates the same multiples of training's."""
    return [replace(s, learning_rate=s.learning_rate * rate / DEMO_RATE) for s in SETTINGS[way]]


def pushed(place: Place, way: str, settings: CaseSettings) -> tuple[Start, int]:
    """A rival, four settings compared by the study's probe, repaired as undoing is."""
    start = fitted(way, rival_settings(way, place.rate))(place, {})
    clock, steps = Clock.on(place), repair_steps(place.run)
    problem = replace(place.problem, batch=place.draws("repair"))
    found = repaired(problem, start.theta, place.repair_settings(steps), every=settings.every)
    return clock.start(found.theta, start.setting, start.tried, finished=True, before=(start,)), found.steps


def case_rows(
    case: Case, seed: int, out: Path, settings: CaseSettings, ways: Sequence[str] = WAYS
) -> list[Row]:
    """Every way on one case and seed, gold first; rows made before are read back."""
    run, natural = run_of(case, seed, out)
    place = Place(run, case.target, settings.effort)

    def row(way: str) -> Row:
        steps = 0
        if way == GOLD:
            start = never_taught(place, case)
        elif way in UNDONE:
            start, steps = undone(place, natural, way, settings)
        elif way in RIVALS:
            start, steps = pushed(place, way, settings)
        else:
            start = METHODS[way](place, {})
        return measured(place, way, start, steps, (start.theta, 0.0, 0.0), whole=False)

    found = []
    for way in ways:
        name = f"removal-cases/{''.join(c if c.isalnum() else '-' for c in way)}.json"
        own = [rival_settings(way, place.rate)] if way in RIVALS else []
        key = run.key_for(name, VERSION, settings, *own)
        found.append(run.directory.kept(name, key, Row, partial(row, way), run.objective.passes))
        say(f"  {case.name} seed {seed} {way:<30} loss {found[-1].target_loss:.2f}")
    return found


def reached(row: Row) -> tuple[bool, bool] | None:
    """Whether a method is within a fifth of gold: in the skill's loss, and while it is relearned.

    None for gold itself, and without it. Gold may be confidently wrong, so that its loss is more than not
    knowing the skill asks for.
    """
    if row.gap is None or row.gold_loss is None or row.method == GOLD:
        return None
    return row.target_loss >= (1 - GOAL) * row.gold_loss, row.gap <= GOAL


def case_table(rows: Mapping[str, Sequence[Row]]) -> Table:
    """Means over seeds; the smallest gap to gold first."""
    columns = (
        Column("case", left=True), Column("method", left=True), Column("undone, or setting", left=True),
        "seeds", "repair steps", "loss", "gold's", "worst other", "relearned", "gold's",
        "gap to gold", "passes", "seconds", "at gold's loss", "relearns as gold",
    )  # fmt: skip
    lines = []
    for case, here in rows.items():
        gold = over([row.relearn.loss[-1] for row in here if row.method == GOLD])
        made = {way: [row for row in here if row.method == way] for way in WAYS}
        found = sorted(
            ((over([r.gap for r in same]), way, same) for way, same in made.items() if same),
            key=lambda entry: (entry[1] != GOLD, entry[0] is None, entry[0] or 0.0),
        )
        for gap, way, same in found:
            met = [value for row in same if (value := reached(row)) is not None]
            lines.append(
                [
                    case,
                    way,
                    "; ".join(dict.fromkeys(row.setting for row in same)),
                    str(len(same)),
                    decimal(over([float(row.repair_steps) for row in same]), 0),
                    decimal(over([row.target_loss for row in same])),
                    decimal(over([row.gold_loss for row in same])),
                    share(over([row.worst_other_share for row in same])),
                    decimal(over([row.relearn.loss[-1] for row in same])),
                    decimal(gold),
                    share(gap),
                    share(over([row.passes_share for row in same])),
                    decimal(over([row.seconds for row in same]), 1),
                    f"{sum(level for level, _ in met)}/{len(met)}" if met else "-",
                    f"{sum(slow for _, slow in met)}/{len(met)}" if met else "-",
                ]
            )
    title = "Removal where the model that was never taught is known: losses in nats, shares of headroom"
    return table(columns, lines, title)


def removal_cases(
    case: Annotated[str | None, typer.Option(help="Comma-separated; default both.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 1,
    out: Annotated[Path, typer.Option(help="Where runs are kept; finished ones are read back.")] = Path(
        "runs/validate"
    ),
    json_: Result = None,
) -> None:
    """Take a late skill and a backdoor out; the yardstick is the same training without their data.

    Example: `polca-edit study removal-cases --seeds 2 --json removal-cases.json`
    """
    settings = CaseSettings()
    rows: dict[str, list[Row]] = {}
    for name in chosen(case, NAMES, "case"):
        rows[name] = with_gold(
            [row for seed in range(seeds) for row in case_rows(CASES[name], seed, out, settings)]
        )
    made = case_table(rows)
    if not to_terminal(json_):
        show([made])
    contents = {"settings": settings, "version": VERSION, "goal": GOAL, "rows": rows}
    first = run_of(CASES[next(iter(rows))], 0, out)[0].config
    publish(json_, "removal-cases/1", first, list(range(seeds)), contents, [made])
