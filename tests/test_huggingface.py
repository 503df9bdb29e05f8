"""Checkpoints as people have them: written by transformers itself in the hub's layouts, then read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from oracles import copied_with, hessian_product, own_parameters
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from polca_edit.checkpoints.huggingface import PYTHIA_STEPS, HubRevisions, is_adapter
from polca_edit.checkpoints.huggingface_models import (
    load_adapted,
    load_bridge,
    load_causal_lm,
    ready_for_derivatives,
    vocabulary_and_context,
)
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.step_names import step_of
from polca_edit.checkpoints.survey import find_revisions, whole_revisions
from polca_edit.checkpoints.tokenizer_files import load_tokenizer
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet, next_token_loss

SMALL = {"vocab_size": 23, "bos_token_id": 0, "eos_token_id": 0}


def gpt2(seed: int, **more: object):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_positions=12, n_embd=8, n_layer=2, n_head=2, **SMALL, **more)).eval()


def neox(seed: int):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return GPTNeoXForCausalLM(GPTNeoXConfig(max_position_embeddings=12, **sizes, **SMALL)).eval()


def llama(seed: int):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return LlamaForCausalLM(
        LlamaConfig(num_key_value_heads=1, max_position_embeddings=12, **sizes, **SMALL)
    ).eval()


def weights(model) -> torch.Tensor:
    """The model's own parameters, each once, in its own order: what a checkpoint must give back."""
    return torch.cat([p.detach().reshape(-1) for p in own_parameters(model)])


def tokens(generator: torch.Generator) -> TokenSet:
    inputs = torch.randint(0, 23, (4, 7), generator=generator)
    return TokenSet(inputs, torch.ones(4, 6, dtype=torch.bool), torch.arange(4))


def trainer_folder(directory: Path, models) -> Path:
    """What transformers.Trainer leaves behind, optimiser and log included."""
    log = []
    for number, model in enumerate(models, start=1):
        folder = directory / f"checkpoint-{10 * number}"
        model.save_pretrained(folder)
        log.append({"step": 10 * number, "learning_rate": 0.1 / number, "loss": 1.0})
        state = {"log_history": list(log), "global_step": 10 * number}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        torch.save({"state": {}}, folder / "optimizer.pt")
        torch.save({"python": 1}, folder / "rng_state.pth")
    (directory / "runs" / "Nov01").mkdir(parents=True)
    return directory


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500),
        ("step143000", 143_000),
        ("step1000-tokens4B", 1000),
        ("stage1-step150-tokens1B", 150),
        ("stage2-ingredient3-step50-tokens2B", 50),
        ("global_step2048", 2048),
        ("iter_0000100", 100),
        ("epoch-3", 3),
        ("main", None),
    ],
)
def test_steps_are_read_off_names(name, step):
    assert step_of(name) == step


def test_pythia_has_154_steps():
    assert len(PYTHIA_STEPS) == len(set(PYTHIA_STEPS)) == 154
    assert list(PYTHIA_STEPS[:4]) + list(PYTHIA_STEPS[-2:]) == [0, 1, 2, 4, 142_000, 143_000]


class TestOpening:
    def test_a_trainer_folder_with_its_learning_rates(self, tmp_path):
        models = [gpt2(seed) for seed in range(3)]
        space = ParameterSpace.from_module(gpt2(9))
        series = open_checkpoints(trainer_folder(tmp_path / "out", models), space)
        assert series.steps == (10, 20, 30)
        assert series.learning_rates == pytest.approx((0.1, 0.05, 0.1 / 3))
        for index, model in enumerate(models):
            assert torch.equal(series[index], weights(model))

    def test_a_tied_model_is_saved_without_its_second_name(self, tmp_path):
        folder = trainer_folder(tmp_path, [gpt2(0)]) / "checkpoint-10"
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", framework="pt") as handle:
            assert "lm_head.weight" not in set(handle.keys())
        untied = trainer_folder(tmp_path / "u", [gpt2(0, tie_word_embeddings=False)])
        space = ParameterSpace.from_module(gpt2(1, tie_word_embeddings=False))
        assert space.size == ParameterSpace.from_module(gpt2(1)).size + 23 * 8
        assert torch.equal(open_checkpoints(untied, space)[0], weights(gpt2(0, tie_word_embeddings=False)))

    def test_pythia_revision_folders(self, tmp_path):
        steps = (0, 1, 2, 512, 1000)
        for step in steps:
            neox(step).save_pretrained(tmp_path / f"step{step}")
        series = open_checkpoints(tmp_path, neox(7), names="step*")
        assert series.steps == steps
        for index, step in enumerate(steps):
            assert torch.equal(series[index], weights(neox(step)))

    def hub_cache(self, root: Path, revisions: dict[str, int]) -> Path:
        """The cache that huggingface_hub keeps: refs name commits, snapshots hold their files."""
        model = root / "models--Example--tiny-pythia"
        for number, (name, seed) in enumerate(revisions.items()):
            commit = f"{number:040x}"
            neox(seed).save_pretrained(model / "snapshots" / commit)
            (model / "refs").mkdir(exist_ok=True)
            (model / "refs" / name).write_text(commit)
        return model

    def test_a_hub_cache_opened_as_a_folder_and_by_name(self, tmp_path):
        revisions = {"step0": 0, "step2": 2, "step1000": 5}
        model = self.hub_cache(tmp_path, revisions)
        space = ParameterSpace.from_module(neox(7))
        steps = {name: step_of(name) for name in revisions}
        by_name = open_checkpoints(HubRevisions("Example/tiny-pythia", steps, tmp_path, offline=True), space)
        by_folder = open_checkpoints(model, space)
        assert by_name.steps == by_folder.steps == (0, 2, 1000)
        for index, seed in enumerate((0, 2, 5)):
            assert torch.equal(by_name[index], weights(neox(seed)))
            assert torch.equal(by_folder[index], weights(neox(seed)))
        absent = open_checkpoints(
            HubRevisions("Example/tiny-pythia", {"step4": 4}, tmp_path, offline=True), space
        )
        with pytest.raises(ValueError, match="revision 'step4'"):
            absent[0]

    def test_sharded_bf16_under_olmo_names_is_upcast(self, tmp_path):
        names = {"stage1-step150-tokens1B": 1, "stage1-step1000-tokens5B": 2}
        for name, seed in names.items():
            llama(seed).to(torch.bfloat16).save_pretrained(tmp_path / name, max_shard_size="2KB")
            assert (tmp_path / name / "model.safetensors.index.json").exists()
        series = open_checkpoints(tmp_path, llama(0))
        assert series.steps == (150, 1000)
        assert series[0].dtype == torch.float32
        # Rounding to bf16 and back is all that may happen.
        assert torch.equal(series[1], weights(llama(2)).to(torch.bfloat16).float())

    def test_torch_files_and_base_model_names(self, tmp_path):
        for step, model in ((1, gpt2(1)), (2, gpt2(2))):
            folder = tmp_path / f"step{step}"
            folder.mkdir()
            # Old files of GPT-2 hold the base model without its prefix, and mask buffers.
            state = model.transformer.state_dict()
            state["h.0.attn.bias"] = torch.ones(1, 1, 12, 12)
            torch.save(state, folder / "pytorch_model.bin")
        space = ParameterSpace.from_module(gpt2(0))
        series = open_checkpoints([tmp_path / "step2", tmp_path / "step1"], space)
        assert series.steps == (1, 2)
        assert torch.equal(series[1], weights(gpt2(2)))
        renamed = open_checkpoints([tmp_path / "step2", tmp_path / "step1"], space, steps=[5, 6])
        assert torch.equal(renamed[0], weights(gpt2(2)))

    def test_a_pretrained_reference_becomes_step_zero(self, tmp_path):
        folder = trainer_folder(tmp_path / "out", [gpt2(1), gpt2(2)])
        gpt2(0).save_pretrained(tmp_path / "base")
        series = open_checkpoints(folder, gpt2(9), reference=tmp_path / "base")
        assert series.steps == (0, 10, 20)
        assert torch.equal(series[0], weights(gpt2(0)))

    def test_reading_is_lazy_and_keeps_few(self, tmp_path):
        folder = trainer_folder(tmp_path, [gpt2(s) for s in range(5)])
        series = open_checkpoints(folder, gpt2(9))
        assert len(series._cache) == 0
        shutil.rmtree(folder / "checkpoint-50")
        for index in range(4):
            series[index]
        assert len(series._cache) == 3
        with pytest.raises(ValueError, match="checkpoint-50"):
            series[4]


class TestDamage:
    def folder(self, tmp_path):
        return trainer_folder(tmp_path / "out", [gpt2(s) for s in range(4)])

    def test_every_damaged_checkpoint_is_named(self, tmp_path):
        folder = self.folder(tmp_path)
        file = folder / "checkpoint-10" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        (folder / "checkpoint-20" / "model.safetensors").unlink()
        llama(0).save_pretrained(folder / "checkpoint-50", max_shard_size="2KB")
        shard = sorted((folder / "checkpoint-50").glob("model-*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(ValueError, match="3 of 5") as caught:
            whole_revisions(find_revisions(folder))
        words = ["checkpoint-10", "incomplete", "checkpoint-20", "found none", shard.name, "skip_damaged"]
        for word in words:
            assert word in str(caught.value)
        kept = whole_revisions(find_revisions(folder), skip_damaged=True)
        assert [r.step for r in kept] == [30, 40]

    def test_another_model_is_refused_with_the_checkpoint_name(self, tmp_path):
        folder = self.folder(tmp_path)
        series = open_checkpoints(folder, gpt2(0))
        shutil.rmtree(folder / "checkpoint-20")
        llama(0).save_pretrained(folder / "checkpoint-20")
        with pytest.raises(ValueError, match="another model"):
            series[1]

    def test_equal_steps_and_empty_folders_are_refused(self, tmp_path):
        (tmp_path / "a-step5").mkdir()
        (tmp_path / "b-step5").mkdir()
        with pytest.raises(ValueError, match="'a-step5' and 'b-step5' both say 5"):
            find_revisions(tmp_path)
        with pytest.raises(ValueError, match="none matching 'x\\*'"):
            find_revisions(tmp_path, names="x*")
        with pytest.raises(ValueError, match="does not"):
            find_revisions(tmp_path / "absent")


class TestModels:
    @pytest.mark.parametrize("make", [gpt2, neox, llama])
    def test_loading_gives_float32_weights_and_the_same_losses(self, tmp_path, make, generator):
        make(3).to(torch.bfloat16).save_pretrained(tmp_path)
        model = load_causal_lm(tmp_path)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        given = tokens(generator).inputs
        torch.testing.assert_close(next_token_loss(model, given), next_token_loss(plain, given))
        assert vocabulary_and_context(model) == (23, 12)
        assert load_tokenizer(tmp_path) is None

    def assert_slopes_are_right(self, module, token_loss, given, generator):
        """Directional derivatives and curvature against central differences, float64."""
        module = module.double()
        space = ParameterSpace.from_module(module)
        objective = Objective(module, token_loss, space, route="jvp")
        theta = space.read(module)
        row = torch.randn(1, space.size, generator=generator, dtype=torch.float64)
        row /= row.norm()
        _, slopes = objective.directional(theta, row, given)
        ahead, here, behind = (objective.losses(theta + s * row[0], given) for s in (1e-4, 0, -1e-4))
        torch.testing.assert_close(slopes[0], (ahead - behind) / 2e-4, rtol=1e-6, atol=1e-7)
        curved = float(objective.hessian(theta, given)(row[0]) @ row[0])
        assert curved == pytest.approx(float((ahead - 2 * here + behind).mean()) / 1e-8, rel=1e-3, abs=1e-5)

    def test_fused_attention_is_switched_and_derivatives_are_right(self, generator):
        model = gpt2(0, attn_implementation="sdpa")
        before = weights(model)
        given = tokens(generator)
        loss, said = ready_for_derivatives(model, given.inputs)
        assert (loss, said) == (next_token_loss, "switched to eager attention")
        assert ready_for_derivatives(model, given.inputs)[1] == "ready"
        assert torch.equal(weights(model), before)
        self.assert_slopes_are_right(model, loss, given, generator)

    def test_torchs_own_fused_attention_is_written_out(self, generator):
        class Fused(torch.nn.Module):
            """A module of the user's own around torch's attention."""

            def __init__(self):
                super().__init__()
                self.embed = torch.nn.Embedding(23, 8)

            def forward(self, ids):
                x = self.embed(ids)[:, None]
                mixed = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
                return mixed[:, 0] @ self.embed.weight.T

        module, given = Fused(), tokens(generator)
        loss, said = ready_for_derivatives(module, given.inputs)
        assert "written out" in said
        torch.testing.assert_close(loss(module, given.inputs), next_token_loss(module, given.inputs))
        self.assert_slopes_are_right(module, loss, given, generator)

    def test_without_forward_mode_reverse_mode_is_used_twice_and_said(self, generator):
        class OneWay(torch.autograd.Function):
            """Backward only, as hand-written kernels are."""

            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                return gradient

        def loss(module, inputs):
            return OneWay.apply(next_token_loss(module, inputs))

        model, given = gpt2(0), tokens(generator)
        used, said = ready_for_derivatives(model, given.inputs, loss)
        assert "reverse mode twice" in said
        self.assert_slopes_are_right(model, used, given, generator)

    def test_what_has_no_second_derivative_either_is_refused(self, generator):
        class Once(torch.autograd.Function):
            """A kernel whose backward pass cannot be differentiated."""

            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, gradient):
                return gradient * 1.0

        def loss(module, inputs):
            return Once.apply(next_token_loss(module, inputs)).square()

        with pytest.raises(ValueError, match="have neither"):
            ready_for_derivatives(gpt2(0), tokens(generator).inputs, loss)

    def test_a_folder_without_a_model_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"config\.json"):
            load_causal_lm(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
        with pytest.raises(ValueError, match="transformers"):
            load_causal_lm(tmp_path)


def loss_of(given: TokenSet):
    return lambda module: next_token_loss(module, given.inputs)[given.scored].mean()


class TestValuesAndCurvature:
    """Value and HVP at a checkpoint against a copy of the model written in place."""

    @pytest.mark.parametrize("make", [gpt2, neox, llama])
    def test_a_plain_model(self, tmp_path, make, generator):
        trainer_folder(tmp_path, [make(1), make(2)])
        module, given = make(0), tokens(generator)
        module.set_attn_implementation("eager")
        before = weights(module)
        space = ParameterSpace.from_module(module)
        series = open_checkpoints(tmp_path, space)
        objective = Objective(module, next_token_loss, space, batch_size=3, route="jvp")
        twin = load_causal_lm(tmp_path / "checkpoint-20")
        losses = objective.losses(series[1], given)
        torch.testing.assert_close(losses, next_token_loss(twin, given.inputs)[given.scored].detach())
        vector = torch.randn(space.size, generator=generator)
        product = objective.hessian(series[1], given)(vector)
        expected = hessian_product(twin, loss_of(given), vector)
        torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(weights(module), before)

    @pytest.mark.parametrize("make", [gpt2, neox, llama])
    def test_a_bridge_around_it(self, tmp_path, make, generator):
        trainer_folder(tmp_path, [make(1), make(2)])
        module, given = load_bridge(tmp_path / "checkpoint-10"), tokens(generator)
        space = ParameterSpace.from_module(module)
        before = space.read(module)
        series = open_checkpoints(tmp_path, space, load=load_bridge)
        assert torch.equal(series[0], before)
        objective = Objective(module, next_token_loss, space, batch_size=3, route="jvp")
        twin = load_causal_lm(tmp_path / "checkpoint-20")
        losses = objective.losses(series[1], given)
        torch.testing.assert_close(losses, next_token_loss(twin, given.inputs)[given.scored].detach())
        bridged = load_bridge(tmp_path / "checkpoint-20")
        twin_space = ParameterSpace.from_module(bridged)
        assert twin_space.fingerprint() == space.fingerprint()
        vector = torch.randn(space.size, generator=generator)
        product = objective.hessian(series[1], given)(vector)
        # Curvature v'Hv from the plain model moved along the same direction, by finite differences.
        step = 1e-3
        values = []
        for sign in (1, 0, -1):
            with twin_space.substituted(bridged, series[1] + sign * step * vector / vector.norm()):
                values.append(next_token_loss(bridged, given.inputs)[given.scored].double().mean().item())
        assert torch.isfinite(product).all()
        exact = float(product.double() @ vector.double() / vector.double().square().sum())
        assert exact == pytest.approx((values[0] - 2 * values[1] + values[2]) / step**2, abs=0.15)
        assert torch.equal(space.read(module), before)

    def test_an_exception_leaves_a_tied_model_as_it_was(self, tmp_path):
        module = gpt2(0)
        before = weights(module)
        space = ParameterSpace.from_module(module)
        with pytest.raises(RuntimeError, match="inside"), space.substituted(module, space.read(module) + 1):
            raise RuntimeError("inside")
        assert torch.equal(weights(module), before)
        assert module.lm_head.weight is module.transformer.wte.weight
        moved = copied_with(module, before + 1)
        assert torch.equal(weights(moved), before + 1)


class TestAdapters:
    def folder(self, tmp_path):
        peft = pytest.importorskip("peft", reason="package 'peft' is not installed")
        gpt2(0).save_pretrained(tmp_path / "base")
        settings = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(load_causal_lm(tmp_path / "base"), settings)
        draw = torch.Generator().manual_seed(3)
        for step in (5, 10):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
            model.save_pretrained(tmp_path / "out" / f"checkpoint-{step}")
        return tmp_path / "out", model

    def test_only_the_adapter_is_a_parameter_and_step_zero_is_the_pretrained_model(self, tmp_path, generator):
        out, trained = self.folder(tmp_path)
        assert is_adapter(out / "checkpoint-5")
        module = load_adapted(tmp_path / "base", out / "checkpoint-10")
        series = open_checkpoints(out, module)
        assert series.steps == (0, 5, 10)
        # c_attn maps 8 to 24: A is (2, 8), B is (24, 2), in each of two layers.
        assert series.space.size == 2 * (16 + 48)
        given = tokens(generator)
        objective = Objective(module, next_token_loss, series.space, route="jvp")
        base = next_token_loss(load_causal_lm(tmp_path / "base"), given.inputs)[given.scored].detach()
        torch.testing.assert_close(objective.losses(series[0], given), base)
        last = next_token_loss(trained, given.inputs)[given.scored].detach()
        assert float((last - base).abs().max()) > 0.01
        torch.testing.assert_close(objective.losses(series[2], given), last)

    def test_missing_adapter_config_is_said(self, tmp_path):
        pytest.importorskip("peft", reason="package 'peft' is not installed")
        gpt2(0).save_pretrained(tmp_path / "base")
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            load_adapted(tmp_path / "base", tmp_path)


def test_a_list_of_revisions_made_by_hand(tmp_path):
    gpt2(4).save_pretrained(tmp_path / "anything")
    space = ParameterSpace.from_module(gpt2(0))
    series = open_checkpoints({77: tmp_path / "anything"}, space)
    assert series.steps == (77,)
    assert torch.equal(series[0], weights(gpt2(4)))
