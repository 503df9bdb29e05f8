"""Stages are finished while their key holds and their files are what they wrote; parts survive a stop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.run.parts import Ledger, kept_parts
from experiments.run.store import RunDirectory
from polca_edit.derivatives.objective import PassCount


@dataclass(frozen=True)
class Other:
    values: Tensor


def test_a_kept_record_is_made_once_for_each_key(tmp_path: Path) -> None:
    run, passes, made = RunDirectory(tmp_path), PassCount(), []

    def compute(value: float) -> Other:
        made.append(value)
        passes.forward += 7
        return Other(torch.tensor([value]))

    def kept(key: str, value: float) -> float:
        return float(run.kept("study/one", key, Other, lambda: compute(value), passes).values)

    assert [kept("a", 1.0), kept("a", 2.0), kept("b", 3.0), kept("b", 4.0)] == [1.0, 1.0, 3.0, 3.0]
    assert made == [1.0, 3.0]
    assert run.record("study/one").passes["forward"] == 7
    # A file that is not what was written is made again.
    (tmp_path / "kept" / "study" / "one.safetensors").write_bytes(b"nothing")
    assert kept("b", 5.0) == 5.0


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
