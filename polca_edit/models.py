"""Build or load models, and hook them. The only module that imports TransformerLens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from polca_edit.training import callers_generators


@dataclass(frozen=True)
class TransformerShape:
    """Shape of a decoder-only transformer with LayerNorm, biases and untied (un)embeddings.

    ``init_std`` is the standard deviation of initial matrices; None means 0.8 / sqrt(d_model). A ``d_mlp`` of
    zero leaves MLPs and their norms out (attention only).
    """

    layers: int
    d_model: int
    heads: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    d_vocab_out: int | None = None
    init_std: float | None = None


class Attention(nn.Module):
    """Causal multi-head attention written out, because fused kernels have no forward-mode derivative."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query = nn.Linear(shape.d_model, shape.d_model)
        self.key = nn.Linear(shape.d_model, shape.d_model)
        self.value = nn.Linear(shape.d_model, shape.d_model)
        self.out = nn.Linear(shape.d_model, shape.d_model)
        self.hook_pattern = HookPoint()
        self.hook_z = HookPoint()
        self.causal: Tensor
        causal = torch.full((shape.n_ctx, shape.n_ctx), -math.inf).triu(1)
        self.register_buffer("causal", causal, persistent=False)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix positions, each seeing itself and earlier ones."""
        batch, length, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = query @ key.transpose(-1, -2) / math.sqrt(width // self.heads)
        pattern = self.hook_pattern((scores + self.causal[:length, :length]).softmax(-1))
        mixed = self.hook_z((pattern @ value).transpose(1, 2))
        return self.out(mixed.reshape(batch, length, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One pre-LayerNorm transformer block."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(shape.d_model)
        self.attn = Attention(shape)
        self.hook_attn_out = HookPoint()
        self.mlp: nn.Sequential | None = None
        if shape.d_mlp:
            self.ln2 = nn.LayerNorm(shape.d_model)
            self.mlp = nn.Sequential(
                nn.Linear(shape.d_model, shape.d_mlp), nn.GELU(), nn.Linear(shape.d_mlp, shape.d_model)
            )
            self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Attention, then MLP, each added to the residual stream."""
        x = x + self.hook_attn_out(self.attn(self.ln1(x)))
        if self.mlp is not None:
            x = x + self.hook_mlp_out(self.mlp(self.ln2(x)))
        return self.hook_resid_post(x)  # type: ignore[no-any-return]


class SmallTransformer(HookedRootModule):  # type: ignore[misc]
    """The paper's model: output bias, separate output vocabulary, hooks, no fused kernels.

    With (3, 512, 4, 2048, vocabulary 12, context 12, 10 outputs) it has exactly 9,475,594
    parameters, with (3, 512, 4, 2048, 30001, 128) exactly 40,274,737 (arXiv 2506.15872, Tables 3, 6).
    """

    def __init__(self, shape: TransformerShape, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.d_vocab, shape.d_model)
        self.pos_embed = nn.Embedding(shape.n_ctx, shape.d_model)
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.ln_final = nn.LayerNorm(shape.d_model)
        self.unembed = nn.Linear(shape.d_model, shape.d_vocab_out or shape.d_vocab)
        self._initialise(generator)
        self.setup()

    def _initialise(self, generator: torch.Generator | None) -> None:
        given = self.shape.init_std
        std = 0.8 / math.sqrt(self.shape.d_model) if given is None else given
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if name.endswith("bias"):
                    parameter.zero_()
                elif parameter.ndim == 2:
                    parameter.normal_(0.0, std, generator=generator)

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B S V"]:
        """Logits at every position, or at the slots that the caller gathers before the head."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.hook_embed(self.embed(tokens) + self.pos_embed(positions))
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.ln_final(x))  # type: ignore[no-any-return]


def build_small_transformer(shape: TransformerShape, seed: int) -> SmallTransformer:
    """A freshly initialised plain model; the same seed gives the same bytes."""
    with callers_generators():  # torch's layers draw from the global one before theirs is used
        model = SmallTransformer(shape, torch.Generator().manual_seed(seed))
    model.eval()
    return model


def build_native_bridge(shape: TransformerShape, seed: int) -> nn.Module:
    """A native ``TransformerBridge`` of the given shape (no output bias, one vocabulary).

    Raises:
        ValueError: if the shape wants a separate output vocabulary, which the bridge does not have.
    """
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    if shape.d_vocab_out not in (None, shape.d_vocab):
        raise ValueError(
            f"a native bridge has one vocabulary, got d_vocab_out={shape.d_vocab_out}; use the plain model"
        )
    config = TransformerBridgeConfig(
        d_model=shape.d_model,
        d_head=shape.d_model // shape.heads,
        n_layers=shape.layers,
        n_ctx=shape.n_ctx,
        n_heads=shape.heads,
        d_vocab=shape.d_vocab,
        d_mlp=shape.d_mlp,
        act_fn="gelu",
        seed=seed,
    )
    with callers_generators():
        bridge: nn.Module = TransformerBridge.boot_native(config)
    return bridge.eval()


def bridge_around(model: nn.Module, tokenizer: Any = None) -> nn.Module:
    """A ``TransformerBridge`` around a loaded Hugging Face model (nothing is downloaded).

    The bridge rebuilds the model in place. Where it splits a joint attention weight into query, key
    and value, the joint parameter stays as a second name for the same memory that no forward pass
    reads; it is frozen here, so that a :class:`~polca_edit.parameters.ParameterSpace` leaves it out.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    with callers_generators():
        bridge: nn.Module = build_bridge_from_module(
            model, type(model).__name__, hf_config=model.config, tokenizer=tokenizer
        )
    for path, submodule in bridge.named_modules():
        if path.endswith(".qkv"):
            submodule.requires_grad_(False)
    return bridge.eval()


def hook_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the activations that hooks can reach; empty for a module without TransformerLens hooks."""
    return tuple(getattr(module, "hook_dict", {}))


def cached_activations(module: nn.Module, inputs: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Activations at the named hook points for one batch.

    Raises:
        ValueError: if the module has no such hook.
    """
    _require_hooks(module, names)
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: HookPoint) -> None:
        kept[hook.name] = value.detach().clone()

    with torch.no_grad():
        module.run_with_hooks(inputs, fwd_hooks=[(name, keep) for name in names])  # type: ignore[operator]
    return kept


@contextmanager
def replaced_activations(
    module: nn.Module, replacements: dict[str, Callable[[Tensor], Tensor]]
) -> Iterator[nn.Module]:
    """Within the block, each named activation is passed through its function.

    Raises:
        ValueError: if the module has no such hook.
    """
    _require_hooks(module, list(replacements))

    def hook_for(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, HookPoint], Tensor]:
        return lambda value, hook: function(value)

    pairs = [(name, hook_for(function)) for name, function in replacements.items()]
    with module.hooks(fwd_hooks=pairs):  # type: ignore[operator]
        yield module


def _require_hooks(module: nn.Module, names: Sequence[str]) -> None:
    known = set(hook_names(module))
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(
            f"hook names must exist in the model, got {missing}; known are {sorted(known)[:5]} and others"
        )
