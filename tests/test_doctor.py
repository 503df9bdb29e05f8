"""``polca-edit doctor`` on folders of every kind: what is said, and when the exit code is not zero."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import folders, gpt2, llama, made, neox
from torch import nn
from typer.testing import CliRunner

from experiments.cli import app
from experiments.verbs.doctor.examine import Question, examine
from experiments.verbs.doctor.verb import lines
from polca_edit.recording import Recorder


def said(folder, **more) -> str:
    return "\n".join(lines(examine(Question(folder, **more))))


def test_a_whole_folder_is_opened_and_timed(tmp_path):
    folders(tmp_path / "out", llama, steps=(10, 20, 30))
    small = ["{kind: trajectory, vectors: 2}"]
    preset = tmp_path / "small.yaml"
    preset.write_text(
        "task: text\nmodel: {kind: huggingface, path: .}\n"
        "text: {n_ctx: 16, scored_per_sequence: 4, select_sequences: 8, curvature_sequences: 8, "
        "evaluate_sequences: 8}\n"
        f"bases: [{small[0]}]\ndiscover: {{edits: 0}}\n"
    )
    target = tmp_path / "found.json"
    options = ["--preset", str(preset), "--json", str(target)]
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    for words in (
        "3 checkpoints in order: 10, 20, 30",
        "LlamaForCausalLM",
        "3 of 3 checkpoints agree",
        "10 to 10 steps",
        "basis:trajectory, projections",
        "minutes",
    ):
        assert words in " ".join(result.output.split())
    found = json.loads(target.read_text())
    assert found["schema"] == "polca-edit/doctor/1"
    assert found["problems"] == []
    assert all(abs(one["ours"] - one["library"]) < 1e-5 for one in found["checkpoints"])


def test_prefixes_spellings_and_left_out_names_are_said(tmp_path):
    folders(tmp_path, gpt2, steps=(10, 20))
    for folder in list(tmp_path.iterdir()):
        path = folder / "model.safetensors"
        held = {"_orig_mod." + name: tensor for name, tensor in load_file(path).items()}
        held["_orig_mod.transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        save_file(held, path, metadata={"format": "pt"})
    shutil.copytree(tmp_path / "checkpoint-20", tmp_path / "tiny-70m-final")
    text = said(tmp_path)
    assert "_orig_mod. (stripped)" in text
    assert "1 buffers of older releases" in text
    assert "left out, no step in the name: 'tiny-70m-final'" in text
    assert "transformer.wte.weight = lm_head.weight" in text
    assert "2 of 2 checkpoints agree" in text


@pytest.mark.parametrize("fault", ["missing", "config", "truncated", "quantised"])
def test_what_does_not_open_rightly_is_named_and_the_exit_code_says_so(fault, tmp_path):
    folders(tmp_path, neox, steps=(10, 20, 30))
    folder = tmp_path / "checkpoint-20"
    path = folder / "model.safetensors"
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    held = load_file(path)
    if fault == "missing":
        save_file({n: t for n, t in held.items() if n != name}, path, metadata={"format": "pt"})
    elif fault == "quantised":
        save_file({**held, name: held[name].to(torch.int8)}, path, metadata={"format": "pt"})
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    expected = {
        "missing": "dense_h_to_4h.weight' is missing",
        "config": "hidden_act",
        "truncated": "incomplete",
        "quantised": "dequantise",
    }
    result = CliRunner().invoke(app, ["doctor", str(tmp_path), "--json", "-"])
    assert result.exit_code != 0
    assert "does not open rightly" in str(result.exception)
    found = json.loads(result.stdout)
    assert [one["name"] for one in found["checkpoints"] if one["problem"]] == ["checkpoint-20"]
    assert expected[fault] in found["problems"][0]
    if fault == "config":  # both losses are there to be seen
        assert abs(found["checkpoints"][1]["ours"] - found["checkpoints"][1]["library"]) > 1e-4


def test_an_adapter_starts_at_its_base(tmp_path):
    peft = pytest.importorskip("peft", reason="package 'peft' is not installed")
    made(llama, 0).save_pretrained(tmp_path / "base")
    for step in (1, 2):
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
        peft.get_peft_model(made(llama, 0), settings).save_pretrained(tmp_path / "out" / f"checkpoint-{step}")
    text = said(tmp_path / "out", base=tmp_path / "base")
    assert "adapters" in text
    assert "2 of 2 checkpoints agree" in text
    assert "problem" not in text
    assert "pass --base FOLDER" in said(tmp_path / "out")


def test_recordings_files_and_one_checkpoint(tmp_path):
    module = nn.Linear(3, 2)
    recorder = Recorder(tmp_path / "recorded", module, every=1)
    recorder.step()
    assert "recorded series" in said(tmp_path / "recorded")
    (tmp_path / "files").mkdir()
    for step in (1, 2):
        torch.save({"state_dict": {"module.w": torch.ones(2)}}, tmp_path / "files" / f"step{step}.ckpt")
    text = said(tmp_path / "files")
    assert "weight files" in text
    assert "weights alone" in text
    torch.save({"state_dict": {"module.w": torch.ones(3)}}, tmp_path / "files" / "step3.ckpt")
    assert "'module.w' is not as in 'step1.ckpt'" in said(tmp_path / "files")
    made(gpt2, 0).save_pretrained(tmp_path / "one")
    text = said(tmp_path / "one")
    assert "one checkpoint" in text
    assert "1 of 1 checkpoints agree" in text
    with pytest.raises(ValueError, match="does not"):
        examine(Question(tmp_path / "nowhere"))
