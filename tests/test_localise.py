"""Localisation finds the part that carries a planted edit; label tests tell label from cluster."""

import numpy as np
import pytest
import torch

from interventions import edits, localise
from interventions.damage import EvaluatedSplit
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.models import TransformerShape, build_small_transformer
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet, next_token_loss


@pytest.fixture(scope="module")
def bench():
    shape = TransformerShape(2, 16, 2, 32, 7, 6)
    module = build_small_transformer(shape, 0)
    space = ParameterSpace.from_module(module)
    g = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 7, (20, 6), generator=g)
    tokens = TokenSet(inputs, torch.ones(20, 5, dtype=torch.bool), torch.arange(20))
    theta = space.read(module)
    reference = theta + 0.3 * torch.randn(space.size, generator=g)
    series = open_checkpoints([reference, theta], space, steps=[0, 1])
    return EvaluatedSplit(Objective(module, space, next_token_loss), series, tokens)


def only(space: ParameterSpace, pattern: str, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(space.size, generator=generator) * space.mask([pattern])


def test_parts_cover_everything_once(bench) -> None:
    space = bench.loss.space
    for parts in (localise.components(space), localise.tensors(space)):
        assert torch.equal(sum(p.mask.long() for p in parts), torch.ones(space.size, dtype=torch.long))
    names = {(p.layer, p.name) for p in localise.components(space)}
    assert {(0, "attention"), (1, "mlp"), (-1, "embed"), (0, "norm")} <= names


def test_heads_are_rows_of_query_and_columns_of_out(bench) -> None:
    space = bench.loss.space
    found = localise.heads(space, 2)
    assert len(found) == 4
    both = sum(p.mask.long() for p in found)
    assert int(both.max()) == 1
    query = space.unflatten(found[1].mask.float())["blocks.0.attn.query.weight"]
    out = space.unflatten(found[1].mask.float())["blocks.0.attn.out.weight"]
    assert query[8:].all()
    assert not query[:8].any()
    assert out[:, 8:].all()
    assert not out[:, :8].any()


def test_an_edit_of_one_block_is_placed_there(bench) -> None:
    space = bench.loss.space
    moved = only(space, "blocks.1.mlp.*", torch.Generator().manual_seed(2))
    edit = edits.from_delta(edits.weights_fingerprint(bench.theta), moved, "planted")
    members = np.ones(bench.tokens.count, dtype=bool)
    found = localise.localise(bench, edit, members, localise.components(space))
    assert found.covered == pytest.approx(1.0, abs=1e-5)
    assert found.shares()[1, "mlp"] == pytest.approx(1.0, abs=1e-6)
    assert found.additive_gap == pytest.approx(0.0, abs=1e-6)


def test_patching_the_last_stream_carries_everything_and_earlier_layers_nothing(bench) -> None:
    space = bench.loss.space
    before = space.read(bench.loss.module).clone()
    moved = only(space, "blocks.1.mlp.*", torch.Generator().manual_seed(3))
    edit = edits.from_delta(edits.weights_fingerprint(bench.theta), moved, "planted")
    shares = localise.patch_activations(bench, edit, np.ones(bench.tokens.count, dtype=bool))
    assert shares["blocks.1.hook_resid_post"] == pytest.approx(1.0, abs=1e-4)
    assert shares["blocks.1.hook_mlp_out"] == pytest.approx(1.0, abs=1e-4)
    assert shares["blocks.0.hook_resid_post"] == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(space.read(bench.loss.module), before)
