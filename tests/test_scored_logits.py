"""Logits of the scored positions alone: the same losses and derivatives, and the head sees only those."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from polca_edit.basis.subsets import Subset
from polca_edit.checkpoints.huggingface_models import ready_for_derivatives
from polca_edit.derivatives import heads, routes
from polca_edit.derivatives.heads import cross_entropy, output_layer
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet, next_token_loss
from tests import tiny_models as tiny

MODELS = {
    "tied GPT-2": tiny.gpt2,
    "untied GPT-2": lambda: tiny.gpt2(tie_word_embeddings=False),
    "GPTNeoX": tiny.neox,
    "Llama": tiny.llama,
    "OPT, projected": tiny.opt,
    "Gemma 2, soft cap behind the head": tiny.gemma2,
    "Mamba": tiny.mamba,
    "Qwen 2": tiny.qwen2,
    "Mistral, tied": lambda: tiny.mistral(tie_word_embeddings=True),
    "GPTNeoX, tied": lambda: tiny.neox(tie_word_embeddings=True),
    "Llama, tied": lambda: tiny.llama(tie_word_embeddings=True),
    "Bloom": tiny.bloom,
    "Mixtral": tiny.mixtral,
}

#: Architecture -> routes of slopes along one vector and along four, and of many products with the Hessian;
#: few of them are taken by reverse mode twice in any.
USUAL = ("jvp", "adjoint", "traced")
ROUTES = {
    "tied GPT-2": USUAL,
    "GPTNeoX": USUAL,
    "Qwen 2": USUAL,
    "OPT, projected": ("jvp", "jvp", "traced"),
    "Bloom": ("double_backward", "adjoint", "double_backward"),
    "Mixtral": ("double_backward", "adjoint", "double_backward"),
}


def whole(module: nn.Module, inputs: Tensor) -> Tensor:
    """The loss that cannot be asked for slots: logits at all positions."""
    return next_token_loss(module, inputs)


def few_scored(sequences: int = 5, length: int = 12) -> TokenSet:
    """Three scored slots in most sequences, one in the last."""
    draw = torch.Generator().manual_seed(0)
    scored = torch.zeros(sequences, length - 1, dtype=torch.bool)
    scored[:, [2, 5, 9]] = True
    scored[-1] = False
    scored[-1, 4] = True
    return TokenSet.from_ids(torch.randint(2, 61, (sequences, length), generator=draw), scored=scored)


def head_rows(module: nn.Module) -> list[int]:
    """Filled with how many positions the output layer is given, call by call."""
    seen: list[int] = []
    layer = output_layer(module)
    assert layer is not None
    layer.register_forward_hook(lambda _, given, out: seen.append(out.shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("name", list(MODELS))
def test_losses_are_those_of_full_logits_and_the_head_sees_the_scored_positions_only(name):
    torch.manual_seed(1)
    module, tokens = MODELS[name]().eval(), few_scored()
    loss = Objective(module, next_token_loss, batch_size=2)
    theta = 1.1 * loss.space.read(module)
    expected = Objective(module, whole, batch_size=2).losses(theta, tokens)
    loss.losses(theta, tokens)  # the check on two sequences comes first
    seen = head_rows(module)
    torch.testing.assert_close(loss.losses(theta, tokens), expected, rtol=1e-6, atol=1e-6)
    assert seen == [6, 6, 6]  # 2 sequences x 3 slots in each of 3 batches, not 2 x 12


@pytest.mark.parametrize("name", list(ROUTES))
def test_the_route_that_was_taken_is_named_and_a_dearer_one_has_a_reason(name):
    torch.manual_seed(1)
    module, tokens = MODELS[name]().eval(), few_scored()
    module.config.use_cache = False
    loss = Objective(module, ready_for_derivatives(module, tokens.inputs[:2])[0], batch_size=2)
    theta = loss.space.read(module)
    rows, taken = torch.randn(4, theta.numel(), generator=torch.Generator().manual_seed(0)), []
    for count in (1, 4):
        loss.directional(theta, rows[:count], tokens)
        taken.append(loss.route_used)
    image = loss.hessian(theta, tokens, expected=1)(rows[0])
    assert loss.curvature_route == "double_backward"
    assert (loss.hessian(theta, tokens, expected=64)(rows[0]) - image).abs().max() < 1e-4 * image.abs().max()
    assert (*taken, loss.curvature_route) == ROUTES[name]
    assert bool(loss.route_note) == (ROUTES[name] != USUAL)


def test_derivatives_agree_on_every_route():
    torch.manual_seed(1)
    module, tokens = tiny.neox(attn_implementation="eager").double().eval(), few_scored()
    module.config.use_cache = False
    reference = Objective(module, whole, batch_size=2, route="double_backward")
    theta = reference.space.read(module)
    rows = torch.randn(2, theta.numel(), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slopes = reference.directional(theta, rows, tokens)[1]
    image = reference.hessian(theta, tokens)(rows[0])
    for route in ("traced", "jvp", "adjoint", "double_backward"):
        loss = Objective(module, next_token_loss, batch_size=2, route=route)
        found = loss.directional(theta, rows, tokens)[1]
        torch.testing.assert_close(found, slopes, rtol=1e-9, atol=1e-10)
        assert loss.route_used == route  # of a transformers model that looks at its own position ids
        for budget in (1 << 30, 0):
            loss.curvature_budget = budget
            # transformers takes this model's softmax in float32 whatever its weights are.
            apart = (loss.hessian(theta, tokens)(rows[0]) - image).abs().max()
            assert float(apart) < 1e-6 * float(image.abs().max())
            # jvp keeps nothing, so there is nothing to stream; without room every sequence goes alone.
            assert loss.streamed_batches == (5 if budget == 0 and loss.curvature_route != "jvp" else 0)


def test_products_keep_to_their_budget_by_route_and_size_of_batches():
    """Traced where all traces fit; else by reverse mode, in batches of which two fit."""
    torch.manual_seed(1)
    module, tokens = tiny.neox(attn_implementation="eager").double().eval(), few_scored()
    module.config.use_cache = False
    free = Objective(module, next_token_loss, batch_size=5)
    theta = free.space.read(module)
    image, one = free.hessian(theta, tokens, expected=64)(theta), free.curvature_work(theta, tokens)
    assert (free.curvature_route, one.size, one.fits) == ("traced", 5, True)
    wanted = {4.1: (2, "double_backward"), 2.1: (1, "double_backward"), 0.1: (1, "double_backward")}
    for budget, (size, route) in wanted.items():
        tight = Objective(module, next_token_loss, batch_size=5)
        tight.curvature_budget = int(budget * one.sequence_bytes)
        found = tight.hessian(theta, tokens, expected=64)(theta)
        assert float((found - image).abs().max()) < 1e-6 * float(image.abs().max())
        assert (tight.curvature_route, tight.curvature_work(theta, tokens).size) == (route, size)
        assert tight.batch_bytes <= max(tight.curvature_budget / 2, one.sequence_bytes) * 1.01
        assert free.batch_bytes > 3 * tight.batch_bytes


class Branching(nn.Module):
    """Its forward pass depends on a weight's value: no trace can hold that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 5))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.weight[ids % 3]
        return hidden * 2 if bool(self.weight.sum() > 0) else hidden


def test_a_branch_on_weights_is_not_traced_and_that_is_said():
    module = Branching()
    loss = Objective(module, lambda m, ids: m(ids).square().mean(2), route="traced")
    tokens = TokenSet(torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.arange(2))
    theta = loss.space.read(module)
    slopes = loss.directional(-theta, torch.ones(1, 15), tokens)[1]
    assert slopes.unique().tolist() == [-2.0]  # the branch of these weights, not of the module's own
    assert loss.route_used == "jvp"
    assert "branches on values" in loss.route_note


def test_many_products_of_a_branching_model_are_taken_by_reverse_mode(monkeypatch):
    monkeypatch.setattr(routes, "plain_jvp", lambda *given: pytest.fail("the dearer route was taken"))
    loss = Objective(Branching(), lambda m, ids: m(ids).square().mean(2))
    tokens = TokenSet(torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.arange(2))
    theta = loss.space.read(loss.module)
    vector = torch.arange(15.0)
    # A third of the slots shows each row; the loss of a slot is the mean of 5 squares, of -w not doubled.
    for at, factor in ((theta, 4.0), (-theta, 1.0)):
        product = loss.hessian(at, tokens, expected=64)
        torch.testing.assert_close(product(vector), 2 * factor / 15 * vector)
        assert loss.curvature_route == "double_backward"
    assert "branches on values" in loss.route_note


class Mixing(nn.Module):
    """What comes out of the head is averaged over positions: chosen positions alone give something else."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(61, 4), nn.Linear(4, 61)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.lm_head(self.embed(ids))
        return logits + logits.mean(1, keepdim=True)


def test_a_model_that_needs_all_positions_gets_them():
    torch.manual_seed(0)
    module, tokens = Mixing(), few_scored()
    loss, expected = Objective(module, next_token_loss), Objective(module, whole)
    theta = loss.space.read(module)
    assert torch.equal(loss.losses(theta, tokens), expected.losses(theta, tokens))
    assert "differ" in loss._loss.note


def test_a_model_without_a_known_head_is_gathered_behind_it():
    torch.manual_seed(0)
    module, tokens = nn.Sequential(nn.Embedding(61, 4), nn.Linear(4, 61)), few_scored()
    assert output_layer(module) is None
    theta = ParameterSpace.from_module(module).read(module)
    found = Objective(module, next_token_loss).losses(theta, tokens)
    torch.testing.assert_close(found, Objective(module, whole).losses(theta, tokens))


def test_cross_entropy_in_chunks_is_that_of_the_whole(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 7, generator=draw, dtype=torch.float64)
    targets = torch.randint(7, (5, 3), generator=draw)
    expected = -logits.log_softmax(2).gather(2, targets[:, :, None])[:, :, 0]
    for chunk in (1 << 24, 2 * 21, 1):
        monkeypatch.setattr(heads, "CHUNK", chunk)
        torch.testing.assert_close(cross_entropy(logits, targets), expected)


def test_products_between_chosen_tensors_differentiate_nothing_else():
    torch.manual_seed(1)
    module, tokens = tiny.neox(attn_implementation="eager").eval(), few_scored()
    module.config.use_cache = False
    for route in ("traced", "double_backward"):
        loss = Objective(module, next_token_loss, batch_size=2, route=route)
        theta = 1.1 * loss.space.read(module)
        whole, memory = loss.hessian(theta, tokens), loss.batch_bytes
        for pattern in ("*layers.0.mlp*", "*layers.1.mlp*"):  # equal shapes: a trace must not be shared
            mask = loss.space.mask([pattern])
            vector = torch.randn(theta.shape, generator=torch.Generator().manual_seed(4)) * mask
            expected = whole(vector) * mask
            inside = Subset.of_mask(mask)
            found = loss.hessian(theta, tokens, inside=inside)(inside.take(vector))
            assert float((found - inside.take(expected)).norm()) < 1e-5 * float(expected.norm())
            assert loss.batch_bytes < memory
