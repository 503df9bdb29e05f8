"""A study that was stopped goes on with its next run and says the same as one that was not."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from experiments import causal, causal_runs, kept_evidence
from experiments.causal import plan_settings, run_study
from experiments.config import load_config
from experiments.pipeline import open_run, run_stages

FEW = (
    "draws=9",
    "least_draws=5",
    "rotations=9",
    "random_bases=2",
    "reference_intervals=2",
    "shuffled_bases=0",
    "gradient_draws=5",
    "transplant_draws=3",
    "shuffle_draws=5",
    "planted=2",
    "resamples=50",
    "optimised_draws=1",
    "pairs=2",
    "nulls=1",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("kept")
    bases = [{"kind": "trajectory", "vectors": 6}]
    for seed in (0, 1):
        settings = {"bases": bases, "threads": 1, "clusters.scaled": True, "seed": seed}
        run_stages(open_run(load_config("smoke", settings), place / str(seed), say=lambda _: None))
    return [place / "0", place / "1"]


class Killed(Exception):
    pass


def test_a_stopped_study_measures_only_what_is_left(runs, tmp_path, monkeypatch):
    settings = plan_settings(FEW)
    run_study(runs, ["trajectory"], tmp_path / "whole", settings)
    assert not (tmp_path / "whole" / "parts").exists()
    real, seen = causal_runs.measure_run, []

    def measure(test, *, last: int):
        if len(seen) == last:
            raise Killed
        seen.append(test.run.config.seed)
        return real(test)

    monkeypatch.setattr(causal_runs, "measure_run", lambda test: measure(test, last=1))
    with pytest.raises(Killed):
        run_study(runs, ["trajectory"], tmp_path / "stopped", settings)
    assert not (tmp_path / "stopped" / "study.json").exists()
    monkeypatch.setattr(causal_runs, "measure_run", lambda test: measure(test, last=9))
    run_study(runs, ["trajectory"], tmp_path / "stopped", settings)
    assert seen == [0, 1]
    whole, stopped = (
        json.loads((tmp_path / name / "study.json").read_text()) for name in ("whole", "stopped")
    )
    # Two studies of one plan: the second opening of the evaluate split is the same one.
    for changing in ("seconds", "cpu_seconds", "peak_rss_bytes"):
        whole.pop(changing)
        stopped.pop(changing)
    assert whole == stopped


def test_evidence_comes_back_as_it_was_and_only_under_its_key(runs, tmp_path):
    test = causal_runs.choose_pairs(
        causal.load_run(runs[0], lambda _: None), "trajectory", plan_settings(FEW)
    )
    measured = causal_runs.measure_run(test)
    path = tmp_path / "part.safetensors"
    kept_evidence.keep_measurement(path, "key", measured)
    again = kept_evidence.kept_measurement(path, "key", test)
    assert again is not None
    for mine, other in zip((*measured.pairs, *measured.nulls), (*again.pairs, *again.nulls), strict=True):
        assert repr(causal.plain(asdict(mine))) == repr(causal.plain(asdict(other)))
        for name in ("damage", "effect", "share", "attributed"):
            assert np.array_equal(getattr(mine, name).draws, getattr(other, name).draws, equal_nan=True)
        assert mine.effect.draws.dtype == other.effect.draws.dtype
    assert measured.span == again.span
    assert kept_evidence.kept_measurement(path, "another", test) is None
    path.write_bytes(path.read_bytes()[:-100])
    assert kept_evidence.kept_measurement(path, "key", test) is None
    assert kept_evidence.kept_measurement(tmp_path / "none", "key", test) is None


def test_a_split_of_unseen_sums_is_opened_apart_from_the_runs_own(runs, tmp_path):
    record = json.loads((runs[1] / "run.json").read_text())
    record["evaluate_openings"] = [{"plan": "own", "exploratory": False, "by": "study"}]
    (runs[1] / "run.json").write_text(json.dumps(record))
    for name, expected in (("first", False), ("second", True)):
        settings = plan_settings([*FEW, f"unseen={70 + len(name)}", "ranked=60"])
        run_study([runs[1]], ["trajectory"], tmp_path / name, settings)
        study = json.loads((tmp_path / name / "study.json").read_text())
        assert study["evaluate_sequences"] == [70 + len(name)]
        assert study["exploratory"] == [expected]
        assert (study["settings"]["unseen"], study["settings"]["ranked"]) == (70 + len(name), 60)
        assert f"on the first 60 of {70 + len(name)} sequences" in (runs[1] / "report.html").read_text()
    openings = json.loads((runs[1] / "run.json").read_text())["evaluate_openings"]
    assert [o.get("unseen") for o in openings] == [None, 75, 76]


def test_a_run_that_cannot_know_what_training_saw_is_refused(runs, tmp_path):
    config = load_config("smoke", {"checkpoints.directory": str(runs[0] / "checkpoints")})
    opened = open_run(config, tmp_path / "opened", say=lambda _: None)
    with pytest.raises(ValueError, match="'unseen' must be 0 for opened checkpoints and texts, got 9"):
        causal_runs.with_unseen(opened, 9)
