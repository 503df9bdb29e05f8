"""Random models of a few thousand weights in the layouts that transformers saves, by architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf

VOCABULARY = 61
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "pad_token_id": None}


def gpt2(**more: Any) -> Any:
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**{**_TOKENS, **sizes, **more}))


def neox(**more: Any) -> Any:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**{**_TOKENS, **_SIZES, **more}))


def llama(**more: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**_TOKENS, **_GROUPED, **more}))


def qwen2(**more: Any) -> Any:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**{**_TOKENS, **_GROUPED, **more}))


def mistral(**more: Any) -> Any:
    return hf.MistralForCausalLM(hf.MistralConfig(**{**_TOKENS, **_GROUPED, "sliding_window": 8, **more}))


def opt(**more: Any) -> Any:
    own = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 32}
    own |= {"max_position_embeddings": 32, "word_embed_proj_dim": 16, "pad_token_id": 1}
    return hf.OPTForCausalLM(hf.OPTConfig(**{**_TOKENS, **own, **more}))


def gemma2(**more: Any) -> Any:
    own = {**_GROUPED, "head_dim": 4, "sliding_window": 8}
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**{**_TOKENS, **own, **more}))


def mamba(**more: Any) -> Any:
    own = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0}
    return hf.MambaForCausalLM(hf.MambaConfig(**{**_TOKENS, **own, **more}))


def bloom(**more: Any) -> Any:
    return hf.BloomForCausalLM(
        hf.BloomConfig(**{**_TOKENS, "hidden_size": 16, "n_layer": 2, "n_head": 4, **more})
    )


def mixtral(**more: Any) -> Any:
    own = {**_GROUPED, "num_local_experts": 4}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**{**_TOKENS, **own, **more}))


#: The eight architectures whose losses are compared with the library's own.
ARCHITECTURES: dict[str, Callable[..., Any]] = {
    "gpt2": gpt2,
    "neox": neox,
    "llama": llama,
    "qwen2": qwen2,
    "mistral": mistral,
    "opt": opt,
    "gemma2": gemma2,
    "mamba": mamba,
}


def made(make: Callable[..., Any], seed: int, **more: Any) -> Any:
    """A model drawn from a seed, in evaluation mode; its weights are larger than at a usual start."""
    torch.manual_seed(seed)
    model = make(**more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def folders(
    root: Path, make: Callable[..., Any] = llama, steps: Sequence[int] = (100, 200, 1000), **more: Any
) -> dict[int, Any]:
    """``checkpoint-STEP`` folders of different models under a root, and step -> model."""
    models = {step: made(make, step, **more) for step in steps}
    for step, model in models.items():
        model.save_pretrained(root / f"checkpoint-{step}")
    return models


def plain_weights(model: torch.nn.Module) -> torch.Tensor:
    """The model's own parameters, each once, in its own order: what a checkpoint must give back."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
