"""The study of Pythia shapes: pieces that are kept, outlines without weights, the plan beside a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from experiments.study.pythia.kept import Cost, kept, measured, piece_path
from experiments.study.pythia.shapes import (
    SERIES,
    Amount,
    counted,
    last_folder,
    neox_config,
    outline,
    sentences,
)
from experiments.study.pythia.study import plan_beside_run


def counting(place: Path) -> Cost:
    """A piece that leaves a trace of every time it is done."""
    with (place / "done").open("a") as stream:
        stream.write("x")
    return measured(lambda: {"found": 3.0, "route": None})


def test_a_finished_piece_is_read_back_and_not_done_again(tmp_path):
    first = kept(tmp_path / "pieces", "run basis:hessian", partial(counting, tmp_path))
    again = kept(tmp_path / "pieces", "run basis:hessian", partial(counting, tmp_path))
    assert (tmp_path / "done").read_text() == "x"
    assert again == first
    assert first.notes == {"found": 3.0, "route": None}
    piece_path(tmp_path / "pieces", "run basis:hessian").unlink()
    kept(tmp_path / "pieces", "run basis:hessian", partial(counting, tmp_path))
    assert (tmp_path / "done").read_text() == "xx"


@pytest.mark.parametrize(
    ("shape", "parameters"), [("14m", 14_067_712), ("70m", 70_426_624), ("160m", 162_322_944)]
)
def test_an_outline_has_the_parameters_of_the_shape_and_takes_no_disk(tmp_path, shape, parameters):
    """EleutherAI's own counts of these models."""
    outline(shape, tmp_path, Amount(checkpoints=3))
    assert counted(tmp_path) == parameters
    file = tmp_path / SERIES / "checkpoint-10" / "model.safetensors"
    assert file.stat().st_size > 4 * parameters
    assert file.stat().st_blocks * 512 < 1_000_000
    assert neox_config(shape).vocab_size == 50_304


def test_leaders_of_the_text_have_one_follower():
    import numpy as np

    text = sentences(200, 60, np.random.default_rng(0))
    followed = {int(a): {int(b) for b in text[:, 1:][text[:, :-1] == a]} for a in range(11, 101)}
    assert all(after == {a + 100} for a, after in followed.items() if after)
    assert len({int(b) for b in text[:, 1:][text[:, :-1] == 5]}) > 50


def test_the_plan_is_compared_with_the_stages_that_both_have():
    def cost(processor: float, peak: int = 0, **notes: float) -> Cost:
        return Cost(0, peak, 4 * processor, processor, 1, notes)

    plan = Cost(0, 0, 60.0, 30.0, 1, {"hvps": 10.0, "peak_bytes": 5.0})
    for name, seconds, read in (("basis:hessian", 8.0, 100.0), ("evaluate", 2.0, 20.0)):
        plan.notes.update({f"{name} seconds": seconds, f"{name} read": read, f"{name} written": 7.0})
    run = {
        "basis:hessian": cost(3.0, 9, stage_seconds=8.0, hvps=11.0, bytes_read=90.0, bytes_written=7.0),
        "evaluate": cost(1.0, 4, stage_seconds=2.0, bytes_read=20.0, bytes_written=7.0),
        "discover": cost(100.0, 50),
    }
    found = plan_beside_run(plan, run)
    assert (found["products"].planned, found["products"].measured) == (10.0, 11.0)
    assert (found["bytes read"].planned, found["bytes read"].measured) == (120.0, 110.0)
    assert (found["peak memory"].planned, found["peak memory"].measured) == (5.0, 9)
    # The run had a quarter of a processor: ten seconds of the clock are 2.5.
    assert (found["seconds"].planned, found["seconds"].measured) == (10.0, 2.5)
    assert "seconds of discover" not in found
    # A plan by the wall's clock is held against the wall's seconds.
    plan.notes["clock"] = "wall"
    assert plan_beside_run(plan, run)["seconds"].measured == 10.0


def test_a_folder_without_checkpoints_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(
        ValueError, match="must hold series/checkpoint-STEP folders, it holds none; make them"
    ):
        last_folder(tmp_path)
