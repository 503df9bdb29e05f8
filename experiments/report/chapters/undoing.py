"""What was undone to take a skill out: what was said first beside what fell, repair, relearning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from experiments.report.answers import share_cell
from experiments.report.blocks import Block, heading, paragraph
from experiments.report.figures.undo import RETURN_CAPTION, Returned, return_figure
from experiments.report.formats import decimal, listed, share
from experiments.report.style import Drawing
from experiments.report.tables import Cell, Column, Table, table
from interventions.removal.forecast import Forecast


@dataclass(frozen=True)
class Undone:
    """What the page needs of an undoing; its other keys are ignored."""

    forecast: Forecast
    repair_steps: int
    undone_norm: float
    repair_norm: float
    seconds: float


def undoing_blocks(
    edit: str,
    skill: str,
    undone: Undone,
    fell: dict[str, float | None],
    target_share: float,
    returned: Returned | None,
) -> list[Block]:
    """One edit made by undoing.

    Args:
        edit: its file's name.
        skill: what was removed.
        undone: windows, repair and what was said first.
        fell: group -> share of headroom lost on evaluate.
        target_share: the same of the skill.
        returned: the skill under training that gives its labels back, where it was measured.
    """
    blocks: list[Block] = [
        heading(f"What was undone: {edit}"),
        paragraph(undoing_words(skill, undone)),
        forecast_table(skill, undone.forecast, fell, target_share),
    ]
    if returned is not None:
        words = RETURN_CAPTION.format(skill=skill, share=share(returned.given_back))
        blocks.append(Drawing(f"relearning {edit}", words, return_figure(returned, skill)))
    return blocks


def undoing_words(skill: str, undone: Undone) -> str:
    """Windows, repair and cost."""
    said, steps = undone.forecast, undone.repair_steps
    built = f" {listed(list(said.descendants))} built on it." if said.descendants else ""
    repair = (
        f"Repair: {steps} training steps on everything else (moved by {decimal(undone.repair_norm)})."
        if steps
        else "Nothing was repaired afterwards."
    )
    return (
        f"{skill} was learned in steps {said.window}.{built} What was done: {said.act} (the weights moved by "
        f"{decimal(undone.undone_norm)}). {repair} It took {decimal(undone.seconds, 0)} seconds."
    )


def forecast_table(skill: str, said: Forecast, fell: dict[str, float | None], target_share: float) -> Table:
    """The skill, then every other group by what was said of it."""
    columns = (
        Column("group", left=True),
        Column("said first", note="share of headroom lost by undoing alone, on select tokens"),
        Column("fell", note="share of headroom lost by the edit with its repair, on evaluate tokens"),
    )
    known = {name: value for name, value in said.falls.items() if math.isfinite(value)}
    order = sorted(known, key=lambda name: -known[name])
    rows: list[list[Cell | str]] = [[skill, share_cell(said.share), share_cell(target_share)]]
    rows += [[name, share_cell(known[name]), share_cell(fell.get(name))] for name in order]
    return table(columns, rows)
