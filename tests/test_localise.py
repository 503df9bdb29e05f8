"""Localisation finds the part that carries a planted edit; label tests tell label from cluster."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from interventions import edits, localise, patching
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
    return EvaluatedSplit(Objective(module, next_token_loss, space), series, tokens)


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
    layout = localise.head_layout(bench.loss.module)
    assert layout == localise.HeadLayout(2, 2)
    found = localise.heads(space, layout)
    assert len(found) == 4
    both = sum(p.mask.long() for p in found)
    assert int(both.max()) == 1
    query = space.unflatten(found[1].mask.float())["blocks.0.attn.query.weight"]
    out = space.unflatten(found[1].mask.float())["blocks.0.attn.out.weight"]
    assert query[8:].all()
    assert not query[:8].any()
    assert out[:, 8:].all()
    assert not out[:, :8].any()


@pytest.mark.parametrize("kind", ["neox", "gpt2", "llama"])
def test_changing_a_head_changes_that_head_alone(kind) -> None:
    """Oracle: the model's own attention output per head, before the output map, through a hook."""
    import transformers as t

    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "num_hidden_layers": 1, "num_attention_heads": 8, "hidden_size": 32}
    module = {
        "neox": lambda: t.GPTNeoXForCausalLM(
            t.GPTNeoXConfig(**sizes, intermediate_size=32, max_position_embeddings=8)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=11, n_positions=8, n_embd=32, n_layer=1, n_head=8)
        ),
        "llama": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(**sizes, num_key_value_heads=4, intermediate_size=32)
        ),
    }[kind]()
    module.eval()
    names = {"neox": "attention.dense", "gpt2": "attn.c_proj", "llama": "self_attn.o_proj"}
    [output] = [m for n, m in module.named_modules() if n.endswith(names[kind])]
    seen: list[torch.Tensor] = []
    output.register_forward_pre_hook(lambda m, given: seen.append(given[0].detach().reshape(6, 8, 4)))
    space = ParameterSpace.from_module(module)
    layout = localise.head_layout(module)
    assert layout == localise.HeadLayout(8, 4 if kind == "llama" else 8)
    found = localise.heads(space, layout)
    assert len(found) == 8
    theta, ids = space.read(module), torch.tensor([[1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        module(ids)
        for head in (0, 3, 7):
            mask = found[head].mask
            with space.substituted(module, torch.where(mask, theta + 0.5 * torch.randn(space.size), theta)):
                module(ids)
            changed = (seen[-1] - seen[0]).abs().amax((0, 2)) > 1e-6
            sharing = {h for h in range(8) if h * layout.shared // 8 == head * layout.shared // 8}
            assert changed[head]
            assert set(changed.nonzero()[:, 0].tolist()) <= sharing
            [columns] = [
                v for n, v in space.unflatten(mask.float()).items() if n.endswith(f"{names[kind]}.weight")
            ]
            columns = columns.T if kind == "gpt2" else columns
            assert columns.bool().any(0).nonzero()[:, 0].tolist() == list(range(4 * head, 4 * head + 4))


def test_unknown_or_indivisible_heads_are_refused() -> None:
    fused = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({"Wqkv": torch.nn.Linear(8, 24)})})
    with pytest.raises(ValueError, match="order of heads"):
        localise.heads(ParameterSpace.from_module(fused), localise.HeadLayout(2, 2))
    parts = {"query": torch.nn.Linear(8, 8), "out": torch.nn.Linear(8, 8)}
    plain = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict(parts)})
    with pytest.raises(ValueError, match="do not divide"):
        localise.heads(ParameterSpace.from_module(plain), localise.HeadLayout(3, 3))
    with pytest.raises(ValueError, match="known layout"):
        localise.heads(ParameterSpace.from_module(torch.nn.Linear(4, 4)), localise.HeadLayout(2, 2))
    with pytest.raises(ValueError, match="model's config"):
        localise.head_layout(torch.nn.Linear(4, 4))


def test_an_edit_of_one_block_is_placed_there(bench) -> None:
    space = bench.loss.space
    moved = only(space, "blocks.1.mlp.*", torch.Generator().manual_seed(2))
    edit = edits.from_delta(bench.movement.base, moved, "planted")
    members = np.ones(bench.tokens.count, dtype=bool)
    found = localise.localise(bench, edit, members, localise.components(space))
    assert found.covered == pytest.approx(1.0, abs=1e-5)
    assert found.shares()[1, "mlp"] == pytest.approx(1.0, abs=1e-6)
    assert found.additive_gap == pytest.approx(0.0, abs=1e-6)


def test_patching_the_last_stream_carries_everything_and_earlier_layers_nothing(bench) -> None:
    space = bench.loss.space
    before = space.read(bench.loss.module).clone()
    moved = only(space, "blocks.1.mlp.*", torch.Generator().manual_seed(3))
    edit = edits.from_delta(bench.movement.base, moved, "planted")
    shares = patching.patch_activations(bench, edit, np.ones(bench.tokens.count, dtype=bool))
    assert shares["blocks.1.hook_resid_post"] == pytest.approx(1.0, abs=1e-4)
    assert shares["blocks.1.hook_mlp_out"] == pytest.approx(1.0, abs=1e-4)
    assert shares["blocks.0.hook_resid_post"] == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(space.read(bench.loss.module), before)


# -- heads: by weights and by activations -------------------------------------------------------------


def edited_head(bench, number: int, scale: float = 1.0):
    """An edit of one head's weights alone, which costs the tokens something, and the head."""
    space = bench.loss.space
    part = localise.heads(space, localise.head_layout(bench.loss.module))[number]
    g = torch.Generator().manual_seed(number)
    moved = scale * torch.randn(space.size, generator=g) * part.mask
    return edits.from_delta(bench.movement.base, moved, "planted"), part


@pytest.mark.parametrize("number", range(4))
def test_both_sides_name_the_head_whose_weights_alone_were_edited(bench, number: int) -> None:
    edit, part = edited_head(bench, number)
    # Tokens that the edit hurts, so that the damage is positive whatever was drawn.
    members = (bench.damage(edit).change > 0).numpy()
    before = bench.loss.space.read(bench.loss.module).clone()
    found = patching.head_map(bench, edit, members)
    assert torch.equal(bench.loss.space.read(bench.loss.module), before)
    planted = found.effects[number]
    assert (planted.layer, f"head {planted.head}") == (part.layer, part.name)
    four = planted.weights, planted.weights_left, planted.output, planted.output_left
    assert four == pytest.approx((1, 1, 1, 1), abs=1e-4)
    for other in found.effects:
        if other is not planted:
            assert (other.weights, other.weights_left) == pytest.approx((0, 0), abs=1e-6)
        # Heads beside it and before it write what they wrote; later ones read another stream.
        if other is not planted and other.layer <= planted.layer:
            assert (other.output, other.output_left) == pytest.approx((0, 0), abs=1e-4)
    assert found.alone.same_top
    assert (found.together, found.together_left) == pytest.approx((1.0, 1.0), abs=1e-4)


def test_columns_of_the_output_map_are_seen_though_mixed_values_stay(bench) -> None:
    space = bench.loss.space
    _, part = edited_head(bench, 2)
    only_out = part.mask & space.mask(["blocks.1.attn.out.weight"])
    moved = torch.randn(space.size, generator=torch.Generator().manual_seed(9)) * only_out
    edit = edits.from_delta(bench.movement.base, moved, "planted")
    members = (bench.damage(edit).change > 0).numpy()
    found = patching.head_map(bench, edit, members)
    assert [round(e.output, 3) for e in found.effects] == [0, 0, 1, 0]


def test_an_edit_without_damage_has_no_heads(bench) -> None:
    nothing = edits.from_delta(bench.movement.base, torch.zeros(bench.loss.space.size), "nothing")
    with pytest.raises(ValueError, match="must be positive"):
        patching.head_map(bench, nothing, np.ones(bench.tokens.count, dtype=bool))


def test_rank_agreement_is_spearmans_and_its_p_that_of_all_pairings() -> None:
    g = np.random.default_rng(9)
    one, two = g.normal(size=7).tolist(), g.normal(size=7).round(0).tolist()
    found = patching.rank_agreement(one, two)
    assert found.rho == pytest.approx(spearmanr(one, two).statistic, abs=1e-9)
    first, second = rankdata(one) - 4, rankdata(two) - 4
    every = np.array(list(itertools.permutations(second))) @ first
    exact = float(np.mean(every >= second @ first - 1e-9))
    assert 0.1 < exact < 0.4
    assert found.p == pytest.approx(exact, abs=0.02)
    assert patching.rank_agreement([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).p == 1.0
    with pytest.raises(ValueError, match="at least three heads"):
        patching.rank_agreement([1.0, 2.0], [1.0, 2.0])


def test_heads_need_hooks(bench) -> None:
    module = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="with hooks"):
        patching._hooks_of(module, "hook_z$")
