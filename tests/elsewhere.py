"""A device of its own that any machine has: its tensors compute on the CPU and refuse to meet CPU tensors.

Whatever a GPU would refuse is refused here: an operation on tensors of both devices, a CPU tensor where one
of the module's device is wanted. What it allows is allowed: numbers (tensors without axes), copies, CPU
indices into a tensor that is elsewhere, and reading a value out.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
aten = torch.ops.aten
#: Operations that carry values from one device to the other.
CARRIERS = {aten.copy_.default, aten._to_copy.default}
#: Operations whose index tensors may lie on the CPU.
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}


class Elsewhere(Tensor):
    """A tensor of the device; ``held`` has its values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.held!r})"

    def untyped_storage(self) -> torch.UntypedStorage:
        """Where the values are; which tensors share memory is told by it."""
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in CARRIERS:
            return _carried(func, args, kwargs)
        if func is aten._efficientzerotensor.default:
            return _zeros(*args, **kwargs)
        _refuse_mixture(func, args, kwargs)
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        found = func(*pytree.tree_map(_inner, args), **pytree.tree_map(_inner, kwargs))
        if asked is not None and torch.device(asked).type != NAME:
            return found
        given = {id(t.held): t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Elsewhere)}

        def outer(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            # What was changed in place is the same object, whose values have changed with it.
            return given[id(value)] if id(value) in given else Elsewhere(value)

        return pytree.tree_map(outer, found)


def _inner(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


def _carried(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``copy_`` and ``to``: between devices, or on one."""
    if func is aten.copy_.default:
        _inner(args[0]).copy_(_inner(args[1]))
        return args[0]
    wanted = kwargs.pop("device", None)
    stays = wanted is None or torch.device(wanted).type == NAME
    if not stays:
        kwargs["device"] = wanted
    found = func(*pytree.tree_map(_inner, args), **kwargs)
    return Elsewhere(found) if stays else found


def _refuse_mixture(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    looked = args[:1] if func in INDEXED else args
    tensors = [t for t in pytree.tree_leaves((looked, kwargs)) if isinstance(t, Tensor)]
    here = [t for t in tensors if not isinstance(t, Elsewhere) and t.ndim and t.device.type != "meta"]
    if here and (len(here) < len(tensors) or func in INDEXED):
        raise RuntimeError(
            f"expected all tensors on one device, {func} got {[tuple(t.shape) for t in here]} on the cpu"
        )


def _empty(size: Any, **kwargs: Any) -> Tensor:
    return Elsewhere(torch.empty(size, dtype=kwargs.get("dtype")))


def _empty_strided(size: Any, stride: Any, **kwargs: Any) -> Tensor:
    return Elsewhere(torch.empty_strided(size, stride, dtype=kwargs.get("dtype")))


def _zeros(size: Any, **kwargs: Any) -> Tensor:
    return Elsewhere(torch.zeros(size, dtype=kwargs.get("dtype")))


def _arange(*bounds: Any, **kwargs: Any) -> Tensor:
    return Elsewhere(torch.arange(*bounds, dtype=kwargs.get("dtype")))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _inner(target).copy_(_inner(source))
    return target


class _Module(_DummyBackendModule):
    """With the state of generators that it does not have, which torch saves of every device."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass


_KEPT: list[Any] = []


@cache
def device() -> torch.device:
    """The device, made at the first call."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_efficientzerotensor", _zeros, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in ("arange", "arange.start", "arange.start_step"):
        library.impl(name, _arange, "PrivateUse1")
    _KEPT.append(library)
    return torch.device(NAME, 0)
