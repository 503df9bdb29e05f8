"""The newcomer's notebook runs from top to bottom, cell by cell, and its numbers add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK, FINISHED = DOCS / "quickstart.ipynb", DOCS / "finished-run.ipynb"


def ran(notebook: Path) -> dict[str, object]:
    """Names after every code cell of a notebook has run."""
    names: dict[str, object] = {}
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    return names


def test_a_finished_run_is_opened_mapped_ablated_and_tested(smoke_run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLCA_EDIT_RUN", str(smoke_run))
    names = ran(FINISHED)
    # The map is the run's own: what its damage stage wrote for the same vectors.
    rows = json.loads((smoke_run / "summary.json").read_text())["analyses"]["trajectory"]["damage"]
    for row in rows:
        alone = row["cluster"] is None and row["split"] == "select" and row["dose"] == 1.0
        if alone and row["operator"] == "project_out":
            here = names["damage"][f"trajectory v{row['vector']}"]
            assert here == pytest.approx({skill: row["groups"][skill] for skill in here}, abs=1e-4)
    assert len(names["figure"].axes) >= 1
    assert names["axis"].basis.supervised
    assert [row.name for row in names["table"].rows] == ["axis | 1000s"]
    assert names["table"].rows[0].word in {"inert", "shared", "selective", "carrier", "unclear"}


def test_the_finished_run_is_committed_with_its_outputs():
    cells = [cell for cell in json.loads(FINISHED.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells)
    assert any("image/png" in out.get("data", {}) for cell in cells for out in cell["outputs"])


def test_the_quickstart_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    names = ran(NOTEBOOK)
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
