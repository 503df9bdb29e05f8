"""What the adjoint route needs of one call of a linear map: its record, and its share of a slope.

For y = W a + b with cotangents delta = d loss / d y, <V, d loss_{x,r} / d W> is
sum_l delta[x, r, l] . (V a[x, l]): one matrix product per weight and vector.

Directions may come in fewer bits than cotangents (bfloat16). The matrix products with them are then taken in
that type, where processors have units for it; sums over positions and layers stay in the cotangents' type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Kind = Literal["linear", "conv1d", "norm", "embedding"]

#: Bytes of a block of per-token gradients, or of inputs times vectors; it should stay in cache.
CACHE_BLOCK = 1 << 23
#: Rows (of ranks and sequences) of such a block at least: a matrix product of fewer is slow.
LEAST_ROWS = 64
#: Measured cost of forming and reading a per-token gradient entry, in multiples of a multiply-add; where the
#: products are in fewer bits they cost less and the forming does not.
FORMING_PENALTY, FORMING_PENALTY_IN_FEWER_BITS = 1.5, 6.0


@dataclass(frozen=True, eq=False)
class Contact:
    """One call of a watched module.

    Attributes:
        kind: which map it is.
        weight: canonical name of its weight, or None where it is not differentiated.
        bias: canonical name of its bias, or None.
        given: what goes in: (B, L, in), normalised for a norm, indices (B, L) for an embedding.
        result: its output, the tensor cotangents are taken of, leading axis B.
        number: which call it is, in their order.
        entry: what went in, in the graph of the losses.
    """

    kind: Kind
    weight: str | None
    bias: str | None
    given: Tensor
    result: Tensor
    number: int
    entry: Tensor


def kind_of(module: nn.Module) -> Kind | None:
    """Exact types only: a subclass may compute something else."""
    if type(module) is nn.Linear:
        return "linear"
    if type(module) is nn.LayerNorm and module.weight is not None and len(module.normalized_shape) == 1:
        return "norm"
    if type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq:
        return "embedding"
    if type(module).__name__ == "Conv1D" and getattr(module, "weight", torch.empty(0)).ndim == 2:
        return "conv1d"
    return None


def slotwise_head(
    contacts: Sequence[object], ranks: int, positions: int, number: int | None = None
) -> Contact | None:
    """The last map if by its shape it may be one of scored slots alone: its row r all that loss r depends on.

    Args:
        contacts: calls in their order.
        ranks: R, losses of a sequence.
        positions: slots of a sequence in all.
        number: the call that was confirmed before; None takes the last map.
    """
    maps = [c for c in contacts if isinstance(c, Contact) and c.kind in ("linear", "conv1d")]
    found = next((c for c in reversed(maps) if number is None or c.number == number), None)
    if found is None or not found.entry.requires_grad or found.result.ndim != 3 or found.entry.ndim != 3:
        return None
    rows = found.entry.shape[:2] == found.result.shape[:2] and found.entry.shape[1] == ranks
    return found if rows and 1 < ranks < positions else None


def rows_are_apart(losses: Float[Tensor, "B R"], head: Contact) -> bool:
    """Whether the first and the last loss of a sequence depend on their own row of a head alone, exactly."""
    for rank in (0, losses.shape[1] - 1):
        for part in torch.autograd.grad(
            losses[:, rank].sum(), [head.result, head.entry], retain_graph=True, materialize_grads=True
        ):
            if part.count_nonzero() != part[:, rank].count_nonzero():
                return False
    return True


@runtime_checkable
class Watched(Protocol):
    """A watched call of any kind."""

    @property
    def result(self) -> Tensor:
        """What it returned, leading axis B."""


def cotangents(
    losses: Float[Tensor, "B R"], contacts: Sequence[Watched], head: Contact | None = None
) -> list[Tensor]:
    """Per call (B, R, L, out), d loss / d result, one backward pass a rank; of the head (B, R, out).

    Args:
        losses: in the graph of the calls.
        contacts: the calls.
        head: the one whose row r is all that loss r depends on; one pass from the losses to it serves all.
    """
    head = head if losses.requires_grad else None
    ranks, results = losses.shape[1], [contact.result for contact in contacts if contact is not head]
    deltas = [
        r.new_empty(r.shape[0], ranks, r.numel() // r.shape[0] // r.shape[-1], r.shape[-1]) for r in results
    ]
    if results and not losses.requires_grad:  # no wanted call is used
        return [delta.zero_() for delta in deltas]
    with torch.enable_grad():
        total, picked = losses.sum(), losses.sum(0).unbind()
    own = entry = None
    if head is not None:
        own, entry = torch.autograd.grad(total, [head.result, head.entry], retain_graph=True)
    for rank in range(ranks if results else 0):
        begin, seed = picked[rank], None
        if head is not None and entry is not None:
            begin, seed = head.entry, torch.zeros_like(entry)
            seed[:, rank] = entry[:, rank]
        pulled = torch.autograd.grad(
            begin, results, seed, retain_graph=rank < ranks - 1, materialize_grads=True
        )
        for delta, part in zip(deltas, pulled, strict=True):
            delta[:, rank] = part.reshape(delta[:, rank].shape)
    if own is not None:
        deltas.insert(next(n for n, contact in enumerate(contacts) if contact is head), own)
    return deltas


def contact_shares(
    contact: Contact,
    delta: Float[Tensor, "B R L out"] | Float[Tensor, "B R out"],
    rows: Mapping[str, Sequence[Tensor]],
    skip: Sequence[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """The shares (B, R, K) of one call's weight and bias in <row, grad loss>.

    Args:
        contact: the call.
        delta: cotangents of its output; without positions where row r is all that loss r depends on.
        rows: canonical name -> tables (K_i, ...) of directions, K in all.
        skip: parameters treated elsewhere.
    """
    slotwise = delta.ndim == 3
    if contact.bias is not None and contact.bias not in skip:
        yield contact.bias, pointwise_share(delta if slotwise else delta.sum(2), rows[contact.bias])
    if contact.weight is None or contact.weight in skip:
        return
    given, vectors = contact.given, rows[contact.weight]
    if slotwise:
        yield contact.weight, slotwise_share(given, delta, vectors, transposed=contact.kind == "linear")
        return
    used = is_used(delta).any(0).any(0).nonzero()[:, 0]
    if len(used) < delta.shape[2]:
        given, delta = given[:, used], delta[:, :, used]
    if contact.kind == "norm":
        yield contact.weight, pointwise_share((delta * given[:, None]).sum(2), vectors)
    elif contact.kind == "embedding":
        yield contact.weight, embedding_share(given, delta, vectors)
    else:
        yield contact.weight, linear_share(given, delta, vectors, transposed=contact.kind == "linear")


def is_used(delta: Float[Tensor, "B R L out"]) -> Bool[Tensor, "B R L"]:
    """Whether a position has any cotangent that is not zero, exactly."""
    # Two passes without a table beside them: six times as fast as the largest absolute value.
    return (delta.amax(3) != 0) | (delta.amin(3) != 0)


def last_used(delta: Float[Tensor, "B R L out"]) -> list[int]:
    """Per rank the positions up to the last one that has a cotangent in any sequence; one at least.

    >>> last_used(torch.eye(3)[None, :, :, None])
    [1, 2, 3]
    """
    places = torch.arange(1, delta.shape[2] + 1, device=delta.device)
    ends: list[int] = (is_used(delta).any(0) * places).amax(1).clamp_min(1).cpu().tolist()
    return ends


def pointwise_share(gradients: Float[Tensor, "B R n"], vectors: Sequence[Tensor]) -> Float[Tensor, "B R K"]:
    """Per-token gradients times tables (K_i, ...) of n entries a row."""
    return torch.cat([gradients @ table.flatten(1).T.to(gradients) for table in vectors], 2)


def embedding_share(
    given: Int[Tensor, "B L"], delta: Float[Tensor, "B R L out"], vectors: Sequence[Tensor]
) -> Float[Tensor, "B R K"]:
    """sum_l delta[x, r, l] . V[given[x, l]], vector by vector of tables (K_i, words, out)."""
    batch, ranks = delta.shape[:2]
    flat = delta.reshape(batch, ranks, -1)
    each = (vector for table in vectors for vector in table)
    parts = [torch.bmm(flat, vector[given].reshape(batch, -1, 1).to(flat)) for vector in each]
    return torch.cat(parts, 2)


def slotwise_share(
    given: Float[Tensor, "B R in"],
    delta: Float[Tensor, "B R out"],
    vectors: Sequence[Tensor],
    *,
    transposed: bool,
) -> Float[Tensor, "B R K"]:
    """delta[x, r] . (given[x, r] V_k), vector by vector; otherwise as :func:`linear_share`."""
    flat, entries = delta.flatten(0, 1).to(vectors[0].dtype), given.flatten(0, 1)
    each = (vector if transposed else vector.T for table in vectors for vector in table)
    parts = [((flat @ vector).to(entries.dtype) * entries).sum(1) for vector in each]
    return torch.stack(parts, 1).view(*given.shape[:2], -1)


def linear_share(
    given: Float[Tensor, "B L in"],
    delta: Float[Tensor, "B R L out"],
    vectors: Sequence[Tensor],
    *,
    transposed: bool,
) -> Float[Tensor, "B R K"]:
    """sum_l delta[x, r, l] . (given[x, l] V_k), by the cheaper order of products.

    Args:
        given: inputs of the map.
        delta: cotangents of its outputs.
        vectors: tables (K_i, in, out), or (K_i, out, in) where ``transposed``, K rows in all; products are
            taken in their type.
        transposed: how the weight is laid out.
    """
    batch, ranks, length, width = delta.shape
    count, kind = sum(map(len, vectors)), vectors[0].dtype
    if length == 0:
        return delta.new_zeros(batch, ranks, count)
    penalty = FORMING_PENALTY if kind == delta.dtype else FORMING_PENALTY_IN_FEWER_BITS
    if penalty * ranks * (length + count) < count * length:
        pair = (delta, given[:, None]) if transposed else (given[:, None], delta)
        return _by_token_gradients(*pair, last_used(delta), vectors)
    block = max(1, CACHE_BLOCK // (batch * length * width * delta.element_size()))
    flat, parts = delta.reshape(batch, ranks, length * width), []
    given = given.to(kind)
    for some in (some for table in vectors for some in torch.split(table, block)):
        turned = some.mT if transposed else some
        pushed = torch.matmul(given.reshape(1, batch * length, -1), turned)
        pushed = pushed.view(len(some), batch, length * width).to(delta.dtype)
        parts.append(torch.bmm(flat, pushed.permute(1, 2, 0)))
    return torch.cat(parts, 2)


def _by_token_gradients(
    left: Float[Tensor, "B R1 L p"],
    right: Float[Tensor, "B R2 L q"],
    ends: Sequence[int],
    vectors: Sequence[Tensor],
) -> Float[Tensor, "B R K"]:
    """The same through the per-token gradients left' right, formed in blocks of sequences and weight rows.

    The layout is that of the weight, so that the vectors are never copied. Rank r is formed of its first
    ``ends[r]`` positions: of the later ones its cotangents are zero.
    """
    batch, ranks, (_, depth, width) = len(left), len(ends), vectors[0].shape
    kind, sums = vectors[0].dtype, left.dtype
    left, right = (side.to(kind).expand(-1, ranks, -1, -1) for side in (left, right))
    # Groups of equal size: a last one of a single sequence would cost as much as a whole one.
    many = -(-batch // max(1, batch * ranks // LEAST_ROWS))
    block = max(1, CACHE_BLOCK // (many * ranks * width * vectors[0].element_size()))
    # Blocks of equal size too, and never of one row: a product with one row is slow.
    block = -(-depth // -(-depth // max(block, 2)))
    room = left.new_empty(many * ranks * min(block, depth) * width)
    groups = [slice(first, min(batch, first + many)) for first in range(0, batch, many)]
    results = [
        [left.new_zeros(len(table), ranks * (some.stop - some.start), dtype=sums) for table in vectors]
        for some in groups
    ]
    for row in range(0, depth, block):
        rows = slice(row, min(depth, row + block))
        for some, own in zip(groups, results, strict=True):
            shape = (ranks, some.stop - some.start, rows.stop - row, width)
            formed = room[: math.prod(shape)].view(shape)
            for rank, end in enumerate(ends):
                entries = left[some, rank, :end, rows].mT
                torch.bmm(entries, right[some, rank, :end], out=formed[rank])
            gradients = formed.view(ranks * shape[1], -1).T
            for result, table in zip(own, vectors, strict=True):
                directions = table[:, rows].flatten(1)
                if kind == sums:
                    result.addmm_(directions, gradients)
                else:
                    result += directions @ gradients
    # (K, R x sequences) of every group.
    return torch.cat([torch.cat(own).unflatten(1, (ranks, -1)).permute(2, 1, 0) for own in results])
