"""Edit files: rows and coordinates as safetensors, everything else as JSON beside them.

``NAME.safetensors`` holds ``rows`` (k, N) and ``coordinates`` (k,); ``NAME.json`` the operator, dose,
fingerprint of the base weights, parameter names and shapes, provenance, and the checksum of the
tensors. Both are written atomically, the JSON last: an edit without it is incomplete.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from interventions.edits import Edit
from interventions.lora import Adapter
from polca_edit.artifacts import checksum, from_plain, to_plain
from polca_edit.checkpoints.files import finite_json, write_json, write_tensors
from polca_edit.parameters import ParameterSpace

SCHEMA = "polca-edit/edit/1"


@dataclass(frozen=True)
class EditFile:
    """An edit with the parameter space it lives in.

    Attributes:
        edit: the movement.
        space: names, shapes and order of the flat vector.
    """

    edit: Edit
    space: ParameterSpace


@dataclass(frozen=True)
class SpaceRecord:
    """A parameter space as the description has it."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    aliases: tuple[tuple[str, str], ...]
    fingerprint: str


@dataclass(frozen=True)
class TensorFile:
    """Where the tensors are."""

    file: str
    sha256: str


@dataclass(frozen=True)
class EditRecord:
    """``NAME.json``: everything of an edit but its tensors."""

    operator: str
    dose: float
    base: str
    norm: float
    rank: int
    space: SpaceRecord
    provenance: Mapping[str, object]
    tensors: TensorFile
    schema: str = SCHEMA


def paths_of(path: Path) -> tuple[Path, Path]:
    """(tensors, description) of an edit named with or without a suffix."""
    stem = path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
    return stem.with_name(stem.name + ".safetensors"), stem.with_name(stem.name + ".json")


def save_edit(path: Path, edit: Edit, space: ParameterSpace) -> Path:
    """Write an edit; returns the JSON's path.

    Raises:
        ValueError: if the edit does not live in the space, or is not finite.
    """
    if edit.rows.shape[1] != space.size:
        raise ValueError(
            f"an edit must have one entry per parameter, got {edit.rows.shape[1]} for {space.size}; "
            "pass the space it was made in"
        )
    if not bool(torch.isfinite(edit.rows).all()) or not bool(torch.isfinite(edit.coordinates).all()):
        raise ValueError(
            f"an edit must be finite, this one ({edit.operator}) has NaN or infinity; did its fit diverge?"
        )
    tensors, description = paths_of(path)
    write_tensors(tensors, {"rows": edit.rows, "coordinates": edit.coordinates.double()})
    record = EditRecord(
        edit.operator,
        edit.dose,
        edit.base,
        edit.norm,
        edit.rank,
        SpaceRecord(space.names, space.shapes, space.aliases, space.fingerprint()),
        edit.provenance,
        TensorFile(tensors.name, checksum(tensors)),
    )
    write_json(description, to_plain(record))
    return description


def load_edit(path: Path) -> EditFile:
    """Read an edit.

    Raises:
        ValueError: if a part is missing, damaged or does not belong to the other.
    """
    tensors, description = paths_of(path)
    for part in (tensors, description):
        if not part.exists():
            raise ValueError(f"an edit needs both its files, '{part}' is missing; copy it beside the other")
    record = _description(description)
    if checksum(tensors) != record.tensors.sha256:
        raise ValueError(f"'{tensors}' does not match its description (checksum differs); copy both again")
    try:
        with safe_open(tensors, framework="pt") as handle:
            rows, coordinates = handle.get_tensor("rows"), handle.get_tensor("coordinates")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"'{tensors}' must be a readable edit ({error}); make the edit again") from error
    space = ParameterSpace(record.space.names, record.space.shapes, record.space.aliases)
    if space.fingerprint() != record.space.fingerprint or rows.shape != (len(coordinates), space.size):
        raise ValueError(
            f"'{description}' does not describe its tensors (shapes differ); make the edit again"
        )
    edit = Edit(
        record.base,
        rows,
        coordinates.to(torch.float64),
        record.operator,
        record.dose,
        dict(record.provenance),
    )
    return EditFile(edit, space)


def _description(path: Path) -> EditRecord:
    try:
        values = finite_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"'{path}' must be JSON ({error}); make the edit again") from error
    found = values.get("schema") if isinstance(values, dict) else None
    if found != SCHEMA:
        raise ValueError(f"'{path}' must have schema {SCHEMA}, got {found}; make the edit again")
    record: EditRecord = from_plain(EditRecord, values)
    return record


def save_adapter(folder: Path, adapter: Adapter) -> Path:
    """Write a LoRA adapter as PEFT reads it; returns its description's path."""
    write_tensors(folder / "adapter_model.safetensors", dict(adapter.tensors))
    write_json(folder / "adapter_config.json", adapter.config())
    return folder / "adapter_config.json"
