"""From a folder of Hugging Face checkpoints, and from a text, to a report: one command each."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from hub_models import revisions, train_and_save, write_text
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM
from typer.testing import CliRunner

from experiments.cli import app
from experiments.run.summary.write import summary_schema
from polca_edit.checkpoints.step_names import step_of

SIZES = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
SMALL = [
    "text.n_ctx=16",
    "text.select_sequences=10",
    "text.curvature_sequences=6",
    "text.evaluate_sequences=10",
    "text.scored_per_sequence=8",
    "bases=[{kind: hessian, vectors: 2, max_products: 8}, {kind: trajectory, vectors: 2}]",
    "damage.random_draws=1",
    "damage.doses=[1.0]",
    "clusters.min_cluster_share=0.1",
]


def gpt2():
    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**shape, **off, **SIZES))


def neox():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return GPTNeoXForCausalLM(GPTNeoXConfig(max_position_embeddings=32, **shape, **SIZES))


def invoke(*arguments: str) -> str:
    settings = [part for setting in SMALL for part in ("--set", setting)]
    verb, *others = arguments
    result = CliRunner().invoke(app, [verb, *settings, *others], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def checked_summary(out: Path, parameters: int, checkpoints: int) -> dict:
    summary = json.loads((out / "summary.json").read_text())
    jsonschema.validate(summary, summary_schema())
    assert summary["task"] == "text"
    assert summary["model"]["parameters"] == parameters
    assert summary["tokens"]["checkpoints"] == checkpoints
    page = (out / "report.html").read_text()
    assert "</html>" in page
    return summary


def test_a_trainer_folder_of_gpt2(tmp_path):
    names = [f"checkpoint-{s}" for s in (5, 10, 15, 20)]
    model = gpt2()
    train_and_save(model, revisions(tmp_path / "out", names, lambda n: int(n.split("-")[1])))
    text = write_text(tmp_path / "text.jsonl")
    out = tmp_path / "run"
    said = invoke("open", str(tmp_path / "out"), "--text", str(text), "--out", str(out))
    assert "report.html" in said
    summary = checked_summary(out, sum(p.numel() for p in model.parameters()), 4)
    change = summary["analyses"]["trajectory"]["loss_change"]
    # The tiny model learns; parts, residual and quadrature error add up to the exact change.
    assert change["exact"] < -0.3
    total = change["attributed"] + change["residual"] + change["quadrature_error"]
    assert total == pytest.approx(change["exact"], abs=1e-5)


def test_a_pythia_shaped_revision_set_and_a_fine_tuning_reference(tmp_path):
    names = ["step0", "step1", "step2", "step4", "step8"]
    model = neox()
    folders = revisions(tmp_path / "pythia", names, lambda n: step_of(n) or 0)
    train_and_save(model, folders)
    text = write_text(tmp_path / "text.jsonl")
    out = tmp_path / "run"
    invoke("open", str(tmp_path / "pythia"), "--names", "step*", "--text", str(text), "--out", str(out))
    summary = checked_summary(out, sum(p.numel() for p in model.parameters()), 5)
    assert [v["origin"] for v in summary["analyses"]["hessian"]["vectors"]] == [2, 8]


def test_a_damaged_folder_ends_with_one_sentence(tmp_path):
    names = ["checkpoint-1", "checkpoint-2"]
    train_and_save(gpt2(), revisions(tmp_path / "out", names, lambda n: int(n[-1])))
    (tmp_path / "out" / "checkpoint-2" / "model.safetensors").unlink()
    result = CliRunner().invoke(app, ["open", str(tmp_path / "out"), "--text", "x.txt"])
    assert result.exit_code != 0
    assert isinstance(result.exception, ValueError)
    assert "checkpoint-2" in str(result.exception)


def test_english_from_a_text_file(tmp_path):
    text = write_text(tmp_path / "text.jsonl")
    out = tmp_path / "run"
    tiny = [
        "model={layers: 1, d_model: 16, heads: 2, d_mlp: 32}",
        "text.vocabulary=300",
        "training={steps: 30, batch_size: 4, learning_rate: 0.01, warmup: 5, record_every: 2}",
        "bases=[{kind: hessian, vectors: 5, max_products: 8}, {kind: trajectory, vectors: 5}]",
        "damage={random_draws: 1, doses: [0.5]}",
        "discover={edits: 8, windows: 4}",
    ]
    settings = [part for setting in tiny for part in ("--set", setting)]
    invoke("english", "--preset", "demo", "--text", str(text), "--out", str(out), *settings)
    labels = json.loads((out / "labels" / "trajectory.json").read_text())
    assert {"vectors_kept", "vectors_with_rule", "clusters", "distinct_groups"} <= labels.keys()
    for entry in labels["clusters"]:
        assert 0 <= entry["auc"] <= 1
        assert len(entry["contexts"]) == min(10, entry["tokens"])
    CliRunner().invoke(app, ["label", str(out), "--transfer", str(text), "--sequences", "8"])
    rows = json.loads((out / "labels" / "transfer.json").read_text())["rows"]
    wanted = {f"{c['vector']}:{c['cluster']}" for c in labels["clusters"]}
    assert {f"{r['vector']}:{r['cluster']}" for r in rows if r["basis"] == "trajectory"} == wanted
    assert all(r["auc_transferred"] is None or 0 <= r["auc_transferred"] <= 1 for r in rows)
    if labels["clusters"]:
        assert "tokens nearest the medoid" in (out / "report.html").read_text()
    summary = checked_summary(out, 16 * 300 + 16 * 16 + (4 * 272 + 544 + 528 + 64) + 32 + 17 * 300, 16)
    assert summary["analyses"]["trajectory"]["loss_change"]["exact"] < -0.5
    assert (out / "labels" / "exact_loss.json").exists()
    assert "Clusters of the exact losses (no basis)" in (out / "report.html").read_text()
