"""Which groups of a run get an axis, on the tokens of the search and on unseen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.discover.stages import load_found, signatures_file, token_groups
from experiments.run.keys import signature_names
from experiments.run.run import Run
from interventions.causal.statistics import Bits
from interventions.damage import EvaluatedSplit
from interventions.discovery.axes import axis_target
from interventions.discovery.axis_nulls import null_sets
from interventions.discovery.search import AxisTarget
from interventions.discovery.signatures import Found
from polca_edit.clusters.membership import fit_rule

#: Mean headroom of a target below which no axis is searched, nats.
FLOOR = 0.05
#: Fewest tokens of a target on either split.
FEWEST = 20
#: Targets that cut across parents share null sets while their sizes differ by no more than this factor.
SIZES = 1.35


@dataclass(frozen=True, eq=False)
class Aim:
    """One target on both token sets.

    Attributes:
        search: on the tokens of the search.
        unseen: on the tokens of the judgement.
        parent: name of its parent; None without one.
        parents: name -> (members on the search tokens, on the unseen ones): what null sets may cut across.
    """

    search: AxisTarget
    unseen: AxisTarget
    parent: str | None
    parents: Mapping[str, tuple[Bits, Bits]]

    @property
    def inside(self) -> bool:
        """Whether null sets must stay inside its parent."""
        return self.search.rest is not None


def require_target(run: Run, target: str) -> None:
    """Whether a run has such a group, known before any work: a label of its tokens, or a stored cluster.

    Raises:
        ValueError: for a name that nothing is called.
    """
    known = list(token_groups(run.task.splits.select))
    if run.task.splits.select.features:  # clusters are carried to other tokens by rules on features
        names = signature_names(run.config)
        if names and signatures_file(run, names[-1]).exists():
            known += [f"found {name}" for name in load_found(run, names[-1]).clusters]
        elif target.removeprefix("found ").isdigit():
            return
    if target not in known:
        raise ValueError(f"--target must be one of {known}, got '{target}'")


def aims_of(
    run: Run,
    search: EvaluatedSplit,
    unseen: EvaluatedSplit,
    found: Found | None,
    wanted: Sequence[str] | None,
) -> tuple[list[Aim], dict[str, str]]:
    """Known skills (or token classes), and interventional clusters by their rules; why others are left out.

    Args:
        run: for the parents that its task names.
        search: tokens of the search.
        unseen: tokens of the judgement.
        found: interventional clusters on the tokens of the search.
        wanted: names of the targets; None: all.

    Raises:
        ValueError: for a wanted name that nothing is called.
    """
    groups = [token_groups(split.tokens) for split in (search, unseen)]
    parents = {name: (groups[0][name], groups[1][name]) for name in run.task.parents}
    members = {name: (mask, groups[1][name]) for name, mask in groups[0].items() if name in groups[1]}
    clusters = _cluster_masks(run, search, unseen, found) if found is not None else {}
    known = [*members, *clusters]
    missing = next((name for name in wanted or [] if name not in known), None)
    if missing is not None:
        raise ValueError(f"--target must be one of {known}, got '{missing}'")
    aims, skipped = [], {}
    for name in known if wanted is None else wanted:
        own = name in clusters
        masks = clusters[name] if own else members[name]
        if min(int(mask.sum()) for mask in masks) < FEWEST:
            skipped[name] = f"fewer than {FEWEST} tokens"
            continue
        rooms = [
            float(split.headroom[mask].double().mean())
            for split, mask in zip((search, unseen), masks, strict=True)
        ]
        if min(rooms) < FLOOR or any(bool(mask.all()) for mask in masks):
            little = f"its headroom is below {FLOOR} nats, where shares say nothing"
            skipped[name] = little if min(rooms) < FLOOR else "it is every token"
            continue
        others = clusters if own else parents or members
        aims.append(_aim(name, masks, others, {} if own else parents, (search, unseen)))
    return aims, skipped


def _aim(
    name: str,
    masks: tuple[Tensor, Tensor],
    others: Mapping[str, tuple[Tensor, Tensor]],
    parents: Mapping[str, tuple[Tensor, Tensor]],
    splits: tuple[EvaluatedSplit, EvaluatedSplit],
) -> Aim:
    parent = next(
        (p for p, (mask, _) in parents.items() if p != name and not bool((masks[0] & ~mask).any())), None
    )
    made = [
        axis_target(
            splits[side],
            masks[side],
            {other: pair[side] for other, pair in others.items() if other != name},
            name=name,
            parent=None if parent is None else parents[parent][side],
        )
        for side in (0, 1)
    ]
    cut = {p: (pair[0].numpy(), pair[1].numpy()) for p, pair in others.items()}
    return Aim(made[0], made[1], parent, cut)


def _cluster_masks(
    run: Run, search: EvaluatedSplit, unseen: EvaluatedSplit, found: Found
) -> dict[str, tuple[Tensor, Tensor]]:
    """Clusters on the tokens of the search, and by their rules on unseen ones; empty without features."""
    if not search.tokens.features:
        return {}
    rules = {
        name: fit_rule(search.tokens, mask, seed=run.config.seed) for name, mask in found.clusters.items()
    }
    return {
        f"found {name}": (mask, rules[name].assign(unseen.tokens)) for name, mask in found.clusters.items()
    }


def null_pools(
    aims: Sequence[Aim], search: EvaluatedSplit, judge: EvaluatedSplit, count: int, *, seed: int
) -> list[tuple[list[int], list[tuple[AxisTarget, AxisTarget]]]]:
    """Null sets, each list with the numbers of the targets that it serves.

    Targets of about one size that cut across the same parents share their null sets.

    Args:
        aims: targets; ``unseen`` must be on the tokens of ``judge``.
        search: tokens of the search.
        judge: tokens on which null sets are judged.
        count: sets a pool.
        seed: of the sets.
    """
    if not search.tokens.features or count == 0:
        return []
    served: list[list[int]] = []
    for number in sorted(range(len(aims)), key=lambda i: int(aims[i].search.members.sum())):
        aim = aims[number]
        size = int(aim.search.members.sum())
        for pool in served:
            first = aims[pool[0]]
            alike = not (first.inside or aim.inside) and set(first.parents) == set(aim.parents)
            if alike and size <= SIZES * int(first.search.members.sum()):
                pool.append(number)
                break
        else:
            served.append([number])
    pools = []
    for pool in served:
        like = aims[pool[len(pool) // 2]]
        pair = (like.search, like.unseen)
        pools.append((pool, null_sets(search, judge, pair, like.parents, count, seed=seed)))
    return pools


def first_sequences(split: EvaluatedSplit, count: int) -> tuple[EvaluatedSplit, Bits]:
    """The same movement on the first sequences, and which tokens these are."""
    tokens = split.tokens
    rows = torch.arange(min(count, tokens.sequences))
    kept = torch.isin(tokens.sequence_of, rows)
    return split.on(tokens.select(rows)), np.asarray(kept.numpy())
