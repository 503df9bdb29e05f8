"""Directional derivatives of few scored tokens from their cotangents.

Forward mode pays about two matrix products per weight and vector. Where a sequence has few scored
tokens (R), reverse mode is cheaper: R backward passes per checkpoint give, for every linear map
y = W a + b, the cotangents delta = d loss / d y, and then

    <V, d loss_{x,r} / d W> = sum_l delta[x, r, l] . (V a[x, l])

needs one matrix product per weight and vector, and positions whose cotangents are all exactly zero
(what a causal model cannot have used) need none. Where R is much smaller than the number of
positions, the per-token gradient sum_l delta a' is formed once, in blocks that fit the cache, and
multiplied with all vectors.

Modules are watched with forward hooks: ``nn.Linear``, ``nn.LayerNorm``, ``nn.Embedding`` and the
``Conv1D`` of GPT-2, called any number of times per forward, tied or not. Parameters used without such
a module (``einsum``, ``@``, ``*``, ``+``, an index) are watched call by call
(:mod:`polca_edit.derivatives.operations`). Every parameter's share is checked against autograd before
the route is used; parameters that disagree or are used in another way get explicit per-token gradients,
and if those do not fit, the route declares itself unavailable.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polca_edit.basis.subsets import NamedDirections
from polca_edit.derivatives.contacts import (
    Contact,
    Kind,
    contact_shares,
    cotangents,
    kind_of,
    pointwise_share,
    rows_are_apart,
    slotwise_head,
)
from polca_edit.derivatives.heads import SlotLoss, at_slots, takes_slots
from polca_edit.derivatives.operations import Operation, WatchedOperations
from polca_edit.parameters import ParameterSpace, call_with
from polca_edit.tokens import TokenLossFunction


class AdjointUnavailable(RuntimeError):
    """The model cannot be differentiated by this route within the budget; use another."""


@dataclass
class AdjointRoute:
    """Cotangents and their contractions for one objective.

    Attributes:
        module: the model.
        space: which parameters, in which order.
        token_loss: (module, inputs) -> (B, P) nats.
        memory_budget: bytes that activations, cotangents and explicit gradients may take.
        leftovers: parameters that need explicit per-token gradients, found by the check.
    """

    module: nn.Module
    space: ParameterSpace
    token_loss: TokenLossFunction
    memory_budget: int
    leftovers: tuple[str, ...] = ()
    _head: int | None = None
    _slot_loss: SlotLoss = field(init=False, repr=False)
    _batched: list[bool] = field(default_factory=list, repr=False)
    _bytes: list[tuple[int, int]] = field(default_factory=list, repr=False)
    _checked: set[tuple[object, ...]] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        self._slot_loss = at_slots(self.token_loss)

    def _picked(self, values: Mapping[str, Tensor], inputs: Tensor, slots: Tensor) -> Tensor:
        """Losses (B, R) of the chosen slots."""
        found: Tensor = call_with(self.module, self.space, values, self._slot_loss, inputs, slots)
        return found

    # -- watching -------------------------------------------------------------------------------

    @contextmanager
    def _watched(
        self,
        contacts: list[Contact | Operation],
        values: Mapping[str, Tensor],
        given: tuple[Tensor, Tensor],
        shapes: list[tuple[int, ...]],
        *,
        batch: int | None = None,
        wanted: Container[str] = (),
    ) -> Iterator[None]:
        """Within the block calls on ``given`` that hold a wanted parameter are recorded, and all shapes."""
        canonical, handles = dict(self.space.aliases), []

        def keep(operation: Operation, size: int) -> Tensor:
            result = operation.result
            shapes.append((len(result), size, result[0].numel()))
            if batch is None or not any(name in wanted for name, _ in operation.parts):
                return result
            if not result.requires_grad:
                result = result.detach().requires_grad_()
            contacts.append(Operation(operation.parts, result))
            return result

        operations = WatchedOperations(values, given, keep)
        for path, module in self.module.named_modules():
            kind = kind_of(module)
            names = [
                canonical.get(f"{path}.{attribute}" if path else attribute)
                for attribute in ("weight", "bias")
            ]
            if kind is None or names == [None, None]:
                continue

            def enter(module: nn.Module, args: Any) -> None:
                operations.inside += 1

            def hook(
                module: nn.Module,
                args: Any,
                kwargs: Any,
                output: Tensor,
                kind: Kind = kind,
                names: Any = tuple(names),
            ) -> Tensor | None:
                operations.inside -= 1
                given = args[0] if args else kwargs["input"]
                shapes.append((*given.shape[:1], given[0].numel(), output[0].numel()))
                if batch is None or not any(name in wanted for name in names):
                    return None
                return self._record(contacts, kind, names, module, given, output, batch, len(shapes) - 1)

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            with operations:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(
        self,
        contacts: list[Contact | Operation],
        kind: Kind,
        names: tuple[str | None, str | None],
        module: nn.Module,
        given: Tensor,
        output: Tensor,
        batch: int,
        number: int,
    ) -> Tensor:
        entry = given
        if not self._batched[number]:
            # A call that all sequences share, such as a position embedding, gets one copy each.
            given = (
                given.expand(batch, *given.shape[1:])
                if len(given) == 1
                else given.expand(batch, *given.shape)
            )
            output = (
                output.expand(batch, *output.shape[1:])
                if len(output) == 1
                else output.expand(batch, *output.shape)
            )
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        given = given.detach()
        if kind == "norm":
            assert isinstance(module, nn.LayerNorm)
            given = nn.functional.layer_norm(given, module.normalized_shape, None, None, module.eps)
        given = given.reshape(batch, -1) if kind == "embedding" else given.reshape(batch, -1, given.shape[-1])
        contacts.append(Contact(kind, names[0], names[1], given, output, number, entry))
        return output

    def _probe(self, values: Mapping[str, Tensor], inputs: Tensor, slots: Tensor) -> None:
        """Find which calls carry the batch axis, by running two and three sequences."""
        seen = []
        for count in (2, 3):
            shapes: list[tuple[int, ...]] = []
            rows = torch.arange(count, device=inputs.device) % len(inputs)
            given = inputs[rows], slots[rows]
            with torch.no_grad(), self._watched([], values, given, shapes):
                self._picked(values, *given)
            seen.append(shapes)
        if len(seen[0]) != len(seen[1]):
            raise AdjointUnavailable("the model makes other calls for another batch size")
        self._batched = [(a[0], b[0]) == (2, 3) for a, b in zip(*seen, strict=True)]
        self._bytes = [(shape[1], shape[2]) for shape in seen[0]]
        contacts: list[Contact | Operation] = []
        with torch.enable_grad(), self._watched(contacts, values, given, [], batch=count, wanted=values):
            losses = self._picked(values, *given)
            # A loss that is not asked for slots has rows of positions, which may be as many as the slots.
            found = slotwise_head(contacts, slots.shape[1], inputs.shape[-1] - 1)
            asked = found is not None and takes_slots(self.token_loss)
            self._head = found.number if found and asked and rows_are_apart(losses, found) else None

    def chunk(self, ranks: int, itemsize: int, most: int) -> int:
        """Sequences that fit the memory budget at once.

        Raises:
            AdjointUnavailable: if not even one does.
        """
        left = sum(self.space.sizes[self.space.names.index(name)] for name in self.leftovers)
        # Of a head of scored slots there is one cotangent, not one for every rank.
        calls = ((g, r, 1 if n == self._head else ranks) for n, (g, r) in enumerate(self._bytes))
        each = itemsize * (sum(g + (times + 3) * r for g, r, times in calls) + ranks * left)
        if each > self.memory_budget:
            raise AdjointUnavailable(f"one sequence needs {each} bytes, the budget is {self.memory_budget}")
        # Before the check nothing may have been watched yet.
        return max(1, min(most, self.memory_budget // max(1, each)))

    # -- cotangents -----------------------------------------------------------------------------

    def _cotangents(
        self, values: Mapping[str, Tensor], inputs: Tensor, slots: Int[Tensor, "B R"], wanted: Container[str]
    ) -> tuple[Tensor, list[Contact | Operation], list[Tensor]]:
        """(losses (B, R), calls that hold a wanted parameter, per call (B, R, L, out))."""
        contacts: list[Contact | Operation] = []
        seen: list[tuple[int, ...]] = []
        watched = self._watched(contacts, values, (inputs, slots), seen, batch=len(inputs), wanted=wanted)
        with torch.enable_grad(), watched:
            losses = self._picked(values, inputs, slots)
        if len(seen) != len(self._bytes):  # a call that is not seen would be missing from every slope
            raise AdjointUnavailable("the model makes other calls for another batch size")
        ranks, positions = slots.shape[1], inputs.shape[-1] - 1
        head = None if self._head is None else slotwise_head(contacts, ranks, positions, self._head)
        return losses.detach(), contacts, cotangents(losses, contacts, head)

    def _leftover_gradients(
        self, values: Mapping[str, Tensor], inputs: Tensor, slots: Int[Tensor, "B R"], wanted: Container[str]
    ) -> dict[str, Tensor]:
        """Explicit per-token gradients (B, R, size) of the wanted leftover parameters."""
        chosen = {name: values[name] for name in self.leftovers if name in wanted}
        if not chosen:
            return {}

        def losses(chosen: dict[str, Tensor], row: Tensor, slot: Tensor) -> Tensor:
            return self._picked({**values, **chosen}, row[None], slot[None])[0]

        with torch.enable_grad():
            grads = torch.func.vmap(torch.func.jacrev(losses), in_dims=(None, 0, 0))(chosen, inputs, slots)
        return {name: grad.detach().flatten(2) for name, grad in grads.items()}

    # -- contraction ----------------------------------------------------------------------------

    def _shares(
        self,
        values: Mapping[str, Tensor],
        rows: Mapping[str, Sequence[Tensor]],
        inputs: Tensor,
        slots: Int[Tensor, "B R"],
    ) -> tuple[Tensor, Iterator[tuple[str, Tensor]]]:
        """Losses, and each moved parameter's share (B, R, k) of <row, grad loss>, call by call."""
        losses, contacts, deltas = self._cotangents(values, inputs, slots, rows)
        explicit = self._leftover_gradients(values, inputs, slots, rows)
        skip = (*self.leftovers, *(name for name in self.space.names if name not in rows))

        def shares() -> Iterator[tuple[str, Tensor]]:
            while contacts:
                contact, delta = contacts.pop(), deltas.pop()
                if isinstance(contact, Operation):
                    yield from contact.shares(delta, rows, skip)
                else:
                    yield from contact_shares(contact, delta, rows, skip)
            for name, gradient in explicit.items():
                yield name, pointwise_share(gradient, rows[name])

        return losses, shares()

    def slopes(
        self,
        values: Mapping[str, Tensor],
        directions: NamedDirections,
        inputs: Tensor,
        slots: Int[Tensor, "B R"],
    ) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R K"]]:
        """Token losses and <row, grad loss> of the R chosen slots of every sequence.

        Args:
            values: canonical name -> weights.
            directions: tensor by tensor.
            inputs: (B, ...) sequences.
            slots: which prediction slots, per sequence.

        Raises:
            AdjointUnavailable: see :meth:`check`.
        """
        losses, shares = self._shares(values, directions.rows, inputs, slots)
        total: Tensor | None = None
        if directions.places is not None:
            total = losses.new_zeros(*losses.shape, directions.count)
        for name, share in shares:
            if directions.places is not None and total is not None:
                total.index_add_(2, directions.places[name], share)
            else:
                total = share if total is None else total.add_(share)
        if total is None:  # the losses depend on no parameter
            total = losses.new_zeros(*losses.shape, directions.count)
        return losses, total

    def prepare(self, values: Mapping[str, Tensor], inputs: Tensor, slots: Int[Tensor, "B R"]) -> None:
        """Probe and check the route once per input shape and precision.

        Raises:
            AdjointUnavailable: if the route is wrong or too large for this model.
        """
        key = (next(iter(values.values())).dtype, *inputs.shape[1:])
        if key in self._checked:
            return
        try:
            self._probe(values, inputs, slots)
            # Late slots see the most of a causal model: at slot 0 attention has no gradient to check.
            few = slots.amax(1).topk(min(len(inputs), 4)).indices
            self.chunk(slots.shape[1], 8, len(few))
            self.check(values, inputs[few], slots[few])
        except AdjointUnavailable:
            raise
        except (RuntimeError, TypeError, KeyError, IndexError, NotImplementedError) as error:
            raise AdjointUnavailable(f"the model resists being watched: {error}") from error
        self._checked.add(key)

    def check(self, values: Mapping[str, Tensor], inputs: Tensor, slots: Int[Tensor, "B R"]) -> None:
        """Compare each parameter's share with autograd, for random weights and a random direction.

        Sum over tokens of r times the share must be <v, grad sum r loss>. Parameters that disagree
        become leftovers; if they then still disagree, the route is unavailable.

        Raises:
            AdjointUnavailable: as said.
        """
        wrong = self._disagreeing(values, inputs, slots)
        if wrong and self._head is not None:
            self._head = None
            wrong = self._disagreeing(values, inputs, slots)
        if wrong:
            self.leftovers = tuple(
                name for name in self.space.names if name in wrong or name in self.leftovers
            )
            still = self._disagreeing(values, inputs, slots)
            if still:
                raise AdjointUnavailable(
                    f"per-token derivatives disagree with autograd for {sorted(still)[:3]}"
                )

    def _disagreeing(
        self, values: Mapping[str, Tensor], inputs: Tensor, slots: Int[Tensor, "B R"]
    ) -> set[str]:
        generator = torch.Generator().manual_seed(0)
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        with torch.enable_grad():
            losses = self._picked(leaves, inputs, slots)
            random = torch.randn(slots.shape, generator=generator, dtype=torch.float64).to(losses)
            pulled = torch.autograd.grad((losses * random).sum(), list(leaves.values()), allow_unused=True)
        rows = {
            name: torch.randn(1, *value.shape, generator=generator, dtype=torch.float64).to(value)
            for name, value in values.items()
        }
        _, shares = self._shares(values, {name: (row,) for name, row in rows.items()}, inputs, slots)
        found, watched = dict.fromkeys(values, 0.0), set()
        for name, share in shares:
            watched.add(name)
            found[name] += float((share[..., 0].double() * random.double()).sum())
        # <v, g> of a random v has the size of |g|; noise below a thousandth of the whole is no disagreement.
        wanted, size = {}, {}
        for name, gradient in zip(values, pulled, strict=True):
            wanted[name] = (
                0.0 if gradient is None else float((gradient.double() * rows[name][0].double()).sum())
            )
            size[name] = 0.0 if gradient is None else float(gradient.double().norm())
        whole = sum(s * s for s in size.values()) ** 0.5
        tolerance = 1e-3 if random.dtype != torch.float64 else 1e-8
        # A derivative of zero here agrees with not being watched at all, and need not be zero elsewhere.
        unwatched = {
            name
            for name, gradient in zip(values, pulled, strict=True)
            if gradient is not None and name not in watched
        }
        return unwatched | {
            n for n in values if abs(found[n] - wanted[n]) > tolerance * (size[n] + 1e-2 * whole)
        }
