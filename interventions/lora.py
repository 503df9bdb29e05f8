"""Low-rank export of an edit: a PEFT LoRA adapter per weight matrix, with what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.edit_files import EditFile
from polca_edit.checkpoints.files import write_json, write_tensors


@dataclass(frozen=True)
class LowRank:
    """One matrix's part of an adapter.

    Attributes:
        name: parameter; ``(other)`` for everything an adapter cannot hold.
        rank: used.
        error: |left out| / |edit of this parameter|, Frobenius.
        share: of the whole edit's squared norm that this parameter takes.
    """

    name: str
    rank: int
    error: float
    share: float


def factors(
    matrix: Float[Tensor, "o i"], rank: int
) -> tuple[Float[Tensor, "o r"], Float[Tensor, "r i"], float]:
    """Best rank-r factors B A of a matrix (Eckart-Young) and their relative Frobenius error."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    total = float(values.square().sum())
    error = (float(values[rank:].square().sum()) / total) ** 0.5 if total else 0.0
    return (left[:, :rank] * root).to(matrix), (root[:, None] * right[:rank]).to(matrix), error


def export_lora(file: EditFile, folder: Path, rank: int, *, dose: float = 1.0) -> list[LowRank]:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``; returns what each part loses.

    Only weights of linear maps named ``*.weight`` with two axes can be adapted. Embedding tables
    have two axes as well and PEFT keeps theirs elsewhere: names with ``embed``, ``wte`` or ``wpe``
    are left out and counted under ``(other)`` with biases and norms.
    """
    moved = file.space.unflatten(file.edit.scaled(dose).delta())
    total = sum(float(part.double().square().sum()) for part in moved.values())
    tensors: dict[str, Tensor] = {}
    rows: list[LowRank] = []
    modules: list[str] = []
    left_out = 0.0
    for name, part in moved.items():
        size = float(part.double().square().sum())
        table = (
            any(word in name.rsplit(".", 2)[-2] for word in ("embed", "wte", "wpe")) if "." in name else False
        )
        output = name.startswith(("unembed", "lm_head", "embed_out"))
        if part.ndim != 2 or not name.endswith(".weight") or (table and not output):
            left_out += size
            continue
        if size == 0.0:
            continue
        module = name.removesuffix(".weight")
        up, down, error = factors(part, rank)
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
        modules.append(module)
        rows.append(LowRank(name, down.shape[0], error, size / total if total else 0.0))
    if left_out:
        rows.append(LowRank("(other)", 0, 1.0, left_out / total))
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": modules,
            "rank_pattern": {
                row.name.removesuffix(".weight"): row.rank for row in rows if 0 < row.rank < rank
            },
            "alpha_pattern": {
                row.name.removesuffix(".weight"): row.rank for row in rows if 0 < row.rank < rank
            },
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "fan_in_fan_out": False,
            "task_type": None,
        },
    )
    return rows
