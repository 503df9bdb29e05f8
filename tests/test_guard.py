"""One writer, and nothing damaged is read: lock, seal, stage checksums, read-only and full disks."""

from __future__ import annotations

import errno
import json
import multiprocessing
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.application import explain
from experiments.cli import app
from experiments.config import load_config
from experiments.run.driver import run_stages
from experiments.run.run import load_run, open_run
from experiments.run.store import RunDirectory
from experiments.verbs.guard import check, existing, seal, writing
from polca_edit.checkpoints import files as checkpoint_files
from tests.kill_and_flip import contents, differing, flipped


def hold(path: str, held: object, done: object) -> None:
    with writing(Path(path)):
        held.set()  # type: ignore[attr-defined]
        done.wait(30)  # type: ignore[attr-defined]


def test_a_second_writer_is_told_and_the_first_one_may_nest(smoke_copy: Path) -> None:
    with writing(smoke_copy), writing(smoke_copy), existing(smoke_copy):
        pass
    spawn = multiprocessing.get_context("fork")
    held, done = spawn.Event(), spawn.Event()
    other = spawn.Process(target=hold, args=(str(smoke_copy), held, done))
    other.start()
    assert held.wait(30)
    with pytest.raises(ValueError, match="another process is writing into"), writing(smoke_copy):
        pass
    check(smoke_copy)  # whoever only reads does not wait
    done.set()
    other.join(30)
    with writing(smoke_copy):
        pass


def test_a_run_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a run directory"), existing(tmp_path / "gone"):
        pass
    assert not (tmp_path / "gone").exists()


def test_every_file_is_listed_once_and_any_change_is_seen(smoke_copy: Path) -> None:
    with writing(smoke_copy):
        pass
    directory = RunDirectory(smoke_copy)
    listed = set(json.loads((smoke_copy / "seal.json").read_text())["files"])
    staged = {name for record in directory.stage_records() for name in record.files}
    every = {p.relative_to(smoke_copy).as_posix() for p in smoke_copy.rglob("*") if p.is_file()}
    assert listed | staged | {"seal.json", ".lock"} == every
    assert not listed & staged
    draw = random.Random(0)
    for name in sorted(every - {".lock"}):
        before = (smoke_copy / name).read_bytes()
        flipped(smoke_copy / name, draw)
        with pytest.raises(ValueError, match="not what|damaged|must be a readable record"):
            check(smoke_copy)
        (smoke_copy / name).write_bytes(before)
    check(smoke_copy)


def test_run_repairs_what_a_stage_wrote_and_refuses_the_rest(smoke_copy: Path) -> None:
    with writing(smoke_copy):
        pass
    wanted = contents(smoke_copy)
    basis = smoke_copy / "basis" / "trajectory.safetensors"
    flipped(basis, random.Random(1))
    with pytest.raises(ValueError, match="is not what stage basis:trajectory wrote"):
        load_run(smoke_copy, lambda _: None)
    said: list[str] = []
    with writing(smoke_copy, repairs=True):
        run = open_run(load_config("smoke", {"threads": 1}), smoke_copy, said.append)
        run_stages(run)
    assert "basis:trajectory" in [line.split()[0] for line in said if "kept" not in line]
    assert "train" in [line.split()[0] for line in said if "kept" in line]
    assert not [name for name in differing(wanted, contents(smoke_copy)) if name.endswith(".safetensors")]
    record = json.loads((smoke_copy / "run.json").read_text())
    record["evaluate_openings"] = []
    (smoke_copy / "run.json").write_text(json.dumps(record))
    result = CliRunner().invoke(app, ["run", "smoke", "--out", str(smoke_copy)])
    assert "run.json' is not what was written" in str(result.exception)


def test_python_code_that_writes_takes_the_seal_away(smoke_copy: Path) -> None:
    seal(RunDirectory(smoke_copy))
    run = load_run(smoke_copy, lambda _: None)
    run.directory.note("mine", "key", [smoke_copy / "plan.json"], seconds=0.0, passes={})
    assert not (smoke_copy / "seal.json").exists()
    check(smoke_copy)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EROFS, "Read-only file system: '.*'; check the path"),
        (errno.EACCES, "Permission denied: '.*'; check the path"),
    ],
)
def test_disks_that_cannot_be_written_say_so_and_leave_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, sentence: str
) -> None:
    import os
    import re

    def refuse(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code), str(target))

    monkeypatch.setattr(checkpoint_files.os, "replace", refuse)
    result = CliRunner().invoke(app, ["run", "smoke", "--out", str(tmp_path / "run")])
    assert isinstance(result.exception, OSError)
    assert re.search(sentence, explain(result.exception))
    assert [p.name for p in (tmp_path / "run").rglob("*")] == [".lock"]
    monkeypatch.undo()
    with writing(tmp_path / "run"):
        pass
