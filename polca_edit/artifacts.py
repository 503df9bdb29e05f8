"""Records to and from files: a frozen dataclass is one safetensors or one JSON file.

In a safetensors file tensor fields are tensors and all other fields are JSON in the header; in a JSON
file there are no tensors. Plain fields go through one cattrs converter, so a record may hold other
records, tuples and mappings. Nothing is pickled, every write is atomic.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import torch
from cattrs.errors import BaseValidationError
from cattrs.preconf.json import make_converter
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polca_edit.checkpoints.files import DTYPES, finite_json, require_digest, write_json, write_tensors

Record = TypeVar("Record")

#: The one way between records and plain JSON values; unknown keys of older files are left out. JSON has no
#: NaN: a number that is not finite is null, and null where a record wants a number is NaN.
#: Values of no stated type (``object``) stay plain.
CONVERTER = make_converter()
CONVERTER.register_unstructure_hook(float, lambda value: value if math.isfinite(value) else None)
CONVERTER.register_structure_hook(float, lambda value, _: math.nan if value is None else float(value))
CONVERTER.register_structure_hook_func(lambda kind: kind is object, lambda value, _: value)


def to_plain(value: Any) -> Any:
    """Plain JSON values (dict, list, str, numbers, None) of a record or of a container of records."""
    return CONVERTER.unstructure(value)


def from_plain(kind: Any, value: Any) -> Any:
    """A record, or a container of records, from plain JSON values.

    Args:
        kind: a class or a type such as ``dict[str, Record]``.
        value: what :func:`to_plain` gave.

    Raises:
        ValueError: if a field is missing or of another type.
    """
    try:
        return CONVERTER.structure(value, kind)
    except (BaseValidationError, KeyError, TypeError, ValueError) as error:
        name = getattr(kind, "__name__", str(kind))
        raise ValueError(
            f"plain values must hold a {name}, they do not ({_reason(error)}); make them again"
        ) from error


def _reason(error: BaseException) -> str:
    """The innermost first cause of a conversion that failed."""
    while isinstance(error, BaseValidationError):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def save_record(path: Path, record: Any) -> None:
    """Write a frozen dataclass: ``.json`` for plain fields, else safetensors.

    In safetensors a field is a tensor, a tuple of tensors, or plain. A field whose metadata has ``stored``
    goes by that name in files.
    """
    if path.suffix == ".json":
        write_json(path, to_plain(record))
        return
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            tensors[_stored(item)] = value
        elif isinstance(value, tuple) and value and all(isinstance(v, Tensor) for v in value):
            tensors.update({f"{item.name}.{index}": v for index, v in enumerate(value)})
            plain[item.name] = {"tensors": len(value)}
        else:
            plain[item.name] = to_plain(value)
    write_tensors(path, tensors, {"record": type(record).__name__, "fields": json.dumps(plain)})


def _stored(item: dataclasses.Field[Any]) -> str:
    """Name of a field in a file."""
    return str(item.metadata.get("stored", item.name))


def load_record(kind: type[Record], path: Path) -> Record:
    """Read a record back.

    Raises:
        ValueError: if the file is missing, damaged or holds another kind of record.
    """
    if path.suffix == ".json":
        return _load_json(kind, path)
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"'{path}' must be a readable record ({error}); delete it and run that stage again"
        ) from error
    _require_kind(kind, metadata, path)
    require_digest(path, tensors)
    try:
        return kind(**_values(kind, metadata, tensors))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"'{path}' must be a readable record ({error}); delete it and run that stage again"
        ) from error


def _require_kind(kind: type[Record], metadata: Mapping[str, str], path: Path) -> None:
    if metadata.get("record") != kind.__name__:
        raise ValueError(
            f"'{path}' must hold a {kind.__name__}, got {metadata.get('record')}; check the path"
        )


def load_columns(kind: type[Record], path: Path, name: str, ranges: Sequence[tuple[int, int]]) -> Record:
    """A record of which one table (K, n) is read in some of its columns only.

    Nothing else of the table is read or mapped, so its hash is not compared: that is for whoever opens the
    file whole.

    Args:
        kind: class of the record.
        path: its safetensors file.
        name: the field that is the table.
        ranges: [start, stop) of the columns, ascending.

    Raises:
        ValueError: if the file is damaged or holds another kind of record.
    """
    item = next(item for item in dataclasses.fields(typing.cast(Any, kind)) if item.name == name)
    try:
        with open(path, "rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(size))
            metadata = header.pop("__metadata__", {})
            tensors = {}
            for key, place in header.items():
                dtype, shape = DTYPES[place["dtype"]], place["shape"]
                wanted = ranges if key == _stored(item) else [(0, shape[-1] if shape else 1)]
                tensors[key] = _read_columns(
                    handle, 8 + size + place["data_offsets"][0], dtype, shape, wanted
                )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' must be a readable record ({error}); delete it and run that stage again"
        ) from error
    _require_kind(kind, metadata, path)
    return kind(**_values(kind, metadata, tensors))


def _read_columns(
    handle: BufferedReader,
    offset: int,
    dtype: torch.dtype,
    shape: Sequence[int],
    ranges: Sequence[tuple[int, int]],
) -> Tensor:
    """Columns of a stored tensor; its leading axes are rows."""
    width = shape[-1] if shape else 1
    rows, count = math.prod(shape[:-1]), sum(stop - start for start, stop in ranges)
    found = torch.empty(rows, count, dtype=dtype)
    for row in range(rows):
        first = 0
        for start, stop in ranges:
            part = found[row, first : first + stop - start]
            handle.seek(offset + (row * width + start) * dtype.itemsize)
            if part.numel() and handle.readinto(part.view(torch.uint8).numpy().data) != part.nbytes:
                raise ValueError("it ends early")
            first += stop - start
    return found.reshape(*shape[:-1], count) if shape else found.reshape(())


def _values(kind: Any, metadata: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Field values of a record from the two halves of its file."""
    values: dict[str, Any] = {}
    plain = finite_json(metadata["fields"])
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        stored = plain.get(item.name)
        if _stored(item) in tensors:
            values[item.name] = tensors[_stored(item)]
        elif isinstance(stored, dict) and set(stored) == {"tensors"}:
            values[item.name] = tuple(tensors[f"{item.name}.{i}"] for i in range(stored["tensors"]))
        elif item.name in plain and (stored is not None or item.default is dataclasses.MISSING):
            # An absent tensor is None whatever its annotation says.
            values[item.name] = None if stored is None else from_plain(hints[item.name], stored)
    return values


def _load_json(kind: type[Record], path: Path) -> Record:
    try:
        record: Record = from_plain(kind, finite_json(path.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{path}' must be a readable record ({error}); delete it and run that stage again"
        ) from error
    return record


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def key_of(*parts: object) -> str:
    """A stable hash of records and plain values; tuples and lists are alike.

    >>> key_of({"a": 1, "b": (2, 3)}) == key_of({"b": [2, 3], "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(to_plain(parts), sort_keys=True, default=str).encode()).hexdigest()
