"""Which pairs of a run are tested: everything that is decided on the select split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors.torch import load_file

from experiments.config import BasisConfig
from experiments.discover.stages import load_found
from experiments.run.keys import signature_names
from experiments.run.run import Run
from experiments.run.stages.clusters import load_observation
from experiments.run.stages.damage import evaluated
from interventions.causal.hypotheses import hardest_hit
from interventions.causal.statistics import capped
from interventions.damage import EvaluatedSplit
from interventions.edits import project_out
from polca_edit.allocation.allocate import Projections
from polca_edit.allocation.terms import projections_within
from polca_edit.artifacts import load_record
from polca_edit.basis.record import Basis
from polca_edit.clusters.hypotheses import Hypothesis, TokenGroup, Unchosen
from polca_edit.clusters.names import name_group
from polca_edit.observation import Observation, analyse
from polca_edit.tokens import TokenSet


@dataclass(frozen=True, eq=False)
class Chosen:
    """One basis of one run, ready to be tested.

    Attributes:
        label: of the basis.
        pairs: of every family.
        observation: on select, so that rotated bases can be observed anew; None without projections.
        left: groups without a pair, and why.
    """

    label: str
    pairs: tuple[Hypothesis, ...]
    observation: Observation | None
    left: tuple[Unchosen, ...] = ()


def choose(run: Run, label: str, *, least: int, window: tuple[int, int] | None = None) -> Chosen:
    """Three families of pairs, all decided on select.

    POLCA's clusters with their own vectors; interventional clusters, and known skills, each with the
    vector that costs it most. Where the run has no projections of the basis, which take derivatives, the
    first family is left out: the others need forward passes alone.

    Args:
        run: with finished stages.
        label: of the basis.
        least: tokens that a group must have.
        window: of the movement that is undone; clusters are those of its own checkpoints.

    Raises:
        ValueError: for a window that was not recorded, or in which nothing was discovered.
    """
    basis = load_record(Basis, run.directory.basis(label))
    if window is not None:
        run.observed(window)  # refuses one that was not recorded
    tokens = run.task.splits.select
    seen = observed(run, label, basis, window)
    pairs = [] if seen is None else [*seen.hypotheses(label, least=least, seed=run.config.seed)]
    left = [without_projections(label)] if seen is None else [*_unchosen(seen, label, least)]
    groups: dict[str, dict[str, torch.Tensor]] = {
        "interventional": _found_clusters(run, label, window),
        "skill": dict(tokens.skills),
    }
    wanted = {name: mask for found in groups.values() for name, mask in found.items()}
    small = {name for name, mask in wanted.items() if int(mask.sum()) < least}
    left += [Unchosen(f"{label} | {n}", f"fewer than {least} select tokens") for n in sorted(small)]
    wanted = {name: mask for name, mask in wanted.items() if name not in small}
    shares = select_shares(run, label, basis, wanted, window) if wanted else {}
    for family, found in groups.items():
        names = [name for name in found if name in wanted]
        made = {name: _group(run, family, name, found[name]) for name in names}
        numbers = {name: int(name.partition(":")[2]) for name in names if family == "interventional"}
        lost = {name: shares[name] for name in names}
        pairs += hardest_hit(lost, made, basis, basis_name=label, family=family, clusters=numbers)
    span = _unturned(run, label)
    if span is not None:
        pairs = [replace(pair, span=span.rows) for pair in pairs]
    return Chosen(label, tuple(pairs), seen, tuple(left))


def _unturned(run: Run, label: str) -> Basis | None:
    """The run's basis that this one is a rotation of: they share the directions of their span."""
    specs = {spec.label: spec for spec in run.config.bases}
    own = specs[label]
    if not own.rotated:
        return None
    plain = (s.label for s in specs.values() if not s.rotated and s.span() == own.span())
    found = next(plain, None)
    return None if found is None else load_record(Basis, run.directory.basis(found))


def without_projections(label: str) -> Unchosen:
    """Why a basis has no pair of POLCA's own."""
    return Unchosen(label, "no projections along it: POLCA's own clusters are left out")


def has_projections(run: Run, label: str) -> bool:
    """Whether derivatives along a basis were taken in this run, under its settings."""
    stage = f"basis:{label}" if _spec(run, label).rotated else "projections"
    return run.directory.finished(stage, run.key(stage)) and run.directory.projections(label).exists()


def observed(run: Run, label: str, basis: Basis, window: tuple[int, int] | None) -> Observation | None:
    """What POLCA sees along a basis on select, None where no derivatives were taken along it."""
    if not has_projections(run, label):
        return None
    stored = load_record(Projections, run.directory.projections(label))
    projections = projections_within(stored, window)
    return analyse(projections, run.task.splits.select, run.settings(), basis=basis)


def _spec(run: Run, label: str) -> BasisConfig:
    return next(spec for spec in run.config.bases if spec.label == label)


def clusters_stage(run: Run, label: str, window: tuple[int, int] | None) -> str | None:
    """Signatures whose clusters are tested: of all bases together, or of the tested one alone.

    The latter are taken where ``discover --basis`` drew for one basis; None where a run draws none.
    """
    names = signature_names(run.config, window)
    alone = signature_names(run.config, window, (label,))
    if not names or not run.task.splits.select.features:
        return None
    wanted = [f"signatures:{name}" for name in dict.fromkeys((names[-1], alone[-1]))]
    return next((stage for stage in wanted if run.directory.finished(stage, run.key(stage))), wanted[0])


def _found_clusters(run: Run, label: str, window: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    """Interventional clusters of the last signature stage of the run or window; none without such a stage.

    Raises:
        ValueError: where nothing was discovered yet: clusters of the whole run are not those of a window.
    """
    stage = clusters_stage(run, label, window)
    if stage is None:
        return {}
    if not run.directory.finished(stage, run.key(stage)):
        where, option = "of the run", ""
        if window is not None:
            steps = f"{window[0]}:{window[1]}"
            where, option = f"of steps {steps}", f" --window {steps}"
        raise ValueError(
            f"clusters {where} must be found before they are tested; run polca-edit discover "
            f"{run.directory.path}{option} first"
        )
    found = load_found(run, stage.partition(":")[2])
    return {f"found:{name}": mask for name, mask in found.clusters.items()}


def _group(run: Run, family: str, name: str, members: torch.Tensor) -> TokenGroup:
    if family == "skill":
        return TokenGroup(name, skill=name)
    return name_group(run.task.splits.select, members, name, seed=run.config.seed)


def _unchosen(seen: Observation, label: str, least: int) -> Iterator[Unchosen]:
    """POLCA's vectors and clusters that make no pair."""
    for found in seen.clusters:
        vector = f"{label} {found.vector}"
        if not found.kept:
            yield Unchosen(vector, "mean projected loss rises along it (the paper's filter)")
            continue
        if found.count == 0:
            yield Unchosen(vector, "no token cluster on this vector")
        for cluster in range(found.count):
            size = int(found.members(cluster).sum())
            if size < least:
                yield Unchosen(f"{vector}:{cluster}", f"{size} select tokens, {least} are asked for")


def select_shares(
    run: Run,
    label: str,
    basis: Basis,
    groups: dict[str, torch.Tensor],
    window: tuple[int, int] | None,
) -> dict[str, list[float]]:
    """Group -> share of its headroom that undoing each vector costs on select."""
    split = split_of(run, run.task.splits.select, window)
    room = split.headroom.double().numpy()
    kept = run.directory.token_damage(label)
    if window is None and kept.exists():
        changes = load_file(kept)["damage"].double().numpy()
    else:
        changes = split.changes(project_out(split, basis[v].rows) for v in range(len(basis))).numpy()
    lost, positive = np.stack([capped(change, room) for change in changes]), np.maximum(room, 0.0)
    found = {}
    for name, mask in groups.items():
        inside = mask.numpy()
        total = float(positive[inside].sum())
        found[name] = [float(row[inside].sum()) / total if total > 0 else float("nan") for row in lost]
    return found


def split_of(run: Run, tokens: TokenSet, window: tuple[int, int] | None = None) -> EvaluatedSplit:
    """The run's movement, or that of a window, on some tokens."""
    return evaluated(run, tokens, window)


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
    groups: list[tuple[str, str, str, torch.Tensor]] = []
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
                for family, basis, name, other in groups
                if (family, basis) == (pair.family, pair.basis) and name not in taken
            ]
            best = max(alike, default=(0.0, ""))
            name = best[1] if best[0] >= 0.5 else f"{pair.name} of seed {one_seed(chosen[number][0])}"
            if best[0] < 0.5:
                groups.append((pair.family, pair.basis, name, members))
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
