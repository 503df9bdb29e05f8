"""What one run of a study measured, kept on disk, so that a stopped study goes on with its next run.

Arrays are tensors of one safetensors file, everything else is JSON in its header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

import numpy as np
import torch
from cattrs import Converter
from safetensors import SafetensorError, safe_open
from torch import Tensor

from experiments.causal_runs import RunMeasurement, RunTest, session_of
from interventions.evidence import PairEvidence
from interventions.planted_skill import PlantedPower
from interventions.statistics import Array
from polca_edit.checkpoints import write_tensors


@dataclass(frozen=True)
class Kept:
    """A :class:`RunMeasurement` without its session, which is opened again."""

    pairs: tuple[PairEvidence, ...]
    nulls: tuple[PairEvidence, ...]
    planted: PlantedPower
    maxima: Mapping[str, Array]
    span: dict[str, float]


def keep_measurement(path: Path, key: str, measured: RunMeasurement) -> None:
    """Write what was measured, under the key of everything it depends on."""
    arrays: dict[str, Tensor] = {}
    kept = Kept(measured.pairs, measured.nulls, measured.planted, measured.maxima, measured.span)
    fields = json.dumps(_converter(arrays).unstructure(kept))
    write_tensors(path, arrays, {"key": key, "fields": fields})


def kept_measurement(path: Path, key: str, test: RunTest) -> RunMeasurement | None:
    """Read it back; None where there is none, it is damaged, or it was measured under another key."""
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("key") != key:
                return None
            arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
    kept = _converter(arrays).structure(json.loads(metadata["fields"]), Kept)
    return RunMeasurement(
        session_of(test), kept.pairs, kept.nulls, kept.planted, dict(kept.maxima), kept.span
    )


def _converter(arrays: dict[str, Tensor]) -> Converter:
    """Arrays go to and come from ``arrays`` by number; extras of a pair stay as they are."""
    converter = Converter()

    def is_array(kind: Any) -> bool:
        return kind is np.ndarray or get_origin(kind) is np.ndarray

    def put(value: np.ndarray) -> dict[str, str]:
        name = str(len(arrays))
        arrays[name] = torch.from_numpy(np.array(value))  # a copy: pairs share arrays
        return {"array": name}

    def take(value: Mapping[str, str], _: Any) -> np.ndarray:
        return arrays[value["array"]].numpy()

    converter.register_unstructure_hook_func(is_array, put)
    converter.register_structure_hook_func(is_array, take)
    converter.register_structure_hook_func(lambda kind: kind is object, lambda value, _: value)
    return converter
