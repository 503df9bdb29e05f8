"""Records survive a round trip exactly, tensors and plain values; damaged and foreign files are refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from polca_edit.artifacts import from_plain, key_of, load_record, save_record


@dataclass(frozen=True)
class Sample:
    values: Tensor
    pieces: tuple[Tensor, ...]
    name: str
    counts: tuple[int, ...]
    absent: Tensor | None = None


@dataclass(frozen=True)
class Other:
    values: Tensor


def test_a_record_comes_back_bit_for_bit(tmp_path: Path, generator: torch.Generator) -> None:
    sample = Sample(
        torch.randn(3, 2, generator=generator, dtype=torch.float64),
        (torch.arange(4), torch.tensor([float("nan"), -0.0])),
        "vector",
        (1, 2),
    )
    save_record(tmp_path / "a.safetensors", sample)
    back = load_record(Sample, tmp_path / "a.safetensors")
    assert back.values.numpy().tobytes() == sample.values.numpy().tobytes()
    assert [p.numpy().tobytes() for p in back.pieces] == [p.numpy().tobytes() for p in sample.pieces]
    assert (back.name, back.counts, back.absent) == ("vector", (1, 2), None)


def test_another_kind_and_a_truncated_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_record(path, Other(torch.ones(2)))
    with pytest.raises(ValueError, match="must hold a Sample, got Other"):
        load_record(Sample, path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="delete it and run that stage again"):
        load_record(Other, path)


def test_keys_depend_on_values_and_not_on_order() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})


@dataclass(frozen=True)
class Inner:
    name: str
    shares: dict[str, float]
    at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outer:
    rows: tuple[Inner, ...]
    best: Inner | None
    mode: Literal["fast", "slow"] = "fast"


@pytest.mark.parametrize("name", ["a.json", "a.safetensors"])
def test_records_may_hold_records(tmp_path: Path, name: str) -> None:
    record = Outer((Inner("x", {"10s": 0.1}, (1, 2)), Inner("y", {})), None, "slow")
    save_record(tmp_path / name, record)
    assert load_record(Outer, tmp_path / name) == record


def test_plain_values_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rows": [{"name": "x"}], "best": null}')
    with pytest.raises(ValueError, match="shares"):
        load_record(Outer, tmp_path / "a.json")
    with pytest.raises(ValueError, match="must hold a Outer"):
        from_plain(Outer, {"rows": [], "best": None, "mode": "middling"})
