"""The Python example of the README runs as it stands and prints a decomposition that adds up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)
    totals = scope["seen"].allocation.totals()  # type: ignore[attr-defined]
    parts = totals["attributed"] + totals["residual"] + totals["quadrature_error"]
    assert parts == pytest.approx(totals["exact"], abs=1e-6)
    assert totals["exact"] < -1.0
    assert "wraps" in capsys.readouterr().out


def test_it_is_two_screens_with_a_picture_that_is_there() -> None:
    place = Path(__file__).parent.parent
    text = (place / "README.md").read_text()
    assert len(text.split()) <= 700
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert any(link.endswith(".png") for link in links)
    for link in links:
        assert link.startswith("https://") or (place / link).exists(), link


def test_the_two_commands_come_first() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    first = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)[0]
    assert [line.split("#")[0].strip() for line in first.strip().splitlines()] == ["make demo", "make test"]
