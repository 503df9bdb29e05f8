"""The measuring order of a causal test for one run: operators, controls, attribution (steps G0-G2).

A run is a :class:`Subject`; what is tested is a :class:`Pair`. Both are plain records, so planted
testbeds and recorded runs take the same path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from interventions import controls, edits, measures
from interventions.edits import Edit
from interventions.evidence import Bench, PairEvidence, effect_draws, open_bench, share_draws, tensor_mask
from interventions.measures import Target
from interventions.span_draws import SpanDraws, curve_sizes
from interventions.statistics import Array, Bits, Draws, sequence_permutation_p
from interventions.verdict import Outcome, Thresholds
from polca_edit.allocation import coordinates
from polca_edit.checkpoints import Checkpoints
from polca_edit.derivatives import Objective
from polca_edit.membership import MembershipRule
from polca_edit.tokens import TokenSet


@dataclass(frozen=True)
class PlanSettings:
    """What is done, fixed before the evaluate split is opened.

    Attributes:
        thresholds: of the verdict rule.
        match_overlap: clusters of two runs are one pair where the tokens of their rules have at least this
            Jaccard overlap.
        pairs: pairs tested per run (m).
        nulls: declared null pairs per run.
        doses: alpha grid of O2.
        draws: draws of every random control.
        stop_after: exceedances at which a control's draws stop (Besag & Clifford).
        least_draws: draws before which none stops, so that a study of several runs, where the shortest
            null counts, can still reach the level.
        rotations: reference bases rotated inside the span (c7).
        random_bases: reference bases of random directions (c7).
        shuffled_bases: Hessian bases from a shuffled order of the checkpoints (c7).
        reference_intervals: random and shuffled reference bases are measured on at most this many intervals.
        gradient_draws: draws of c6.
        transplant_draws: draws per family for the sufficiency share.
        shuffle_draws: label shuffles (c8).
        resamples: bootstrap resamples.
        planted: planted skills for the positive control (c10).
        optimised_draws: control spans of each family beside the optimised edit (O6); 0 leaves it out.
        unseen: sequences of a new evaluate split, drawn from what neither training nor a split has used; 0
            takes the run's own.
        ranked: sequences (documents) of the evaluate split, the first ones, on which T, A_C and Q_C are
            measured with everything they are ranked against; 0 takes all. Damage, doses, windows and
            off-target groups, where power is needed, are always measured on the whole split.
        reference: index of theta_ref.
        seed: of every random choice.
    """

    thresholds: Thresholds = field(default_factory=Thresholds)
    match_overlap: float = 0.5
    pairs: int = 5
    nulls: int = 5
    doses: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    draws: int = 199
    stop_after: int = 10
    least_draws: int = 39
    rotations: int = 199
    random_bases: int = 39
    shuffled_bases: int = 39
    reference_intervals: int = 40
    gradient_draws: int = 199
    transplant_draws: int = 99
    shuffle_draws: int = 199
    resamples: int = 2000
    planted: int = 20
    optimised_draws: int = 9
    unseen: int = 0
    ranked: int = 0
    reference: int = 0
    seed: int = 0


def plan_digest(plan: Mapping[str, object]) -> str:
    """SHA-256 of a plan's JSON; stored in every result and checked after."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def settings_as_plan(settings: PlanSettings) -> dict[str, object]:
    """Settings as JSON values."""
    plain: dict[str, object] = json.loads(json.dumps(asdict(settings)))
    return plain


@dataclass(frozen=True)
class Subject:
    """One trained run as the causal test sees it.

    Attributes:
        objective: the token loss.
        checkpoints: the whole series.
        rows: (K, N) orthonormal basis.
        select: split on which pairs were chosen.
        evaluate: split on which they are tested.
    """

    objective: Objective
    checkpoints: Checkpoints
    rows: Float[Tensor, "K N"]
    select: TokenSet
    evaluate: TokenSet


@dataclass(frozen=True)
class Pair:
    """A named hypothesis: the movement along ``vectors`` matters for a cluster.

    Attributes:
        name: matches the pair across runs.
        vectors: indices into the basis.
        evaluate: the cluster on the evaluate split, by a rule that saw no loss there.
        select: the cluster on the select split.
        rule_auc: of the rule; None where membership is known by construction.
        partners: the cluster's other vectors, for the joint test.
        window: (first, last) checkpoint of the breakthrough window.
        not_applicable: clauses declared not to apply.
        supervised: the basis has seen labels.
        exempt: groups that build on C (declared prerequisites), left out of the off-target tests.
        rule: what decides membership, None where known by construction.
    """

    name: str
    vectors: tuple[int, ...]
    evaluate: Target
    select: Target
    rule_auc: float | None = None
    partners: tuple[int, ...] = ()
    window: tuple[int, int] | None = None
    not_applicable: tuple[str, ...] = ()
    supervised: bool = False
    exempt: tuple[str, ...] = ()
    rule: MembershipRule | None = None


@dataclass(frozen=True)
class Session:
    """Benches and trajectory coordinates of one subject, opened once.

    Attributes:
        subject: the run.
        settings: the plan.
        evaluate: bench on the evaluate split.
        select: bench on the select split.
        ranked: bench on the part of the evaluate split where effects are ranked against controls.
        path: (T, K) coordinates of every checkpoint along the basis, from theta_ref.
    """

    subject: Subject
    settings: PlanSettings
    evaluate: Bench
    select: Bench
    ranked: Bench
    path: NDArray[np.float64]

    @property
    def theta(self) -> Tensor:
        """Final weights."""
        return self.evaluate.theta

    @property
    def reference(self) -> Tensor:
        """Reference weights."""
        return self.evaluate.reference

    def rows(self, vectors: Sequence[int]) -> Tensor:
        """Chosen basis rows."""
        return self.subject.rows[list(vectors)]

    @property
    def ranked_tokens(self) -> Bits:
        """(M,) tokens of the evaluate split on which effects are ranked."""
        return self.subject.evaluate.of_first_documents(self.ranked.units).numpy()

    def on_ranked(self, target: Target) -> Target:
        """A target of the evaluate split, on the part where effects are ranked."""
        return target.among(self.ranked_tokens)

    def undo(self, vectors: Sequence[int], dose: float = 1.0) -> Edit:
        """O1 (dose 1) or O2 along basis vectors."""
        if dose == 1.0:
            return edits.project_out(self.theta, self.reference, self.rows(vectors), vectors=list(vectors))
        return edits.reverse(self.theta, self.reference, self.rows(vectors), dose, vectors=list(vectors))


def open_session(subject: Subject, settings: PlanSettings) -> Session:
    """Evaluate both ends on both splits, and the coordinates of the trajectory."""
    series = subject.checkpoints
    theta, reference = series[-1], series[settings.reference]
    path = np.stack(
        [
            coordinates(subject.rows, series[i] - reference).numpy()
            for i in range(settings.reference, len(series))
        ]
    )
    chance = {"resamples": settings.resamples, "seed": settings.seed}
    evaluate, select = (
        open_bench(subject.objective, theta, reference, tokens, **chance)
        for tokens in (subject.evaluate, subject.select)
    )
    ranked = evaluate.first(settings.ranked, **chance) if settings.ranked else evaluate
    return Session(subject, settings, evaluate, select, ranked, path)


def attributed_losses(session: Session, vectors: Sequence[int], tokens: TokenSet) -> NDArray[np.float64]:
    """(k, M) loss allocated to each vector from theta_ref to the end (trapezoid), nats."""
    series, first = session.subject.checkpoints, session.settings.reference
    rows = session.rows(vectors)
    moves = np.diff(session.path[:, list(vectors)], axis=0)
    total = np.zeros((len(rows), tokens.count))
    before = None
    for step, index in enumerate(range(first, len(series))):
        slopes = session.subject.objective.directional(series[index], rows, tokens)[1].double().numpy()
        if before is not None:
            total += (before + slopes) / 2 * moves[step - 1][:, None]
        before = slopes
    return total


def operator_gates(session: Session, vectors: Sequence[int]) -> dict[str, Outcome]:
    """G0a: dose zero returns the same bytes, O1 twice equals once, undoing an edit restores."""
    theta = session.theta
    still = session.undo(vectors, 0.0).apply(theta)
    edit = session.undo(vectors)
    once = edit.apply(theta)
    twice = edits.project_out(once, session.reference, session.rows(vectors)).apply(once)
    back = once - edit.delta().to(once)
    scale = float(theta.norm()) or 1.0
    planned = edit.norm
    reached = float((once - theta).double().norm())
    outcomes: dict[str, Outcome] = {
        "dose zero is the identity": "passed" if torch.equal(still, theta) else "failed",
        "undoing twice is undoing once": "passed"
        if float((twice - once).norm()) <= 1e-6 * scale
        else "failed",
        "an edit can be taken back": "passed" if float((back - theta).norm()) <= 1e-6 * scale else "failed",
        # A movement below the resolution of the weights' type vanishes when it is applied.
        "the movement survives the weights' type": (
            "passed" if planned == 0 or abs(reached - planned) <= 0.01 * planned else "failed"
        ),
    }
    return outcomes


@dataclass(frozen=True)
class ControlBank:
    """Damage of random edits, shared by all pairs of one vector set.

    Attributes:
        own: (R, M) c3b, each part's own movement undone.
        sized: (R, M) c3a, displaced as far as the pair's edit.
        curve: (R, sizes, M) the same directions at rising sizes, for c4.
        random: family -> (R', M) c1 and c2; empty where only what the rule reads is drawn.
    """

    own: NDArray[np.float64]
    sized: NDArray[np.float64]
    curve: NDArray[np.float64]
    random: Mapping[str, NDArray[np.float64]]


def open_span_draws(session: Session, sets: Sequence[tuple[int, ...]]) -> SpanDraws:
    """Random directions of the span for the controls of these vector sets."""
    sizes = curve_sizes([session.undo(vectors).norm for vectors in sets])
    return SpanDraws(session.ranked, session.subject.rows, sizes, session.settings.seed * 7919 + 31)


def fill_bank(
    session: Session,
    vectors: Sequence[int],
    targets: Sequence[Target],
    span: SpanDraws | None = None,
    *,
    reported: bool = True,
) -> ControlBank:
    """Draw c1-c4 for one vector set.

    Drawing of c3 and c4 stops once every pair of this vector set has been reached often enough on
    some required rung, but not before ``least_draws``: over several runs the shortest null counts.

    Args:
        session: the open run.
        vectors: what is undone.
        targets: every target tested with these vectors.
        span: draws shared with other vector sets.
        reported: draw c1 and c2 too, which no clause of the rule reads.
    """
    settings, bench = session.settings, session.ranked
    targets = [session.on_ranked(target) for target in targets]
    edit = session.undo(vectors)
    size = edit.norm
    change = bench.change(edit)
    observed = [float(measures.selectivity(change, bench.headroom, t)) for t in targets]
    reached = np.zeros((len(targets), 3), dtype=int)
    draws = span or open_span_draws(session, [tuple(vectors)])
    own, sized, curves = [], [], []
    for number in range(settings.draws):
        own.append(draws.own(number, len(vectors)))
        sized.append(draws.at(number, size))
        curves.append(draws.curve(number))
        matched = controls.matched_damage(curves[-1], float(change.mean()))[0]
        for i, target in enumerate(targets):
            found = [measures.selectivity(c, bench.headroom, target) for c in (own[-1], sized[-1], matched)]
            reached[i] += np.array([float(value) >= observed[i] for value in found])
        if number + 1 >= settings.least_draws and (reached.max(1) >= settings.stop_after).all():
            break
    random = _random_edits(session, edit, vectors) if reported else {}
    return ControlBank(np.stack(own), np.stack(sized), np.stack(curves), random)


def _random_edits(session: Session, edit: Edit, vectors: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """c1 and c2: half as many draws as of c3, a tenth of c2's stronger form."""
    settings, bench, theta = session.settings, session.ranked, session.theta
    generator = torch.Generator().manual_seed(settings.seed * 7919 + 31 * sum(vectors) + len(vectors))
    space, size = session.subject.objective.space, edit.norm
    few = max(1, settings.draws // 2)
    signs = [1.0 if i % 2 else -1.0 for i in range(few)]
    return {
        "c1": np.stack([bench.change(controls.isotropic(theta, size * s, generator)) for s in signs]),
        "c2a": np.stack(
            [bench.change(controls.same_placement(theta, edit, space, generator)) for _ in signs]
        ),
        "c2b": np.stack(
            [bench.change(controls.same_spectrum(theta, edit, space, generator)) for _ in signs[:20]]
        ),
    }


def ladder(session: Session, pair: Pair, bank: ControlBank, change: Array) -> dict[str, Array]:
    """T of every draw of c1-c5 for one pair."""
    room, target = session.ranked.headroom, session.on_ranked(pair.evaluate)
    matched = np.stack([controls.matched_damage(curve, float(change.mean()))[0] for curve in bank.curve])

    def effects(table: NDArray[np.float64]) -> Array:
        return np.asarray(measures.selectivity(table, room, target))

    others = controls.other_vectors(session.theta, session.reference, session.subject.rows, pair.vectors)
    return {
        **{family: effects(table) for family, table in bank.random.items()},
        "c3a": effects(bank.sized),
        "c3b": effects(bank.own),
        "c4": effects(matched),
        "c5": effects(np.stack([session.ranked.change(edit) for _, edit in others])),
    }


def gradient_controls(session: Session, pair: Pair, observed: float) -> Array | None:
    """c6: T of ascent along gradients of token sets of the select split, on their own counterparts.

    Half of the sets are plain random ones (their counterpart is a random set of the evaluate
    split), half are sets with a rule over input features (the counterpart follows the rule). None where
    no set has a gradient (an exact minimum).
    """
    settings, select, bench = session.settings, session.select, session.ranked
    generator = np.random.default_rng(settings.seed * 104_729 + pair.vectors[0])
    size = int(pair.select.members.sum())
    share = size / select.tokens.count
    features = select.tokens.features
    here = controls.feature_table(features, features) if features else None
    there = controls.feature_table(bench.tokens.features, features) if features else None
    length = session.undo(pair.vectors).norm
    found: list[float] = []
    for draw in range(settings.gradient_draws):
        chosen = np.zeros(select.tokens.count, dtype=bool)
        counterpart = np.zeros(bench.tokens.count, dtype=bool)
        if here is not None and there is not None and draw % 2:
            rule = controls.describable_set(here, size, generator)
            chosen, counterpart = rule(here), rule(there)
        else:
            chosen[generator.choice(len(chosen), size, replace=False)] = True
            wanted = max(1, round(share * len(counterpart)))
            counterpart[generator.choice(len(counterpart), wanted, replace=False)] = True
        if not counterpart.any() or counterpart.all():
            continue
        weights = tensor_mask(chosen).to(session.theta.dtype) / chosen.sum()
        gradient = session.subject.objective.mean_gradient(session.theta, select.tokens, weights)[1].cpu()
        edit = controls.set_gradient(session.theta, gradient, length)
        if edit is None:
            continue
        value = measures.selectivity(bench.change(edit), bench.headroom, Target(counterpart))
        found.append(float(value))
        enough = len(found) >= settings.least_draws
        if enough and sum(v >= observed for v in found) >= settings.stop_after:
            break
    return np.array(found) if found else None


def sufficiency(session: Session, pair: Pair, *, reported: bool = True) -> tuple[Draws, dict[str, Array]]:
    """Q_C under O4 and under random transplants of the same size into theta_ref (c1-c3).

    Drawing stops once one family has been reached often enough. The transplants decide a grade
    alone, so none is drawn where nothing is ``reported``.
    """
    bench, settings = session.ranked, session.settings
    rows, members = session.rows(pair.vectors), session.on_ranked(pair.evaluate).members
    edit = edits.transplant(session.reference, session.theta, rows)
    share = share_draws(bench, bench.gain(edit), members)
    generator = torch.Generator().manual_seed(settings.seed * 15_485_863 + pair.vectors[0])
    room = float(bench.headroom[members].mean())
    if not reported:
        return share, {}
    nulls: dict[str, list[float]] = {"c1": [], "c2": [], "c3": []}
    space = session.subject.objective.space
    for number in range(settings.transplant_draws):
        drawn = {
            "c1": controls.isotropic(session.reference, edit.norm, generator),
            "c2": controls.same_placement(session.reference, edit, space, generator),
            "c3": controls.in_span(session.reference, session.subject.rows, edit.norm, generator),
        }
        for family, other in drawn.items():
            gain = float(bench.gain(other)[members].mean())
            nulls[family].append(min(gain, room) / room if room > 0 else float("nan"))
        reached = max(sum(v >= share.estimate for v in values) for values in nulls.values())
        if number + 1 >= settings.least_draws and reached >= settings.stop_after:
            break
    return share, {family: np.array(values) for family, values in nulls.items()}


def windows(session: Session, pair: Pair) -> tuple[Draws | None, tuple[Draws, ...], float | None]:
    """O3a in the breakthrough window and in shams, and O3b at the farthest point of the path."""
    bench, members = session.evaluate, pair.evaluate.members
    series, first = session.subject.checkpoints, session.settings.reference
    rows, path = session.rows(pair.vectors), session.path[:, list(pair.vectors)]
    farthest = int(np.linalg.norm(path - path[-1], axis=1).argmax())
    rewind = edits.rollback_rewind(session.theta, series[first + farthest], rows)
    rewound = float(bench.change(rewind)[members].mean())
    if pair.window is None:
        return None, (), rewound

    def of_window(window: tuple[int, int], scale: float = 1.0) -> Draws:
        start, end = series[first + window[0]], series[first + window[1]]
        edit = edits.rollback_subtract(session.theta, start, end, rows)
        return bench.mean(bench.change(edit.scaled(scale) if scale != 1.0 else edit), members)

    moved = np.diff(path, axis=0)
    shams, alike = controls.sham_windows(moved, pair.window)
    size = float(np.linalg.norm(moved[pair.window[0] : pair.window[1]].sum(0)))
    found = []
    for window in shams[:5]:
        own = float(np.linalg.norm(moved[window[0] : window[1]].sum(0)))
        if own > 0:
            found.append(of_window(window, 1.0 if alike else size / own))
    return of_window(pair.window), tuple(found), rewound


def measure_pair(
    session: Session,
    pair: Pair,
    bank: ControlBank,
    attributed: NDArray[np.float64],
    reference: Mapping[str, Array],
    *,
    reported: bool = True,
) -> PairEvidence:
    """Everything the rule needs for one pair in one run.

    Args:
        session: the open run.
        pair: the hypothesis.
        bank: random edits for its vectors.
        attributed: (k, M) loss allocated to each of its vectors on the ranked part of the evaluate split.
        reference: family -> largest T per reference basis (c7).
        reported: measure what only a report or a grade reads too; declared nulls go without.
    """
    bench, target = session.evaluate, pair.evaluate
    edit = session.undo(pair.vectors)
    change = bench.change(edit)
    damage = bench.mean(change, target.members)
    ranked, ranked_target = session.ranked, session.on_ranked(target)
    ranked_change = change[session.ranked_tokens]
    effect = effect_draws(ranked, ranked_change, ranked_target)
    ladder_draws = ladder(session, pair, bank, ranked_change)
    gates = operator_gates(session, pair.vectors)
    not_applicable = list(pair.not_applicable)
    if "c6" not in not_applicable:
        gradients = gradient_controls(session, pair, float(effect.estimate))
        if gradients is None:
            not_applicable.append("c6")
        else:
            ladder_draws["c6"] = gradients
    shares, nulls = sufficiency(session, pair, reported=reported)
    window, shams, rewound = windows(session, pair)
    a = attributed.sum(0)
    return PairEvidence(
        name=pair.name,
        vectors=pair.vectors,
        damage=damage,
        headroom=bench.mean(bench.headroom, target.members),
        share=share_draws(bench, change, target.members),
        raw_share=float(change[target.members].mean() / bench.headroom[target.members].mean()),
        effect=effect,
        attributed=ranked.mean(a, ranked_target.members),
        sufficiency=shares,
        sufficiency_null=nulls,
        window=window,
        sham_windows=shams,
        rewound=rewound,
        joint=joint_extra(session, pair, change),
        doses=dose_draws(session, pair),
        others=off_target(bench, change, pair),
        controls=ladder_draws,
        reference=reference,
        gates=gates,
        there_and_back=measures.there_and_back(session.path[:, list(pair.vectors)]),
        pilot_error=pilot_error(session, pair),
        rule_auc=pair.rule_auc,
        decay_share=decay_share(session, pair),
        not_applicable=tuple(not_applicable),
        supervised=pair.supervised,
        extras={
            **extra_numbers(session, ranked_target.members, edit, ranked_change, a),
            "damage": asdict(measures.describe(change[target.members])),
        },
    )


def joint_extra(session: Session, pair: Pair, change: Array) -> Draws | None:
    """Damage of J and its partners together beyond the damage of each alone; zero without partners."""
    members, bench = pair.evaluate.members, session.evaluate
    partners = tuple(v for v in pair.partners if v not in pair.vectors)
    if not partners:
        return bench.mean(np.zeros_like(change), members)
    both = bench.change(session.undo((*pair.vectors, *partners)))
    apart = bench.change(session.undo(partners))
    return bench.mean(both - apart - change, members)


def dose_draws(session: Session, pair: Pair) -> dict[float, Draws]:
    """D_C over the dose grid of O2."""
    bench = session.evaluate
    return {
        dose: bench.mean(bench.change(session.undo(pair.vectors, dose)), pair.evaluate.members)
        for dose in session.settings.doses
    }


def off_target(bench: Bench, change: Array, pair: Pair) -> dict[str, tuple[Draws, float, float]]:
    """Damage, headroom and share of U and of every other group (declared descendants left out)."""
    groups = {"rest": pair.evaluate.rest, **pair.evaluate.apart()}
    result = {}
    for name, mask in groups.items():
        if name in pair.exempt or not mask.any():
            continue
        room = float(bench.headroom[mask].mean())
        damage = bench.mean(change, mask)
        share = float(measures.capped_share(np.array(damage.estimate), np.array(room)))
        result[name] = (damage, room, share)
    return result


def pilot_error(session: Session, pair: Pair) -> float:
    """Standard error of D_C on the select split, scaled to the evaluate split's number of documents."""
    bench = session.select
    members = pair.select.members
    if not members.any():
        return float("inf")
    error = bench.mean(bench.change(session.undo(pair.vectors)), members).interval().error
    return error * float(np.sqrt(bench.units / session.evaluate.units))


def decay_share(session: Session, pair: Pair) -> float | None:
    """Share of the displacement that decoupled weight decay makes, None where the rates are unknown."""
    series, first = session.subject.checkpoints, session.settings.reference
    if series.learning_rates is None or series.weight_decay is None:
        return None
    rows = session.rows(pair.vectors)
    start = coordinates(rows, session.reference).numpy()
    along = session.path[:-1][:, list(pair.vectors)] + start
    steps = np.diff(np.array(series.steps[first:], dtype=np.float64))
    rates = np.array(series.learning_rates[first + 1 :]) * steps
    parts = np.array([measures.decay_part(along[:, j], rates, series.weight_decay) for j in range(len(rows))])
    net = float(np.linalg.norm(session.path[-1, list(pair.vectors)]))
    return float(np.linalg.norm(parts)) / net if net > 0 else None


def extra_numbers(
    session: Session, members: Bits, edit: Edit, change: Array, attributed: Array
) -> dict[str, object]:
    """Numbers for the report that no clause uses: detectors, calibration, label shuffle, norms."""
    bench = session.ranked
    generator = np.random.default_rng(session.settings.seed)
    confounders = np.stack([bench.before, bench.tokens.position_of.double().numpy()], axis=1)
    slope, fit = measures.calibration(change, attributed)
    sham = controls.sham_cluster(members, confounders)
    rest = Target(sham) if sham.any() else None
    share = measures.capped_share(change[members].mean(), bench.headroom[members].mean())
    outside = measures.capped_share(change[~members].mean(), bench.headroom[~members].mean())
    return {
        "auc": measures.detector_auc(change, members),
        "auc_within_sequences": measures.within_sequence_auc(change, members, bench.documents),
        "auc_residual": measures.residual_auc(change, members, confounders),
        "calibration_slope": slope,
        "calibration_r2": fit,
        "selectivity_index": measures.selectivity_index(float(share), float(outside)),
        "label_shuffle_p": sequence_permutation_p(
            change, members, bench.documents, generator, draws=session.settings.shuffle_draws
        ),
        "sham_cluster_effect": None
        if rest is None
        else float(measures.selectivity(change, bench.headroom, rest)),
        "edit_norm": edit.norm,
        "edit_over_movement": edit.norm / float((session.theta - session.reference).double().norm()),
    }


def with_reference(evidence: PairEvidence, **changes: object) -> PairEvidence:
    """Evidence with later results added: reference families, positive control, crossover, blocking."""
    return replace(evidence, **changes)  # type: ignore[arg-type]


def mark_crossovers(
    session: Session, pairs: Sequence[Pair], found: Sequence[PairEvidence]
) -> list[PairEvidence]:
    """Set ``crossover`` where a pair crosses over with another one (double dissociation)."""
    changes = [session.evaluate.change(session.undo(pair.vectors)) for pair in pairs]
    masks: list[Bits] = [pair.evaluate.members for pair in pairs]
    matrix = measures.dissociation_matrix(changes, session.evaluate.headroom, masks)
    crossed = {index for both in measures.double_dissociation(matrix).crossovers for index in both}
    return [replace(one, crossover=index in crossed) for index, one in enumerate(found)]
