"""Directional derivatives of token losses, gradients and Hessian-vector products.

Everything is exact (no finite differences). Four routes compute the same numbers:

- ``adjoint``: one backward pass per scored token of a sequence, then one matrix product per weight
  and vector (see :mod:`polca_edit.derivatives.adjoint`); cheapest where few tokens are scored;
- ``traced``: one graph per model, cut into a part run once per checkpoint and a part run once per
  vector (see :mod:`polca_edit.derivatives.tracing`); cheapest once a few dozen vectors share the trace;
- ``jvp``: ``torch.func.jvp`` per vector; no set-up, best for small jobs;
- ``double_backward``: reverse mode only, for modules without forward-mode support.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polca_edit.basis.subsets import Chosen, Directions, NamedDirections, Subset, taken
from polca_edit.derivatives.adjoint import AdjointRoute, AdjointUnavailable
from polca_edit.derivatives.batches import Batch, LossAtSlots, slot_weights
from polca_edit.derivatives.curvature import BatchedProducts, CurvatureWork, linearised_batches
from polca_edit.derivatives.passes import PassCount as PassCount
from polca_edit.derivatives.routes import Route, Routes, matrix_products
from polca_edit.derivatives.settled import require_settled
from polca_edit.derivatives.tracing import PointFunction, PointLinearization
from polca_edit.parameters import ParameterSpace, call_with
from polca_edit.tokens import TokenLossFunction, TokenSet, scored_slots


class Objective:
    """A module, its chosen parameters and a token loss: what every derivative is taken of.

    >>> module = nn.Linear(1, 1, bias=False)
    >>> loss = Objective(module, lambda m, x: m(x).square())
    >>> tokens = TokenSet(torch.tensor([[2.0]]), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1))
    >>> loss.losses(torch.tensor([3.0]), tokens).tolist()  # (3 x 2)^2
    [36.0]
    >>> loss.directional(torch.tensor([3.0]), torch.ones(1, 1), tokens)[1].tolist()  # 2 x 3 x 2^2
    [[24.0]]

    Attributes:
        module: the model; its own weights are never changed by this class.
        token_loss: ``token_loss(module, inputs)`` -> (B, P) nats.
        space: which parameters, in which flat order.
        batch_size: sequences per batch; bounds memory, never changes a result beyond rounding.
        route: how derivatives are computed; ``auto`` picks by the number of vectors.
        compiled: pass traced tangent parts through ``torch.compile``.
        memory_budget: bytes for what the adjoint route keeps of a batch; batches shrink to fit.
        curvature_budget: bytes for linearised batches of a Hessian; batches shrink to fit, and are streamed.
        route_used: the route the last :meth:`directional` call really went, ``None`` before the first.
        curvature_route: the same of the last Hessian-vector product.
        streamed_batches: batches of the last Hessian that did not fit ``curvature_budget``.
        batch_bytes: what one of its linearised batches holds.
        passes: running count of the work done.
    """

    def __init__(
        self,
        module: nn.Module,
        token_loss: TokenLossFunction,
        space: ParameterSpace | None = None,
        *,
        batch_size: int = 256,
        route: Route = "auto",
        compiled: bool = False,
        memory_budget: int = 1 << 30,
        curvature_budget: int = 4 << 30,
    ) -> None:
        """See the attributes; ``space`` defaults to all trainable parameters."""
        self.module = module
        self.space = ParameterSpace.from_module(module) if space is None else space
        self.batch_size = batch_size
        self.route: Route = route
        self.compiled = compiled
        self.memory_budget = memory_budget
        self.curvature_budget = curvature_budget
        self.route_used: Route | None = None
        self.curvature_route: Route | None = None
        self.streamed_batches = self.batch_bytes = 0
        self.passes = PassCount()
        self.token_loss = token_loss

    @property
    def token_loss(self) -> TokenLossFunction:
        """The loss of every prediction slot; another one may be assigned."""
        return self._loss.token_loss

    @token_loss.setter
    def token_loss(self, token_loss: TokenLossFunction) -> None:
        # Whatever was traced or checked was so for the former loss.
        self._loss = LossAtSlots(token_loss)
        self._routes = Routes(self.route, self.compiled)
        self._adjoint: AdjointRoute | None = None
        self._adjoint_note = ""
        self._settled = False
        self._sequence_bytes: dict[tuple[object, ...], float] = {}

    @property
    def route_note(self) -> str:
        """Why a cheaper route was not taken, empty if it was."""
        notes = (self._adjoint_note, self._routes.note)
        return "; ".join(note for note in notes if note)

    # -- devices: the module's for the work, the caller's for what goes in and comes out -------------

    @property
    def device(self) -> torch.device:
        """Where the module's parameters live."""
        return next(self.module.parameters()).device

    def placed(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor on the module's device. Nothing else in the library moves a tensor there."""
        return tensor.to(self.device, dtype or tensor.dtype)

    def weights(
        self, flat: Float[Tensor, " N"], dtype: torch.dtype | None = None, *, apart: bool = True
    ) -> list[Tensor]:
        """Parameters in canonical order on the module's device, each with its own storage where ``apart``.

        A view into one long vector would make every forward-mode tangent as long as the vector.
        """
        values = self.space.unflatten(self.placed(flat, dtype)).values()
        return [value.clone() if apart else value for value in values]

    def batches(self, tokens: TokenSet) -> list[tuple[Tensor, Tensor]]:
        """(inputs, scored) on the module's device; the last batch may be shorter."""
        rows = tokens.batches(self.batch_size)
        return [(self.placed(tokens.inputs[some]), self.placed(tokens.scored[some])) for some in rows]

    def _batches(self, tokens: TokenSet, most: int | None = None) -> list[Batch]:
        """Batches of equal shapes, with the scored slots alone where the loss can be asked for them."""
        if not self._settled:
            require_settled(self.module, self.token_loss, self.placed(tokens.inputs[:2]))
            self._settled = True
        else:
            require_settled(self.module, self.token_loss, None)
        return self._loss.batches(self.module, tokens, most or self.batch_size, self.placed)

    def evaluate(self, function: Callable[..., Tensor], weights: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        """``function(module, *inputs)`` at other weights, from :meth:`weights`."""
        values = dict(zip(self.space.names, weights, strict=True))
        result: Tensor = call_with(self.module, self.space, values, function, *inputs)
        return result

    def _losses(self, weights: Sequence[Tensor], *given: Tensor) -> Tensor:
        return self.evaluate(self._loss, weights, *given)

    def losses(self, theta: Float[Tensor, " N"], tokens: TokenSet) -> Float[Tensor, " M"]:
        """Exact loss of every scored token, in nats.

        Raises:
            ValueError: if a loss is not finite.
        """
        weights, parts = self.weights(theta, apart=False), []
        with torch.no_grad():
            for batch in self._batches(tokens):
                parts.append(self._losses(weights, *batch.given)[batch.kept].cpu())
        self.passes.forward += tokens.sequences
        result = torch.cat(parts)
        if not torch.isfinite(result).all():
            raise ValueError(
                "token losses must be finite, got NaN or infinity; are this checkpoint's weights damaged?"
            )
        return result

    # -- directional derivatives ---------------------------------------------------------------

    def directional(
        self,
        theta: Float[Tensor, " N"],
        rows: Float[Tensor, "K N"] | Directions,
        tokens: TokenSet,
        *,
        expected: int | None = None,
        products: torch.dtype | None = None,
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, "K M"]]:
        """Token losses and <v, grad l_x(theta)> for every row v, in nats (per unit of v).

        Args:
            theta: weights.
            rows: directions; those that lie in a few tensors are differentiated through these alone.
            tokens: where.
            expected: number of vectors this objective will see in all, for the choice of route.
            products: type of the matrix products of slopes, whose sums stay in the type of theta; default
                that of theta. On the adjoint route those with rows, on others all that a row goes through.
                Losses are exact in any case. :func:`~polca_edit.derivatives.rounding.slope_rounding`
                measures what fewer bits cost.
        """
        given = Directions.of(rows)
        planned = expected if expected is not None else len(given)
        if self.wants_adjoint(given.moving, tokens, planned):
            try:
                return self._directional_adjoint(theta, given, tokens, products or theta.dtype)
            except AdjointUnavailable as reason:
                if self.route == "adjoint":
                    raise ValueError(
                        f"route 'adjoint' must fit the model: {reason}; use route 'auto'"
                    ) from reason
                self._adjoint, self._adjoint_note = None, str(reason)
        route = self._routes.choose(planned)
        weights, values, slopes = self.weights(theta), [], []
        chosen = [Chosen(self.space, group.inside) for group in given.groups]
        with torch.no_grad():
            for batch in self._batches(tokens):
                kept, parts, last = batch.kept, [], None
                for moving, group in zip(chosen, given.groups, strict=True):
                    if last != moving.flags:  # groups of the same tensors share what is linearised
                        linear, last = self._linear_losses(route, weights, batch.given, moving), moving.flags
                    losses = linear.values[0][kept].cpu()
                    with matrix_products(products):
                        found = [
                            linear(self._tangents(moving, v, theta.dtype))[0][kept].cpu() for v in group.rows
                        ]
                    parts.append(torch.stack(found) if found else losses.new_zeros(0, len(losses)))
                values.append(losses)
                slopes.append(given.joined(parts, losses))
        self.route_used = self._routes.taken(route)
        self.passes.forward += tokens.sequences
        self.passes.tangent += tokens.sequences * len(given)
        return torch.cat(values), torch.cat(slopes, dim=1)

    def _tangents(
        self, chosen: Chosen, entries: Tensor, dtype: torch.dtype, apart: bool = True
    ) -> list[Tensor]:
        """Tangents of the chosen tensors on the module's device."""
        return chosen.tangents(self.placed(entries, dtype), apart=apart)

    def wants_adjoint(self, count: int, tokens: TokenSet, planned: int) -> bool:
        """Whether the adjoint route was asked for, or is the cheapest and not known to fail."""
        if self.route != "auto":
            return self.route == "adjoint"
        if self._adjoint_note or count == 0:
            return False
        return self._routes.adjoint_pays(int(tokens.scored.sum(1).max()), count, planned)

    def _directional_adjoint(
        self, theta: Float[Tensor, " N"], given: Directions, tokens: TokenSet, products: torch.dtype
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, "K M"]]:
        """Losses and slopes from the scored tokens' cotangents (:mod:`polca_edit.derivatives.adjoint`)."""
        if self._adjoint is None:
            self._adjoint = AdjointRoute(self.module, self.space, self.token_loss, self.memory_budget)
        values = self.space.unflatten(self.placed(theta))
        directions = NamedDirections.of(given, self.space, lambda rows: self.placed(rows, products))
        slots, valid = scored_slots(tokens.scored)
        ranks = slots.shape[1]
        first = slice(self.batch_size)
        self._adjoint.prepare(values, self.placed(tokens.inputs[first]), self.placed(slots[first]))
        size = self._adjoint.chunk(ranks, theta.element_size(), self.batch_size)
        losses, slopes = [], []
        with torch.no_grad():
            for batch in tokens.batches(size):
                found, parts = self._adjoint.slopes(
                    values, directions, self.placed(tokens.inputs[batch]), self.placed(slots[batch])
                )
                losses.append(found.cpu()[valid[batch]])
                slopes.append(parts.cpu()[valid[batch]])
        self.route_used = "adjoint"
        self.passes.forward += tokens.sequences
        self.passes.backward += tokens.sequences * ranks
        self.passes.tangent += tokens.sequences * len(given)
        return torch.cat(losses), torch.cat(slopes).T.contiguous()

    def linear(
        self, kind: str, function: PointFunction, weights: list[Tensor], inputs: Sequence[Tensor]
    ) -> PointLinearization:
        """The derivative of another function of weights and inputs; ``kind`` names it among its traces."""
        return self._routes.linear(kind, function, self._routes.choose(1), weights, list(inputs))

    def _linear_losses(
        self, route: Route, weights: list[Tensor], inputs: Sequence[Tensor], chosen: Chosen
    ) -> PointLinearization:
        moving, fixed = chosen.parted(weights)
        first = len(fixed)

        def function(point: Sequence[Tensor], given: Sequence[Tensor]) -> Sequence[Tensor]:
            return (self._losses(chosen.merged(point, given[:first]), *given[first:]),)

        return self._routes.linear(f"losses{chosen.name}", function, route, moving, [*fixed, *inputs])

    # -- gradients and curvature of the mean loss ------------------------------------------------

    def mean_gradient(
        self,
        theta: Float[Tensor, " N"],
        tokens: TokenSet,
        weights: Float[Tensor, " M"] | None = None,
        *,
        inside: Subset | None = None,
    ) -> tuple[float, Float[Tensor, " n"]]:
        """Mean loss and its gradient; with ``weights`` (M,) the weighted sum instead of the mean.

        With ``inside`` the gradient has those entries alone.

        The mean is over all scored tokens (sum divided once by the count), so unequal batches
        do not matter.
        """
        batches, token_weights = self._weighted(tokens, weights, theta.dtype)
        chosen = Chosen(self.space, inside)
        parts, fixed = chosen.parted(self.weights(theta))
        parts = [w.requires_grad_() for w in parts]
        whole = chosen.merged(parts, fixed)
        total = self.placed(theta.new_zeros(()))
        gradient = self.placed(torch.zeros_like(taken(theta, inside)))
        for batch, each in zip(batches, token_weights, strict=True):
            with torch.enable_grad():
                loss = (self._losses(whole, *batch.given) * each).sum()
                grads = torch.autograd.grad(loss, parts, materialize_grads=True)
            total += loss.detach()
            gradient += chosen.entries(torch.cat([g.reshape(-1) for g in grads]))
            self.passes.forward += len(batch.rows)
            self.passes.backward += len(batch.rows)
        return float(total), gradient.to(theta)

    def _weighted(
        self, tokens: TokenSet, weights: Tensor | None, dtype: torch.dtype, most: int | None = None
    ) -> tuple[list[Batch], list[Tensor]]:
        """Batches, and per batch the weight of each slot's loss, zero where nothing is scored."""
        if weights is None:
            weights = torch.full((tokens.count,), 1.0 / tokens.count, dtype=dtype)
        batches = self._batches(tokens, most)
        return batches, slot_weights(batches, weights.to(dtype), self.placed)

    def curvature_work(
        self, theta: Float[Tensor, " N"], tokens: TokenSet, *, inside: Subset | None = None
    ) -> CurvatureWork:
        """The batches in which products with a sample's Hessian keep to ``curvature_budget``.

        What a sequence takes is measured by reverse mode, once a shape, on one with the most scored slots.
        """
        chosen, scored = Chosen(self.space, inside), tokens.scored.sum(1)
        key = (theta.dtype, chosen.name, tuple(tokens.inputs.shape[1:]), int(scored.max()))
        if key not in self._sequence_bytes:
            [batch], [each] = self._weighted(tokens.select(scored.argmax()[None]), None, theta.dtype)
            at, reverse = partial(self.weights, theta), Routes("double_backward")
            linearise = linearised_batches(self._losses, reverse, chosen, at, 0)
            self._sequence_bytes[key] = float(linearise(batch, each).kept_bytes)
        most, held, traced = self.batch_size, self._sequence_bytes[key], self.route == "traced"
        return CurvatureWork.of(tokens.sequences, most, held, self.curvature_budget, traced)

    def hessian(
        self,
        theta: Float[Tensor, " N"],
        tokens: TokenSet,
        *,
        weights: Float[Tensor, " M"] | None = None,
        expected: int = 8,
        inside: Subset | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """The product v -> H v for the mean (or weighted) token loss at theta.

        The gradient is linearised once per batch, by reverse mode twice or, where many products are wanted
        and all traces fit ``curvature_budget``, traced; each product then costs about five forward passes.
        Linearised batches stay in memory as long as the returned function lives, those beyond the budget are
        linearised anew for every product.

        Args:
            theta: weights; they must stay as they are while the product is used.
            tokens: the sample the loss is averaged over.
            weights: optional (M,) weights of the token losses.
            expected: number of products wanted, for the choice of route.
            inside: entries between which the Hessian is wanted: vectors and products have those alone.
                Tensors with no such entry are not differentiated.
        """
        chosen, dtype, at = Chosen(self.space, inside), theta.dtype, partial(self.weights, theta)
        work = self.curvature_work(theta, tokens, inside=inside)
        batches, token_weights = self._weighted(tokens, weights, dtype, work.size)
        passes = work.passes(expected)
        reverse = self._routes.for_curvature(passes) == "double_backward"
        linearise = linearised_batches(self._losses, self._routes, chosen, at, passes)
        makers = [partial(linearise, b, w) for b, w in zip(batches, token_weights, strict=True)]
        maps = BatchedProducts(makers, self.curvature_budget)
        self.streamed_batches, self.batch_bytes = maps.streamed, maps.kept_bytes

        def product(vector: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
            with torch.no_grad():
                result = chosen.entries(maps(self._tangents(chosen, vector, dtype, not reverse)))
            self.passes.hvp += tokens.sequences
            self.curvature_route = self._routes.taken(self._routes.for_curvature(passes))
            return result.to(vector.device)

        return product

    def token_gradients(self, theta: Float[Tensor, " N"], tokens: TokenSet) -> Float[Tensor, "M N"]:
        """Every token's own gradient (M, N): for small problems and references only."""
        weights = self.weights(theta)
        rows = []
        for batch in self._batches(tokens):
            with torch.enable_grad():
                leaves = [w.detach().requires_grad_() for w in weights]
                for loss in self._losses(leaves, *batch.given)[batch.kept]:
                    grads = torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
                    rows.append(torch.cat([g.reshape(-1) for g in grads]))
        self.passes.forward += tokens.sequences
        self.passes.backward += tokens.count
        return torch.stack(rows).to(theta.device)
