"""Hugging Face models made ready for derivatives: bridges, attention without fused kernels, adapters.

Fused attention kernels have no forward-mode derivative. Nothing is downloaded; folders are local.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from polca_edit.checkpoints.files import read_weights, stored_header, write_tensors
from polca_edit.checkpoints.huggingface import AdapterStart, adapter_settings
from polca_edit.checkpoints.tensor_names import is_old_buffer, stored_names, unwrapped
from polca_edit.derivatives.routes import lacks_forward_mode
from polca_edit.derivatives.settled import require_settled
from polca_edit.models import bridge_around
from polca_edit.parameters import ParameterSpace, call_with
from polca_edit.tokens import TokenLossFunction, next_token_loss
from polca_edit.training import callers_generators


def load_causal_lm(folder: Path | str, *, attention: str | None = "eager") -> nn.Module:
    """``AutoModelForCausalLM`` from a local folder, in float32, with eager attention, no cache.

    Every weight comes from the files. Marks of wrappers (``_orig_mod.``, ``module.``) are stripped; a
    parameter that is then still missing is an error, where transformers would draw it at random.

    Args:
        folder: holds config.json and the weights.
        attention: implementation; None takes the library's own choice.

    Raises:
        ValueError: if the folder holds no model that transformers can build, or not all of its weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"a model folder must hold a config.json, '{folder}' does not; check the path")
    shapes: dict[str, tuple[int, ...]] = {}
    given: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
    if attention is not None:
        given["attn_implementation"] = attention
    try:
        with callers_generators(), _quiet():
            AutoConfig.from_pretrained(folder)
            shapes = _floating_shapes(folder)
            model, info = AutoModelForCausalLM.from_pretrained(folder, **given)
            if info["missing_keys"] and (names := _own_names(model, shapes)):
                with TemporaryDirectory() as copy:
                    shutil.copyfile(folder / "config.json", Path(copy, "config.json"))
                    held = read_weights(folder)
                    write_tensors(
                        Path(copy, "model.safetensors"), {new: held[old] for old, new in names.items()}
                    )
                    model, info = AutoModelForCausalLM.from_pretrained(copy, **given)
    except Exception as error:  # transformers raises a dozen kinds for folders it cannot build
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"'{folder}' must be a causal language model for transformers ({first})") from error
    _refuse_invented(folder, info, shapes)
    model.config.use_cache = False
    result: nn.Module = model.eval()
    return result


def _own_names(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Stored name -> the library's own, where the names that wrappers or old releases gave can be told."""
    found = stored_names(shapes, ParameterSpace.from_module(model))
    if found.complete:
        return {**{stored: slot for slot, stored in found.slots.items()}, **found.others}
    bare = unwrapped(shapes, model.state_dict())
    # What is left may still be an old name that transformers itself knows.
    return dict(bare.names) if bare.prefixes else {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block transformers' own loading report is not printed: what it says is read instead."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


def _floating_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors; quantised numbers are refused, which a cast would take at face value."""
    header = stored_header(folder)
    for name, (dtype, shape) in header.items():
        whole = "int" in dtype or dtype == "bool" or dtype.startswith("float8")
        if whole and name.endswith(("weight", "bias")) and not is_old_buffer(name, shape):
            raise ValueError(
                f"weights must be stored as floating-point numbers of at least 16 bits, '{name}' in "
                f"'{folder}' is {dtype}, which means nothing without its scales; dequantise the model first"
            )
    return {name: shape for name, (_, shape) in header.items()}


def _refuse_invented(folder: Path, info: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """An error for every parameter that did not come from the files, and every tensor that went nowhere."""
    mismatched = sorted(entry[0] for entry in info["mismatched_keys"])
    missing = sorted(info["missing_keys"]) + mismatched
    if missing:
        kind = "has another shape" if missing[0] in mismatched else "is missing"
        raise ValueError(
            f"every parameter must come from the files, '{missing[0]}' {kind} in '{folder}'"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}; transformers would draw it at "
            "random: save the whole model, or repair the names"
        )
    extra = sorted(name for name in info["unexpected_keys"] if not is_old_buffer(name, shapes.get(name, ())))
    if extra:
        raise ValueError(
            f"every stored tensor must belong to the model of config.json, '{extra[0]}' in '{folder}' does "
            f"not{f' (and {len(extra) - 1} more)' if len(extra) > 1 else ''}; is the config another model's?"
        )


def load_bridge(folder: Path | str) -> nn.Module:
    """A ``TransformerBridge`` around the model in a local folder."""
    return bridge_around(load_causal_lm(folder))


def vocabulary_and_context(model: nn.Module) -> tuple[int, int | None]:
    """(vocabulary size, longest sequence) of a model's config; None where no length is too long (Mamba).

    Raises:
        ValueError: if the config does not name a vocabulary.
    """
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    lengths = (getattr(config, n, None) for n in ("max_position_embeddings", "n_positions", "n_ctx"))
    length = next((value for value in lengths if value is not None), None)
    if size is None:
        raise ValueError(
            f"a model config must name its vocabulary (vocab_size), that of {type(model).__name__} does not; "
            "set it in config.json"
        )
    return int(size), None if length is None else int(length)


def plain_attention(token_loss: TokenLossFunction) -> TokenLossFunction:
    """The same loss with torch's fused attention replaced by its written-out form.

    ``scaled_dot_product_attention`` picks a fused kernel, which has neither a forward-mode nor a
    second derivative; its ``MATH`` backend has both.
    """

    @wraps(token_loss)  # keeps the parameter ``slots`` of a loss that has one
    def loss(module: nn.Module, inputs: Tensor, *slots: Tensor, **named: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return token_loss(module, inputs, *slots, **named)

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
    with torch's own attention written out (:func:`plain_attention`); where the model has no forward mode at
    all (a fused scan), two derivatives in reverse mode.

    Args:
        module: the model; only its attention implementation may change, never a weight.
        inputs: a small batch.
        token_loss: the loss that will be differentiated.
        space: parameters; default all trainable ones.

    Raises:
        ValueError: where nothing helps, with the remedy, and for a model that is not ready: in training
            mode with dropout or batch statistics, or random.
    """
    space = ParameterSpace.from_module(module) if space is None else space
    require_settled(module, token_loss, inputs)
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
    second = _second_derivative_error(module, space, inputs, token_loss)
    if second is None:
        return token_loss, f"no forward mode ({problem}): reverse mode twice is used, several times slower"
    raise ValueError(
        f"token losses must have forward-mode or second derivatives, this model's have neither ({problem}; "
        f"{second}); write the operation in plain torch"
    )


def _second_derivative_error(
    module: nn.Module, space: ParameterSpace, inputs: Tensor, token_loss: TokenLossFunction
) -> str | None:
    """What stands in the way of route ``double_backward``, None where it works.

    A backward pass that is marked as differentiable once leaves its part out of second derivatives without
    a word, so a product with the Hessian is compared with the difference of two gradients.
    """
    theta = space.read(module)
    draw = torch.Generator().manual_seed(0)
    vector = torch.randn(theta.shape, generator=draw, dtype=torch.float64).to(theta)
    vector *= 1e-3 * theta.norm() / vector.norm()

    def gradient(point: Tensor) -> Tensor:
        values = space.unflatten(point)
        loss = call_with(module, space, values, token_loss, inputs).mean()
        (found,) = torch.autograd.grad(loss, [point], create_graph=True, materialize_grads=True)
        return found

    try:
        here = theta.clone().requires_grad_()
        (product,) = torch.autograd.grad(gradient(here) @ vector, [here], materialize_grads=True)
        ahead, behind = (gradient((theta + s * vector).requires_grad_()).detach() for s in (1.0, -1.0))
    except (NotImplementedError, RuntimeError) as error:
        return str(error).splitlines()[0]
    expected = (ahead - behind) / 2
    apart = float((product - expected).norm())
    if not apart <= 0.01 * float(expected.norm()) + 1e-5 * float(ahead.norm()):
        return "second derivatives in reverse mode leave a part out"
    return None


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
        if not lacks_forward_mode(error):
            raise
        return str(error).splitlines()[0][:160]
    return None


# -- adapters ---------------------------------------------------------------------------------------


def load_adapted(base: Path | str, adapter: Path | str) -> nn.Module:
    """A pretrained model with a trainable adapter (LoRA and others of PEFT) around it.

    The adapter is made anew on the pretrained model, which is where its training began (PiSSA and OLoRA
    change the pretrained weights then), and its stored weights are put in. Only the adapter's parameters
    require a gradient, so they are the parameter space.

    Raises:
        ValueError: without the package ``peft``, or for folders that do not fit each other.
    """
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise ValueError("adapter checkpoints need the package 'peft'; pip install peft") from error
    base, adapter = Path(base), Path(adapter)
    settings = adapter_settings(adapter)
    try:
        with callers_generators():
            plain = load_causal_lm(base)
            config = PeftConfig.from_pretrained(str(adapter))
            config.inference_mode = False
            model: nn.Module = get_peft_model(plain, config)
            space = ParameterSpace.from_module(model)
            start = space.read(model)
            stored = read_weights(adapter)
            names = stored_names({name: tuple(t.shape) for name, t in stored.items()}, space)
            if (problem := names.problem()) is not None:
                raise ValueError(f"the adapter in '{adapter}' does not fit: {problem}; save it again")
            space.write(model, space.flatten(names.renamed(stored), dtype=start.dtype))
    except (RuntimeError, KeyError, OSError, TypeError) as error:
        raise ValueError(f"the adapter in '{adapter}' must fit the model in '{base}' ({error})") from error
    model.adapter_start = AdapterStart(base, start, settings.get("init_lora_weights"))  # type: ignore[assignment]
    return model.eval()
