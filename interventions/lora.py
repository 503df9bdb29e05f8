"""Low-rank form of an edit: LoRA factors per weight matrix as PEFT merges them, with what they leave out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interventions.edits import Edit, from_delta
from polca_edit.parameters import ParameterSpace

#: Parts of the names of embedding tables, which PEFT keeps elsewhere; beginnings of output matrices' names.
TABLES, OUTPUTS = ("embed", "wte", "wpe"), ("unembed", "lm_head", "embed_out")


@dataclass(frozen=True)
class LowRank:
    """One matrix's part of an adapter.

    Attributes:
        name: parameter; ``(other)`` for everything an adapter cannot hold.
        rank: used.
        error: |merged product - edit of this parameter| / |edit of this parameter|, Frobenius.
        share: of the whole edit's squared norm that this parameter takes.
    """

    name: str
    rank: int
    error: float
    share: float


@dataclass(frozen=True)
class Factors:
    """Best low-rank product of one weight's edit, in the layout that PEFT stores and merges.

    Attributes:
        down: (r, in) ``lora_A``.
        up: (out, r) ``lora_B``.
        transposed: whether the layer keeps its weight as (in, out), so that PEFT adds (B A)'.
    """

    down: Float[Tensor, "r i"]
    up: Float[Tensor, "o r"]
    transposed: bool = False

    def merged(self) -> Float[Tensor, "..."]:
        """What merging the adapter adds to the weight, in the weight's own layout."""
        product = self.up @ self.down
        return product.T if self.transposed else product


def factors(matrix: Float[Tensor, "a b"], rank: int, *, transposed: bool = False) -> Factors:
    """Best factors of at most a rank for the edit of one weight (Eckart-Young).

    >>> factors(torch.ones(3, 2), 1).merged().shape
    torch.Size([3, 2])
    >>> factors(torch.ones(3, 2), 1, transposed=True).down.shape
    torch.Size([1, 3])
    """
    layout = matrix.T if transposed else matrix
    left, values, right = torch.linalg.svd(layout.double(), full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    return Factors(down.to(matrix).contiguous(), up.to(matrix).contiguous(), transposed)


def transposed_weights(space: ParameterSpace, module: nn.Module | None = None) -> frozenset[str]:
    """Weights kept as (in, out), as GPT-2's ``Conv1D`` keeps them.

    With the module at hand its layers decide. Without it the bias does, which has one entry per output; a
    square matrix follows the other matrices with the same last name (``c_proj``).

    Args:
        space: names and shapes.
        module: the model, if there is one.
    """
    if module is not None:
        layers = {name for name, layer in module.named_modules() if type(layer).__name__ == "Conv1D"}
        return frozenset(n for n in space.names if n.removesuffix(".weight") in layers)
    shapes = dict(zip(space.names, space.shapes, strict=True))
    told: set[str] = set()
    square: set[str] = set()
    for name, shape in shapes.items():
        bias = shapes.get(f"{name.removesuffix('.weight')}.bias")
        if len(shape) != 2 or bias is None or bias != (shape[1],):
            continue
        (square if shape[0] == shape[1] else told).add(name)
    alike = {_owner(name) for name in told}
    return frozenset(told | {name for name in square if _owner(name) in alike})


def _owner(name: str) -> str:
    """Last name of the module that holds a parameter, empty for the root's own."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _adaptable(name: str, part: Tensor) -> bool:
    if part.ndim != 2 or not name.endswith(".weight"):
        return False
    return name.startswith(OUTPUTS) or not any(word in _owner(name) for word in TABLES)


@dataclass(frozen=True)
class Adapter:
    """An edit as a PEFT LoRA adapter.

    Attributes:
        rank: asked for; scaling is 1 for every matrix.
        tensors: PEFT's name -> ``lora_A`` and ``lora_B``.
        rows: what each adapted matrix keeps, and ``(other)`` for what no adapter holds.
        transposed: whether some layers keep their weight as (in, out).
    """

    rank: int
    tensors: Mapping[str, Tensor]
    rows: tuple[LowRank, ...]
    transposed: bool

    def config(self) -> dict[str, object]:
        """What PEFT reads beside the tensors."""
        adapted = [row for row in self.rows if row.rank]
        lower = {row.name.removesuffix(".weight"): row.rank for row in adapted if row.rank < self.rank}
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.rank,
            "target_modules": [row.name.removesuffix(".weight") for row in adapted],
            "rank_pattern": lower,
            "alpha_pattern": lower,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "fan_in_fan_out": self.transposed,
            "task_type": None,
        }


def low_rank(edit: Edit, space: ParameterSpace, rank: int, module: nn.Module | None = None) -> Adapter:
    """The best adapter of a rank for an edit, and what each part loses.

    Only weights of linear maps named ``*.weight`` with two axes can be adapted. Embedding tables
    have two axes as well and PEFT keeps theirs elsewhere: names with ``embed``, ``wte`` or ``wpe``
    are left out and counted under ``(other)`` with biases and norms.

    Args:
        edit: the movement.
        space: its parameters.
        rank: largest rank of a matrix.
        module: the model, to tell which layers keep their weight as (in, out); see
            :func:`transposed_weights`.

    Raises:
        ValueError: for an edit that moves no matrix an adapter could hold.
    """
    moved = space.unflatten(edit.delta())
    total = sum(float(part.double().square().sum()) for part in moved.values())
    flipped = transposed_weights(space, module)
    tensors: dict[str, Tensor] = {}
    rows: list[LowRank] = []
    left_out = 0.0
    for name, part in moved.items():
        size = float(part.double().square().sum())
        if size == 0.0:
            continue
        if not _adaptable(name, part):
            left_out += size
            continue
        found = factors(part, rank, transposed=name in flipped)
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = found.down, found.up
        error = float((found.merged().double() - part.double()).norm()) / size**0.5
        rows.append(LowRank(name, found.down.shape[0], error, size / total))
    if not rows:
        raise ValueError(
            "an adapter needs an edit that moves a weight matrix of a linear layer, this one "
            f"({edit.operator}, dose {edit.dose:g}) moves none; apply it without --lora"
        )
    if left_out:
        rows.append(LowRank("(other)", 0, 1.0, left_out / total))
    return Adapter(rank, tensors, tuple(rows), bool(flipped))


def adapter_edit(
    adapter: Adapter, edit: Edit, space: ParameterSpace, module: nn.Module | None = None
) -> Edit:
    """The movement that merging an adapter makes, as an edit of the same weights: what of an edit it holds.

    Args:
        adapter: of the edit.
        edit: it was made from.
        space: its parameters.
        module: the model, to tell which layers keep their weight as (in, out).
    """
    flipped = transposed_weights(space, module)
    parts = []
    for name, shape in zip(space.names, space.shapes, strict=True):
        key = f"base_model.model.{name.removesuffix('.weight')}"
        down, up = adapter.tensors.get(f"{key}.lora_A.weight"), adapter.tensors.get(f"{key}.lora_B.weight")
        if down is None or up is None:
            parts.append(torch.zeros(shape, dtype=edit.rows.dtype).flatten())
        else:
            parts.append(Factors(down, up, name in flipped).merged().flatten())
    return from_delta(
        edit.base,
        torch.cat(parts),
        f"{edit.operator}|adapter",
        provenance={"rank": adapter.rank, **edit.provenance},
    )
