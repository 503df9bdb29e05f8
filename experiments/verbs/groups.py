"""Token groups from a file, for verbs that judge groups: ``--groups FILE``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.run.run import Run, Say
from polca_edit.artifacts import checksum
from polca_edit.clusters.membership import fit_rule
from polca_edit.tokens import TokenSet


def read_groups(file: Path) -> dict[str, Tensor]:
    """Name -> boolean mask, from ``.npz`` arrays or a JSON object of lists of true and false.

    Raises:
        ValueError: for a missing or unreadable file, or one that holds anything else.
    """
    if not file.is_file():
        raise ValueError(f"--groups must be a file, '{file}' is none; check the path")
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as held:
                values: Mapping[str, object] = {name: held[name] for name in held.files}
        else:
            values = json.loads(file.read_text())
    except Exception as error:  # zipfile and numpy fail in many ways on a damaged file
        raise ValueError(
            f"--groups must be an .npz or a JSON file, '{file}' cannot be read ({error}); write it again"
        ) from error
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"'{file}' must hold at least one group by name, it holds none; add one")
    found = {}
    for name, value in values.items():
        plain = isinstance(value, list) and all(isinstance(one, bool) for one in value)
        array = np.array(value, dtype=bool) if plain else value
        if not isinstance(array, np.ndarray) or array.dtype != np.bool_ or array.ndim != 1:
            got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "other values"
            raise ValueError(f"group '{name}' of '{file}' must be a list of true and false, got {got}")
        found[str(name)] = torch.from_numpy(array.copy())
    return found


def _require_usable(
    groups: Mapping[str, Tensor], select: int, both: int, labels: Mapping[str, Tensor]
) -> None:
    """Refuse masks of another length, without a token or with every one, and names that are taken."""
    for name, mask in groups.items():
        if len(mask) not in (select, both):
            raise ValueError(
                f"group '{name}' must have {select} values (select tokens) or {both} (select, then "
                f"evaluate), got {len(mask)}; tokens.parquet lists the select tokens"
            )
        if name in labels:
            raise ValueError(f"group '{name}' is a label of this run already; give it another name")
        if not mask[:select].any() or mask[:select].all():
            held = "none" if not mask[:select].any() else "every one"
            raise ValueError(
                f"group '{name}' must hold some of the {select} select tokens and leave some out, it holds "
                f"{held}; correct its mask"
            )


def with_groups(run: Run, file: Path | str | None, say: Say = lambda _: None) -> Run:
    """The run with the groups of a file among its labels; itself without a file.

    A mask over the select tokens (the rows of tokens.parquet) is carried to other tokens by a rule on input
    features; one over the select and then the evaluate tokens is taken as it is, and judged there.

    Args:
        run: an open run.
        file: see :func:`read_groups`.
        say: told how well each rule finds its group on held-out sequences.

    Raises:
        ValueError: for masks of another length, names that are labels already, or tokens without features.
    """
    if file is None:
        return run
    splits, task, seed = run.task.splits, run.task, run.config.seed
    select, both = splits.select.count, splits.select.count + splits.evaluate.count
    groups = read_groups(Path(file))
    _require_usable(groups, select, both, splits.select.skills)
    rules = {}
    for name, mask in groups.items():
        if len(mask) == select:
            rules[name] = fit_rule(splits.select, mask, seed=seed)
            say(
                f"  group {name}: carried to other tokens by rule, AUC {rules[name].auc:.2f} on held-out ones"
            )

    def carried(tokens: TokenSet) -> TokenSet:
        more = {name: rule.assign(tokens) for name, rule in rules.items()}
        return replace(tokens, skills={**tokens.skills, **more})

    on_select = {name: mask[:select] for name, mask in groups.items()}
    exact = {name: mask[select:] for name, mask in groups.items() if name not in rules}
    chosen = replace(splits.select, skills={**splits.select.skills, **on_select})
    judged = carried(splits.evaluate)
    judged = replace(judged, skills={**judged.skills, **exact})
    unseen, fresh = task.unseen, task.fresh
    if exact:
        say(f"  groups {sorted(exact)} are known on select and evaluate alone: judged on the evaluate split")
    task = replace(
        task,
        splits=replace(splits, select=chosen, evaluate=judged),
        unseen=None if exact or unseen is None else lambda *given, **named: carried(unseen(*given, **named)),
        fresh=None if exact or fresh is None else lambda *given: carried(fresh(*given)),
        partition=None,
    )
    return replace(run, task=task, groups=checksum(Path(file)))
