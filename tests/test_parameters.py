"""The flat vector and the one functional call, against deep copies written in place."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import copied_with, hessian_product, mean_loss, text_tokens, tiny_bridge, tiny_gpt2
from torch import nn

from polca_edit.derivatives.objective import Objective
from polca_edit.models import bridge_around
from polca_edit.parameters import ParameterSpace, call_with, parameter_slots
from polca_edit.tokens import next_token_loss


class SharedBlock(nn.Module):
    """One submodule under two names, one frozen parameter, one integer buffer, one tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor([2.0]))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.frozen(self.again(x))) * self.scale


def doubled(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


LANGUAGE_MODELS = {
    "tied gpt2": lambda: doubled(tiny_gpt2()),
    "untied gpt2": lambda: doubled(tiny_gpt2(tied=False)),
    "native bridge": lambda: tiny_bridge().double(),
    "bridge around gpt2": lambda: bridge_around(doubled(tiny_gpt2())),
}


@pytest.fixture(params=list(LANGUAGE_MODELS))
def model(request) -> nn.Module:
    return LANGUAGE_MODELS[request.param]()


def bytes_of(module: nn.Module) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in parameter_slots(module)}


def moved(space: ParameterSpace, module: nn.Module, generator: torch.Generator) -> torch.Tensor:
    theta = space.read(module)
    return theta + 0.3 * torch.randn(theta.shape, generator=generator, dtype=theta.dtype)


# -- the vector ------------------------------------------------------------------------------------


def test_tied_and_shared_parameters_count_once():
    space = ParameterSpace.from_module(SharedBlock())
    assert space.names == ("scale", "first.weight", "first.bias")
    assert space.size == 9 + 3 + 1 == sum(space.sizes)
    assert dict(space.aliases)["tied.weight"] == "first.weight"
    assert space.offsets["first.weight"] == (1, 10)


def test_gpt2_head_shares_the_embedding():
    tied, untied = (ParameterSpace.from_module(tiny_gpt2(tied=t)) for t in (True, False))
    assert dict(tied.aliases)["lm_head.weight"] == "transformer.wte.weight"
    assert untied.size - tied.size == 13 * 8
    assert tied.fingerprint() != untied.fingerprint()


def test_size_is_the_modules_own_count(model):
    space = ParameterSpace.from_module(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert space.size == sum(p.numel() for p in trainable)
    assert torch.equal(space.read(model), torch.cat([p.detach().reshape(-1) for p in trainable]))


def test_bridge_around_a_model_counts_its_parameters_once():
    plain = tiny_gpt2()
    size = sum(p.numel() for p in plain.parameters())
    assert ParameterSpace.from_module(bridge_around(plain)).size == size


def test_flatten_and_unflatten_are_inverse(model, generator):
    space = ParameterSpace.from_module(model)
    flat = torch.randn(space.size, generator=generator)
    assert torch.equal(space.flatten(space.unflatten(flat)), flat)
    stacked = torch.stack([flat, 2 * flat])
    assert all(torch.equal(v[1], 2 * v[0]) for v in space.unflatten(stacked).values())


def test_the_modules_own_state_dict_is_accepted(model):
    space = ParameterSpace.from_module(model)
    assert torch.equal(space.flatten(model.state_dict()), space.read(model))


def test_a_tied_weight_may_be_saved_under_either_name():
    model = tiny_gpt2()
    space = ParameterSpace.from_module(model)
    for left_out in ("lm_head.weight", "transformer.wte.weight"):
        state = {name: value for name, value in model.state_dict().items() if name != left_out}
        assert torch.equal(space.flatten(state), space.read(model))


def test_subset_of_parameters():
    model = tiny_gpt2()
    whole = ParameterSpace.from_module(model)
    part = ParameterSpace.from_module(model, ["transformer.h.*", "lm_head.*"])
    assert "transformer.wte.weight" in part.names  # in by its other slot
    assert "transformer.wpe.weight" not in part.names
    # The rest of the state dict is known, so it is no unknown parameter.
    assert torch.equal(part.flatten(model.state_dict()), part.read(model))
    mask = whole.mask(["transformer.h.*", "lm_head.*"])
    assert torch.equal(whole.read(model)[mask], part.read(model))


def test_write_changes_only_the_chosen_parameters():
    model = tiny_gpt2()
    before = bytes_of(model)
    space = ParameterSpace.from_module(model, ["transformer.h.*"])
    space.write(model, space.read(model) + 1)
    after = bytes_of(model)
    assert {name for name in before if before[name] != after[name]} == {slot for slot, _ in space.aliases}


# -- errors ----------------------------------------------------------------------------------------


def test_missing_parameter_is_an_error():
    model = SharedBlock()
    state = dict(model.state_dict())
    for name in ("again.bias", "first.bias"):
        del state[name]
    with pytest.raises(ValueError, match=r"'first\.bias' is missing"):
        ParameterSpace.from_module(model).flatten(state)


def test_extra_parameter_is_an_error():
    model = SharedBlock()
    state = {**model.state_dict(), "second.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"known parameters only, got 'second\.weight'"):
        ParameterSpace.from_module(model).flatten(state)


def test_wrong_shape_is_an_error():
    model = SharedBlock()
    state = {**model.state_dict(), "first.bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(4,\)"):
        ParameterSpace.from_module(model).flatten(state)


def test_checkpoint_of_another_model_is_an_error():
    space = ParameterSpace.from_module(tiny_gpt2())
    with pytest.raises(ValueError, match="another model"):
        space.flatten(tiny_gpt2(layers=2).state_dict())
    with pytest.raises(ValueError, match="another model"):
        space.flatten(tiny_bridge().state_dict())


def test_buffers_that_the_module_says_it_ignores_are_accepted():
    model = SharedBlock()
    model._keys_to_ignore_on_load_unexpected = [r"\.masked_bias$"]
    space = ParameterSpace.from_module(model)
    state = {**model.state_dict(), "attn.masked_bias": torch.tensor(-1e9)}
    assert torch.equal(space.flatten(state), space.read(model))


def test_wrong_length_is_an_error():
    space = ParameterSpace.from_module(SharedBlock())
    with pytest.raises(ValueError, match="13 entries, got 12"):
        space.unflatten(torch.zeros(12))


def test_patterns_that_match_nothing_are_an_error():
    with pytest.raises(ValueError, match="must match"):
        ParameterSpace.from_module(SharedBlock(), ["nowhere.*"])
    with pytest.raises(ValueError, match="must match"):
        ParameterSpace.from_module(SharedBlock()).mask(["nowhere.*"])


def test_views_of_the_same_memory_are_an_error():
    model = nn.Module()
    joint = torch.zeros(4, 6)
    model.joint = nn.Parameter(joint)
    model.left = nn.Parameter(joint[:, :3])
    with pytest.raises(ValueError, match="must not share memory"):
        ParameterSpace.from_module(model)
    # Neighbours in one storage that touch no common cell are fine, interleaved strides included.
    del model.joint
    model.right = nn.Parameter(joint[:, 3:])
    assert ParameterSpace.from_module(model).size == 24


def test_call_with_refuses_partial_values(generator):
    model = SharedBlock()
    space = ParameterSpace.from_module(model)
    x = torch.randn(2, 3, generator=generator)
    values = space.unflatten(space.read(model))
    for broken in (
        {k: v for k, v in values.items() if k != "scale"},
        {**values, "other": torch.zeros(1)},
        {**values, "first.bias": torch.zeros(4)},
    ):
        with pytest.raises(ValueError):
            call_with(model, space, broken, lambda m, inputs: m(inputs), x)


# -- the functional call ---------------------------------------------------------------------------


def test_value_agrees_with_an_in_place_copy(model, generator):
    space = ParameterSpace.from_module(model)
    tokens = text_tokens(generator)
    theta = moved(space, model, generator)
    twin = copied_with(model, theta)
    before = bytes_of(model)
    losses = call_with(model, space, space.unflatten(theta), next_token_loss, tokens.inputs)
    assert torch.allclose(losses, next_token_loss(twin, tokens.inputs), rtol=0, atol=1e-12)
    assert not torch.allclose(losses, next_token_loss(model, tokens.inputs), atol=1e-3)
    assert bytes_of(model) == before


@pytest.mark.parametrize("route", ["jvp", "traced", "double_backward"])
def test_hessian_product_agrees_with_an_in_place_copy(model, route, generator):
    space = ParameterSpace.from_module(model)
    tokens = text_tokens(generator)
    theta = moved(space, model, generator)
    vector = torch.randn(space.size, generator=generator, dtype=torch.float64)
    expected = hessian_product(copied_with(model, theta), mean_loss(next_token_loss, tokens), vector)
    before = bytes_of(model)
    objective = Objective(model, next_token_loss, space, batch_size=2, route=route)
    product = objective.hessian(theta, tokens)(vector)
    assert torch.allclose(product, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    assert bytes_of(model) == before


def test_gradient_reaches_a_tied_weight_once(generator):
    """d loss / d w of a tied weight is the sum over both its places."""
    model = doubled(tiny_gpt2())
    space = ParameterSpace.from_module(model)
    tokens = text_tokens(generator)
    loss = mean_loss(next_token_loss, tokens)(model)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    objective = Objective(model, next_token_loss, space, batch_size=2, route="jvp")
    value, gradient = objective.mean_gradient(space.read(model), tokens)
    assert value == pytest.approx(float(loss.detach()), abs=1e-13)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-13)


# -- substitution ----------------------------------------------------------------------------------


def test_substituted_computes_with_the_other_weights_and_restores_every_byte(model, generator):
    space = ParameterSpace.from_module(model)
    tokens = text_tokens(generator)
    theta = moved(space, model, generator)
    expected = next_token_loss(copied_with(model, theta), tokens.inputs)
    before, kept = bytes_of(model), theta.clone()
    with space.substituted(model, theta) as inside:
        assert torch.equal(space.read(inside), theta)
        assert torch.allclose(next_token_loss(inside, tokens.inputs), expected, rtol=0, atol=1e-12)
        with torch.no_grad():
            for slot, _ in space.aliases:
                inside.get_parameter(slot).add_(1.0)  # training inside the block must not reach the outside
    assert bytes_of(model) == before
    assert torch.equal(theta, kept)


def test_substituted_restores_after_an_exception(model, generator):
    space = ParameterSpace.from_module(model)
    theta = moved(space, model, generator)
    before = bytes_of(model)
    with pytest.raises(KeyError, match="inside"), space.substituted(model, theta):
        raise KeyError("inside")
    assert bytes_of(model) == before


def test_substituted_keeps_ties_and_objects():
    model = tiny_gpt2()
    space = ParameterSpace.from_module(model)
    objects = [id(p) for p in model.parameters()]
    with space.substituted(model, space.read(model) * 2):
        assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert [id(p) for p in model.parameters()] == objects


def test_substituted_refuses_before_it_touches_anything():
    model = SharedBlock()
    before = bytes_of(model)
    with pytest.raises(ValueError), ParameterSpace.from_module(model).substituted(model, torch.zeros(5)):
        pass
    assert bytes_of(model) == before
