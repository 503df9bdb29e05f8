"""Localisation finds the part that carries a planted edit; label tests tell label from cluster."""

import numpy as np
import pytest
import torch

from interventions import edits, localise
from interventions.evidence import open_bench
from interventions.label_tests import label_test
from polca_edit.derivatives import Objective
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
    return open_bench(Objective(module, space, next_token_loss), theta, reference, tokens, resamples=200)


def only(space: ParameterSpace, pattern: str, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(space.size, generator=generator) * space.mask([pattern])


def test_parts_cover_everything_once(bench) -> None:
    space = bench.objective.space
    for parts in (localise.components(space), localise.tensors(space)):
        assert torch.equal(sum(p.mask.long() for p in parts), torch.ones(space.size, dtype=torch.long))
    names = {(p.layer, p.name) for p in localise.components(space)}
    assert {(0, "attention"), (1, "mlp"), (-1, "embed"), (0, "norm")} <= names


def test_heads_are_rows_of_query_and_columns_of_out(bench) -> None:
    space = bench.objective.space
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
    space = bench.objective.space
    moved = only(space, "blocks.1.mlp.*", torch.Generator().manual_seed(2))
    edit = edits.from_delta(edits.weights_fingerprint(bench.theta), moved, "planted")
    members = np.ones(bench.tokens.count, dtype=bool)
    found = localise.localise(bench, edit, members, localise.components(space))
    assert found.covered == pytest.approx(1.0, abs=1e-5)
    assert found.shares()[1, "mlp"] == pytest.approx(1.0, abs=1e-6)
    assert found.additive_gap == pytest.approx(0.0, abs=1e-6)
    layers, names, table = localise.heat_map(found)
    assert table[layers.index(1), names.index("mlp")] == pytest.approx(found.whole, abs=1e-6)


def test_patching_the_last_stream_carries_everything_and_earlier_layers_nothing(bench) -> None:
    space = bench.objective.space
    before = space.read(bench.objective.module).clone()
    moved = only(space, "blocks.1.mlp.*", torch.Generator().manual_seed(3))
    edit = edits.from_delta(edits.weights_fingerprint(bench.theta), moved, "planted")
    shares = localise.patch_activations(bench, edit, np.ones(bench.tokens.count, dtype=bool))
    assert shares["blocks.1.hook_resid_post"] == pytest.approx(1.0, abs=1e-4)
    assert shares["blocks.1.hook_mlp_out"] == pytest.approx(1.0, abs=1e-4)
    assert shares["blocks.0.hook_resid_post"] == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(space.read(bench.objective.module), before)


def test_label_tests_follow_the_damage(bench) -> None:
    rng = np.random.default_rng(0)
    count = bench.tokens.count
    cluster, label = rng.random(count) < 0.5, rng.random(count) < 0.5
    noise = 0.01 * rng.normal(size=count)
    assert label_test(bench, label + noise, cluster, label, name="l").follows == "label"
    assert label_test(bench, cluster + noise, cluster, label, name="l").follows == "cluster"
    assert label_test(bench, noise, cluster, label, name="l").follows == "undecided"
    assert label_test(bench, noise, cluster, cluster, name="l").follows == "same tokens"
    found = label_test(bench, label + noise, cluster, label, name="l")
    assert found.precision == pytest.approx((cluster & label).sum() / cluster.sum())
    wide = cluster | label
    assert label_test(bench, cluster + noise, cluster, wide, name="l").follows == "cluster"
    with pytest.raises(ValueError, match="one value per scored token"):
        label_test(bench, noise, cluster, label[:-1], name="short")
