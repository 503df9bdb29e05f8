"""Action: undo, reverse or transplant movement along basis vectors, and judge what it does.

The public names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interventions.causal.questions import Verdict
    from interventions.causal.settings import TestSettings
    from interventions.causal.test import causal_test
    from interventions.controls import random_like
    from interventions.damage import Damage, EvaluatedSplit
    from interventions.discovery.axes import skill_axis
    from interventions.discovery.signatures import interventional_clusters
    from interventions.discovery.timeline import causal_timeline
    from interventions.edit_files import load_edit, save_edit
    from interventions.edits import Edit, applied, project_out, reverse, rollback, transplant
    from interventions.removal.remove import remove_skill
    from interventions.removal.undo import Undo
    from polca_edit.clusters.hypotheses import Hypothesis

__all__ = [
    "Damage",
    "Edit",
    "EvaluatedSplit",
    "Hypothesis",
    "TestSettings",
    "Undo",
    "Verdict",
    "applied",
    "causal_test",
    "causal_timeline",
    "interventional_clusters",
    "load_edit",
    "project_out",
    "random_like",
    "remove_skill",
    "reverse",
    "rollback",
    "save_edit",
    "skill_axis",
    "transplant",
]

#: Public name -> module it lives in.
_HOMES = {
    "Damage": "interventions.damage",
    "Edit": "interventions.edits",
    "EvaluatedSplit": "interventions.damage",
    "Hypothesis": "polca_edit.clusters.hypotheses",
    "TestSettings": "interventions.causal.settings",
    "Undo": "interventions.removal.undo",
    "Verdict": "interventions.causal.questions",
    "applied": "interventions.edits",
    "causal_test": "interventions.causal.test",
    "causal_timeline": "interventions.discovery.timeline",
    "interventional_clusters": "interventions.discovery.signatures",
    "load_edit": "interventions.edit_files",
    "project_out": "interventions.edits",
    "random_like": "interventions.controls",
    "remove_skill": "interventions.removal.remove",
    "reverse": "interventions.edits",
    "rollback": "interventions.edits",
    "save_edit": "interventions.edit_files",
    "skill_axis": "interventions.discovery.axes",
    "transplant": "interventions.edits",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'interventions' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
