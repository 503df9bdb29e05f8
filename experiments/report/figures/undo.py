"""Figures of removal by undoing: how fast a skill comes back, and cost against how long the removal lasts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from experiments.report.style import (
    GREY,
    INK,
    PAIRED,
    SLATE,
    Drawing,
    colours,
    new_figure,
    shared_legend,
    styled,
)

#: Drawn in black: the model that was never taught the skill.
GOLD = "retrained without the data"
#: Methods whose curves are drawn; the frontier has all of them.
SHOWN = (
    "return and repair",
    "return, one width earlier",
    "rollback and repair",
    "rollback, one width earlier",
    "GradDiff",
    "NPO",
    "CIR",
    "noise and distil",
    "skill axes, rank 1",
    "untouched",
)


@dataclass(frozen=True)
class Relearned:
    """The skill's loss while training goes on with a share of its labels."""

    fraction: float
    steps: tuple[int, ...]
    loss: tuple[float, ...]


@dataclass(frozen=True)
class UndoRow:
    """What the figures need of a row of the study; its other keys are ignored.

    Attributes:
        skill: what was removed.
        method: how.
        repair_steps: on everything else.
        chance: loss of the best constant answer, nats.
        relearn: with a tenth of the labels.
        passes_share: cost, of the recorded training.
        gap_to_ignorance: how far below a model that does not know the skill, while it is relearned.
    """

    skill: str
    method: str
    repair_steps: int
    chance: float
    relearn: Relearned
    passes_share: float
    gap_to_ignorance: float | None = None


@styled()
def undo_figure(rows: Sequence[UndoRow]) -> Figure:
    """One line of panels a skill: relearning curves (means over seeds), and cost against gap."""
    skills = list(dict.fromkeys(row.skill for row in rows))
    names = list(dict.fromkeys(row.method for row in rows if row.method != GOLD))
    hues = {**colours(names), GOLD: INK}
    # More methods than colours: the next rounds have other markers.
    shapes = {name: "os^D"[index // 10 % 4] for index, name in enumerate(names)}
    figure = new_figure(3.1 * len(skills))
    grid = figure.subplots(len(skills), 2, squeeze=False)
    for (left, right), skill in zip(grid, skills, strict=True):
        here = [row for row in rows if row.skill == skill]
        left.axhline(here[0].chance, color=GREY, linewidth=0.8, linestyle=":")
        for method, steps in dict.fromkeys((row.method, row.repair_steps) for row in here):
            same = [row for row in here if (row.method, row.repair_steps) == (method, steps)]
            if method in (*SHOWN, GOLD) and steps == _usual(here, method):
                means = [
                    statistics.mean(values) for values in zip(*(r.relearn.loss for r in same), strict=True)
                ]
                wide = 2.0 if method == GOLD else 1.2
                left.plot(same[0].relearn.steps, means, color=hues[method], label=method, lw=wide, marker=".")
            gaps = [row.gap_to_ignorance for row in same if row.gap_to_ignorance is not None]
            if gaps:
                cost = statistics.mean(row.passes_share for row in same)
                right.plot(
                    cost,
                    statistics.mean(gaps),
                    shapes.get(method, "*"),
                    ms=5,
                    color=hues[method],
                    label=method,
                )
        left.set(
            xlabel="training steps with a tenth of its labels", ylabel=f"loss of {skill}, nats", ylim=(0, 4)
        )
        right.set(
            xlabel="passes, share of the whole training", ylabel="gap to not knowing it", ylim=(-0.03, 1)
        )
        right.axhline(0.2, color=GREY, linewidth=0.8, linestyle=":")
    shared_legend(figure, list(grid.flat), 3)
    return figure


def _usual(rows: Sequence[UndoRow], method: str) -> int:
    """The number of repair steps whose curve is drawn: the one nearest 60."""
    return min((row.repair_steps for row in rows if row.method == method), key=lambda steps: abs(steps - 60))


def draw(rows: Sequence[UndoRow], file: Path) -> None:
    """Write the picture as PNG."""
    Drawing(
        file.stem, "how fast skills come back after removal, and what it cost", undo_figure(rows)
    ).write_png(file)


# -- one edit of one run ----------------------------------------------------------------------------

RETURN_CAPTION = (
    "How {skill} comes back: its exact loss on the evaluate split while the edited model is trained on "
    "everything, with {share} of the labels of {skill}. Dotted: the best constant answer, what a model that "
    "knows nothing of it can reach; dashed: before the edit."
)


@dataclass(frozen=True)
class Returned:
    """The skill while training goes on after one removal; other keys are ignored.

    Attributes:
        given_back: share of its labels.
        steps: of training.
        loss: of the skill, nats.
        chance: loss of the best constant answer, nats; None in older files.
        before: loss before the edit, nats; None in older files.
    """

    given_back: float
    steps: tuple[int, ...]
    loss: tuple[float, ...]
    chance: float | None = None
    before: float | None = None


@styled()
def return_figure(returned: Returned, skill: str) -> Figure:
    """The curve, with chance and the loss before the edit as lines of their own."""
    figure = new_figure(3.2, PAIRED)
    axes = figure.subplots()
    axes.plot(returned.steps, returned.loss, color=SLATE, marker=".", lw=1.6, label=f"{skill}, relearned")
    ends = (returned.steps[0], returned.steps[-1])
    for value, line, label in (
        (returned.chance, ":", "best constant answer"),
        (returned.before, "--", "before the edit"),
    ):
        if value is not None:
            axes.plot(ends, (value, value), line, color=GREY, lw=1.2, label=label)
    axes.set(xlabel="training steps", ylabel="exact loss (nats per token)", ylim=(0, None))
    shared_legend(figure, [axes], 3)
    return figure
