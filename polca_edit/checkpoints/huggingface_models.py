"""Hugging Face models made ready for derivatives: bridges, attention without fused kernels, adapters.

Fused attention kernels have no forward-mode derivative. Nothing is downloaded; folders are local.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from polca_edit.models import bridge_around
from polca_edit.parameters import ParameterSpace, call_with
from polca_edit.tokens import TokenLossFunction, next_token_loss
from polca_edit.training import callers_generators


def load_causal_lm(folder: Path | str) -> nn.Module:
    """``AutoModelForCausalLM`` from a local folder, in float32, with eager attention, no cache.

    Raises:
        ValueError: if the folder holds no model that transformers can build.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"a model folder must hold a config.json, '{folder}' does not; check the path")
    try:
        with callers_generators():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"'{folder}' must be a causal language model for transformers ({first})") from error
    model.config.use_cache = False
    result: nn.Module = model.eval()
    return result


def load_bridge(folder: Path | str) -> nn.Module:
    """A ``TransformerBridge`` around the model in a local folder."""
    return bridge_around(load_causal_lm(folder))


def load_tokenizer(folder: Path | str) -> Any:
    """The folder's fast tokenizer (a ``tokenizers.Tokenizer``), or None where there is none."""
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file.exists() else None


def vocabulary_and_context(model: nn.Module) -> tuple[int, int]:
    """(vocabulary size, longest sequence) of a model's config.

    Raises:
        ValueError: if the config does not say.
    """
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    length = next(
        (
            value
            for name in ("max_position_embeddings", "n_positions", "n_ctx")
            if (value := getattr(config, name, None)) is not None
        ),
        None,
    )
    if size is None or length is None:
        raise ValueError(
            f"a model config must name vocabulary and context, that of {type(model).__name__} does not"
        )
    return int(size), int(length)


def plain_attention(token_loss: TokenLossFunction) -> TokenLossFunction:
    """The same loss with torch's fused attention replaced by its written-out form.

    ``scaled_dot_product_attention`` picks a fused kernel, which has neither a forward-mode nor a
    second derivative; its ``MATH`` backend has both.
    """

    def loss(module: nn.Module, inputs: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return token_loss(module, inputs)

    return loss


def ready_for_derivatives(
    module: nn.Module,
    inputs: Int[Tensor, "B L"],
    token_loss: TokenLossFunction = next_token_loss,
    *,
    space: ParameterSpace | None = None,
) -> tuple[TokenLossFunction, str]:
    """A loss whose forward-mode derivatives work, and what had to be done for that.

    One directional derivative is tried; then with the model's attention switched to ``eager``; then
    with torch's own attention written out (:func:`plain_attention`).

    Args:
        module: the model; only its attention implementation may change, never a weight.
        inputs: a small batch.
        token_loss: the loss that will be differentiated.
        space: parameters; default all trainable ones.

    Raises:
        ValueError: where nothing helps, with the remedy.
    """
    space = ParameterSpace.from_module(module) if space is None else space
    problem = _forward_mode_error(module, space, inputs, token_loss)
    if problem is None:
        return token_loss, "ready"
    switch = getattr(module, "set_attn_implementation", None)
    if switch is not None:
        switch("eager")
        if _forward_mode_error(module, space, inputs, token_loss) is None:
            return token_loss, "switched to eager attention"
    if _forward_mode_error(module, space, inputs, plain_attention(token_loss)) is None:
        return plain_attention(token_loss), "torch's fused attention written out"
    raise ValueError(
        f"token losses must have forward-mode derivatives, this model's have none ({problem}); write the "
        "operation in plain torch, or use Objective(route='double_backward') where it has second derivatives"
    )


def _forward_mode_error(
    module: nn.Module, space: ParameterSpace, inputs: Tensor, token_loss: TokenLossFunction
) -> str | None:
    values = {name: tensor.clone() for name, tensor in space.unflatten(space.read(module)).items()}

    def losses(given: dict[str, Tensor]) -> Float[Tensor, "..."]:
        result: Tensor = call_with(module, space, given, token_loss, inputs)
        return result

    try:
        with torch.no_grad():
            torch.func.jvp(losses, (values,), ({n: torch.ones_like(t) for n, t in values.items()},))
    except (NotImplementedError, RuntimeError) as error:
        message = str(error).splitlines()[0]
        if "forward" not in message and "jvp" not in message:
            raise
        return message
    return None


# -- adapters ---------------------------------------------------------------------------------------


def load_adapted(base: Path | str, adapter: Path | str) -> nn.Module:
    """A pretrained model with a trainable adapter (LoRA and others of PEFT) around it.

    Only the adapter's parameters require a gradient, so they are the parameter space.

    Raises:
        ValueError: without the package ``peft``, or for folders that do not fit each other.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError("adapter checkpoints need the package 'peft'; pip install peft") from error
    if not (Path(adapter) / "adapter_config.json").exists():
        raise ValueError(f"an adapter folder must hold an adapter_config.json, '{adapter}' does not")
    try:
        with callers_generators():
            model: nn.Module = PeftModel.from_pretrained(
                load_causal_lm(base), str(adapter), is_trainable=True
            )
    except (RuntimeError, KeyError, OSError) as error:
        raise ValueError(f"the adapter in '{adapter}' must fit the model in '{base}' ({error})") from error
    return model.eval()
