"""Calls of torch functions on bare parameters, watched as the adjoint route watches modules.

A model may hold ``nn.Parameter`` and use it with ``einsum``, ``@``, ``*``, ``+`` or an index. Where such a
call is linear in the parameter, its share of a slope follows from the cotangent delta of its result alone:

    <V, d loss / d W> = <delta, f(a, V)>  for  y = f(a, W)

A product of any shape is brought into one form, y[x, g, l, o] = sum_i a[x, g, l, i] W[g, i, o], whose share
is that of a linear map (:func:`~polca_edit.derivatives.contacts.linear_share`). What is no such call is left
alone, and the route finds by its check that the parameter needs explicit gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from polca_edit.derivatives.contacts import embedding_share, linear_share, pointwise_share

#: (delta (B, R, ...), tables (K_i, ...) of directions, K in all) -> (B, R, K).
Share = Callable[[Tensor, Sequence[Tensor]], Tensor]
#: What turns a direction of a parameter into one of a view of it.
View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Operation:
    """One watched call.

    Attributes:
        parts: canonical name of each parameter in it -> its share from the cotangent of the result.
        result: what the call returned, leading axis B.
    """

    parts: tuple[tuple[str, Share], ...]
    result: Tensor

    def shares(
        self, delta: Float[Tensor, "B R L out"], rows: Any, skip: Any = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """The share (B, R, K) of every parameter."""
        whole = delta.reshape(*delta.shape[:2], *self.result.shape[1:])
        for name, share in self.parts:
            if name not in skip:
                yield name, share(whole, rows[name])


@dataclass(frozen=True)
class Tracked:
    """A parameter, or a view of one that no input went into."""

    name: str
    views: tuple[View, ...] = ()

    def of(self, tables: Sequence[Tensor]) -> list[Tensor]:
        """Tables (K_i, ...) of directions of the parameter as directions of the view."""
        found = list(tables)
        for view in self.views:
            found = [torch.vmap(view)(rows) for rows in found]
        return found


#: Reordering, cutting out and scaling: linear in their first argument, and often done before a product.
VIEWS: set[Any] = {
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
    Tensor.t,
    torch.t,
    Tensor.transpose,
    torch.transpose,
    Tensor.permute,
    torch.permute,
    Tensor.view,
    Tensor.reshape,
    torch.reshape,
    Tensor.flatten,
    torch.flatten,
    Tensor.unsqueeze,
    torch.unsqueeze,
    Tensor.squeeze,
    torch.squeeze,
    Tensor.expand,
    Tensor.contiguous,
    Tensor.__getitem__,
    Tensor.neg,
    Tensor.__neg__,
}
MULTIPLY: set[Any] = {Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, torch.multiply}
ADD: set[Any] = {Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add}
MATMUL: set[Any] = {Tensor.matmul, Tensor.__matmul__, torch.matmul, Tensor.mm, torch.mm}
EINSUM: set[Any] = {torch.einsum, torch.functional.einsum}


class WatchedOperations(TorchFunctionMode):
    """Within the block calls on bare parameters are found, and what follows from the inputs is known.

    Args:
        parameters: canonical name -> the tensor that stands for it.
        inputs: what differs from sequence to sequence.
        keep: takes each operation, and returns the tensor that goes on in its result's place.
    """

    def __init__(
        self, parameters: Any, inputs: tuple[Tensor, ...], keep: Callable[[Operation, int], Tensor]
    ) -> None:
        super().__init__()
        self.tracked, self.fed = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        for name, tensor in parameters.items():
            self.tracked[tensor] = Tracked(name)
        for tensor in inputs:
            self.fed[tensor] = True
        self.keep, self.batch = keep, inputs[0].shape[:1]
        #: Modules under way that are watched by themselves.
        self.inside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if not isinstance(found, Tensor):
            return self._several(found, args, kwargs)
        given = list(_tensors((args, kwargs)))
        fed = any(tensor in self.fed for tensor in given)
        if self.inside == 0 and any(tensor in self.tracked for tensor in given):
            found = self._seen(func, args, kwargs, found, fed)
        if fed:
            self.fed[found] = True
        return found

    def _several(self, found: Any, args: Any, kwargs: Any) -> Any:
        """Several results: each follows from the inputs if any argument does; no parameter is followed."""
        if isinstance(found, (tuple, list)) and any(
            tensor in self.fed for tensor in _tensors((args, kwargs))
        ):
            for tensor in _tensors(found):
                self.fed[tensor] = True
        return found

    def _seen(self, func: Any, args: Any, kwargs: Any, found: Tensor, fed: bool) -> Tensor:
        """The result of a call on a tracked tensor, watched where it can be."""
        first = args[0] if args else None
        if not fed:
            own = self.tracked.get(first) if isinstance(first, Tensor) else None
            others = [t for t in _tensors((args[1:], kwargs)) if t in self.tracked]
            scaled = func in MULTIPLY and len(args) == 2 and isinstance(args[1], (int, float))
            if own is not None and not others and (func in VIEWS or scaled):
                rest = args[1:]
                self.tracked[found] = Tracked(own.name, (*own.views, lambda v: func(v, *rest, **kwargs)))
            elif func is functional.embedding and len(args) > 1 and args[1] in self.tracked:
                table = self.tracked[args[1]]  # positions, the same for every sequence
                self.tracked[found] = Tracked(table.name, (*table.views, lambda v: v[first]))
            return found
        parts = self._parts(func, args, kwargs, found) if found.shape[:1] == self.batch else []
        if not parts:
            return found
        size = sum(tensor[0].numel() for tensor in _tensors((args, kwargs)) if tensor in self.fed)
        return self.keep(Operation(tuple(parts), found), size)

    def _parts(self, func: Any, args: Any, kwargs: Any, found: Tensor) -> list[tuple[str, Share]]:
        """Shares of the tracked tensors of one call; none where the call has no known form."""
        own = [self.tracked.get(a) if isinstance(a, Tensor) else None for a in args]
        if func is functional.linear:
            return _linear(args, kwargs, found, self.tracked)
        if func is functional.embedding and len(args) > 1 and own[1] is not None:
            return _indexed(own[1], args[0], found) if not any(kwargs.get(k) for k in LOOKUPS) else []
        if func is functional.layer_norm or func is getattr(functional, "rms_norm", None):
            return _normed(func, args, kwargs, found, self.tracked)
        if func is Tensor.__getitem__:
            index = args[1]
            whole = isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool
            return _indexed(own[0], index, found) if own[0] is not None and whole else []
        if func in EINSUM and isinstance(args[0], str):
            operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
            return _einsum(args[0], list(operands), found, self.tracked)
        if kwargs or len(args) != 2 or not all(isinstance(a, Tensor) for a in args) or None not in own:
            return []
        place = 0 if own[0] is not None else 1
        mine, other, weight = own[place], args[1 - place], args[place]
        if mine is None:
            return []
        if func in MULTIPLY:
            return _pointwise(mine, weight, other, found)
        if func in ADD:
            return _pointwise(mine, weight, None, found)
        if func in MATMUL:
            letters = _matmul_letters(args[0].ndim, args[1].ndim)
            return [] if letters is None else _einsum(letters, list(args), found, self.tracked)
        return []


#: Options of ``functional.embedding`` whose derivative is another one.
LOOKUPS = ("max_norm", "scale_grad_by_freq", "sparse")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)


def _pointwise(own: Tracked, weight: Tensor, factor: Tensor | None, found: Tensor) -> list[tuple[str, Share]]:
    """For factor * W or other + W: the cotangent, times the factor, summed to the parameter's shape."""
    if weight.ndim == found.ndim and weight.shape[0] != 1:
        return []  # the parameter has an entry for every sequence
    shape = weight.shape
    kept = None if factor is None else factor.detach().expand(found.shape)

    def share(delta: Tensor, rows: Sequence[Tensor]) -> Tensor:
        product = delta if kept is None else delta * kept[:, None]
        lead = product.shape[:2]
        axes = len(shape) - (product.ndim - 2)  # minus how many axes the parameter lacks
        aligned = (*(1,) * -axes, *shape) if axes <= 0 else shape[axes:]
        summed = [i + 2 for i, size in enumerate(aligned) if size == 1 and product.shape[i + 2] != 1]
        if summed:
            product = product.sum(summed, keepdim=True)
        return pointwise_share(product.reshape(*lead, -1), own.of(rows))

    return [(own.name, share)]


def _indexed(own: Tracked, index: Tensor, found: Tensor) -> list[tuple[str, Share]]:
    """For W[index] with an index per sequence: cotangents times the rows that were looked up."""
    if index.ndim == 0 or found.shape[0] != index.shape[0]:
        return []
    flat = index.reshape(len(index), -1)

    def share(delta: Tensor, rows: Sequence[Tensor]) -> Tensor:
        words = [v.flatten(2) if v.ndim > 2 else v[:, :, None] for v in own.of(rows)]
        return embedding_share(flat, delta.reshape(*delta.shape[:2], flat.shape[1], -1), words)

    return [(own.name, share)]


def _linear(args: Any, kwargs: Any, found: Tensor, tracked: Any) -> list[tuple[str, Share]]:
    given, weight, bias = [*args, kwargs.get("weight"), kwargs.get("bias"), None][:3]
    if len(args) == 2:
        bias = kwargs.get("bias")
    parts: list[tuple[str, Share]] = []
    if weight in tracked:
        letters = "abcdefghij"[: given.ndim - 1]
        parts += _einsum(f"{letters}y,zy->{letters}z", [given, weight], found, tracked)
        if not parts:
            return []
    if isinstance(bias, Tensor) and bias in tracked:
        parts += _pointwise(tracked[bias], bias, None, found)
    return parts


def _normed(func: Any, args: Any, kwargs: Any, found: Tensor, tracked: Any) -> list[tuple[str, Share]]:
    """Gain and offset of a functional norm, whose input is normalised anew."""
    layer = func is functional.layer_norm
    names = ("input", "normalized_shape", "weight", *(("bias",) if layer else ()), "eps")
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    weight, bias = values.get("weight"), values.get("bias")
    plain = {key: value for key, value in values.items() if key not in ("weight", "bias")}
    parts: list[tuple[str, Share]] = []
    if isinstance(weight, Tensor) and weight in tracked:
        parts += _pointwise(tracked[weight], weight, func(**plain).detach(), found)
    if isinstance(bias, Tensor) and bias in tracked:
        parts += _pointwise(tracked[bias], bias, None, found)
    return parts


def _matmul_letters(left: int, right: int) -> str | None:
    """The einsum of a matrix product of two tensors of so many axes.

    >>> _matmul_letters(3, 2), _matmul_letters(4, 3), _matmul_letters(2, 3)
    ('bxy,yz->bxz', 'abxy,byz->abxz', 'xy,byz->bxz')
    """
    if left < 2 or right < 2:
        return None
    most = max(left, right) - 2
    letters = "abcdefghij"[:most] if most > 1 else "b"[:most]
    one, two = letters[most - (left - 2) :], letters[most - (right - 2) :]
    return f"{one}xy,{two}yz->{letters}xz"


def _einsum(equation: str, operands: list[Any], found: Tensor, tracked: Any) -> list[tuple[str, Share]]:
    """The share of the one tracked operand of a product of two."""
    terms = _terms(equation, operands)
    chosen = [place for place, operand in enumerate(operands) if operand in tracked]
    if terms is None or len(chosen) != 1:
        return []
    (*sides, out), place = terms, chosen[0]
    mine, theirs = sides[place], sides[1 - place]
    own, given = tracked[operands[place]], operands[1 - place].detach()
    sizes = dict(zip(out, found.shape, strict=True)) | dict(zip(mine, operands[place].shape, strict=True))
    sizes |= {c: n for c, n in zip(theirs, given.shape, strict=True) if n != 1 or c not in sizes}
    given = given.expand([sizes[c] for c in theirs])
    batch = out[:1]
    whole = all(len(set(term)) == len(term) for term in terms)
    used = set(mine) <= set(theirs + out) and set(theirs) <= set(mine + out)
    matched = all(sizes[letter] == size for letter, size in zip(mine, operands[place].shape, strict=True))
    if not (whole and used and matched and batch and theirs[:1] == batch and batch not in mine):
        return []
    groups = [c for c in mine if c in theirs and c in out]
    inner = [c for c in mine if c in theirs and c not in out]
    outer = [c for c in mine if c not in theirs]
    places = [c for c in theirs if c not in mine and c != batch]

    def arranged(tensor: Tensor, term: str, lead: int, *blocks: list[str]) -> Tensor:
        """Leading axes as they are, then each block of letters as one axis."""
        order = [term.index(c) + lead for block in blocks for c in block]
        turned = tensor.permute(*range(lead), *order)
        counts = [int(torch.Size([sizes[c] for c in block]).numel()) for block in blocks]
        return turned.reshape(*tensor.shape[:lead], *counts)

    pushed = arranged(given, theirs[1:], 1, groups, places, inner)

    def share(delta: Tensor, rows: Sequence[Tensor]) -> Tensor:
        turned = arranged(delta, out[1:], 2, groups, places, outer)
        vectors = [arranged(table, mine, 1, groups, inner, outer) for table in own.of(rows)]
        if vectors[0].shape[2:] == (1, 1):
            return pointwise_share((turned * pushed[:, None]).sum((3, 4)), vectors)
        parts = [
            linear_share(pushed[:, g], turned[:, :, g], [v[:, g] for v in vectors], transposed=False)
            for g in range(vectors[0].shape[1])
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    return [(own.name, share)]


def _terms(equation: str, operands: list[Any]) -> list[str] | None:
    """The letters of both operands and the result, dots spelled out; None for other equations."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    sides = left.split(",")
    if not arrow or len(sides) != 2 or len(operands) != 2:
        return None
    spare = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in equation]
    dots = 0
    for place, side in enumerate(sides):
        if "..." in side:
            count = operands[place].ndim - (len(side) - 3)
            if dots and dots != count:
                return None
            dots = count
    spelled = [term.replace("...", "".join(spare[:dots])) for term in (*sides, out)]
    fits = all(len(term) == o.ndim for term, o in zip(spelled, operands, strict=False))
    return spelled if fits else None
