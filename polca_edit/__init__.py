"""Observation: what training did to each token, along which directions.

Shape legend used in every signature of the project:

- T checkpoints, K basis vectors, N parameters, M scored tokens
- S sequences, P scored-position slots per sequence, C clusters

Losses are in nats per token; times are in optimiser steps. The public names are loaded when they are
first used, so that ``import polca_edit`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polca_edit.basis.build import build_basis
    from polca_edit.basis.hessian import hessian_basis
    from polca_edit.basis.path import trajectory_basis
    from polca_edit.basis.record import Basis
    from polca_edit.checkpoints.opening import open_checkpoints
    from polca_edit.checkpoints.series import Checkpoints
    from polca_edit.clusters.density import ClusterSettings
    from polca_edit.derivatives.objective import Objective
    from polca_edit.observation import Observation, ObserveSettings, observe
    from polca_edit.parameters import ParameterSpace
    from polca_edit.recording import Recorder
    from polca_edit.tokens import TokenSet, next_token_loss

__all__ = [
    "Basis",
    "Checkpoints",
    "ClusterSettings",
    "Objective",
    "Observation",
    "ObserveSettings",
    "ParameterSpace",
    "Recorder",
    "TokenSet",
    "build_basis",
    "hessian_basis",
    "next_token_loss",
    "observe",
    "open_checkpoints",
    "trajectory_basis",
]

#: Public name -> module it lives in.
_HOMES = {
    "Basis": "basis.record",
    "Checkpoints": "checkpoints.series",
    "ClusterSettings": "clusters.density",
    "Objective": "derivatives.objective",
    "Observation": "observation",
    "ObserveSettings": "observation",
    "ParameterSpace": "parameters",
    "Recorder": "recording",
    "TokenSet": "tokens",
    "build_basis": "basis.build",
    "hessian_basis": "basis.hessian",
    "next_token_loss": "tokens",
    "observe": "observation",
    "open_checkpoints": "checkpoints.opening",
    "trajectory_basis": "basis.path",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'polca_edit' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"polca_edit.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
