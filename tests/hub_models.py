"""Tiny Hugging Face models with a tokenizer, written in the layouts that people have on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polca_edit.text.documents import train_tokenizer
from polca_edit.tokens import next_token_loss

NOUNS = ["tree", "river", "engine", "cloud", "market", "teacher", "bridge", "song", "window", "planet"]
VERBS = ["moves", "holds", "finds", "leaves", "turns", "paints", "breaks", "keeps", "builds", "forgets"]


def story(number: int, length: int = 40) -> str:
    """Sentences of one pattern, so that a tiny model learns something in a few steps."""
    draw = np.random.default_rng(number)
    return " ".join(
        f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} a {draw.choice(NOUNS)} {draw.integers(100)}."
        for _ in range(length)
    )


def write_text(path: Path, count: int = 40) -> Path:
    """A JSON-lines file of stories."""
    path.write_text("".join(json.dumps({"id": i, "text": story(i)}) + "\n" for i in range(count)))
    return path


def train_and_save(
    model: Any, folders: dict[int, Path], *, vocabulary: int = 300, batch: int = 4, length: int = 16
) -> None:
    """Train on stories with Adam and save the model (and its tokenizer) after the given steps."""
    tokenizer = train_tokenizer([story(i) for i in range(40)], vocabulary)
    stream = torch.tensor(tokenizer.encode(" ".join(story(i) for i in range(100, 140))).ids)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    draw = torch.Generator().manual_seed(0)
    for step in range(max(folders) + 1):
        if step in folders:
            model.save_pretrained(folders[step])
            tokenizer.save(str(folders[step] / "tokenizer.json"))
        starts = torch.randint(0, len(stream) - length, (batch,), generator=draw)
        loss = next_token_loss(model, stream[starts[:, None] + torch.arange(length)]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def revisions(root: Path, names: Sequence[str], step_of: Callable[[str], int]) -> dict[int, Path]:
    """Step -> folder for names such as ``step1000`` or ``checkpoint-20``."""
    return {step_of(name): root / name for name in names}
