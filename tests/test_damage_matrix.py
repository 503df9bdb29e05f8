"""The damage matrix on disk: what is kept equals what is measured, nothing is measured twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.verdicts.matrix import DamageMatrix
from interventions.causal.test import causal_test
from interventions.damage import EvaluatedSplit
from interventions.edits import Edit, project_out
from polca_edit.artifacts import to_plain
from tests.test_causal import QUICK, pairs_of, world

FEW = replace(QUICK, rotations=19, observed_rotations=0)


def axis(split: EvaluatedSplit, k: int) -> Edit:
    row = torch.zeros(1, split.theta.shape[0], dtype=torch.float64)
    row[0, k] = 1.0
    return project_out(split, row)


def test_a_kept_row_is_the_closed_form_of_its_edit_on_its_tokens(tmp_path: Path) -> None:
    split, _ = world()
    with DamageMatrix(tmp_path, "model", block=2) as matrix:
        kept = replace(split, matrix=matrix)
        first = [kept.damage(axis(split, k)).change for k in range(3)]
        part = kept.on(split.tokens.select(torch.arange(5)))
        short = part.damage(axis(split, 1)).change
    # Undoing axis k costs slot k of document i half of h_i times four, and no other slot anything.
    slots = torch.tile(torch.arange(4), (split.tokens.sequences,))
    heights = split.tokens.inputs.double().flatten()
    for k, change in enumerate(first):
        assert torch.allclose(change, torch.where(slots == k, 2.0 * heights, 0.0), atol=1e-12)
    assert torch.equal(short, first[1][: len(short)])
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    with DamageMatrix(tmp_path, "model") as again:
        kept = replace(split, matrix=again)
        assert torch.equal(kept.changes([axis(split, 2)])[0], first[2])
        kept.damage(axis(split, 0)), kept.damage(axis(split, 3))
        assert (again.found, again.computed) == (2, 1)
    # Rows of another model are not found.
    assert len(DamageMatrix(tmp_path, "other")) == 5
    with DamageMatrix(tmp_path, "other") as other:
        replace(split, matrix=other).damage(axis(split, 0))
        assert (other.found, other.computed) == (0, 1)


def test_a_transplant_is_another_row_than_the_same_rows_undone(tmp_path: Path) -> None:
    split, _ = world()
    with DamageMatrix(tmp_path, "model") as matrix:
        kept = replace(split, matrix=matrix)
        movement = split.movement
        row = axis(split, 0).rows
        inserted = Edit(movement.source, row, torch.tensor([2.0], dtype=torch.float64), "transplant")
        assert torch.equal(kept.gain(inserted), split.gain(inserted))
        kept.damage(replace(inserted, base=movement.base))
        assert matrix.computed == 2


def test_a_stopped_test_goes_on_and_another_question_measures_nothing(tmp_path: Path) -> None:
    split, skills = world(documents=40)
    pairs = pairs_of((0, 1))
    plain = causal_test(split, pairs, FEW, parents=skills)
    calls = 0

    def stopping(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), DamageMatrix(tmp_path, "model") as matrix:
        causal_test(replace(split, matrix=matrix), pairs, FEW, parents=skills, progress=stopping)
    stopped = matrix.computed
    assert stopped > 50
    with DamageMatrix(tmp_path, "model") as matrix:
        table = causal_test(replace(split, matrix=matrix), pairs, FEW, parents=skills)
        assert matrix.found >= stopped
    assert to_plain(table.rows) == to_plain(plain.rows)
    assert to_plain(table.bases) == to_plain(plain.bases)
    with DamageMatrix(tmp_path, "model") as matrix:
        other = replace(FEW, resamples=200, seed=FEW.seed)
        causal_test(replace(split, matrix=matrix), pairs, other, parents=skills)
        assert matrix.computed == 0


def test_changed_bytes_are_refused(tmp_path: Path) -> None:
    split, _ = world()
    with DamageMatrix(tmp_path, "model") as matrix:
        replace(split, matrix=matrix).damage(axis(split, 0))
    [path] = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        replace(split, matrix=DamageMatrix(tmp_path, "model")).damage(axis(split, 0))
    path.write_bytes(data[:20])
    with pytest.raises(ValueError, match="block of losses"):
        DamageMatrix(tmp_path, "model")
