"""The adjoint route against explicit per-token gradients, and its own alarm."""

from __future__ import annotations

import pytest
import torch
from oracles import copied_with, text_tokens, tiny_bridge, tiny_gpt2
from torch import Tensor, nn

from experiments.tasks import arithmetic
from polca_edit.basis.subsets import Directions, NamedDirections
from polca_edit.derivatives import contacts
from polca_edit.derivatives.adjoint import AdjointRoute, AdjointUnavailable
from polca_edit.derivatives.contacts import linear_share
from polca_edit.derivatives.objective import Objective
from polca_edit.derivatives.rounding import slope_rounding
from polca_edit.models import TransformerShape, build_small_transformer
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet, scored_slots


def next_token_loss(module: nn.Module, inputs: Tensor) -> Tensor:
    logits = module(inputs[:, :-1])
    logits = logits.logits if hasattr(logits, "logits") else logits
    return nn.functional.cross_entropy(logits.transpose(1, 2), inputs[:, 1:], reduction="none")


def by_token_gradients(module: nn.Module, loss, tokens: TokenSet, rows: Tensor) -> Tensor:
    """<row, grad> of every scored token, from one backward pass per token on the module's own weights."""
    parameters, found = list(module.parameters()), []
    for sequence, slot in tokens.scored.nonzero().tolist():
        value = loss(module, tokens.inputs[sequence : sequence + 1])[0, slot]
        grads = torch.autograd.grad(value, parameters, materialize_grads=True)
        found.append(rows @ torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(found, 1)


def few_scored(generator: torch.Generator) -> TokenSet:
    """Seven sequences with none to three scored slots, at different places."""
    inputs = torch.randint(0, 13, (7, 8), generator=generator)
    scored = torch.rand(7, 7, generator=generator) < 0.25
    scored[2] = False
    scored[3, :3] = True
    return TokenSet(inputs, scored, torch.arange(7))


class Awkward(nn.Module):
    """A layer used twice, tied (un)embedding, a bare scale, shared positions, a weight used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(13, 6), nn.Embedding(8, 6)
        self.twice, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.randn(6))
        self.by_hand = nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 13, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.places(torch.arange(tokens.shape[1]))
        x = torch.tanh(self.twice(x)).cumsum(1)
        x = x + torch.tanh(self.twice(self.norm(x))) * self.scale
        x = x + torch.tanh(self.by_hand(x)) + nn.functional.linear(x, self.by_hand.weight).sin()
        return self.out(x)


class Mixing(nn.Module):
    """Sequences of a batch see each other, so no per-sequence derivative exists."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(13, 6), nn.Linear(6, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.out(x - x.mean(0))


def small() -> nn.Module:
    return build_small_transformer(TransformerShape(2, 16, 2, 32, 13, 8), 1)


def awkward() -> nn.Module:
    torch.manual_seed(3)
    return Awkward()


MODELS = {
    "plain": small,
    "gpt2 tied": tiny_gpt2,
    "gpt2 untied": lambda: tiny_gpt2(tied=False),
    "bridge": tiny_bridge,
    "awkward": awkward,
}


@pytest.mark.parametrize("name", MODELS)
def test_route_equals_token_gradients(name, generator):
    # A bridge computes its norms by hand from the weights: those calls are watched one by one.
    module = MODELS[name]().double()
    space, tokens = ParameterSpace.from_module(module), few_scored(generator)
    rows = torch.randn(3, space.size, generator=generator, dtype=torch.float64)
    wanted = by_token_gradients(module, next_token_loss, tokens, rows)
    objective = Objective(module, next_token_loss, space, batch_size=3, route="adjoint")
    losses, slopes = objective.directional(space.read(module), rows, tokens)
    torch.testing.assert_close(slopes, wanted, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(losses, next_token_loss(module, tokens.inputs)[tokens.scored])
    assert objective.route_used == "adjoint"
    assert objective._adjoint.leftovers == ()
    # Every sequence once, one backward pass per scored slot of the fullest one.
    assert objective.passes.backward == 7 * int(tokens.scored.sum(1).max())


def test_other_weights_than_the_models_own(generator):
    module = small().double()
    space, tokens = ParameterSpace.from_module(module), few_scored(generator)
    theta = space.read(module) + 0.1 * torch.randn(space.size, generator=generator, dtype=torch.float64)
    rows = torch.randn(2, space.size, generator=generator, dtype=torch.float64)
    objective = Objective(module, next_token_loss, space, route="adjoint")
    before = space.read(module)
    slopes = objective.directional(theta, rows, tokens)[1]
    wanted = by_token_gradients(copied_with(module, theta), next_token_loss, tokens, rows)
    torch.testing.assert_close(slopes, wanted, rtol=1e-9, atol=1e-11)
    assert torch.equal(before, space.read(module))
    assert not any(m._forward_hooks for m in module.modules())


def test_subset_of_parameters(generator):
    module = small().double()
    space = ParameterSpace.from_module(module, ("blocks.1.mlp.*", "pos_embed.weight"))
    tokens = few_scored(generator)
    rows = torch.randn(2, space.size, generator=generator, dtype=torch.float64)
    theta = space.read(module)
    found = Objective(module, next_token_loss, space, route="adjoint").directional(theta, rows, tokens)[1]
    wanted = Objective(module, next_token_loss, space, route="jvp").directional(theta, rows, tokens)[1]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_sequences_that_see_each_other_are_refused(generator):
    module = Mixing().double()
    space, tokens = ParameterSpace.from_module(module), few_scored(generator)
    rows = torch.randn(80, space.size, generator=generator, dtype=torch.float64)
    with pytest.raises(ValueError, match="disagree with autograd"):
        Objective(module, next_token_loss, space, route="adjoint").directional(
            space.read(module), rows, tokens
        )
    objective = Objective(module, next_token_loss, space)
    objective.directional(space.read(module), rows, tokens)
    assert objective.route_used == "traced"
    assert "disagree" in objective.route_note


def test_check_notices_a_wrong_share(generator, monkeypatch):
    module = small().double()
    space, tokens = ParameterSpace.from_module(module), few_scored(generator)
    values = space.unflatten(space.read(module))
    right = contacts.linear_share
    monkeypatch.setattr(contacts, "linear_share", lambda *given, **more: right(*given, **more) * 1.0001)
    route = AdjointRoute(module, space, next_token_loss, 1 << 30)
    route.prepare(values, tokens.inputs, torch.tensor([[2, 6]]).expand(7, 2))
    skipped = ("embed", "pos_embed", "ln_final")
    linear = {n for n in space.names if n.endswith("weight") and ".ln" not in n and not n.startswith(skipped)}
    assert set(route.leftovers) == linear


def test_smaller_budget_same_numbers_and_too_small_is_refused(generator):
    module = small().double()
    space, tokens = ParameterSpace.from_module(module), few_scored(generator)
    rows = torch.randn(2, space.size, generator=generator, dtype=torch.float64)
    theta = space.read(module)
    wide = Objective(module, next_token_loss, space, route="adjoint").directional(theta, rows, tokens)[1]
    route = AdjointRoute(module, space, next_token_loss, 1 << 30)
    route.prepare(space.unflatten(theta), tokens.inputs, torch.zeros(7, 3, dtype=torch.long))
    each = (1 << 30) // route.chunk(3, 8, 1 << 30)
    tight = Objective(module, next_token_loss, space, route="adjoint", memory_budget=2 * each + 64)
    torch.testing.assert_close(tight.directional(theta, rows, tokens)[1], wide, rtol=1e-11, atol=1e-13)
    assert tight._adjoint.chunk(3, 8, 7) == 2
    route.memory_budget = each // 2
    with pytest.raises(AdjointUnavailable, match="budget"):
        route.chunk(3, 8, 7)


@pytest.mark.parametrize(("ranks", "length", "count"), [(1, 40, 30), (4, 5, 6), (2, 0, 3)])
def test_both_orders_of_products(ranks, length, count, generator, monkeypatch):
    monkeypatch.setattr(contacts, "CACHE_BLOCK", 2000)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    given, delta, vectors = random(70, length, 5), random(70, ranks, length, 7), random(count, 5, 7)
    wanted = torch.einsum("xrlo,xli,kio->xrk", delta, given, vectors)
    torch.testing.assert_close(linear_share(given, delta, [vectors], transposed=False), wanted)
    turned = vectors.transpose(1, 2).contiguous()
    torch.testing.assert_close(linear_share(given, delta, [turned], transposed=True), wanted)
    # Directions that lie in several tables, some of which are columns of wider ones.
    tables = [turned[:1], torch.cat([turned, turned], 2)[1:, :, :5]]
    torch.testing.assert_close(linear_share(given, delta, tables, transposed=True), wanted)


@pytest.mark.parametrize("block", [600, 1 << 20])
def test_positions_after_the_last_cotangent_are_left_out_and_no_other(block, generator, monkeypatch):
    """A causal model's cotangents: rank r of sequence x ends somewhere, one rank of all nowhere."""
    monkeypatch.setattr(contacts, "CACHE_BLOCK", block)
    given = torch.randn(70, 9, 5, generator=generator, dtype=torch.float64)
    delta = torch.randn(70, 3, 9, 7, generator=generator, dtype=torch.float64)
    vectors = torch.randn(60, 7, 5, generator=generator, dtype=torch.float64)
    ends = torch.stack([torch.arange(70) % 4, 4 + torch.arange(70) % 5, torch.zeros(70, dtype=torch.long)], 1)
    delta[torch.arange(9) >= ends[:, :, None]] = 0.0
    delta[:, 1, 7] = -delta[:, 1, 7].abs()  # a position where nothing is above zero
    assert contacts.last_used(delta) == [3, 8, 1]
    wanted = torch.einsum("xrlo,xli,koi->xrk", delta, given, vectors)
    torch.testing.assert_close(linear_share(given, delta, [vectors], transposed=True), wanted)


@pytest.mark.parametrize(("ranks", "length", "count"), [(1, 40, 30), (4, 5, 6)])
def test_products_in_fewer_bits_are_those_of_rounded_factors(ranks, length, count, generator):
    """Factors that bfloat16 holds exactly, whose sums float32 holds exactly: nothing may be lost but that."""

    def whole(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator).float()

    given, delta, vectors = whole(6, length, 5), whole(6, ranks, length, 7), whole(count, 5, 7)
    wanted = torch.einsum("xrlo,xli,kio->xrk", delta, given, vectors)
    found = linear_share(given, delta, [vectors.bfloat16()], transposed=False)
    assert found.dtype == torch.float32
    if length == 5:  # V a is at most 80, which eight bits hold
        assert torch.equal(found, wanted)
    else:
        torch.testing.assert_close(found, wanted, rtol=0, atol=float(wanted.abs().max()) * 2**-8)


def test_slopes_by_products_in_fewer_bits(generator):
    module = small()
    space, tokens = ParameterSpace.from_module(module), few_scored(generator)
    theta, rows = space.read(module), torch.randn(8, space.size, generator=generator)
    objective = Objective(module, next_token_loss, space, route="adjoint")
    losses, exact = objective.directional(theta, rows, tokens)
    same, found = objective.directional(theta, rows, tokens, products=torch.bfloat16)
    assert torch.equal(losses, same)
    error = float((found - exact).double().norm() / exact.double().norm())
    assert 1e-5 < error < 2**-7  # eight bits, and not the exact numbers once more
    assert slope_rounding(objective, theta, rows, tokens, torch.bfloat16) == pytest.approx(error, rel=0.5)


@pytest.mark.parametrize("route", ["traced", "jvp", "double_backward"])
def test_on_other_routes_a_row_goes_through_products_in_fewer_bits_and_losses_do_not(
    route, generator, monkeypatch
):
    module = small()
    space, tokens = ParameterSpace.from_module(module), few_scored(generator)
    theta, rows = space.read(module), torch.randn(4, space.size, generator=generator)
    objective, seen = Objective(module, next_token_loss, space, route=route), []
    losses, exact = objective.directional(theta, rows, tokens)
    real = Objective._tangents

    def noted(*given):
        seen.append(torch.get_float32_matmul_precision())
        return real(*given)

    monkeypatch.setattr(Objective, "_tangents", noted)
    same, found = objective.directional(theta, rows, tokens, products=torch.bfloat16)
    assert torch.equal(losses, same)
    assert set(seen) == {"medium"}
    assert torch.get_float32_matmul_precision() == "highest"
    # Zero where the processor has no units for it, or takes none for shapes so small.
    assert float((found - exact).double().norm() / exact.double().norm()) < 2**-6


def test_route_is_chosen_by_scored_tokens(generator):
    module = small()
    space = ParameterSpace.from_module(module)
    theta, rows = space.read(module), torch.randn(8, space.size, generator=generator)
    objective = Objective(module, next_token_loss, space)
    few = few_scored(generator)
    slopes = objective.directional(theta, rows, few)[1]
    assert objective.route_used == "adjoint"
    reference = Objective(module, next_token_loss, space, route="jvp").directional(theta, rows, few)[1]
    torch.testing.assert_close(slopes, reference, rtol=1e-4, atol=1e-5)
    objective.directional(theta, rows[:2], text_tokens(generator), expected=200)
    assert objective.route_used == "traced"
    objective.directional(theta, rows[:1], text_tokens(generator))
    assert objective.route_used == "jvp"


def test_arithmetic_in_single_precision(generator):
    module = build_small_transformer(TransformerShape(2, 32, 4, 64, 12, 12, 10), 0)
    space = ParameterSpace.from_module(module)
    tokens = arithmetic.make_data(20, 4, 4, 8, 0).splits.select
    rows = torch.randn(5, space.size, generator=generator)
    single = Objective(module, arithmetic.token_loss, space, route="adjoint")
    found = single.directional(space.read(module), rows, tokens)[1]
    twin = module.double()
    exact = by_token_gradients(twin, arithmetic.token_loss, tokens, rows.double())
    assert float((found - exact).abs().max() / exact.abs().max()) < 3e-6


class Scored(nn.Module):
    """Hidden states of the asked slots alone reach the output layer; mixed, a row sees the one before."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.embed, self.twice = nn.Embedding(13, 6), nn.Linear(6, 6)
        self.out, self.mixed = nn.Linear(6, 13), mixed

    def forward(self, tokens: Tensor, slots: Tensor | None = None) -> Tensor:
        x = torch.tanh(self.twice(self.embed(tokens)).cumsum(1))
        if slots is not None:
            x = x.gather(1, slots[..., None].expand(-1, -1, 6))
        found = self.out(x)
        return found + 1e-5 * found.roll(1, 1) if self.mixed else found


def loss_at_slots(module: nn.Module, inputs: Tensor, slots: Tensor | None = None) -> Tensor:
    logits, targets = module(inputs[:, :-1], slots), inputs[:, 1:]
    targets = targets if slots is None else targets.gather(1, slots)
    return nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


@pytest.mark.parametrize("mixed", [False, True])
def test_a_head_of_scored_slots_is_gone_through_once_only_where_each_loss_has_its_own_row(mixed, generator):
    torch.manual_seed(2)
    module = Scored(mixed).double()
    space, tokens = ParameterSpace.from_module(module), few_scored(generator)
    tokens = tokens.select(torch.tensor([0, 1, 3, 4, 5, 6]))  # the slots of a mixed loss need a fixed number
    rows = torch.randn(3, space.size, generator=generator, dtype=torch.float64)
    values = space.unflatten(space.read(module))
    slots, valid = scored_slots(tokens.scored)
    route = AdjointRoute(module, space, loss_at_slots, 1 << 30)
    route.prepare(values, tokens.inputs, slots)
    assert (route._head is None) == mixed
    # In float32 so little of another row is below what the check against autograd can see.
    coarse = AdjointRoute(module.float(), space, loss_at_slots, 1 << 30)
    coarse.prepare({name: value.float() for name, value in values.items()}, tokens.inputs, slots)
    assert (coarse._head is None) == mixed
    module.double()
    directions = NamedDirections.of(Directions.of(rows), space, lambda given: given)
    losses, found = route.slopes(values, directions, tokens.inputs, slots)
    leaves = [p.requires_grad_() for p in module.parameters()]
    for sequence, rank in valid.nonzero().tolist():
        loss = loss_at_slots(module, tokens.inputs, slots)[sequence, rank]
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
        torch.testing.assert_close(found[sequence, rank], rows @ gradient, rtol=1e-9, atol=1e-11)
    room = route.chunk(3, 8, 10**9)
    route._head = None
    assert (room > route.chunk(3, 8, 10**9)) == (not mixed)
