"""Traced derivatives, simplified and cut, against dense references and plain jvp."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

from polca_edit.derivatives import tracing
from polca_edit.derivatives.objective import Objective
from polca_edit.derivatives.tracing import trace_linearization
from polca_edit.models import TransformerShape, build_small_transformer
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet, next_token_loss

aten = torch.ops.aten


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ACTIVATIONS = [
    nn.functional.gelu,
    lambda x: nn.functional.gelu(x, approximate="tanh"),
    nn.functional.silu,
    torch.sigmoid,
    torch.tanh,
    lambda x: nn.functional.layer_norm(x, (6,)).softmax(-1),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_products_are_those_of_the_dense_hessian_at_another_point(activation) -> None:
    """One trace, evaluated where it was not traced, against torch.func.hessian."""
    x = drawn(5, 4, seed=0)

    def loss(w: Tensor, b: Tensor, u: Tensor, x: Tensor) -> Tensor:
        hidden = activation(x @ w + b)
        mixed = torch.bmm(hidden[None], u[None])[0] + hidden @ u + hidden @ u  # repeats, on purpose
        return (activation(mixed) * hidden + mixed).square().sum()

    def gradient(point, given):
        return torch.func.grad(lambda *p: loss(*p, given[0]), argnums=(0, 1, 2))(*point)

    shapes = [(4, 6), (6,), (6, 6)]
    traced_at = [drawn(*shape, seed=i) for i, shape in enumerate(shapes)]
    linear = trace_linearization(gradient, traced_at, [x])
    point = [0.7 * drawn(*shape, seed=10 + i) for i, shape in enumerate(shapes)]
    other = drawn(5, 4, seed=3)
    tangents = [drawn(*shape, seed=20 + i) for i, shape in enumerate(shapes)]
    dense = torch.func.hessian(lambda *p: loss(*p, other), argnums=(0, 1, 2))(*point)
    at = linear.at(point, [other])
    for _ in range(2):  # in-place sums must not spoil what the second product reads
        found = at(tangents)
        for i, part in enumerate(found):
            wanted = sum(torch.tensordot(dense[i][j], tangents[j], tangents[j].ndim) for j in range(3))
            torch.testing.assert_close(part, wanted, rtol=1e-11, atol=1e-11)


def small_hessian() -> tuple[Objective, Tensor, TokenSet]:
    module = build_small_transformer(TransformerShape(2, 16, 2, 32, 12, 12, 10), 0)
    space = ParameterSpace.from_module(module)
    inputs = torch.randint(0, 10, (6, 9), generator=torch.Generator().manual_seed(0))
    tokens = TokenSet(inputs, torch.ones(6, 8, dtype=torch.bool), torch.arange(6))
    return Objective(module, next_token_loss, space, route="traced"), space.read(module), tokens


def test_the_tangent_part_of_a_transformer_is_lean() -> None:
    objective, theta, tokens = small_hessian()
    objective.hessian(theta, tokens, expected=1000)
    (linear,) = objective._routes.traces.values()
    assert isinstance(linear.tangent, torch.fx.GraphModule)
    nodes = [n for n in linear.tangent.graph.nodes if n.op == "call_function"]
    kinds = [n.target for n in nodes]
    assert aten.gelu_backward.default not in kinds  # one evaluation per checkpoint, not per vector
    # Per linear map six products: two in the forward derivative, four in the backward one.
    products = (aten.mm.default, aten.addmm.default, aten.addmm_.default)
    linear_maps = 2 * 6 + 1
    assert sum(kind in products for kind in kinds) == 6 * linear_maps
    merged = sum(kind in products[1:] for kind in kinds)
    assert merged == 4 * linear_maps
    # Nothing that repeats an earlier node is left.
    keys = [repr((n.target, n.args, sorted(n.kwargs.items()))) for n in nodes]
    assert len(set(keys)) == len(keys)


def traced(function, *arguments: Tensor) -> torch.fx.GraphModule:
    graph = make_fx(function)(*arguments)
    ShapeProp(graph).propagate(*(a.clone() for a in arguments))
    return graph


def after_write(x: Tensor) -> Tensor:
    y = x + 1
    z = x + 1
    z.mul_(3)
    return y * z


def read_through_a_view(x: Tensor) -> Tensor:
    y = x + 1
    view = y.view(-1)
    before = view * 2
    y.mul_(3)
    return before - view * 2


def kept_copy(x: Tensor) -> Tensor:
    y = x + 1
    copy = y.clone()
    y.mul_(3)
    return y * copy


@pytest.mark.parametrize("function", [after_write, read_through_a_view, kept_copy])
def test_memory_that_is_written_is_left_alone(function) -> None:
    x = drawn(3, 4, seed=0)
    wanted = function(x)
    graph = traced(function, x)
    tracing._drop_repeats(graph.graph)
    graph.recompile()
    torch.testing.assert_close(graph(x), wanted, rtol=0, atol=0)


def test_repeats_and_idle_copies_go() -> None:
    def function(x: Tensor) -> Tensor:
        return (x + 1).clone().view(3, 4) * (x + 1).expand(3, 4)

    x = drawn(3, 4, seed=0)
    wanted = function(x)
    graph = traced(function, x)
    tracing._drop_repeats(graph.graph)
    graph.recompile()
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [
        aten.add.Tensor,
        aten.mul.Tensor,
    ]
    torch.testing.assert_close(graph(x), wanted, rtol=0, atol=0)


def used_twice(a: Tensor, b: Tensor) -> Tensor:
    first = a @ b
    return (first + b @ a) * first  # the first product must survive the sum


def views_of_the_total(a: Tensor, b: Tensor) -> Tensor:
    first = a @ b
    view = first.t()
    return (first + b @ a) - view


def broadcast(a: Tensor, b: Tensor) -> Tensor:
    return a[0] + a @ b


def broadcast_batch(a: Tensor, b: Tensor) -> Tensor:
    return a[0] + torch.bmm(a[None], b[None])


def scaled(a: Tensor, b: Tensor) -> Tensor:
    return torch.add(a, a @ b, alpha=2)


def three(a: Tensor, b: Tensor) -> Tensor:
    return a @ b + a * b + b @ a + (a[None] @ b[None])[0]


@pytest.mark.parametrize(
    "function", [used_twice, views_of_the_total, broadcast, broadcast_batch, scaled, three]
)
def test_merged_sums_keep_the_value_and_the_inputs(function) -> None:
    a, b = drawn(4, 4, seed=0), drawn(4, 4, seed=1)
    kept = a.clone(), b.clone()
    wanted = function(a, b)
    graph = traced(function, a, b)
    tracing._fuse_sums(graph.graph)
    graph.recompile()
    torch.testing.assert_close(graph(a, b), wanted, rtol=1e-13, atol=1e-13)
    assert torch.equal(a, kept[0])
    assert torch.equal(b, kept[1])


def test_lower_precision_is_not_merged_into_higher() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        return a + b @ b

    a, b = drawn(4, 4, seed=0).bfloat16(), drawn(4, 4, seed=1).float()
    graph = traced(function, a, b)
    tracing._fuse_sums(graph.graph)
    graph.recompile()
    assert graph(a, b).dtype == torch.float32
    torch.testing.assert_close(graph(a, b), function(a, b))
