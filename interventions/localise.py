"""Where in the model an edit's effect sits: parameter masks.

The same edit is restricted to one tensor, head, MLP or layer. Restrictions of the edit to disjoint
masks add up exactly; their damages need not, and the difference is reported (additive check).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from interventions.causal.statistics import Bits
from interventions.damage import EvaluatedSplit
from interventions.edits import Edit
from polca_edit.parameters import ParameterSpace


@dataclass(frozen=True)
class Component:
    """A part of the parameters.

    Attributes:
        layer: block number, -1 outside the blocks.
        name: ``attention``, ``head 2``, ``mlp``, ``norm``, or a tensor's own name.
        mask: (N,) its coordinates.
    """

    layer: int
    name: str
    mask: Bool[Tensor, " N"]


def layer_of(name: str) -> int:
    """Block number in a dotted parameter name, -1 if there is none.

    >>> layer_of("blocks.2.attn.query.weight"), layer_of("embed.weight"), layer_of("h.0.mlp.c_fc.bias")
    (2, -1, 0)
    """
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found.group(1)) if found else -1


def kind_of(name: str) -> str:
    """Attention, MLP or norm of a block's parameter; elsewhere the first word of the name."""
    if layer_of(name) < 0:
        return name.split(".")[0]
    rest = name.split(f"{layer_of(name)}.", 1)[1]
    if re.search(r"attn|attention", rest):
        return "attention"
    if re.search(r"mlp|ffn|feed_forward", rest):
        return "mlp"
    return "norm" if re.search(r"ln|norm", rest) else rest.split(".")[0]


def components(space: ParameterSpace) -> list[Component]:
    """Disjoint parts that cover all parameters: one per layer and kind."""
    parts: dict[tuple[int, str], Tensor] = {}
    for name, (start, stop) in space.offsets.items():
        mask = parts.setdefault((layer_of(name), kind_of(name)), torch.zeros(space.size, dtype=torch.bool))
        mask[start:stop] = True
    return [Component(layer, kind, mask) for (layer, kind), mask in sorted(parts.items())]


def tensors(space: ParameterSpace) -> list[Component]:
    """One part per parameter tensor."""
    found = []
    for name, (start, stop) in space.offsets.items():
        mask = torch.zeros(space.size, dtype=torch.bool)
        mask[start:stop] = True
        found.append(Component(layer_of(name), name, mask))
    return found


@dataclass(frozen=True)
class HeadLayout:
    """How attention is cut into heads.

    Attributes:
        count: query heads.
        shared: key and value heads; fewer than ``count`` where queries share them.
    """

    count: int
    shared: int


def head_layout(module: nn.Module) -> HeadLayout:
    """The heads a model says it has, from its own config.

    Raises:
        ValueError: for a model whose config names no heads.
    """
    config = getattr(module, "config", None) or getattr(module, "cfg", None) or getattr(module, "shape", None)
    for name in ("num_attention_heads", "n_head", "n_heads", "heads"):
        count = getattr(config, name, None)
        if isinstance(count, int):
            shared = getattr(config, "num_key_value_heads", None) or getattr(
                config, "n_key_value_heads", None
            )
            return HeadLayout(count, shared or count)
    raise ValueError(
        "heads are read off the model's config, this one names none; pass HeadLayout(count, shared)"
    )


#: Output maps whose heads are columns (Linear, (out, in)); GPT-2's Conv1D keeps them as rows.
WRITES = re.compile(r"(?:attn|attention)\.(?:out|o_proj|out_proj|dense)\.weight$")
READS = re.compile(r"(?:query|q_proj|key|k_proj|value|v_proj)\.(?:weight|bias)$")
SHARED = re.compile(r"(?:key|k_proj|value|v_proj)\.(?:weight|bias)$")
#: Fused projections: NeoX keeps query, key and value of one head together, GPT-2 all queries first.
FUSED_BY_HEAD = re.compile(r"query_key_value\.(?:weight|bias)$")
FUSED_BY_KIND = re.compile(r"attn\.c_attn\.(?:weight|bias)$")
CONV_WRITES = re.compile(r"attn\.c_proj\.weight$")
OTHER_FUSED = re.compile(r"(?:qkv|qkv_proj|Wqkv|c_attn|query_key_value)\.(?:weight|bias)$")


def heads(space: ParameterSpace, layout: HeadLayout) -> list[Component]:
    """One part per attention head: its part of query, key and value and its part of the output map.

    Separate projections (query ... out, q_proj ... o_proj), NeoX's fused ``query_key_value`` and GPT-2's
    ``c_attn`` are known. Keys and values that several queries share belong to each of them. The output
    bias belongs to no head.

    Raises:
        ValueError: for projections that are not known, or sizes that the heads do not divide.
    """
    found: dict[tuple[int, int], Tensor] = {}
    roles: set[str] = set()
    for name, (start, stop), shape in zip(space.names, space.offsets.values(), space.shapes, strict=True):
        role = _role(name)
        if role is None:
            continue
        roles.add("write" if "write" in role else "read")
        for head in range(layout.count):
            part = torch.zeros(shape, dtype=torch.bool)
            _mark(part, role, head, layout, name)
            mask = found.setdefault((layer_of(name), head), torch.zeros(space.size, dtype=torch.bool))
            mask[start:stop] |= part.reshape(-1)
    if roles != {"read", "write"}:
        raise ValueError(
            "heads need query, key, value and output matrices of a known layout, found "
            f"{sorted(roles) or 'none'}; localise by layer and kind instead"
        )
    return [Component(layer, f"head {head}", mask) for (layer, head), mask in sorted(found.items())]


def _role(name: str) -> str | None:
    """How a parameter is cut into heads; None for one that is not.

    Raises:
        ValueError: for a fused projection of unknown order.
    """
    for role, pattern in (
        ("by head", FUSED_BY_HEAD),
        ("by kind", FUSED_BY_KIND),
        ("conv write", CONV_WRITES),
        ("write", WRITES),
        ("shared", SHARED),
        ("own", READS),
    ):
        if pattern.search(name):
            return role
    if OTHER_FUSED.search(name):
        raise ValueError(f"the order of heads in '{name}' is not known; localise by layer and kind instead")
    return None


def _mark(part: Tensor, role: str, head: int, layout: HeadLayout, name: str) -> None:
    """Set the entries of one head in one parameter."""
    if role == "by kind" and part.ndim == 2:
        part = part.T  # Conv1D keeps (in, out)
    if role == "write":
        part = part.T
    count = layout.shared if role == "shared" else layout.count
    pieces = 3 * layout.count if role == "by kind" else count
    if len(part) % pieces:
        raise ValueError(
            f"'{name}' has {len(part)} rows of heads, which {pieces} do not divide; is the head count right?"
        )
    width = len(part) // pieces
    if role == "by kind":
        for kind in range(3):
            first = (kind * layout.count + head) * width
            part[first : first + width] = True
        return
    own = head * layout.shared // layout.count if role == "shared" else head
    part[own * width : (own + 1) * width] = True


@dataclass(frozen=True)
class LocalEffect:
    """Damage of one part of an edit.

    Attributes:
        layer: see :class:`Component`.
        name: see :class:`Component`.
        norm: length of the edit's part, weight units.
        damage: target damage with only this part applied, nats.
        without: target damage with everything but this part, nats.
    """

    layer: int
    name: str
    norm: float
    damage: float
    without: float


@dataclass(frozen=True)
class LocalisationMap:
    """A layer x component map for one (vectors, cluster).

    Attributes:
        whole: target damage of the whole edit, nats.
        parts: effects of the parts.
        additive_gap: whole minus the sum of the parts' damages, nats (zero if effects add up).
        covered: share of the edit's squared norm that the parts hold (one for a partition).
    """

    whole: float
    parts: tuple[LocalEffect, ...]
    additive_gap: float
    covered: float

    def shares(self) -> dict[tuple[int, str], float]:
        """Part -> its damage over the sum of all parts' positive damages."""
        total = sum(max(p.damage, 0.0) for p in self.parts)
        return {(p.layer, p.name): (max(p.damage, 0.0) / total if total > 0 else 0.0) for p in self.parts}


def localise(split: EvaluatedSplit, edit: Edit, members: Bits, parts: Sequence[Component]) -> LocalisationMap:
    """Restrict an edit to each part in turn, and leave each part out in turn."""
    delta = edit.delta()
    whole = float(split.damage(edit).change.numpy()[members].mean())
    found, squares = [], 0.0
    for part in parts:
        own = edit.restricted(part.mask)
        squares += own.norm**2
        if own.norm == 0:
            found.append(LocalEffect(part.layer, part.name, 0.0, 0.0, whole))
            continue
        damage = float(split.damage(own).change.numpy()[members].mean())
        without = float(split.damage(edit.restricted(~part.mask)).change.numpy()[members].mean())
        found.append(LocalEffect(part.layer, part.name, own.norm, damage, without))
    total = float(delta.double().square().sum())
    gap = whole - sum(p.damage for p in found)
    return LocalisationMap(whole, tuple(found), gap, squares / total if total > 0 else 1.0)
