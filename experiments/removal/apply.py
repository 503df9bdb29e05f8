"""``polca-edit apply``: write an edited model in the format it came in, and take the edit back exactly."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors import safe_open
from torch import Tensor

from experiments.application import json_result, say, then, would
from experiments.removal.stored import Applied, Survival, parameter_names, read_back
from experiments.verbs.options import DryRun, Json, finite
from interventions.edit_files import EditFile, load_edit, save_adapter
from interventions.edits import weights_fingerprint
from interventions.lora import Adapter, low_rank
from polca_edit.artifacts import checksum, load_record, to_plain
from polca_edit.checkpoints.files import (
    inner_state,
    read_weights,
    weight_files,
    write_atomically,
    write_json,
    write_tensors,
)

UNDO = "undo"
#: Folder of an adapter that ``--lora`` adds.
ADAPTER = "adapter"
SURVIVAL = 0.99


@dataclass(frozen=True)
class ChangedFile:
    """A weight file that an edit changed, with the checksums of both versions."""

    file: str
    before: str
    after: str


@dataclass(frozen=True)
class UndoRecord:
    """``undo/undo.json``.

    Attributes:
        edit: name of the edit file.
        operator: of the edit.
        dose: applied, its own dose included.
        base: fingerprint of the original weights.
        survival: share of the edit left after rounding.
        files: changed; the original of each lies beside this record.
        added: folders that were not in the original.
    """

    edit: str
    operator: str
    dose: float
    base: str
    survival: float
    files: tuple[ChangedFile, ...]
    added: tuple[str, ...] = ()
    schema: str = "polca-edit/undo/1"


def edited_tensors(
    file: EditFile, tensors: Mapping[str, Tensor], dose: float, cast: bool
) -> tuple[dict[str, Tensor], Survival]:
    """Changed tensors in their stored dtype, aliases of tied weights included.

    Args:
        file: edit and its space.
        tensors: the whole model as stored.
        dose: multiple of the edit.
        cast: allow a stored dtype other than the edit's.

    Raises:
        ValueError: for another model, or a dtype that needs a cast.
    """
    edit, space = file.edit, file.space
    known = {slot: tensors[slot] for slot, _ in space.aliases if slot in tensors}
    theta = space.flatten(known, dtype=edit.rows.dtype)
    if weights_fingerprint(theta) != edit.base:
        raise ValueError(
            "an edit only applies to the weights it was made for; this model's differ (already edited, "
            "another checkpoint or another dtype), give the original"
        )
    slots = [(slot, name) for slot, name in space.aliases if slot in tensors]
    other = sorted({str(tensors[slot].dtype) for slot, _ in slots if tensors[slot].dtype != edit.rows.dtype})
    if other and not cast:
        raise ValueError(
            f"the edit is {edit.rows.dtype} and the model holds {', '.join(other)}; pass --cast to round it"
        )
    moved = space.unflatten(edit.scaled(dose).moved(theta))
    before = space.unflatten(theta)
    changed: dict[str, Tensor] = {}
    inner = planned_square = error_square = 0.0
    counted: set[str] = set()
    for slot, name in slots:
        new = moved[name].to(tensors[slot].dtype)
        if name not in counted:
            counted.add(name)
            planned = (moved[name] - before[name]).double()
            kept = new.double() - before[name].double()
            inner += float((kept * planned).sum())
            planned_square += float(planned.square().sum())
            error_square += float((kept - planned).square().sum())
        if not torch.equal(new, tensors[slot]):
            changed[slot] = new
    if planned_square == 0.0:
        return changed, Survival(1.0, 0.0, tuple(other))
    survival = Survival(inner / planned_square, (error_square / planned_square) ** 0.5, tuple(other))
    return changed, survival


def _write_like(source: Path, target: Path, changed: Mapping[str, Tensor]) -> None:
    if source.suffix == ".safetensors":
        with safe_open(source, framework="pt") as handle:
            metadata = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        write_tensors(target, {name: changed.get(name, value) for name, value in tensors.items()}, metadata)
        return
    state = torch.load(source, map_location="cpu", weights_only=True)
    inner = inner_state(state, source)
    for name in list(inner):
        if name in changed:
            inner[name] = changed[name]
    write_atomically(target, lambda part: torch.save(state, part))


def _require_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out must be a new or empty folder, '{out}' holds something; choose another")


def apply_edit(
    file: EditFile,
    model: Path,
    out: Path,
    *,
    dose: float = 1.0,
    cast: bool = False,
    source: str = "edit",
    adapter: Adapter | None = None,
) -> Applied:
    """Copy the model to ``out`` with the edit in it, and keep the original weight files for ``undo``.

    A subtraction does not restore floating-point weights, so the undo record keeps every changed
    file as it was, with checksums of both versions. What was written is read back with the loader that will
    be used (transformers for a folder with a config.json), and must be what was planned.

    Args:
        file: edit and its space.
        model: folder or weight file.
        out: new or empty folder.
        dose: multiple of the edit.
        cast: allow a stored dtype other than the edit's.
        source: name of the edit, for the undo record.
        adapter: written beside the weights.

    Raises:
        ValueError: for a wrong model, a missing ``cast``, an ``out`` that exists, or an edit of which nothing
            arrives in the files.
    """
    known, moved, changed, survival = _planned(file, model, dose, cast)
    _require_empty(out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        records = _write_edited(model, out, changed)
        if adapter is not None:
            save_adapter(out / ADAPTER, adapter)
        target = out if model.is_dir() else out / model.name
        applied = read_back(file.space, target, {**known, **moved}, known, survival)
        added = () if adapter is None else (ADAPTER,)
        edit, total = file.edit, dose * file.edit.dose
        record = UndoRecord(source, edit.operator, total, edit.base, survival.share, tuple(records), added)
        write_json(out / UNDO / "undo.json", to_plain(record))
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return replace(applied, tensors=len(changed))


def _planned(
    file: EditFile, model: Path, dose: float, cast: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Survival]:
    """The model's tensors and the moved ones by slot, the changed ones by stored name, and what survives.

    Raises:
        ValueError: for a wrong model, a missing ``cast``, or an edit of which nothing arrives.
    """
    tensors = read_weights(model)
    names = parameter_names(file.space, tensors, model)
    known = {slot: tensors[stored] for stored, slot in names.items()}
    moved, survival = edited_tensors(file, known, dose, cast)
    changed = {stored: moved[slot] for stored, slot in names.items() if slot in moved}
    if not changed and file.edit.norm * abs(dose) > 0:
        raise ValueError(
            f"an edit must change the model, this one (norm {file.edit.norm * abs(dose):.3g}) vanishes "
            "when it is rounded to the stored dtype; apply it to float32 weights"
        )
    return known, moved, changed, survival


def _write_edited(model: Path, out: Path, changed: Mapping[str, Tensor]) -> list[ChangedFile]:
    """Everything of the model in ``out``, the changed tensors in their files, the originals for undo."""
    files = weight_files(model)
    if model.is_dir():
        for path in sorted(model.rglob("*")):
            if path.is_file() and path not in files:
                (out / path.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, out / path.relative_to(model))
    records: list[ChangedFile] = []
    for path in files:
        name = path.name
        held = set(read_weights(path))
        if not held & set(changed):
            shutil.copyfile(path, out / name)
            continue
        (out / UNDO).mkdir(exist_ok=True)
        shutil.copyfile(path, out / UNDO / name)
        _write_like(path, out / name, changed)
        records.append(ChangedFile(name, checksum(path), checksum(out / name)))
    return records


def undo_edit(file: EditFile, model: Path, out: Path) -> list[str]:
    """Write the model as it was before the edit, byte for byte.

    Returns:
        names of the restored files.

    Raises:
        ValueError: if the folder has no undo record, was changed since, or belongs to another edit.
    """
    folder = model if model.is_dir() else model.parent
    record = _undo_record(file, folder)
    _require_empty(out)
    out.mkdir(parents=True, exist_ok=True)
    restored = {entry.file for entry in record.files}
    for source in sorted(folder.rglob("*")):
        relative = source.relative_to(folder)
        if not source.is_file() or relative.parts[0] in {UNDO, *record.added}:
            continue
        (out / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / UNDO / relative if str(relative) in restored else source, out / relative)
    return sorted(restored)


def _undo_record(file: EditFile, folder: Path) -> UndoRecord:
    """The record beside an edited model, once everything it lists is as it was written.

    Raises:
        ValueError: where it is missing, or is not.
    """
    path = folder / UNDO / "undo.json"
    if not path.exists():
        raise ValueError(f"--undo needs the folder that 'apply' wrote, '{path}' is missing; give that folder")
    record = load_record(UndoRecord, path)
    if record.base != file.edit.base:
        raise ValueError("this model was edited with another edit (fingerprints differ); give that edit")
    for entry in record.files:
        if checksum(folder / entry.file) != entry.after:
            raise ValueError(f"'{entry.file}' was changed after the edit; its undo record no longer applies")
        if checksum(folder / UNDO / entry.file) != entry.before:
            raise ValueError(
                f"the undo record of '{entry.file}' is damaged; restore the model from your own copy"
            )
    return record


def apply(
    edit: Annotated[Path, typer.Argument(help="Edit file (.json or .safetensors).")],
    model: Annotated[Path, typer.Argument(help="Hugging Face folder, safetensors file or torch state dict.")],
    out: Annotated[Path, typer.Option(help="New folder for the edited (or restored) model.")],
    dose: Annotated[
        float,
        typer.Option(min=-100.0, max=100.0, callback=finite, help="Multiple of the edit; 0 changes nothing."),
    ] = 1.0,
    undo: Annotated[
        bool, typer.Option("--undo", help="Restore the model that 'apply' wrote, byte for byte.")
    ] = False,
    cast: Annotated[bool, typer.Option("--cast", help="Round the edit to the model's dtype.")] = False,
    lora: Annotated[
        int | None, typer.Option(min=1, help="Also write a LoRA adapter of this rank, with its error.")
    ] = None,
    dry_run: DryRun = False,
    json_: Json = None,
) -> None:
    """Apply an edit to a model, or take it back."""
    file = load_edit(edit)
    if undo:
        if dry_run:
            _undo_record(file, model if model.is_dir() else model.parent)
            _require_empty(out)
            return would(f"{out}: would restore the original of '{model}'", json_)
        restored = undo_edit(file, model, out)
        say(f"restored {', '.join(restored) or 'nothing'} in {out}")
        json_result({"out": str(out), "restored": restored}, json_)
        then("doctor", out)
        return
    adapter = None if lora is None else low_rank(file.edit.scaled(dose), file.space, lora)
    if file.edit.norm == 0.0:
        raise ValueError(f"'{edit}' moves nothing, so there is no edit to apply; make the edit again")
    if dry_run:
        changed = _planned(file, model, dose, cast)[2]
        _require_empty(out)
        what = f"{file.edit.operator}, dose {dose:g}, {len(changed)} tensors"
        return would(f"{out}: would write '{model}' with {what}", json_)
    applied = apply_edit(file, model, out, dose=dose, cast=cast, source=edit.stem, adapter=adapter)
    survival = applied.survival
    say(
        f"{out}: {file.edit.operator}, dose {dose:g}, "
        f"norm {file.edit.norm * abs(dose):.4g}, rank {file.edit.rank}"
    )
    say(
        f"  {applied.tensors} tensors changed, by up to {applied.largest:.3g} (length {applied.norm:.4g}), "
        f"read back with {applied.reader}"
    )
    if survival.share < SURVIVAL:
        say(
            f"warning: only {survival.share:.1%} of the edit survives the cast to "
            f"{', '.join(survival.dtypes)} (error {survival.error:.1%}); apply it in float32"
        )
    if adapter is not None:
        for row in adapter.rows:
            say(f"  {row.name:<40} rank {row.rank:>3}  error {row.error:.2%}")
    json_result({"out": str(out), **to_plain(applied)}, json_)
    then("apply", edit, out, "--undo", "--out", "restored")
