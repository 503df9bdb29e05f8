"""Which way a derivative is computed, and what was learnt about the model on the way.

Forward mode traced once (``traced``) or vector by vector (``jvp``); reverse mode twice
(``double_backward``) where a module has no forward mode.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from polca_edit.derivatives.tracing import (
    Linearization,
    PointFunction,
    PointLinearization,
    double_backward,
    plain_jvp,
    symmetric_products,
    trace_linearization,
)

Route = Literal["auto", "adjoint", "traced", "jvp", "double_backward"]

#: A trace costs about 70 forward passes and saves about one per vector.
TRACE_BREAK_EVEN = 64
#: Forward passes per vector by route (measured on the two arithmetic shapes, docs/results).
PASSES_PER_VECTOR = {"adjoint": 1.0, "traced": 1.9, "jvp": 3.0}
#: Forward passes per scored token of a sequence that the adjoint route needs before any vector.
PASSES_PER_COTANGENT = 1.25


@contextmanager
def matrix_products(products: torch.dtype | None) -> Iterator[None]:
    """Take matrix products of float32 tensors in bfloat16, with sums in float32; for other types do nothing.

    It is torch's own setting for the whole process, put back at the end. On processors without units for
    bfloat16, and for tensors in float64, nothing changes.

    >>> with matrix_products(torch.bfloat16):
    ...     torch.get_float32_matmul_precision()
    'medium'
    >>> torch.get_float32_matmul_precision()
    'highest'
    """
    if products != torch.bfloat16:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def lacks_forward_mode(error: Exception) -> bool:
    """Whether torch says that some operation has no forward-mode derivative."""
    # The last one comes from checkpointed activations, which call autograd inside the transform.
    words = ("forward AD", "forward-mode", "jvp", "being transformed by a functorch transform")
    return any(part in str(error) for part in words)


@dataclass
class Routes:
    """Linearises functions of the weights by the wanted route, with fallback.

    Attributes:
        wanted: what the caller asked for.
        compiled: pass traced tangent parts through ``torch.compile``.
        reverse_only: the module was found to have no forward mode.
        untraceable: the module was found to branch on values.
        traces: traces made so far, by kind, precision and input shapes.
    """

    wanted: Route
    compiled: bool = False
    reverse_only: bool = False
    untraceable: bool = False
    traces: dict[tuple[object, ...], Linearization] = field(default_factory=dict, repr=False)

    @property
    def free(self) -> bool:
        """Whether the caller leaves the choice of these routes open (``adjoint`` is one of slopes alone)."""
        return self.wanted in ("auto", "adjoint")

    def choose(self, expected: int) -> Route:
        """The forward route for a number of vectors."""
        if self.reverse_only:
            return "double_backward"
        if not self.free:
            return self.wanted
        return "traced" if expected >= TRACE_BREAK_EVEN else "jvp"

    def adjoint_pays(self, ranks: int, count: int, planned: int) -> bool:
        """Whether slopes of ``ranks`` tokens a sequence along ``count`` vectors are cheapest from cotangents.

        ``planned`` is the number of vectors in all, by which :meth:`choose` takes another route.
        """
        adjoint = 1.0 + PASSES_PER_COTANGENT * ranks + PASSES_PER_VECTOR["adjoint"] * count
        other = "traced" if planned >= TRACE_BREAK_EVEN else "jvp"
        return adjoint < PASSES_PER_VECTOR[other] * count

    def for_curvature(self, expected: int) -> Route:
        """The route of products with the Hessian, for a number of batches through all of them.

        A traced product of a batch saves a sixth to a quarter of one by reverse mode twice (Pythia shape of
        14 million, four sequences; nothing at 70 million), and the trace costs as much as about twenty.
        """
        if not self.free:
            return self.choose(expected)
        few = expected < TRACE_BREAK_EVEN
        return "double_backward" if few or self.reverse_only or self.untraceable else "traced"

    @property
    def note(self) -> str:
        """What was learnt about the model that a caller did not ask for."""
        if self.reverse_only:
            return "the model has no forward mode"
        return "the model branches on values, so it is not traced" if self.untraceable else ""

    def taken(self, chosen: Route) -> Route:
        """The route that a chosen one really went, after what was learnt about the model."""
        if self.reverse_only:
            return "double_backward"
        return "jvp" if chosen == "traced" and self.untraceable else chosen

    def linear(
        self,
        kind: str,
        function: PointFunction,
        route: Route,
        weights: list[Tensor],
        inputs: list[Tensor],
    ) -> PointLinearization:
        """The derivative of ``function`` at the weights by the wanted route, with fallback.

        Args:
            kind: names the function; one trace is made per kind.
            function: (weights, inputs) -> one tensor.
            route: from :meth:`choose`.
            weights: where.
            inputs: not differentiated.
        """
        if route == "double_backward":
            return double_backward(function, weights, inputs)
        return self._forward(
            kind, function, route, weights, inputs, lambda: double_backward(function, weights, inputs)
        )

    def _forward(
        self,
        kind: str,
        function: PointFunction,
        route: Route,
        weights: list[Tensor],
        inputs: list[Tensor],
        reverse: Callable[[], PointLinearization],
        *,
        cheaper_reverse: bool = False,
    ) -> PointLinearization:
        """Forward mode; ``reverse`` takes over, now or at the first tangent, where the module has none.

        With ``cheaper_reverse`` it also takes over where the module cannot be traced.
        """
        try:
            if route == "traced" and not self.untraceable:
                try:
                    return self._traced(kind, function, weights, inputs)
                except RuntimeError as error:
                    if "tracing tensor" not in str(error):
                        raise
                    self.untraceable = True  # a model that branches on values: the same numbers, untraced
                    if cheaper_reverse:
                        return reverse()
            plain = plain_jvp(function, weights, inputs)
        except (NotImplementedError, RuntimeError) as error:
            if not lacks_forward_mode(error):
                raise
            self.reverse_only = True
            return reverse()
        fallback: list[PointLinearization] = []

        def tangent(*tangents: Tensor) -> tuple[Tensor, ...]:
            if not fallback:
                try:
                    return plain(tangents)
                except (NotImplementedError, RuntimeError) as error:
                    if not lacks_forward_mode(error):
                        raise
                    self.reverse_only = True
                    fallback.append(reverse())
            return fallback[0](tangents)

        return PointLinearization(plain.values, (), tangent)

    def _traced(
        self, kind: str, function: PointFunction, weights: list[Tensor], inputs: list[Tensor]
    ) -> PointLinearization:
        key = (kind, weights[0].dtype, self.compiled, *(tuple(i.shape) for i in inputs))
        if key not in self.traces:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.traces[key] = trace_linearization(function, weights, inputs, compiled=self.compiled)
        return self.traces[key].at(weights, inputs)

    def curvature(
        self,
        loss: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
        expected: int,
        weights: list[Tensor],
        inputs: list[Tensor],
        chosen: str = "",
    ) -> PointLinearization:
        """The product tangents -> Hessian times tangents of a scalar loss (weights, inputs).

        ``expected`` is as in :meth:`for_curvature`; ``chosen`` names which parameters the weights are, so
        that no trace serves two choices.
        """

        def gradient(point: Sequence[Tensor], given: Sequence[Tensor]) -> Sequence[Tensor]:
            def total(*values: Tensor) -> Tensor:
                return loss(values, given)

            return torch.func.grad(total, argnums=tuple(range(len(point))))(*point)  # type: ignore[no-any-return]

        def reverse_gradient(point: Sequence[Tensor], given: Sequence[Tensor]) -> Sequence[Tensor]:
            with torch.enable_grad():
                leaves = [p if p.requires_grad else p.detach().requires_grad_() for p in point]
                total = loss(leaves, given)
                if not total.requires_grad:  # no parameter is used
                    return [torch.zeros_like(leaf) for leaf in leaves]
                return torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)

        def reverse() -> PointLinearization:
            return symmetric_products(reverse_gradient, weights, inputs)

        route = self.for_curvature(expected)
        if route == "double_backward":
            return reverse()
        return self._forward(
            f"gradient{chosen}", gradient, route, weights, inputs, reverse, cheaper_reverse=self.free
        )
