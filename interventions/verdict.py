"""The deterministic verdict rule: frozen inputs in, exactly one verdict out, with its reason.

Order of the rules: causal-protocol 3.5 with the amendments A1 (the rule is total) and A3 (fewer than
five seeds). The last rule is *else*: ``not_selective`` with one flag for every clause that failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from interventions.statistics import Interval, equivalence_power, equivalent, minimum_detectable

Outcome = Literal["passed", "failed", "not_run", "not_applicable"]
Name = Literal["causal", "not_selective", "observational_only", "inconclusive"]


@dataclass(frozen=True)
class Thresholds:
    """Every threshold of the rule, with its stated default.

    Attributes:
        level: of each test.
        seeds: runs below which a verdict is only a single-run verdict.
        effect_floor: delta is at least this, nats.
        effect_share: delta is at least this share of the headroom.
        rule_auc: least AUC of a membership rule.
        sufficiency_null: upper bound of the sufficiency share for "no effect".
        sufficiency_grade: lower bound of the sufficiency share for grade S.
        equivalence_share: margin as a share of the damage.
        equivalence_floor: margin's cap is at least this, nats.
        equivalence_headroom: margin's cap as a share of the group's headroom.
        equivalence_power: power below which the flag ``underpowered`` is set.
        headroom_errors: headroom must exceed this many standard errors.
        there_and_back: path length over net displacement above which O1 says nothing.
        detectable_share: planted skills must be found from this share on, or ``low_power`` is set.
        completeness: largest share of the loss change that the allocation may miss.
        even_tolerance: |D(+1) - D(-1)| below this share of their sum sets ``even_response``.
    """

    level: float = 0.05
    seeds: int = 5
    effect_floor: float = 0.02
    effect_share: float = 0.10
    rule_auc: float = 0.75
    sufficiency_null: float = 0.10
    sufficiency_grade: float = 0.20
    equivalence_share: float = 0.10
    equivalence_floor: float = 0.01
    equivalence_headroom: float = 0.02
    equivalence_power: float = 0.8
    headroom_errors: float = 3.0
    there_and_back: float = 5.0
    detectable_share: float = 0.8
    completeness: float = 0.05
    even_tolerance: float = 0.1


@dataclass(frozen=True)
class OtherGroup:
    """One off-target group: damage (nats), its headroom, its capped share of headroom."""

    damage: Interval
    headroom: float
    share: float


@dataclass(frozen=True)
class BlockingResult:
    """Training with the direction held still, against shams (O5).

    Attributes:
        delay: delay of the skill beyond that of the shams, in units of the window (RMST difference).
        gap: final loss gap beyond that of the shams, nats.
        within_margin: delay inside its equivalence margin.
        others_equivalent: other clusters inside theirs.
        held: the coordinate stayed put.
    """

    delay: Interval
    gap: Interval
    within_margin: bool
    others_equivalent: bool
    held: bool


@dataclass(frozen=True)
class VerdictInputs:
    """Everything the rule looks at, for one (vectors, cluster) pair over all its seeds.

    Attributes:
        damage: D_C, nats per token.
        headroom: G_C, nats per token.
        share: n_C = min(D_C, G_C) / G_C.
        effect: T = n_C - n_U.
        attributed: A_C on the evaluate split, nats.
        sufficiency: Q_C, share of the headroom gained by inserting the movement early; None: not run.
        sufficiency_beats: whether Q_C beats c1-c3.
        window: D_C under O3a in the breakthrough window; None: not run.
        window_beats_sham: breakthrough window beats sham windows.
        joint: damage beyond the parts when the other top vectors of C are undone as well; None: not run.
        there_and_back: path length over net displacement.
        pilot_error: standard error of D_C on the select split, for the power gate.
        rule_auc: of the membership rule; None where labels are known.
        seeds: number of runs.
        seed_effects: T of each run.
        sign_p: sign-flip p over seeds; None below the seeds needed.
        pipeline_p: largest p over the families of reference bases; None: not run.
        pipeline_families: p per family.
        control_p: p of c3, c4, c6 (and others, reported only).
        others: off-target groups; the key ``rest`` is U, all tokens outside the target.
        dose_monotone: whether the dose curve rises on [0, 1].
        dose_asymmetry: D(+1) and D(-1).
        gates: name -> outcome (operator identity, movement, completeness ...).
        positive_control: outcome of c10.
        detectable_share: smallest share of its tokens' headroom at which a planted skill is found; None:
            not run, inf: none was found.
        crossover: crosses over with another pair.
        blocking: None: not run.
        decay_share: share of the displacement that is weight decay; None where unknown.
        supervised: the basis has seen labels.
        not_applicable: clauses declared in advance not to apply; stored, never counted as passed.
        window_moved: O3b at mid-path damages although O1 does not.
        interaction: J_C = (Q_C - E_C) / 2.
    """

    damage: Interval
    headroom: Interval
    share: float
    effect: Interval
    attributed: Interval
    sufficiency: Interval | None = None
    sufficiency_beats: Outcome = "not_run"
    window: Interval | None = None
    window_beats_sham: Outcome = "not_run"
    joint: Interval | None = None
    there_and_back: float = 1.0
    pilot_error: float = 0.0
    rule_auc: float | None = None
    seeds: int = 1
    seed_effects: tuple[float, ...] = ()
    sign_p: float | None = None
    pipeline_p: float | None = None
    pipeline_families: Mapping[str, float] = field(default_factory=dict)
    control_p: Mapping[str, float | None] = field(default_factory=dict)
    others: Mapping[str, OtherGroup] = field(default_factory=dict)
    dose_monotone: Outcome = "not_run"
    dose_asymmetry: tuple[float, float] | None = None
    gates: Mapping[str, Outcome] = field(default_factory=dict)
    positive_control: Outcome = "not_run"
    detectable_share: float | None = None
    crossover: bool = False
    blocking: BlockingResult | None = None
    decay_share: float | None = None
    supervised: bool = False
    not_applicable: tuple[str, ...] = ()
    window_moved: bool = False
    interaction: float = 0.0

    def delta(self, thresholds: Thresholds) -> float:
        """Smallest damage that counts as an effect, nats."""
        return max(thresholds.effect_floor, thresholds.effect_share * self.headroom.estimate)


@dataclass(frozen=True)
class Verdict:
    """A verdict with all that led to it.

    Attributes:
        verdict: one of four.
        single_run_verdict: the same rule without the seed clauses.
        flags: what a reader should know besides.
        grade: suffixes S, T, D, X (and ``strict``).
        reason: one plain sentence.
        clauses: outcome of every clause.
    """

    verdict: Name
    single_run_verdict: Name
    flags: tuple[str, ...]
    grade: str
    reason: str
    clauses: Mapping[str, Outcome]

    @property
    def testable(self) -> bool:
        """Nothing but the number of seeds stopped the rule before it looked at the damage (A8)."""
        stopped = any(flag.startswith("failed:") for flag in self.flags)
        return self.single_run_verdict != "inconclusive" or not stopped


def decide(inputs: VerdictInputs, thresholds: Thresholds | None = None) -> Verdict:
    """Apply the rule; every input gets exactly one verdict."""
    t = thresholds or Thresholds()
    clauses = evaluate_clauses(inputs, t)
    flags = informative_flags(inputs, t)
    full, why, more = _first_match(inputs, t, clauses, with_seeds=True)
    single, single_why, single_more = _first_match(inputs, t, clauses, with_seeds=False)
    if clauses["seeds"] == "failed":
        why, more = single_why, (*single_more, "few_seeds")
    grade = grade_of(inputs, t) if "causal" in (full, single) else ""
    if clauses.get(why) == "not_run":
        why = f"not_run:{why}"
    reason = reason_for(inputs, single if clauses["seeds"] == "failed" else full, why, grade)
    if "low_power" in flags and why in ("pipeline_null", "c3", "positive_control"):
        reason += " " + sensitivity_words(inputs)
    if clauses["seeds"] == "failed":
        reason += f" Single-run verdict: {inputs.seeds} of {t.seeds} seeds."
    return Verdict(full, single, tuple(dict.fromkeys((*more, *flags))), grade, reason, clauses)


def _outcome(passed: bool) -> Outcome:
    return "passed" if passed else "failed"


def evaluate_clauses(i: VerdictInputs, t: Thresholds) -> dict[str, Outcome]:
    """Outcome of every clause; what was declared not to apply is marked so whatever its value."""
    delta = i.delta(t)
    clauses: dict[str, Outcome] = {}
    for name, gate in i.gates.items():
        clauses[f"gate:{name}"] = gate
    clauses["headroom"] = _outcome(
        i.headroom.estimate > 0 and i.headroom.estimate >= t.headroom_errors * i.headroom.error
    )
    clauses["power"] = _outcome(minimum_detectable(i.pilot_error) <= delta)
    clauses["description"] = "not_applicable" if i.rule_auc is None else _outcome(i.rule_auc >= t.rule_auc)
    clauses["positive_control"] = i.positive_control
    clauses["seeds"] = _outcome(i.seeds >= t.seeds)
    clauses["damage"] = _outcome(
        i.damage.low > 0 and (i.damage.estimate >= delta or "minimum_effect" in i.not_applicable)
    )
    clauses["attribution"] = _outcome(i.attributed.high < 0)
    clauses["pipeline_null"] = "not_run" if i.pipeline_p is None else _outcome(i.pipeline_p < t.level)
    for control in ("c3", "c4", "c6"):
        p = i.control_p.get(control)
        clauses[control] = "not_run" if p is None else _outcome(p < t.level)
    apart = [group.share for name, group in i.others.items() if name != "rest"]
    clauses["worst_other"] = _outcome(all(share < i.share for share in apart)) if i.others else "not_run"
    clauses["dose"] = i.dose_monotone
    clauses["equivalence"] = (
        _outcome(all(equivalent(g.damage, margin(i, g, t)) for g in i.others.values()))
        if i.others
        else "not_run"
    )
    consistent = bool(i.seed_effects) and all(v > 0 for v in i.seed_effects)
    clauses["sign"] = _outcome(consistent and i.sign_p is not None and i.sign_p < t.level)
    for name in clauses:
        if name in i.not_applicable or name.split(":")[0] in i.not_applicable:
            clauses[name] = "not_applicable"
    return clauses


def margin(i: VerdictInputs, group: OtherGroup, t: Thresholds) -> float:
    """Equivalence margin of one off-target group (A4), nats."""
    cap = max(t.equivalence_floor, t.equivalence_headroom * group.headroom)
    return max(0.0, min(t.equivalence_share * i.damage.estimate, cap))


def _first_match(
    i: VerdictInputs, t: Thresholds, clauses: Mapping[str, Outcome], *, with_seeds: bool
) -> tuple[Name, str, tuple[str, ...]]:
    """(verdict, what decided it, flags)."""
    delta = i.delta(t)
    before = ["headroom", "power", "description", "positive_control"] + (["seeds"] if with_seeds else [])
    gates = [name for name in clauses if name.startswith("gate:")]
    stopped = [name for name in (*gates, *before) if clauses[name] == "failed"]
    if stopped:
        return "inconclusive", stopped[0], tuple(f"failed:{name}" for name in stopped)
    damaged = clauses["damage"] in ("passed", "not_applicable")
    null = i.damage.high < delta
    if not damaged and not null:
        return "inconclusive", "undecided", ("undecided",)
    if not damaged:
        return _no_damage(i, t, clauses, delta)
    own = ["pipeline_null", "c3", "c4", "c6", "worst_other"]
    failed = [name for name in own if clauses[name] == "failed"]
    if failed:
        return "not_selective", failed[0], tuple(f"failed:{name}" for name in failed)
    last = ["dose", "equivalence"] + (["sign"] if with_seeds else [])
    required = [*own, *last, "positive_control", *gates]
    open_clauses = [n for n in required if clauses[n] not in ("passed", "not_applicable")]
    if not open_clauses:
        if clauses["attribution"] == "failed":
            return "inconclusive", "sensitive", ("sensitive",)
        return "causal", "all", ()
    words = {"equivalence": "leaky", "dose": "non_monotone"}
    flags = [words.get(n, n) if clauses[n] == "failed" else f"not_run:{n}" for n in open_clauses]
    if clauses["attribution"] == "failed":
        flags.append("sensitive")
    return "not_selective", open_clauses[0], tuple(flags)


def _no_damage(
    i: VerdictInputs, t: Thresholds, clauses: Mapping[str, Outcome], delta: float
) -> tuple[Name, str, tuple[str, ...]]:
    """Rules for a pair whose damage is shown to stay below delta."""
    improves = i.damage.high < 0
    extra = ("improves",) if improves else ()
    if clauses["attribution"] == "failed":
        return "inconclusive", "no_role", ("no_role", *extra)
    redundant = []
    missing = []
    for name, interval, bound in (
        ("sufficiency", i.sufficiency, t.sufficiency_null),
        ("joint", i.joint, delta),
    ):
        if name in i.not_applicable:
            continue
        if interval is None:
            missing.append(f"not_run:{name}")
        elif not interval.high < bound:
            redundant.append(name)
    if redundant:
        return "inconclusive", "redundant", ("redundant", *extra)
    if missing:
        return "inconclusive", "untested", (*missing, *extra)
    failed = list(extra)
    looped = i.there_and_back > t.there_and_back
    if not looped and i.window is not None and not i.window.high < delta:
        failed.append("window_effect")
    if i.blocking is not None and not i.blocking.within_margin:
        failed.append("delayed_by_blocking")
    if failed:
        return "not_selective", failed[0], tuple(failed)
    return "observational_only", "no_damage", ()


def informative_flags(i: VerdictInputs, t: Thresholds) -> list[str]:
    """Facts a reader needs whatever the verdict."""
    flags = []
    if i.there_and_back > t.there_and_back:
        flags.append("there_and_back")
    if i.window_moved and i.damage.high < i.delta(t):
        flags.append("undone_later")
    if i.dose_asymmetry is not None:
        plus, minus = i.dose_asymmetry
        if min(plus, minus) > 0 and abs(plus - minus) <= t.even_tolerance * (plus + minus):
            flags.append("even_response")
    powers = [equivalence_power(g.damage.error, margin(i, g, t)) for g in i.others.values()]
    if powers and min(powers) < t.equivalence_power:
        flags.append("underpowered")
    if i.detectable_share is not None and i.detectable_share > t.detectable_share:
        flags.append("low_power")
    if i.interaction <= -0.1:
        flags.append("synergy")
    if i.interaction >= 0.1 and i.sufficiency is not None:
        flags.append("redundancy")
    if i.decay_share is not None and i.decay_share > 0.5:
        flags.append("mostly_decay")
    if i.supervised:
        flags.append("supervised")
    if i.blocking is not None and not i.blocking.held:
        flags.append("block_not_held")
    return flags


def grade_of(i: VerdictInputs, t: Thresholds) -> str:
    """Suffixes of a causal verdict."""
    grade = ""
    if (
        i.sufficiency is not None
        and i.sufficiency.low >= t.sufficiency_grade
        and i.sufficiency_beats == "passed"
    ):
        grade += "+S"
    if i.window_beats_sham == "passed":
        grade += "+T"
    if i.blocking is not None and i.blocking.held and i.blocking.others_equivalent:
        # Delay or a lasting gap, either beyond the shams with an interval off zero.
        grade += "+D" if i.blocking.delay.low > 0 or i.blocking.gap.low > 0 else ""
    if i.crossover:
        grade += "+X"
    strict = i.others and all(equivalent(g.damage, t.equivalence_floor) for g in i.others.values())
    return grade + (" strict" if strict else "")


_WORDS = {
    "headroom": "the target's headroom is not above its noise, so nothing can be tested",
    "power": "the sample is too small to see the smallest damage that would count",
    "description": "the cluster has no description that carries over to new tokens",
    "positive_control": "a planted skill was not detected, so a negative result would mean nothing",
    "seeds": "there are too few training seeds",
    "undecided": "the interval of the damage covers both no effect and an effect that counts",
    "no_role": "undoing the movement does not hurt the cluster, and nothing was attributed to it",
    "redundant": "undoing it alone does not hurt, but it is sufficient or matters together with others",
    "untested": "undoing it does not hurt, but sufficiency or the joint test did not run",
    "no_damage": "loss was attributed to the movement, yet the trained model does not depend on it",
    "improves": "undoing the movement improves the cluster",
    "window_effect": "undoing only the breakthrough window hurts although undoing all of it does not",
    "delayed_by_blocking": "the trained model does not depend on it, but blocking it delays learning",
    "sensitive": "the direction damages the cluster selectively, but no learning was attributed to it",
    "pipeline_null": "reference bases put through the same pipeline give effects as large",
    "c3": "beats random directions, but not rotations inside the span",
    "c4": "directions that do the same total damage are as selective",
    "c6": "gradients of random token sets are as selective on their own tokens",
    "worst_other": "some other group loses as large a share of its headroom",
    "dose": "the damage does not rise with the dose",
    "equivalence": "other groups are damaged beyond the equivalence margin",
    "sign": "the effect is not consistent over seeds",
}


def sensitivity_words(i: VerdictInputs) -> str:
    """What a comparison with reference bases or rotations cannot exclude, from the planted skills."""
    if i.detectable_share is None or i.detectable_share == float("inf"):
        return "No planted skill was found, however large."
    return (
        f"Planted skills are only found from {i.detectable_share:.0%} of their tokens' headroom on, "
        "so a smaller effect is not excluded."
    )


def reason_for(i: VerdictInputs, verdict: Name, decided_by: str, grade: str) -> str:
    """One sentence in plain words; "causes" only with blocking evidence."""
    if verdict == "causal":
        text = "the trained model depends on the movement along b for C, more than on any control"
        if "+D" in grade:
            text += ", and holding b still in training causes the skill to come late or not at all"
    elif decided_by.startswith("gate:"):
        text = f"the check '{decided_by[5:]}' failed before any test"
    elif decided_by.startswith("not_run:"):
        text = f"'{decided_by[8:]}' did not run, and without it nothing stronger can be said"
    else:
        text = _WORDS.get(decided_by, f"'{decided_by}' did not pass")
    value = f"D = {i.damage.estimate:.3g} nats [{i.damage.low:.3g}, {i.damage.high:.3g}]"
    return f"{text[0].upper()}{text[1:]} ({value}, T = {i.effect.estimate:.2f})."
