"""Which pairs of a run are tested: everything that is decided on the select split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load_file

from experiments.run.run import Run
from experiments.run.stages.clusters import load_observation
from experiments.run.stages.damage import evaluated
from interventions.causal.hypotheses import skill_hypotheses
from interventions.causal.statistics import capped
from interventions.damage import EvaluatedSplit
from interventions.edits import project_out
from polca_edit.allocation.allocate import Projections
from polca_edit.artifacts import load_record
from polca_edit.basis.record import Basis
from polca_edit.clusters.hypotheses import Hypothesis
from polca_edit.observation import Observation, analyse
from polca_edit.tokens import TokenSet


@dataclass(frozen=True, eq=False)
class Chosen:
    """One basis of one run, ready to be tested.

    Attributes:
        label: of the basis.
        pairs: of every family.
        observation: on select, so that rotated bases can be observed anew.
    """

    label: str
    pairs: tuple[Hypothesis, ...]
    observation: Observation


def choose(run: Run, label: str, *, least: int, window: tuple[int, int] | None = None) -> Chosen:
    """POLCA's own pairs, and every known skill with the vector that costs it most on select.

    Args:
        run: with finished stages.
        label: of the basis.
        least: tokens that a group must have.
        window: of the movement that is undone.
    """
    basis = load_record(Basis, run.directory.basis(label))
    projections = load_record(Projections, run.directory.projections(label))
    seen = analyse(projections, run.task.splits.select, run.settings(), basis=basis)
    pairs = [*seen.hypotheses(label, least=least, seed=run.config.seed)]
    skills = {n: m for n, m in run.task.splits.select.skills.items() if int(m.sum()) >= least}
    if skills:
        shares = select_shares(run, label, basis, skills, window)
        pairs += skill_hypotheses(shares, basis, basis_name=label)
    return Chosen(label, tuple(pairs), seen)


def select_shares(
    run: Run,
    label: str,
    basis: Basis,
    skills: dict[str, torch.Tensor],
    window: tuple[int, int] | None,
) -> dict[str, list[float]]:
    """Skill -> share of its headroom that undoing each vector costs on select."""
    split = split_of(run, run.task.splits.select, window)
    room = split.headroom.double().numpy()
    kept = run.directory.token_damage(label)
    if window is None and kept.exists():
        changes = load_file(kept)["damage"].double().numpy()
    else:
        changes = split.changes(project_out(split, row) for row in basis.rows).numpy()
    lost, positive = np.stack([capped(change, room) for change in changes]), np.maximum(room, 0.0)
    found = {}
    for name, mask in skills.items():
        inside = mask.numpy()
        total = float(positive[inside].sum())
        found[name] = [float(row[inside].sum()) / total if total > 0 else float("nan") for row in lost]
    return found


def split_of(run: Run, tokens: TokenSet, window: tuple[int, int] | None = None) -> EvaluatedSplit:
    """The run's movement, or that of a window, on some tokens."""
    split = evaluated(run, tokens)
    return (
        split if window is None else EvaluatedSplit(split.loss, split.series, tokens, window, split.reference)
    )


def unseen_tokens(run: Run, sequences: int) -> TokenSet:
    """Tokens that nothing has used, or the evaluate split where none are asked for.

    Raises:
        ValueError: where the task cannot draw tokens anew.
    """
    if sequences == 0:
        return run.task.splits.evaluate
    if run.task.unseen is None:
        raise ValueError(
            f"task '{run.task.name}' cannot draw unseen tokens; use --unseen 0 for its evaluate split"
        )
    return run.task.unseen(sequences, run.config.seed)


def parents_of(run: Run, tokens: TokenSet) -> dict[str, torch.Tensor]:
    """The partition that the task names, empty where it names none."""
    return {name: tokens.skills[name] for name in run.task.parents}


def same_pairs(chosen: Sequence[tuple[Run, Chosen]]) -> dict[tuple[int, str], str]:
    """(run number, pair name) -> name over runs, for clusters that several runs describe alike.

    Skills are matched by name. Clusters of a basis in two runs are the same pair where their rules pick
    the same tokens of the first run's select split (Jaccard index of at least a half).
    """
    names: dict[tuple[int, str], str] = {}
    groups: list[tuple[str, str, torch.Tensor]] = []
    tokens = chosen[0][0].task.splits.select
    for number, (_, one) in enumerate(chosen):
        taken: set[str] = set()
        for pair in one.pairs:
            if pair.family == "skill":
                names[number, pair.name] = f"{pair.basis} | {pair.group.name}"
                continue
            members = pair.group.on(tokens)
            alike = [
                (jaccard(members, other), name)
                for basis, name, other in groups
                if basis == pair.basis and name not in taken
            ]
            best = max(alike, default=(0.0, ""))
            name = best[1] if best[0] >= 0.5 else f"{pair.name} of seed {one_seed(chosen[number][0])}"
            if best[0] < 0.5:
                groups.append((pair.basis, name, members))
            taken.add(name)
            names[number, pair.name] = name
    return names


def one_seed(run: Run) -> int:
    """Seed of a run."""
    return run.config.seed


def jaccard(a: torch.Tensor, b: torch.Tensor) -> float:
    """Common members over members of either."""
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 0.0


__all__ = ["Chosen", "choose", "load_observation", "parents_of", "same_pairs", "split_of", "unseen_tokens"]
