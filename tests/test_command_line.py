"""The command line as a place to work: help, completion, JSON, next commands, settings that stay."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import stamps
from typer.testing import CliRunner, Result

from experiments import application
from experiments.application import explain, run_application, say
from experiments.cli import STUDIES, VERBS, Verb, app
from experiments.verbs import records
from experiments.verbs.pipeline import default_out
from experiments.verbs.signature import signature_alone

EVERY = {**{(name,): verb for name, verb in VERBS.items()}, **{("study", n): v for n, v in STUDIES.items()}}


def called(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help_is_light_fits_80_columns_and_ends_with_examples(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    verb = EVERY[words]
    long, short = called(*words, "--help"), called(*words, "-h")
    assert (long.exit_code, long.output) == (0, short.output)
    assert max(len(line) for line in long.output.splitlines()) <= 80
    last = " ".join(long.output.split())[-400:]
    assert all(" ".join(example.split())[-40:] in last for example in verb.examples[-1:])
    assert all(example.startswith(f"polca-edit {' '.join(words)}") for example in verb.examples)


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_every_verb_has_json_and_shared_options_mean_the_same(words: tuple[str, ...]) -> None:
    given = {option: p for p in EVERY[words].command().params for option in p.opts}
    assert given["--json"].metavar == "FILE|-"
    assert given["--json"].help.startswith("The result as JSON, to FILE")
    same = {"--basis": "Basis by name", "--dry-run": "Check everything", "--set": "Override a config key"}
    same |= {"--redo": "Run a stage again", "--device": "cpu or cuda", "--seed": "Seed"}
    if words != ("remove",):  # where a window may be undone instead, and repeats
        same["--window"] = "Only the movement of these training steps"
    #: Where a basis is one span to look in, or may be none.
    other = words in {("validate",), ("remove",), ("study", "blocking"), ("study", "heads")}
    for option, start in same.items():
        if option in given and not (option == "--basis" and other):
            assert given[option].help.startswith(start), option
    if "--basis" in given and not other:
        assert given["--basis"].multiple


def test_the_shipped_light_verbs_need_no_heavy_import() -> None:
    for name in ("demo", "run", "plan", "inspect", "report", "test", "discover", "axis", "clean"):
        module, _, attribute = VERBS[name].function.partition(":")
        assert signature_alone(f"experiments.{module}", attribute) is not None, name


def test_version_and_completion() -> None:
    assert called("--version").output.startswith("polca-edit ")
    asked = {"_POLCA_EDIT_COMPLETE": "complete_bash", "COMP_WORDS": "polca-edit test --ba", "COMP_CWORD": "2"}
    code = "import sys; sys.argv[0] = 'polca-edit'; from experiments.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["--basis"]


def test_json_has_the_output_alone_and_the_reader_is_told_beside_it(smoke_run: Path, tmp_path: Path) -> None:
    before = stamps(smoke_run)
    result = called("inspect", smoke_run, "--json", "-")
    assert json.loads(result.stdout)["task"] == "arithmetic"
    assert f"next: polca-edit test {smoke_run}" in result.stderr
    result = called("inspect", smoke_run, "--json", tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text())["task"] == "arithmetic"
    assert stamps(smoke_run) == before


def test_a_dry_run_says_what_is_kept_and_what_would_run_and_writes_nothing(smoke_copy: Path) -> None:
    before = stamps(smoke_copy)
    result = called("run", "smoke", "--out", smoke_copy, "--dry-run", "--json", "-")
    told = json.loads(result.stdout)
    assert told["would_run"] == []
    assert {"train", "basis:hessian", "evaluate"} <= set(told["kept"])
    words = ["run", "smoke", "--out", smoke_copy, "--dry-run", "--json", "-"]
    again = json.loads(called(*words, "--redo", "clusters:hessian").stdout)
    assert again["would_run"] == ["clusters:hessian"]
    (smoke_copy / "damage" / "hessian.json").unlink()
    assert json.loads(called(*words).stdout)["would_run"] == ["damage:hessian"]
    changed = called(*words, "--set", "clusters.selection=leaf", "--redo", "changed")
    todo = json.loads(changed.stdout)["would_run"]
    assert "clusters:hessian" in todo
    assert "train" not in todo
    (smoke_copy / "damage" / "hessian.json").touch()
    assert before.keys() == stamps(smoke_copy).keys()


DRY = [
    "run smoke --set threads=1 --out {run}",
    "test {run} --unseen 0",
    "discover {run} --unseen 0",
    "axis {run} --target 10s --unseen 0",
    "remove {run} --skill 10s",
    "clean {run}",
]


@pytest.mark.parametrize("command", DRY)
def test_a_dry_run_speaks_json_names_itself_as_next_and_writes_nothing(
    smoke_copy: Path, command: str
) -> None:
    before = {name for name in stamps(smoke_copy) if not name.endswith(".lock")}
    words = command.format(run=smoke_copy).split()
    result = called(*words, "--dry-run", "--json", "-")
    assert result.exit_code == 0, result.exception
    told = json.loads(result.stdout)
    assert {"dry_run", "would_run", "deleted"} & set(told)
    assert result.stderr.rstrip().endswith(f"next: polca-edit {' '.join(words)}")
    assert {name for name in stamps(smoke_copy) if not name.endswith(".lock")} == before


@pytest.mark.parametrize("command", ["inspect {run} --json {there}", "demo --dry-run --json {there}"])
def test_a_place_for_json_is_checked_before_the_work(smoke_run: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "file.txt").write_text("mine")
    for there, said in ((tmp_path, "is a folder"), (tmp_path / "file.txt" / "x.json", "is a file")):
        result = called(*command.format(run=smoke_run, there=there).split())
        assert said in explain(result.exception)
        assert not (tmp_path / "runs").exists()


def test_a_refused_value_is_named_with_what_to_do(smoke_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for words, value in (("--rotations", "3"), ("--seed", "x"), ("--draws", "1e9")):
        result = called("test", smoke_run, words, value)
        assert result.exit_code == 2
        assert f"got '{value}'; give another" in result.output


def test_another_seed_is_refused_and_nothing_is_touched(smoke_copy: Path) -> None:
    before = stamps(smoke_copy)
    result = called("run", "smoke", "--seed", "3", "--out", smoke_copy)
    assert "holds a run with seed 0, got 3" in explain(result.exception)
    assert stamps(smoke_copy) == before


def test_settings_of_the_machine_may_change(smoke_copy: Path) -> None:
    result = called("run", "smoke", "--set", "threads=2", "--out", smoke_copy, "--dry-run")
    assert result.exit_code == 0, result.exception


def test_another_seed_gets_a_directory_of_its_own() -> None:
    assert default_out("demo", None, 3) == Path("runs/demo-3")
    assert default_out("demo", None, 0) == default_out("demo") == Path("runs/demo")
    assert default_out("mine.yaml", None, 2) == Path("runs/mine-2")


READERS = [
    "test {run}",
    "discover {run}",
    "axis {run} --target 10s",
    "remove {run} --skill 10s",
    "label {run}",
    "report {run}",
    "inspect {run}",
    "clean {run}",
    "study blocking {run} --target 10s",
]


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("sealed", [True, False])
def test_a_config_edited_by_hand_is_caught_by_every_verb(
    smoke_copy: Path, command: str, sealed: bool
) -> None:
    if sealed:
        from experiments.run.store import RunDirectory
        from experiments.verbs.guard import seal

        seal(RunDirectory(smoke_copy))
    config = smoke_copy / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 1"))
    before = stamps(smoke_copy)
    result = called(*command.format(run=smoke_copy).split())
    assert isinstance(result.exception, ValueError), result.output
    assert "config.yaml' is not what" in explain(result.exception)
    ours = {name: time for name, time in stamps(smoke_copy).items() if not name.endswith(".lock")}
    assert ours == {name: time for name, time in before.items() if not name.endswith(".lock")}


def test_test_does_not_write_into_another_run(smoke_run: Path, smoke_copy: Path) -> None:
    plan = (smoke_copy / "plan.json").read_bytes()
    result = called("test", smoke_run, "--out", smoke_copy)
    assert "is a run and keeps its own result" in explain(result.exception)
    assert (smoke_copy / "plan.json").read_bytes() == plan
    assert not (smoke_copy / "verdicts.json").exists()


def test_a_run_agrees_with_its_copy_on_every_skill_that_is_judged(smoke_run: Path, smoke_copy: Path) -> None:
    told = json.loads(called("compare", smoke_run, smoke_copy, "--json", "-").stdout)
    judged = [pair for pair in told["skills"] if pair["first"] is not None]
    assert 0 < len(judged) < len(told["skills"]), "one skill of the smoke run is judged in neither"
    said = called("compare", smoke_run, smoke_copy).output
    assert f"differ in 0 settings. They agree on {len(judged)} of {len(judged)} skills" in said


def test_clean_frees_leftovers_and_asks_before_weights(smoke_copy: Path) -> None:
    (smoke_copy / "basis" / "hessian.parts").mkdir()
    (smoke_copy / "basis" / "hessian.parts" / "row.npy").write_bytes(b"x" * 1000)
    (smoke_copy / ".summary.json.part").write_bytes(b"x" * 500)
    told = json.loads(called("clean", smoke_copy, "--dry-run", "--json", "-").stdout)
    assert (told["bytes"], told["deleted"]) == (1500, False)
    assert (smoke_copy / "basis" / "hessian.parts").exists()
    assert called("clean", smoke_copy).exit_code == 0
    assert not (smoke_copy / "basis" / "hessian.parts").exists()
    assert list((smoke_copy / "checkpoints").glob("*.safetensors"))
    matrix = smoke_copy / "damage" / "matrix"
    matrix.mkdir(exist_ok=True)
    (matrix / "block.safetensors").write_bytes(b"x")
    assert called("clean", smoke_copy, "--damage").exit_code == 0
    assert not list(matrix.iterdir())
    freed = called("clean", smoke_copy, "--checkpoints")
    assert "next: polca-edit run" in freed.output
    assert not list((smoke_copy / "checkpoints").glob("*.safetensors"))
    assert called("inspect", smoke_copy).exit_code == 0


def test_brackets_in_paths_are_text(
    smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "a [bold]b[/bold] [/nothing] :smile:"
    shutil.copytree(smoke_run, odd)
    result = called("inspect", odd)
    assert result.exit_code == 0, result.exception
    assert "[bold]b[/bold] [/nothing] :smile:" in result.output
    say(f"{odd}")
    assert "[/nothing]" in capsys.readouterr().out


def test_ctrl_c_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(directory: Path, json_: str | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(records, "inspect", stopped)
    monkeypatch.setattr(sys, "argv", ["polca-edit", "inspect", "my run"])
    with pytest.raises(SystemExit) as ended:
        run_application(app)
    assert ended.value.code == 130
    assert "go on with: polca-edit inspect 'my run'" in capsys.readouterr().err


def test_every_verb_names_the_next_one() -> None:
    """By itself where paths are known (a call of ``then``), else in its line of the table."""
    for words, verb in EVERY.items():
        module = verb.function.partition(":")[0].replace(".", "/")
        source = (Path(application.__file__).parent / f"{module}.py").read_text()
        assert verb.next or "then(" in source, words
    assert isinstance(next(iter(EVERY.values())), Verb)


def test_folders_of_the_same_names_beside_the_command_are_not_taken(tmp_path: Path) -> None:
    """The command finds its own packages; a script finds the folder beside it, unless it is run with -P."""
    for name in ("experiments", "interventions"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = True\n")
    (tmp_path / "script.py").write_text(
        "import interventions, polca_edit\nprint(hasattr(interventions, 'MINE'))\n"
    )
    root = str(Path(application.__file__).parents[1])

    def said(*words: str) -> str:
        made = {**os.environ, "PYTHONPATH": root}
        command = [sys.executable, *words]
        return subprocess.run(
            command, cwd=tmp_path, env=made, capture_output=True, text=True, timeout=120
        ).stdout

    start = "import sys; sys.argv[1:] = ['--version']; from experiments.cli import main; main()"
    assert said("-P", "-c", start).startswith("polca-edit ")  # as a console script: no current folder
    assert said("script.py") == "True\n"
    assert said("-P", "script.py") == "False\n"
