"""Models of Pythia's shapes, drawn and trained for a few steps on text made here; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.application import say
from experiments.config import RunConfig, load_config
from experiments.verbs.pipeline import open_overrides
from polca_edit.checkpoints.huggingface_models import load_causal_lm
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.tokens import TokenSet, next_token_loss

#: Width, layers, heads of the Pythia models; the vocabulary is 50,304 and the MLP four times as wide.
SHAPES = {
    "14m": (128, 6, 4),
    "31m": (256, 6, 8),
    "70m": (512, 6, 8),
    "160m": (768, 12, 12),
    "410m": (1024, 24, 16),
    "1b": (2048, 16, 8),
}
VOCABULARY, LENGTH = 50_304, 64
#: Where the checkpoints of a folder lie, apart from its runs and pieces.
SERIES = "series"
#: Tokens that the text uses, and how many of them have one follower, which they always have.
WORDS, LEADERS = 1000, 100


@dataclass(frozen=True)
class Amount:
    """How much of everything a run looks at.

    Attributes:
        name: in folders.
        checkpoints: T.
        steps_between: optimiser steps from one to the next.
        vectors: of the Hessian basis and of the trajectory basis, each.
        select: sequences of the select and of the evaluate split, ten scored tokens each.
        curvature: sequences of the curvature split, 64 tokens each.
        edits: partial undo edits of discovery.
        windows: equal pieces of training that its timeline undoes.
    """

    name: str = "full"
    checkpoints: int = 20
    steps_between: int = 5
    vectors: int = 12
    select: int = 100
    curvature: int = 96
    edits: int = 160
    windows: int = 10


#: How much a run looks at, by name.
AMOUNTS = {
    "full": Amount(),
    "small": Amount("small", vectors=3, select=16, curvature=16, edits=20),
    # Every stage and checkpoint, few vectors and tokens: which memory the weights alone ask for.
    "thin": Amount("thin", steps_between=1, vectors=3, select=4, curvature=4, edits=10, windows=3),
}


def neox_config(shape: str, **changed: int) -> Any:
    """The transformers config of a shape."""
    from transformers import GPTNeoXConfig

    width, layers, heads = SHAPES[shape]
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 128,
    }
    return GPTNeoXConfig(**settings | changed)


def sentences(count: int, length: int, draw: np.random.Generator) -> np.ndarray:
    """Token ids (count, length) by Zipf's law; a leader is followed by its follower, always."""
    weights = 1 / np.arange(1, WORDS)
    words = draw.choice(np.arange(1, WORDS), size=(count, length), p=weights / weights.sum())
    for place in range(1, length):
        led = words[:, place - 1] <= LEADERS
        words[:, place] = np.where(
            led & (words[:, place - 1] > 10), words[:, place - 1] + LEADERS, words[:, place]
        )
    return words.astype(np.int64)


def train(shape: str, folder: Path, amount: Amount) -> None:
    """Some AdamW steps on the made text, a checkpoint folder after every few; stopped, it starts anew."""
    from transformers import GPTNeoXForCausalLM

    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(neox_config(shape))
    draw = np.random.default_rng(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number in range(1, amount.checkpoints + 1):
        for _ in range(amount.steps_between if number > 1 else 0):
            next_token_loss(model, torch.from_numpy(sentences(8, 32, draw))).mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        step = (number - 1) * amount.steps_between
        model.save_pretrained(folder / SERIES / f"checkpoint-{step}")
        say(f"  trained to step {step}")
    write_text(folder)


def write_text(folder: Path, documents: int = 420) -> None:
    """``text.npy``: documents of 70 tokens, a 0 before each."""
    text = np.zeros((documents, 70), np.int64)
    text[:, 1:] = sentences(documents, 69, np.random.default_rng(2))
    np.save(folder / "text.npy", text.reshape(-1))


def draw_model(shape: str, folder: Path) -> None:
    """Two checkpoints without training: the drawn weights, and the same a little moved."""
    from transformers import GPTNeoXForCausalLM

    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(neox_config(shape))
    model.save_pretrained(folder / SERIES / "checkpoint-1")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    model.save_pretrained(folder / SERIES / "checkpoint-2")
    write_text(folder)


def outline(shape: str, folder: Path, amount: Amount) -> None:
    """Checkpoints whose headers are whole and whose numbers are zeros that take no disk, for a plan."""
    if not (folder / "text.npy").exists():
        steps = [number * amount.steps_between for number in range(amount.checkpoints)]
        write_outline(neox_config(shape), folder / SERIES, steps)
        write_text(folder)


def write_outline(config: Any, folder: Path, steps: Sequence[int]) -> None:
    """``checkpoint-STEP`` folders of a transformers config, whose weight files are a header and a hole."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    header, offset = {}, 0
    for name, parameter in model.named_parameters():
        end = offset + 4 * parameter.numel()
        header[name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    for step in steps:
        place = folder / f"checkpoint-{step}"
        place.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(place)
        with (place / "model.safetensors").open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)


def few_scored(sequences: int, scored: int) -> TokenSet:
    """Sequences of the made text with ``scored`` of their slots."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.from_numpy(sentences(sequences, LENGTH, np.random.default_rng(4)))
    chosen = torch.zeros(sequences, LENGTH - 1, dtype=torch.bool)
    for row in chosen:
        row[torch.randperm(LENGTH - 1, generator=draw)[:scored]] = True
    return TokenSet.from_ids(ids, scored=chosen)


def last_folder(folder: Path) -> Path:
    """The checkpoint with the largest step.

    Raises:
        ValueError: for a folder without checkpoints.
    """
    found = list((folder / SERIES).glob("checkpoint-*"))
    if not found:
        raise ValueError(
            f"'{folder}' must hold {SERIES}/checkpoint-STEP folders, it holds none; make them with "
            "python -m experiments.study.pythia --folder"
        )
    return max(found, key=lambda place: int(place.name.rpartition("-")[2]))


def series_of(folder: Path) -> tuple[torch.nn.Module, Checkpoints]:
    """The last model and the series."""
    model = load_causal_lm(last_folder(folder))
    return model, open_checkpoints(folder / SERIES, model, names="checkpoint-*")


def run_config(folder: Path, amount: Amount, memory_gb: float | None) -> RunConfig:
    """The settings of a whole run on the folder, from the preset ``huggingface``."""
    overrides = open_overrides(folder / SERIES, str(folder / "text.npy"), names="checkpoint-*")
    overrides |= {
        "text.select_sequences": amount.select,
        "text.evaluate_sequences": amount.select,
        "text.curvature_sequences": amount.curvature,
        "text.scored_per_sequence": 10,
        "text.n_ctx": LENGTH,
        "text.separator": 0,
        "text.max_documents": None,
        "discover.edits": amount.edits,
        "discover.windows": amount.windows,
        "damage.doses": [0.5],
        "damage.random_draws": 1,
        "memory_gb": memory_gb,
    }
    overrides["bases"] = [{"kind": kind, "vectors": amount.vectors} for kind in ("hessian", "trajectory")]
    return load_config("huggingface", overrides)


def counted(folder: Path) -> int:
    """N, from the header of the last checkpoint."""
    with (last_folder(folder) / "model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(int(np.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__")
