"""What a run depends on: contents, not paths; one tokenizer, one training; openings counted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.config import BasisConfig, RunConfig, load_config, parse_config
from experiments.run.contents import Contents
from experiments.run.keys import stage_names
from experiments.run.run import Run, load_run, open_run
from experiments.run.run_record import open_evaluate, read_run_record
from experiments.run.stages import damage as damage_stage
from experiments.run.stages.bases import basis_of
from experiments.run.stages.training import trained_series
from experiments.tasks import text as english
from experiments.tasks.arithmetic import first_and_second, first_and_second_of, make_data
from polca_edit.basis.record import random_basis
from polca_edit.seeds import generator_for


def quiet(_: str) -> None:
    """Swallow progress lines."""


def write_text(path: Path, word: str = "river") -> Path:
    lines = [
        f"The {word} number {i} flows past {i * 7 % 50} towns and {i * 3 % 40} hills. " * 8 for i in range(40)
    ]
    path.write_text("\n\n".join(lines))
    return path


def text_config(file: Path) -> RunConfig:
    return parse_config(
        {
            "task": "text",
            "model": {"layers": 1, "d_model": 16, "heads": 2, "d_mlp": 32},
            "text": {
                "file": str(file),
                "vocabulary": 300,
                "n_ctx": 16,
                "deduplicate": False,
                "curvature_sequences": 6,
                "select_sequences": 8,
                "evaluate_sequences": 8,
            },
            "training": {"steps": 10, "batch_size": 4, "record_every": 2},
        }
    )


def in_place(path: Path, change: bytes, by: bytes) -> None:
    """Put other bytes of the same length into a file and set its modification time back."""
    before, content = path.stat(), path.read_bytes()
    assert len(change) == len(by)
    assert change in content
    path.write_bytes(content.replace(change, by, 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def keys_of(run: Run) -> dict[str, str]:
    return {stage: run.key(stage) for stage in stage_names(run.config)}


# -- contents ---------------------------------------------------------------------------------------


def test_a_text_changed_in_place_changes_every_key_and_a_moved_one_none(tmp_path: Path) -> None:
    file = write_text(tmp_path / "a.txt")
    first = keys_of(open_run(text_config(file), tmp_path / "run", quiet))
    in_place(file, b"river", b"brook")
    second = keys_of(open_run(text_config(file), tmp_path / "run", quiet))
    assert all(first[stage] != second[stage] for stage in first)
    moved = Path(shutil.move(file, tmp_path / "b.txt"))
    assert keys_of(open_run(text_config(moved), tmp_path / "run", quiet)) == second


def test_checkpoints_changed_in_place_change_every_key(smoke_run: Path, tmp_path: Path) -> None:
    series = Path(shutil.copytree(smoke_run / "checkpoints", tmp_path / "series"))
    config = load_config("smoke", {"threads": 1, "checkpoints.directory": str(series)})

    def keys() -> dict[str, str]:
        return keys_of(open_run(config, tmp_path / "run", quiet))

    first = keys()
    (series / "optimizer.pt").write_bytes(b"beside the weights")
    assert keys() == first
    (series / "run").mkdir()  # a run of its own inside, which grows
    (series / "run" / "config.sha256").write_text("sum")
    (series / "run" / "basis.safetensors").write_bytes(b"rows")
    assert keys() == first
    weights = next(iter(sorted(series.glob("step-*"))))
    tail = weights.read_bytes()[-64:]
    in_place(weights, tail, bytes(64) if any(tail) else b"\1" * 64)
    second = keys()
    assert all(first[stage] != second[stage] for stage in first)


def test_a_large_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.run import contents as module

    file, read = write_text(tmp_path / "a.txt"), []
    real = module.checksum
    monkeypatch.setattr(module, "checksum", lambda path: read.append(path.name) or real(path))

    def digest() -> str:
        found = Contents(tmp_path / "contents.json")
        value = found.of(file)
        found.save()
        return value

    first = digest()
    assert digest() == first
    assert read == ["a.txt"]
    in_place(file, b"river", b"brook")
    assert digest() != first
    assert read == ["a.txt", "a.txt"]


def test_the_tokenizer_is_trained_once_for_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, trained = write_text(tmp_path / "a.txt"), []
    real = english.train_tokenizer
    monkeypatch.setattr(english, "train_tokenizer", lambda *given: trained.append(1) or real(*given))
    opened = open_run(text_config(file), tmp_path / "run", quiet)
    loaded = load_run(tmp_path / "run", quiet)
    assert len(trained) == 1
    for split in ("curvature", "select", "evaluate"):
        one, two = (getattr(run.task.splits, split) for run in (opened, loaded))
        assert torch.equal(one.inputs, two.inputs)
        assert one.contexts == two.contexts
    in_place(file, b"river", b"brook")
    open_run(text_config(file), tmp_path / "run", quiet)
    assert len(trained) == 2


# -- one training, one basis ------------------------------------------------------------------------


def test_weights_of_another_learning_rate_are_never_reused(tmp_path: Path) -> None:
    def last(rate: float) -> torch.Tensor:
        settings = {"threads": 1, "training.steps": 12, "training.record_every": 4}
        config = load_config("smoke", {**settings, "training.learning_rate": rate})
        return trained_series(open_run(config, tmp_path / "run", said.append))[-1].clone()

    said: list[str] = []
    first = last(1e-3)
    assert torch.equal(last(1e-3), first)
    assert len(said) == 1
    assert not torch.equal(last(3e-3), first)
    assert torch.equal(last(1e-3), first)


def test_a_study_takes_trained_weights_and_bases_from_the_run(smoke_copy: Path) -> None:
    said: list[str] = []
    run = load_run(smoke_copy, said.append)
    assert trained_series(run).steps[-1] == run.config.training.steps
    assert said == []
    spec = BasisConfig(kind="random", vectors=2, name="study")
    first = basis_of(run, spec)
    stamp = run.directory.basis("study").stat().st_mtime_ns
    assert torch.equal(basis_of(run, spec).rows, first.rows)
    assert run.directory.basis("study").stat().st_mtime_ns == stamp
    assert len(said) == 1
    assert len(basis_of(run, spec.model_copy(update={"vectors": 3}))) == 3
    with pytest.raises(ValueError, match="turned from stored projections"):
        basis_of(run, BasisConfig(kind="random", rotation="varimax"))


# -- the evaluate split -----------------------------------------------------------------------------


def test_a_later_plan_is_exploratory_and_every_opening_is_counted(smoke_copy: Path) -> None:
    run = load_run(smoke_copy, quiet)
    (own,) = read_run_record(run.directory).evaluate_openings
    assert (own.by, own.exploratory, own.times) == ("run", False, 1)
    opening = open_evaluate(run, {"skill": "10s"}, by="remove")
    assert (opening.by, opening.exploratory, opening.times) == ("remove", True, 1)
    assert open_evaluate(run, {"skill": "10s"}, by="remove").times == 2
    assert open_evaluate(run, {"skill": "1s"}, by="remove").exploratory
    openings = json.loads((smoke_copy / "run.json").read_text())["evaluate_openings"]
    assert [(o["by"], o["exploratory"], o["times"]) for o in openings] == [
        ("run", False, 1),
        ("remove", True, 2),
        ("remove", True, 1),
    ]
    # The plan of the run stays where it was; others are written beside it with their hash.
    assert json.loads((smoke_copy / "plan.json").read_text())["sha256"] == own.plan
    written = json.loads((smoke_copy / "plans" / f"remove-{opening.plan[:12]}.json").read_text())
    assert written == {"skill": "10s", "sha256": opening.plan}


def test_the_first_plan_is_the_planned_one_whoever_makes_it(tmp_path: Path) -> None:
    run = open_run(load_config("smoke", {"threads": 1}), tmp_path / "run", quiet)
    assert not open_evaluate(run, {"skill": "10s"}, by="remove").exploratory
    assert open_evaluate(run, {"pairs": []}).exploratory
    # Sequences drawn anew are other tokens: nothing has opened them yet.
    assert not open_evaluate(run, {"pairs": [], "tokens": "drawn"}, by="test").exploratory
    assert open_evaluate(run, {"pairs": [1], "tokens": "drawn"}, by="test").exploratory


# -- seeds and threads ------------------------------------------------------------------------------


def batches(seed: int, branch: int) -> list[bytes]:
    data = make_data(20, 20, 20, 16, seed)
    return [data.batch(step, branch).numpy().tobytes() for step in range(1, 60)]


def test_no_stream_is_a_shift_of_another() -> None:
    streams = {(seed, branch): set(batches(seed, branch)) for seed in (0, 1, 2) for branch in (0, 1, 2)}
    for one in streams:
        assert len(streams[one]) == 59
        for other in streams:
            assert one == other or not streams[one] & streams[other], (one, other)


def test_text_streams_are_apart_too(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(8000).reshape(40, 200) % 300)
    drawn = {}
    for seed, branch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        config = text_config(tmp_path / "ids.npy").model_copy(update={"seed": seed})
        data = english.text_data(config)
        drawn[seed, branch] = {data.batch(step, branch).numpy().tobytes() for step in range(1, 40)}
    assert not drawn[0, 1] & drawn[1, 0]
    assert not drawn[0, 0] & drawn[0, 1]


def test_the_recorded_stream_is_the_one_of_committed_runs() -> None:
    first, second = first_and_second_of(make_data(20, 20, 20, 4, seed=3).batch(7))
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 7)
    wanted = [torch.randint(0, 1000, (8,), generator=generator) for _ in range(2)]
    assert first.tolist() == wanted[0][:4].tolist()
    assert second.tolist() == wanted[1][:4].tolist()


def test_unseen_sums_leave_out_what_branches_train_on() -> None:
    data, steps = make_data(50, 40, 60, 40_000, seed=5), range(1, 9)

    def unordered(first: torch.Tensor, second: torch.Tensor) -> set[tuple[int, int]]:
        return {(min(p), max(p)) for p in zip(first.tolist(), second.tolist(), strict=True)}

    branch = set.union(*(unordered(*first_and_second_of(data.batch(step, 1))) for step in steps))
    with pytest.raises(ValueError, match="unseen sums") as refused:
        data.unseen(1_000_000, 40, 1)
    everything = int(str(refused.value).split("leave ")[1].split()[0])
    assert unordered(*first_and_second(data.unseen(everything, 40, 1))) & branch
    with pytest.raises(ValueError, match="unseen sums") as refused:
        data.unseen(1_000_000, 40, 1, {1: steps})
    left = int(str(refused.value).split("leave ")[1].split()[0])
    assert left < everything
    assert not unordered(*first_and_second(data.unseen(left, 40, 1, {1: steps}))) & branch


def test_random_controls_are_not_the_vectors_of_a_random_basis(
    smoke_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(smoke_run, quiet)
    basis = random_basis(run.task.space.size, 1, torch.Generator().manual_seed(run.config.seed))
    drawn: list[torch.Tensor] = []
    real = damage_stage.displace

    def noted(place: object, rows: torch.Tensor, *given: object) -> object:
        drawn.append(rows[0])
        return real(place, rows, *given)

    monkeypatch.setattr(damage_stage, "displace", noted)
    place = damage_stage.evaluated(run, run.task.splits.select)
    damage_stage.random_controls(run, place, basis.rows[0], 0, {})
    assert drawn
    # Unrelated directions of 9,706 parameters: cosines have standard deviation 0.01.
    assert all(abs(float(row @ basis.rows[0])) < 0.05 for row in drawn)


def test_generators_of_different_purposes_differ_and_are_repeated() -> None:
    purposes = [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (1, 0), (0, 1)]
    drawn = [torch.randint(1 << 30, (4,), generator=generator_for(*p)).tolist() for p in purposes]
    assert len({tuple(d) for d in drawn}) == len(purposes)
    again = [torch.randint(1 << 30, (4,), generator=generator_for(*p)).tolist() for p in purposes]
    assert drawn == again


def test_threads_are_set_only_where_the_config_asks(smoke_copy: Path, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    open_run(load_config("smoke"), tmp_path / "run", quiet)
    assert torch.get_num_threads() == 2
    open_run(load_config("smoke", {"threads": 1}), tmp_path / "run", quiet)
    assert torch.get_num_threads() == 1
