"""Testbeds T7-T9: small trained networks with a planted answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

from experiments.planted_base import (
    BedResult,
    Check,
    Finding,
    Landscape,
    World,
    assess,
    at_least,
    at_most,
    bed_result,
    holds,
    landscape_subject,
    make_pair,
    sequences_of,
    slot_groups,
    within,
    worst,
)
from interventions import blocking, edits
from interventions.blocking import BranchPoint, Curve, Hold
from interventions.evidence import combine
from interventions.localise import share_on
from interventions.protocol import PlanSettings, attributed_losses
from interventions.verdict import BlockingResult, decide
from polca_edit.curvature import orthonormalise
from polca_edit.parameters import ParameterSpace
from polca_edit.training import TrainingSettings, train

WIDTH, INPUTS, CLASSES = 16, 10, 4
BLOCK = WIDTH * INPUTS + WIDTH + CLASSES * WIDTH


@dataclass(frozen=True)
class TrainedPath:
    """Weights of a small network over training, its module, and its batches."""

    module: Landscape
    thetas: list[Tensor]
    space: ParameterSpace
    settings: TrainingSettings
    batch_loss: Callable[[nn.Module, int], Tensor]
    measure: Callable[[nn.Module], dict[str, float]]

    def arm(self, name: str, seed: int, hold: Hold | None) -> Curve:
        """The same training again, with or without a block, from the first step."""
        start = BranchPoint(0, self.thetas[0], {})
        return blocking.run_arm(
            self.module,
            self.space,
            self.batch_loss,
            self.settings,
            start,
            self.settings.steps,
            self.measure,
            arm=name,
            branch=seed,
            hold=hold,
            every=max(1, self.settings.steps // 15),
        )


def train_path(
    losses: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    batches: Callable[[int], Tensor],
    names: Sequence[str],
    held_out: Tensor,
    *,
    steps: int,
    rate: float,
    decay: float,
    every: int,
) -> TrainedPath:
    """Train a landscape with AdamW and keep its weights every few steps."""
    module = Landscape(start, losses)
    space = ParameterSpace.from_module(module)
    settings = TrainingSettings(steps, rate, decay, (0.9, 0.95), warmup=0)

    def batch_loss(trained: nn.Module, step: int) -> Tensor:
        found: Tensor = trained(batches(step))
        return found.mean()

    def measure(trained: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            found = trained(held_out).mean(0)
        return {name: float(value) for name, value in zip(names, found, strict=True)}

    thetas = [start.clone()]

    def keep(step: int, trained: nn.Module, _: torch.optim.Optimizer) -> None:
        if step % every == 0:
            thetas.append(space.read(trained))

    train(module, batch_loss, settings, after_step=keep)
    return TrainedPath(module, thetas, space, settings, batch_loss, measure)


def block_rows(thetas: Sequence[Tensor], blocks: Sequence[slice], further: int) -> Tensor:
    """Rows: every block's unit net displacement, then ``further`` more directions of its path per block."""
    net: list[Tensor] = []
    more: list[Tensor] = []
    for block in blocks:
        path = torch.stack([t[block] - thetas[0][block] for t in thetas[1:]])
        frame = orthonormalise(
            torch.cat([path[-1:], torch.linalg.svd(path, full_matrices=False)[2][: further + 2]])
        )
        for index, part in enumerate(frame[: further + 1]):
            row = torch.zeros_like(thetas[0])
            row[block] = part
            (net if index == 0 else more).append(row)
    return torch.stack(net + more)


# -- T8: two tasks in two blocks -------------------------------------------------------------------


def block_logits(theta: Tensor, x: Tensor, block: slice) -> Tensor:
    """(B, CLASSES) logits of one two-layer block."""
    part = theta[block]
    first = part[: WIDTH * INPUTS].view(WIDTH, INPUTS)
    bias = part[WIDTH * INPUTS : WIDTH * INPUTS + WIDTH]
    readout = part[-CLASSES * WIDTH :].view(CLASSES, WIDTH)
    return torch.tanh(x @ first.T + bias) @ readout.T


def _task_data(count: int, seed: int, teachers: Tensor) -> Tensor:
    """(count, INPUTS + 2): inputs and the class of either task, by fixed teachers."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, INPUTS, generator=g, dtype=torch.float64)
    labels = torch.stack([(x @ teacher.T).argmax(1) for teacher in teachers], dim=1)
    return torch.cat([x, labels.double()], dim=1)


def _cross_entropies(logits: Sequence[Tensor], inputs: Tensor) -> Tensor:
    parts = []
    for task, values in enumerate(logits):
        labels = inputs[:, INPUTS + task].long()
        parts.append(-values.log_softmax(1).gather(1, labels[:, None])[:, 0])
    return torch.stack(parts, dim=1)


def two_block_losses(theta: Tensor, inputs: Tensor) -> Tensor:
    """Task A reads block A, task B reads block B."""
    x = inputs[:, :INPUTS]
    return _cross_entropies(
        [block_logits(theta, x, slice(t * BLOCK, (t + 1) * BLOCK)) for t in (0, 1)], inputs
    )


def shared_losses(theta: Tensor, inputs: Tensor) -> Tensor:
    """Both tasks read one trunk; each has its own readout (the trunk comes first)."""
    x = inputs[:, :INPUTS]
    trunk = theta[: WIDTH * INPUTS].view(WIDTH, INPUTS)
    hidden = torch.tanh(x @ trunk.T)
    heads = theta[WIDTH * INPUTS :].view(2, CLASSES, WIDTH)
    return _cross_entropies([hidden @ heads[0].T, hidden @ heads[1].T], inputs)


def two_task_path(seed: int, *, shared: bool) -> tuple[TrainedPath, Tensor]:
    """A trained two-task network and its teachers."""
    g = torch.Generator().manual_seed(800 + seed)
    teachers = torch.randn(2, CLASSES, INPUTS, generator=g, dtype=torch.float64)
    data = _task_data(512, 8000 + seed, teachers)
    size = WIDTH * INPUTS + 2 * CLASSES * WIDTH if shared else 2 * BLOCK
    start = torch.zeros(size, dtype=torch.float64)
    for block in (
        [slice(0, WIDTH * INPUTS)]
        if shared
        else [slice(t * BLOCK, t * BLOCK + WIDTH * INPUTS) for t in (0, 1)]
    ):
        start[block] = torch.randn(WIDTH * INPUTS, generator=g, dtype=torch.float64) / math.sqrt(INPUTS)
    if shared:  # a trunk has no gradient behind a zero readout
        start[WIDTH * INPUTS :] = torch.randn(2 * CLASSES * WIDTH, generator=g, dtype=torch.float64) / 4
    losses = shared_losses if shared else two_block_losses
    held_out = _task_data(200, 9000 + seed, teachers)
    path = train_path(
        losses, start, lambda step: data, ("A", "B"), held_out, steps=150, rate=0.02, decay=0.01, every=10
    )
    return path, teachers


def two_task_world(seed: int, *, shared: bool, paths: dict[int, TrainedPath]) -> World:
    """T8 (two blocks) or T8' (one trunk)."""
    path, teachers = two_task_path(seed, shared=shared)
    paths[seed] = path
    blocks = [slice(0, WIDTH * INPUTS)] if shared else [slice(0, BLOCK), slice(BLOCK, 2 * BLOCK)]
    if shared:
        blocks.append(slice(WIDTH * INPUTS, len(path.thetas[0])))
    rows = block_rows(path.thetas, blocks, 4)
    count = 1600 if shared else 120  # enough documents for the power gate
    select = sequences_of(count, 2, inputs=_task_data(count, 10_000 + seed, teachers))
    evaluate = sequences_of(count, 2, first=count, inputs=_task_data(count, 20_000 + seed, teachers))
    groups = slot_groups(select, ("A", "B")), slot_groups(evaluate, ("A", "B"))
    subject = landscape_subject(
        two_block_losses if not shared else shared_losses, path.thetas, rows, select, evaluate, uniform=False
    )
    pairs = [make_pair("trunk" if shared else "A", (0,), "A", *groups)]
    if not shared:
        pairs += [
            make_pair("B", (1,), "B", *groups),
            make_pair("A, block set", (0, 2, 3, 4, 5), "A", *groups),
        ]
    return World(subject, tuple(pairs), *groups)


def blocked_arms(
    paths: dict[int, TrainedPath], block: slice, other: slice
) -> tuple[BlockingResult, list[list[Curve]]]:
    """Free, blocked (all coordinates of a block) and sham (all of the other block) arms per seed."""
    arms: list[list[Curve]] = [[], [], []]
    for seed, path in paths.items():
        size = len(path.thetas[0])
        for index, part in enumerate((None, block, other)):
            mask = torch.zeros(size, dtype=torch.bool)
            hold = None
            if part is not None:
                mask[part] = True
                hold = Hold(path.space, path.thetas[0], mask=mask)
            arms[index].append(path.arm(("none", "block", "sham")[index], seed, hold))
    result = blocking.compare_arms(
        arms[0], arms[1], [[s] for s in arms[2]], "A", ["B"], margin=0.01, generator=np.random.default_rng(0)
    )
    return result, arms


def bed_t8(settings: PlanSettings) -> list[BedResult]:
    """T8: two blocks, and T8' with a shared trunk."""
    paths: dict[int, TrainedPath] = {}
    found = assess(lambda seed: two_task_world(seed, shared=False, paths=paths), settings)
    result, arms = blocked_arms(paths, slice(0, BLOCK), slice(BLOCK, 2 * BLOCK))
    session = found["A"].sessions[0]
    edit = session.undo((0,))
    edited = edit.apply(session.theta)
    x = session.evaluate.tokens.inputs[:, :INPUTS]
    same = torch.equal(
        block_logits(edited, x, slice(BLOCK, 2 * BLOCK)),
        block_logits(session.theta, x, slice(BLOCK, 2 * BLOCK)),
    )
    back = block_logits(edited, x, slice(0, BLOCK)) - block_logits(session.reference, x, slice(0, BLOCK))
    masks = session.evaluate.tokens.position_of.numpy() == 0
    moved = edits.transplant(session.reference, session.theta, session.rows((0,)))
    restored = session.evaluate.loss(moved.apply(session.reference))[masks].mean()
    single = [
        paths[s].arm("b_A", s, Hold(paths[s].space, paths[s].thetas[0], rows=session.rows((0,))))
        for s in (0,)
    ]
    block_a = torch.zeros(len(session.theta), dtype=torch.bool)
    block_a[:BLOCK] = True
    checks = (
        holds("B logits identical bit for bit", same),
        at_most("|A logits - initial|", float(back.abs().max()), 1e-10),
        at_most(
            "|L_A - ln K|", abs(float(session.evaluate.loss(edited)[masks].mean()) - math.log(CLASSES)), 1e-9
        ),
        at_most("|L_A restored by O4 - final|", abs(restored - session.evaluate.before[masks].mean()), 1e-6),
        holds("crossover", all(e.crossover for e in found["A"].evidence)),
        holds("grades S and X", "+S" in found["A"].verdict.grade and "+X" in found["A"].verdict.grade),
        holds("no grade D without blocking", "+D" not in found["A"].verdict.grade),
        at_least(
            "localisation on block A",
            share_on(session, edit, masks, {"A": block_a, "B": ~block_a})["A"],
            0.95,
        ),
        holds("a held direction stays put", all(c.held for c in single)),
    )
    with_block = [replace(e, blocking=result) for e in found["A, block set"].evidence]
    inputs = combine(with_block, stop_after=settings.stop_after, seed=settings.seed)
    verdict = decide(inputs, settings.thresholds)
    block_finding = Finding(verdict, inputs, tuple(with_block))
    level = worst([c.losses["A"] - math.log(CLASSES) for c in arms[1]])
    block_checks = (
        holds(
            "blocking block A leaves B's curve bitwise",
            all(np.array_equal(f.losses["B"], b.losses["B"]) for f, b in zip(arms[0], arms[1], strict=True)),
        ),
        at_most("|L_A - ln K| throughout", level, 1e-9),
        holds("every block held", result.held),
        holds("grades S, D and X", all(g in verdict.grade for g in ("+S", "+D", "+X"))),
    )
    shared: dict[int, TrainedPath] = {}
    trunk = assess(lambda seed: two_task_world(seed, shared=True, paths=shared), settings)["trunk"]
    n_a, n_b = trunk.inputs.share, trunk.inputs.others["B"].share
    near = abs(n_a - n_b) <= 0.2 * max(abs(n_a), abs(n_b)) or min(n_a, n_b) >= 0.3
    return [
        bed_result("T8", "A", "causal", found["A"], checks, "always_causal"),
        bed_result("T8", "B", "causal", found["B"], gate="always_causal"),
        bed_result("T8", "A, block set", "causal", block_finding, block_checks, "always_causal"),
        bed_result(
            "T8'", "shared trunk", "not_selective", trunk, (holds("n_A and n_B alike", near),), "never_causal"
        ),
    ]


# -- T9: sparse parities in disjoint units -----------------------------------------------------------

BITS, TASKS, UNITS = 20, 6, 48
PARITY_BLOCK = UNITS * BITS + 2 * UNITS


def parity_logits(theta: Tensor, x: Tensor) -> Tensor:
    """(B, TASKS) logits; task i reads its own block of hidden units."""
    part = theta.view(TASKS, PARITY_BLOCK)
    first = part[:, : UNITS * BITS].reshape(TASKS, UNITS, BITS)
    bias = part[:, UNITS * BITS : UNITS * (BITS + 1)]
    readout = part[:, UNITS * (BITS + 1) :]
    hidden = torch.relu(torch.einsum("tub,nb->ntu", first, x) + bias)
    return torch.einsum("ntu,tu->nt", hidden, readout)


def parity_data(count: int, seed: int, subsets: Tensor) -> Tensor:
    """(count, BITS + TASKS): bits as +-1 and the parity of every task's three bits as +-1."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 2, (count, BITS), generator=g) * 2.0 - 1.0
    parity = torch.stack([x[:, subset].prod(1) for subset in subsets], dim=1)
    return torch.cat([x, parity], dim=1)


def parity_losses(theta: Tensor, inputs: Tensor) -> Tensor:
    """(B, TASKS) logistic losses."""
    return nn.functional.softplus(-inputs[:, BITS:] * parity_logits(theta, inputs[:, :BITS]))


def parity_path(seed: int) -> tuple[TrainedPath, Tensor]:
    """Train all blocks; task i has weight (i + 1)^-1, which an elementwise optimiser only rescales."""
    g = torch.Generator().manual_seed(900 + seed)
    subsets = torch.stack([torch.randperm(BITS, generator=g)[:3] for _ in range(TASKS)])
    start = torch.zeros(TASKS, PARITY_BLOCK)
    start[:, : UNITS * BITS] = torch.randn(TASKS, UNITS * BITS, generator=g) / math.sqrt(BITS)
    frequency = 1.0 / torch.arange(1, TASKS + 1)

    def weighted(theta: Tensor, inputs: Tensor) -> Tensor:
        return parity_losses(theta, inputs) * frequency

    path = train_path(
        weighted,
        start.flatten(),
        lambda step: parity_data(256, 1_000_003 * (seed + 1) + step, subsets),
        [f"task{i}" for i in range(TASKS)],
        parity_data(500, 77 + seed, subsets),
        steps=PARITY_STEPS,
        rate=0.01,
        decay=0.0,
        every=PARITY_STEPS // 15,
    )
    return path, subsets


PARITY_STEPS = 450


def parity_world(seed: int, paths: dict[int, tuple[TrainedPath, Tensor]]) -> World:
    """T9 with the true blocks, and two of them mixed at 45 degrees as further vectors."""
    path, subsets = parity_path(seed)
    paths[seed] = path, subsets
    blocks = [slice(i * PARITY_BLOCK, (i + 1) * PARITY_BLOCK) for i in range(TASKS)]
    rows = block_rows(path.thetas, blocks, 1)
    names = tuple(f"task{i}" for i in range(TASKS))
    select = sequences_of(40, TASKS, inputs=parity_data(40, 50_000 + seed, subsets))
    evaluate = sequences_of(40, TASKS, first=40, inputs=parity_data(40, 60_000 + seed, subsets))
    groups = slot_groups(select, names), slot_groups(evaluate, names)
    subject = landscape_subject(parity_losses, path.thetas, rows, select, evaluate, uniform=False)
    pairs = tuple(make_pair(names[i], (i,), names[i], *groups) for i in (0, 3))
    return World(subject, pairs, *groups)


def mixed_world(seed: int, paths: dict[int, tuple[TrainedPath, Tensor]]) -> World:
    """The same network with b1, b2 replaced by (b1 + b2) / sqrt 2 and (b1 - b2) / sqrt 2."""
    path, subsets = paths[seed]
    blocks = [slice(i * PARITY_BLOCK, (i + 1) * PARITY_BLOCK) for i in range(TASKS)]
    rows = block_rows(path.thetas, blocks, 1)
    first, second = rows[0].clone(), rows[1].clone()
    rows[0], rows[1] = (first + second) / math.sqrt(2), (first - second) / math.sqrt(2)
    names = tuple(f"task{i}" for i in range(TASKS))
    select = sequences_of(40, TASKS, inputs=parity_data(40, 50_000 + seed, subsets))
    evaluate = sequences_of(40, TASKS, first=40, inputs=parity_data(40, 60_000 + seed, subsets))
    groups = slot_groups(select, names), slot_groups(evaluate, names)
    subject = landscape_subject(parity_losses, path.thetas, rows, select, evaluate, uniform=False)
    return World(subject, (make_pair("mixed", (0,), "task0", *groups),), *groups)


def bed_t9(settings: PlanSettings) -> list[BedResult]:
    """T9: parities whose blocks are known, true and mixed."""
    paths: dict[int, tuple[TrainedPath, Tensor]] = {}
    found = assess(lambda seed: parity_world(seed, paths), settings)
    mixed = assess(lambda seed: mixed_world(seed, paths), settings)["mixed"]
    results = []
    for name, finding in found.items():
        checks = _parity_checks(int(name[4:]), finding, paths)
        if name == "task0":
            checks += [
                *_parity_blocking(paths),
                at_least("ARI of tasks from attributions", _recovery(finding), 0.9),
            ]
        results.append(bed_result("T9", name, "causal", finding, checks, "always_causal"))
    session = mixed.sessions[0]
    both = session.evaluate.loss(session.undo((0, 1)).apply(session.theta))
    slots = session.evaluate.tokens.position_of.numpy()
    group = worst([both[slots == i].mean() - math.log(2) for i in (0, 1)])
    results.append(
        bed_result(
            "T9",
            "mixed at 45 degrees",
            "not_selective",
            mixed,
            (at_most("group {1, 2} necessary: |L - ln 2|", group, 0.01),),
        )
    )
    return results


def _parity_checks(task: int, finding: Finding, paths: dict[int, tuple[TrainedPath, Tensor]]) -> list[Check]:
    checks = []
    accuracy, after, loss, others = [], [], [], []
    for seed, session in enumerate(finding.sessions):
        data = parity_data(4000, 70_000 + seed, paths[seed][1])
        edited = session.undo((task,)).apply(session.theta)
        with torch.no_grad():
            right = data[:, BITS:] > 0
            accuracy.append(
                float(((parity_logits(session.theta, data[:, :BITS]) > 0) == right)[:, task].double().mean())
            )
            after.append(
                float(((parity_logits(edited, data[:, :BITS]) > 0) == right)[:, task].double().mean())
            )
            change = parity_losses(edited, data) - parity_losses(session.theta, data)
            loss.append(float(parity_losses(edited, data)[:, task].mean()))
        others.append(float(np.delete(change.abs().max(0).values.numpy(), task).max()))
    checks = [
        at_least("trained: smallest accuracy over seeds", min(accuracy), 0.99),
        within("accuracy after O1, farthest from .5", max(after, key=lambda v: abs(v - 0.5)), 0.47, 0.53),
        at_most("|loss after O1 - ln 2|", worst(np.array(loss) - math.log(2)), 0.01),
        at_most("other tasks' change", max(others), 1e-6),
    ]
    return checks


def _parity_blocking(paths: dict[int, tuple[TrainedPath, Tensor]]) -> list[Check]:
    """One seed trained again with all coordinates of block 0 held."""
    path = paths[0][0]
    mask = torch.zeros(len(path.thetas[0]), dtype=torch.bool)
    mask[:PARITY_BLOCK] = True
    free, blocked = (
        path.arm("none", 0, None),
        path.arm("block", 0, Hold(path.space, path.thetas[0], mask=mask)),
    )
    same = all(np.array_equal(free.losses[f"task{i}"], blocked.losses[f"task{i}"]) for i in range(1, TASKS))
    return [
        at_most("|blocked task - ln 2| throughout", worst(blocked.losses["task0"] - math.log(2)), 0.02),
        holds("other tasks' curves bitwise the same", same),
    ]


def _recovery(finding: Finding) -> float:
    """Agreement of 'along which true block did the loss fall most' with the task of each token.

    As in the paper's pipeline, tokens whose projected loss rises along every block are left out.
    """
    session = finding.sessions[0]
    tokens = session.evaluate.tokens
    attributed = attributed_losses(session, range(TASKS), tokens)
    kept = attributed.min(0) < 0
    return float(adjusted_rand_score(tokens.position_of.numpy()[kept], attributed.argmin(0)[kept]))
