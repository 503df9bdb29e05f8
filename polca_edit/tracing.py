"""Linear maps of derivatives at a point; above all one trace that serves every checkpoint.

``torch.func.linearize`` traces anew at each point. Here ``jvp`` is traced once with weights, inputs
and tangents all as graph inputs, and the graph is cut in two: nodes that depend on the tangents
and nodes that do not. The second half runs once per (checkpoint, batch), the first once per
vector. The two halves together compute exactly what ``torch.func.jvp`` computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

PointFunction = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Linearization:
    """A traced map (weights, inputs) -> outputs, cut into point part and tangent part."""

    point: Callable[..., tuple[Tensor, ...]]
    tangent: Callable[..., tuple[Tensor, ...]]
    outputs: int

    def at(self, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> PointLinearization:
        """Run the point part; the result maps tangents to output tangents."""
        results = self.point(*weights, *inputs)
        return PointLinearization(results[: self.outputs], results[self.outputs :], self.tangent)


@dataclass(frozen=True)
class PointLinearization:
    """The linear map at one point, with the outputs there."""

    values: tuple[Tensor, ...]
    residuals: tuple[Tensor, ...]
    tangent: Callable[..., tuple[Tensor, ...]]

    def __call__(self, tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Output tangents for one set of weight tangents."""
        return self.tangent(*self.residuals, *tangents)


def trace_linearization(
    function: PointFunction,
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    compiled: bool = False,
) -> Linearization:
    """Trace ``jvp`` of ``function`` in its weights and cut the graph at the tangents.

    Args:
        function: (weights, inputs) -> tensors.
        weights: example weights. They must not share storage: the tangent of a view would be
            allocated for the whole storage, so they are cloned for the trace.
        inputs: example inputs (not differentiated); their shapes are baked into the trace.
        compiled: pass the tangent part through ``torch.compile``.
    """
    count, extra = len(weights), len(inputs)

    def derivative(*flat: Tensor) -> tuple[Tensor, ...]:
        given = flat[count : count + extra]
        pair = torch.func.jvp(
            lambda *point: tuple(function(point, given)), tuple(flat[:count]), tuple(flat[count + extra :])
        )
        return (*pair[0], *pair[1])

    example = [w.detach().clone(memory_format=torch.contiguous_format) for w in weights]
    with torch.no_grad():
        graph = make_fx(derivative)(*example, *inputs, *[torch.ones_like(w) for w in example])
    return _cut(graph, count + extra, compiled)


def _cut(module: fx.GraphModule, point_inputs: int, compiled: bool) -> Linearization:
    """Split a traced jvp into the part that needs no tangent and the rest."""
    nodes = list(module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    moving = set(placeholders[point_inputs:])
    for node in nodes:
        if node.op == "call_function" and any(source in moving for source in node.all_input_nodes):
            moving.add(node)
    results: Any = nodes[-1].args[0]
    half = len(results) // 2
    boundary = list(
        dict.fromkeys(
            source
            for node in nodes
            if node in moving
            for source in node.all_input_nodes
            if source not in moving and source.op != "get_attr"
        )
    )

    def build(inputs: list[fx.Node], keep_moving: bool, wanted: list[fx.Node]) -> fx.GraphModule:
        graph, copies = fx.Graph(), {}
        for node in inputs:
            copies[node] = graph.placeholder(node.name)
        for node in nodes:
            wanted_kind = node.op == "call_function" and (node in moving) == keep_moving
            if wanted_kind or node.op == "get_attr":
                copies[node] = graph.node_copy(node, lambda source: copies[source])
        graph.output(tuple(copies[node] for node in wanted))
        graph.eliminate_dead_code()
        return fx.GraphModule(module, graph)

    point = build(placeholders[:point_inputs], False, [*results[:half], *boundary])
    # An output tangent that does not depend on the tangents is a constant zero; it crosses the boundary.
    constant = [node for node in results[half:] if node not in moving and node not in boundary]
    if constant:
        boundary.extend(dict.fromkeys(constant))
        point = build(placeholders[:point_inputs], False, [*results[:half], *boundary])
    tangent = build([*boundary, *placeholders[point_inputs:]], True, list(results[half:]))
    return Linearization(point, torch.compile(tangent) if compiled else tangent, half)


def plain_jvp(function: PointFunction, weights: list[Tensor], inputs: list[Tensor]) -> PointLinearization:
    """``torch.func.jvp`` at one point, tangent after tangent, with nothing kept between them."""

    def point(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(values, inputs))

    def tangent(*tangents: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = torch.func.jvp(point, tuple(weights), tuple(tangents))[1]
        return result

    return PointLinearization(point(*weights), (), tangent)


def double_backward(
    function: PointFunction, weights: list[Tensor], inputs: list[Tensor]
) -> PointLinearization:
    """Forward-mode derivative from reverse mode twice: J v is the derivative of <J'u, v> in u."""
    with torch.enable_grad():
        leaves = [w.detach().requires_grad_() for w in weights]
        (values,) = function(leaves, inputs)
        cotangent = torch.zeros_like(values, requires_grad=True)
        pulled = torch.autograd.grad(values, leaves, cotangent, create_graph=True, materialize_grads=True)

    def tangent(*tangents: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(pulled, [cotangent], list(tangents), retain_graph=True)

    return PointLinearization((values.detach(),), (), tangent)


def symmetric_products(
    gradient: PointFunction, weights: list[Tensor], inputs: list[Tensor]
) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    """Hessian-vector products as the gradient of <gradient, v>, which is H'v = Hv."""
    leaves = [w.detach().requires_grad_() for w in weights]
    grads = gradient(leaves, inputs)

    def product(tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(
                list(grads), leaves, list(tangents), retain_graph=True, materialize_grads=True
            )

    return product
