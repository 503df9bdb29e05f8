"""Edit files, apply, undo, cast and low-rank export. Oracles: the original bytes and direct arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from experiments.removal.apply import apply, apply_edit, edited_tensors, undo_edit
from interventions.edit_files import load_edit, paths_of, save_adapter, save_edit
from interventions.edits import Movement, displace, from_delta, weights_fingerprint
from interventions.lora import factors, low_rank, transposed_weights
from polca_edit.parameters import ParameterSpace
from tests.oracles import tiny_gpt2


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.embed = nn.Embedding(7, 6)


@pytest.fixture
def model() -> Small:
    return Small()


def random_edit(module: nn.Module, size: float = 0.5):
    space = ParameterSpace.from_module(module)
    rows = torch.linalg.qr(torch.randn(space.size, 3, generator=torch.Generator().manual_seed(1)))[
        0
    ].T.contiguous()
    theta = space.read(module)
    place = Movement(theta, theta)
    return displace(place, rows, [size, -size, 2 * size], "test", basis="random"), space


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_edit_file_round_trip(model: Small, tmp_path: Path) -> None:
    edit, space = random_edit(model)
    save_edit(tmp_path / "carry@10s.v1", edit, space)
    loaded = load_edit(tmp_path / "carry@10s.v1.json")
    assert torch.equal(loaded.edit.rows, edit.rows)
    assert torch.equal(loaded.edit.coordinates, edit.coordinates)
    assert (loaded.edit.base, loaded.edit.operator, loaded.edit.provenance) == (
        edit.base,
        "test",
        {"basis": "random"},
    )
    assert loaded.space == space


def test_damaged_edit_files_are_refused(model: Small, tmp_path: Path) -> None:
    edit, space = random_edit(model)
    save_edit(tmp_path / "e", edit, space)
    tensors, description = paths_of(tmp_path / "e")
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="checksum"):
        load_edit(tmp_path / "e.safetensors")
    tensors.write_bytes(whole)
    values = json.loads(description.read_text())
    description.write_text(json.dumps({**values, "space": {**values["space"], "shapes": [[1]]}}))
    with pytest.raises(ValueError, match="shapes differ"):
        load_edit(tmp_path / "e")
    tensors.unlink()
    with pytest.raises(ValueError, match="missing"):
        load_edit(tmp_path / "e")
    with pytest.raises(ValueError, match="one entry per parameter"):
        save_edit(tmp_path / "f", edit, ParameterSpace.from_module(nn.Linear(2, 2)))


@pytest.mark.parametrize("kind", ["safetensors", "torch", "nested", "huggingface", "sharded"])
def test_apply_then_undo_gives_the_original_bytes(kind: str, model: Small, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    state = model.state_dict()
    if kind == "safetensors":
        given = source / "weights.safetensors"
        save_file(state, given, metadata={"format": "pt", "note": "kept"})
    elif kind == "torch":
        given = source / "model.pth"
        torch.save(state, given)
    elif kind == "nested":
        given = source / "model.pt"
        torch.save({"model": state, "step": 12}, given)
    elif kind == "huggingface":
        model = tiny_gpt2()
        model.save_pretrained(source)
        given = source
    else:
        given = source
        names = sorted(state)
        parts = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
        for name, keys in parts.items():
            save_file({k: state[k] for k in keys}, source / name)
        index = {"weight_map": {k: name for name, keys in parts.items() for k in keys}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    original = files_of(source)
    edit, space = random_edit(model)
    save_edit(tmp_path / "edit", edit, space)
    file = load_edit(tmp_path / "edit")
    applied = apply_edit(file, given, tmp_path / "edited")
    assert applied.norm == pytest.approx(edit.norm, rel=1e-4)
    assert applied.reader == ("transformers" if kind == "huggingface" else "the reader of checkpoints")
    assert applied.survival.share == pytest.approx(1.0, abs=1e-6)
    from polca_edit.checkpoints.files import read_weights, weight_files

    edited = read_weights(tmp_path / "edited" if given.is_dir() else tmp_path / "edited" / given.name)
    torch.testing.assert_close(space.flatten(edited), edit.apply(space.read(model)))
    assert [p.suffix for p in weight_files(given)] == [p.suffix for p in weight_files(tmp_path / "edited")]
    undo_edit(file, tmp_path / "edited", tmp_path / "restored")
    assert files_of(tmp_path / "restored") == original
    assert files_of(source) == original  # the input is never touched


def test_edited_hugging_face_folder_loads_and_ties(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_gpt2(tied=True)
    model.save_pretrained(tmp_path / "gpt2")
    edit, space = random_edit(model)
    save_edit(tmp_path / "edit", edit, space)
    apply_edit(load_edit(tmp_path / "edit"), tmp_path / "gpt2", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(space.read(loaded), edit.apply(space.read(model)))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_wrong_models_are_refused(model: Small, tmp_path: Path) -> None:
    edit, space = random_edit(model)
    save_edit(tmp_path / "edit", edit, space)
    file = load_edit(tmp_path / "edit")
    save_file({k: v + 1 for k, v in model.state_dict().items()}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="made for"):
        apply_edit(file, tmp_path / "other.safetensors", tmp_path / "a")
    save_file(nn.Linear(6, 5).state_dict(), tmp_path / "linear.safetensors")
    with pytest.raises(ValueError, match="missing"):
        apply_edit(file, tmp_path / "linear.safetensors", tmp_path / "a")
    wrong = {**model.state_dict(), "inner.weight": torch.zeros(5, 7)}
    save_file(wrong, tmp_path / "shape.safetensors")
    with pytest.raises(ValueError, match="shape"):
        apply_edit(file, tmp_path / "shape.safetensors", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="must exist"):
        apply_edit(file, tmp_path / "nowhere", tmp_path / "a")


def test_undo_refuses_a_model_that_changed_since(model: Small, tmp_path: Path) -> None:
    edit, space = random_edit(model)
    save_edit(tmp_path / "edit", edit, space)
    file = load_edit(tmp_path / "edit")
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    apply_edit(file, tmp_path / "m.safetensors", tmp_path / "out")
    with pytest.raises(ValueError, match="new or empty"):
        apply_edit(file, tmp_path / "m.safetensors", tmp_path / "out")
    weights = tmp_path / "out" / "m.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x00")
    with pytest.raises(ValueError, match="changed after"):
        undo_edit(file, tmp_path / "out", tmp_path / "back")
    with pytest.raises(ValueError, match="undo needs"):
        undo_edit(file, tmp_path, tmp_path / "back")


def test_cast_is_asked_for_and_a_vanishing_edit_is_reported(model: Small, tmp_path: Path) -> None:
    rounded = {k: v.bfloat16() for k, v in model.state_dict().items()}
    space = ParameterSpace.from_module(model)
    theta = space.flatten(rounded, dtype=torch.float32)
    direction = torch.randn(space.size, generator=torch.Generator().manual_seed(2))

    def survival(size: float) -> float:
        edit = from_delta(weights_fingerprint(theta), size * direction / direction.norm(), "test")
        save_edit(tmp_path / "edit", edit, space)
        file = load_edit(tmp_path / "edit")
        with pytest.raises(ValueError, match="--cast"):
            edited_tensors(file, rounded, 1.0, cast=False)
        changed, kept = edited_tensors(file, rounded, 1.0, cast=True)
        assert all(value.dtype == torch.bfloat16 for value in changed.values())
        planned = size * direction / direction.norm()
        actual = space.flatten({**rounded, **changed}, dtype=torch.float32) - theta
        assert kept.share == pytest.approx(float(actual @ planned) / float(planned @ planned), rel=1e-3)
        return kept.share

    assert survival(3.0) > 0.99
    assert survival(1e-3) < 0.99


def test_dose_zero_changes_nothing_and_half_is_half(model: Small, tmp_path: Path) -> None:
    edit, space = random_edit(model)
    save_edit(tmp_path / "edit", edit, space)
    file = load_edit(tmp_path / "edit")
    assert edited_tensors(file, model.state_dict(), 0.0, cast=False)[0] == {}
    changed, _ = edited_tensors(file, model.state_dict(), 0.5, cast=False)
    half = space.flatten({**model.state_dict(), **changed}) - space.read(model)
    torch.testing.assert_close(half, 0.5 * edit.delta(), atol=1e-6, rtol=0)


def test_low_rank_factors_have_the_eckart_young_error() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(matrix)
    best = float((values[2:].square().sum() / values.square().sum()).sqrt())
    for transposed in (False, True):
        found = factors(matrix, 2, transposed=transposed)
        assert found.down.shape == ((2, 8) if transposed else (2, 6))
        assert float((found.merged() - matrix).norm() / matrix.norm()) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("with_module", [False, True])
def test_lora_of_transposed_layers_merges_to_the_edit(with_module: bool, tmp_path: Path) -> None:
    """GPT-2 keeps its matrices as (in, out); PEFT's own merge is the oracle, square and oblong ones."""
    from peft import PeftModel

    model = tiny_gpt2()
    space = ParameterSpace.from_module(model)
    wanted = ("transformer.h.0.attn.c_proj.weight", "transformer.h.0.mlp.c_fc.weight")
    delta = torch.randn(space.size, generator=torch.Generator().manual_seed(4)) * space.mask(wanted)
    before = {name: part.clone() for name, part in space.unflatten(space.read(model)).items()}
    edit = from_delta("base", delta, "test")
    adapter = low_rank(edit, space, 3, model if with_module else None)
    assert {row.name for row in adapter.rows} == set(wanted)
    save_adapter(tmp_path / "a", adapter)
    merged = PeftModel.from_pretrained(model, tmp_path / "a").merge_and_unload()
    for row in adapter.rows:
        got = merged.get_parameter(row.name).detach() - before[row.name]
        planned = space.unflatten(delta)[row.name]
        assert float((got - planned).norm() / planned.norm()) == pytest.approx(row.error, abs=1e-5)
    assert max(row.error for row in low_rank(edit, space, 8).rows) < 1e-6


def test_which_layers_are_transposed_is_told_by_their_bias() -> None:
    gpt2 = ParameterSpace.from_module(tiny_gpt2())
    found = transposed_weights(gpt2)
    assert found == transposed_weights(gpt2, tiny_gpt2())
    assert {name.split(".")[-2] for name in found} == {"c_attn", "c_proj", "c_fc"}
    square = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 7))
    assert transposed_weights(ParameterSpace.from_module(square)) == frozenset()


def test_an_edit_that_moves_nothing_is_kept_applied_and_refused_as_adapter(
    model: Small, tmp_path: Path
) -> None:
    space = ParameterSpace.from_module(model)
    theta = space.read(model)
    edit = from_delta(weights_fingerprint(theta), torch.zeros(space.size), "nothing")
    save_edit(tmp_path / "zero", edit, space)
    file = load_edit(tmp_path / "zero")
    assert (file.edit.rank, file.edit.norm) == (0, 0.0)
    assert torch.equal(file.edit.apply(theta), theta)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    assert apply_edit(file, tmp_path / "m.safetensors", tmp_path / "out").survival.share == 1.0
    assert (tmp_path / "out" / "m.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    moving, _ = random_edit(model)
    for still in (file.edit, moving.scaled(0.0)):
        with pytest.raises(ValueError, match="moves none"):
            low_rank(still, space, 4)


def test_an_edit_that_is_not_finite_is_refused(model: Small, tmp_path: Path) -> None:
    edit, space = random_edit(model)
    for broken in (
        replace(edit, rows=edit.rows.clone().fill_(float("nan"))),
        replace(edit, coordinates=torch.tensor([1.0, float("inf"), 0.0], dtype=torch.float64)),
    ):
        with pytest.raises(ValueError, match="finite"):
            save_edit(tmp_path / "broken", broken, space)
    assert not list(tmp_path.iterdir())


def test_lora_adapter_reproduces_a_low_rank_edit(model: Small, tmp_path: Path) -> None:
    space = ParameterSpace.from_module(model)
    moved = {name: torch.zeros(shape) for name, shape in zip(space.names, space.shapes, strict=True)}
    moved["inner.weight"] = torch.outer(torch.arange(5.0), torch.ones(6))
    moved["inner.bias"] = torch.ones(5)
    edit = from_delta(weights_fingerprint(space.read(model)), space.flatten(moved), "test")
    adapter = low_rank(edit, space, 4)
    save_adapter(tmp_path / "adapter", adapter)
    rows = {row.name: row for row in adapter.rows}
    assert rows["inner.weight"].error < 1e-6
    total = edit.norm**2
    assert rows["(other)"].share == pytest.approx(5 / total, rel=1e-6)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    up, down = (stored[f"base_model.model.inner.lora_{side}.weight"] for side in "BA")
    torch.testing.assert_close(up @ down, moved["inner.weight"], atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 1.0
    assert config["target_modules"] == ["inner"]


def test_the_verb_applies_undoes_and_warns(model: Small, tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(apply)
    edit, space = random_edit(model)
    save_edit(tmp_path / "edit", edit, space)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    runner = CliRunner()
    arguments = [str(tmp_path / "edit.json"), str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "o")]
    first = runner.invoke(app, [*arguments, "--lora", "2"])
    assert first.exit_code == 0, first.output
    assert "inner.weight" in first.output
    back = runner.invoke(
        app, [str(tmp_path / "edit"), str(tmp_path / "o"), "--out", str(tmp_path / "b"), "--undo"]
    )
    assert back.exit_code == 0, back.output
    assert (tmp_path / "b" / "m.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    # Nothing that apply added stays behind.
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("keys", [["model", "state_dict"], ["state_dict", "model"]])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_apply_changes_the_right_tensors_of_nested_and_wrapped_files(keys, prefix, model, tmp_path) -> None:
    edit, space = random_edit(model)
    save_edit(tmp_path / "edit", edit, space)
    state: dict = {prefix + name: value.clone() for name, value in model.state_dict().items()}
    for key in reversed(keys):
        state = {key: state, "epoch": 3}
    torch.save(state, tmp_path / "m.pt")
    applied = apply_edit(load_edit(tmp_path / "edit"), tmp_path / "m.pt", tmp_path / "out")
    assert (applied.tensors, applied.reader) == (len(space.names), "the reader of checkpoints")
    assert applied.norm == pytest.approx(edit.norm, rel=1e-5)
    written = torch.load(tmp_path / "out" / "m.pt", weights_only=True)
    assert written["epoch"] == 3
    for key in keys:
        written = written[key]
    assert list(written) == [prefix + name for name in model.state_dict()]
    found = space.flatten({name.removeprefix(prefix): value for name, value in written.items()})
    torch.testing.assert_close(found, edit.apply(space.read(model)))


def test_apply_finds_names_that_transformers_alone_translates(tmp_path: Path) -> None:
    """Pythia's files say embed_out where the model of today says lm_head; the oracle is the library."""
    from tiny_models import made, neox
    from transformers import AutoModelForCausalLM

    model = made(neox, 0)
    model.save_pretrained(tmp_path / "neox")
    path = tmp_path / "neox" / "model.safetensors"
    held = load_file(path)
    old = {name.replace("lm_head", "embed_out"): value for name, value in held.items()}
    save_file(old, path, metadata={"format": "pt"})
    edit, space = random_edit(model)
    save_edit(tmp_path / "edit", edit, space)
    applied = apply_edit(load_edit(tmp_path / "edit"), tmp_path / "neox", tmp_path / "out")
    assert applied.reader == "transformers"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(space.read(loaded), edit.apply(space.read(model)))
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(old)


def test_an_edit_that_vanishes_in_rounding_is_an_error_and_leaves_nothing(model, tmp_path: Path) -> None:
    space = ParameterSpace.from_module(model)
    rounded = {k: v.bfloat16() for k, v in model.state_dict().items()}
    theta = space.flatten(rounded, dtype=torch.float32)
    tiny = from_delta(weights_fingerprint(theta), 1e-7 * torch.ones(space.size) * theta.sign(), "test")
    save_edit(tmp_path / "edit", tiny, space)
    save_file(rounded, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="vanishes"):
        apply_edit(load_edit(tmp_path / "edit"), tmp_path / "m.safetensors", tmp_path / "out", cast=True)
    assert not (tmp_path / "out").exists()
