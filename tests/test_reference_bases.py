"""Reference bases of the pipeline null: small Algorithm 1, mixed projections, families kept in the run."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments import causal_runs, pipeline, reference_bases
from experiments.config import load_config
from interventions.protocol import PlanSettings, Subject, open_session
from interventions.verdict import VerdictInputs, decide
from polca_edit.allocation import allocate, project
from polca_edit.basis import unlabelled
from polca_edit.curvature import orthonormalise


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory):
    settings = {"bases": [{"kind": "trajectory", "vectors": 6}], "threads": 1, "clusters.scaled": True}
    out = tmp_path_factory.mktemp("references") / "run"
    run = pipeline.open_run(load_config("smoke", settings), out, lambda _: None)
    pipeline.run_stages(run)
    plan = PlanSettings(rotations=9, random_bases=5, shuffled_bases=7, resamples=20)
    test = causal_runs.choose_pairs(run, "trajectory", plan)
    splits = run.task.splits
    subject = Subject(run.objective, run.checkpoints(), test.basis.rows, splits.select, splits.evaluate)
    return test, open_session(subject, test.settings)


def dense_algorithm_one(hessians: list[torch.Tensor], per: int) -> torch.Tensor:
    """The same by projectors, whose own null space is pushed below every eigenvalue."""
    size = len(hessians[0])
    rows = torch.zeros(0, size, dtype=torch.float64)
    for hessian in hessians:
        keep = torch.eye(size, dtype=torch.float64) - rows.T @ rows
        _, vectors = torch.linalg.eigh(keep @ hessian @ keep - 1e4 * rows.T @ rows)
        rows = torch.cat([rows, vectors[:, -per:].flip(1).T])
    return rows


@pytest.mark.parametrize("per", [1, 2])
def test_algorithm_one_is_that_of_projected_matrices(per: int) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, 12, 12, generator=generator, dtype=torch.float64)
    hessians = [m + m.T for m in drawn]  # negative eigenvalues too
    found = reference_bases.algorithm_one(hessians, per)
    torch.testing.assert_close(found @ found.T, torch.eye(4 * per, dtype=torch.float64))
    overlap = (found @ dense_algorithm_one(hessians, per).T).abs()
    torch.testing.assert_close(overlap, torch.eye(4 * per, dtype=torch.float64), rtol=0, atol=1e-8)
    other = reference_bases.algorithm_one(hessians[::-1], per)
    assert float((found[0] @ other[0]).abs()) < 0.9


def test_mixed_projections_are_those_of_the_mixed_rows(opened) -> None:
    test, session = opened
    generator = torch.Generator().manual_seed(1)
    rows = orthonormalise(torch.randn(8, session.theta.shape[0], generator=generator))
    lines = orthonormalise(torch.randn(3, 8, generator=generator, dtype=torch.float64))
    mixed = reference_bases.mixed(reference_bases.measured_rows(test, session, rows), lines)
    series = reference_bases.spaced_out(session.subject.checkpoints, 40)
    basis = unlabelled("mixed", lines.to(rows) @ rows)
    (direct,) = project(session.subject.objective, series, [basis], session.subject.select)
    for name in ("losses", "gradients", "displacements"):
        torch.testing.assert_close(getattr(mixed, name), getattr(direct, name), rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(allocate(mixed).values, allocate(direct).values, rtol=1e-3, atol=2e-5)


def test_shuffled_bases_span_leading_curvature(opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference bases differ by order, are orthonormal, and their first vector has a top eigenvalue."""
    test, session = opened
    seen: list[torch.Tensor] = []
    real = reference_bases.nulls.largest_effect

    def noted(bench, rows, choices):
        seen.append(rows)
        return real(bench, rows, choices)

    monkeypatch.setattr(reference_bases.nulls, "largest_effect", noted)
    maxima = reference_bases.shuffled_family(test, session)
    assert len(maxima) == len(seen) == 7
    series, objective = session.subject.checkpoints, session.subject.objective
    places = [round((i + 1) * (len(series) - 1) / 6) for i in range(6)]
    tops = []
    for place in places:
        product = objective.hessian(series[place], test.run.task.splits.curvature)
        tops.append([float(rows[0] @ product(rows[0])) for rows in seen])
    for rows in seen:
        torch.testing.assert_close(rows @ rows.T, torch.eye(6), rtol=0, atol=1e-4)
    assert len({round(float(rows[0].abs().max()), 6) for rows in seen}) > 1
    # Whatever comes first is the leading eigenvector of its own checkpoint, against 200 products.
    from polca_edit.curvature import projected_lanczos

    for number in range(len(seen)):
        best = []
        for index, place in enumerate(places):
            product = objective.hessian(series[place], test.run.task.splits.curvature)
            pairs = projected_lanczos(
                product,
                session.theta.shape[0],
                1,
                generator=torch.Generator().manual_seed(0),
                tolerance=1e-4,
                max_products=200,
            )
            best.append(tops[index][number] / float(pairs.values[0]))
        assert max(best) == pytest.approx(1.0, abs=0.02)


def test_families_are_kept_and_serve_the_next_basis(opened, monkeypatch: pytest.MonkeyPatch) -> None:
    test, session = opened
    first = reference_bases.reference_maxima(test, session)
    assert {name: len(values) for name, values in first.items()} == {
        "rotation": 9,
        "random": 5,
        "shuffled_hessian": 7,
    }
    folder = test.run.directory.path / "references"
    assert len(list(folder.glob("*.json"))) == 2

    def forbidden(*_: object) -> np.ndarray:
        raise AssertionError("measured again")

    monkeypatch.setattr(reference_bases, "random_family", forbidden)
    monkeypatch.setattr(reference_bases, "shuffled_family", forbidden)
    again = reference_bases.reference_maxima(test, session)
    for name, values in first.items():
        np.testing.assert_array_equal(again[name], values)
    # Other settings, or a file that was written for others, are measured anew.
    other = replace(test, settings=replace(test.settings, seed=test.settings.seed + 1))
    with pytest.raises(AssertionError, match="measured again"):
        reference_bases.reference_maxima(other, session)
    for path in folder.glob("random-*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "key": "another"}))
    with pytest.raises(AssertionError, match="measured again"):
        reference_bases.reference_maxima(test, session)


def test_random_bases_barely_move_and_rotations_do(opened) -> None:
    test, session = opened
    found = reference_bases.reference_maxima(test, session)
    # <r, dtheta> of a random direction is |dtheta| / sqrt(N): its effect is far below a rotation's.
    chosen = found["random"][found["random"] > -1]
    assert len(chosen) == 0 or np.abs(chosen).max() < 0.2 * np.median(found["rotation"])


def test_a_family_that_did_not_run_forbids_causal() -> None:
    from tests.test_verdict import CAUSAL

    assert reference_bases.family_gates(["rotation", "random", "shuffled_hessian"]) == {}
    gates = reference_bases.family_gates(["rotation", "random"])
    assert gates == {"c7 shuffled hessian bases": "not_run"}
    inputs: VerdictInputs = replace(CAUSAL, gates={**CAUSAL.gates, **gates})
    found = decide(inputs)
    assert found.verdict == found.single_run_verdict == "not_selective"
    assert "not_run:gate:c7 shuffled hessian bases" in found.flags
    assert decide(CAUSAL).verdict == "causal"
