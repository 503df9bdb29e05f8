"""Bad input over all verbs: exit code 1 (2 for a wrong option), one sentence with rule, value and remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from bad_inputs import TABLE, filled, make_places, said_by

from experiments.cli import VERBS


@pytest.fixture(scope="module")
def places(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_places(smoke_run, tmp_path_factory.mktemp("bad"))


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
    given, said = said_by(filled(command, {**places, "new": new}))
    assert given == code, said
    assert re.search(sentence, said), said
    assert "Traceback" not in said
    if code == 1:
        assert said.count("\n") == 0
        assert len(said) < 600
    assert not (new / "config.yaml").exists()


#: Rows of ``run`` that hold for ``plan`` too: those about settings, which plan takes in the same words.
PLANNED = [
    (command.replace("run", "plan", 1), code, sentence)
    for command, code, sentence in TABLE
    if re.match(r"run smoke --(set|task|device|seed) (\S+|'[^']*')$", command)
]


@pytest.mark.parametrize(("command", "code", "sentence"), PLANNED, ids=[row[0] for row in PLANNED])
def test_plan_refuses_what_run_refuses(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, command: str, code: int, sentence: str
) -> None:
    monkeypatch.chdir(places["empty"].parent)
    given, said = said_by(filled(command, places))
    assert given == code, said
    assert re.search(sentence, said), said


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


def test_the_page_has_every_row() -> None:
    """The page is what `python -m tests.bad_inputs --markdown FILE` wrote from this table."""
    text = (Path(__file__).parents[1] / "docs" / "results" / "bad-inputs.md").read_text()
    lines = re.findall(r"^\| `(.*)` \| (\d) \| (.*) \|$", text, flags=re.MULTILINE)
    assert len(lines) == len(TABLE)
    for (_, code, sentence), (_, given, said) in zip(TABLE, lines, strict=True):
        assert int(given) == code
        assert re.search(sentence.replace("gone|", "GONE|"), re.sub(r"\\(.)", r"\1", said), re.IGNORECASE), (
            said
        )
