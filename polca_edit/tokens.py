"""Token sets: sequences, documents, scored positions, skills and splits.

Any loss here is per token and in nats; reductions carry (sum, count).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polca_edit.derivatives.heads import cross_entropy, gathered_before_head

#: ``token_loss(module, inputs)`` -> losses (B, P) in nats, one per prediction slot of a sequence. One with a
#: third parameter ``slots`` (B, R) is asked for those slots alone, -> (B, R), where few are scored.
TokenLossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class TokenSet:
    """Sequences with the tokens in them that are scored.

    Token order is row-major over (sequence, slot) where ``scored`` is true; every (M,) array in
    the project follows it.

    Attributes:
        inputs: (S, ...) what the token-loss function takes, one row per sequence.
        scored: (S, P) which prediction slots count.
        documents: (S,) document id of each sequence; splits never cut a document.
        skills: skill name -> (M,) booleans, empty where unknown.
        outputs: (S, P) the token id predicted at each slot, -1 where it has no meaning.
        features: name -> (M,) input features from which membership rules may be learnt; never a loss.
        contexts: per scored token a short text, or empty.
    """

    inputs: Tensor
    scored: Bool[Tensor, "S P"]
    documents: Int[Tensor, " S"]
    skills: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Int[Tensor, "S P"] | None = None
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    contexts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.inputs.shape[0] != self.scored.shape[0] or self.inputs.shape[0] != self.documents.shape[0]:
            raise ValueError(
                "inputs, scored and documents must have one row per sequence, got "
                f"{self.inputs.shape[0]}, {self.scored.shape[0]} and {self.documents.shape[0]}"
            )
        if self.count == 0:
            raise ValueError("a token set must score at least one token, got none; is the text empty?")
        for name, labels in self.skills.items():
            if labels.dtype != torch.bool or labels.shape != (self.count,):
                raise ValueError(
                    f"skill '{name}' needs {self.count} booleans, one per scored token, got "
                    f"{tuple(labels.shape)} of {labels.dtype}; compare the labels (labels == value)"
                )
        for name, values in self.features.items():
            if len(values) != self.count:
                raise ValueError(f"feature '{name}' needs {self.count} values, got {len(values)}")
        if self.contexts and len(self.contexts) != self.count:
            raise ValueError(f"contexts must have {self.count} entries, got {len(self.contexts)}")

    @classmethod
    def from_ids(
        cls,
        ids: Tensor,
        *,
        documents: Int[Tensor, " S"] | None = None,
        scored: Tensor | None = None,
        skills: Mapping[str, Tensor] | None = None,
        padding: int | None = None,
    ) -> TokenSet:
        """Next-token prediction on rows of token ids: slot p predicts token p + 1.

        >>> tokens = TokenSet.from_ids(torch.tensor([[7, 8, 9], [1, 2, 3]]))
        >>> tokens.count, tokens.output_of.tolist(), tokens.features["previous token"].tolist()
        (4, [8, 9, 2, 3], ['7', '8', '1', '2'])

        Args:
            ids: (S, L) token ids.
            documents: (S,) document of each row; default one document a row.
            scored: (S, L-1) which predictions count; default all.
            skills: name -> (M,) labels of the scored tokens.
            padding: id that fills rows up at their end, where neither it nor a negative id (-100) is scored.

        Returns:
            the set, with the features ``token`` and ``previous token`` (ids as text: they have no
            order) and ``position`` (slot).

        Raises:
            ValueError: for rows that hold no next token, or arrays of the wrong length.
        """
        if ids.ndim != 2 or ids.shape[1] < 2 or ids.is_floating_point():
            raise ValueError(
                f"ids must be whole numbers (S, L) with L at least 2, got {tuple(ids.shape)} of {ids.dtype}; "
                "give one row per sequence"
            )
        ids = ids.cpu().long()
        ids, filled = _without_padding(ids, padding)
        if scored is None:
            scored = torch.ones(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
        if scored.shape != ids[:, 1:].shape:
            raise ValueError(
                f"scored must be (S, L-1) = {tuple(ids[:, 1:].shape)}, got {tuple(scored.shape)}; "
                "slot p predicts token p + 1"
            )
        scored = scored & ~filled[:, 1:]
        position = scored.nonzero()[:, 1]
        features = {
            "token": ids[:, 1:][scored].numpy().astype(str),
            "previous token": ids[:, :-1][scored].numpy().astype(str),
            "position": position.numpy(),
        }
        return cls(
            ids,
            scored,
            torch.arange(len(ids)) if documents is None else documents,
            dict(skills or {}),
            ids[:, 1:].clone(),
            features,
        )

    @property
    def count(self) -> int:
        """M, the number of scored tokens."""
        return int(self.scored.sum())

    @property
    def sequences(self) -> int:
        """S, the number of sequences."""
        return self.inputs.shape[0]

    @property
    def sequence_of(self) -> Int[Tensor, " M"]:
        """Sequence index of each scored token."""
        return self.scored.nonzero()[:, 0]

    @property
    def position_of(self) -> Int[Tensor, " M"]:
        """Prediction slot of each scored token."""
        return self.scored.nonzero()[:, 1]

    @property
    def output_of(self) -> Int[Tensor, " M"]:
        """Predicted token id of each scored token (-1 where unknown)."""
        if self.outputs is None:
            return torch.full((self.count,), -1)
        return self.outputs[self.scored]

    def of_first_documents(self, count: int) -> Bool[Tensor, " M"]:
        """Scored tokens of the first ``count`` documents, by number; all where there are no more."""
        documents = self.documents[self.sequence_of]
        return torch.isin(documents, documents.unique()[:count])

    def fingerprint(self) -> str:
        """SHA-256 of inputs, scored slots and documents."""
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.scored, self.documents):
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
        return digest.hexdigest()

    def select(self, rows: Tensor) -> TokenSet:
        """The sub-set of sequences ``rows`` (indices or mask, (S,)), tokens in the same order."""
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        inverse = torch.full((self.sequences,), -1)
        inverse[rows] = torch.arange(len(rows))
        order = inverse[self.sequence_of]
        tokens = (order >= 0).nonzero()[:, 0]
        tokens = tokens[torch.argsort(order[tokens], stable=True)]
        return replace(
            self,
            inputs=self.inputs[rows],
            scored=self.scored[rows],
            documents=self.documents[rows],
            skills={name: labels[tokens] for name, labels in self.skills.items()},
            outputs=None if self.outputs is None else self.outputs[rows],
            features={name: values[tokens.numpy()] for name, values in self.features.items()},
            contexts=tuple(self.contexts[i] for i in tokens.tolist()) if self.contexts else (),
        )

    def batches(self, batch_size: int) -> list[Tensor]:
        """Consecutive row indices, at most ``batch_size`` sequences each (the last may be shorter)."""
        return list(torch.arange(self.sequences).split(batch_size))


def _without_padding(ids: Int[Tensor, "S L"], padding: int | None) -> tuple[Tensor, Tensor]:
    """(ids that an embedding takes, which of them only fill a row up at its end)."""
    filled = (ids < 0) if padding is None else (ids < 0) | (ids == padding)
    filled = filled.flip(1).cumprod(1).flip(1).bool()
    if bool((ids[~filled] < 0).any()):
        raise ValueError(
            f"ids below zero must stand at the end of rows, got {int(ids[~filled].min())} before a token; "
            "give the inputs, not the labels"
        )
    return ids.masked_fill(ids < 0, 0), filled


@dataclass(frozen=True)
class Splits:
    """The three disjoint token sets of a run (causal-protocol: H, S and E)."""

    curvature: TokenSet
    select: TokenSet
    evaluate: TokenSet


def split_by_document(
    tokens: TokenSet, shares: tuple[float, float, float], generator: torch.Generator
) -> Splits:
    """Deal whole documents into curvature, select and evaluate.

    Args:
        tokens: everything.
        shares: share of documents of each split, in that order; they are normalised.
        generator: decides which document goes where.

    Raises:
        ValueError: with fewer than three documents.
    """
    names = tokens.documents.unique()
    if len(names) < 3:
        raise ValueError(f"three disjoint splits need at least 3 documents, got {len(names)}; add documents")
    order = names[torch.randperm(len(names), generator=generator)]
    total = sum(shares)
    first = min(max(1, round(len(names) * shares[0] / total)), len(names) - 2)
    second = min(max(1, round(len(names) * shares[1] / total)), len(names) - first - 1)
    groups = (order[:first], order[first : first + second], order[first + second :])
    return Splits(*(tokens.select(torch.isin(tokens.documents, group)) for group in groups))


def group_means(
    values: Float[Tensor, " M"], groups: Mapping[str, Bool[Tensor, " M"]]
) -> dict[str, tuple[float, int]]:
    """(sum, count) of a per-token quantity for each group of tokens."""
    return {name: (float(values[mask].double().sum()), int(mask.sum())) for name, mask in groups.items()}


def next_token_loss(
    module: nn.Module, inputs: Int[Tensor, "B L"], slots: Int[Tensor, "B R"] | None = None
) -> Float[Tensor, "B P"]:
    """Cross-entropy of each next token, in nats, for a module whose output is logits (B, L, V).

    A Hugging Face output object with a ``logits`` field is accepted too.

    Args:
        module: the model.
        inputs: (B, L) token ids.
        slots: (B, R) the slots that are wanted, all L-1 by default. Hidden states are gathered before the
            output layer, so that only their logits are computed (:mod:`polca_edit.derivatives.heads`).
    """
    if slots is None:
        output = module(inputs)
        logits = output.logits if hasattr(output, "logits") else output
        return cross_entropy(logits[:, :-1], inputs[:, 1:])
    with gathered_before_head(module, slots) as head:
        output = module(inputs)
    logits = output.logits if hasattr(output, "logits") else output
    if head.calls != 1 or logits.shape[:2] != slots.shape:
        if head.calls:  # an output layer of another kind: all positions, then the wanted ones
            return next_token_loss(module, inputs).gather(1, slots)
        logits = logits.gather(1, slots[:, :, None].expand(-1, -1, logits.shape[2]))
    return cross_entropy(logits, inputs[:, 1:].gather(1, slots))


def scored_slots(scored: Bool[Tensor, "S P"]) -> tuple[Int[Tensor, "S R"], Bool[Tensor, "S R"]]:
    """(the r-th scored slot of every sequence, whether it has that many).

    R is the largest number in one sequence; sequences with fewer repeat a slot that is not scored.

    >>> slots, valid = scored_slots(torch.tensor([[False, True, True], [True, False, False]]))
    >>> slots.tolist(), valid.tolist()
    ([[1, 2], [0, 1]], [[True, True], [True, False]])
    """
    counts = scored.sum(1)
    ranks = int(counts.max())
    slots = torch.argsort(scored.to(torch.int8), dim=1, descending=True, stable=True)[:, :ranks]
    return slots, torch.arange(ranks, device=scored.device) < counts[:, None]
