"""Rotated bases of a run against direct projections of their rows, and what resuming does again."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from experiments.config import load_config, parse_config
from experiments.run.cost.sizes import ROTATED, sizes_of
from experiments.run.driver import run_stages
from experiments.run.keys import stage_names
from experiments.run.run import Run, open_run
from experiments.run.summary.write import write_summary
from experiments.tasks.task import build_task
from polca_edit.allocation.allocate import Projections, allocate, project
from polca_edit.artifacts import load_record
from polca_edit.basis.record import Basis

PLAIN = [{"kind": "hessian", "vectors": 3}, {"kind": "trajectory", "vectors": 4}]
TURNED = [
    {"kind": "trajectory", "rotation": "varimax", "name": "turned"},
    {"kind": "trajectory", "rotation": "joint"},
    {"kind": "hessian", "rotation": "contrastive", "skill": "carry"},
]


def finished_run(out: Path, bases: list[dict[str, object]], say=lambda _: None) -> Run:
    run = open_run(load_config("smoke", {"threads": 1, "bases": bases}), out, say)
    run_stages(run)
    return run


@pytest.fixture(scope="module")
def plain(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The shared run's weights, with other bases."""
    return finished_run(Path(shutil.copytree(smoke_run, tmp_path_factory.mktemp("plain") / "run")), PLAIN)


@pytest.fixture(scope="module")
def added(plain: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[str]]:
    """The plain run with rotated bases added after it had finished."""
    out = tmp_path_factory.mktemp("added") / "run"
    shutil.copytree(plain.directory.path, out)
    lines: list[str] = []
    return finished_run(out, [*PLAIN, *TURNED], lines.append), lines


def kept(lines: list[str]) -> set[str]:
    return {line.split()[0] for line in lines if "kept" in line}


@pytest.mark.parametrize("label", ["turned", "trajectory_joint", "hessian_contrastive"])
def test_turned_projections_are_those_of_the_turned_rows(added, label: str) -> None:
    run, _ = added
    basis = load_record(Basis, run.directory.basis(label))
    stored = load_record(Projections, run.directory.projections(label))
    (direct,) = project(run.objective, run.checkpoints(), [basis], run.task.splits.select)
    for name in ("losses", "gradients", "displacements", "residual_start", "residual_end", "residual_norms"):
        torch.testing.assert_close(getattr(stored, name), getattr(direct, name), rtol=1e-3, atol=2e-5)


def test_rotation_moves_vectors_and_keeps_the_span(added) -> None:
    run, _ = added
    before, after = (load_record(Basis, run.directory.basis(n)) for n in ("trajectory", "turned"))
    overlap = after.rows @ before.rows.T
    identity = torch.eye(len(before))
    torch.testing.assert_close(overlap @ overlap.T, identity, rtol=0, atol=1e-5)
    assert float((overlap.abs().amax(1) - 1).abs().max()) > 1e-2
    assert bool(after.eigenvalues.isnan().all())
    assert bool(after.residuals.isnan().all())
    assert not after.supervised
    assert load_record(Basis, run.directory.basis("hessian_contrastive")).supervised


def test_varimax_was_fitted_on_the_stored_allocation(added) -> None:
    """Kaiser's criterion of the given allocation table is higher at the rotation than at 200 random ones."""
    from oracles import orthomax_criterion

    from polca_edit.basis.rotate import allocation_matrices

    run, _ = added
    before, after = (load_record(Basis, run.directory.basis(n)) for n in ("trajectory", "turned"))
    rotation = (before.rows @ after.rows.T).double()
    source = load_record(Projections, run.directory.projections("trajectory"))
    table = allocation_matrices(source).diagonal(dim1=1, dim2=2)
    reached = orthomax_criterion(table @ rotation, "varimax")
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        other, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
        assert orthomax_criterion(table @ other, "varimax") <= reached * (1 + 1e-6)


def test_explained_share_and_residual_do_not_change(added) -> None:
    run, _ = added
    analyses = write_summary(run)["analyses"]
    for source, label in [
        ("trajectory", "turned"),
        ("trajectory", "trajectory_joint"),
        ("hessian", "hessian_contrastive"),
    ]:
        own, other = analyses[source], analyses[label]
        assert other["basis"]["explained_share"] == pytest.approx(own["basis"]["explained_share"], rel=1e-4)
        assert other["loss_change"]["residual"] == pytest.approx(own["loss_change"]["residual"], rel=1e-4)
        assert other["basis"]["captured_net"] == pytest.approx(own["basis"]["captured_net"], rel=1e-4)
        assert other["basis"]["hvps"] == 0
        assert all(v["eigenvalue"] is None and v["residual"] is None for v in other["vectors"])
    assert analyses["hessian_contrastive"]["basis"]["supervised"]
    assert not math.isclose(
        analyses["turned"]["damage"][0]["on_target"], analyses["trajectory"]["damage"][0]["on_target"]
    )


def test_adding_rotations_to_a_finished_run_does_nothing_again(added) -> None:
    run, lines = added
    own = {
        f"{stage}:{label}" for stage in ("basis", "clusters", "damage") for label in ("hessian", "trajectory")
    }
    found = {f"signatures:{name}" for name in ("hessian", "trajectory", "hessian+trajectory")}
    assert kept(lines) == {"train", "projections", "timeline", *own, *found}
    for label in ("turned", "trajectory_joint", "hessian_contrastive"):
        record = json.loads(run.directory.stage_file(f"basis:{label}").read_text())
        assert set(record["passes"].values()) == {0.0}


def test_resume_keeps_everything_and_redoes_what_is_damaged(added, tmp_path: Path) -> None:
    run, _ = added
    copied = tmp_path / "copy"
    shutil.copytree(run.directory.path, copied)
    broken = copied / "projections" / "turned.safetensors"
    wanted = broken.read_bytes()
    broken.write_bytes(b"nothing")
    lines: list[str] = []
    finished_run(copied, [*PLAIN, *TURNED], lines.append)
    assert set(stage_names(run.config)) - kept(lines) == {"basis:turned"}
    assert broken.read_bytes() == wanted


def test_another_rotation_under_the_same_name_is_made_anew(added, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(added[0].directory.path, copied)
    lines: list[str] = []
    changed = [*PLAIN, {**TURNED[0], "rotation": "quartimax"}]
    finished_run(copied, changed, lines.append)
    assert {"basis:turned", "clusters:turned", "damage:turned"}.isdisjoint(kept(lines))
    assert {"projections", "clusters:trajectory"} <= kept(lines)


def test_rotated_sections_take_the_settings_of_their_source() -> None:
    config = parse_config(
        {
            "bases": [
                {"kind": "hessian", "vectors": 7, "tolerance": 0.3},
                {"kind": "hessian", "rotation": "fastica"},
            ]
        }
    )
    turned = config.bases[1]
    assert (turned.vectors, turned.tolerance, turned.label) == (7, 0.3, "hessian_fastica")
    assert parse_config(config.model_dump()) == config
    sizes = sizes_of(build_task(config), config, config.training.recorded)
    assert [basis.kind for basis in sizes.bases] == ["hessian", ROTATED]
    assert sizes.rows == 7 + 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bases": [{"kind": "hessian"}, {"kind": "trajectory", "rotation": "varimax"}]}, "none is there"),
        ({"bases": [{"vectors": 5}, {"vectors": 6, "rotation": "varimax"}]}, "none is there"),
        ({"bases": [{"kind": "hessian"}, {"rotation": "contrastive"}]}, "skill"),
        ({"bases": [{"kind": "hessian", "skill": "carry"}]}, "skill"),
        ({"bases": [{}, {"rotation": "joint"}], "rule": "second_order"}, "second_order"),
        ({"bases": [{}, {"rotation": "spin"}]}, "varimax"),
    ],
)
def test_rotations_that_cannot_be_made_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_config(values)


def test_an_unknown_skill_is_refused(plain: Run, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(plain.directory.path, copied)
    with pytest.raises(ValueError, match="rotation must be one of"):
        finished_run(copied, [*PLAIN, {"kind": "hessian", "rotation": "contrastive", "skill": "juggling"}])


FURTHER = ("trajectory_secant", "loss_weighted", "loss_path", "adaptive_hessian")


@pytest.fixture(scope="module")
def further(plain: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run with a basis of every further kind and each of them turned."""
    out = Path(shutil.copytree(plain.directory.path, tmp_path_factory.mktemp("further") / "run"))
    plain_of = [{"kind": kind, "vectors": 3} for kind in FURTHER]
    return finished_run(out, [*plain_of, *({"kind": kind, "rotation": "varimax"} for kind in FURTHER)])


@pytest.mark.parametrize("kind", FURTHER)
def test_further_kinds_run_and_turn(further: Run, kind: str) -> None:
    run = further
    basis, turned = (load_record(Basis, run.directory.basis(n)) for n in (kind, f"{kind}_varimax"))
    assert (basis.kind, turned.kind) == (kind, f"{kind}_varimax")
    own, other = (
        allocate(load_record(Projections, run.directory.projections(n))).values.sum(1)
        for n in (kind, f"{kind}_varimax")
    )
    torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)
