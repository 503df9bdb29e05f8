"""Token sets in batches of equal shape, and whether a loss is asked for the scored slots alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polca_edit.derivatives.heads import at_slots, takes_slots
from polca_edit.derivatives.settled import require_slots
from polca_edit.tokens import TokenLossFunction, TokenSet, scored_slots


@dataclass(frozen=True)
class Batch:
    """Sequences of one batch, padded to the size of the others.

    Attributes:
        given: what the loss takes: inputs (B, ...), and slots (B, R) where only those are computed.
        kept: (B, P) or (B, R), which of its losses are scored tokens, in token order.
        rows: sequences of the token set, without the padding.
    """

    given: tuple[Tensor, ...]
    kept: Bool[Tensor, "B R"]
    rows: Tensor


class LossAtSlots:
    """A token loss called for all slots or for the scored ones, whichever is less, with one check.

    Attributes:
        token_loss: the loss.
        note: why the scored slots alone are not used, empty where they may be.
    """

    def __init__(self, token_loss: TokenLossFunction) -> None:
        self.token_loss = token_loss
        self.note = "" if takes_slots(token_loss) else "the loss has no parameter 'slots'"
        self._checked = False

    def __call__(self, module: nn.Module, *given: Tensor) -> Tensor:
        """(B, P) losses of (inputs,), (B, R) of (inputs, slots)."""
        found = self.token_loss(module, *given)
        return require_slots(found, given[0])

    def few(self, module: nn.Module, tokens: TokenSet, place: Callable[[Tensor], Tensor]) -> bool:
        """Whether the scored slots alone are asked for: they are fewer, and the loss gives the same for them.

        The first call compares both ways on two sequences at the module's own weights.
        """
        most = int(tokens.scored.sum(1).max())
        if self.note or most >= tokens.scored.shape[1]:
            return False
        if not self._checked:
            self._checked = True
            inputs, (slots, _) = place(tokens.inputs[:2]), scored_slots(tokens.scored[:2])
            with torch.no_grad():
                whole = self.token_loss(module, inputs).gather(1, place(slots))
                part = at_slots(self.token_loss)(module, inputs, place(slots))
            apart = float((whole - part).abs().max()) if whole.shape == part.shape else float("inf")
            if not apart <= 1e-5 * float(whole.abs().max().clamp_min(1.0)):
                self.note = f"losses of the scored slots alone differ by {apart:.3g} nats"
        return not self.note

    def batches(
        self, module: nn.Module, tokens: TokenSet, most: int, place: Callable[[Tensor], Tensor]
    ) -> list[Batch]:
        """Batches of equal shapes, the last one padded with unscored repeats: one trace serves all."""
        size = min(most, tokens.sequences)
        few = self.few(module, tokens, place)
        slots, valid = scored_slots(tokens.scored) if few else (None, tokens.scored)
        found = []
        for rows in tokens.batches(size):
            padded = torch.cat([rows, rows[:1].expand(size - len(rows))])
            kept = valid[padded].clone()
            kept[len(rows) :] = False
            given = [tokens.inputs[padded], *([] if slots is None else [slots[padded]])]
            found.append(Batch(tuple(place(tensor) for tensor in given), place(kept), rows))
        return found


def slot_weights(
    batches: list[Batch], weights: Float[Tensor, " M"], place: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Per batch the weight of each slot's loss, zero where nothing is scored."""
    result, first = [], 0
    for batch in batches:
        count = int(batch.kept.sum())
        full = place(torch.zeros(batch.kept.shape, dtype=weights.dtype))
        full[batch.kept] = place(weights[first : first + count])
        result.append(full)
        first += count
    return result
