"""Inputs from public reports of neighbouring tools, each read right or refused in a sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import folders, gpt2, llama, made, neox, plain_weights, qwen2

from polca_edit.checkpoints.files import read_weights, weight_files
from polca_edit.checkpoints.huggingface_models import load_adapted, load_causal_lm
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.step_names import step_of
from polca_edit.checkpoints.survey import survey
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet, next_token_loss


def rewritten(folder: Path, change) -> None:
    """The weights of a folder under other names or without some of them."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


class TestInventedWeights:
    """Names that do not match end in a stripped wrapper or an error, never in fresh tensors."""

    @pytest.mark.parametrize("make", [llama, gpt2])
    @pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "_forward_module."])
    def test_prefixes_of_wrappers_are_stripped(self, prefix, make, tmp_path):
        models = folders(tmp_path, make)
        for folder in tmp_path.iterdir():
            rewritten(folder, lambda t: {prefix + name: tensor for name, tensor in t.items()})
        module = load_causal_lm(tmp_path / "checkpoint-1000")
        assert torch.equal(plain_weights(module), plain_weights(models[1000]))
        series = open_checkpoints(tmp_path, module)
        for index, model in enumerate(models.values()):
            assert torch.equal(series[index], plain_weights(model))

    def test_marks_inside_names_and_a_torch_file_of_a_lightning_module(self, tmp_path):
        models = {step: made(neox, step) for step in (5, 10)}
        for step, model in models.items():
            state = {
                "net." + name.replace("layers.0.", "layers.0._orig_mod."): tensor
                for name, tensor in model.state_dict().items()
            }
            torch.save(
                {"state_dict": state, "epoch": 1, "global_step": step}, tmp_path / f"step={step}-v1.ckpt"
            )
        series = open_checkpoints(tmp_path, made(neox, 0))
        assert series.steps == (5, 10)
        assert torch.equal(series[1], plain_weights(models[10]))

    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (llama, "model.layers.1.mlp.down_proj.weight"),
            (llama, "lm_head.weight"),
            (gpt2, "transformer.h.1.ln_1.bias"),
            (neox, "gpt_neox.embed_in.weight"),
        ],
    )
    def test_a_missing_tensor_is_named(self, make, name, tmp_path):
        folders(tmp_path, make)
        module = load_causal_lm(tmp_path / "checkpoint-1000")
        rewritten(tmp_path / "checkpoint-200", lambda t: {n: v for n, v in t.items() if n != name})
        with pytest.raises(ValueError, match=rf"checkpoint-200.*'{name}' is missing"):
            open_checkpoints(tmp_path, module)[1]
        with pytest.raises(ValueError, match=rf"'{name}' is missing"):
            load_causal_lm(tmp_path / "checkpoint-200")

    def test_a_save_of_the_encoder_alone_is_refused_where_the_head_is_not_tied_to_it(self, tmp_path):
        folders(tmp_path, llama)
        module = load_causal_lm(tmp_path / "checkpoint-1000")
        made(llama, 3).model.save_pretrained(tmp_path / "checkpoint-300")
        with pytest.raises(ValueError, match=r"checkpoint-300.*lm_head.weight.* missing"):
            open_checkpoints(tmp_path, module)[2]
        # GPT-2's head is its embedding: nothing is missing.
        tied = made(gpt2, 4)
        tied.transformer.save_pretrained(tmp_path / "g" / "checkpoint-1")
        assert torch.equal(open_checkpoints(tmp_path / "g", made(gpt2, 0))[0], plain_weights(tied))

    def test_a_layer_too_many_and_a_wrong_shape_are_refused(self, tmp_path):
        folders(tmp_path, llama)
        module = load_causal_lm(tmp_path / "checkpoint-1000")
        extra = {"model.layers.2.mlp.up_proj.weight": torch.zeros(32, 16)}
        rewritten(tmp_path / "checkpoint-100", lambda t: {**t, **extra})
        rewritten(tmp_path / "checkpoint-200", lambda t: {**t, "lm_head.weight": torch.zeros(60, 16)})
        series = open_checkpoints(tmp_path, module)
        with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj"):
            series[0]
        with pytest.raises(ValueError, match="lm_head"):
            series[1]

    def test_old_buffers_are_ignored_and_old_spellings_known(self, tmp_path):
        models = folders(tmp_path, llama)
        old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
        rewritten(tmp_path / "checkpoint-200", lambda t: {**t, **old})
        series = open_checkpoints(tmp_path, load_causal_lm(tmp_path / "checkpoint-1000"))
        assert torch.equal(series[1], plain_weights(models[200]))
        assert torch.equal(
            plain_weights(load_causal_lm(tmp_path / "checkpoint-200")), plain_weights(models[200])
        )
        g = folders(tmp_path / "g", gpt2)
        masks = {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in (0, 1)}
        masks["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)

        def renamed(tensors):
            swap = {
                n: n.replace("ln_f.weight", "ln_f.gamma").replace("ln_f.bias", "ln_f.beta") for n in tensors
            }
            return {**{swap[n]: t for n, t in tensors.items()}, **masks}

        rewritten(tmp_path / "g" / "checkpoint-100", renamed)
        assert torch.equal(open_checkpoints(tmp_path / "g", made(gpt2, 0))[0], plain_weights(g[100]))

    def test_one_parameter_under_two_spellings_must_have_one_value(self, tmp_path):
        folders(tmp_path, llama)
        name = "model.norm.weight"
        module = load_causal_lm(tmp_path / "checkpoint-1000")
        rewritten(tmp_path / "checkpoint-100", lambda t: {**t, "norm.weight": t[name].clone()})
        rewritten(tmp_path / "checkpoint-200", lambda t: {**t, "norm.weight": t[name] + 1})
        series = open_checkpoints([tmp_path / "checkpoint-100" / "model.safetensors"], module, steps=[1])
        series[0]
        series = open_checkpoints([tmp_path / "checkpoint-200" / "model.safetensors"], module, steps=[1])
        with pytest.raises(ValueError, match="stored once"):
            series[0]


class TestSteps:
    @pytest.mark.parametrize(
        ("name", "step"),
        [
            ("step100_loss3.95.pt", 100),
            ("epoch=3-step=1000-val_loss=2.31.ckpt", 1000),
            ("epoch=3-step=1000-v1.ckpt", 1000),
            ("checkpoint-500-best", 500),
            ("model-100.pt", 100),
            ("ckpt_00500.safetensors", 500),
            ("globalstep300", 300),
            ("tiny-70m-final", None),
            ("fp16", None),
            ("step10k", None),
            ("step_1_000", None),
            ("val_loss_3.pt", None),
            ("model_loss3.95.pt", None),
            ("seed-1", None),
            ("gpt2-355M", None),
            ("llama-3", None),
            ("model-00001-of-00002.safetensors", None),
            ("run-2024-01-15", None),
            ("weights-v2.pt", None),
            ("step1.5", None),
        ],
    )
    def test_numbers_that_are_steps_and_numbers_that_are_none(self, name, step):
        assert step_of(name) == step

    def test_metric_values_do_not_order_files(self, tmp_path):
        names = {100: "step100_loss3.95.pt", 200: "step200_loss3.10.pt", 1000: "step1000_loss2.05.pt"}
        models = {step: made(gpt2, step) for step in names}
        for step, name in names.items():
            torch.save(models[step].state_dict(), tmp_path / name)
        series = open_checkpoints(tmp_path, made(gpt2, 0))
        assert series.steps == (100, 200, 1000)
        assert torch.equal(series[2], plain_weights(models[1000]))

    def test_a_final_copy_is_left_out_and_said(self, tmp_path):
        folders(tmp_path)
        for name in ("tiny-70m-final", "best", "fp16", "llama-3"):
            shutil.copytree(tmp_path / "checkpoint-1000", tmp_path / name)
        found = survey(tmp_path)
        assert [revision.step for revision in found.revisions] == [100, 200, 1000]
        assert found.left_out == ("best", "fp16", "llama-3", "tiny-70m-final")
        assert "3 checkpoints in order: 100, 200, 1000; left out" in found.sentence()

    def test_rounded_steps_are_asked_about(self, tmp_path):
        folders(tmp_path)
        shutil.copytree(tmp_path / "checkpoint-1000", tmp_path / "step10k")
        with pytest.raises(ValueError, match="'step10k' says '10k'"):
            survey(tmp_path)
        assert len(survey(tmp_path, names="checkpoint-*").revisions) == 3

    def test_two_files_of_one_step_are_asked_about(self, tmp_path):
        for name in ("epoch=1-step=10.ckpt", "epoch=1-step=10-v1.ckpt"):
            torch.save(made(gpt2, 0).state_dict(), tmp_path / name)
        with pytest.raises(ValueError, match="both say 10"):
            survey(tmp_path)

    def test_pull_requests_in_a_hub_cache_are_no_revisions(self, tmp_path):
        for number, name in enumerate(("step1", "step2", "pr/1")):
            made(gpt2, number).save_pretrained(tmp_path / "snapshots" / f"{number:040x}")
            ref = tmp_path / "refs" / name
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(f"{number:040x}")
        assert [r.name for r in survey(tmp_path).revisions] == ["step1", "step2"]

    @pytest.mark.parametrize("pattern", ["(", "checkpoint", r"checkpoint-(\D)?"])
    def test_a_bad_step_pattern_is_a_sentence(self, pattern, tmp_path):
        folders(tmp_path)
        with pytest.raises(ValueError, match="step pattern|named by step"):
            survey(tmp_path, step_pattern=pattern)


class TestFiles:
    def test_a_stale_index_beside_one_file_is_not_read(self, tmp_path):
        """The oracle is transformers, which takes the single file."""
        models = folders(tmp_path)
        folder = tmp_path / "checkpoint-1000"
        kept = tmp_path / "kept"
        shutil.move(folder / "model.safetensors", kept)
        made(llama, 9).save_pretrained(folder, max_shard_size="4KB")
        assert [p.name for p in weight_files(folder)][0].startswith("model-00001-of")
        shutil.move(kept, folder / "model.safetensors")
        assert [p.name for p in weight_files(folder)] == ["model.safetensors"]
        module = load_causal_lm(folder)
        assert torch.equal(open_checkpoints(tmp_path, module)[-1], plain_weights(models[1000]))
        # A torch file beside it is the older one too.
        torch.save(made(llama, 9).state_dict(), folder / "pytorch_model.bin")
        assert torch.equal(open_checkpoints(tmp_path, module)[-1], plain_weights(models[1000]))

    @pytest.mark.parametrize(
        "keys", [["model", "state_dict"], ["state_dict", "model"], ["model_state_dict"], ["module"]]
    )
    def test_nested_dictionaries_are_entered(self, keys, tmp_path):
        model = made(gpt2, 3)
        state = model.state_dict()
        for key in reversed(keys):
            state = {key: state, "optimizer": {"state": {}}, "step": 7}
        torch.save(state, tmp_path / "step7.pt")
        assert torch.equal(open_checkpoints(tmp_path, made(gpt2, 0))[0], plain_weights(model))

    def test_two_state_dicts_in_one_file_are_asked_about(self, tmp_path):
        state = made(gpt2, 3).state_dict()
        torch.save({"model": state, "network": state}, tmp_path / "step7.pt")
        with pytest.raises(ValueError, match="must hold one state dict"):
            read_weights(tmp_path / "step7.pt")
        torch.save({"epoch": 3, "w": torch.ones(2)}, tmp_path / "step8.pt")
        with pytest.raises(ValueError, match="'epoch' is a int"):
            read_weights(tmp_path / "step8.pt")
        torch.save({}, tmp_path / "step9.pt")
        with pytest.raises(ValueError, match="no tensor"):
            read_weights(tmp_path / "step9.pt")

    def test_running_statistics_that_move_are_refused(self):
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).eval()
        same = {n: v.clone() for n, v in module.state_dict().items()}
        moved = {n: v + 1 if n.endswith(("weight", "mean")) else v.clone() for n, v in same.items()}
        series = open_checkpoints({0: same, 1: moved}, module)
        series[0]
        with pytest.raises(ValueError, match=r"1\.running_mean"):
            series[1]
        held = {n: v for n, v in moved.items() if not n.endswith("mean")}
        open_checkpoints({0: same, 1: held}, module)[1]


class TestAdapters:
    def adapters(self, tmp_path: Path, **settings):
        peft = pytest.importorskip("peft", reason="package 'peft' is not installed")
        base = made(llama, 0)
        base.save_pretrained(tmp_path / "base")
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **settings)
        model = peft.get_peft_model(load_causal_lm(tmp_path / "base"), config)
        draw = torch.Generator().manual_seed(1)
        for step in (5, 10):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
            model.save_pretrained(tmp_path / "out" / f"checkpoint-{step}")
        return base, model

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"init_lora_weights": "pissa"},
            {"init_lora_weights": "olora"},
            {"use_dora": True},
            {"modules_to_save": ["lm_head"]},
        ],
        ids=["plain", "pissa", "olora", "dora", "saved-module"],
    )
    def test_step_zero_is_the_pretrained_model(self, settings, tmp_path):
        base, trained = self.adapters(tmp_path, **settings)
        module = load_adapted(tmp_path / "base", tmp_path / "out" / "checkpoint-10")
        series = open_checkpoints(tmp_path / "out", module)
        assert series.steps == (0, 5, 10)
        inputs = torch.randint(1, 61, (4, 12), generator=torch.Generator().manual_seed(2))
        for index, model in ((0, base), (2, trained)):
            with series.space.substituted(module, series[index]), torch.no_grad():
                found, true = next_token_loss(module, inputs), next_token_loss(model, inputs)
            torch.testing.assert_close(found, true, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            assert (
                float((next_token_loss(base, inputs) - next_token_loss(trained, inputs)).abs().max()) > 0.01
            )

    @pytest.mark.parametrize("scheme", [False, "orthogonal", "pissa_niter_2"])
    def test_a_start_that_cannot_be_known_is_refused(self, scheme, tmp_path):
        self.adapters(tmp_path, init_lora_weights=scheme)
        module = load_adapted(tmp_path / "base", tmp_path / "out" / "checkpoint-10")
        with pytest.raises(ValueError, match="init_lora_weights"):
            open_checkpoints(tmp_path / "out", module)

    def test_an_adapter_without_one_of_its_tensors_is_refused(self, tmp_path):
        self.adapters(tmp_path)
        path = tmp_path / "out" / "checkpoint-10" / "adapter_model.safetensors"
        held = load_file(path)
        save_file(dict(list(held.items())[1:]), path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="is missing"):
            load_adapted(tmp_path / "base", tmp_path / "out" / "checkpoint-10")


class TestPreconditions:
    def tokens(self, pad: int | None = None) -> TokenSet:
        inputs = torch.randint(2, 61, (4, 12), generator=torch.Generator().manual_seed(0))
        if pad is not None:
            inputs[:, 0] = pad
        return TokenSet(inputs, torch.ones(4, 11, dtype=torch.bool), torch.arange(4))

    def test_every_route_has_the_true_derivative_of_a_padded_embedding(self):
        class Padded(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = torch.nn.Embedding(61, 6, padding_idx=0)
                self.head = torch.nn.Linear(6, 61)

            def forward(self, ids):
                return self.head(self.embed(ids).cumsum(1).tanh())

        torch.manual_seed(1)
        module = Padded().double()
        space, tokens = ParameterSpace.from_module(module), self.tokens(pad=0)
        theta = space.read(module)
        row = torch.zeros(space.size, dtype=torch.float64)
        row[:6] = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        plain = Objective(module, next_token_loss, space)
        ahead, behind = (plain.losses(theta + s * row, tokens) for s in (1e-5, -1e-5))
        true = (ahead - behind) / 2e-5
        assert float(true.abs().max()) > 0.05
        for route in ("jvp", "traced", "adjoint", "double_backward"):
            objective = Objective(module, next_token_loss, space, route=route)
            _, slopes = objective.directional(theta, row[None], tokens)
            torch.testing.assert_close(slopes[0], true, rtol=1e-6, atol=1e-8, msg=route)
        gradient = plain.mean_gradient(theta, tokens)[1]
        assert float(gradient @ row) == pytest.approx(float(true.mean()), rel=1e-6)
        assert module.embed.padding_idx == 0  # as it was

    def test_both_routes_agree_on_a_padded_model_of_transformers(self):
        module = made(qwen2, 1, pad_token_id=0, attn_implementation="eager")
        assert module.model.embed_tokens.padding_idx == 0
        space, tokens = ParameterSpace.from_module(module), self.tokens(pad=0)
        row = torch.randn(1, space.size, generator=torch.Generator().manual_seed(3))
        theta = space.read(module)
        one, other = (
            Objective(module, next_token_loss, space, route=route).directional(theta, row, tokens)[1]
            for route in ("jvp", "adjoint")
        )
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    def test_a_module_in_training_mode_with_dropout_is_refused(self):
        module = made(gpt2, 1, attn_implementation="eager").train()
        space = ParameterSpace.from_module(module)
        with pytest.raises(ValueError, match=r"model\.eval"):
            Objective(module, next_token_loss, space).losses(space.read(module), self.tokens())
        module.eval()
        Objective(module, next_token_loss, space).losses(space.read(module), self.tokens())
        # Training mode without anything that depends on it is fine.
        plain = made(llama, 1).train()
        space = ParameterSpace.from_module(plain)
        Objective(plain, next_token_loss, space).losses(space.read(plain), self.tokens())

    def test_functional_dropout_that_never_goes_off_is_refused(self):
        class Leaky(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = torch.nn.Embedding(61, 8)

            def forward(self, ids):
                return torch.nn.functional.dropout(self.embed(ids), 0.1) @ self.embed.weight.T

        module = Leaky().eval()
        before = torch.get_rng_state()
        with pytest.raises(ValueError, match="same twice"):
            Objective(module, next_token_loss).losses(
                ParameterSpace.from_module(module).read(module), self.tokens()
            )
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("shape", ["(B,)", "()", "(B, P, 1)"])
    def test_a_loss_of_another_shape_is_explained(self, shape):
        module = made(llama, 1)
        losses = {
            "(B,)": lambda m, x: next_token_loss(m, x).mean(1),
            "()": lambda m, x: next_token_loss(m, x).mean(),
            "(B, P, 1)": lambda m, x: next_token_loss(m, x)[..., None],
        }
        space = ParameterSpace.from_module(module)
        with pytest.raises(ValueError, match=r"must return \(B, P\)"):
            Objective(module, losses[shape], space).losses(space.read(module), self.tokens())

    @pytest.mark.parametrize("labels", [torch.ones(44, dtype=torch.int64), torch.ones(43, dtype=torch.bool)])
    def test_labels_are_booleans_of_the_right_length(self, labels):
        tokens = self.tokens()
        with pytest.raises(ValueError, match="44 booleans"):
            TokenSet(tokens.inputs, tokens.scored, tokens.documents, {"skill": labels})

    def test_a_raw_difference_is_no_basis_row(self):
        from interventions.edits import Movement, project_out
        from polca_edit.basis.record import unlabelled
        from polca_edit.observation import observe

        draw = torch.Generator().manual_seed(0)
        start, end = torch.randn(50, generator=draw), torch.randn(50, generator=draw)
        place, raw = Movement(end, start), end - start
        for rows in (raw, raw[None], unlabelled("raw", raw[None])):
            with pytest.raises(ValueError, match="orthonormal"):
                project_out(place, rows)
        whole = project_out(place, raw / raw.norm()).apply(end)
        torch.testing.assert_close(whole, start, atol=1e-5, rtol=0)
        module = made(llama, 1)
        space = ParameterSpace.from_module(module)
        flat = {step: space.read(module) + 0.01 * step for step in range(3)}
        series = open_checkpoints(flat, space)
        twice = unlabelled("twice", torch.ones(2, space.size) / space.size**0.5)
        with pytest.raises(ValueError, match="row 1 of 'twice'"):
            observe(Objective(module, next_token_loss, space), series, twice, self.tokens())


def test_a_library_error_ends_in_one_sentence(monkeypatch, capsys):
    from experiments.application import run_application

    monkeypatch.delenv("POLCA_EDIT_TRACEBACK", raising=False)
    for error in (IndexError("index 3 is out of bounds"), RuntimeError("shape\nmismatch"), KeyError("x")):

        def broken(error=error) -> None:
            raise error

        monkeypatch.setattr("sys.argv", ["polca-edit"])
        import typer

        application = typer.Typer(pretty_exceptions_enable=False)
        application.command()(lambda: broken())
        with pytest.raises(SystemExit) as ended:
            run_application(application)
        said = capsys.readouterr().err.strip()
        assert ended.value.code == 2
        assert said.count("\n") == 0
        assert "Traceback" not in said
        assert type(error).__name__ in said


@pytest.mark.parametrize("name", ["mamba", "opt"])
def test_mamba_and_opt_open_as_a_task_and_say_what_was_found(name, tmp_path):
    import numpy as np
    from tiny_models import ARCHITECTURES

    from experiments.config import load_config
    from experiments.tasks.task import build_task
    from experiments.verbs.pipeline import open_overrides

    models = folders(tmp_path / "out", ARCHITECTURES[name], steps=(1, 2, 3))
    made(ARCHITECTURES[name], 9).save_pretrained(tmp_path / "out" / "final")
    (tmp_path / "out" / "checkpoint-4").mkdir()  # an empty last one
    (tmp_path / "out" / "checkpoint-4" / "model.safetensors").touch()
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(2, 61, (60, 32)))
    with pytest.raises(ValueError, match="checkpoint-4"):
        open_overrides(tmp_path / "out", str(tmp_path / "ids.npy"))
    overrides = open_overrides(tmp_path / "out", str(tmp_path / "ids.npy"), skip_damaged=True)
    sizes = {f"text.{split}_sequences": 8 for split in ("select", "curvature", "evaluate")}
    config = load_config("huggingface", {**overrides, **sizes, "text.n_ctx": 16})
    task = build_task(config)
    series = task.given_checkpoints(config)
    assert series.steps == (1, 2, 3)
    assert torch.equal(series[-1], plain_weights(models[3]))
    assert any("left out, no step in the name: 'final'" in note for note in task.notes)
    assert any("1,920 token ids in 60 documents" in note for note in task.notes)


def test_apply_on_an_adapter_and_undo(tmp_path):
    from experiments.removal.apply import apply_edit, undo_edit
    from interventions.edit_files import load_edit, save_edit
    from interventions.edits import from_delta, weights_fingerprint

    peft = pytest.importorskip("peft", reason="package 'peft' is not installed")
    made(llama, 0).save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(made(llama, 0), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "a")
    module = load_adapted(tmp_path / "base", tmp_path / "a")
    space = ParameterSpace.from_module(module)
    theta = space.read(module)
    save_edit(
        tmp_path / "edit", from_delta(weights_fingerprint(theta), torch.ones(space.size), "test"), space
    )
    file = load_edit(tmp_path / "edit")
    applied = apply_edit(file, tmp_path / "a", tmp_path / "b")
    assert (applied.tensors, applied.largest) == (4, pytest.approx(1.0))
    edited = load_adapted(tmp_path / "base", tmp_path / "b")
    torch.testing.assert_close(space.read(edited), theta + 1)
    undo_edit(file, tmp_path / "b", tmp_path / "c")
    assert torch.equal(space.read(load_adapted(tmp_path / "base", tmp_path / "c")), theta)
