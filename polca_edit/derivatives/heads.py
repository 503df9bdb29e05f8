"""Logits of chosen positions only: hidden states are gathered before the output layer of a language model.

Where 16 of 63 positions are scored and the vocabulary is large, most of a model's time and memory goes
into logits that nobody reads. A forward pre-hook on the output layer hands it the wanted positions alone,
so everything behind it (a bias, a soft cap, the cross-entropy) sees only those.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

#: Attributes that hold the output layer where a module has no ``get_output_embeddings``.
HEADS = ("unembed", "lm_head", "embed_out")
#: Logits whose cross-entropy is formed at once; torch keeps a second table of their size meanwhile.
CHUNK = 1 << 24

#: ``loss(module, inputs, slots)`` -> (B, R) nats at the R named prediction slots of every sequence.
SlotLoss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def output_layer(module: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, None where none is known.

    >>> layer = nn.Linear(2, 3)
    >>> model = nn.Module()
    >>> model.lm_head = layer
    >>> output_layer(model) is layer, output_layer(layer)
    (True, None)
    """
    named = getattr(module, "get_output_embeddings", None)
    if callable(named):
        try:
            found = named()
        except (AttributeError, NotImplementedError):
            found = None
        if isinstance(found, nn.Module):
            return found
    candidates = (getattr(module, name, None) for name in HEADS)
    return next((found for found in candidates if isinstance(found, nn.Module)), None)


@dataclass
class Gathered:
    """Whether the output layer was called once, with the wanted positions alone."""

    calls: int = 0


@contextmanager
def gathered_before_head(module: nn.Module, slots: Int[Tensor, "B R"]) -> Iterator[Gathered]:
    """Within the block the output layer sees only the hidden states at ``slots`` of every sequence.

    Nothing happens where the module has no known output layer or its input is not (B, L, D): the
    yielded record then counts no call, and logits are those of all positions.
    """
    head, record = output_layer(module), Gathered()
    if head is None:
        yield record
        return

    def gather(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = given[0] if given else None
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or len(hidden) != len(slots):
            return None
        record.calls += 1
        index = slots[:, :, None].expand(-1, -1, hidden.shape[2])
        return (hidden.gather(1, index), *given[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield record
    finally:
        handle.remove()


def cross_entropy(logits: Float[Tensor, "B P V"], targets: Int[Tensor, "B P"]) -> Float[Tensor, "B P"]:
    """Cross-entropy in nats of every position, a few sequences at a time where the vocabulary is large.

    >>> round(float(cross_entropy(torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.long))), 4)
    1.3863
    """
    many = max(1, CHUNK // max(1, logits[0].numel()))
    parts = [
        nn.functional.cross_entropy(some.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
        for some, wanted in zip(logits.split(many), targets.split(many), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def takes_slots(token_loss: Callable[..., Tensor]) -> bool:
    """Whether a token loss can be asked for chosen prediction slots alone (a parameter ``slots``).

    >>> takes_slots(lambda module, inputs: inputs), takes_slots(lambda module, inputs, slots=None: inputs)
    (False, True)
    """
    try:
        return "slots" in inspect.signature(token_loss).parameters
    except (TypeError, ValueError):
        return False


def at_slots(token_loss: Callable[..., Tensor]) -> SlotLoss:
    """The same loss at chosen slots: asked for them where it can be, else gathered from all of them."""
    if takes_slots(token_loss):
        return token_loss

    def gathered(module: nn.Module, inputs: Tensor, slots: Tensor) -> Tensor:
        return token_loss(module, inputs).gather(1, slots)

    return gathered
