"""Windows of training: every basis kind and verb takes them; nothing of the rest of training gets in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments.cli import app
from experiments.config import load_config
from experiments.discover.stages import load_found, load_timeline, run_signatures, run_timeline
from experiments.run.driver import run_stages
from experiments.run.keys import discovery_stages, stage_names
from experiments.run.run import Run, load_run, open_run
from experiments.run.stages.damage import evaluated
from experiments.verdicts.choose import choose
from polca_edit.allocation.allocate import Projections, allocate
from polca_edit.allocation.terms import project_for, projections_within
from polca_edit.artifacts import load_record
from polca_edit.basis.record import Basis
from polca_edit.clusters.density import cluster_trajectories
from polca_edit.clusters.names import name_group

WINDOW = (12, 36)
TINY = {
    "threads": 1,
    "training.steps": 48,
    "arithmetic.select_sums": 30,
    "arithmetic.curvature_sums": 20,
    "arithmetic.evaluate_sums": 20,
    "bases": [
        {"kind": "hessian", "vectors": 2, "max_products": 8},
        {"kind": "trajectory", "vectors": 3},
        {"kind": "trajectory_secant", "vectors": 2},
        {"kind": "trajectory", "vectors": 2, "steps": [0, 12, 24], "name": "early"},
    ],
    "damage.doses": [],
    "damage.random_draws": 0,
    "discover.edits": 6,
    "discover.windows": 3,
}


def quiet(_: str) -> None:
    """Swallow progress lines."""


def observed(out: Path, **more: object) -> Run:
    """A tiny run up to its projections."""
    run = open_run(load_config("smoke", {**TINY, **more}), out, quiet)
    wanted = ("train", "basis", "projections")
    run_stages(run, stages=[s for s in stage_names(run.config) if s.partition(":")[0] in wanted])
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return observed(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Run:
    bases = [{**basis, "steps": [12, 24, 36]} if "steps" in basis else basis for basis in TINY["bases"]]
    return observed(tmp_path_factory.mktemp("cut") / "run", window="12:36", bases=bases)


def outside(rows: torch.Tensor, run: Run, steps: list[int]) -> float:
    """Largest part of a unit row outside the span of the displacements between checkpoints."""
    series = run.checkpoints()
    at = [series[series.steps.index(step)].clone() for step in steps]
    moved = torch.stack([b - a for a, b in zip(at, at[1:], strict=False)]).double()
    span = torch.linalg.qr(moved.T)[0]
    return float((rows.double().T - span @ (span.T @ rows.double().T)).norm(dim=0).max())


def test_the_recorded_weights_do_not_depend_on_the_window(whole: Run, cut: Run) -> None:
    assert torch.equal(whole.checkpoints()[-1], cut.checkpoints()[-1])
    assert cut.observed().steps == (12, 18, 24, 30, 36)
    assert cut.key("projections") != whole.key("projections")


def test_every_basis_kind_comes_from_the_window_alone(whole: Run, cut: Run) -> None:
    inside = list(range(12, 37, 6))
    own, other = (load_record(Basis, run.directory.basis("trajectory")).rows for run in (cut, whole))
    assert outside(own, cut, inside) < 1e-3
    assert outside(other, cut, inside) > 0.05
    for label in ("hessian", "trajectory_secant"):
        found = [load_record(Basis, run.directory.basis(label)) for run in (cut, whole)]
        assert set(found[0].origins.tolist()) <= {-1, *inside}
        assert not torch.allclose(found[0].rows, found[1].rows)


def test_steps_of_a_trajectory_basis_are_its_checkpoints(whole: Run) -> None:
    rows = load_record(Basis, whole.directory.basis("early")).rows
    assert outside(rows, whole, [0, 12, 24]) < 1e-3
    assert outside(load_record(Basis, whole.directory.basis("trajectory")).rows, whole, [0, 12, 24]) > 0.05


def test_the_loss_change_is_that_of_the_window(cut: Run) -> None:
    projections = load_record(Projections, cut.directory.projections("trajectory"))
    assert projections.steps.tolist() == list(cut.observed().steps)
    series, tokens = cut.checkpoints(), cut.task.splits.select
    first, last = (cut.objective.losses(series[series.steps.index(s)], tokens) for s in WINDOW)
    exact = allocate(projections, "trapezoid").totals()["exact"]
    assert exact == pytest.approx(float((last - first).double().mean()), abs=1e-5)


def test_edits_undo_the_window_in_the_final_model(whole: Run, cut: Run) -> None:
    series = whole.checkpoints()
    moved = series[series.steps.index(36)] - series[series.steps.index(12)]
    for split in (evaluated(cut, cut.task.splits.select), evaluated(whole, whole.task.splits.select, WINDOW)):
        assert torch.allclose(split.movement.displacement, moved)
        assert torch.equal(split.theta, series[-1])


def test_discovery_of_a_window_lies_beside_that_of_the_run(whole: Run) -> None:
    names = discovery_stages(whole.config, WINDOW)
    assert names[0] == "signatures:hessian@12-36"
    assert names[-1] == "timeline@12-36"
    for name in ("signatures:trajectory", "signatures:trajectory@12-36"):
        run_signatures(whole, name)
    own, part = (load_found(whole, name) for name in ("trajectory", "trajectory@12-36"))
    assert (own.basis, part.basis) == ("trajectory", "trajectory@12-36")
    run_stages(whole, stages=[*discovery_stages(whole.config), *names])
    spans = [effect.window for effect in load_timeline(whole, WINDOW).effects]
    assert min(span.start for span in spans) == 12
    assert max(span.end for span in spans) == 36
    assert min(effect.window.start for effect in load_timeline(whole).effects) == 0
    run_timeline(whole, "timeline")
    assert whole.directory.finished("timeline@12-36", whole.key("timeline@12-36"))


def test_remove_searches_the_window_alone(whole: Run) -> None:
    from experiments.verbs.targets import edit_span

    span = edit_span(whole, None, WINDOW)
    assert "steps 12 to 36" in span.kind
    assert span.kind != edit_span(whole, None).kind


@pytest.mark.parametrize(
    ("window", "message"),
    [((12, 20), "nearest are"), ((36, 12), "must end after"), ((12, 18), "at least three checkpoints")],
)
def test_windows_that_cannot_be(whole: Run, window: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole.observed(window)


def test_another_precision_of_a_series_leaves_the_first_alone(whole: Run) -> None:
    series = whole.checkpoints()
    first = series[0].clone()
    exact = dataclasses.replace(series, dtype=torch.float64)
    assert exact[0].dtype == torch.float64
    assert series[0].dtype == torch.float32
    assert torch.equal(series[0], first)
    assert exact[0].data_ptr() != series[0].data_ptr()
    tokens = whole.task.splits.select
    single, double = whole.objective.losses(series[-1], tokens), whole.objective.losses(exact[-1], tokens)
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, atol=1e-5)


def test_the_window_of_a_run_is_read_back(cut: Run) -> None:
    assert load_run(cut.directory.path, quiet).config.window == WINDOW
    result = CliRunner().invoke(app, ["run", "smoke", "--window", "12:36", "--dry-run"])
    assert result.exit_code == 0


@pytest.mark.parametrize("rule", ["trapezoid", "simpson"])
def test_projections_of_a_window_are_those_measured_on_its_checkpoints(whole: Run, rule: str) -> None:
    basis, tokens = load_record(Basis, whole.directory.basis("trajectory")), whole.task.splits.select
    tokens = tokens.select(torch.arange(5))
    (all_,) = project_for(rule, whole.objective, whole.checkpoints(), [basis], tokens)
    (own,) = project_for(rule, whole.objective, whole.observed(WINDOW), [basis], tokens)
    cut = projections_within(all_, WINDOW)
    for field in dataclasses.fields(own):
        one, two = getattr(cut, field.name), getattr(own, field.name)
        assert (one is None) == (two is None), field.name
        if one is not None:
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5, msg=field.name)
    ours, theirs = allocate(cut, rule), allocate(own, rule)
    torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="start and end at recorded steps, 12:13"):
        projections_within(all_, (12, 13))


def test_a_test_of_a_window_takes_its_own_clusters_or_says_what_to_run(tmp_path: Path) -> None:
    run = observed(tmp_path / "run", bases=TINY["bases"][:2])
    run_stages(run, stages=discovery_stages(run.config))
    with pytest.raises(ValueError, match=r"run polca-edit discover .*run --window 12:36 first"):
        choose(run, "trajectory", least=2, window=WINDOW)
    run_stages(run, stages=discovery_stages(run.config, WINDOW))
    chosen = choose(run, "trajectory", least=2, window=WINDOW)
    projections = load_record(Projections, run.directory.projections("trajectory"))
    paths = allocate(projections_within(projections, WINDOW)).projected_loss()
    clusters = cluster_trajectories(paths, run.settings().clusters)
    assert chosen.observation.projections.steps.tolist() == list(run.observed(WINDOW).steps)
    for seen, own in zip(chosen.observation.clusters, clusters, strict=True):
        assert seen.labels.tolist() == own.labels.tolist()
    found = load_found(run, "hessian+trajectory@12-36").clusters
    select = run.task.splits.select
    tested = [pair for pair in chosen.pairs if pair.family == "interventional"]
    assert tested
    for pair in tested:
        own = name_group(select, found[str(pair.cluster)], f"found:{pair.cluster}", seed=run.config.seed)
        assert pair.group.name == own.name
    whole_run = choose(run, "trajectory", least=2)
    assert whole_run.observation.projections.steps.tolist() == list(run.observed().steps)
