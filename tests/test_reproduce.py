"""Rows of the tables against planted answers, thinning against a second measurement, and one smoke run."""

import json
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from experiments.config import load_config
from experiments.reproduce.claims import CLAIMS, Claim, judge_claim, judge_claims
from experiments.reproduce.measure import Settings, measure_bases, trained
from experiments.reproduce.rows import (
    TokenSplits,
    Variant,
    carry_fields,
    cluster_variants,
    over_seeds,
    share_fields,
)
from experiments.reproduce.verb import NUMBERS, PRESETS, run_reproduction
from experiments.run.run import open_run
from experiments.study.multiverse import Branch, branches, group_damage, outcome, survival, thinned
from experiments.tasks.arithmetic import make_data, token_loss
from polca_edit.allocation.allocate import Allocation, Projections, allocate, project
from polca_edit.basis.record import random_basis
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.clusters.density import ClusterSettings
from polca_edit.derivatives.objective import Objective
from polca_edit.models import TransformerShape, build_small_transformer
from polca_edit.parameters import ParameterSpace

torch.set_num_threads(1)
STEPS = 12
CLUSTERS = ClusterSettings(min_cluster_share=0.03, min_samples_share=0.01)


@pytest.fixture(scope="module")
def data():
    return make_data(100, 10, 120, 4, 0).splits


def _planted(tokens, seed):
    """Two vectors; along the first, carry tokens at the 10s and 100s fall late and all others early."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(STEPS, dtype=torch.float64)
    late = tokens.skills["carry@100s"] | tokens.skills["carry@10s"]
    early_path, late_path = -(time > 2).double(), -2.0 * (time > 8).double()
    paths = torch.where(late[None], late_path[:, None], early_path[:, None])
    paths = paths + 0.01 * torch.randn(paths.shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(paths.shape, generator=generator, dtype=torch.float64).cumsum(0)
    return torch.stack([paths, noise - noise[:1]], 1)


def _projections(paths):
    """A record whose trapezoid projected loss is the given paths."""
    count, _, tokens = paths.shape
    ones = torch.ones(count - 1, dtype=torch.float64)
    losses = 2 + paths[:, 0]
    zeros = torch.zeros(count - 1, tokens, dtype=torch.float64)
    moves = torch.ones(count - 1, 2, dtype=torch.float64)
    return Projections(torch.arange(count) * 10, losses, paths, moves, zeros, zeros, ones, ones)


def test_planted_carry_cluster_is_chosen_on_select_and_scored_on_evaluate(data):
    splits = TokenSplits(data.select, data.evaluate)
    select, evaluate = _planted(data.select, 0), _planted(data.evaluate, 1)
    clustered = cluster_variants(select, evaluate, splits, CLUSTERS, variants=[Variant("hdbscan", False)])
    fields = carry_fields(
        clustered, select, _projections(select), splits, CLUSTERS, delta=20, seed=0, draws=2
    )
    assert fields["carry_homogeneity"] > 0.99
    carry = data.evaluate.skills["carry"]
    # Carry tokens at the 1000s place move with the others; nothing is dropped, so both recalls agree.
    inside = float((carry & splits.counted_in(data.evaluate)).sum() / carry.sum())
    assert fields["recall_all"] == pytest.approx(inside, abs=0.03)
    assert fields["recall_paper"] == pytest.approx(inside, abs=0.03)
    assert fields["on_select"]["vector"] == 0
    assert fields["stability"] > 0.9
    assert fields["validity"] > 0.5
    found = clustered[0].vectors[0].evaluate.labels
    assert fields["agreement"]["adjusted_rand"] == adjusted_rand_score(carry, found) > 0.5
    assert fields["rule"]["auc"] > 0.99
    assert fields["rule"]["homogeneity"] == 1.0
    # The same paths on evaluate with the labels' places swapped must not look good.
    turned = _planted(replace(data.evaluate, skills={k: ~v for k, v in data.evaluate.skills.items()}), 1)
    bad = cluster_variants(select, turned, splits, CLUSTERS, variants=[Variant("hdbscan", False)])
    worse = carry_fields(bad, select, _projections(select), splits, CLUSTERS, delta=20, seed=0, draws=1)
    assert worse["carry_homogeneity"] < 0.5
    assert worse["agreement"]["adjusted_rand"] < fields["agreement"]["adjusted_rand"] - 0.3


def test_share_fields_judge_groups_by_hand(data):
    tokens = data.select
    values = torch.zeros(2, 1, tokens.count, dtype=torch.float64)
    exact = torch.full((2, tokens.count), -0.5, dtype=torch.float64)
    values[:, 0] = -0.5
    values[:, 0, tokens.skills["1s"]] = -0.45
    exact[:, tokens.skills["1000s"]] = -0.01  # too small to be judged
    values[:, 0, tokens.skills["1000s"]] = 0.3
    residual = torch.zeros_like(exact)
    fields = share_fields(Allocation("trapezoid", torch.arange(3), values, residual, exact), tokens)
    assert fields["group_shares"]["1s"] == pytest.approx(0.9)
    assert "1000s" not in fields["group_shares"]
    assert fields["worst_group_share_error"] >= 0.1
    mean = float(values.sum((0, 1)).mean() / exact.sum(0).mean())
    assert fields["explained_share"] == pytest.approx(mean)


def test_thinned_projections_are_those_of_the_thinned_series(data):
    module = build_small_transformer(TransformerShape(1, 8, 2, 8, 12, 12, 10), 0).double()
    space = ParameterSpace.from_module(module)
    generator = torch.Generator().manual_seed(0)
    thetas = [space.read(module)]
    for _ in range(5):
        thetas.append(thetas[-1] + 0.05 * torch.randn(space.size, generator=generator, dtype=torch.float64))
    checkpoints = open_checkpoints(thetas, space, steps=range(0, 60, 10))
    objective = Objective(module, token_loss, space)
    tokens = data.select.select(torch.arange(6))
    basis = random_basis(space.size, 3, generator, dtype=torch.float64)
    full = project(objective, checkpoints, [basis], tokens)[0]
    kept = [0, 2, 4, 5]
    direct = project(objective, checkpoints.subset(kept), [basis[2, 0]], tokens)[0]
    mine = thinned(full, 2, [2, 0])
    assert mine.steps.tolist() == [0, 20, 40, 50]
    for rule in ("first_order", "trapezoid"):
        torch.testing.assert_close(allocate(mine, rule).values, allocate(direct, rule).values)
    assert bool(allocate(mine).residual.isnan().all())


def test_survival_counts_branches_by_level():
    results = [
        {"stride": 1, "scaled": False, "conclusions": {"a": True, "b": False}},
        {"stride": 1, "scaled": True, "conclusions": {"a": True, "b": True}},
        {"stride": 2, "scaled": False, "conclusions": {"a": False, "b": False}},
    ]
    table = survival(results, ["stride", "scaled"])
    assert table["a"]["share"] == pytest.approx(2 / 3)
    assert table["a"]["levels"]["stride"] == {"1": 1.0, "2": 0.0}
    assert table["b"]["levels"]["scaled"] == {"False": 0.0, "True": 1.0}
    grid = list(branches((2, 4), (1, 2), ("trapezoid",)))
    assert len(grid) == len(set(grid)) == 2 * 2 * 2 * 2 * 2


def test_outcome_finds_the_planted_cluster_in_a_branch(data):
    paths = _planted(data.select, 0)
    # Gradients that make the trapezoid over unit displacements return the planted paths.
    gradients = torch.zeros_like(paths)
    for t in range(1, STEPS):
        gradients[t] = 2 * (paths[t] - paths[t - 1]) - gradients[t - 1]
    projections = replace(_projections(paths), gradients=gradients)
    branch = Branch(1, 1, False, False, 0.03, "trapezoid")
    found = outcome(projections, branch, data.select, CLUSTERS, delta=20)
    assert found["homogeneity"] > 0.99
    assert found["vector"] == 0
    assert found["explained_share"] == pytest.approx(1.0, abs=0.05)


def test_group_damage_by_hand(data):
    tokens = data.select
    change = torch.zeros(tokens.count)
    change[tokens.skills["carry@10s"] | tokens.skills["carry@100s"]] = 2.0
    change[tokens.skills["1s"] | tokens.skills["1000s"]] = 0.5
    assert group_damage(change, tokens) == {"carry": 2.0, "no carry": 0.0, "other places": 0.5}


def test_over_seeds_gives_mean_and_range():
    rows = [{"basis": "a", "rotation": "none", "supervised": False, "f1": v} for v in (0.2, 0.4, None)]
    line = over_seeds(rows, ["f1"])[0]
    assert line["seeds"] == 3
    assert line["f1"] == {"mean": pytest.approx(0.3), "low": 0.2, "high": 0.4, "count": 2}


def test_claims_are_read_off_the_rows():
    claim = Claim("a beats b", "carry_homogeneity", "polca", "random")
    assert claim.published == (0.973, 0.902)

    def part(polca, random):
        basis = {"basis": "random", "rotation": "none", "carry_homogeneity": random}
        turned = {"basis": "random", "rotation": "varimax", "carry_homogeneity": 1.0}
        return {"rows": [basis, turned], "features": [{"feature": "polca", "carry_homogeneity": polca}]}

    def status(*pairs):
        return judge_claim(claim, [part(*pair) for pair in pairs])["status"]

    assert status((0.9, 0.8), (0.7, 0.6)) == "reproduced"
    assert status((0.9, 0.8), (0.7, 0.75)) == "mixed"
    assert status((0.5, 0.5), (0.1, 0.75)) == "not reproduced"
    assert status((None, 0.5)) == "not testable"
    assert status((None, 0.5), (0.9, 0.5)) == "reproduced"
    assert all(row["status"] == "not testable" for row in judge_claims([]))
    # By its own tables every comparison holds in the paper.
    assert all(c.published[0] > c.published[1] for c in CLAIMS)


def test_smoke_reproduction_writes_every_column(tmp_path):
    settings = Settings(
        3, None, ("trajectory_secant", "hessian", "random"), ("trajectory_secant",), rivals=False, draws=1
    )
    file = tmp_path / "rows.json"
    changes = {**PRESETS["smoke"][0], "training.steps": 36}
    run_reproduction("smoke", [0], file, tmp_path / "runs", settings, lambda _: None, **changes)
    result = json.loads(file.read_text())
    columns = {"basis", "rotation", "supervised", "seed", "vectors", *NUMBERS}
    assert all(columns <= set(row) for row in result["rows"])
    names = {(row["basis"], row["rotation"]) for row in result["rows"]}
    assert len(names) == len(result["rows"]) == 3 + 7
    shares = {row["explained_share"] for row in result["rows"] if row["basis"] == "trajectory_secant"}
    assert max(shares) - min(shares) < 1e-4  # rotations change no total
    assert {row["rotation"] for row in result["rows"] if row["supervised"]} == {"contrastive"}
    rivals = {row["feature"]: row for row in result["features"]}
    assert set(rivals) == {"exact_loss", "loss_change", "fisher", "first_order", "polca_trapezoid"}
    assert rivals["exact_loss"]["outlier_share"] < 1  # its tokens end above zero and still fall
    rules = {row["rule"]: row for row in result["quadrature"]}
    assert abs(rules["gauss3"]["mean_error"]) < abs(rules["trapezoid"]["mean_error"])
    assert {"versions", "hardware", "config", "seeds", "claims"} <= set(result)
    said: list[str] = []
    run_reproduction("smoke", [0], file, tmp_path / "runs", settings, said.append, **changes)
    again = json.loads(file.read_text())
    assert said == ["seed 0, kept"]
    assert again["rows"] == result["rows"]


def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path, monkeypatch):
    overrides = {**PRESETS["smoke"][0], "training.steps": 36, "bases": [{"kind": "trajectory"}]}
    settings = Settings(3, None, ("trajectory_secant", "random"), (), rivals=False, draws=1)

    def opened(name):
        run = open_run(load_config("smoke", overrides), tmp_path / name, lambda _: None)
        return run, trained(run, lambda _: None)

    whole, _ = measure_bases(*opened("whole"), settings, lambda _: None)
    run, checkpoints = opened("broken")
    real, calls, limit = Objective.directional, [], [0]

    def failing(self, *args, **kwargs):
        calls.append(len(args[1]))
        if len(calls) == limit[0]:
            raise RuntimeError("switched off")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Objective, "directional", failing)
    # Once among the select checkpoints, once among the interior nodes of evaluate.
    for limit[0] in (5, 13 + 13 + 13 + 1):
        calls.clear()
        with pytest.raises(RuntimeError, match="switched off"):
            measure_bases(run, checkpoints, settings, lambda _: None)
    run, checkpoints = opened("broken")
    limit[0] = -1
    calls.clear()
    resumed, _ = measure_bases(run, checkpoints, settings, lambda _: None)
    calls.clear()
    measure_bases(run, checkpoints, settings, lambda _: None)
    assert calls  # a finished measurement only plans its nodes again, along the path itself
    assert set(calls) == {1}
    for kind, own in whole.items():
        other = resumed[kind]
        torch.testing.assert_close(own.select.gradients, other.select.gradients)
        torch.testing.assert_close(own.evaluate.interior_gradients, other.evaluate.interior_gradients)
        assert own.passes == pytest.approx(other.passes)


def test_bases_alone_with_a_fixed_rule(tmp_path):
    """A fixed rule gives nearly the adaptive shares; no table is made besides the bases."""
    changes = {**PRESETS["smoke"][0], "training.steps": 36}
    settings = Settings(3, None, ("loss_weighted", "random"), ("loss_weighted",), draws=1)
    results = []
    said: list[str] = []
    for name, chosen in (("a", settings), ("b", replace(settings, rule="gauss3", tables=False))):
        results.append(run_reproduction("smoke", [0], None, tmp_path / name, chosen, said.append, **changes))
    places = [line.rsplit(", ", 1)[1] for line in said if line.endswith("places")]
    assert places[1] == "36 places" != places[0]  # three in each of twelve intervals
    whole, alone = results
    assert [(r["basis"], r["rotation"]) for r in alone["rows"]] == [
        ("loss_weighted", "none"),
        ("random", "none"),
    ]
    assert alone["quadrature"] == alone["features"] == []
    adaptive = next(r for r in whole["rows"] if (r["basis"], r["rotation"]) == ("loss_weighted", "none"))
    assert alone["rows"][0]["explained_share"] == pytest.approx(adaptive["explained_share"], abs=0.01)
