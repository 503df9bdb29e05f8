"""Ways of grouping tokens: some of them by name, and none that does not fit into memory."""

from __future__ import annotations

import pytest

from experiments.run.run import load_run
from experiments.study import groupings


def test_some_ways_by_name_and_gradients_only_where_they_fit(smoke_run, monkeypatch, capsys):
    run = load_run(smoke_run, say=lambda _: None)
    losses = groupings.grouping_rows(run, ["exact loss"])
    assert [row.way for row in losses] == ["exact loss", "exact loss, paper's settings"]
    (gradients,) = groupings.grouping_rows(run, ["gradients"])
    assert gradients.outliers == 0.0  # spectral clustering leaves no token out
    assert all(0 < found.f1 <= 1 for found in gradients.skills.values())
    monkeypatch.setattr(groupings, "GRADIENT_BYTES", 0)
    with pytest.raises(ValueError, match=r"must fit into memory, \['gradients'\] does not"):
        groupings.grouping_rows(run, ["gradients"])
    assert "token gradients are left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--only must begin the name of a way, .* got \['gardients'\]"):
        groupings.grouping_rows(run, ["gardients"])


def test_a_way_reads_no_projections_that_it_does_not_use(smoke_copy):
    run = load_run(smoke_copy, say=lambda _: None)
    run.directory.projections("trajectory").unlink()
    (row,) = groupings.grouping_rows(run, ["undoing hessian+trajectory"])
    assert row.seed == run.config.seed
    with pytest.raises(ValueError, match="must be a readable record"):
        groupings.grouping_rows(run, ["POLCA trajectory"])
