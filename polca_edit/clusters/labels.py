"""What the tokens of a cluster share, without hand labour and without their losses.

Two kinds of label. A *tag label* is the rule of arXiv 2506.15872, appendix E.2, on part-of-speech
4-grams. A *feature rule* is a small decision tree over input features
(:mod:`polca_edit.clusters.membership`); it counts as a label from a held-out AUC of 0.9 on, and the AUC it
reaches on shuffled clusters stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.metrics import roc_auc_score
from torch import Tensor

from polca_edit.clusters.membership import MembershipRule, fit_rule
from polca_edit.text.conllu import GRAM, GoldTags
from polca_edit.tokens import TokenSet

#: A feature rule describes a cluster from this held-out AUC on.
LABEL_AUC = 0.9
#: A tag label: the smallest set of tags that covers this share of the cluster ...
TAG_SHARE = 0.7
#: ... if it has at most this many tags.
TAG_COUNT = 2


# -- tags -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TagLabel:
    """Places of the 4-gram at which few tags cover most of a cluster.

    Attributes:
        places: for the third, second and first token before and the token itself, the tags that
            cover the share, or nothing where more than :data:`TAG_COUNT` are needed.
        support: cluster tokens that satisfy every place that has tags.
        coverage: the same as a share of the cluster.
        base_rate: share of all tokens that satisfy them.
        chance: share of random token sets of the cluster's size for which the rule gives a label too.
    """

    places: tuple[tuple[str, ...], ...]
    support: int
    coverage: float
    base_rate: float
    chance: float

    @property
    def found(self) -> bool:
        """Whether any place has a label."""
        return any(self.places)

    @property
    def lift(self) -> float:
        """Coverage over base rate."""
        return self.coverage / self.base_rate if self.base_rate else 0.0

    @property
    def text(self) -> str:
        """The label in words, most distant place first."""
        names = [f"{GRAM - 1 - i} before" if i < GRAM - 1 else "token" for i in range(GRAM)]
        parts = [f"{name}: {'|'.join(tags)}" for name, tags in zip(names, self.places, strict=True) if tags]
        return ", ".join(parts) or "none"


def covering_tags(tags: Sequence[str], share: float = TAG_SHARE) -> tuple[str, ...]:
    """The smallest set of tags that covers a share of the given ones, most frequent first.

    >>> covering_tags(["DET", "DET", "NOUN", "ADJ", "DET"], 0.7)
    ('DET', 'ADJ')
    """
    names, counts = np.unique(np.array(tags, dtype=str), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    enough = int(np.searchsorted(np.cumsum(counts[order]), share * len(tags) - 1e-9)) + 1
    return tuple(str(name) for name in names[order[:enough]])


def tag_label(
    tags: GoldTags, member: Bool[Tensor, " M"], generator: torch.Generator, *, draws: int = 50
) -> TagLabel:
    """The tag label of a cluster (arXiv 2506.15872, appendix E.2), with what chance would give.

    Args:
        tags: 4-grams of all tokens.
        member: (M,) who is in the cluster.
        generator: draws the random token sets.
        draws: how many of them.
    """
    grams = np.array(tags.grams, dtype=str)
    inside = member.numpy()
    places = tag_places(grams[inside])
    fits = np.ones(len(grams), dtype=bool)
    for place, names in enumerate(places):
        if names:
            fits &= np.isin(grams[:, place], names)
    by_chance = 0
    for _ in range(draws):
        drawn = torch.randperm(len(grams), generator=generator)[: int(inside.sum())].numpy()
        by_chance += any(tag_places(grams[drawn]))
    support = int((fits & inside).sum()) if any(places) else 0
    return TagLabel(
        places,
        support,
        support / max(1, int(inside.sum())),
        float(fits.mean()) if any(places) else 0.0,
        by_chance / draws,
    )


def tag_places(grams: np.ndarray) -> tuple[tuple[str, ...], ...]:
    """Per place of the 4-grams (n, 4) of some tokens the few tags that cover most of them, or nothing."""
    found = (covering_tags(list(grams[:, place])) for place in range(GRAM))
    return tuple(tags if len(tags) <= TAG_COUNT else () for tags in found)


#: A spaCy pipeline, or anything like it: text -> words with ``idx``, ``text`` and ``pos_``.
Tagger = Callable[[str], Any]


def spacy_tagger(name: str = "en_core_web_sm") -> Tagger:
    """The user's own spaCy model.

    Raises:
        ValueError: without spaCy or the model.
    """
    try:
        import spacy

        model: Tagger = spacy.load(name)
    except (ImportError, OSError) as error:
        raise ValueError(
            f"tagging needs spaCy and its model '{name}' ({error}); install both, or give gold tags "
            "as CoNLL-U with --probe"
        ) from error
    return model


def tags_from_tagger(tokens: TokenSet, strings: Sequence[str], tagger: Tagger) -> GoldTags:
    """Tag 4-grams of scored tokens from a tagger run on the text of each sequence.

    Args:
        tokens: next-token set; slot p predicts token p + 1.
        strings: text of each token id.
        tagger: see :class:`Tagger`.
    """
    from polca_edit.text.conllu import NO_TAG, TaggedDocument, token_tags

    own: dict[int, np.ndarray] = {}
    for row, line in enumerate(tokens.inputs.tolist()):
        pieces = [strings[i] for i in line]
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        text = "".join(pieces)
        characters = [NO_TAG] * len(text)
        for word in tagger(text):
            characters[word.idx : word.idx + len(word.text)] = [word.pos_] * len(word.text)
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        own[row] = token_tags(TaggedDocument(str(row), text, tuple(characters)), spans)
    grams = []
    for row, slot in zip(tokens.sequence_of.tolist(), tokens.position_of.tolist(), strict=True):
        places = range(slot + 2 - GRAM, slot + 2)
        grams.append(tuple(str(own[row][i]) if i >= 0 else NO_TAG for i in places))
    return GoldTags(tuple(grams))


# -- feature rules --------------------------------------------------------------------------------


@dataclass(frozen=True)
class RuleLabel:
    """A feature rule and how well it describes a cluster; everything is held out by document.

    Attributes:
        text: the rule in words.
        auc: area under the ROC curve on documents the tree was not fitted on.
        auc_shuffled: the same for clusters of the same size with shuffled members, mean.
        support: cluster tokens the held-out rule finds.
        coverage: the same as a share of the cluster.
        precision: share of the tokens it names that are in the cluster.
        base_rate: the cluster's share of all tokens.
        rule: the rule refitted on all tokens, for unseen ones.
    """

    text: str
    auc: float
    auc_shuffled: float
    support: int
    coverage: float
    precision: float
    base_rate: float
    rule: MembershipRule

    @property
    def counts(self) -> bool:
        """Whether it counts as a label."""
        return self.auc >= LABEL_AUC


def rule_label(tokens: TokenSet, member: Bool[Tensor, " M"], *, seed: int, shuffles: int = 3) -> RuleLabel:
    """Learn a feature rule for a cluster.

    Coverage and precision come from two trees, each fitted on half of the documents and asked about
    the other half; (sum, count) are added before dividing.

    Args:
        tokens: the tokens that were clustered, with features.
        member: (M,) who is in the cluster.
        seed: of the dealing of documents.
        shuffles: shuffled clusters.
    """
    rule = fit_rule(tokens, member, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    shuffled = [
        fit_rule(tokens, member[torch.randperm(len(member), generator=draw)], seed=seed + 1 + i).auc
        for i in range(shuffles)
    ]
    named, hits, size = _held_out_counts(tokens, member, seed)
    return RuleLabel(
        rule.description,
        rule.auc,
        float(np.mean(shuffled)) if shuffled else 0.5,
        hits,
        hits / size if size else 0.0,
        hits / named if named else 0.0,
        size / len(member),
        rule,
    )


def _held_out_counts(tokens: TokenSet, member: Tensor, seed: int) -> tuple[int, int, int]:
    """(tokens named, of them in the cluster, cluster size) over two halves of the documents."""
    names = tokens.documents.unique()
    order = names[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
    named = hits = 0
    first = torch.isin(tokens.documents, order[: len(order) // 2])
    for fitted in (first, ~first):
        inside = fitted[tokens.sequence_of]
        if not bool(fitted.any()) or bool(fitted.all()) or not bool(member[inside].any()):
            continue
        rule = fit_rule(tokens.select(fitted), member[inside], seed=seed)
        said = rule.assign(tokens.select(~fitted))
        named += int(said.sum())
        hits += int((said & member[~inside]).sum())
    return named, hits, int(member.sum())


def transferred_auc(rule: MembershipRule, tokens: TokenSet, member: Bool[Tensor, " M"]) -> float | None:
    """AUC of a rule on other tokens whose membership is known; None where all or none are members."""
    if bool(member.all()) or not bool(member.any()):
        return None
    return float(roc_auc_score(member.numpy(), rule.score(tokens).numpy()))


# -- overlap --------------------------------------------------------------------------------------


def overlap(members: Mapping[str, Bool[Tensor, " M"]]) -> Float[Tensor, "C C"]:
    """Jaccard index of every pair of clusters: common tokens over tokens in either.

    >>> a, b = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    >>> round(float(overlap({"a": a, "b": b})[0, 1]), 3)
    0.333
    """
    stack = torch.stack(list(members.values())).double()
    common = stack @ stack.T
    sizes = stack.sum(1)
    return common / (sizes[:, None] + sizes[None] - common).clamp_min(1)


def distinct(members: Mapping[str, Bool[Tensor, " M"]], limit: float = 0.5) -> list[tuple[str, ...]]:
    """Clusters grouped by overlap: two are in a group when a chain of pairs above the limit joins them."""
    names = list(members)
    if not names:
        return []
    close = overlap(members) > limit
    group = list(range(len(names)))
    for i in range(len(names)):
        for j in range(i):
            if close[i, j] and group[i] != group[j]:
                old, new = group[i], group[j]
                group = [new if g == old else g for g in group]
    return [tuple(n for n, g in zip(names, group, strict=True) if g == k) for k in dict.fromkeys(group)]
