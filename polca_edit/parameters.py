"""The chosen weights as one flat vector, and the one functional call of the project.

A *slot* is a place in a module where a parameter sits: (module object, attribute name). A tied
parameter sits in several slots and appears once in the flat vector. A submodule registered under
several paths (TransformerLens bridges do this) still has one slot per attribute. The default of
``torch.func.functional_call`` (``tie_weights=True``) swaps such slots twice and leaves the model
changed; ``tie_weights=False`` with one value per parameter *name* leaves tied slots unswapped. One
value per slot, aliases mapped to the same tensor, is right for both.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def parameter_slots(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (dotted slot name, parameter) once for every place a parameter sits."""
    for path, submodule in module.named_modules():
        for name, parameter in submodule.named_parameters(recurse=False, remove_duplicate=False):
            yield (f"{path}.{name}" if path else name), parameter


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Floating-point buffers of a module's state dict (running statistics): no parameters, part of its loss.

    >>> sorted(saved_buffers(nn.BatchNorm1d(2)))
    ['running_mean', 'running_var']
    """
    kept = module.state_dict()
    return {name: b for name, b in module.named_buffers() if name in kept and b.is_floating_point()}


#: How a pattern that means a layer begins.
_LAYER = re.compile(r"\*\.(\d+)\.")


def name_matches(name: str, pattern: str) -> bool:
    """Whether a dotted name matches a shell pattern; one that begins with ``*.N.`` means layer N alone.

    The number of a layer is the first one of a name: parts of a block may be numbered too.

    >>> [name_matches(name, "*.0.*") for name in ("blocks.0.mlp.2.bias", "blocks.1.mlp.0.bias")]
    [True, False]
    """
    layer = _LAYER.match(pattern)
    if layer is not None and next((p for p in name.split(".") if p.isdigit()), None) != layer[1]:
        return False
    return fnmatch.fnmatchcase(name, pattern)


def _refuse_shared_memory(parameters: Mapping[str, nn.Parameter]) -> None:
    """A flat vector cannot hold two values for one memory cell (joint and split attention weights)."""
    sharing: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        if parameter.numel() and not parameter.is_meta:
            sharing.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
    for names in sharing.values():
        if len(names) == 1:
            continue
        storage = parameters[names[0]].untyped_storage()
        taken = torch.zeros(storage.nbytes() // parameters[names[0]].element_size(), dtype=torch.bool)
        for name in names:
            tensor = parameters[name]
            cells = taken.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            if bool(cells.any()):
                raise ValueError(
                    f"parameters must not share memory, '{name}' does with one of {names}; "
                    "freeze one of them with requires_grad_(False)"
                )
            cells.fill_(True)


@dataclass(frozen=True)
class ParameterSpace:
    """Chosen parameters in one canonical flat order; a tied weight counts once.

    Attributes:
        names: canonical name of each parameter (its first slot).
        shapes: shape of each parameter.
        aliases: slot name -> canonical name, for every slot including the canonical one.
        saved_names: further names of the same parameters in the module's state dict -> canonical name
            (TransformerLens bridges save under names that are no slots).
        other_names: what else a state dict of the module may hold: parameters not chosen, buffers.
        unread_patterns: regular expressions of saved names that the module says it does not read
            (Hugging Face: buffers of older releases).
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    aliases: tuple[tuple[str, str], ...]
    saved_names: tuple[tuple[str, str], ...] = ()
    other_names: tuple[str, ...] = ()
    unread_patterns: tuple[str, ...] = ()

    @classmethod
    def from_module(cls, module: nn.Module, include: Sequence[str] = ("*",)) -> ParameterSpace:
        """Collect the floating-point parameters that require a gradient and match a pattern.

        Args:
            module: any ``nn.Module``.
            include: shell-style patterns on slot names; a parameter is in when any slot matches.

        Raises:
            ValueError: if no parameter matches, or two different ones share memory.
        """
        first: dict[int, str] = {}
        kept: dict[str, nn.Parameter] = {}
        slots: dict[str, str] = {}
        chosen: set[str] = set()
        for slot, parameter in parameter_slots(module):
            if not parameter.requires_grad or not parameter.is_floating_point():
                continue
            name = first.setdefault(id(parameter), slot)
            kept[name] = parameter
            slots[slot] = name
            if any(name_matches(slot, pattern) for pattern in include):
                chosen.add(name)
        names = tuple(name for name in kept if name in chosen)
        if not names:
            raise ValueError(
                f"at least one trainable parameter must match, got none for {list(include)}; "
                f"names look like {list(kept)[:3]}"
            )
        _refuse_shared_memory({name: kept[name] for name in names})
        aliases = {slot: name for slot, name in slots.items() if name in chosen}
        state = module.state_dict(keep_vars=True)
        saved = {key: first[id(value)] for key, value in state.items() if first.get(id(value)) in chosen}
        places = (slot for slot, _ in parameter_slots(module))
        others = [*state, *places, *(name for name, _ in module.named_buffers())]
        return cls(
            names,
            tuple(tuple(kept[name].shape) for name in names),
            tuple(aliases.items()),
            tuple((key, name) for key, name in saved.items() if key not in aliases),
            tuple(dict.fromkeys(name for name in others if name not in aliases and name not in saved)),
            tuple(sorted(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())),
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of scalars in each parameter."""
        return tuple(int(torch.Size(shape).numel()) for shape in self.shapes)

    @property
    def size(self) -> int:
        """N, the length of the flat vector."""
        return sum(self.sizes)

    @property
    def offsets(self) -> dict[str, tuple[int, int]]:
        """Parameter name -> (start, stop) in the flat vector."""
        bounds, start = {}, 0
        for name, size in zip(self.names, self.sizes, strict=True):
            bounds[name] = (start, start + size)
            start += size
        return bounds

    def fingerprint(self) -> str:
        """SHA-256 of names and shapes: two spaces agree exactly when this does."""
        text = json.dumps([list(self.names), [list(shape) for shape in self.shapes]])
        return hashlib.sha256(text.encode()).hexdigest()

    def mask(self, include: Sequence[str]) -> Bool[Tensor, " N"]:
        """True on the parameters whose name matches any pattern.

        Raises:
            ValueError: if nothing matches.
        """
        mask = torch.zeros(self.size, dtype=torch.bool)
        for start, stop in self._matched(include):
            mask[start:stop] = True
        return mask

    def count(self, include: Sequence[str]) -> int:
        """How many parameters :meth:`mask` holds, without a vector of N entries.

        >>> ParameterSpace(("a", "b"), ((2, 3), (4,)), (("a", "a"), ("b", "b"))).count(["b"])
        4

        Raises:
            ValueError: if nothing matches.
        """
        return sum(stop - start for start, stop in self._matched(include))

    def _matched(self, include: Sequence[str]) -> list[tuple[int, int]]:
        """Where the parameters lie whose own or tied name matches a pattern."""
        names = {name for slot, name in self.aliases if any(name_matches(slot, p) for p in include)}
        matched = [place for name, place in self.offsets.items() if name in names]
        if not any(start < stop for start, stop in matched):
            raise ValueError(
                f"a parameter subset must match at least one parameter, got {list(include)}; "
                f"names look like {list(self.names)[:3]}"
            )
        return matched

    def flatten(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
    ) -> Float[Tensor, " N"]:
        """One flat vector from named tensors; aliases are accepted where the canonical name is absent.

        Raises:
            ValueError: for a missing, unknown, wrongly shaped or quantised parameter, or a tied one whose
                aliases differ.
        """
        self._refuse_unknown(tensors)
        slots_of: dict[str, list[str]] = {}
        for slot, name in [*self.aliases, *self.saved_names]:
            slots_of.setdefault(name, []).append(slot)
        parts = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            found = [slot for slot in dict.fromkeys([name, *slots_of[name]]) if slot in tensors]
            if not found:
                raise ValueError(
                    f"every parameter must be present, '{name}' is missing; is this another model?"
                )
            tensor = tensors[found[0]]
            _refuse_odd(name, tensor, shape)
            for other in found[1:]:
                if tensors[other] is not tensor and not torch.equal(tensors[other], tensor):
                    raise ValueError(
                        f"a tied parameter must have one value, '{found[0]}' and '{other}' differ; these "
                        "weights are of an untied model, build it with tie_word_embeddings=False"
                    )
            parts.append(tensor.detach().reshape(-1).to(dtype or tensor.dtype))
        return torch.cat(parts)

    def _refuse_unknown(self, tensors: Mapping[str, Tensor]) -> None:
        known = {*dict(self.aliases), *dict(self.saved_names), *self.other_names}
        unread = [re.compile(pattern) for pattern in self.unread_patterns]
        extra = [name for name in tensors if name not in known and not any(r.search(name) for r in unread)]
        if extra:
            raise ValueError(
                f"weights must hold known parameters only, got '{extra[0]}'; is this another model?"
            )

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Named tensors from a flat vector (..., N); differentiable views, leading axes are kept.

        Raises:
            ValueError: if the last axis is not N.
        """
        if flat.shape[-1] != self.size:
            raise ValueError(f"a flat vector must have {self.size} entries, got {flat.shape[-1]}")
        pieces = torch.split(flat, list(self.sizes), dim=-1)
        lead = flat.shape[:-1]
        return {
            name: piece.reshape(*lead, *shape)
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }

    def read(self, module: nn.Module) -> Float[Tensor, " N"]:
        """The module's current weights as a flat vector (a copy)."""
        return self.flatten(dict(parameter_slots(module)))

    def write(self, module: nn.Module, flat: Float[Tensor, " N"]) -> None:
        """Copy a flat vector into the module's parameters, in place."""
        values = self.unflatten(flat)
        seen: set[str] = set()
        canonical = dict(self.aliases)
        with torch.no_grad():
            for slot, parameter in parameter_slots(module):
                name = canonical.get(slot)
                if name is not None and name not in seen:
                    seen.add(name)
                    parameter.copy_(values[name])

    @contextmanager
    def substituted(self, module: nn.Module, flat: Float[Tensor, " N"]) -> Iterator[nn.Module]:
        """Hold other weights inside a ``with`` block; afterwards every byte is as before.

        The old storage is set aside and put back, so the restore involves no arithmetic and
        happens after an exception too.
        """
        values = self.unflatten(flat)
        canonical = dict(self.aliases)
        kept: list[tuple[nn.Parameter, Tensor]] = []
        seen: set[int] = set()
        try:
            for slot, parameter in parameter_slots(module):
                name = canonical.get(slot)
                if name is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                kept.append((parameter, parameter.data))
                parameter.data = values[name].to(parameter.device, parameter.dtype, copy=True)
            yield module
        finally:
            for parameter, data in kept:
                parameter.data = data


def _refuse_odd(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """A wrong shape, and numbers that mean nothing without the scales of their quantisation."""
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"parameter '{name}' must have shape {shape}, got {tuple(tensor.shape)}; is this another model?"
        )
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"parameter '{name}' must be stored as floating-point numbers of at least 16 bits, got {kind}, "
            "which means nothing without its scales; dequantise the model first"
        )


class _Bound(nn.Module):
    """Makes ``function(module, *inputs)`` a forward method, so that functional_call can swap weights."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        with _whole_embeddings(self.module):
            return self.function(self.module, *inputs)


@contextmanager
def _whole_embeddings(module: nn.Module) -> Iterator[None]:
    """Within the block no embedding has a ``padding_idx``.

    It leaves the forward pass as it is and makes reverse mode leave out the derivative in that row, so that
    a derivative would be true in forward mode and not in reverse mode.
    """
    padded = [
        (part, part.padding_idx)
        for part in module.modules()
        if isinstance(part, nn.Embedding) and part.padding_idx is not None
    ]
    for part, _ in padded:
        part.padding_idx = None
    try:
        yield
    finally:
        for part, index in padded:
            part.padding_idx = index


def call_with(
    module: nn.Module,
    space: ParameterSpace,
    values: Mapping[str, Tensor],
    function: Callable[..., Any],
    *inputs: Any,
) -> Any:
    """``function(module, *inputs)`` as if the module's parameters were ``values``.

    This is the only place that calls ``torch.func.functional_call``; see the module docstring for
    why every slot is named and ``tie_weights`` is off.

    Args:
        module: the model.
        space: names and aliases of the parameters to replace.
        values: canonical name -> tensor, as from :meth:`ParameterSpace.unflatten`.
        function: called with the module and the inputs.
        *inputs: passed on.

    Raises:
        ValueError: for a missing, unknown or wrongly shaped value.
    """
    wanted = dict(zip(space.names, space.shapes, strict=True))
    if values.keys() != wanted.keys():
        odd = sorted(values.keys() ^ wanted.keys())[0]
        raise ValueError(
            f"values must name the chosen parameters, '{odd}' is missing or unknown; use unflatten"
        )
    for name, shape in wanted.items():
        if tuple(values[name].shape) != shape:
            got = tuple(values[name].shape)
            raise ValueError(f"value '{name}' must have shape {shape}, got {got}; use unflatten")
    replaced = {f"module.{slot}": values[name] for slot, name in space.aliases}
    return torch.func.functional_call(_Bound(module, function), replaced, inputs, tie_weights=False)
