"""The loss of every opened checkpoint beside that of the owning library, on eight architectures."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, bloom, folders, gpt2, llama, made, mixtral, neox, plain_weights

from polca_edit.checkpoints.agreement import LARGEST_DIFFERENCE, Agreement, compare, evaluating
from polca_edit.checkpoints.huggingface_models import load_causal_lm, ready_for_derivatives
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_eight_architectures_open_with_the_loss_of_transformers(name, tmp_path):
    models = folders(tmp_path, ARCHITECTURES[name], steps=(1, 2))
    module = load_causal_lm(tmp_path / "checkpoint-2")
    space = ParameterSpace.from_module(module)
    series = open_checkpoints(tmp_path, module)
    for index, step in enumerate((1, 2)):
        folder = tmp_path / f"checkpoint-{step}"
        found = compare(folder.name, folder, module, space, series.read(index))
        # The oracle: the very model in memory before it was ever written.
        inputs = torch.randint(0, 61, (4, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            true = float(models[step](input_ids=inputs, labels=inputs).loss)
        assert found.library == pytest.approx(true, abs=1e-5)
        assert found.difference < 1e-5
    # And its derivatives can be taken by some route: central differences are the oracle.
    inputs = torch.randint(2, 61, (2, 8), generator=torch.Generator().manual_seed(1))
    loss, _ = ready_for_derivatives(module, inputs)
    # These models compute softmax and norms in float32 whatever their weights are, which bounds the oracle.
    objective = Objective(module, loss, space)
    theta = series[1]
    row = torch.randn(1, space.size, generator=torch.Generator().manual_seed(2))
    row /= row.norm()
    tokens = TokenSet.from_ids(inputs)
    _, slopes = objective.directional(theta, row, tokens)
    ahead, behind = (objective.losses(theta + s * row[0], tokens) for s in (1e-2, -1e-2))
    assert float(slopes.abs().max()) > 0.01
    torch.testing.assert_close(slopes[0], (ahead - behind) / 2e-2, rtol=1e-2, atol=3e-4)


@pytest.mark.parametrize(
    ("make", "change", "named"),
    [
        (llama, {"rope_theta": 50.0}, "rope"),
        (llama, {"rms_norm_eps": 0.1}, "rms_norm_eps"),
        (neox, {"hidden_act": "relu"}, "hidden_act"),
        (gpt2, {"activation_function": "relu"}, "activation_function"),
    ],
)
def test_a_config_that_differs_between_checkpoints_is_an_error_with_both_losses(
    make, change, named, tmp_path
):
    folders(tmp_path, make, steps=(1, 2))
    path = tmp_path / "checkpoint-1" / "config.json"
    config = json.loads(path.read_text())
    if "rope_theta" in change and "rope_parameters" in config:
        change = {"rope_parameters": {**config["rope_parameters"], **change}}
    path.write_text(json.dumps({**config, **change}))
    series = open_checkpoints(tmp_path, load_causal_lm(tmp_path / "checkpoint-2"))
    series[1]
    with pytest.raises(ValueError, match=rf"checkpoint-1.* here and .* in transformers .*{named}"):
        series[0]


def test_a_difference_above_the_bound_is_refused_and_one_below_is_not():
    Agreement("a", 2.0, 2.0 + 0.9 * LARGEST_DIFFERENCE).require()
    with pytest.raises(ValueError, match=r"2\.000000 nats per token here and 2\.000110"):
        Agreement("a", 2.0, 2.0 + 1.1 * LARGEST_DIFFERENCE).require()
    with pytest.raises(ValueError, match="nan"):
        Agreement("a", float("nan"), 2.0).require()


def test_the_comparison_leaves_module_and_modes_as_they_were():
    module = made(gpt2, 0)
    module.train()
    module.transformer.h[0].eval()
    modes = [part.training for part in module.modules()]
    with evaluating(module):
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module.modules()] == modes


def test_a_head_stored_untied_is_loaded_untied(tmp_path):
    """The config says tied, the file holds another head: its loss is that of the file."""
    models = folders(tmp_path, gpt2, steps=(1, 2), tie_word_embeddings=False)
    for step in (1, 2):
        path = tmp_path / f"checkpoint-{step}" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    module = load_causal_lm(tmp_path / "checkpoint-2")
    series = open_checkpoints(tmp_path, module)
    assert series.space.size == sum(p.numel() for p in models[1].parameters())
    assert torch.equal(series[0], plain_weights(models[1]))
    # A tied model cannot stand for it: refused, not one of the two values taken.
    with pytest.raises(ValueError, match="untied"):
        open_checkpoints(tmp_path, made(gpt2, 0))[0]


@pytest.mark.parametrize("name", ["bloom", "mixtral", "checkpointing", "sdpa"])
def test_models_without_forward_mode_fall_back_to_a_right_route(name):
    """Central differences are the oracle of slopes, differences of gradients of curvature."""
    makers = {"bloom": bloom, "mixtral": mixtral}
    model = made(makers.get(name, llama), 1, attn_implementation="eager" if name == "bloom" else "sdpa")
    if name == "checkpointing":
        model.gradient_checkpointing_enable()
    inputs = torch.randint(2, 61, (2, 8), generator=torch.Generator().manual_seed(1))
    loss, said = ready_for_derivatives(model, inputs)
    assert said != "ready"
    space, tokens = ParameterSpace.from_module(model), TokenSet.from_ids(inputs)
    objective, theta = Objective(model, loss, space), space.read(model)
    row = torch.randn(1, space.size, generator=torch.Generator().manual_seed(2))
    row /= row.norm()
    slopes = objective.directional(theta, row, tokens)[1]
    ahead, behind = (objective.losses(theta + s * row[0], tokens) for s in (1e-2, -1e-2))
    torch.testing.assert_close(slopes[0], (ahead - behind) / 2e-2, rtol=1e-2, atol=3e-4)
    product = objective.hessian(theta, tokens)(row[0])
    up, down = (objective.mean_gradient(theta + s * row[0], tokens)[1] for s in (1e-2, -1e-2))
    torch.testing.assert_close(product, (up - down) / 2e-2, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_quantised_numbers_without_scales_are_refused(kind, tmp_path):
    folders(tmp_path, llama, steps=(1, 2))
    path = tmp_path / "checkpoint-1" / "model.safetensors"
    held = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**held, name: (held[name] * 50).to(kind)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="up_proj.*dequantise"):
        open_checkpoints(tmp_path, load_causal_lm(tmp_path / "checkpoint-2"))[0]
    with pytest.raises(ValueError, match="up_proj.*dequantise"):
        load_causal_lm(tmp_path / "checkpoint-1")
