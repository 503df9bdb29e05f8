"""What is measured for one (vectors, cluster) pair in one run, and how runs are put together.

Protocol steps G2 and G3: operators and controls on the evaluate split through one code path, with
whole sequences resampled. Draws are kept, so that seeds are averaged draw by draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interventions import measures
from interventions.detection import PlantedDraws, detectable_share, powers
from interventions.edits import Edit
from interventions.measures import Target
from interventions.statistics import (
    Array,
    Bits,
    Draws,
    Interval,
    Labels,
    bootstrap,
    over_seeds,
    rank_p,
    resampling_weights,
    sequence_sums,
    sign_flip_p,
)
from interventions.verdict import BlockingResult, OtherGroup, Outcome, VerdictInputs
from polca_edit.derivatives import Objective
from polca_edit.tokens import TokenSet


@dataclass(frozen=True)
class Bench:
    """Final and reference weights with their losses on one split: what every edit is measured against.

    Attributes:
        objective: the token loss.
        tokens: the split.
        theta: final weights.
        reference: theta_ref.
        before: (M,) loss at theta, nats.
        reference_loss: (M,) loss at theta_ref, nats.
        documents: (M,) sampling unit of each token, 0 .. count-1.
        weights: (R, count) bootstrap multiplicities of the units.
    """

    objective: Objective
    tokens: TokenSet
    theta: Tensor
    reference: Tensor
    before: Array
    reference_loss: Array
    documents: Labels
    weights: Array

    @property
    def headroom(self) -> Array:
        """(M,) what undoing everything since the reference costs, nats."""
        return self.reference_loss - self.before

    @property
    def units(self) -> int:
        """Number of documents."""
        return int(self.weights.shape[1])

    def loss(self, theta: Float[Tensor, " N"]) -> Array:
        """(M,) losses at any weights, float64."""
        found: Array = self.objective.losses(theta, self.tokens).double().numpy()
        return found

    def change(self, edit: Edit) -> Array:
        """(M,) damage of an edit of theta."""
        return self.loss(edit.apply(self.theta)) - self.before

    def gain(self, edit: Edit) -> Array:
        """(M,) loss that an edit of theta_ref takes away (sufficiency)."""
        return self.reference_loss - self.loss(edit.apply(self.reference))

    def first(self, units: int, *, resamples: int, seed: int) -> Bench:
        """The bench of the first ``units`` documents, resampled among themselves.

        Raises:
            ValueError: if there are fewer.
        """
        if units > self.units:
            raise ValueError(
                f"a part of a split must be at most its {self.units} documents, got {units}; ask for fewer"
            )
        tokens = self.tokens.of_first_documents(units).numpy()
        return Bench(
            self.objective,
            self.tokens.select(torch.from_numpy(np.unique(self.tokens.sequence_of.numpy()[tokens]))),
            self.theta,
            self.reference,
            self.before[tokens],
            self.reference_loss[tokens],
            self.documents[tokens],
            resampling_weights(units, resamples, np.random.default_rng(seed)),
        )

    def resampled(
        self, columns: Mapping[str, tuple[Array, Bits]], statistic: Callable[[Mapping[str, Array]], Array]
    ) -> Draws:
        """Bootstrap of a statistic of masked sums; each column has its count under ``#name``."""
        sums: dict[str, Array] = {}
        for name, (values, mask) in columns.items():
            sums[name] = sequence_sums(values, mask, self.documents, self.units)
            sums[f"#{name}"] = sequence_sums(np.ones_like(values), mask, self.documents, self.units)
        with np.errstate(invalid="ignore", divide="ignore"):
            return bootstrap(sums, statistic, self.weights)

    def mean(self, values: Array, mask: Bits) -> Draws:
        """Bootstrap of a group's mean."""
        return self.resampled({"v": (values, mask)}, lambda t: t["v"] / t["#v"])


def open_bench(
    objective: Objective,
    theta: Float[Tensor, " N"],
    reference: Float[Tensor, " N"],
    tokens: TokenSet,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Bench:
    """Losses at both ends and the bootstrap weights of a split."""
    _, units = np.unique(tokens.documents[tokens.sequence_of].numpy(), return_inverse=True)
    weights = resampling_weights(int(units.max()) + 1, resamples, np.random.default_rng(seed))
    return Bench(
        objective,
        tokens,
        theta,
        reference,
        objective.losses(theta, tokens).double().numpy(),
        objective.losses(reference, tokens).double().numpy(),
        units.astype(np.int64),
        weights,
    )


def share_draws(bench: Bench, change: Array, mask: Bits) -> Draws:
    """Capped share n of one group, the ratio recomputed in every resample."""
    return bench.resampled(
        {"d": (change, mask), "g": (bench.headroom, mask)},
        lambda t: measures.capped_share(t["d"] / t["#d"], t["g"] / t["#g"]),
    )


def effect_draws(bench: Bench, change: Array, target: Target) -> Draws:
    """T = n_C - n_U with both ratios recomputed in every resample."""
    room = bench.headroom

    def statistic(t: Mapping[str, Array]) -> Array:
        inside = measures.capped_share(t["dc"] / t["#dc"], t["gc"] / t["#gc"])
        return inside - measures.capped_share(t["du"] / t["#du"], t["gu"] / t["#gu"])

    columns = {
        "dc": (change, target.members),
        "gc": (room, target.members),
        "du": (change, target.rest),
        "gu": (room, target.rest),
    }
    return bench.resampled(columns, statistic)


@dataclass(frozen=True)
class PairEvidence:
    """Everything measured for one pair in one run. Loss in nats per token, shares without unit.

    Attributes:
        name: what matches the pair across runs (skill or membership rule, never an index).
        vectors: basis vectors undone.
        damage: D_C under O1.
        headroom: G_C.
        share: n_C, capped.
        raw_share: D_C / G_C, uncapped, for the record.
        effect: T.
        attributed: A_C.
        sufficiency: Q_C under O4.
        sufficiency_null: family -> Q under random transplants of the same size.
        window: D_C under O3a in the breakthrough window.
        sham_windows: D_C under O3a in sham windows.
        rewound: D_C under O3b at the middle of the path.
        joint: extra damage when the cluster's other vectors are undone as well.
        doses: alpha -> D_C under O2.
        others: group -> (damage, headroom, share).
        controls: family -> T of every draw.
        reference: family of reference bases -> largest T over that basis's pairs, per draw.
        positive_control: c10.
        planted: effects of planted skills of this run, for the share that several runs find together.
        gates: name -> outcome.
        there_and_back: path length over net displacement along the vectors.
        pilot_error: standard error of D_C on the select split.
        rule_auc: of the membership rule, None where labels are known.
        crossover: crosses over with another pair of this run.
        decay_share: share of |displacement| that is weight decay.
        blocking: result of O5 in this run.
        not_applicable: clauses declared not to apply.
        supervised: basis has seen labels.
        extras: further numbers for the report (AUC, calibration, label-shuffle p, norms ...).
    """

    name: str
    vectors: tuple[int, ...]
    damage: Draws
    headroom: Draws
    share: Draws
    raw_share: float
    effect: Draws
    attributed: Draws
    sufficiency: Draws | None = None
    sufficiency_null: Mapping[str, Array] = field(default_factory=dict)
    window: Draws | None = None
    sham_windows: tuple[Draws, ...] = ()
    rewound: float | None = None
    joint: Draws | None = None
    doses: Mapping[float, Draws] = field(default_factory=dict)
    others: Mapping[str, tuple[Draws, float, float]] = field(default_factory=dict)
    controls: Mapping[str, Array] = field(default_factory=dict)
    reference: Mapping[str, Array] = field(default_factory=dict)
    positive_control: Outcome = "not_run"
    planted: PlantedDraws | None = None
    gates: Mapping[str, Outcome] = field(default_factory=dict)
    there_and_back: float = 1.0
    pilot_error: float = 0.0
    rule_auc: float | None = None
    crossover: bool = False
    decay_share: float | None = None
    blocking: BlockingResult | None = None
    not_applicable: tuple[str, ...] = ()
    supervised: bool = False
    extras: Mapping[str, object] = field(default_factory=dict)


def null_p(value: float, nulls: Sequence[Array], stop_after: int | None = None) -> float | None:
    """Rank p of a seed-averaged statistic: draw r of one run is averaged with draw r of the next."""
    if not nulls or any(len(n) == 0 for n in nulls):
        return None
    shortest = min(len(n) for n in nulls)
    averaged = np.mean([n[:shortest] for n in nulls], axis=0)
    return rank_p(value, averaged, stopped_at=stop_after if len(nulls) == 1 else None)


def dose_outcome(doses: Mapping[float, Draws]) -> Outcome:
    """Whether damage rises on [0, 1]: no step falls by over 2 % of the largest, its interval below 0."""
    inside = sorted(a for a in doses if 0 <= a <= 1)
    if len(inside) < 3:
        return "not_run"
    largest = max(abs(doses[a].estimate) for a in inside)
    for low, high in zip(inside, inside[1:], strict=False):
        step = Draws(
            doses[high].estimate - doses[low].estimate, doses[high].draws - doses[low].draws
        ).interval()
        if step.high < 0 and step.estimate < -0.02 * largest:
            return "failed"
    return "passed"


def _mixed(parts: Sequence[Draws | None], seed: int) -> Draws | None:
    """Over seeds; the same seeds are drawn for every quantity, so differences stay paired."""
    known = [p for p in parts if p is not None]
    return over_seeds(known, np.random.default_rng(seed)) if len(known) == len(parts) else None


def _interval(parts: Sequence[Draws | None], seed: int) -> Interval | None:
    mixed = _mixed(parts, seed)
    return None if mixed is None else mixed.interval()


def _worst(outcomes: Sequence[Outcome]) -> Outcome:
    order: tuple[Outcome, ...] = ("failed", "not_run", "passed", "not_applicable")
    return min(outcomes, key=order.index)


def combine(
    runs: Sequence[PairEvidence],
    *,
    stop_after: int | None = None,
    seed: int = 0,
    sign_test: bool = True,
    level: float = 0.05,
) -> VerdictInputs:
    """One set of verdict inputs from the evidence of the same pair in several runs (seeds).

    Raises:
        ValueError: if the runs are not about the same pair.
    """
    if len({run.name for run in runs}) != 1:
        raise ValueError(
            f"only evidence of one pair can be combined, got {sorted({r.name for r in runs})}; match by rule"
        )
    first = runs[0]

    def interval(parts: Sequence[Draws | None]) -> Interval:
        found = _interval(parts, seed)
        assert found is not None
        return found

    effects = tuple(float(run.effect.estimate) for run in runs)
    average = float(np.mean(effects))
    families = sorted(set.intersection(*(set(run.reference) for run in runs)))
    pipeline = {f: null_p(average, [run.reference[f] for run in runs]) for f in families}
    known = {f: p for f, p in pipeline.items() if p is not None}
    names = sorted({f for run in runs for f in run.controls})
    control_p = {f: _control_p(runs, f, stop_after) for f in names}
    for rung in ("c3", "c2"):  # (a) and (b) are both required: the larger p counts
        parts = [p for f, p in control_p.items() if f.startswith(rung) and p is not None]
        if parts:
            control_p[rung] = max(parts)
    groups = set.intersection(*(set(run.others) for run in runs))
    doses = {a: _mixed([run.doses.get(a) for run in runs], seed) for a in first.doses}
    known_doses = {a: d for a, d in doses.items() if d is not None}
    damage = interval([run.damage for run in runs])
    sufficiency = _interval([run.sufficiency for run in runs], seed)
    share = float(np.mean([run.share.estimate for run in runs]))
    asymmetry = None
    if 1.0 in known_doses and -1.0 in known_doses:
        asymmetry = (known_doses[1.0].estimate, known_doses[-1.0].estimate)
    aucs = [run.rule_auc for run in runs]
    rewound = [run.rewound for run in runs if run.rewound is not None]
    decays = [run.decay_share for run in runs if run.decay_share is not None]
    return VerdictInputs(
        damage=damage,
        headroom=interval([run.headroom for run in runs]),
        share=share,
        effect=interval([run.effect for run in runs]),
        attributed=interval([run.attributed for run in runs]),
        sufficiency=sufficiency,
        sufficiency_beats=_beats(runs, sufficiency),
        window=_interval([run.window for run in runs], seed),
        window_beats_sham=_window_beats(runs, seed),
        joint=_interval([run.joint for run in runs], seed),
        there_and_back=float(np.median([run.there_and_back for run in runs])),
        pilot_error=float(np.sqrt(np.mean([run.pilot_error**2 for run in runs]) / len(runs))),
        rule_auc=None if any(a is None for a in aucs) else float(min(a for a in aucs if a is not None)),
        seeds=len(runs),
        seed_effects=effects,
        sign_p=sign_flip_p(effects) if sign_test else None,
        pipeline_p=max(known.values()) if known else None,
        pipeline_families=known,
        control_p=control_p,
        others={g: _other(runs, g, seed) for g in sorted(groups)},
        dose_monotone=dose_outcome(known_doses),
        dose_asymmetry=asymmetry,
        gates={
            g: _worst([run.gates.get(g, "not_run") for run in runs])
            for g in sorted({g for r in runs for g in r.gates})
        },
        positive_control=_worst([run.positive_control for run in runs]),
        detectable_share=_detectable(runs, level),
        crossover=all(run.crossover for run in runs),
        blocking=_blocking(runs),
        decay_share=float(np.mean(decays)) if decays else None,
        supervised=any(run.supervised for run in runs),
        # A clause applies as soon as it applies in one run.
        not_applicable=tuple(sorted(set.intersection(*(set(run.not_applicable) for run in runs)))),
        window_moved=bool(rewound) and float(np.mean(rewound)) > max(0.02, damage.high),
        interaction=measures.interaction_index(
            float(np.mean([run.raw_share for run in runs])),
            sufficiency.estimate
            if sufficiency is not None
            else float(np.mean([run.raw_share for run in runs])),
        ),
    )


def _detectable(runs: Sequence[PairEvidence], level: float) -> float | None:
    """Smallest share of a planted skill that these runs find together, None where none was planted."""
    planted = [run.planted for run in runs if run.planted is not None]
    maxima = [run.reference for run in runs if run.reference]
    if len(planted) < len(runs) or len(maxima) < len(runs):
        return None
    return detectable_share({share: power for share, (power, _) in powers(planted, maxima, level).items()})


def _control_p(runs: Sequence[PairEvidence], family: str, stop_after: int | None) -> float | None:
    """P of a control over the runs in which it applies; None if it was left out where it applies."""
    own = [run for run in runs if family not in run.not_applicable]
    if not own or any(family not in run.controls for run in own):
        return None
    average = float(np.mean([run.effect.estimate for run in own]))
    return null_p(average, [run.controls[family] for run in own], stop_after)


def _other(runs: Sequence[PairEvidence], group: str, seed: int) -> OtherGroup:
    parts = [run.others[group] for run in runs]
    found = _interval([part[0] for part in parts], seed)
    assert found is not None
    return OtherGroup(
        found, float(np.mean([part[1] for part in parts])), float(np.mean([part[2] for part in parts]))
    )


def _beats(runs: Sequence[PairEvidence], sufficiency: Interval | None) -> Outcome:
    """Q_C beats random transplants of every family (c1-c3) at 5 %."""
    families = set.intersection(*(set(run.sufficiency_null) for run in runs))
    if sufficiency is None or not families:
        return "not_run"
    found = [null_p(sufficiency.estimate, [run.sufficiency_null[f] for run in runs]) for f in families]
    return "passed" if all(p is not None and p < 0.05 for p in found) else "failed"


def _window_beats(runs: Sequence[PairEvidence], seed: int) -> Outcome:
    """Breakthrough window minus the mean of the sham windows, interval above zero."""
    if any(run.window is None or not run.sham_windows for run in runs):
        return "not_run"
    parts = []
    for run in runs:
        assert run.window is not None
        shams = np.mean([sham.draws for sham in run.sham_windows], axis=0)
        mean = float(np.mean([sham.estimate for sham in run.sham_windows]))
        parts.append(Draws(run.window.estimate - mean, run.window.draws - shams))
    found = _interval(parts, seed)
    return "passed" if found is not None and found.low > 0 else "failed"


def _blocking(runs: Sequence[PairEvidence]) -> BlockingResult | None:
    """Blocking over runs: intervals averaged bound by bound (conservative), outcomes required in all."""
    found = [run.blocking for run in runs if run.blocking is not None]
    if not found:
        return None

    def average(parts: Sequence[Interval]) -> Interval:
        table = np.array([[p.estimate, p.low, p.high, p.low90, p.high90, p.error] for p in parts]).mean(0)
        return Interval(*(float(v) for v in table))

    return BlockingResult(
        average([b.delay for b in found]),
        average([b.gap for b in found]),
        all(b.within_margin for b in found),
        all(b.others_equivalent for b in found),
        all(b.held for b in found),
    )


def tensor_mask(mask: Bits) -> Tensor:
    """A torch mask of a numpy one."""
    return torch.from_numpy(np.ascontiguousarray(mask))
