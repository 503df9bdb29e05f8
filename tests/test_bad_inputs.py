"""Bad input over all verbs: exit code 1 (2 for a wrong option), one sentence with rule, value and remedy."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from experiments.application import explain
from experiments.cli import VERBS, app

#: (command, exit code, part of the sentence); {run}, {file}, {full}, {empty}, {gone}, ... are places.
TABLE: list[tuple[str, int, str]] = [
    ("run", 1, "give a config file, a preset of"),
    ("run nope", 1, "a config must be a file or one of the presets .*, got 'nope'"),
    ("run smoke --set training.steps", 1, "--set needs KEY=VALUE, got 'training.steps'"),
    ("run smoke --set training.stepz=3", 1, "unknown key 'training.stepz'"),
    ("run smoke --set seed.x=3", 1, "seed: Input should be a valid integer"),
    ("run smoke --set training.steps=abc", 1, "training.steps: .*valid integer.*got 'abc'"),
    ("run smoke --set training.steps=1", 1, "training.steps: .*greater than or equal to 2, got 1"),
    ("run smoke --set training.record_every=50", 1, "a run needs at least 3 checkpoints"),
    ("run smoke --set training.learning_rate=0", 1, "greater than 0, got 0"),
    ("run smoke --set model.d_model=33", 1, "d_model must be a multiple of heads, got 33 and 2"),
    ("run smoke --set model.kind=huggingface", 1, "needs 'path'"),
    ("run smoke --set seed=-1", 1, "seed: .*greater than or equal to 0, got -1"),
    ("run smoke --seed x", 2, "Invalid value for '--seed'"),
    ("run smoke --window 10", 1, "--window must be two steps START:END, got '10'"),
    ("run smoke --window 20:10", 1, "must end after it starts, got '20:10'"),
    ("run smoke --window 7:50", 1, "recorded steps, 7:50 does not; the nearest are 6:48"),
    ("run smoke --set window=5", 1, "window: "),
    ("run smoke --task nope", 1, "a task must be one of .* or FILE.py:FUNCTION, got 'nope'"),
    ("run smoke --task {gone}.py:build", 1, "task file .* must exist, it does not"),
    ("run smoke --task {module}:build", 1, "must have a function 'build'"),
    ("run --task arithmetic", 1, "has no preset of its name"),
    ("run smoke --set options=3", 1, "options: .*valid dictionary"),
    ("run smoke --device tpu9", 1, "device must be 'cpu' or 'cuda', got 'tpu9'"),
    ("run smoke --engine slurm", 1, "engine: .*'local' or 'ray', got 'slurm'"),
    ("run smoke --out {file}", 1, "must be a run directory, it is a file"),
    ("run smoke --out {full}", 1, "must be new, empty or an earlier run"),
    ("run smoke --redo nope", 1, "--redo needs a stage of this run"),
    ("run smoke --checkpoints {gone} --out {new}", 1, "'.*gone' "),
    ("run smoke --set clusters.min_cluster_share=2", 1, "less than 1, got 2"),
    ("run smoke --set clusters.selection=best", 1, "'eom' or 'leaf', got 'best'"),
    ("run smoke --set arithmetic.select_sums=5", 1, "greater than or equal to 10, got 5"),
    ("run smoke --set arithmetic.select_sums=200000 --out {new}", 1, "at most 100000 sums in all"),
    ("run smoke --set discover.windows=1", 1, "greater than or equal to 3, got 1"),
    ("run smoke --set rule=euler", 1, "rule: .*got 'euler'"),
    ("run smoke --set bases=[{kind:hessian},{kind:hessian}]", 1, "every basis needs its own name|bases"),
    ("run {broken}", 1, "must be valid YAML"),
    ("run {list}", 1, "must be a mapping of settings, got list"),
    ("run english-demo --out {new}", 1, "task 'text' needs a text, got none"),
    ("run english-demo --text {gone} --out {new}", 1, "a text must exist"),
    ("run english-demo --text {blank} --out {new}", 1, "at least one document|is empty"),
    ("run smoke --nope", 2, "No such option"),
    ("run smoke --set damage.doses=[.nan]", 1, "finite number, got nan"),
    ("run smoke --set damage.doses=[1000000]", 1, "less than or equal to 100"),
    ("run smoke --set damage.reference=99", 1, "damage.reference must be below 10, .* got 99"),
    ("run smoke --set training.learning_rate=.inf", 1, "finite number, got inf"),
    ("run smoke --set training.steps=1000000000000", 1, "less than or equal to 100000000"),
    ("run smoke --set training.betas=[0.9,1.5]", 1, "training.betas.1: .*less than 1, got 1.5"),
    ('run smoke --set bases=[{"kind":"nope"}]', 1, "bases.0.kind: .*'hessian'.* got 'nope'"),
    ('run smoke --set bases=[{"kind":"trajectory","vectors":99}]', 1, "at most 10 vectors from 11 check"),
    ("run smoke --seed 99999999999", 1, "less than 4294967296, got 99999999999"),
    ("run smoke --out {run} --seed 3", 1, "holds a run with seed 0, got 3; choose another --out"),
    ("run smoke --out {run} --set clusters.selection=leaf", 1, "clusters.selection 'eom', got 'leaf'"),
    ("run mini --out {run} --dry-run", 1, "holds a run with .* other settings differ"),
    ("run smoke --out {run} --redo hessian", 1, "--redo needs a stage of this run"),
    ("demo --out {run}", 1, "holds a run with"),
    ("demo --seed -1", 1, "greater than or equal to 0, got -1"),
    ("demo --redo nope", 1, "--redo needs a stage of this run"),
    ("demo --seed x", 2, "Invalid value for '--seed'"),
    ("demo --set nothing=1", 1, "unknown key 'nothing'"),
    ("open {gone} --text {file}", 1, "gone"),
    ("open {empty} --text {file}", 1, "empty"),
    ("open {empty}", 2, "Missing option '--text'"),
    ("english --preset nope", 1, "--preset must be one of"),
    ("english --out {new}", 1, "needs a text"),
    ("plan", 1, "give a config file"),
    ("doctor {gone}", 1, "gone"),
    ("validate --case nope", 1, "nope"),
    ("compare {gone} {gone}", 1, "gone"),
    ("doctor {empty}", 1, "empty"),
    ("plan nope", 1, "a config must be a file"),
    ("plan smoke --budget-minutes x", 2, "Invalid value for '--budget-minutes'"),
    ("plan smoke --budget-minutes nan", 2, "must be a finite number, got nan|Invalid value for"),
    ("plan smoke --budget-minutes -3", 2, "Invalid value for '--budget-minutes'"),
    ("clean {gone}", 1, "must be a run directory"),
    ("doctor {gone}", 1, "gone"),
    ("study nope", 2, "No such command"),
    ("open {empty} --text {file} --step-pattern (", 1, "empty|regular expression"),
    ("report", 2, "Missing argument"),
    ("report {gone}", 1, "must be a run directory"),
    ("inspect {gone}", 1, "summary.json|run directory"),
    ("label {gone}", 1, "must be a run directory"),
    ("test {gone}", 1, "must be a run directory"),
    ("test {run} --basis nope", 1, "--basis must be one of"),
    ("test {run} --window a:b", 1, "two steps START:END, got 'a:b'"),
    ("test {run} --window 7:30 --unseen 0", 1, "recorded steps, 7 is not"),
    ("test {run} --draws 3", 1, "random_draws must be at least 19"),
    ("test {run} --rotations 2", 2, "Invalid value for '--rotations'"),
    ("test {run} {run}", 1, "needs a folder of its own; pass --out"),
    ("test {run} --groups {gone}", 1, "--groups must be a file"),
    ("test {run} --groups {short}", 1, "must have 200 values"),
    ("test {run} --groups {integers}", 1, "list of true and false, got int64"),
    ("test {run} --unseen 2000000", 1, "unseen sums, got 2000000 to draw"),
    ("test {run} --unseen -5", 2, "Invalid value for '--unseen'"),
    ("test {run} --out {run}", 1, "is a run and keeps its own result"),
    ("test {run} --out {file}", 1, "is a file; choose another"),
    (
        "test {run} --groups {nobody}",
        1,
        "must hold some of the 200 select tokens and leave some out, it holds none",
    ),
    ("discover {gone}", 1, "must be a run directory"),
    ("discover {run} --basis nope", 1, "--basis must be one of"),
    ("discover {run} --window 30:12", 1, "must end after it starts"),
    ("discover {run} --window 12:18", 1, "at least three checkpoints"),
    ("axis {run}", 2, "Missing option '--target'"),
    ("axis {run} --target nope --unseen 0", 1, "--target must be one of"),
    ("axis {run} --target 10s --limit nan", 2, "must be a finite number, got nan|Invalid value for"),
    ("axis {run} --target 10s --rank 0", 2, "Invalid value for '--rank'"),
    ("axis {run} --target 10s --groups {file}", 1, "--groups must be an .npz or a JSON file"),
    ("blocking {gone} --target 10s", 1, "must be a run directory"),
    ("blocking {run} --target 10s --branches 1", 1, "needs at least two, got 1"),
    ("remove {run}", 1, "give either --skill NAME or --cluster"),
    ("remove {run} --skill 10s --cluster hessian:0:0", 1, "give either --skill NAME or --cluster"),
    ("remove {run} --skill 10s --budget huge", 1, "--budget must be one of"),
    ("remove {run} --skill nope", 1, "a skill must be one this run labels, got 'nope'"),
    ("remove {run} --cluster hessian", 1, "--cluster needs BASIS:VECTOR:CLUSTER"),
    ("remove {run} --cluster hessian:99:0", 1, "does not exist in this run"),
    ("remove {run} --skill 10s --basis hessian --window 6:30", 1, "both say where to search"),
    ("remove {run} --skill 10s --target 2", 2, "Invalid value for '--target'"),
    ("remove {run} --skill 10s --kl inf", 2, "must be a finite number, got inf"),
    ("apply {file} {file} --out {new} --dose nan", 2, "must be a finite number, got nan|Invalid value for"),
    ("apply {gone}.json {file} --out {new}", 1, "gone"),
    ("apply {file} {file} --out {new}", 1, "edit|record|cannot be read|must"),
    ("demo-table {gone}", 1, "gone"),
    ("selftest --break nope", 1, "--break must be one of"),
    ("nope", 2, "No such command"),
]


@pytest.fixture(scope="module")
def places(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bad")
    found = {name: folder / name for name in ("run", "gone", "empty", "full")}
    shutil.copytree(smoke_run, found["run"])
    found["empty"].mkdir()
    found["full"].mkdir()
    (found["full"] / "notes.txt").write_text("mine")
    texts = {"file": "word word", "broken": "a: [", "list": "- 1", "blank": "  \n", "module": "x = 1\n"}
    for name, text in texts.items():
        found[name] = folder / (f"{name}.py" if name == "module" else f"{name}.txt")
        found[name].write_text(text)
    found["short"] = folder / "short.json"
    found["short"].write_text(json.dumps({"a": [True]}))
    found["nobody"] = folder / "nobody.json"
    found["nobody"].write_text(json.dumps({"nobody": [False] * 200}))
    found["integers"] = folder / "integers.npz"
    np.savez(found["integers"], a=np.ones(200, dtype=np.int64))
    return found


def said_by(words: list[str]) -> tuple[int, str]:
    """Exit code and sentence, as the entry point gives them."""
    result = CliRunner().invoke(app, words)
    error = result.exception
    if error is None or isinstance(error, SystemExit):
        return result.exit_code, " ".join(result.output.split())
    assert isinstance(error, (ValueError, OSError)), f"{type(error).__name__}: {error}"
    return 1, explain(error)


@pytest.mark.parametrize(("command", "code", "sentence"), TABLE, ids=[row[0] for row in TABLE])
def test_bad_input_is_a_sentence(
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    code: int,
    sentence: str,
) -> None:
    new = tmp_path / "new"
    monkeypatch.chdir(places["empty"].parent)
    words = command.split()
    for name, path in {**places, "new": new}.items():
        words = [word.replace(f"{{{name}}}", str(path)) for word in words]
    given, said = said_by(words)
    assert given == code, said
    assert re.search(sentence, said.replace("│ ", "").replace(" │", "")), said
    assert "Traceback" not in said
    if code == 1:
        assert said.count("\n") == 0
        assert len(said) < 600
    assert not (new / "config.yaml").exists()


#: Rows of ``run`` that hold for ``plan`` too: those about settings, which plan takes in the same words.
PLANNED = [
    (command.replace("run", "plan", 1), code, sentence)
    for command, code, sentence in TABLE
    if re.match(r"run smoke --(set|task|device|seed) \S+$", command)
]


@pytest.mark.parametrize(("command", "code", "sentence"), PLANNED, ids=[row[0] for row in PLANNED])
def test_plan_refuses_what_run_refuses(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, command: str, code: int, sentence: str
) -> None:
    monkeypatch.chdir(places["empty"].parent)
    for name, path in places.items():
        command = command.replace(f"{{{name}}}", str(path))
    given, said = said_by(command.split())
    assert given == code, said
    assert re.search(sentence, said.replace("│ ", "").replace(" │", "")), said


def test_the_table_covers_the_verbs_of_a_run() -> None:
    assert len(TABLE) >= 60
    named = {row[0].split()[0] for row in TABLE}
    assert named >= {name for name, verb in VERBS.items() if verb.panel != "Studies"} | {
        "blocking",
        "selftest",
    }


def test_cuda_is_refused_where_there_is_none(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    code, said = said_by(["run", "smoke", "--device", "cuda", "--out", str(tmp_path / "run")])
    assert code == 1
    assert "none is here; use --device cpu" in said
