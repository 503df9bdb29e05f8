"""Verb ``test``: a causal verdict on every chosen pair of one or more runs, and the study it writes."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from pydantic import TypeAdapter, ValidationError

from experiments import causal_branches, causal_runs, figures_causal
from experiments.causal_listing import control_rows, operator_rows
from experiments.causal_matching import largest_overlap, match_pairs
from experiments.causal_runs import RunMeasurement, RunTest
from experiments.kept_evidence import keep_measurement, kept_measurement
from experiments.pipeline import Run, load_run
from experiments.report import write_report
from experiments.report_sections import extra_sections
from experiments.summary import write_summary
from interventions.controls import ROOM
from interventions.evidence import PairEvidence, combine
from interventions.nulls import leave_one_out
from interventions.protocol import PlanSettings, plan_digest, settings_as_plan
from interventions.statistics import Bits, Draws, benjamini_hochberg, holm
from interventions.verdict import Verdict, VerdictInputs, decide
from polca_edit.artifacts import hardware, key_of, peak_rss_bytes, versions
from polca_edit.checkpoints import write_atomically, write_json

SCHEMA = "polca-edit/study/1"

#: Vectors a basis needs, so that a single one can be rotated inside it.
LEAST_VECTORS = 1 + ROOM


def causal_test(
    runs: Annotated[list[Path], typer.Argument(help="finished run directories; several seeds of one config")],
    basis: Annotated[
        list[str] | None,
        typer.Option(help="basis to test, as named in the runs (default trajectory); repeat for one plan"),
    ] = None,
    out: Annotated[Path, typer.Option(help="study directory")] = Path("studies/study"),
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="plan setting, e.g. draws=99 or thresholds.seeds=6")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="a known skill, or NAME=FILE with a JSON list of 0/1 per evaluate token of the first run"
        ),
    ] = None,
    blocking: Annotated[bool, typer.Option(help="train again with causal vectors held still")] = True,
) -> None:
    """Test whether the movement along basis vectors matters for their clusters, and only for them.

    Pairs are chosen on the select split and written to plan.json with its hash before the evaluate
    split is opened. Several bases go into one plan, and each gets a folder of its own in the study.
    With fewer than five runs every row carries a single-run verdict.
    """
    run_study(runs, basis or ["trajectory"], out, plan_settings(set_), labels=label or [], blocking=blocking)


def run_study(
    runs: Sequence[Path],
    bases: Sequence[str],
    out: Path,
    settings: PlanSettings,
    *,
    labels: Sequence[str] = (),
    blocking: bool = True,
) -> None:
    """Choose pairs, write the plan, test every basis, write the study and the runs' reports.

    Args:
        runs: finished run directories, several seeds of one config.
        bases: as named in the runs; a name given twice counts once.
        out: study directory.
        settings: of the plan.
        labels: known skills, or NAME=FILE.
        blocking: train again with causal vectors held still.

    Raises:
        ValueError: for runs that do not belong together, or a plan that changed meanwhile.
    """
    opened = [load_run(path, lambda _: None) for path in runs]
    same_config(opened)
    names = list(dict.fromkeys(bases))
    tests = {
        name: match_pairs(
            [causal_runs.choose_pairs(run, name, settings) for run in opened], settings.match_overlap
        )
        for name in names
    }
    for name, items in tests.items():
        small = min(len(item.basis) for item in items)
        if small < LEAST_VECTORS:
            raise ValueError(
                f"rotations in a span need at least {LEAST_VECTORS} basis vectors, '{name}' has {small}; "
                "run with more checkpoints or vectors"
            )
    plan: dict[str, object] = {
        "settings": settings_as_plan(settings),
        "bases": {name: [causal_runs.pair_plan(t) for t in items] for name, items in tests.items()},
    }
    digest = plan_digest(plan)
    write_json(out / "plan.json", {**plan, "sha256": digest})
    exploratory = [record_opening(run, digest, settings.unseen) for run in opened]
    for name, items in tests.items():
        typer.echo(
            f"plan {digest[:12]}: {sum(len(t.pairs) for t in items)} pairs in {len(items)} runs, basis {name}"
        )
        place = out if len(names) == 1 else out / name
        study, record = _judge(name, items, settings, labels, place, digest, blocking=blocking)
        _check_plan(out / "plan.json", digest)
        study = {**study, "plan": digest, "exploratory": exploratory}
        _write_study(place, name, items, study, {**record, "plan": digest})
        shutil.rmtree(place / "parts", ignore_errors=True)


def _check_plan(path: Path, digest: str) -> None:
    stored = json.loads(path.read_text())
    if stored.pop("sha256") != digest or plan_digest(stored) != digest:
        raise ValueError(f"'{path}' changed while the study ran; start again in a new directory")


def _judge(
    basis: str,
    tests: Sequence[RunTest],
    settings: PlanSettings,
    labels: Sequence[str],
    place: Path,
    digest: str,
    *,
    blocking: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure every run of one basis and apply the rule; (study.json, what each run keeps).

    A run that was measured under this plan before the study stopped is not measured again.
    """
    started, worked = time.perf_counter(), time.process_time()
    measured = []
    for item in tests:
        begun = time.perf_counter()
        part = place / "parts" / f"seed{item.run.config.seed}.safetensors"
        key = key_of(1, digest, item.run.key(f"clusters:{basis}"), versions())
        found = kept_measurement(part, key, item)
        done = "kept" if found else "measured"
        if found is None:
            found = causal_runs.measure_run(item)
            part.parent.mkdir(parents=True, exist_ok=True)
            keep_measurement(part, key, found)
        measured.append(found)
        typer.echo(f"  {item.run.directory.path}: {done} in {time.perf_counter() - begun:.0f} s")
    measured = causal_runs.with_other_seeds(tests, measured)
    rows, details = study_rows(tests, measured, settings, blocking=blocking)
    planted = [asdict(m.planted) for m in measured]
    seeds = [t.run.config.seed for t in tests]
    sequences = [t.run.task.splits.evaluate.sequences for t in tests]
    study = {
        "schema": SCHEMA,
        "basis": basis,
        "settings": settings_as_plan(settings),
        "evaluate_sequences": sequences,
        "verdicts": rows,
        "nulls": null_rows(measured, settings),
        "calibration": [calibration(m) for m in measured],
        "span": [m.span for m in measured],
        "planted": planted,
        "labels": label_rows(tests, measured, labels),
        "largest_rule_overlap": largest_overlap(tests),
        "runs": [str(t.run.directory.path.name) for t in tests],
        "seeds": seeds,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - worked,
        "versions": versions(),
        "hardware": hardware(),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    record = {
        "runs": len(tests),
        "seeds": seeds,
        "sequences": sequences,
        "ranked": settings.ranked,
        "rows": rows,
        "details": details,
        "planted": planted,
    }
    return study, record


def _write_study(
    place: Path, basis: str, tests: Sequence[RunTest], study: Mapping[str, Any], record: Mapping[str, Any]
) -> None:
    """study.json, the table and the figures of one basis; the verdicts go to every run's report too."""
    write_json(place / "study.json", plain(study))
    table = verdict_table(study["verdicts"])
    write_atomically(place / "verdicts.md", lambda part: part.write_text(table) and None)
    for item in tests:
        key = item.run.key(f"clusters:{basis}")
        write_json(item.run.directory / f"verdicts-{basis}.json", plain({"clusters_key": key, **record}))
        write_summary(item.run)
        write_report(item.run.directory, lambda _: None, extra_sections(item.run.directory))
    figures_causal.write_study_figures(place / "figures", study["verdicts"], record["details"])
    typer.echo(table)
    typer.echo(f"Study: {place} ({study['seconds']:.0f} s)")


def plan_settings(assignments: Sequence[str] | None) -> PlanSettings:
    """Plan settings with ``KEY=VALUE`` overrides.

    Raises:
        ValueError: for an unknown key, or a value of the wrong kind or below zero.
    """
    values = asdict(PlanSettings())
    known = set(values) - {"thresholds"}
    for assignment in assignments or []:
        key, equals, text = assignment.partition("=")
        if equals and key in known:
            values[key] = yaml.safe_load(text)
        elif equals and key.startswith("thresholds.") and key[11:] in values["thresholds"]:
            values["thresholds"][key[11:]] = yaml.safe_load(text)
        else:
            raise ValueError(
                f"--set needs KEY=VALUE with one of {sorted(known)} or thresholds.*, got '{assignment}'"
            )
    try:
        settings = TypeAdapter(PlanSettings).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        rule = first["msg"].removeprefix("Input should be ")
        raise ValueError(
            f"plan setting '{name}' must be {rule}, got {first['input']!r}; correct it"
        ) from error
    for name, value in asdict(settings).items():
        least = 1 if name in ("pairs", "draws", "resamples") else 0
        if isinstance(value, int) and value < least:
            raise ValueError(f"plan setting '{name}' must be at least {least}, got {value}; raise it")
    return settings


def same_config(runs: Sequence[Run]) -> None:
    """A study is several seeds of one config.

    Raises:
        ValueError: if the runs differ in more than the seed, or a seed occurs twice.
    """
    configs = [
        run.config.model_dump(mode="json", exclude={"seed", "engine", "engine_address", "threads"})
        for run in runs
    ]
    if any(config != configs[0] for config in configs):
        raise ValueError(
            "all runs of a study must share one config except the seed; test other configs apart"
        )
    seeds = [run.config.seed for run in runs]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"every run of a study needs its own seed, got {seeds}; leave the repeated one out")


def record_opening(run: Run, digest: str, unseen: int = 0) -> bool:
    """Count the opening of the evaluate split in run.json; True where another study plan came first.

    Splits of unseen sequences come from one permutation, so any two of them share sequences and count as
    one split, apart from the run's own.
    """
    path = run.directory / "run.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    openings = record.get("evaluate_openings", [])
    studies = [
        o["plan"] for o in openings if o.get("by") == "study" and bool(o.get("unseen")) == bool(unseen)
    ]
    if digest not in studies:
        openings.append({"plan": digest, "exploratory": bool(studies), "by": "study", "unseen": unseen})
    write_json(path, {**record, "evaluate_openings": openings})
    return bool(studies) and studies[0] != digest


def study_rows(
    tests: Sequence[RunTest], measured: Sequence[RunMeasurement], settings: PlanSettings, *, blocking: bool
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """One row per pair name over all runs that have it, causal ones blocked and localised."""
    by_name: dict[str, list[tuple[int, PairEvidence]]] = {}
    for number, one in enumerate(measured):
        for evidence in one.pairs:
            by_name.setdefault(evidence.name, []).append((number, evidence))
    rows, details = [], {}
    for name, items in by_name.items():
        parts = [e for _, e in items]
        inputs = pooled(parts, settings)
        verdict = decide(inputs, settings.thresholds)
        number = items[0][0]
        pair = next(p for p in tests[number].pairs if p.name == name)
        extra: dict[str, Any] = {
            "localisation": causal_runs.localise_pair(tests[number], measured[number].session, pair)
        }
        if blocking and "causal" in (verdict.verdict, verdict.single_run_verdict):
            parts, curves, missing = trained_again(name, items, tests, measured)
            extra.update({**curves, **missing})
            inputs = pooled(parts, settings)
            verdict = decide(inputs, settings.thresholds)
        details[name] = {**extra, **_matrix(measured[number], tests[number])}
        rows.append(_row(name, parts, inputs, verdict, extra, tests[number]))
    families = [row["inputs"]["pipeline_p"] for row in rows if row["inputs"]["pipeline_p"] is not None]
    if families:
        for row, h, q in zip(
            [r for r in rows if r["inputs"]["pipeline_p"] is not None],
            holm(families),
            benjamini_hochberg(families),
            strict=True,
        ):
            row["holm_p"], row["bh_q"] = float(h), float(q)
    return rows, details


def trained_again(
    name: str,
    items: Sequence[tuple[int, PairEvidence]],
    tests: Sequence[RunTest],
    measured: Sequence[RunMeasurement],
) -> tuple[list[PairEvidence], dict[str, Any], dict[str, str]]:
    """A pair blocked in every run (O5), its window skipped and made early in the first (O3c, O5'').

    Returns:
        The evidence with its blocking results, curves and branches for the record, and why something
        did not run.
    """
    parts = [e for _, e in items]
    record: dict[str, Any] = {}
    missing: dict[str, str] = {}
    own = {n: next(p for p in tests[n].pairs if p.name == name) for n, _ in items}
    try:
        blocked: list[PairEvidence] = []
        curves: list[dict[str, Any]] = []
        for number, item in items:
            result, found = causal_branches.block_pair(tests[number], measured[number].session, own[number])
            blocked.append(replace(item, blocking=result))
            curves.extend(_curve(c, number) for c in found)
        parts, record["blocking"] = blocked, curves
    except ValueError as reason:
        missing["blocking_not_run"] = str(reason)
    first = items[0][0]
    try:
        record["branches"] = causal_branches.branch_pair(tests[first], measured[first].session, own[first])
    except ValueError as reason:
        missing["branches_not_run"] = str(reason)
    return parts, record, missing


def pooled(parts: Sequence[PairEvidence], settings: PlanSettings) -> VerdictInputs:
    """Verdict inputs of one pair over its runs, by the plan's settings."""
    level = settings.thresholds.level
    return combine(parts, stop_after=settings.stop_after, seed=settings.seed, level=level)


def _curve(curve: Any, run: int) -> dict[str, Any]:
    return {
        "arm": curve.arm,
        "branch": curve.branch,
        "run": run,
        "steps": list(curve.steps),
        "target": [float(v) for v in curve.losses["target"]],
        "held": curve.held,
    }


def _matrix(measured: RunMeasurement, test: RunTest) -> dict[str, Any]:
    from interventions.measures import dissociation_matrix

    bench = measured.session.evaluate
    changes = [bench.change(measured.session.undo(pair.vectors)) for pair in test.pairs]
    matrix = dissociation_matrix(changes, bench.headroom, [p.evaluate.members for p in test.pairs])
    return {"matrix": matrix.tolist(), "matrix_names": [p.name for p in test.pairs]}


def _row(
    name: str,
    evidence: Sequence[PairEvidence],
    inputs: VerdictInputs,
    verdict: Verdict,
    extra: Mapping[str, Any],
    test: RunTest,
) -> dict[str, Any]:
    first = evidence[0]
    return {
        "name": name,
        "verdict": verdict.verdict,
        "single_run_verdict": verdict.single_run_verdict,
        "grade": verdict.grade,
        "flags": list(verdict.flags),
        "reason": verdict.reason,
        "clauses": dict(verdict.clauses),
        "inputs": asdict(inputs),
        "delta": inputs.delta(test.settings.thresholds),
        "operators": operator_rows(evidence, inputs, extra),
        "controls": control_rows(evidence, inputs),
        "doses": {str(a): asdict(_interval(d)) for a, d in first.doses.items()},
        "ladder": {
            family: _spread(values) for family, values in {**first.controls, **first.reference}.items()
        },
        "effects": [float(e.effect.estimate) for e in evidence],
        "extras": [dict(e.extras) for e in evidence],
        "vectors": [list(e.vectors) for e in evidence],
        **extra,
        "summary": {
            "vector": first.vectors[0],
            "cluster": name,
            "verdict": verdict.verdict,
            "single_run_verdict": verdict.single_run_verdict,
            "flags": list(verdict.flags),
            "grade": verdict.grade,
            "reason": verdict.reason,
            "p_value": inputs.pipeline_p,
            "effect": inputs.effect.estimate,
            "interval": [inputs.effect.low, inputs.effect.high],
            "seeds": inputs.seeds,
            "controls": [{"control": k, "p_value": v} for k, v in inputs.control_p.items()],
        },
    }


def _interval(draws: Draws) -> Any:
    return draws.interval()


def _spread(values: Any) -> dict[str, float]:
    table = np.asarray(values, dtype=float)
    table = table[np.isfinite(table)]
    if not len(table):
        return {"draws": 0.0}
    low, middle, high = np.percentile(table, [5, 50, 95])
    return {
        "draws": float(len(table)),
        "p5": float(low),
        "median": float(middle),
        "p95": float(high),
        "max": float(table.max()),
    }


def null_rows(measured: Sequence[RunMeasurement], settings: PlanSettings) -> list[dict[str, Any]]:
    """Declared null pairs, one by one: how often the rule says causal where nothing was claimed."""
    rows = []
    for number, one in enumerate(measured):
        for evidence in one.nulls:
            inputs = pooled([evidence], settings)
            verdict = decide(inputs, settings.thresholds)
            rows.append(
                {
                    "run": number,
                    "name": evidence.name,
                    "vectors": list(evidence.vectors),
                    "single_run_verdict": verdict.single_run_verdict,
                    "testable": verdict.testable,
                    "pipeline_p": inputs.pipeline_p,
                    "flags": list(verdict.flags),
                }
            )
    return rows


def calibration(one: RunMeasurement) -> dict[str, Any]:
    """Bare pipeline p-values of reference bases, leave-one-out (A8): uniform if the null is a null."""
    from scipy import stats

    result = {}
    for family, maxima in one.maxima.items():
        p = leave_one_out(maxima)
        result[family] = {
            "bases": len(p),
            "rejected_at_05": float(np.mean(p <= 0.05)),
            "uniform_ks_p": float(stats.kstest(p, "uniform").pvalue) if len(p) > 1 else None,
            "largest": float(maxima.max()),
            "median": float(np.median(maxima)),
        }
    return result


def label_rows(
    tests: Sequence[RunTest], measured: Sequence[RunMeasurement], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Every label against every pair of the first run."""
    rows = []
    for given in labels:
        name, mask = read_label(given, tests[0])
        for pair in tests[0].pairs:
            found = causal_runs.label_pair(measured[0].session, pair, name, mask)
            rows.append({"label": name, "pair": pair.name, **asdict(found)})
    return rows


def read_label(given: str, test: RunTest) -> tuple[str, Bits]:
    """A known skill by name, or NAME=FILE.

    Raises:
        ValueError: for an unknown skill, or a file without one 0/1 per evaluate token.
    """
    tokens = test.run.task.splits.evaluate
    name, equals, file = given.partition("=")
    if not equals:
        if name not in tokens.skills:
            raise ValueError(
                f"--label must be a known skill, one of {sorted(tokens.skills)}, or NAME=FILE, got '{name}'"
            )
        return name, tokens.skills[name].numpy()
    try:
        values = json.loads(Path(file).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"label file '{file}' must be a JSON list of 0 and 1 ({error})") from error
    if not isinstance(values, list) or len(values) != tokens.count:
        raise ValueError(
            f"label file '{file}' must hold one value per evaluate token, {tokens.count}; label that split"
        )
    return name, np.array([bool(v) for v in values])


def verdict_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of verdicts with a plain-words reason per row."""
    lines = [
        "| cluster | verdict | single run | grade | D (nats) | T | pipeline p | A (nats) | seeds | reason |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        i = row["inputs"]
        p = "not run" if i["pipeline_p"] is None else f"{i['pipeline_p']:.3f}"
        lines.append(
            f"| {row['name']} | {row['verdict']} | {row['single_run_verdict']} | {row['grade'] or '-'} "
            f"| {i['damage']['estimate']:.3g} [{i['damage']['low']:.3g}, {i['damage']['high']:.3g}] "
            f"| {i['effect']['estimate']:.2f} | {p} | {i['attributed']['estimate']:.3g} | {i['seeds']} "
            f"| {row['reason']} |"
        )
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["single_run_verdict"]] = counts.get(row["single_run_verdict"], 0) + 1
    summary = (
        ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "no pair could be chosen"
    )
    return "\n".join([*lines, "", f"By the rule without the seed clauses: {summary}.", ""])


def plain(value: Any) -> Any:
    """JSON values; numbers that are not finite become None or the word ``inf``."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
