"""The adjoint route for models with bare parameters: every way to use one, against forward mode."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from polca_edit.derivatives.objective import Objective
from polca_edit.tokens import TokenSet

WIDTH, LENGTH, WORDS = 6, 5, 7


class Uses(nn.Module):
    """Embeds, then does one thing with bare parameters, then gives a loss for every position."""

    def __init__(self, use: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(WORDS, WIDTH, dtype=torch.float64))
        self.own = nn.ParameterList([torch.randn(*s, dtype=torch.float64) for s in shapes])
        self.use = use

    def forward(self, ids: Tensor) -> Tensor:
        return self.use(self.table[ids], *self.own).tanh().flatten(2).square().mean(2)


D, L = WIDTH, LENGTH
WAYS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "matrix product": (lambda x, w: x @ w, [(D, 3)]),
    "transposed": (lambda x, w: x @ w.T, [(3, D)]),
    "scaled and transposed": (lambda x, w: torch.matmul(x, (w * 0.5).transpose(0, 1)), [(3, D)]),
    "functional linear": (lambda x, w, b: functional.linear(x, w, b), [(3, D), (3,)]),
    "functional linear, named": (lambda x, w, b: functional.linear(x, weight=w, bias=b), [(3, D), (3,)]),
    "einsum": (lambda x, w: torch.einsum("bld,de->ble", x, w), [(D, 3)]),
    "einsum into heads": (lambda x, w: torch.einsum("bld,hde->blhe", x, w), [(2, D, 3)]),
    "einsum of heads": (lambda x, w: torch.einsum("blhe,hed->bld", x.unflatten(2, (2, 3)), w), [(2, 3, D)]),
    "einsum with its own matrix for each head": (
        lambda x, w: torch.einsum("hed,blhe->blhd", w, x.unflatten(2, (2, 3))), [(2, 3, 4)]
    ),
    "einsum over positions": (lambda x, w: torch.einsum("bld,ml->bmd", x, w), [(L, L)]),
    "einsum with dots": (lambda x, w: torch.einsum("...d,de->...e", x, w), [(D, 3)]),
    "heads first": (lambda x, w: (x[:, None] @ w).transpose(1, 2), [(2, D, 3)]),
    "matrix from the left": (lambda x, w: w @ x, [(L, L)]),
    "gain and offset": (lambda x, g, b: x * g + b, [(D,), (D,)]),
    "gain of each position": (lambda x, g: g * x, [(L, 1)]),
    "positions": (lambda x, p: x + p[: x.shape[1]], [(9, D)]),
    "positions looked up": (lambda x, p: x + functional.embedding(torch.arange(x.shape[1]), p), [(9, D)]),
    "functional norm": (lambda x, g, b: functional.layer_norm(x, (D,), g, b), [(D,), (D,)]),
    "functional rms norm": (lambda x, g: functional.rms_norm(x, (D,), g), [(D,)]),
    "joint projection": (lambda x, w: x @ w[:, :3] + x @ w[:, 3:], [(D, 6)]),
}  # fmt: skip
#: No known form: explicit gradients.
ODD: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "a power": (lambda x, w: x * w**2, [(D,)]),
    "two parameters multiplied first": (lambda x, v, w: x @ (v @ w), [(D, 3), (3, D)]),
    "convolution": (lambda x, w: functional.conv1d(x.mT, w, padding=1).mT, [(4, D, 3)]),
    "in place": (lambda x, b: x.clone().add_(b), [(D,)]),
    # The table is all that is watched; before the check not even that.
    "moved before use": (lambda x, w: x * (w - 2.0), [(D,)]),
    "batch not first": (lambda x, w: torch.einsum("bld,de->lbe", x, w).transpose(0, 1), [(D, 3)]),
}


def objective(way: tuple[Callable[..., Tensor], list[tuple[int, ...]]], route: str) -> Objective:
    return Objective(Uses(way[0], *way[1]), lambda m, x: m(x), route=route, batch_size=4)  # type: ignore[arg-type]


def tokens() -> TokenSet:
    """Nine sequences, so that batches of four leave one alone."""
    ids = torch.randint(0, WORDS, (9, LENGTH), generator=torch.Generator().manual_seed(1))
    scored = torch.zeros(9, LENGTH, dtype=torch.bool)
    scored[:, -2:] = True
    return TokenSet(ids, scored, torch.arange(9))


@pytest.mark.parametrize("name", [*WAYS, *ODD])
def test_every_use_of_a_parameter_gives_what_forward_mode_gives(name: str) -> None:
    way = {**WAYS, **ODD}[name]
    ours, plain = objective(way, "adjoint"), objective(way, "jvp")
    theta = ours.space.read(ours.module)
    rows = torch.randn(3, theta.numel(), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    losses, slopes = ours.directional(theta, rows, tokens())
    wanted = plain.directional(theta, rows, tokens())
    torch.testing.assert_close(losses, wanted[0], atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(slopes, wanted[1], atol=1e-13, rtol=1e-12)
    assert ours.route_used == "adjoint"
    explicit = ours._adjoint.leftovers if ours._adjoint else None
    assert (explicit == ()) == (name in WAYS)


class Attention(nn.Module):
    """A transformer block and an output layer without one ``nn.Linear``."""

    def __init__(self, width: int = 16, heads: int = 2, words: int = 11, length: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        small = width**-0.5
        self.words = nn.Parameter(torch.randn(words, width))
        self.places = nn.Parameter(torch.randn(length, width) * small)
        self.qkv = nn.Parameter(torch.randn(3, heads, width, width // heads) * small)
        self.out = nn.Parameter(torch.randn(heads, width // heads, width) * small)
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words[ids] + self.places[: ids.shape[1]]
        normed = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) * self.gain + self.bias
        q, k, v = (torch.einsum("bld,hde->bhle", normed, self.qkv[number]) for number in range(3))
        scores = torch.einsum("bhle,bhme->bhlm", q, k) / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        mixed = torch.einsum("bhlm,bhme->bhle", scores.masked_fill(later, -1e9).softmax(-1), v)
        return (x + torch.einsum("bhle,hed->bld", mixed, self.out)) @ self.words.T


def test_auto_takes_the_fast_route_for_a_transformer_of_bare_parameters() -> None:
    """Its tied table is looked up and multiplied; all in float32, to rounding."""

    def token_loss(module: nn.Module, ids: Tensor) -> Tensor:
        logits = module(ids[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
            len(ids), -1
        )

    ids = torch.randint(0, 11, (7, 9), generator=torch.Generator().manual_seed(0))
    scored = torch.zeros(7, 8, dtype=torch.bool)
    scored[:, -2:] = True
    some = TokenSet(ids, scored, torch.arange(7))
    ours = Objective(Attention(), token_loss)
    theta = ours.space.read(ours.module)
    rows = torch.randn(12, theta.numel(), generator=torch.Generator().manual_seed(1)) / theta.numel() ** 0.5
    losses, slopes = ours.directional(theta, rows, some)
    assert (ours.route_used, ours.route_note) == ("adjoint", "")
    assert ours._adjoint is not None
    assert ours._adjoint.leftovers == ()
    slow = Objective(Attention(), token_loss, route="double_backward")
    wanted = slow.directional(theta, rows, some)
    assert torch.equal(losses, wanted[0]) or float((losses - wanted[0]).abs().max()) < 1e-5
    assert float((slopes - wanted[1]).abs().max()) < 2e-5 * float(wanted[1].abs().max())


def test_a_slower_route_is_said_once_by_observe() -> None:
    """A batch statistic leaves the adjoint route; the warning names the route and why."""
    from polca_edit.allocation.terms import project_for
    from polca_edit.basis.record import random_basis
    from polca_edit.checkpoints.opening import open_checkpoints

    module = Uses(lambda x, w: (x - x.mean(0)) @ w, (D, 3))
    loss = Objective(module, lambda m, x: m(x), batch_size=9)
    size = loss.space.size
    thetas = torch.randn(3, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    series = open_checkpoints(thetas, module, steps=range(3))
    basis = random_basis(size, 30, torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.warns(
        UserWarning, match="slower route '(traced|jvp)': per-token derivatives disagree"
    ) as said:
        project_for("trapezoid", loss, series, [basis], tokens())
    assert len(said) == 1


def test_a_model_in_which_nothing_is_watched_gets_explicit_gradients() -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.arange(1.0, 4.0, dtype=torch.float64))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * (self.own - 2.0) ** 2

    loss = Objective(Moved(), lambda m, x: m(x), route="adjoint")
    given = torch.ones(2, 3, dtype=torch.float64)
    held = TokenSet(given, torch.ones(2, 3, dtype=torch.bool), torch.arange(2))
    theta = loss.space.read(loss.module)
    _, slopes = loss.directional(theta, torch.eye(3, dtype=torch.float64), held)
    # d/dw (w - 2)^2 = 2 (w - 2), of one's own slot.
    assert torch.allclose(slopes, torch.diag(2 * (theta - 2.0)).repeat(1, 2))


def test_a_derivative_of_zero_at_the_check_is_no_sign_that_nothing_is_missed() -> None:
    class Cubed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.zeros(2, dtype=torch.float64))
            self.unused = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs @ self.own**3

    loss = Objective(Cubed(), lambda m, x: m(x)[:, None], route="adjoint")
    held = TokenSet(torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.bool), torch.arange(2))
    rows = torch.eye(5, dtype=torch.float64)
    assert not loss.directional(torch.zeros(5, dtype=torch.float64), rows, held)[1].any()
    theta = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    expected = torch.zeros(5, 2, dtype=torch.float64)
    expected[0, 0], expected[1, 1] = 3.0, 12.0
    assert torch.allclose(loss.directional(theta, rows, held)[1], expected)
