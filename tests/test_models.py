"""Models: the paper's parameter counts, seeds, hooks."""

from __future__ import annotations

import pytest
import torch
from oracles import tiny_bridge, tiny_gpt2
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from experiments.tasks.arithmetic import PAPER_PARAMETERS, PAPER_SHAPE
from polca_edit.models import (
    SmallTransformer,
    TransformerShape,
    bridge_around,
    build_native_bridge,
    build_small_transformer,
    cached_activations,
    hook_names,
    replaced_activations,
)
from polca_edit.parameters import ParameterSpace, parameter_slots

TINY = TransformerShape(2, 8, 2, 16, 12, 12, 10)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def flat_bytes(module: nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for _, p in parameter_slots(module))


def test_paper_arithmetic_model_has_its_parameters():
    assert count(build_small_transformer(PAPER_SHAPE, 0)) == 9_475_594 == PAPER_PARAMETERS


def test_paper_english_model_has_its_parameters():
    with torch.device("meta"):
        model = SmallTransformer(TransformerShape(3, 512, 4, 2048, 30_001, 128))
    assert count(model) == 40_274_737


@pytest.mark.parametrize(
    "build", [lambda seed: build_small_transformer(TINY, seed), lambda seed: tiny_bridge(seed=seed)]
)
def test_seed_decides_every_byte(build):
    first = flat_bytes(build(3))
    torch.manual_seed(99)  # the global generator has no say
    torch.rand(7)
    assert flat_bytes(build(3)) == first
    assert flat_bytes(build(4)) != first


def reference_forward(model: SmallTransformer, tokens: torch.Tensor) -> torch.Tensor:
    """The same function through torch's fused attention and one functional call per layer."""
    f = nn.functional
    length, width = tokens.shape[1], model.shape.d_model
    x = model.embed.weight[tokens] + model.pos_embed.weight[:length]
    for block in model.blocks:
        y = f.layer_norm(x, (width,), block.ln1.weight, block.ln1.bias)
        a = block.attn
        q, k, v = (
            f.linear(y, m.weight, m.bias).unflatten(-1, (a.heads, -1)).transpose(1, 2)
            for m in (a.query, a.key, a.value)
        )
        z = f.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + f.linear(z, a.out.weight, a.out.bias)
        y = f.layer_norm(x, (width,), block.ln2.weight, block.ln2.bias)
        y = f.gelu(f.linear(y, block.mlp[0].weight, block.mlp[0].bias))
        x = x + f.linear(y, block.mlp[2].weight, block.mlp[2].bias)
    x = f.layer_norm(x, (width,), model.ln_final.weight, model.ln_final.bias)
    return f.linear(x, model.unembed.weight, model.unembed.bias)


def test_forward_agrees_with_fused_attention(generator):
    model = build_small_transformer(TINY, 0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    tokens = torch.randint(0, 12, (3, 11), generator=generator)
    assert torch.allclose(model(tokens), reference_forward(model, tokens), rtol=0, atol=1e-12)
    assert model(tokens).shape == (3, 11, 10)


def test_model_is_causal(generator):
    model = build_small_transformer(TINY, 0)
    tokens = torch.randint(0, 12, (1, 10), generator=generator)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 12
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize(
    ("build", "resid", "pattern"),
    [
        (lambda: build_small_transformer(TINY, 0), "blocks.1.hook_resid_post", "blocks.0.attn.hook_pattern"),
        (tiny_bridge, "blocks.0.hook_out", "blocks.0.attn.hook_pattern"),
        (lambda: bridge_around(tiny_gpt2()), "blocks.0.hook_out", "blocks.0.attn.hook_pattern"),
    ],
)
def test_hooks_reach_and_restore(build, resid, pattern, generator):
    model = build()
    tokens = torch.randint(0, 12, (2, 6), generator=generator)
    with torch.no_grad():
        plain = model(tokens)
        assert {resid, pattern} <= set(hook_names(model))
        seen = cached_activations(model, tokens, [resid, pattern])
        assert seen[resid].shape == (2, 6, 8)
        assert torch.allclose(seen[pattern].sum(-1), torch.ones(2, 2, 6), atol=1e-5)
        with replaced_activations(model, {resid: torch.zeros_like}):
            inside = model(tokens)
        # Nothing of the tokens is left behind a zeroed last residual stream.
        assert torch.allclose(inside, inside[:1, :1].expand_as(inside), rtol=0, atol=1e-6)
        assert not torch.allclose(inside, plain, atol=1e-6)
        assert torch.equal(model(tokens), plain)


def test_hooks_are_gone_after_an_exception(generator):
    model = build_small_transformer(TINY, 0)
    tokens = torch.randint(0, 12, (2, 6), generator=generator)
    plain = model(tokens)
    with pytest.raises(KeyError), replaced_activations(model, {"hook_embed": torch.zeros_like}):
        raise KeyError
    assert torch.equal(model(tokens), plain)


def test_unknown_hook_is_an_error():
    model = build_small_transformer(TINY, 0)
    with pytest.raises(ValueError, match="must exist"), replaced_activations(model, {"nowhere": torch.exp}):
        pass
    with pytest.raises(ValueError, match="must exist"):
        cached_activations(model, torch.zeros(1, 3, dtype=torch.long), ["nowhere"])
    assert hook_names(nn.Linear(2, 2)) == ()


def test_native_bridge_refuses_a_separate_output_vocabulary():
    with pytest.raises(ValueError, match="one vocabulary"):
        build_native_bridge(TINY, 0)


def tiny_neox() -> nn.Module:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=13,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
        )
    ).eval()


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_neox])
def test_bridge_around_a_loaded_model_computes_the_same_and_reads_every_parameter(build, generator):
    """No network: the bridge is made from the model's own config."""
    model = build()
    size = count(model)
    tokens = torch.randint(0, 13, (2, 6), generator=generator)
    expected = model(tokens).logits
    bridge = bridge_around(model)
    logits = bridge(tokens)
    assert torch.allclose(logits, expected, rtol=0, atol=1e-6)
    trainable = [p for p in bridge.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == size == ParameterSpace.from_module(bridge).size
    grads = torch.autograd.grad(logits.square().sum(), trainable, allow_unused=True)
    assert all(g is not None for g in grads)
