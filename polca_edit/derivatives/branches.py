"""Branches of a traced forward pass that depend on shapes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, get_proxy_slot
from torch.overrides import TorchFunctionMode


class ConstantBranches(TorchFunctionMode):
    """While tracing, branches on values that depend on shapes alone are taken.

    transformers looks at position ids it made itself (``torch.arange``) before it builds a mask. A trace
    refuses to give such a value away; here it is looked up where no graph input went into it, so that
    the branch is the same at every checkpoint. Where one did, tracing fails as before.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _VALUES and args and isinstance(args[0], Tensor):
            plain = args[0]
            while torch._C._functorch.is_functorch_wrapped_tensor(plain):
                plain = torch._C._functorch.get_unwrapped(plain)
            if _of_no_input(plain):
                with disable_proxy_modes_tracing():
                    return func(plain, *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


#: Calls that read a tensor's value.
_VALUES = (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist)


def _of_no_input(tensor: Tensor) -> bool:
    """Whether a traced tensor follows from no placeholder of the graph."""
    mode = get_proxy_mode()
    slot = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    if slot is None:
        return False
    seen, todo = set(), [slot.proxy.node]
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return False
        seen.add(node)
        todo += [source for source in node.all_input_nodes if source not in seen]
    return True
