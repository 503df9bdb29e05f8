"""Training a recorded run again from a branch point: blocked (O5), with a window skipped (O3c) or moved
forward (O5'').
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.causal_runs import RunTest
from interventions import blocking, controls, edits
from interventions.blocking import BranchPoint, Curve, Hold
from interventions.edits import Edit
from interventions.protocol import Pair, Session
from interventions.statistics import Bits
from interventions.verdict import BlockingResult
from polca_edit.checkpoints import SeriesFolder
from polca_edit.training import TrainingSettings


def _shifted(
    batch_loss: Callable[[nn.Module, int], Tensor], offset: int, module: nn.Module, step: int
) -> Tensor:
    return batch_loss(module, step + offset)


@dataclass(frozen=True)
class Branches:
    """What every arm of one pair shares.

    Attributes:
        test: the run.
        session: its open benches.
        groups: the target and every off-target group on the evaluate split.
        folder: recorded weights and optimiser states.
    """

    test: RunTest
    session: Session
    groups: Mapping[str, Bits]
    folder: SeriesFolder

    @property
    def steps(self) -> int:
        """Last optimiser step of the run."""
        return int(self.test.run.config.training.steps)

    def measure(self, trained: nn.Module) -> dict[str, float]:
        """Mean loss per group, nats."""
        run, tokens = self.test.run, self.session.subject.evaluate
        losses = run.objective.losses(run.task.space.read(trained), tokens).double().numpy()
        return {name: float(losses[mask].mean()) for name, mask in self.groups.items()}

    def arm(
        self, start: BranchPoint, stop: int, name: str, *, branch: int = 0, hold: Hold | None = None
    ) -> Curve:
        """One arm; a step's batch is a pure function of it, so an offset is another data order."""
        run, t = self.test.run, self.test.run.config.training
        assert run.task.batch_loss is not None
        settings = TrainingSettings(
            t.steps, t.learning_rate, t.weight_decay, t.betas, t.warmup, t.decay, run.config.seed
        )
        return blocking.run_arm(
            copy.deepcopy(run.task.module),
            run.task.space,
            partial(_shifted, run.task.batch_loss, branch * 1_000_000),
            settings,
            start,
            stop,
            self.measure,
            arm=name,
            branch=branch,
            hold=hold,
            every=max(1, (stop - start.step) // 15),
        )


def open_branches(test: RunTest, session: Session, pair: Pair) -> Branches:
    """Everything the arms of a pair share.

    Raises:
        ValueError: if the run was not trained here, or kept no optimiser state.
    """
    if test.run.task.batch_loss is None:
        raise ValueError(
            f"blocking trains again and '{test.run.directory.path}' only opened checkpoints; "
            "use a recorded run"
        )
    groups = {"target": pair.evaluate.members, **pair.evaluate.apart()}
    return Branches(test, session, groups, SeriesFolder(test.run.directory.checkpoints))


def block_pair(
    test: RunTest, session: Session, pair: Pair, *, branches: int = 5, steps: int = 300
) -> tuple[BlockingResult, list[Curve]]:
    """Train again from before the cluster's breakthrough with the pair's vectors held still.

    Arms per data order: free, blocked, two random parts of the span, one other vector.

    Raises:
        ValueError: if the run has no optimiser state, or was not trained here.
    """
    shared = open_branches(test, session, pair)
    space = test.run.task.space
    wanted = session.subject.checkpoints.steps[pair.window[0]] if pair.window is not None else None
    states = shared.folder.state_steps()
    if states and wanted is not None and wanted < states[0]:
        wanted = None  # the skill starts before the first state: branch at the first one
    start = blocking.open_branch_point(shared.folder, space, wanted)
    stop = min(shared.steps, start.step + steps)
    generator = torch.Generator().manual_seed(test.settings.seed + 41)
    rows = session.rows(pair.vectors)
    others = [v for v in range(len(test.basis)) if v not in pair.vectors]
    arms: dict[str, Tensor | None] = {"none": None, "block": rows}
    for index in range(2):
        frame = controls.random_frame(len(test.basis), len(rows), generator).to(test.basis.rows)
        arms[f"sham in span {index + 1}"] = frame @ test.basis.rows
    if others:
        arms["sham other vector"] = session.rows(others[: len(rows)])
    curves: list[Curve] = []
    for branch in range(branches):
        for arm, held in arms.items():
            hold = None if held is None else Hold(space, start.theta, rows=held, first=start.step + 1)
            curves.append(shared.arm(start, stop, arm, branch=branch, hold=hold))
    by_arm = {arm: [c for c in curves if c.arm == arm] for arm in arms}
    shams = [[by_arm[a][b] for a in arms if a.startswith("sham")] for b in range(branches)]
    result = blocking.compare_arms(
        by_arm["none"],
        by_arm["block"],
        shams,
        "target",
        [name for name in shared.groups if name != "target"],
        margin=max(0.01, 0.02 * float(session.evaluate.headroom.mean())),
        generator=np.random.default_rng(test.settings.seed),
    )
    return result, curves


def branch_pair(test: RunTest, session: Session, pair: Pair, *, steps: int = 150) -> dict[str, Any]:
    """O3c and O5'' in one data order: the window's movement taken out at its end, or made at its start.

    Both go on training for ``steps`` steps beside a free arm and a sham (a random part of the span
    edited in the same way). ``damage`` is the loss of the target above the free arm right after the edit,
    ``left`` what of it is left at the end: taking a movement out also measures how fast it is learnt again;
    making it early should leave the target below the free arm (negative).

    Raises:
        ValueError: if the run cannot be branched, or no state lies where the edit is due.
    """
    if pair.window is None:
        raise ValueError("the cluster has no breakthrough window to skip or to make early")
    shared = open_branches(test, session, pair)
    series, first = session.subject.checkpoints, session.settings.reference
    begin, end = (first + index for index in pair.window)
    states = [s for s in shared.folder.state_steps() if s < shared.steps]
    late = [s for s in states if s >= series.steps[end]]
    early = [s for s in states if s <= series.steps[begin]] or states[:1]
    generator = torch.Generator().manual_seed(test.settings.seed + 43)
    frame = controls.random_frame(len(test.basis), len(pair.vectors), generator).to(test.basis.rows)
    directions = {"edit": session.rows(pair.vectors), "sham": frame @ test.basis.rows}
    found: dict[str, Any] = {}

    def continued(name: str, at: int, make: Callable[[Tensor, Tensor], Edit]) -> None:
        start = blocking.open_branch_point(shared.folder, test.run.task.space, at)
        stop = min(shared.steps, start.step + steps)
        curves = {"free": shared.arm(start, stop, "free")}
        for arm, rows in directions.items():
            curves[arm] = shared.arm(blocking.edited(start, make(start.theta, rows)), stop, arm)
        free = curves["free"].losses
        found[name] = {
            "step": start.step,
            "until": stop,
            **{
                arm: {
                    "damage": {g: float(curves[arm].losses[g][0] - free[g][0]) for g in shared.groups},
                    "left": {g: float(curves[arm].losses[g][-1] - free[g][-1]) for g in shared.groups},
                }
                for arm in directions
            },
        }

    if late:
        continued("branch_skip", late[0], lambda theta, rows: edits.branch_skip(theta, series[begin], rows))
    if early:
        continued(
            "amplify",
            early[-1],
            lambda theta, rows: edits.amplify(theta, series[begin], series[end], rows, 1.0),
        )
    if not found:
        raise ValueError(
            "no optimiser state was kept where the window could be skipped; set state_every lower"
        )
    return found
