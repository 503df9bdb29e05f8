"""English next-token prediction on a user's text (arXiv 2506.15872, section 4.2).

A byte-level BPE tokenizer and a small model are trained on the text, or the checkpoints of a
Hugging Face model are opened; everything after that is the same pipeline as for the sums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor, nn

from experiments.config import RunConfig, TextConfig
from experiments.tasks.corpus import read_corpus, read_documents, read_tagged, read_token_ids
from experiments.tasks.stand_in import StandIn
from experiments.tasks.task import DATA_ORDER, BatchLoss, Task, training_generator
from interventions.removal.grouped import next_token_logits
from polca_edit.checkpoints.huggingface import is_adapter
from polca_edit.checkpoints.huggingface_models import (
    load_adapted,
    load_bridge,
    load_causal_lm,
    ready_for_derivatives,
    vocabulary_and_context,
)
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.checkpoints.survey import survey, whole_revisions
from polca_edit.checkpoints.tokenizer_files import FolderTokenizer, load_tokenizer
from polca_edit.models import TransformerShape, build_native_bridge, build_small_transformer
from polca_edit.parameters import ParameterSpace
from polca_edit.text.conllu import GoldTags, gold_tags, token_tags
from polca_edit.text.documents import encode_documents, token_strings, train_tokenizer
from polca_edit.text.sequences import Sampling, draw_token_sets, hold_out, training_splits
from polca_edit.tokens import Splits, TokenLossFunction, TokenSet, next_token_loss

#: 40,274,737 parameters; vocabulary and context follow from the count (arXiv 2506.15872, Table 6).
PAPER_SHAPE = TransformerShape(layers=3, d_model=512, heads=4, d_mlp=2048, d_vocab=30_001, n_ctx=128)
PAPER_PARAMETERS = 40_274_737

#: A low estimate of text length: no tokenizer here packs more characters into a token on average.
CHARACTERS_PER_TOKEN = 6


@dataclass(frozen=True)
class EnglishData:
    """Splits of one run, and training batches that avoid their held-out documents.

    Attributes:
        splits: curvature (training documents), select and evaluate (held-out documents).
        stream: (n,) training tokens, documents one after the other.
        strings: text of each token id.
        seed: data order seed.
        batch_size: sequences a batch.
        length: tokens a sequence.
        digest: SHA-256 of all token ids, held-out ones included.
        tags: gold tags of the select tokens, where a tagged probe was read.
        tokenizer: None for text that came as ids.
        notes: see :class:`Tokenised`.
    """

    splits: Splits
    stream: Int[Tensor, " n"]
    strings: tuple[str, ...]
    seed: int
    batch_size: int
    length: int
    digest: str
    tags: GoldTags | None = None
    tokenizer: Tokenizer | None = None
    notes: tuple[str, ...] = ()

    def batch(self, step: int, branch: int = 0) -> Int[Tensor, "B L"]:
        """The batch of one optimiser step, a pure function of (seed, branch, step)."""
        generator = training_generator(self.seed, step, branch)
        last = len(self.stream) - self.length
        starts = torch.randint(0, last + 1, (self.batch_size,), generator=generator)
        return self.stream[starts[:, None] + torch.arange(self.length)]

    def batch_loss(self, module: nn.Module, step: int, branch: int = 0) -> Tensor:
        """Mean next-token loss of one step's batch, nats."""
        device = next(module.parameters()).device
        return next_token_loss(module, self.batch(step, branch).to(device)).mean()


@dataclass(frozen=True)
class Tokenised:
    """A text as token ids.

    Attributes:
        documents: ids of each document.
        held_out: documents that neither tokenizer nor model may see, in drawing order.
        strings: text of each token id.
        tokenizer: None for text that came as ids.
        notes: how much of the text was kept, and what was switched off.
    """

    documents: list[np.ndarray]
    held_out: list[int]
    strings: tuple[str, ...]
    tokenizer: Tokenizer | None
    notes: tuple[str, ...] = ()


def sampling_of(config: TextConfig) -> Sampling:
    """Sequence length and scored slots of a config."""
    return Sampling(config.n_ctx, config.windows_per_document, config.skip, config.scored_per_sequence)


def tokenise(
    config: TextConfig,
    tokenizer: Tokenizer | FolderTokenizer | None,
    vocabulary: int,
    generator: torch.Generator,
) -> Tokenised:
    """Read the text, hold documents out, train the tokenizer on the others, encode all.

    Args:
        config: what to read.
        tokenizer: an existing tokenizer; None trains one.
        vocabulary: ids must be below this.
        generator: decides what is held out.

    Raises:
        ValueError: if no text is named, it cannot be read, or its ids are too large.
    """
    if config.file is None:
        raise ValueError("task 'text' needs a text, got none; pass --text FILE or set text.file")
    sampling = sampling_of(config)
    wanted = 0 if config.probe else config.select_sequences + config.evaluate_sequences
    folder = tokenizer if isinstance(tokenizer, FolderTokenizer) else None
    own = tokenizer.tokenizer if isinstance(tokenizer, FolderTokenizer) else tokenizer
    if config.file.endswith(".npy"):
        default = None if folder is None else folder.separator
        separator = default if config.separator is None else config.separator
        ids = read_token_ids(
            config.file,
            separator=separator,
            padding=None if folder is None else folder.padding,
            limit=config.max_documents,
        )
        note = f"text: {sum(map(len, ids)):,} token ids in {len(ids):,} documents"
        held_out = hold_out([len(i) for i in ids], wanted, sampling, generator) if wanted else []
        strings = token_strings(own) if own else tuple(f" {i}" for i in range(vocabulary))
    else:
        read = read_corpus(
            config.file, field=config.field, limit=config.max_documents, unique=config.deduplicate
        )
        documents, note = read.documents, read.sentence()
        lengths = [len(d.text) // CHARACTERS_PER_TOKEN for d in documents]
        held_out = hold_out(lengths, wanted, sampling, generator) if wanted else []
        hidden = set(held_out)
        if own is None:
            own = train_tokenizer((d.text for i, d in enumerate(documents) if i not in hidden), vocabulary)
        ids = encode_documents(own, [d.text for d in documents])
        strings = token_strings(own)
    largest = max((int(i.max()) for i in ids if len(i)), default=0)
    if largest >= vocabulary:
        raise ValueError(
            f"token ids must be below the vocabulary of {vocabulary}, got {largest}; "
            "set text.vocabulary, or use the model's own tokenizer"
        )
    return Tokenised(ids, held_out, strings, own, (note, *(folder.notes if folder else ())))


def text_data(
    config: RunConfig, tokenizer: Tokenizer | FolderTokenizer | None = None, vocabulary: int | None = None
) -> EnglishData:
    """Data of a text config: read, split by document, tokenise, cut.

    Args:
        config: sections ``text`` and ``training`` are used.
        tokenizer: an existing tokenizer; default trains one on the training documents.
        vocabulary: ids must be below this; default the config's vocabulary.

    Raises:
        ValueError: if no text is named, it cannot be read, or it is too small.
    """
    text, generator = config.text, torch.Generator().manual_seed(config.seed)
    found = tokenise(text, tokenizer, vocabulary or text.vocabulary, generator)
    sampling = sampling_of(text)
    sequences = (text.curvature_sequences, text.select_sequences, text.evaluate_sequences)
    tags = None
    if text.probe is None:
        splits, stream = training_splits(
            found.documents, found.held_out, sequences, sampling, found.strings, generator
        )
    else:
        splits, stream, tags = _probed(found, text.probe, sequences, sampling, generator)
    if len(stream) < sampling.length:
        raise ValueError(
            f"training needs at least {sampling.length} tokens, the text leaves {len(stream)}; add text"
        )
    digest = hashlib.sha256()
    for ids in found.documents:
        digest.update(np.ascontiguousarray(ids).tobytes())
    batch_size = config.training.batch_size
    return EnglishData(
        splits,
        stream,
        found.strings,
        config.seed,
        batch_size,
        sampling.length,
        digest.hexdigest(),
        tags,
        found.tokenizer,
        found.notes,
    )


def transfer_tokens(
    config: RunConfig, file: str, sequences: int, tokenizer: Tokenizer | None = None
) -> TokenSet:
    """Tokens of another text, read with the tokenizer of a text run.

    Args:
        config: the run.
        file: the other text.
        sequences: how many to draw.
        tokenizer: the run's; None trains it anew, the same for its seed.

    Raises:
        ValueError: if the run reads token ids or a Hugging Face model, or the text is too small.
    """
    if config.task != "text" or config.model.kind == "huggingface":
        raise ValueError(
            "labels carry over for runs on a text with their own tokenizer, this one is another; run "
            "'polca-edit english' first"
        )
    generator = torch.Generator().manual_seed(config.seed)
    found = tokenise(config.text, tokenizer, config.text.vocabulary, generator)
    if found.tokenizer is None:
        raise ValueError("labels carry over to texts, this run was given token ids; run it on the text")
    hidden = set(found.held_out)
    seen = np.concatenate([ids for i, ids in enumerate(found.documents) if i not in hidden])
    counts = np.bincount(seen, minlength=len(found.strings))
    documents = read_documents(file, field=config.text.field, limit=config.text.max_documents)
    ids = encode_documents(found.tokenizer, [d.text for d in documents])
    pool = torch.randperm(len(ids), generator=generator).tolist()
    ((tokens, _),) = draw_token_sets(
        ids, pool, (sequences,), sampling_of(config.text), found.strings, generator, counts
    )
    return tokens


def _probed(
    found: Tokenised,
    probe: str,
    sequences: tuple[int, int, int],
    sampling: Sampling,
    generator: torch.Generator,
) -> tuple[Splits, Int[Tensor, " n"], GoldTags]:
    """Curvature tokens from the training text, select and evaluate tokens from a tagged corpus."""
    if found.tokenizer is None:
        raise ValueError("a tagged probe needs a tokenizer, got token ids; give the text itself")
    stream = torch.from_numpy(np.concatenate(found.documents))
    counts = np.bincount(stream.numpy(), minlength=len(found.strings))
    order = torch.randperm(len(found.documents), generator=generator).tolist()
    ((curvature, _),) = draw_token_sets(
        found.documents, order, sequences[:1], sampling, found.strings, generator, counts
    )
    tagged = read_tagged(probe)
    encoded = found.tokenizer.encode_batch([d.text for d in tagged], add_special_tokens=False)
    ids = [np.array(one.ids, dtype=np.int64) for one in encoded]
    tags = {i: token_tags(d, one.offsets) for i, (d, one) in enumerate(zip(tagged, encoded, strict=True))}
    pool = torch.randperm(len(ids), generator=generator).tolist()
    drawn = draw_token_sets(ids, pool, sequences[1:], sampling, found.strings, generator, counts)
    gold = [gold_tags(tokens, windows, tags) for tokens, windows in drawn]
    select, evaluate = (
        replace(tokens, skills=gram.skills()) for (tokens, _), gram in zip(drawn, gold, strict=True)
    )
    return Splits(curvature, select, evaluate), stream, gold[0]


def shape_of(config: RunConfig) -> TransformerShape:
    """The model's shape: untied embeddings over the config's vocabulary."""
    m, text = config.model, config.text
    return TransformerShape(m.layers, m.d_model, m.heads, m.d_mlp, text.vocabulary, text.n_ctx)


def build(config: RunConfig, tokenizer: Tokenizer | None = None) -> Task:
    """Model and data of a text run.

    Args:
        config: the run.
        tokenizer: trained before on the same text; None trains it, unless the model brings its own.

    Raises:
        ValueError: for data or a model that cannot be read.
    """
    if config.model.kind == "huggingface":
        return _huggingface_task(config)
    data = text_data(config, tokenizer)
    make = build_small_transformer if config.model.kind == "plain" else build_native_bridge
    module = make(shape_of(config), config.seed)
    return replace(_task(config, data, module, next_token_loss), tokenizer=data.tokenizer)


def _task(
    config: RunConfig,
    data: EnglishData,
    module: nn.Module,
    token_loss: TokenLossFunction,
    open_checkpoints: Callable[[ParameterSpace], Checkpoints] | None = None,
) -> Task:
    space = ParameterSpace.from_module(module)

    def training(branch: int) -> BatchLoss:
        return partial(data.batch_loss, branch=branch)

    return Task(
        "text",
        module,
        space,
        token_loss,
        data.splits,
        None if config.checkpoints is not None else training,
        {
            "seed": config.seed,
            "rule": f"{DATA_ORDER}; draws window starts in the training stream",
            "batch_size": data.batch_size,
            "tokens": data.digest,
        },
        open_checkpoints=None if open_checkpoints is None else partial(open_checkpoints, space),
        tags=data.tags,
        logits=next_token_logits,
        notes=data.notes,
    )


def build_around(config: RunConfig, stand_in: StandIn) -> Task:
    """The task of a Hugging Face model with a smaller one in its place, for a plan.

    Splits and checkpoints are those of the run; ids are wrapped into the smaller vocabulary.
    """
    task = _huggingface_task(config, stand_in)
    size, _ = vocabulary_and_context(stand_in.module)
    splits = (task.splits.curvature, task.splits.select, task.splits.evaluate)
    return replace(task, splits=Splits(*(replace(part, inputs=part.inputs % size) for part in splits)))


def _huggingface_task(config: RunConfig, stand_in: StandIn | None = None) -> Task:
    """A Hugging Face model: its own tokenizer, its checkpoints where the config names some."""
    path, given = Path(config.model.path or "."), config.checkpoints
    found = (
        None
        if given is None
        else survey(given.directory, names=given.pattern, step_pattern=given.step_pattern)
    )
    last = None
    if given is not None and found is not None:
        last = whole_revisions(found.revisions, skip_damaged=given.skip_damaged)[-1].path
    adapted = last is not None and is_adapter(last)
    if stand_in is not None:
        module = stand_in.module
    elif last is not None and adapted:
        module = load_adapted(path, last)
    else:
        module = load_bridge(path) if config.model.hooks else load_causal_lm(path)
    vocabulary, context = vocabulary_and_context(module if stand_in is None else stand_in.whole)
    if context is not None and config.text.n_ctx > context:
        raise ValueError(
            f"text.n_ctx must be at most the model's context of {context}, got {config.text.n_ctx}; lower it"
        )
    tokenizer = load_tokenizer(path) or (load_tokenizer(last) if last else None)
    if tokenizer is None and not (config.text.file or "").endswith(".npy"):
        raise ValueError(
            f"'{path}' must hold a tokenizer.json, or vocab.json and merges.txt, to read text with, it does "
            "not; save the tokenizer there or give token ids as an .npy file"
        )
    data = text_data(config, tokenizer, vocabulary)
    few = data.splits.select.inputs[:2] % vocabulary_and_context(module)[0]
    token_loss, ready = ready_for_derivatives(module, few)

    @cache  # one series a task, so that each checkpoint's loss is compared once
    def opened(_: ParameterSpace) -> Checkpoints:
        assert given is not None
        return open_checkpoints(
            given.directory,
            module if stand_in is None else stand_in.space,
            names=given.pattern,
            step_pattern=given.step_pattern,
            reference=given.reference,
            skip_damaged=given.skip_damaged,
            load=load_bridge if config.model.hooks and not adapted else None,
        )

    task = _task(config, data, module, token_loss, opened if found else None)
    notes = [found.sentence()] if found else []
    notes += [] if ready == "ready" else [f"derivatives: {ready}"]
    return replace(task, notes=(*notes, *task.notes))
