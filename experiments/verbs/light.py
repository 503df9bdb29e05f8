"""The light answers of verb ``demo``: axes of the task's parents and a causal test with few draws.

Both look at the evaluate split, which the run has opened anyway: sequences drawn anew stay unopened for
``discover`` and ``test``.
"""

from __future__ import annotations

import os
import time

from experiments.application import say
from experiments.discover.discover import discover
from experiments.discover.records import DiscoverSettings
from experiments.run.run import Run
from experiments.verdicts.study import StudySettings, run_study, write_result
from interventions.causal.settings import TestSettings

#: The fewest rotations with which p can be below .05, and the fewest random edits.
LIGHT = TestSettings(
    resamples=300,
    null_documents=32,
    random_draws=19,
    rotations=20,
    observed_rotations=0,
    transplants=0,
)


def light_answers(run: Run, workers: int | None = None) -> None:
    """Measure both where the run's evaluate split has what they need, and keep them like the verbs do.

    Args:
        run: with finished stages.
        workers: processes; default one a core, at most one a basis.
    """
    labels = tuple(spec.label for spec in run.config.measured_bases())
    workers = workers or min(os.cpu_count() or 1, len(labels))
    started = time.perf_counter()
    if run.task.parents:
        axes = DiscoverSettings(labels, unseen=0, nulls=0, targets=tuple(run.task.parents))
        discover(run, axes, workers=workers)
        say(f"  {'axes, light':<24} {time.perf_counter() - started:7.1f} s")
    started = time.perf_counter()
    test = StudySettings(labels, unseen=0, test=LIGHT, control=False)
    place = run.directory.path
    write_result(run_study([place], test, workers=workers, say=say), place)
    say(f"  {'causal test, light':<24} {time.perf_counter() - started:7.1f} s")
