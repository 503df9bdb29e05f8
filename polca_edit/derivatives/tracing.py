"""Linear maps of derivatives at a point; above all one trace that serves every checkpoint.

``torch.func.linearize`` traces anew at each point. Here ``jvp`` is traced once with weights, inputs
and tangents all as graph inputs, and the graph is cut in two: nodes that depend on the tangents
and nodes that do not. The second half runs once per (checkpoint, batch), the first once per
vector. The two halves together compute exactly what ``torch.func.jvp`` computes.

Before the cut the graph loses repeated nodes and copies that change nothing, and derivatives of
activation functions move to the point part; after it, products and the sums they go into become one
call. Each step keeps the value (up to the order of floating-point operations).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

from polca_edit.derivatives.branches import ConstantBranches

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
        kept = bytes_beyond(results, [*weights, *inputs])
        return PointLinearization(results[: self.outputs], results[self.outputs :], self.tangent, kept)


@dataclass(frozen=True)
class PointLinearization:
    """The linear map at one point, with the outputs there.

    Attributes:
        values: outputs; empty for products with a Hessian by reverse mode.
        residuals: what the tangent part reads besides tangents.
        tangent: (residuals, tangents) -> output tangents.
        kept_bytes: memory that lives as long as this record, weights and inputs apart.
    """

    values: tuple[Tensor, ...]
    residuals: tuple[Tensor, ...]
    tangent: Callable[..., tuple[Tensor, ...]]
    kept_bytes: int = 0

    def __call__(self, tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Output tangents for one set of weight tangents."""
        return self.tangent(*self.residuals, *tangents)


def bytes_beyond(tensors: Sequence[Tensor], owned: Sequence[Tensor]) -> int:
    """Bytes of the storages of ``tensors`` that are not those of ``owned``, each counted once.

    >>> x = torch.zeros(4)
    >>> bytes_beyond([x, x.view(2, 2), torch.zeros(2)], [x])
    8
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in owned}
    real = [tensor for tensor in tensors if not tensor._is_zerotensor()]  # those own no memory
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in real}
    return sum(size for place, size in sizes.items() if place not in known)


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
        with ConstantBranches():
            pair = torch.func.jvp(
                lambda *point: tuple(function(point, given)),
                tuple(flat[:count]),
                tuple(flat[count + extra :]),
            )
        return (*pair[0], *pair[1])

    example = [w.detach().clone(memory_format=torch.contiguous_format) for w in weights]
    with torch.no_grad():
        arguments = (*example, *inputs, *[torch.ones_like(w) for w in example])
        graph = make_fx(derivative)(*arguments)
        ShapeProp(graph).propagate(*arguments)
    _drop_repeats(graph.graph)
    _hoist_activation_derivatives(graph.graph, count + extra)
    return _cut(graph, count + extra, compiled)


aten = torch.ops.aten
#: Operations f(g, x, ...) = g f'(x) on entries: f' needs no tangent when x does not.
POINTWISE_DERIVATIVES = (
    aten.gelu_backward.default,
    aten.silu_backward.default,
    aten.sigmoid_backward.default,
    aten.tanh_backward.default,
)


def _same_layout(node: fx.Node, source: Any) -> bool:
    """Whether two nodes hold tensors of one shape, precision and memory layout."""
    if not isinstance(source, fx.Node):
        return False
    mine, other = node.meta.get("tensor_meta"), source.meta.get("tensor_meta")
    if mine is None or other is None:
        return False
    return (mine.shape, mine.stride, mine.dtype) == (other.shape, other.stride, other.dtype)


def _unsafe(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that hold or read memory which some in-place operation writes, under any name."""
    home: dict[fx.Node, fx.Node] = {}  # union-find: nodes that may share memory

    def find(node: fx.Node) -> fx.Node:
        while home.setdefault(node, node) is not node:
            node = home[node]
        return node

    written = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            shared, writes = node.all_input_nodes, []
        else:
            schema = node.target._schema
            given = [*zip(schema.arguments, node.args, strict=False)]
            given += [(a, node.kwargs[a.name]) for a in schema.arguments if a.name in node.kwargs]
            alias = [(a.alias_info, n) for a, value in given if a.alias_info for n in _nodes_in(value)]
            shared = [n for _, n in alias]
            writes = [n for info, n in alias if info is not None and info.is_write]
            if node.target is aten._unsafe_view.default:
                shared = node.all_input_nodes
        for source in shared:
            home[find(source)] = find(node)
        written += writes
    roots = {find(node) for node in written}
    return {n for n in graph.nodes if find(n) in roots or any(find(s) in roots for s in n.all_input_nodes)}


def _nodes_in(value: Any) -> list[fx.Node]:
    """The nodes of one argument, which may be a list of them."""
    if isinstance(value, fx.Node):
        return [value]
    return [node for each in value for node in _nodes_in(each)] if isinstance(value, (list, tuple)) else []


def _drop_repeats(graph: fx.Graph) -> None:
    """Replace a node that repeats an earlier one, or copies it and changes nothing, by the earlier one."""
    unsafe = _unsafe(graph)
    identities = {
        aten.alias.default,
        aten.detach.default,
        aten.clone.default,
        aten._to_copy.default,
        aten.expand.default,
        aten.view.default,
        aten._unsafe_view.default,
    }
    seen: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node in unsafe or not isinstance(node.target, torch._ops.OpOverload):
            continue
        source = node.args[0] if node.args else None
        if node.target in identities and _same_layout(node, source):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            continue
        key = repr((node.target, node.args, sorted(node.kwargs.items())))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node


def _moving(graph: fx.Graph, point_inputs: int) -> set[fx.Node]:
    """Nodes that depend on the tangents: the placeholders after the first ``point_inputs``."""
    moving = set([node for node in graph.nodes if node.op == "placeholder"][point_inputs:])
    for node in graph.nodes:
        if node.op == "call_function" and any(source in moving for source in node.all_input_nodes):
            moving.add(node)
    return moving


def _hoist_activation_derivatives(graph: fx.Graph, point_inputs: int) -> None:
    """Rewrite f(g, x) as g f(1, x) where only g depends on the tangents."""
    moving = _moving(graph, point_inputs)
    slopes: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target not in POINTWISE_DERIVATIVES or node not in moving or node.args[1] in moving:
            continue
        gradient, point, *rest = node.args
        key = repr((node.target, point, rest, sorted(node.kwargs.items())))
        if key not in slopes:
            with graph.inserting_after(point):
                ones = graph.call_function(aten.ones_like.default, (point,))
            with graph.inserting_after(ones):
                slopes[key] = graph.call_function(node.target, (ones, point, *rest), dict(node.kwargs))
            slopes[key].meta = dict(point.meta)
        with graph.inserting_before(node):
            product = graph.call_function(aten.mul.Tensor, (gradient, slopes[key]))
        product.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)


def _fuse_sums(graph: fx.Graph) -> None:
    """Turn a b + c d into one product added in place to the other, and x + a b into one call.

    A product that nothing else uses is fresh memory, so writing to it is safe.
    """
    products = {
        aten.mm.default: (aten.addmm.default, aten.addmm_.default),
        aten.bmm.default: (aten.baddbmm.default, aten.baddbmm_.default),
        aten.mul.Tensor: (aten.addcmul.default, aten.addcmul_.default),
    }
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
            continue
        for total, part in (node.args, node.args[::-1]):
            if not isinstance(total, fx.Node) or not _fusible(node, total, part, products):
                continue
            fresh = len(total.users) == 1 and total.target in FRESH and _same_layout(node, total)
            target = products[part.target][fresh]
            with graph.inserting_before(node):
                fused = graph.call_function(target, (total, *part.args))
            fused.meta = dict(node.meta)
            node.replace_all_uses_with(fused)
            graph.erase_node(node)
            graph.erase_node(part)
            break


#: Results that are new memory, never a view of anything.
FRESH = {
    aten.mm.default,
    aten.bmm.default,
    aten.mul.Tensor,
    aten.addmm.default,
    aten.addmm_.default,
    aten.baddbmm.default,
    aten.baddbmm_.default,
    aten.addcmul.default,
    aten.addcmul_.default,
    aten.add.Tensor,
}


def _fusible(node: fx.Node, total: fx.Node, part: Any, products: dict[Any, Any]) -> bool:
    """Whether a product can be merged into the sum that alone uses it: equal shape and precision."""
    if not isinstance(part, fx.Node) or part.target not in products or len(part.users) != 1:
        return False
    factors: Any = part.args
    if not all(isinstance(source, fx.Node) for source in factors):
        return False
    metas: list[Any] = [each.meta.get("tensor_meta") for each in (node, part, total, *factors)]
    if None in metas or len({meta.dtype for meta in metas}) != 1:
        return False
    return bool(metas[0].shape == metas[1].shape and metas[0].dtype.is_floating_point)


def _cut(module: fx.GraphModule, point_inputs: int, compiled: bool) -> Linearization:
    """Split a traced jvp into the part that needs no tangent and the rest."""
    nodes = list(module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    moving = _moving(module.graph, point_inputs)
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
            copies[node].meta = dict(node.meta)
        for node in nodes:
            wanted_kind = node.op == "call_function" and (node in moving) == keep_moving
            if wanted_kind or node.op == "get_attr":
                copies[node] = graph.node_copy(node, lambda source: copies[source])
        graph.output(tuple(copies[node] for node in wanted))
        graph.eliminate_dead_code()
        if keep_moving:
            _fuse_sums(graph)
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
) -> PointLinearization:
    """Hessian-vector products as the gradient of <gradient, v>, which is H'v = Hv.

    Of the gradient only its place in the graph is kept, not its numbers, so ``values`` is empty. Entries
    that are constant in the weights have no such place and add nothing.
    """
    leaves, saved = [w.detach().requires_grad_() for w in weights], []

    def note(tensor: Tensor) -> Tensor:
        saved.append((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
        # A result that its node saved would keep the node alive, and the node it; torch puts the graph back.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        grads = tuple(gradient(leaves, inputs))
    owned = {tensor.untyped_storage().data_ptr() for tensor in [*leaves, *inputs]}
    kept = sum(size for place, size in dict(saved).items() if place not in owned)
    edges = {n: torch.autograd.graph.get_gradient_edge(g) for n, g in enumerate(grads) if g.requires_grad}
    del grads

    def tangent(*tangents: Tensor) -> tuple[Tensor, ...]:
        if not edges:
            return tuple(torch.zeros_like(leaf) for leaf in leaves)
        with torch.enable_grad():
            return torch.autograd.grad(
                list(edges.values()),
                leaves,
                [tangents[n] for n in edges],
                retain_graph=True,
                materialize_grads=True,
            )

    return PointLinearization((), (), tangent, kept)
