"""Bad input over all verbs: the table of commands, exit codes and sentences, and the page made from it.

``python -m tests.bad_inputs --markdown docs/results/bad-inputs.md`` runs every row in a fresh place and
writes what was said; ``test_bad_inputs.py`` holds the rows. A row that says something else ends it with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from experiments.application import explain
from experiments.cli import app

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
    ("run smoke --set 'bases=[{kind: hessian}, {kind: hessian}]'", 1, "every basis needs its own name"),
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
    ("run smoke --set 'bases=[{kind: nope}]'", 1, "bases.0.kind: .*'hessian'.* got 'nope'"),
    ("run smoke --set 'bases=[{kind: trajectory, vectors: 99}]'", 1, "at most 10 vectors from 11 check"),
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
    ("open {empty} --text {file} --step-pattern '('", 1, "empty"),
    ("report", 2, "Missing argument"),
    ("report {gone}", 1, "must be a run directory"),
    ("inspect {gone}", 1, "summary.json|run directory"),
    ("label {gone}", 1, "must be a run directory"),
    ("test {gone}", 1, "must be a run directory"),
    ("test {run} --basis nope", 1, "--basis must be one of"),
    ("test {run} --window a:b", 1, "two steps START:END, got 'a:b'"),
    ("test {run} --window 7:30 --unseen 0", 1, "recorded steps, .7. are not; the nearest are .6."),
    ("test {run} --draws 3", 1, "random_draws must be at least 19"),
    ("test {run} --rotations 2", 2, "Invalid value for '--rotations'"),
    ("test {run} {gone}", 1, "needs a folder of its own; pass --out"),
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
    ("study blocking {run} --target 10s --begin never", 1, "--begin must be one of start"),
    ("remove {run}", 1, "give either --skill NAME or --cluster"),
    ("remove {run} --skill 10s --cluster hessian:0:0", 1, "give either --skill NAME or --cluster"),
    ("remove {run} --skill 10s --budget huge", 1, "--budget must be one of"),
    ("remove {run} --skill nope", 1, "a skill must be one this run labels, got 'nope'"),
    ("remove {run} --cluster hessian", 1, "--cluster needs BASIS:VECTOR:CLUSTER"),
    ("remove {run} --cluster 'found 999'", 1, "--cluster must be one of"),
    ("remove {run} --cluster hessian:99:0", 1, "does not exist in this run"),
    ("remove {run} --skill 10s --basis hessian --window 6:30", 1, "both say where to search"),
    ("remove {run} --skill 10s --target 2", 2, "Invalid value for '--target'"),
    ("remove {run} --skill 10s --kl inf", 2, "must be a finite number, got inf"),
    ("apply {file} {file} --out {new} --dose nan", 2, "must be a finite number, got nan|Invalid value for"),
    ("apply {gone}.json {file} --out {new}", 1, "gone"),
    ("apply {file} {file} --out {new}", 1, "edit|record|cannot be read|must"),
    ("demo-table {gone}", 1, "gone"),
    ("selftest --break nope", 1, "--break must be one of"),
    # what another version of the command line took without a word
    ("run smoke --set =3", 1, "--set needs KEY=VALUE, got '=3'"),
    ("run smoke --set training.steps=[", 1, "--set needs a value as YAML has it"),
    ("run smoke --set bases=[]", 1, "a run needs a basis, 'bases' is empty"),
    ("run smoke --layers 99 --out {new}", 1, "must match at least one parameter, got .*99"),
    ("run smoke --layers 5-3", 1, "--layers must be numbers or ranges"),
    ("run smoke --parameters nothing --out {new} --dry-run", 1, "must match at least one parameter"),
    ("run smoke --memory nan", 1, "--memory must be a size such as 16GB or 800MB, got 'nan'"),
    ("run smoke --text {file} --out {new}", 1, "task 'arithmetic' does not, got"),
    ("run smoke --address here:1 --out {new}", 1, "--address is for --engine ray"),
    ("run smoke --checkpoints ''", 1, "--checkpoints must not be empty"),
    ("run smoke --out=", 1, "--out must not be empty"),
    ("run ''", 1, "an argument must not be empty"),
    ("run smoke --out {file}/new --dry-run", 1, "cannot be made, '.*file.txt' is a file"),
    ("run smoke --json {empty} --out {new}", 1, "--json must be a file or -"),
    ("run smoke --json {file}/x.json --out {new}", 1, "--json .* cannot be made, '.*file.txt' is a file"),
    ("run {tag}", 1, "must be valid YAML, it is not .line 1, could not determine a constructor"),
    ("run {twice}", 1, "must be valid YAML, it is not .line 2, key 'seed' stands twice.; correct it"),
    ("run smoke --set seed=true", 1, "seed: must be a number, got true; write digits"),
    ("run {binary}", 1, "must be a YAML file in UTF-8"),
    ("run {empty}", 1, "a config must be a file or one of"),
    ("run --task {syntax}:build --out {new}", 1, "syntax.py' must be Python, it is not"),
    ("run --task {raises}:build --out {new}", 1, "raises.py', line 2: build.. failed with KeyError"),
    ("run '[/bold] :smile:'", 1, "got '.*bold. :smile:'"),
    ("run smoke --seed '[red]3'", 2, "got '.red.3'; give another"),
    ("plan smoke --layers 99", 1, "must match at least one parameter"),
    ("plan smoke --text {file}", 1, "task 'arithmetic' does not, got"),
    ("plan smoke --memory -3GB", 1, "--memory must be a size"),
    ("plan --task {raises}:build", 1, "failed with KeyError"),
    ("open {run}/checkpoints --text {file}", 1, "is a recording of weights alone"),
    ("doctor {file}", 1, "file.txt"),
    ("doctor {run}/checkpoints --preset nope", 1, "a config must be a file or one of"),
    ("doctor {run}/checkpoints --base {gone}", 1, "--base must exist"),
    ("inspect {run} --json {empty}", 1, "--json must be a file or -"),
    ("inspect '[bold]x[/nothing]'", 1, "'.bold.x./nothing.' must hold a finished run"),
    ("inspect {cut}", 1, "(cut|CUT)/tokens.parquet' must be a parquet file, it is not"),
    ("report {none}", 1, "must hold the analysis of a basis, summary.json has none"),
    ("compare {run} {run}", 1, "compare needs two runs"),
    ("test {run} --seed 99999999999999999999", 2, "got '99999999999999999999'; give another"),
    ("test {run} --rotations 100000000", 2, "less than or equal to 10000, got '100000000'"),
    ("test {run} --draws 1000000000", 2, "less than or equal to 100000, got '1000000000'"),
    ("test {run} --workers 0", 2, "greater than or equal to 1, got '0'"),
    ("test {run} --out ''", 1, "--out must not be empty"),
    ("test {run} {run} --out {new}", 1, "runs of a study must be different ones"),
    ("test {run} --groups {all}", 1, "some of the 200 select tokens and leave some out, it holds every one"),
    ("test {run} --groups {taken}", 1, "group '10s' is a label of this run already"),
    ("test {run} --window=-6:12", 1, "two steps START:END, got '-6:12'"),
    ("discover {run} --window 1:59 --dry-run", 1, "must start and end at recorded steps"),
    ("discover {run} --nulls 100000000 --dry-run", 2, "less than or equal to 10000"),
    ("axis {run} --target nope --dry-run", 1, "--target must be one of"),
    ("axis {run} --target 'found 99' --dry-run", 1, "--target must be one of"),
    ("axis {run} --target 10s --rank 99", 1, "rank must be 1 to 4, got 99"),
    ("axis {run} --target 10s --refine 1000000000", 2, "less than or equal to 100000"),
    ("axis {run} --target 10s --window 7:9 --dry-run", 1, "must start and end at recorded steps"),
    ("axis {run} --target 10s --basis nope", 1, "--basis must be one of"),
    ("remove {run} --skill 10s --basis nope", 1, "--basis must be one of"),
    ("remove {run} --cluster nope:0:0", 1, "the basis of --cluster must be one of"),
    ("remove {run} --cluster hessian:0:-1", 1, "--cluster needs BASIS:VECTOR:CLUSTER"),
    ("remove {run} --skill 10s --method nope", 1, "--method must be one of"),
    ("remove {run} --skill '[x]'", 1, "a skill must be one this run labels, got '.x.'"),
    ("apply {edit} {empty} --out {new}", 1, "edit.json' must have schema polca-edit/edit/1, got None"),
    ("apply {edit} {empty} --out {new} --lora 0", 2, "greater than or equal to 1, got '0'"),
    ("label {run} --transfer {gone}", 1, "labels carry over for runs on a text"),
    ("label {run} --sequences 1", 2, "greater than or equal to 4, got '1'"),
    ("clean {file}", 1, "must be a run directory"),
    ("report {empty}", 1, "must be a run directory"),
    ("selftest --bed T99", 1, "--bed must be one of"),
    ("study blocking {run} --target nope", 1, "--target must be one of"),
    ("study blocking {run} --target 10s --basis nope", 1, "--basis must be one of"),
    ("study reproduce --preset smoke --bases nope", 1, "--bases must be some of"),
    ("study discovery {run}", 1, "has no axes, they are gathered here"),
    ("study causal {run}", 1, "must have been tested"),
    ("study demo-table {run} {run}", 1, "runs of a study must be different ones"),
    ("study errors {run} --draws 1", 2, "greater than or equal to 4, got '1'"),
    ("study groupings {gone}", 1, "must be a run directory"),
    ("study grokking --branch 2000 --limit 100", 1, "--limit must lie after --branch 2000, got 100"),
    ("study removal --preset smoke --repair x", 1, "--repair needs whole numbers"),
    ("study removal --preset smoke --skills nope", 1, "a skill must be one of"),
    ("study remove-skill --preset smoke --json {new} --skills nope", 1, "'nope' is not one of"),
    ("study paper-scale --device tpu --out {new}", 1, "device must be 'cpu' or 'cuda', got 'tpu'"),
    ("study robustness --preset nope", 1, "a config must be a file or one of"),
    ("study carry-signal --vectors 1", 2, "greater than or equal to 2, got '1'"),
    ("study english --text {gone} --out {new}", 1, "a text must exist"),
    ("nope", 2, "No such command"),
]


#: Places of the table, as the page shows them.
SHOWN = {
    "run": "RUN",
    "gone": "GONE",
    "empty": "EMPTY",
    "full": "FOLDER",
    "new": "NEW",
    "cut": "CUT",
    "none": "NONE",
}


def make_places(run: Path, folder: Path) -> dict[str, Path]:
    """Everything that the table names in braces, except ``new``.

    Args:
        run: a finished smoke run, which is copied.
        folder: where they go.
    """
    found = {name: folder / name for name in ("run", "gone", "empty", "full")}
    shutil.copytree(run, found["run"])
    found["empty"].mkdir()
    found["full"].mkdir()
    (found["full"] / "notes.txt").write_text("mine")
    texts = {
        "file.txt": "word word",
        "broken.txt": "a: [",
        "list.txt": "- 1",
        "blank.txt": "  \n",
        "tag.yaml": "seed: !!python/object/apply:os.system ['ls']\n",
        "twice.yaml": "seed: 1\nseed: 2\n",
        "module.py": "x = 1\n",
        "syntax.py": "def build(:\n",
        "raises.py": "def build(seed=0):\n    return {}['nothing']\n",
        "edit.json": "{}",
        "short.json": json.dumps({"a": [True]}),
        "nobody.json": json.dumps({"nobody": [False] * 200}),
        "all.json": json.dumps({"all": [True] * 200}),
        "taken.json": json.dumps({"10s": [True] * 100 + [False] * 100}),
    }
    for name, text in texts.items():
        found[name.partition(".")[0]] = folder / name
        (folder / name).write_text(text)
    for name in ("cut", "none"):  # damaged runs
        found[name] = folder / name
        shutil.copytree(run, found[name])
        (found[name] / "seal.json").unlink(missing_ok=True)
    (found["cut"] / "tokens.parquet").write_text("cut")
    summary = json.loads((found["none"] / "summary.json").read_text())
    (found["none"] / "summary.json").write_text(json.dumps({**summary, "analyses": {}}))
    (folder / "edit.safetensors").write_bytes(bytes(20))
    found["binary"] = folder / "binary.yaml"
    found["binary"].write_bytes(bytes(range(256)))
    found["integers"] = folder / "integers.npz"
    np.savez(found["integers"], a=np.ones(200, dtype=np.int64))
    return found


def filled(command: str, places: Mapping[str, Path]) -> list[str]:
    """The words of a row's command, with paths for the names in braces."""
    words = shlex.split(command)
    for name, path in places.items():
        words = [word.replace(f"{{{name}}}", str(path)) for word in words]
    return words


def said_by(words: list[str]) -> tuple[int, str]:
    """Exit code and sentence, as the entry point gives them."""
    result = CliRunner().invoke(app, words)
    error = result.exception
    if error is None or isinstance(error, SystemExit):
        return result.exit_code, " ".join(re.sub("[╭╮╰╯─│]", " ", result.output).split())
    assert isinstance(error, (ValueError, OSError)), f"{type(error).__name__}: {error}"
    return 1, explain(error)


# -- the page -----------------------------------------------------------------------------------------


def shown(text: str, places: Mapping[str, Path]) -> str:
    """Text with the places' names instead of paths of this machine."""
    named = sorted(places.items(), key=lambda item: len(str(item[1])), reverse=True)
    for name, path in named:
        text = text.replace(str(path), SHOWN.get(name, path.name))
    return text


def page(rows: list[tuple[str, int, str]]) -> str:
    """The table as a page of the documentation."""
    lines = [
        "# Bad input",
        "",
        f"{len(rows)} commands that cannot be right, each with its exit code and its sentence (`RUN` "
        "is a finished run of preset `smoke`, `GONE` does not exist, `FOLDER` holds other files, `CUT` and "
        "`NONE` are damaged runs). A fault in what was asked ends with 1, a word or value that the command "
        "line cannot read with 2; nothing is written.",
        "",
        "Made by `python -m tests.bad_inputs --markdown docs/results/bad-inputs.md`; "
        "`tests/test_bad_inputs.py` holds every row.",
        "",
        "| `polca-edit` | exit | says |",
        "| --- | --- | --- |",
    ]
    for command, code, sentence in rows:
        # A table takes code with a bar in it only where the bar is escaped.
        cells = (f"`{command}`".replace("|", "\\|"), str(code), _plain(sentence))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _plain(sentence: str) -> str:
    """Text in which nothing is Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", sentence)


def measured(folder: Path) -> tuple[list[tuple[str, int, str]], list[str]]:
    """Every row as it is now, and the commands that said something else than the table has."""
    done = CliRunner().invoke(app, ["run", "smoke", "--set", "threads=1", "--out", str(folder / "smoke")])
    if done.exit_code:
        raise RuntimeError(f"the smoke run failed: {done.exception!r}")
    places = make_places(folder / "smoke", folder)
    os.chdir(folder)
    rows, wrong = [], []
    for number, (command, code, sentence) in enumerate(TABLE):
        here = {**places, "new": folder / f"new-{number}"}
        given, said = said_by(filled(command, here))
        if given != code or not re.search(sentence, said):
            wrong.append(f"{command}: exit {given}: {said}")
        usage = r"^Usage: .*? Try '.*?' for help\. Error "
        words = shown(shlex.join(filled(command, here)), here)
        rows.append((words, given, shown(re.sub(usage, "", said), here)))
    return rows, wrong


def main() -> int:
    """Write the page; 1 where a row is not what the table says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path, required=True, help="page to write")
    target = parser.parse_args().markdown.absolute()
    os.environ["COLUMNS"] = "400"  # a sentence in a box stays on one line
    with tempfile.TemporaryDirectory() as folder:
        rows, wrong = measured(Path(folder))
    target.write_text(page(rows), encoding="utf-8")
    print(f"{len(rows)} rows in {target.name}, {len(wrong)} not as the table says")
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
