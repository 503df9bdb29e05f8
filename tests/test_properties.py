"""Properties of records, weight files, edits and masks on drawn values; a brief fuzz of every reader."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from experiments.config import load_config, parse_window
from experiments.run.store import RunDirectory, StageRecord
from experiments.tasks import OwnTask, own_task
from interventions.edits import Edit
from polca_edit.artifacts import from_plain, load_record, save_record, to_plain
from polca_edit.checkpoints.files import SeriesFolder, digest_of, read_weights, write_tensors
from polca_edit.checkpoints.huggingface import logged_rates
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.parameters import ParameterSpace
from tests.fuzz_readers import READERS, Reader, fuzzed

few = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)


@dataclass(frozen=True)
class Held:
    """A record with every kind of field."""

    rows: Tensor
    parts: tuple[Tensor, ...]
    names: tuple[str, ...]
    values: dict[str, float]
    note: str | None = None


@few
@given(st.lists(numbers, min_size=1, max_size=6), st.lists(names, max_size=4), st.none() | names)
def test_records_come_back_as_they_were(values: list[float], called: list[str], note: str | None) -> None:
    rows = torch.tensor(values)
    record = Held(rows, (rows.clone(), rows * 2), tuple(called), dict.fromkeys(called, 0.5), note)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.safetensors"
        save_record(path, record)
        found, first = load_record(Held, path), path.read_bytes()
        save_record(path, found)
        assert path.read_bytes() == first
    assert torch.equal(found.rows, rows)
    assert torch.equal(found.parts[1], rows * 2)
    assert (found.names, found.values, found.note) == (record.names, record.values, note)


@few
@given(st.integers(0, 10**9))
def test_a_flipped_bit_of_a_record_is_never_read(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.safetensors"
        write_tensors(path, {"w": torch.randn(5, generator=draw), "v": torch.randn(2, 2, generator=draw)})
        wanted, data = read_weights(path), bytearray(path.read_bytes())
        at = int(torch.randint(len(data), (1,), generator=draw))
        data[at] ^= 1 << int(torch.randint(8, (1,), generator=draw))
        path.write_bytes(bytes(data))
        try:
            found = read_weights(path)
        except ValueError:
            return
        # A bit of the hash's own key takes the hash away; the tensors are as they were.
        assert digest_of(found) == digest_of(wanted)


@few
@given(st.dictionaries(names, numbers, max_size=4), numbers, names)
def test_a_changed_stage_record_is_known(passes: dict[str, float], seconds: float, key: str) -> None:
    record = StageRecord("train", key, seconds, passes).sealed()
    again = from_plain(StageRecord, json.loads(json.dumps(to_plain(record))))
    assert again.whole
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder))
        save_record(directory.stage_file("train"), record)
        assert directory.record("train") == record
        changed = {**to_plain(record), "seconds": seconds + 1 if abs(seconds) < 1e6 else 0.0}
        directory.stage_file("train").write_text(json.dumps(changed))
        assert directory.record("train") is None
        with pytest.raises(ValueError, match="not what was written"):
            directory.stage_records()


@few
@given(st.integers(1, 5), st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 1000))
def test_doses_of_an_edit_add_up(rank: int, one: float, other: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(8, rank, generator=draw, dtype=torch.float64))[0].T.contiguous()
    theta = torch.randn(8, generator=draw, dtype=torch.float64)
    edit = Edit("base", rows, torch.randn(rank, generator=draw, dtype=torch.float64), "any")
    both = edit.scaled(other).moved(edit.scaled(one).moved(theta))
    assert torch.allclose(both, edit.scaled(one + other).moved(theta), atol=1e-12)
    assert torch.allclose(edit.scaled(0.0).moved(theta), theta)
    assert float((edit.moved(theta) - theta).norm()) == pytest.approx(edit.norm)


@few
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_windows_are_two_steps_in_order(start: int, end: int) -> None:
    if start < end:
        assert parse_window(f"{start}:{end}") == (start, end)
    else:
        with pytest.raises(ValueError, match="must end after it starts"):
            parse_window(f"{start}:{end}")


@few
@given(st.sets(st.integers(0, 50), min_size=3, max_size=10), st.data())
def test_a_window_of_a_series_is_what_lies_between(steps: set[int], data: st.DataObject) -> None:
    space = ParameterSpace(("w",), ((1,),), (("w", "w"),))
    ordered = tuple(sorted(steps))
    series = Checkpoints(space, ordered, lambda i: {"w": torch.tensor([float(ordered[i])])})
    first = data.draw(st.integers(0, len(ordered) - 3))
    last = data.draw(st.integers(first + 2, len(ordered) - 1))
    part = series.within((ordered[first], ordered[last]))
    assert part.steps == ordered[first : last + 1]
    assert [float(part[i]) for i in range(len(part))] == [float(step) for step in part.steps]
    assert len(series) == len(ordered)


@few
@given(st.from_regex(r"[a-z][a-z_0-9]{0,8}", fullmatch=True), st.from_regex(r"[a-z_]{1,8}", fullmatch=True))
def test_task_names_are_files_and_functions(stem: str, function: str) -> None:
    assert own_task(f"/x/{stem}.py:{function}") == OwnTask(Path(f"/x/{stem}.py"), function)
    assert own_task(f"/x/{stem}.py") == OwnTask(Path(f"/x/{stem}.py"), "build")


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_readers_give_a_value_or_a_sentence(reader: Reader) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / reader.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(reader.valid)
        if reader.name not in ("r.safetensors", "e.json", "m/model.safetensors.index.json"):
            reader.read(path)
    counts = fuzzed(reader, files=300, seed=1)
    assert set(counts) <= {"read", "refused"}, counts
    assert sum(counts.values()) == 300


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_numbers_of_our_files_are_finite(tmp_path: Path, number: str) -> None:
    (tmp_path / "series.json").write_text(f'{{"steps": [0, {number}]}}')
    with pytest.raises(ValueError, match="must be a series index"):
        SeriesFolder(tmp_path).read_index()
    (tmp_path / "r.json").write_text(f'{{"stage": "x", "key": "k", "seconds": {number}, "files": {{}}}}')
    with pytest.raises(ValueError, match="must be a readable record"):
        load_record(StageRecord, tmp_path / "r.json")
    (tmp_path / "trainer_state.json").write_text(
        f'{{"log_history": [{{"step": {number}, "learning_rate": 0.1}}]}}'
    )
    assert logged_rates(tmp_path) == {}


@pytest.mark.parametrize("text", ["1: 2\n", "task: arithmetic\n&training: {steps: 60}\n"])
def test_keys_of_a_config_are_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match="Keys should be strings"):
        load_config(tmp_path / "c.yaml")
