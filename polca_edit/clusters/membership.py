"""A rule that says which unseen tokens belong to a cluster, from input features alone.

A cluster is found from losses. A test on new tokens must not use their losses to decide
membership, or the test is circular (causal protocol, 3.0). So a small decision tree is fitted on the
select split, on :attr:`TokenSet.features` only, and its skill is the AUC on sequences it was not
fitted on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.metrics import precision_recall_curve, roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor

from polca_edit.tokens import TokenSet

MAX_DEPTH = 5
FOLDS = 5
#: Values of a text feature that get a column of their own; all others count as "something else".
MAX_CATEGORIES = 40
LEAF = -1


@dataclass(frozen=True)
class Column:
    """One input of the tree: a number, or whether a text feature has a certain value.

    Attributes:
        feature: key in :attr:`TokenSet.features`.
        equals: the text value asked for, or None where the feature is a number used as it is.
    """

    feature: str
    equals: str | None = None


@dataclass(frozen=True)
class MembershipRule:
    """A decision tree over input features.

    Attributes:
        description: the rule in words.
        auc: area under the ROC curve on held-out sequences; 0.5 where nothing could be learnt.
        threshold: a token is a member when its leaf's share of members is at least this.
        features: names of the features the tree asks for.
        columns: the tree's inputs.
        split: per node the column asked, -1 in a leaf.
        cut: per node, go left when the value is at most this.
        left: per node its left child.
        right: per node its right child.
        share: per node the share of members among the fitted tokens there.
    """

    description: str
    auc: float
    threshold: float
    features: tuple[str, ...]
    columns: tuple[Column, ...]
    split: tuple[int, ...]
    cut: tuple[float, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    share: tuple[float, ...]

    def score(self, tokens: TokenSet) -> Float[Tensor, " M"]:
        """Share of members in the leaf of each token.

        Raises:
            ValueError: if the tokens lack a feature the tree asks for.
        """
        missing = [name for name in self.features if name not in tokens.features]
        if missing:
            raise ValueError(f"tokens must carry the rule's features, {missing} are missing; build them so")
        table = _table(tokens.features, self.columns, tokens.count, set(self.features))
        node = np.zeros(tokens.count, dtype=np.int64)
        split, cut = np.array(self.split), np.array(self.cut)
        left, right = np.array(self.left), np.array(self.right)
        for _ in range(MAX_DEPTH):
            inside = split[node] != LEAF
            rows = inside.nonzero()[0]
            goes_left = table[rows, split[node[rows]]] <= cut[node[rows]]
            node[rows] = np.where(goes_left, left[node[rows]], right[node[rows]])
        return torch.from_numpy(np.array(self.share)[node])

    def assign(self, tokens: TokenSet) -> Bool[Tensor, " M"]:
        """Members among any tokens; their losses are never looked at."""
        return self.score(tokens) >= self.threshold

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MembershipRule:
        """The rule from :meth:`as_dict`, also after a trip through JSON."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        plain["columns"] = tuple(Column(**dict(column)) for column in values["columns"])
        return cls(**plain)


def fit_rule(tokens: TokenSet, member: Bool[Tensor, " M"], *, seed: int) -> MembershipRule:
    """Learn who is in a cluster from the input features of the select split.

    Documents are dealt into five parts; each is scored by a tree fitted on the other four. These
    held-out scores give the AUC and the threshold (largest F1); the rule kept is refitted on all.

    Args:
        tokens: the select split.
        member: (M,) who is in the cluster.
        seed: of the dealing and of ties between splits.

    Raises:
        ValueError: if the tokens carry no features.
    """
    if not tokens.features:
        raise ValueError("a membership rule needs token features, got none; fill TokenSet.features")
    columns = _columns(tokens.features)
    table = _table(tokens.features, columns, tokens.count, set(tokens.features))
    target = member.numpy().astype(bool)
    if not 0 < int(target.sum()) < len(target):
        words = "all tokens" if target.all() else "no tokens"
        return MembershipRule(words, 0.5, 0.5, (), (), (LEAF,), (0.0,), (0,), (0,), (float(target.mean()),))
    documents = tokens.documents[tokens.sequence_of].numpy()
    held_out = _held_out_scores(table, target, documents, seed)
    auc = float(roc_auc_score(target, held_out))
    tree = _tree(len(target), seed).fit(table, target).tree_
    used = sorted({int(column) for column in tree.feature if column >= 0})
    features = tuple(dict.fromkeys(columns[column].feature for column in used))
    share = tree.value[:, 0, 1] / tree.value[:, 0].sum(1)
    rule = MembershipRule(
        "",
        auc,
        _threshold(target, held_out),
        features,
        columns,
        tuple(int(c) if c >= 0 else LEAF for c in tree.feature),
        tuple(float(c) for c in tree.threshold),
        tuple(max(int(c), 0) for c in tree.children_left),
        tuple(max(int(c), 0) for c in tree.children_right),
        tuple(float(s) for s in share),
    )
    weights = tuple(int(n) for n in tree.n_node_samples)
    integral = {name for name, values in tokens.features.items() if np.asarray(values).dtype.kind in "iub"}
    return MembershipRule.from_dict({**rule.as_dict(), "description": describe(rule, weights, integral)})


def _tree(count: int, seed: int) -> DecisionTreeClassifier:
    smallest = max(2, count // 200)
    return DecisionTreeClassifier(max_depth=MAX_DEPTH, min_samples_leaf=smallest, random_state=seed)


def _held_out_scores(table: np.ndarray, target: np.ndarray, documents: np.ndarray, seed: int) -> np.ndarray:
    names = np.unique(documents)
    if len(names) < 2:
        return np.full(len(target), target.mean())
    dealt = np.random.default_rng(seed).permutation(len(names))
    groups = dealt[np.searchsorted(names, documents)]
    scores = np.zeros(len(target))
    for fitted, held in GroupKFold(min(FOLDS, len(names))).split(table, target, groups):
        if target[fitted].all() or not target[fitted].any():
            scores[held] = target[fitted].mean()
            continue
        tree = _tree(len(fitted), seed).fit(table[fitted], target[fitted])
        scores[held] = tree.predict_proba(table[held])[:, 1]
    return scores


def _threshold(target: np.ndarray, scores: np.ndarray) -> float:
    """The score with the largest F1."""
    precision, recall, cuts = precision_recall_curve(target, scores)
    f1 = 2 * precision[:-1] * recall[:-1] / np.maximum(precision[:-1] + recall[:-1], 1e-12)
    return float(max(cuts[int(f1.argmax())], 1e-6))


def _columns(features: Mapping[str, np.ndarray]) -> tuple[Column, ...]:
    columns: list[Column] = []
    for name, raw in features.items():
        values = np.asarray(raw)
        if values.dtype.kind in "iufb":
            columns.append(Column(name))
            continue
        found, counts = np.unique(values.astype(str), return_counts=True)
        common = found[np.argsort(-counts, kind="stable")[:MAX_CATEGORIES]]
        columns.extend(Column(name, str(value)) for value in common)
    return tuple(columns)


def _table(
    features: Mapping[str, np.ndarray], columns: Sequence[Column], count: int, wanted: set[str]
) -> np.ndarray:
    """(M, columns) float; columns of features that are not wanted stay zero."""
    # The tree compares in float32, so the table is float32 too.
    table = np.zeros((count, len(columns)), dtype=np.float32)
    texts: dict[str, np.ndarray] = {}
    for index, column in enumerate(columns):
        if column.feature not in wanted:
            continue
        values = np.asarray(features[column.feature])
        if column.equals is None:
            table[:, index] = values.astype(float)
        else:
            table[:, index] = texts.setdefault(column.feature, values.astype(str)) == column.equals
    return table


def describe(rule: MembershipRule, weights: Sequence[int], integral: set[str], most: int = 4) -> str:
    """The member leaves in words, largest first.

    Args:
        rule: a fitted tree.
        weights: fitted tokens in each node.
        integral: features that hold whole numbers, whose bounds are rounded.
        most: leaves that are spelt out.
    """
    leaves: list[tuple[int, list[tuple[int, bool]]]] = []

    def walk(node: int, path: list[tuple[int, bool]]) -> None:
        if rule.split[node] == LEAF:
            if rule.share[node] >= rule.threshold:
                leaves.append((weights[node], path))
            return
        walk(rule.left[node], [*path, (node, True)])
        walk(rule.right[node], [*path, (node, False)])

    walk(0, [])
    leaves.sort(key=lambda leaf: -leaf[0])
    texts = [_path_text(rule, path, integral) for _, path in leaves[:most]]
    more = f" or {len(leaves) - most} smaller cases" if len(leaves) > most else ""
    return " or ".join(texts) + more if texts else "no tokens"


def _path_text(rule: MembershipRule, path: Sequence[tuple[int, bool]], integral: set[str]) -> str:
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    parts: list[str] = []
    for node, goes_left in path:
        column = rule.columns[rule.split[node]]
        if column.equals is not None:
            parts.append(f"{column.feature} {'is not' if goes_left else 'is'} '{column.equals}'")
        elif goes_left:
            high[column.feature] = min(high.get(column.feature, np.inf), rule.cut[node])
        else:
            low[column.feature] = max(low.get(column.feature, -np.inf), rule.cut[node])
    for name in dict.fromkeys([*low, *high]):
        parts.append(_bound_text(name, low.get(name), high.get(name), name in integral))
    return " and ".join(parts) if parts else "all tokens"


def _bound_text(name: str, low: float | None, high: float | None, integral: bool) -> str:
    """``low < value <= high`` in words."""
    if not integral:
        texts = [f"{name} > {low:.3g}"] if low is not None else []
        return " and ".join(texts + ([f"{name} <= {high:.3g}"] if high is not None else []))
    first = None if low is None else int(np.floor(low)) + 1
    last = None if high is None else int(np.floor(high))
    if first is None:
        return f"{name} <= {last}"
    if last is None:
        return f"{name} >= {first}"
    return f"{name} = {first}" if first == last else f"{name} in {first}..{last}"
