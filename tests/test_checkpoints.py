"""Reading and writing weights: formats, damage, laziness, atomic writes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from polca_edit.checkpoints import files as module_under_test
from polca_edit.checkpoints.files import (
    SeriesFolder,
    read_weights,
    step_of,
    write_atomically,
    write_json,
    write_tensors,
)
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.parameters import ParameterSpace


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


SPACE = ParameterSpace.from_module(model())


def state_at(step: int) -> dict[str, torch.Tensor]:
    return {name: value + step for name, value in model().state_dict().items()}


def flat_at(step: int) -> torch.Tensor:
    return SPACE.read(model()) + step


def save_shards(folder: Path, state: dict[str, torch.Tensor], ending: str) -> None:
    folder.mkdir()
    names = list(state)
    base, index = ("model", "safetensors") if ending == "safetensors" else ("pytorch_model", "bin")
    placed = {}
    for number, part in enumerate((names[:1], names[1:]), 1):
        file = f"{base}-{number:05d}-of-00002.{index}"
        tensors = {name: state[name] for name in part}
        if ending == "safetensors":
            save_file(tensors, folder / file)
        else:
            torch.save(tensors, folder / file)
        placed.update(dict.fromkeys(part, file))
    (folder / f"{base}.{index}.index.json").write_text(json.dumps({"weight_map": placed}))


def write_step(directory: Path, step: int, kind: str) -> Path:
    state = state_at(step)
    if kind == "safetensors file":
        save_file(state, directory / f"step{step}.safetensors")
        return directory / f"step{step}.safetensors"
    if kind == "torch file":
        torch.save(state, directory / f"step{step}.pt")
        return directory / f"step{step}.pt"
    if kind == "torch file with optimiser":
        torch.save({"model": state, "optimizer": {"lr": 0.1}, "step": step}, directory / f"{step}.pth")
        return directory / f"{step}.pth"
    folder = directory / f"checkpoint-{step}"
    if kind.startswith("shards"):
        save_shards(folder, state, kind.split()[1])
        return folder
    folder.mkdir()
    if kind == "folder of safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return folder


KINDS = (
    "safetensors file",
    "torch file",
    "torch file with optimiser",
    "folder of safetensors",
    "folder of torch",
    "shards safetensors",
    "shards torch",
)


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_weights(tmp_path, kind):
    for step in (20, 3, 100):
        write_step(tmp_path, step, kind)
    series = open_checkpoints(tmp_path, SPACE)
    assert series.steps == (3, 20, 100)  # by number, not by name
    for index, step in enumerate(series.steps):
        assert torch.equal(series[index], flat_at(step))
    assert torch.equal(series[-1], flat_at(100))


def test_steps_may_be_given_where_names_hold_none(tmp_path):
    paths = []
    for letter, step in (("b", 7), ("a", 2)):
        save_file(state_at(step), tmp_path / f"{letter}.safetensors")
        paths.append(tmp_path / f"{letter}.safetensors")
    with pytest.raises(ValueError, match="must hold its step"):
        open_checkpoints(paths, SPACE)
    series = open_checkpoints(paths, SPACE, steps=[7, 2])
    assert series.steps == (2, 7)
    assert torch.equal(series[0], flat_at(2))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step1000.pt", 1000),
        ("checkpoint-500", 500),
        ("runs2/step-00000030.safetensors", 30),
        ("model-v2-step7.bin", 7),
        ("final", None),
    ],
)
def test_step_of_a_name(name, step):
    assert step_of(name) == step


def test_reading_is_lazy_and_keeps_three(tmp_path):
    read = []
    states = [state_at(step) for step in range(6)]

    def reader(index):
        read.append(index)
        return states[index]

    series = Checkpoints(SPACE, tuple(range(6)), reader)
    assert len(series) == 6
    assert read == []
    for index in (0, 1, 2, 2, 1, 0):
        series[index]
    assert read == [0, 1, 2]
    series[3]
    series[0]
    assert read == [0, 1, 2, 3, 0]
    assert len(series._cache) == 3
    part = series.subset([1, 5])
    assert part.steps == (1, 5)
    assert torch.equal(part[1], flat_at(5))


def test_opening_a_directory_reads_no_weights(tmp_path, monkeypatch):
    for step in range(4):
        write_step(tmp_path, step, "safetensors file")
    opened = []
    original = module_under_test.load_file
    monkeypatch.setattr(module_under_test, "load_file", lambda p: opened.append(Path(p).name) or original(p))
    series = open_checkpoints(tmp_path, SPACE)
    assert opened == []
    series[2]
    assert opened == ["step2.safetensors"]


def test_weights_in_memory_as_lists_and_as_mappings(tmp_path):
    memory = open_checkpoints([flat_at(5).double(), flat_at(0).double()], SPACE, steps=[5, 0])
    assert memory.steps == (0, 5)
    assert memory[1].dtype == torch.float64
    assert torch.equal(memory[1], flat_at(5).double())
    states = open_checkpoints([state_at(0), state_at(5)], SPACE, steps=[0, 5])
    assert torch.equal(states[1], flat_at(5))
    mapped = open_checkpoints({9: state_at(9), 2: flat_at(2)}, model())
    assert mapped.steps == (2, 9)
    assert torch.equal(mapped[0], flat_at(2))
    assert torch.equal(mapped[1], flat_at(9))
    on_disk = open_checkpoints({7: write_step(tmp_path, 3, "torch file")}, SPACE)
    assert on_disk.steps == (7,)
    assert torch.equal(on_disk[0], flat_at(3))


def test_what_cannot_be_a_series_in_memory_is_refused(tmp_path):
    live = model()
    with pytest.raises(ValueError, match="share memory"):
        open_checkpoints({0: live.state_dict(), 1: live.state_dict()}, live)
    with pytest.raises(ValueError, match="pass steps"):
        open_checkpoints([state_at(0)], SPACE)
    with pytest.raises(ValueError, match="2 checkpoints and 1 steps"):
        open_checkpoints([state_at(0), state_at(1)], SPACE, steps=[0])
    with pytest.raises(ValueError, match="got both"):
        open_checkpoints({0: state_at(0), 1: write_step(tmp_path, 1, "torch file")}, SPACE)


def test_some_steps_of_a_folder(tmp_path):
    for step in (1, 2, 3):
        write_step(tmp_path, step, "safetensors file")
    series = open_checkpoints(tmp_path, SPACE, steps=[3, 1])
    assert series.steps == (1, 3)
    assert torch.equal(series[1], flat_at(3))
    with pytest.raises(ValueError, match=r"\[4\] are not in"):
        open_checkpoints(tmp_path, SPACE, steps=[1, 4])


def test_folders_named_by_step_come_before_loose_weight_files(tmp_path):
    write_step(tmp_path, 10, "folder of safetensors")
    save_file(state_at(99), tmp_path / "model-00001-of-00002.safetensors")
    assert open_checkpoints(tmp_path, SPACE).steps == (10,)


def test_a_changed_copy_does_not_serve_the_weights_of_the_original():
    series = open_checkpoints([flat_at(0), flat_at(5)], SPACE, steps=[0, 5])
    assert torch.equal(series[1], flat_at(5))
    copy = dataclasses.replace(series, read=lambda index: state_at(100 + index))
    assert torch.equal(copy[1], flat_at(101))
    assert torch.equal(series[1], flat_at(5))


@pytest.mark.parametrize("steps", [(1, 1, 2), (3, 2, 1)])
def test_steps_must_increase(steps):
    with pytest.raises(ValueError, match="strictly increasing"):
        Checkpoints(SPACE, steps, state_at)


def test_the_same_step_twice_is_an_error(tmp_path):
    write_step(tmp_path, 4, "safetensors file")
    write_step(tmp_path, 4, "torch file")
    with pytest.raises(ValueError, match="'step4.pt' and 'step4.safetensors' both say 4"):
        open_checkpoints(tmp_path, SPACE)


def test_too_few_checkpoints():
    with pytest.raises(ValueError, match="at least 3 checkpoints, got 2"):
        Checkpoints(SPACE, (0, 1), state_at).require()
    assert len(Checkpoints(SPACE, (0, 1, 2), state_at).require()) == 3


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:5])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.97])
def test_truncated_file_is_refused(tmp_path, kind, keep):
    path = write_step(tmp_path, 1, kind)
    file = path if path.is_file() else next(path.iterdir())
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match="cannot be read|tensors only"):
        read_weights(path)


def test_missing_file_and_missing_directory(tmp_path):
    with pytest.raises(ValueError, match="must exist"):
        read_weights(tmp_path / "step3.safetensors")
    with pytest.raises(ValueError, match="must exist"):
        open_checkpoints([tmp_path / "step3.safetensors"], SPACE)
    with pytest.raises(ValueError, match="directory must exist"):
        open_checkpoints(tmp_path / "nowhere", SPACE)
    with pytest.raises(ValueError, match="found none"):
        open_checkpoints(tmp_path, SPACE)


@pytest.mark.parametrize("kind", ["shards safetensors", "shards torch"])
def test_missing_shard_is_named(tmp_path, kind):
    folder = write_step(tmp_path, 1, kind)
    lost = sorted(p for p in folder.iterdir() if p.suffix != ".json")[1]
    lost.unlink()
    with pytest.raises(ValueError, match=lost.name):
        read_weights(folder)


def test_damaged_shard_index_is_refused_in_one_sentence(tmp_path):
    folder = write_step(tmp_path, 1, "shards safetensors")
    index = folder / "model.safetensors.index.json"
    for content in ("{", "{}", "[]"):
        index.write_text(content)
        with pytest.raises(ValueError, match="must be a shard index"):
            read_weights(folder)


def test_folder_with_two_candidates_is_refused(tmp_path):
    write_step(tmp_path, 1, "safetensors file")
    write_step(tmp_path, 2, "safetensors file")
    with pytest.raises(ValueError, match="exactly one weight file"):
        read_weights(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_their_step(tmp_path, value):
    for step in (1, 2, 3):
        write_step(tmp_path, step, "safetensors file")
    state = state_at(2)
    state["1.bias"][0] = value
    save_file(state, tmp_path / "step2.safetensors")
    series = open_checkpoints(tmp_path, SPACE)
    assert torch.equal(series[0], flat_at(1))
    with pytest.raises(ValueError, match="must be finite, checkpoint at step 2"):
        series[1]


def test_checkpoint_of_another_model_is_refused(tmp_path):
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    save_file(other.state_dict(), tmp_path / "step1.safetensors")
    save_file({**state_at(2), "2.weight": torch.ones(2)}, tmp_path / "step2.safetensors")
    save_file({k: v for k, v in state_at(3).items() if k != "1.bias"}, tmp_path / "step3.safetensors")
    series = open_checkpoints(tmp_path, SPACE)
    for index in range(3):
        with pytest.raises(ValueError, match="another model"):
            series[index]


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_pickled_objects_are_refused_and_not_run(tmp_path, save):
    mark = tmp_path / "ran"
    save({"0.weight": torch.zeros(4, 3), "extra": Trap(mark)}, tmp_path / "step1.pt")
    with pytest.raises(ValueError, match="tensors only|cannot be read"):
        read_weights(tmp_path / "step1.pt")
    assert not mark.exists()


def test_whole_pickled_module_is_refused(tmp_path):
    torch.save(model(), tmp_path / "step1.pt")
    with pytest.raises(ValueError, match=r"model\.state_dict\(\)"):
        read_weights(tmp_path / "step1.pt")


def test_torch_file_that_is_no_state_dict_is_refused(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "step1.pt")
    torch.save({"losses": [1.0, 2.0]}, tmp_path / "step2.pt")
    for step in (1, 2):
        with pytest.raises(ValueError, match="must be a state dict"):
            read_weights(tmp_path / f"step{step}.pt")


# -- a recorded series -----------------------------------------------------------------------------


def record(directory: Path, steps=(0, 10, 20)) -> SeriesFolder:
    folder = SeriesFolder(directory)
    for step in steps:
        write_tensors(folder.weights(step), SPACE.unflatten(flat_at(step)))
    index = {"steps": list(steps), "fingerprint": SPACE.fingerprint(), "learning_rates": [0.0, 0.1, 0.1]}
    write_json(folder.index, {**index, "weight_decay": 0.5})
    return folder


def test_recorded_series_round_trip(tmp_path):
    record(tmp_path)
    series = open_checkpoints(tmp_path, SPACE)
    assert series.steps == (0, 10, 20)
    assert series.learning_rates == (0.0, 0.1, 0.1)
    assert series.weight_decay == 0.5
    assert all(torch.equal(series[i], flat_at(s)) for i, s in enumerate(series.steps))


def test_recorded_series_of_another_model_is_refused(tmp_path):
    record(tmp_path)
    with pytest.raises(ValueError, match="another model"):
        open_checkpoints(tmp_path, ParameterSpace.from_module(nn.Linear(2, 2)))


def test_a_recording_that_was_stopped_early_is_refused(tmp_path):
    record(tmp_path).index.rename(tmp_path / "key.json")
    with pytest.raises(ValueError, match="stopped early"):
        open_checkpoints(tmp_path, SPACE)


def test_recorded_series_with_a_missing_step_is_refused(tmp_path):
    record(tmp_path).weights(10).unlink()
    kept = open_checkpoints(tmp_path, SPACE, skip_damaged=True)
    assert (kept.steps, kept.learning_rates) == ((0, 20), (0.0, 0.1))
    with pytest.raises(ValueError, match=r"\[10\] are missing"):
        open_checkpoints(tmp_path, SPACE)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"steps": "x"}', "[]"])
def test_damaged_series_index_is_refused(tmp_path, content):
    record(tmp_path).index.write_text(content)
    with pytest.raises(ValueError, match="must be a series index"):
        open_checkpoints(tmp_path, SPACE)


# -- atomic writes ---------------------------------------------------------------------------------


def no_space(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_half(path: Path) -> None:
    path.write_bytes(b"half")
    no_space()


def test_write_leaves_one_whole_file(tmp_path):
    write_tensors(tmp_path / "a.safetensors", state_at(1), {"note": "x"})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert torch.equal(SPACE.flatten(read_weights(tmp_path / "a.safetensors")), flat_at(1))


@pytest.mark.parametrize("old", [None, b"old bytes"])
def test_full_disk_while_writing_leaves_what_was_there(tmp_path, old):
    path = tmp_path / "file.bin"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(OSError) as caught:
        write_atomically(path, write_half)
    assert caught.value.errno == errno.ENOSPC
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({} if old is None else {"file.bin": old})


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_full_disk_while_flushing_leaves_what_was_there(tmp_path, monkeypatch, stage):
    write_json(tmp_path / "a.json", {"value": 1})
    monkeypatch.setattr(module_under_test.os, stage, no_space)
    with pytest.raises(OSError):
        write_json(tmp_path / "a.json", {"value": 2})
    with pytest.raises(OSError):
        write_tensors(tmp_path / "b.safetensors", state_at(0))
    assert os.listdir(tmp_path) == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"value": 1}


def test_interrupt_while_writing_leaves_nothing(tmp_path):
    def interrupted(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file.bin", interrupted)
    assert os.listdir(tmp_path) == []


def test_json_refuses_nan_and_sorts_keys(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": 2})
    assert (tmp_path / "a.json").read_text() == '{\n "a": 2,\n "b": 1\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "b.json", {"a": float("nan")})
    assert os.listdir(tmp_path) == ["a.json"]


def test_leftover_part_file_is_no_checkpoint(tmp_path):
    record(tmp_path)
    (tmp_path / "series.json").unlink()
    (tmp_path / ".step-00000030.safetensors.part").write_bytes(b"half")
    (tmp_path / "state-00000020.safetensors").write_bytes(b"optimiser")
    assert open_checkpoints(tmp_path, SPACE, names="step-*").steps == (0, 10, 20)
