"""What a run on the folder would do, and how long it would take on this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from experiments.config import load_config
from experiments.run.cost.plan import make_plan
from experiments.run.keys import stage_names
from experiments.verbs.doctor.examine import Diagnosis, Question
from experiments.verbs.pipeline import open_overrides

#: Sequences that stand for a text where none is given.
DOCUMENTS = 1200


def outlook(found: Diagnosis, asked: Question, text: str | None, preset: str) -> tuple[str, ...]:
    """Stages, passes and minutes of ``polca-edit open`` on the folder, as sentences.

    Args:
        found: in the folder, without a problem.
        asked: the folder.
        text: file; without one the time is measured on random ids.
        preset: settings of the run.

    Raises:
        ValueError: if the run could not be started.
    """
    series = len(found.checkpoints) + (found.kind == "adapters" or asked.base is not None)
    if found.model is None:
        return ("nothing yet: weights alone do not say the model; open them with your module from Python",)
    if series < 3:
        return (f"nothing yet: a run needs at least 3 checkpoints, here are {series}; save more of them",)
    with tempfile.TemporaryDirectory() as folder:
        file, note = text, "your text"
        if file is None:
            file, note = _stand_in(Path(folder), found), "random ids in place of a text (--text FILE)"
        overrides = open_overrides(
            asked.folder,
            file,
            base=asked.base,
            names=asked.names,
            step_pattern=asked.step_pattern,
            preset=preset,
        )
        if found.model.context is not None:
            longest = load_config(preset).text.n_ctx
            overrides["text.n_ctx"] = min(longest, found.model.context)
        config = load_config(preset, overrides)
        plan = make_plan(config, Path(folder))
    vectors = ", ".join(f"{basis.vectors} {basis.label}" for basis in config.bases)
    return (
        f"polca-edit open with preset '{preset}': {', '.join(stage_names(config))}",
        f"{vectors} vectors over {plan.checkpoints} checkpoints, derivatives by route {plan.route}",
        f"about {plan.seconds / 60:.1f} minutes and {plan.peak_bytes / 1e9:.1f} GB memory, timed on {note}",
        *(f"warning: {warning}" for warning in plan.warnings),
    )


def _stand_in(folder: Path, found: Diagnosis) -> str:
    """Random ids of the model's vocabulary, as many as the splits of a preset need."""
    assert found.model is not None
    generator = np.random.default_rng(0)
    context = found.model.context
    length = 128 if context is None else min(128, 2 * context)
    np.save(folder / "ids.npy", generator.integers(0, found.model.vocabulary, (DOCUMENTS, length)))
    return str(folder / "ids.npy")
