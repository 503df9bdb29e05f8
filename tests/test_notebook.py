"""The newcomer's notebook runs from top to bottom, cell by cell, and its numbers add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"


def test_the_quickstart_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    totals = names["totals"]
    assert totals["exact"] < -0.5
    parts = totals["attributed"] + totals["residual"] + totals["quadrature_error"]
    assert parts == pytest.approx(totals["exact"], abs=1e-5)
    assert names["share"] > 0.5
    assert max(max(groups.values()) for groups in names["damage"].values()) > 0.1
    said = capsys.readouterr().out
    assert "explained share" in said
    assert "vector 0" in said
    words = {row.word for row in names["table"].rows}
    assert words <= {"inert", "shared", "selective", "carrier", "unclear"}
    assert len(names["table"].rows) == len(names["found"].hypotheses()) - len(names["table"].untested) > 0


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")
