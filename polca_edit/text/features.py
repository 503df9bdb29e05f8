"""What can be said about a token of text without any model or loss: input features and contexts.

Ordinal features are integer arrays; categorical ones are string arrays, so that a rule learner can
tell them apart by dtype. "The token" is the predicted one (slot p predicts token p + 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from torch import Tensor

from polca_edit.tokens import TokenSet

#: Shapes of a token's text.
SHAPES = (
    "lower",
    "Capital",
    "UPPER",
    "digits",
    "punctuation",
    "newline",
    "space",
    "piece",
    "mixed",
    "special",
)


def shape_of(text: str) -> str:
    r"""The shape of a token's text.

    A token without a leading space that consists of letters continues a word or follows
    punctuation: a ``piece``.

    >>> [shape_of(t) for t in (" the", "ing", " Paris", " USA", " 1984", ",", "\n", "<|endoftext|>")]
    ['lower', 'piece', 'Capital', 'UPPER', 'digits', 'punctuation', 'newline', 'special']
    """
    core = text.strip()
    if text.startswith("<|") and text.endswith("|>"):
        return "special"
    if not core:
        return "newline" if "\n" in text else "space"
    if core.isdigit():
        return "digits"
    if core.isalpha():
        if core.isupper() and len(core) > 1:
            return "UPPER"
        if core[0].isupper():
            return "Capital"
        return "lower" if text[0].isspace() else "piece"
    return "mixed" if any(c.isalnum() for c in core) else "punctuation"


def frequency_bands(counts: np.ndarray) -> np.ndarray:
    """(V,) band of each id by rank: 0 for the most frequent, 1 for ranks 1-2, 2 for 3-6, ...

    >>> frequency_bands(np.array([5, 100, 1])).tolist()
    [1, 0, 1]
    """
    rank = np.empty(len(counts), dtype=np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return np.floor(np.log2(rank + 1)).astype(np.int64)


def token_features(
    tokens: TokenSet, strings: Sequence[str], counts: np.ndarray | None, offsets: Int[Tensor, " S"]
) -> dict[str, np.ndarray]:
    """Features of every scored token, each (M,).

    ``token``, ``shape``, ``previous token``, ``previous shape``, ``second previous token`` are
    strings; the rest are integers: ``position`` in the sequence, ``position band`` (its log2),
    ``document position`` (log2 of the tokens before it in the document), ``repeated`` (seen earlier
    in the sequence), ``distance`` to that occurrence (0 for none), ``bigram repeated`` (after the
    same token), ``frequency band`` (log2 of the rank in the training text), ``length`` in characters
    and ``starts word``.

    Args:
        tokens: next-token set: ``inputs`` (S, L), slot p predicts token p + 1.
        strings: text of each token id.
        counts: (V,) occurrences in the training text.
        offsets: (S,) where in its document each sequence begins.
    """
    inputs = tokens.inputs.numpy()
    rows, slots = tokens.sequence_of.numpy(), tokens.position_of.numpy()
    text = np.array(strings, dtype=object)
    shapes = np.array([shape_of(s) for s in strings], dtype=object)
    ids = inputs[rows, slots + 1]
    previous = inputs[rows, slots]
    before = np.where(slots > 0, inputs[rows, np.maximum(slots - 1, 0)], -1)
    distance, bigram = _repetition(inputs, rows, slots)
    features: dict[str, np.ndarray] = {
        "token": text[ids].astype(str),
        "shape": shapes[ids].astype(str),
        "previous token": text[previous].astype(str),
        "previous shape": shapes[previous].astype(str),
        "second previous token": np.where(before >= 0, text[before], "").astype(str),
        "position": slots.astype(np.int64),
        "position band": np.log2(slots + 1).astype(np.int64),
        "document position": np.log2(offsets.numpy()[rows] + slots + 1).astype(np.int64),
        "repeated": (distance > 0).astype(np.int64),
        "distance": distance,
        "bigram repeated": bigram,
        "length": np.array([len(s) for s in strings], dtype=np.int64)[ids],
        "starts word": np.array([s[:1].isspace() for s in strings], dtype=np.int64)[ids],
    }
    if counts is not None:
        features["frequency band"] = frequency_bands(counts)[ids]
    return features


def _repetition(inputs: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per scored token: distance to its last occurrence (0 for none), and whether its bigram occurred."""
    distance, bigram = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    for i, (row, slot) in enumerate(zip(rows, slots, strict=True)):
        line = inputs[row]
        earlier = np.flatnonzero(line[: slot + 1] == line[slot + 1])
        if len(earlier):
            distance[i] = slot + 1 - earlier[-1]
            bigram[i] = bool(np.any(line[earlier[earlier > 0] - 1] == line[slot]))
    return distance, bigram


def contexts_of(
    tokens: TokenSet, strings: Sequence[str], lengths: Int[Tensor, " S"], *, before: int = 12, after: int = 4
) -> tuple[str, ...]:
    """A line of text per scored token, the token itself in square brackets.

    Line breaks are shown as one sign and square brackets of the text as round ones, because the
    result is for reading only.
    """
    shown = [s.replace("\n", "⏎").replace("[", "(").replace("]", ")") for s in strings]
    inputs = tokens.inputs.tolist()
    ends = lengths.tolist()
    result = []
    for row, slot in zip(tokens.sequence_of.tolist(), tokens.position_of.tolist(), strict=True):
        line, place = inputs[row], slot + 1
        left = "".join(shown[i] for i in line[max(0, place - before) : place])
        right = "".join(shown[i] for i in line[place + 1 : min(ends[row], place + 1 + after)])
        result.append(f"{left}[{shown[line[place]]}]{right}")
    return tuple(result)
