"""From token ids of documents to token sets: windows, scored slots, splits.

Splits are made over documents, so a document never lends one sequence to training and another to
a test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from polca_edit.text.features import contexts_of, token_features
from polca_edit.tokens import Splits, TokenSet


@dataclass(frozen=True)
class Windows:
    """Fixed-length sequences cut from documents.

    Attributes:
        inputs: (S, L) token ids.
        lengths: (S,) how many of them are text; the rest is padding.
        documents: (S,) which document each is from.
        offsets: (S,) where in it each begins, in tokens.
    """

    inputs: Int[Tensor, "S L"]
    lengths: Int[Tensor, " S"]
    documents: Int[Tensor, " S"]
    offsets: Int[Tensor, " S"]

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def select(self, rows: Tensor | slice) -> Windows:
        """Some of the sequences."""
        return Windows(self.inputs[rows], self.lengths[rows], self.documents[rows], self.offsets[rows])


def cut_windows(
    documents: Mapping[int, np.ndarray],
    length: int,
    *,
    per_document: int | None = None,
    minimum: int = 8,
    generator: torch.Generator | None = None,
    padding: int = 0,
) -> Windows:
    """Non-overlapping windows of every document.

    Args:
        documents: document id -> token ids.
        length: tokens a window.
        per_document: keep at most this many windows of a document, so that a long one does not
            stand for the whole text; drawn with ``generator``, or the first ones without it.
        minimum: a document's last window is kept when it has at least this many tokens.
        generator: for ``per_document``.
        padding: id that fills the last window (never scored).

    Raises:
        ValueError: if nothing is long enough.
    """
    rows, lengths, names, offsets = [], [], [], []
    for name, ids in documents.items():
        starts = [s for s in range(0, len(ids), length) if len(ids) - s >= min(minimum, length)]
        if per_document is not None and len(starts) > per_document:
            order = torch.arange(len(starts))
            if generator is not None:
                order = torch.randperm(len(starts), generator=generator)
            starts = [starts[i] for i in sorted(order[:per_document].tolist())]
        for start in starts:
            piece = ids[start : start + length]
            rows.append(np.pad(piece, (0, length - len(piece)), constant_values=padding))
            lengths.append(len(piece))
            names.append(name)
            offsets.append(start)
    if not rows:
        raise ValueError(f"text must hold a document of at least {minimum} tokens, got none; is it empty?")
    inputs = torch.from_numpy(np.stack(rows).astype(np.int64))
    return Windows(inputs, torch.tensor(lengths), torch.tensor(names), torch.tensor(offsets))


def scored_slots(
    windows: Windows,
    *,
    skip: int = 0,
    per_window: int | None = None,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "S P"]:
    """(S, L-1) which next-token predictions count: slot p predicts token p + 1.

    Args:
        windows: sequences.
        skip: leave out the first predictions of each sequence, which have little context.
        per_window: score at most this many slots of a sequence, drawn with ``generator``.
        generator: for ``per_window``.
    """
    slots = torch.arange(windows.inputs.shape[1] - 1)
    scored = (slots[None] >= skip) & (slots[None] + 1 < windows.lengths[:, None])
    if per_window is not None:
        draw = torch.rand(scored.shape, generator=generator).masked_fill(~scored, 2.0)
        rank = draw.argsort(1).argsort(1)
        scored = scored & (rank < per_window)
    return scored


def text_token_set(
    windows: Windows,
    scored: Bool[Tensor, "S P"],
    strings: Sequence[str],
    *,
    counts: np.ndarray | None = None,
    skills: Callable[[TokenSet], Mapping[str, Tensor]] | None = None,
) -> TokenSet:
    """A token set for next-token prediction, with features and contexts.

    Args:
        windows: sequences.
        scored: (S, L-1) slots that count; sequences without any are left out.
        strings: text of each token id.
        counts: (V,) how often each id occurs in the training text, for the frequency band.
        skills: labels where the caller knows any.
    """
    keep = scored.any(1)
    windows, scored = windows.select(keep), scored[keep]
    plain = TokenSet(windows.inputs, scored, windows.documents, {}, windows.inputs[:, 1:].clone())
    return TokenSet(
        plain.inputs,
        plain.scored,
        plain.documents,
        dict(skills(plain)) if skills else {},
        plain.outputs,
        token_features(plain, strings, counts, windows.offsets),
        contexts_of(plain, strings, windows.lengths),
    )


@dataclass(frozen=True)
class Sampling:
    """How token sets are drawn from documents.

    Attributes:
        length: tokens a sequence.
        per_document: windows a document may lend to one token set.
        skip: first predictions of each sequence that are not scored.
        per_window: scored slots a sequence; None scores all.
    """

    length: int
    per_document: int = 4
    skip: int = 4
    per_window: int | None = None


def hold_out(
    lengths: Sequence[int], wanted: int, sampling: Sampling, generator: torch.Generator
) -> list[int]:
    """Documents to keep from training, in random order: enough for ``wanted`` sequences, at most half.

    Args:
        lengths: a low estimate of every document's tokens.
        wanted: sequences of the select and evaluate sets together.
        sampling: windows a document may lend.
        generator: the order.
    """
    chosen: list[int] = []
    # The last document of each set may be used in part only.
    wanted += 2 * sampling.per_document
    windows = 0
    for index in torch.randperm(len(lengths), generator=generator)[: len(lengths) // 2].tolist():
        if windows >= wanted:
            break
        chosen.append(index)
        windows += min(lengths[index] // sampling.length, sampling.per_document)
    return chosen


def draw_token_sets(
    documents: Sequence[np.ndarray],
    pool: Sequence[int],
    sequences: Sequence[int],
    sampling: Sampling,
    strings: Sequence[str],
    generator: torch.Generator,
    counts: np.ndarray | None = None,
) -> list[tuple[TokenSet, Windows]]:
    """Token sets of the wanted sizes, from disjoint documents taken in the pool's order.

    The windows come with each set, so that annotations of the documents can be looked up.

    Only full windows are used, so that every sequence of a set has the same number of slots.

    Args:
        documents: token ids of all documents.
        pool: documents that may be used.
        sequences: wanted number of sequences of each set.
        sampling: length, windows a document, scored slots.
        strings: text of each token id.
        generator: draws windows and slots.
        counts: see :func:`text_token_set`.

    Raises:
        ValueError: if the pool has too little text.
    """
    left = [index for index in pool if len(documents[index]) >= sampling.length]
    sets = []
    for wanted in sequences:
        chosen: dict[int, np.ndarray] = {}
        found = 0
        while found < wanted and left:
            index = left.pop(0)
            full = len(documents[index]) // sampling.length
            chosen[index] = documents[index][: full * sampling.length]
            found += min(full, sampling.per_document)
        if found < wanted:
            raise ValueError(
                f"a token set needs {wanted} sequences of {sampling.length} tokens, the text has "
                f"documents for {found}; add text, ask for fewer sequences or allow more windows per document"
            )
        cut = cut_windows(
            chosen, sampling.length, per_document=sampling.per_document, generator=generator
        ).select(slice(wanted))
        slots = scored_slots(cut, skip=sampling.skip, per_window=sampling.per_window, generator=generator)
        sets.append((text_token_set(cut, slots, strings, counts=counts), cut))
    return sets


def training_splits(
    documents: Sequence[np.ndarray],
    held_out: Sequence[int],
    sequences: tuple[int, int, int],
    sampling: Sampling,
    strings: Sequence[str],
    generator: torch.Generator,
) -> tuple[Splits, Int[Tensor, " n"]]:
    """The three token sets of a run, and the training stream.

    The curvature set is a training sample; select and evaluate come from held-out documents only.

    Args:
        documents: token ids of all documents.
        held_out: documents kept from training.
        sequences: wanted numbers for curvature, select and evaluate.
        sampling: length, windows a document, scored slots.
        strings: text of each token id.
        generator: every draw.
    """
    hidden = set(held_out)
    training = [index for index in range(len(documents)) if index not in hidden]
    if not training:
        raise ValueError("training needs at least one document that is not held out, got none; add text")
    stream = torch.from_numpy(np.concatenate([documents[index] for index in training]))
    counts = np.bincount(stream.numpy(), minlength=len(strings))
    order = [training[i] for i in torch.randperm(len(training), generator=generator).tolist()]
    ((curvature, _),) = draw_token_sets(documents, order, sequences[:1], sampling, strings, generator, counts)
    (select, _), (evaluate, _) = draw_token_sets(
        documents, list(held_out), sequences[1:], sampling, strings, generator, counts
    )
    return Splits(curvature, select, evaluate), stream
