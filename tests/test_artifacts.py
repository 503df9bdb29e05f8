"""Records survive a round trip exactly; stages are finished only while their files are what they wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polca_edit.artifacts import Ledger, RunDirectory, kept_parts, key_of, load_record, save_record
from polca_edit.derivatives.objective import PassCount


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


def test_a_stage_is_finished_while_its_files_are_untouched(tmp_path: Path) -> None:
    run, passes = RunDirectory(tmp_path), PassCount()
    out = tmp_path / "out.txt"
    with run.stage("one", "key", [out], passes):
        out.write_text("result")
        passes.forward += 3
    assert run.finished("one", "key")
    assert not run.finished("one", "another key")
    assert run.stage_records()[0].passes["forward"] == 3
    out.write_text("changed")
    assert not run.finished("one", "key")


def test_a_failed_stage_leaves_no_record(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(RuntimeError), run.stage("one", "key", [tmp_path / "out"], PassCount()):
        raise RuntimeError
    assert not run.finished("one", "key")


def test_parts_are_kept_and_their_cost_is_counted_once(tmp_path: Path) -> None:
    """Broken off after two of four parts: the second try does two, the record says four."""
    run = RunDirectory(tmp_path)
    parts = tmp_path / "parts"
    done: list[int] = []

    def attempt(fail_at: int | None) -> list[float]:
        passes = PassCount()

        def work(index: int) -> Other:
            if index == fail_at:
                raise KeyboardInterrupt
            done.append(index)
            passes.tangent += 10
            return Other(torch.tensor([float(index)]))

        with run.stage("one", "key", [], passes, parts=parts):
            return [float(r.values) for r in kept_parts(parts, Other, Ledger(parts, passes))(work, range(4))]

    with pytest.raises(KeyboardInterrupt):
        attempt(2)
    assert attempt(None) == [0.0, 1.0, 2.0, 3.0]
    assert done == [0, 1, 2, 3]
    assert run.stage_records()[0].passes["tangent"] == 40
    assert not parts.exists()


def test_parts_of_other_settings_are_thrown_away(tmp_path: Path) -> None:
    run, parts = RunDirectory(tmp_path), tmp_path / "parts"

    def attempt(key: str, offset: float, fail: bool) -> list[float]:
        def work(index: int) -> Other:
            if fail and index == 1:
                raise KeyboardInterrupt
            return Other(torch.tensor([index + offset]))

        passes = PassCount()
        with run.stage("one", key, [], passes, parts=parts):
            return [float(r.values) for r in kept_parts(parts, Other, Ledger(parts, passes))(work, range(2))]

    with pytest.raises(KeyboardInterrupt):
        attempt("old", 0.0, True)
    assert attempt("new", 100.0, False) == [100.0, 101.0]
