"""The loss of every opened checkpoint beside that of the library which owns its format.

The weights, the names they go under, and everything that stands beside them (config, buffers, precision)
enter a loss. Where ours and the library's own agree on a few sequences, all of them were read right.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polca_edit.checkpoints.huggingface import AdapterStart, is_adapter
from polca_edit.checkpoints.huggingface_models import load_causal_lm, vocabulary_and_context
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import next_token_loss

#: Largest difference of the two mean losses, nats. Kernels in float32 differ by about 1e-6.
LARGEST_DIFFERENCE = 1e-4
SEQUENCES, LENGTH = 4, 24
#: Keys of a config that do not change what the model computes.
_INERT = (
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "_attn_implementation_internal",
    "_commit_hash",
)


@dataclass(frozen=True)
class Agreement:
    """Mean loss of one checkpoint on the same sequences, read twice.

    Attributes:
        name: of the checkpoint.
        ours: nats per token with the weights as this package reads them, in the module at hand.
        library: nats per token that the owning library reports for the folder.
        differing: settings of the folder's config.json that are not the module's.
    """

    name: str
    ours: float
    library: float
    differing: tuple[str, ...] = ()

    @property
    def difference(self) -> float:
        """Distance of the two, nats per token."""
        return abs(self.ours - self.library)

    def require(self) -> None:
        """Nothing where the two agree.

        Raises:
            ValueError: naming both losses where they do not.
        """
        if not self.difference <= LARGEST_DIFFERENCE:
            why = f" (its config differs in {', '.join(self.differing)})" if self.differing else ""
            raise ValueError(
                f"a checkpoint must have the loss that its own library gives it, '{self.name}' has "
                f"{self.ours:.6f} nats per token here and {self.library:.6f} in transformers{why}; weights "
                "or settings were not read right, open it with the model of this very folder"
            )


def comparable(module: nn.Module | None) -> bool:
    """Whether a module is one that transformers would load, or a bridge around one."""
    return isinstance(getattr(getattr(module, "config", None), "vocab_size", None), int)


def probe_inputs(module: nn.Module) -> Int[Tensor, "S L"]:
    """A few sequences of random ids, the same each time."""
    vocabulary, context = vocabulary_and_context(module)
    length = LENGTH if context is None else min(LENGTH, context)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (SEQUENCES, length), generator=generator)


def own_loss(module: nn.Module, space: ParameterSpace, theta: Float[Tensor, " N"]) -> float:
    """Mean loss of the probe sequences at the given weights, nats; the module is left as it was."""
    device = next(module.parameters()).device
    inputs = probe_inputs(module).to(device)
    with torch.no_grad(), evaluating(module), space.substituted(module, theta):
        return float(next_token_loss(module, inputs).double().mean())


def library_loss(folder: Path, start: AdapterStart | None = None) -> float:
    """The mean loss that transformers reports for a folder on the probe sequences, nats.

    Args:
        folder: a model, or an adapter.
        start: where an adapter began; its base is loaded below the adapter.
    """
    if is_adapter(folder):
        assert start is not None
        from peft import PeftModel

        model = PeftModel.from_pretrained(load_causal_lm(start.base, attention=None), str(folder)).eval()
    else:
        model = load_causal_lm(folder, attention=None)
    inputs = probe_inputs(model)
    with torch.no_grad():
        return float(model(input_ids=inputs, labels=inputs).loss)


def compare(
    name: str,
    folder: Path,
    module: nn.Module,
    space: ParameterSpace,
    tensors: Mapping[str, Tensor],
    start: AdapterStart | None = None,
) -> Agreement:
    """Both losses of one checkpoint.

    Args:
        name: for messages.
        folder: what the library opens.
        module: the model that will be used at these weights.
        space: its parameters.
        tensors: the checkpoint's weights as read.
        start: of adapters.
    """
    ours = own_loss(module, space, space.flatten(tensors, dtype=torch.float32))
    return Agreement(name, ours, library_loss(folder, start), differing_settings(module, folder))


def differing_settings(module: nn.Module, folder: Path) -> tuple[str, ...]:
    """``key (folder's value, module's value)`` for settings of config.json that the module has otherwise."""
    config = getattr(module, "config", None)
    path = folder / "config.json"
    if config is None or not hasattr(config, "to_dict") or not path.exists():
        return ()
    held: dict[str, Any] = config.to_dict()
    try:
        given = json.loads(path.read_text())
    except ValueError:
        return ()
    return tuple(
        f"{key} ({given[key]} there, {held[key]} in the model)"
        for key in sorted(given)
        if key in held and key not in _INERT and given[key] != held[key]
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the block every part of the module is in evaluation mode; afterwards each is as it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
