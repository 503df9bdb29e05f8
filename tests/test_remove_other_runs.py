"""``polca-edit remove`` by undoing on runs of other kinds: an own task, opened weights, groups of a file.

Oracle: two lookup tables whose recorded movement is written down, so that windows and shares are known.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hub_models import revisions, train_and_save, write_text
from safetensors.torch import save_file
from test_opening import gpt2
from typer.testing import CliRunner

from experiments.application import single
from experiments.config import load_config
from experiments.removal.undo.records import RemovalFile
from experiments.removal.verb import remove
from experiments.run.run import Run, open_run
from interventions.edit_files import load_edit
from polca_edit.artifacts import load_record

#: step -> logit of the right answer in the skill's table, and in the other's.
LEARNED = {0: (0, 0), 10: (0, 2), 20: (0, 3), 30: (2, 3), 40: (4, 3), 50: (4, 4)}
TASK = """
import torch
from torch import nn
from experiments.tasks.own import TaskDefinition
from polca_edit import TokenSet


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(5, 4)), nn.Parameter(torch.zeros(5, 4))

    def forward(self, x):
        return torch.cat([self.first, self.second])[x]


def logits(module, x):
    return module(x[:, :1])


def token_loss(module, x):
    return nn.functional.cross_entropy(module(x[:, 0]), x[:, 0] % 4, reduction="none")[:, None]


def sums(first, count):
    x = torch.stack([torch.arange(count) % 10, first + torch.arange(count)], dim=1)
    skill = x[:, 0] < 5
    ones = torch.ones(count, 1, dtype=torch.bool)
    return TokenSet(x, ones, torch.arange(count), {"skill": skill, "other": ~skill}, x[:, :1] % 4)


def build(seed):
    return TaskDefinition(Tables(), token_loss, sums(0, 240), training=sums(1000, 200), logits=logits)
"""


@pytest.fixture
def planted(tmp_path: Path) -> Run:
    """An own task whose checkpoints were written by hand."""
    (tmp_path / "tables.py").write_text(TASK)
    right = torch.nn.functional.one_hot(torch.arange(10) % 4, 4).float()
    for step, (first, second) in LEARNED.items():
        (tmp_path / f"series/checkpoint-{step}").mkdir(parents=True)
        weights = {"first": first * right[:5], "second": second * right[5:]}
        save_file(weights, tmp_path / f"series/checkpoint-{step}/model.safetensors")
    given = {
        "task": f"{tmp_path / 'tables.py'}:build",
        "threads": 1,
        "checkpoints": {"directory": str(tmp_path / "series")},
    }
    return open_run(load_config("smoke", given), tmp_path / "run", lambda _: None)


def invoke(run: Run, *given: str):
    return CliRunner().invoke(single(remove), [str(run.directory.path), *given])


def lost(level: float) -> float:
    """Share of its headroom that a table at 4 loses at another level: losses are log(1 + 3 exp(-level))."""
    losses = [math.log(1 + 3 * math.exp(-at)) for at in (level, 0.0, 4.0)]
    return (losses[0] - losses[2]) / (losses[1] - losses[2])


@pytest.mark.parametrize(
    ("given", "levels", "words"),
    [
        # The fall lies in 20:40; undoing begins half of that earlier, at 10.
        (["rollback"], (0, 3), "undoing steps 10:40 takes 100% of it"),
        (["return"], (0, 2), "going back to step 10 takes 100% of it and with it, before repair: other 22%"),
        (["rollback", "--window", "20:40"], (0, 4), "undoing steps 20:40 takes 100% of it and no other"),
        (["return", "--window", "30:40"], (2, 3), "going back to step 30 takes 22% of it"),
    ],
)  # fmt: skip
def test_an_own_task_is_undone_as_the_forecast_says(planted: Run, given, levels, words) -> None:
    bounds = ["--target", "0.01", "--off", "1", "--kl", "9"]
    found = invoke(planted, "--skill", "skill", "--repair", "0", *bounds, "--method", *given)
    assert found.exit_code == 0, found.output
    said = " ".join(found.output.split())
    assert f"skill was learned in steps 20:40; {words}" in said
    place = planted.directory.path / "edits"
    theta = planted.checkpoints()[-1]
    moved = load_edit(place / "skill").edit.apply(theta)
    right = torch.nn.functional.one_hot(torch.arange(10) % 4, 4).float()
    expected = torch.cat([levels[0] * right[:5], levels[1] * right[5:]]).flatten()
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)
    # What was foreseen on select is what fell on evaluate: no repair, and every token of a table is alike.
    (removal,) = load_record(RemovalFile, place / "skill.result.json").removals
    assert removal.undone is not None
    said_first = removal.undone.forecast
    assert said_first.share == pytest.approx(lost(levels[0]), abs=1e-5)
    assert said_first.falls["other"] == pytest.approx(lost(levels[1]), abs=1e-5)
    assert removal.groups["other"] == pytest.approx(said_first.falls["other"], abs=1e-3)


def test_repair_mends_the_other_table_of_an_own_task(planted: Run) -> None:
    found = invoke(
        planted, "--skill", "skill", "--method", "return", "--relearn", "8", "--kl", "9", "--off", "1"
    )
    assert found.exit_code == 0, found.output
    (removal,) = load_record(RemovalFile, planted.directory.path / "edits/skill.result.json").removals
    assert removal.undone is not None
    assert removal.returned is not None
    assert removal.undone.repair_steps > 0
    assert removal.groups["other"] < removal.undone.forecast.falls["other"]
    assert removal.target_share == pytest.approx(1.0, abs=1e-5)
    # The best constant answer knows how often each answer is right, and no more.
    answers = [int(x) % 4 for x in planted.task.splits.evaluate.inputs[:, 0] if x < 5]
    shares = [answers.count(one) / len(answers) for one in range(4)]
    assert removal.returned.chance == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert removal.returned.before == pytest.approx(math.log(1 + 3 * math.exp(-4.0)), abs=1e-6)


def test_a_dry_run_says_what_will_fall_and_writes_nothing(planted: Run) -> None:
    before = sorted(planted.directory.path.rglob("*"))
    found = invoke(planted, "--skill", "skill", "--method", "return", "--dry-run")
    assert found.exit_code == 0, found.output
    said = " ".join(found.output.split())
    assert "going back to step 10 takes 100% of it" in said
    assert "would take out skill by return, judged on evaluate" in said
    assert sorted(planted.directory.path.rglob("*")) == before


def test_groups_of_a_file_are_undone_and_repaired_where_their_labels_reach(
    planted: Run, tmp_path: Path
) -> None:
    tokens = planted.task.splits
    on_select, on_evaluate = ((part.inputs[:, 0] < 5).tolist() for part in (tokens.select, tokens.evaluate))
    (tmp_path / "rule.json").write_text(json.dumps({"mine": on_select}))
    (tmp_path / "exact.json").write_text(json.dumps({"mine": on_select + on_evaluate}))
    anything = ["--method", "rollback", "--target", "0", "--off", "9", "--kl", "9"]
    for file, words in (("rule", "repair and its choice"), ("exact", "there is no data to repair with")):
        anything[-1:] = ["9", "--relearn", "2"] if file == "exact" else ["9"]
        found = invoke(planted, "--groups", str(tmp_path / f"{file}.json"), "--skill", "mine", *anything)
        assert found.exit_code == 0, found.output
        assert words in found.output
        (removal,) = load_record(RemovalFile, planted.directory.path / "edits/mine.result.json").removals
        assert removal.target_share == pytest.approx(1.0, abs=1e-3)
    assert "relearning is not measured" in found.output
    found = invoke(planted, "--groups", str(tmp_path / "exact.json"), "--skill", "yours", *anything)
    assert "a skill must be one this run labels, got 'yours'" in str(found.exception)


def test_an_opened_folder_of_weights(tmp_path: Path) -> None:
    names = [f"checkpoint-{step}" for step in (5, 10, 15, 20)]
    train_and_save(gpt2(), revisions(tmp_path / "out", names, lambda name: int(name.split("-")[1])))
    text = {"file": str(write_text(tmp_path / "text.jsonl")), "n_ctx": 16, "select_sequences": 10}
    text |= {"curvature_sequences": 6, "evaluate_sequences": 10, "scored_per_sequence": 8}
    given = {"task": "text", "threads": 1, "text": text, "checkpoints": {"directory": str(tmp_path / "out")}}
    given["model"] = {"kind": "huggingface", "path": str(tmp_path / "out/checkpoint-20")}
    run = open_run(load_config("smoke", given), tmp_path / "run", lambda _: None)
    words = run.task.splits.select.features["token"]
    (tmp_path / "groups.json").write_text(json.dumps({"the": [bool(word == " The") for word in words]}))
    groups = ["--groups", str(tmp_path / "groups.json"), "--skill", "the"]
    found = invoke(
        run, *groups, "--method", "return", "--repair", "2", "--target", "0", "--off", "9", "--kl", "9"
    )
    assert found.exit_code == 0, found.output
    assert "the was learned in steps" in found.output
    edit = load_edit(run.directory.path / "edits/the").edit
    assert edit.provenance["method"] == "return"
