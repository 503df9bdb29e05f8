"""A user's own task: the page's code from end to end, what belongs to its keys, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from experiments.cli import app
from experiments.config import load_config
from experiments.run.keys import stage_names
from experiments.run.run import Run, load_run, open_run
from experiments.tasks import TASKS, own_task
from experiments.tasks.own import build as build_own
from experiments.tasks.own_training import rows_of
from experiments.tasks.task import build_task
from experiments.verbs.groups import read_groups, with_groups

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "own-task.md"
TINY = {"threads": 1, "training.steps": 12, "training.record_every": 4}


def quiet(_: str) -> None:
    """Swallow progress lines."""


def code() -> str:
    [found] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return str(found)


def write_task(folder: Path, text: str | None = None, name: str = "copy_task.py") -> Path:
    path = folder / name
    path.write_text(code() if text is None else text)
    return path


def config_of(path: Path, **more: object):
    return load_config("smoke", {**TINY, "task": f"{path}:build", **more})


def command(*words: object) -> tuple[int, str]:
    """Exit code, and what was printed or raised."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    error = result.exception if result.exc_info and result.exit_code else None
    return result.exit_code, f"{result.output}{error or ''}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The page's task and a finished smoke run of it, made by the command line."""
    folder = tmp_path_factory.mktemp("own")
    path, out = write_task(folder), folder / "run"
    sets = ["training.learning_rate=0.01", "threads=1", "discover.edits=10", "damage.doses=[]"]
    words = ["run", "smoke", "--task", f"{path}:build", "--out", out]
    status, said = command(*words, *[w for s in sets for w in ("--set", s)])
    assert status == 0, said
    assert "training sequences are in select or evaluate and are left out" in said
    return path, out


def test_the_page_is_fifteen_lines_of_user_code() -> None:
    assert sum(1 for line in code().splitlines() if line.strip()) <= 15


def test_run_test_discover_report(finished: tuple[Path, Path]) -> None:
    _, out = finished
    summary = json.loads((out / "summary.json").read_text())
    assert summary["task"] == "copy_task:build"
    change = summary["analyses"]["trajectory"]["loss_change"]
    assert change["exact"] < -0.1
    assert set(change["per_group"]) == {"first", "second"}
    small = ["--basis", "trajectory", "--unseen", "0"]
    status, said = command("test", out, *small, "--rotations", 20, "--draws", 19, "--workers", 1)
    assert status == 0, said
    assert "left out: the positive control, the task plants no rule" in said
    assert "tested on its evaluate split" in said
    assert json.loads((out / "verdicts.json").read_text())["rows"]
    status, said = command("discover", out, *small, "--nulls", 0, "--workers", 1)
    assert status == 0, said
    assert {axis["target"] for axis in json.loads((out / "discovery.json").read_text())["axes"]} >= {"first"}
    status, said = command("report", out)
    assert status == 0, said
    assert "copy_task:build" in (out / "report.html").read_text()
    status, said = command("remove", out, "--skill", "first")
    assert status == 1
    assert "gives no logits" in said


def test_a_finished_run_is_resumed_and_opened_from_anywhere(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out = finished
    monkeypatch.chdir(tmp_path)
    run = load_run(out, quiet)
    assert all(run.directory.finished(stage, run.key(stage)) for stage in stage_names(run.config))


def test_from_task_in_python_is_the_same_run(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    named = Run.from_task(f"{path}:build", tmp_path / "a", "smoke", say=quiet, training__steps=12)
    again = Run.from_task(f"{path}", tmp_path / "b", "smoke", say=quiet, training__steps=12)
    assert named.key("train") == again.key("train")
    assert named.config.training.steps == 12
    with pytest.raises(ValueError, match="at the top of a Python file"):
        Run.from_task(lambda: None, tmp_path / "c", say=quiet)


# -- the file belongs to the run ----------------------------------------------------------------------


def test_a_moved_file_keeps_every_key_and_a_changed_one_none(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    first = open_run(config_of(path), tmp_path / "run", quiet)
    (tmp_path / "elsewhere").mkdir()
    moved = open_run(config_of(write_task(tmp_path / "elsewhere")), tmp_path / "moved", quiet)
    path.write_text(code().replace("nn.GELU()", "nn.ReLU()"))
    said: list[str] = []
    with pytest.raises(ValueError, match="was changed since run"):
        load_run(tmp_path / "run", quiet)
    second = open_run(config_of(path), tmp_path / "run", said.append)
    assert any("its stages are run again" in line for line in said)
    for stage in stage_names(first.config):
        assert first.key(stage) == moved.key(stage)
        assert first.key(stage) != second.key(stage)
    load_run(tmp_path / "run", quiet)
    path.unlink()
    with pytest.raises(ValueError, match="must exist, it does not"):
        load_run(tmp_path / "run", quiet)


def test_what_the_file_imports_and_reads_belongs_to_the_keys(tmp_path: Path) -> None:
    (tmp_path / "sizes.py").write_text("WIDTH = 96\n")
    path = write_task(tmp_path, "from sizes import WIDTH\n" + code())
    first = open_run(config_of(path), tmp_path / "run", quiet)
    (tmp_path / "sizes.py").write_text("WIDTH = 97\n")
    assert open_run(config_of(path), tmp_path / "run", quiet).key("train") != first.key("train")
    np.save(tmp_path / "digits.npy", np.arange(30).reshape(10, 3) % 10)
    reading = code().replace(
        "torch.cartesian_prod(*[torch.arange(10)] * 3)",
        f"torch.from_numpy(__import__('numpy').load('{tmp_path / 'digits.npy'}'))",
    )
    reading = reading.replace("1000", "10").replace("training=digits", "training=digits * 0 + 7")
    path = write_task(tmp_path, reading, "reads.py")
    first = open_run(config_of(path), tmp_path / "reads", quiet)
    np.save(tmp_path / "digits.npy", np.arange(3, 33).reshape(10, 3) % 10)
    with pytest.raises(ValueError, match="gives other data or initial weights"):
        load_run(tmp_path / "reads", quiet)
    assert open_run(config_of(path), tmp_path / "reads", quiet).key("train") != first.key("train")


def test_options_are_parameters_and_part_of_the_key(tmp_path: Path) -> None:
    path = write_task(tmp_path, code().replace("def build(seed):", "def build(seed, width=3):"))
    plain = open_run(config_of(path), tmp_path / "a", quiet)
    given = open_run(config_of(path, **{"options.width": 4}), tmp_path / "b", quiet)
    assert plain.key("train") != given.key("train")
    with pytest.raises(ValueError, match="options must be parameters of build"):
        open_run(config_of(path, **{"options.depth": 4}), tmp_path / "c", quiet)
    assert not (tmp_path / "c").exists()


# -- training data ------------------------------------------------------------------------------------


def test_no_batch_of_any_branch_holds_a_held_out_sequence(tmp_path: Path) -> None:
    task = build_task(config_of(write_task(tmp_path)))
    held = {*rows_of(task.splits.select.inputs), *rows_of(task.splits.evaluate.inputs)}
    draws = task.training.__self__
    shown = {row for branch in (0, 1) for step in range(1, 30) for row in rows_of(draws.batch(step, branch))}
    assert len(shown) > 300
    assert not shown & held
    assert rows_of(draws.batch(1, 0)) != rows_of(draws.batch(1, 1))
    assert task.notes == ("667 of 1000 training sequences are in select or evaluate and are left out",)


ENDLESS = """
def labelled(digits):
    even = digits[:, 2] % 2 == 0
    scored = torch.ones(len(digits), 1, dtype=torch.bool)
    return TokenSet(digits, scored, torch.arange(len(digits)), {"first": even, "second": ~even})

def draw(count, generator):
    return labelled(torch.randint(0, 10, (count, 3), generator=generator))
"""


def test_endless_training_gives_unseen_tokens(tmp_path: Path) -> None:
    text = (
        code()
        .replace("training=digits", "training=draw")
        .replace("tokens, training", "tokens.select(torch.arange(300)), training")
        + ENDLESS
    )
    task = build_task(config_of(write_task(tmp_path, text), **{"training.batch_size": 8}))
    unseen, draws = task.unseen(100, seed=1), task.training.__self__
    used = {row for step in range(1, 13) for row in rows_of(draws.batch(step).inputs)}
    used |= {row for tokens in vars(task.splits).values() for row in rows_of(tokens.inputs)}
    fresh = set(rows_of(unseen.inputs))
    assert len(fresh) == unseen.sequences == 100
    assert not fresh & used
    assert torch.equal(unseen.skills["first"], unseen.inputs[:, 2] % 2 == 0)
    assert set(unseen.features) == {"input 0", "input 1", "input 2", "slot"}
    with pytest.raises(ValueError, match="900 unseen sequences were asked for"):
        task.unseen(900, seed=1)


@pytest.mark.parametrize(
    ("change", "by", "message"),
    [
        ('reduction="none")[:, None]', "reduction='mean')", "one loss per sequence and slot"),
        ('reduction="none")[:, None]', "reduction='none')", "one loss per sequence and slot"),
        (
            "return TaskDefinition(",
            "return 5 if seed == 0 else TaskDefinition(",
            "must return a TaskDefinition",
        ),
        ('parents=("first", "second")', 'parents=("first",)', "exactly one of the parents"),
        ('parents=("first", "second")', 'parents=("third",)', "parents must be labels"),
        ("training=digits,", "training=digits[:0],", "neither in select nor in evaluate"),
        ("training=digits,", "training='digits',", "must be a TokenSet, a tensor of rows or a function"),
        ("nn.Linear(48, 96)", "nn.Linear(47, 96)", "token_loss failed with RuntimeError"),
        ("def build(seed):", "def make(seed):", "must have a function 'build'"),
        ("import torch\n", "import torch, nothing_of_this_name\n", "ModuleNotFoundError"),
        ("def build(seed):", "def build(seed:", "must be Python"),
        ("torch.arange(1000), {", "torch.zeros(1000).int(), {", "at least 3 documents"),
        ("~even}", "even.long()}", "booleans"),
        (", parents=", ", groups={'g': even[:9]}, parents=", "must be 1000 booleans"),
    ],
)
def test_what_a_definition_must_be(tmp_path: Path, change: str, by: str, message: str) -> None:
    assert change in code()
    with pytest.raises(ValueError, match=message):
        open_run(config_of(write_task(tmp_path, code().replace(change, by))), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_a_task_without_training_needs_checkpoints(tmp_path: Path) -> None:
    path = write_task(tmp_path, code().replace("training=digits, ", ""))
    with pytest.raises(ValueError, match="pass --checkpoints"):
        open_run(config_of(path), tmp_path / "run", quiet)
    assert build_own(config_of(path)).training is None


def test_every_shipped_task_has_a_builder() -> None:
    import importlib

    for name, shipped in TASKS.items():
        assert callable(importlib.import_module(f"experiments.{shipped.module}").build)
        assert own_task(name) is None
    with pytest.raises(ValueError, match="a task must be one of"):
        own_task("multiplication")


# -- groups of a file ---------------------------------------------------------------------------------


def test_groups_over_select_are_carried_by_rule_and_others_taken_as_they_are(
    smoke_run: Path, tmp_path: Path
) -> None:
    run = load_run(smoke_run, quiet)
    splits = run.task.splits
    tens = splits.select.skills["10s"].numpy()
    np.savez(tmp_path / "groups.npz", tens=tens)
    said: list[str] = []
    found = with_groups(run, tmp_path / "groups.npz", said.append)
    assert torch.equal(found.task.splits.evaluate.skills["tens"], splits.evaluate.skills["10s"])
    assert "AUC 1.00" in said[0]
    assert found.key_for("x") != run.key_for("x")
    assert found.key("evaluate") == run.key("evaluate")
    drawn = np.random.default_rng(0).random(splits.select.count + splits.evaluate.count) < 0.5
    (tmp_path / "both.json").write_text(json.dumps({"any": drawn.tolist()}))
    exact = with_groups(run, tmp_path / "both.json")
    assert exact.task.splits.evaluate.skills["any"].tolist() == drawn[splits.select.count :].tolist()
    assert exact.task.unseen is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": [True, False]}, "must have 200 values"),
        ({"a": [1, 0] * 100}, "list of true and false"),
        ({"10s": [True] * 200}, "is a label of this run already"),
        ({}, "at least one group"),
        ([True], "at least one group"),
    ],
)
def test_groups_that_do_not_fit(smoke_run: Path, tmp_path: Path, values: object, message: str) -> None:
    (tmp_path / "groups.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        with_groups(load_run(smoke_run, quiet), tmp_path / "groups.json")


def test_integer_masks_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "groups.npz", a=np.ones(200, dtype=np.int64))
    with pytest.raises(ValueError, match="int64"):
        read_groups(tmp_path / "groups.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK\3\4 nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        read_groups(tmp_path / "broken.npz")
