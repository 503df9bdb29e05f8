"""Rows of the tables against planted answers, thinning against a second measurement, and one smoke run."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from experiments.config import load_config
from experiments.run.run import open_run
from experiments.run.stages.training import trained_series
from experiments.study.measured import on_select
from experiments.study.multiverse import (
    FACTORS,
    Branch,
    BranchResult,
    branches,
    outcome,
    spaced,
    survival,
    thinned,
)
from experiments.study.reproduce import seed
from experiments.study.reproduce.carry import GroupDamage, counted_places, group_damage
from experiments.study.reproduce.claims import CLAIMS, Claim, judge_claim, judge_claims
from experiments.study.reproduce.measure import ReproductionSettings, measure_bases
from experiments.study.reproduce.paper_rows import (
    PUBLISHED_CLUSTERS,
    Stored,
    along,
    factor_rows,
    signal_row,
)
from experiments.study.reproduce.paper_tables import paper_tables
from experiments.study.reproduce.rows import (
    BasisRow,
    CarryScores,
    FeatureRow,
    LossShares,
    Paths,
    Scoring,
    TokenSplits,
    Variant,
    carry_columns,
    cluster_variants,
    hidden_share,
    loss_shares,
)
from experiments.study.reproduce.tables import Reproduction, reproduction_tables, spread
from experiments.study.reproduce.verb import run_reproduction
from experiments.tasks.arithmetic import make_data, token_loss
from polca_edit.allocation.allocate import Allocation, Projections, allocate, project
from polca_edit.artifacts import from_plain
from polca_edit.basis.record import random_basis
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.clusters.density import ClusterSettings
from polca_edit.clusters.features import Trajectories
from polca_edit.derivatives.objective import Objective
from polca_edit.models import TransformerShape, build_small_transformer
from polca_edit.observation import ObserveSettings
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


def _scoring(draws):
    return Scoring(CLUSTERS, 20, draws=draws, variants=(Variant("hdbscan", False),))


def test_planted_carry_cluster_is_chosen_on_select_and_scored_on_evaluate(data):
    splits = TokenSplits(data.select, data.evaluate)
    paths = Paths(_planted(data.select, 0), _planted(data.evaluate, 1))
    projections = _projections(paths.select)
    found = carry_columns(paths, projections, splits, _scoring(2))
    assert found.homogeneity > 0.99
    carry = data.evaluate.skills["carry"]
    # Carry tokens at the 1000s place move with the others; nothing is dropped, so both recalls agree.
    inside = float((carry & counted_places(data.evaluate)).sum() / carry.sum())
    assert found.recall_all == pytest.approx(inside, abs=0.03)
    assert found.recall_paper == pytest.approx(inside, abs=0.03)
    assert found.vector == 0
    assert found.stability > 0.9
    assert found.validity > 0.5
    labels = cluster_variants(paths, splits, _scoring(2))[0].vectors[0].evaluate.labels
    assert found.adjusted_rand == adjusted_rand_score(carry, labels) > 0.5
    assert found.rule_auc > 0.99
    assert found.rule_homogeneity == 1.0
    # The same paths on evaluate with the labels' places swapped must not look good.
    turned = _planted(replace(data.evaluate, skills={k: ~v for k, v in data.evaluate.skills.items()}), 1)
    worse = carry_columns(replace(paths, evaluate=turned), projections, splits, _scoring(1))
    assert worse.homogeneity < 0.5
    assert worse.adjusted_rand < found.adjusted_rand - 0.3


def test_the_papers_measure_finds_a_planted_carry_and_its_factors_say_what_hides_it(data):
    tokens, paths = data.select, _planted(data.select, 0)
    given = Stored(0, "hessian", _projections(paths), tokens, 20)
    own = Trajectories("polca", paths, True)
    row = signal_row(given, "trapezoid", own, PUBLISHED_CLUSTERS)
    assert row.homogeneity > 0.99
    carry = tokens.skills["carry"]
    inside = float((carry & counted_places(tokens)).sum() / carry.sum())
    assert row.recall == pytest.approx(inside, abs=0.05)
    assert row.f1 == pytest.approx(2 * row.homogeneity * row.recall / (row.homogeneity + row.recall))
    assert row.top_three[0] == row.homogeneity
    # Where carries at the 10s alone count, those at the 100s put the cluster below 85 %.
    alone = signal_row(given, "trapezoid", own, PUBLISHED_CLUSTERS, counted=tokens.skills["10s"])
    assert alone.eligible < row.eligible
    # Labels that the paths know nothing of.
    order = torch.randperm(len(carry), generator=torch.Generator().manual_seed(1))
    blind = replace(given, tokens=replace(tokens, skills=tokens.skills | {"carry": carry[order]}))
    assert (signal_row(blind, "trapezoid", own, PUBLISHED_CLUSTERS).homogeneity or 0.0) < 0.7


def test_factors_start_from_the_published_setting_and_change_one_thing(data):
    given = Stored(0, "hessian", _projections(_planted(data.select, 0)), data.select, 20)
    rows = list(factor_rows(given, spacings=(20,)))
    assert [row.name for row in rows].count("as published") == 2
    assert {row.spacing for row in rows} == {"10", "10–20"}  # eleven intervals: the last one stays
    for rule in ("first_order", "trapezoid"):
        own = along(given.projections, rule, rule)
        base = next(row for row in rows if row.rule == rule and row.name == "as published")
        assert base == signal_row(given, rule, own, PUBLISHED_CLUSTERS, name="as published")
        kept = next(row for row in rows if row.rule == rule and row.name == "rising vectors kept")
        assert kept.kept == 2 >= base.kept


def test_paper_tables_of_a_run(smoke_run, tmp_path):
    file = tmp_path / "tables.json"
    paper_tables(smoke_run, None, file)
    found = json.loads(file.read_text())
    names = {row["name"] for row in found["families"]}
    assert {"exact_loss", "fisher", "first_order", "polca", "trajectory"} <= names
    assert 0.3 < found["carry_share"] < 0.7
    purer = next(c for c in found["claims"] if "exact losses" in c["claim"] and c["column"] == "homogeneity")
    assert len(purer["ours"]) == 1
    assert "as published" in file.with_suffix(".md").read_text()


def test_a_short_uneven_run_has_breakthroughs_in_both_studies(data):
    """Half the span of steps 0, 5, 10, 15 is 7, and no checkpoint has 7 steps on both sides."""
    short = _planted(data.select, 0)[[0, 3, 6, 11]]
    paths, steps = Paths(short, short), torch.tensor([0, 5, 10, 15])
    projections = replace(_projections(short), steps=steps)
    splits = TokenSplits(data.select, data.select)
    [clustered] = cluster_variants(paths, splits, _scoring(1))
    vectors = [both.select for both in clustered.vectors]
    assert 0 <= hidden_share(vectors, short, projections, 100) <= 1
    settings = ObserveSettings(clusters=CLUSTERS, breakthrough_delta=100)
    found = outcome(projections, Branch(2, 1, False, False, 0.03, "trapezoid"), data.select, settings)
    assert 0 <= found.hidden_share <= 1


def test_loss_shares_judge_groups_by_hand(data):
    tokens = data.select
    values = torch.zeros(2, 1, tokens.count, dtype=torch.float64)
    exact = torch.full((2, tokens.count), -0.5, dtype=torch.float64)
    values[:, 0] = -0.5
    values[:, 0, tokens.skills["1s"]] = -0.45
    exact[:, tokens.skills["1000s"]] = -0.01  # too small to be judged
    values[:, 0, tokens.skills["1000s"]] = 0.3
    residual = torch.zeros_like(exact)
    found = loss_shares(Allocation("trapezoid", torch.arange(3), values, residual, exact), tokens)
    assert found.groups["1s"] == pytest.approx(0.9)
    assert "1000s" not in found.groups
    assert found.worst_group_error == max(abs(share - 1) for share in found.groups.values()) >= 0.1
    mean = float(values.sum((0, 1)).mean() / exact.sum(0).mean())
    assert found.explained_share == pytest.approx(mean)


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
    assert torch.equal(spaced(full, 20).steps, mine.steps)
    uneven = replace(full, steps=torch.tensor([0, 10, 25, 30, 60, 65]))
    assert spaced(uneven, 15).steps.tolist() == [0, 25, 60, 65]
    assert torch.equal(spaced(uneven, 15).gradients, full.gradients[[0, 2, 4, 5]])


def test_survival_counts_branches_by_level():
    def result(stride, scaled, a, b, seed=0):
        branch = Branch(2, stride, scaled, False, 0.02, "trapezoid")
        return BranchResult(branch, seed, "as preset", {"a": a, "b": b})

    results = [
        result(1, False, True, False),
        result(1, True, True, True, seed=1),
        result(2, False, False, False),
    ]
    table = survival(results)
    assert table["a"].share == pytest.approx(2 / 3)
    assert table["a"].branches == 3
    assert table["a"].levels["stride"] == {"1": 1.0, "2": 0.0}
    assert table["b"].levels["scaled"] == {"False": 0.0, "True": 1.0}
    assert table["b"].levels["seed"] == {"0": 0.0, "1": 1.0}
    assert tuple(table["a"].levels) == FACTORS
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
    settings = ObserveSettings(clusters=CLUSTERS, breakthrough_delta=20)
    found = outcome(projections, branch, data.select, settings)
    assert found.homogeneity > 0.99
    assert found.explained_share == pytest.approx(1.0, abs=0.05)


def test_group_damage_by_hand(data):
    tokens = data.select
    change = torch.zeros(tokens.count)
    change[tokens.skills["carry@10s"] | tokens.skills["carry@100s"]] = 2.0
    change[tokens.skills["1s"] | tokens.skills["1000s"]] = 0.5
    assert group_damage(change, tokens) == GroupDamage(2.0, 0.0, 0.5)


def _scores(homogeneity):
    return CarryScores("kmeans/raw", None, 0.0, 1.0, homogeneity=homogeneity)


def test_spread_gives_mean_and_range_of_what_is_known():
    assert spread([0.2, 0.4, None]) == "0.30 [0.20, 0.40]"
    assert spread([0.2]) == "0.20"
    assert spread([None]) == spread([]) != spread([0.0])


def test_claims_are_read_off_the_rows():
    claim = Claim("a beats b", "homogeneity", "polca", "random")
    assert claim.published == (0.973, 0.902)

    def status(*pairs):
        return judge_claim(claim, pairs).status

    assert status((0.9, 0.8), (0.7, 0.6)) == "reproduced"
    assert status((0.9, 0.8), (0.7, 0.75)) == "mixed"
    assert status((0.5, 0.5), (0.1, 0.75)) == "not reproduced"
    assert status((None, 0.5)) == "not testable"
    assert status((None, 0.5), (0.9, 0.5)) == "reproduced"
    # By its own tables every comparison holds in the paper.
    assert all(c.published[0] > c.published[1] for c in CLAIMS)


def test_claims_take_unrotated_bases_of_the_same_seed():
    def row(seed, rotation, homogeneity):
        shares, scores = LossShares(None, 0.0, {}, 0.0, 0.0), _scores(homogeneity)
        return BasisRow("random", rotation, False, seed, 1, shares, 0.0, 0.0, scores, 0.0, None)

    rows = [row(0, "none", 0.5), row(0, "varimax", 1.0), row(1, "none", 0.7)]
    features = [FeatureRow("polca", 0, _scores(0.6)), FeatureRow("polca", 1, _scores(0.6))]
    found = {(c.column, c.published): c for c in judge_claims(rows, features)}
    judged = found["homogeneity", (0.973, 0.902)]
    assert judged.ours == ((0.6, 0.5), (0.6, 0.7))
    assert (judged.held, judged.status) == (1, "mixed")
    assert all(c.status == "not testable" for c in judge_claims([], []))


#: As the smoke preset records, so that the shared run serves every test.
RECORDED = {"training.record_every": 6}
SETTINGS = ReproductionSettings(
    3, None, ("trajectory_secant", "random"), (), rivals=False, draws=1, tolerance=0.05
)


def _silent(_):
    pass


def _opened(folder, **changes):
    return open_run(load_config("smoke", {**changes, "bases": [{"kind": "trajectory"}]}), folder, _silent)


def _weights_of(source, folder):
    """A run directory with the weights of another and nothing else."""
    shutil.copytree(source / "checkpoints", folder / "checkpoints")
    for part in ("config.yaml", "stages/train.json"):
        (folder / part).parent.mkdir(exist_ok=True)
        shutil.copy(source / part, folder / part)
    return folder


@pytest.fixture
def copied(smoke_run, tmp_path):
    """Copies of the weights of the shared smoke run, by name."""
    return lambda name: _weights_of(smoke_run, tmp_path / name)


@pytest.fixture(scope="module")
def reproduced(smoke_run, tmp_path_factory):
    """Settings, result file and run directory of one smoke reproduction, to read only."""
    place = tmp_path_factory.mktemp("reproduce")
    folder, file = _weights_of(smoke_run, place / "runs" / "seed0"), place / "rows.json"
    settings = replace(
        SETTINGS, kinds=("trajectory_secant", "hessian", "random"), rotated=("trajectory_secant",)
    )
    run_reproduction("smoke", [0], file, folder.parent, settings, _silent, **RECORDED)
    return settings, file, folder


def test_smoke_reproduction_writes_every_column(reproduced):
    settings, file, folder = reproduced
    written = json.loads(file.read_text())
    result = from_plain(Reproduction, written)
    names = {(row.basis, row.rotation) for row in result.rows}
    assert len(names) == len(result.rows) == 3 + 7
    shares = {row.loss.explained_share for row in result.rows if row.basis == "trajectory_secant"}
    assert max(shares) - min(shares) < 1e-4  # rotations change no total
    assert {row.rotation for row in result.rows if row.supervised} == {"contrastive"}
    rivals = {row.feature: row.carry for row in result.features}
    assert set(rivals) == {"exact_loss", "loss_change", "fisher", "first_order", "polca_trapezoid"}
    assert rivals["exact_loss"].outlier_share < 1  # its tokens end above zero and still fall
    rules = {row.rule: row for row in result.quadrature}
    assert abs(rules["gauss3"].mean_error) < abs(rules["trapezoid"].mean_error)
    assert {"schema", "versions", "hardware", "config", "seeds"} <= set(written)
    beside = file.with_suffix(".md").read_text()
    assert all(table.markdown() in beside for table in reproduction_tables(result))
    assert not list((folder / "kept").rglob("*.safetensors"))
    said: list[str] = []
    run_reproduction("smoke", [0], file, folder.parent, settings, said.append, **RECORDED)
    assert said == ["seed 0, kept"]
    assert json.loads(file.read_text())["rows"] == written["rows"]


@pytest.mark.parametrize(
    ("changes", "settings"),
    [({"training.learning_rate": 1e-3}, SETTINGS), ({}, replace(SETTINGS, draws=2))],
    ids=["learning rate", "settings"],
)
def test_tables_of_another_config_or_settings_are_made_again(copied, monkeypatch, changes, settings):
    made = []

    def measured(run, settings, say):
        made.append(run.config.training.learning_rate)
        return seed.SeedTables(0, settings, (), (), (), None, 0.0)

    monkeypatch.setattr(seed, "measure_seed", measured)
    folder = copied("run")
    for _ in range(2):
        seed.seed_tables(_opened(folder), SETTINGS, _silent)
    assert len(made) == 1
    found = seed.seed_tables(_opened(folder, **changes), settings, _silent)
    assert len(made) == 2
    assert found.settings == settings


def test_another_learning_rate_trains_and_projects_again(copied, tmp_path):
    """The same folder, another config: neither weights nor projections of the first are taken."""

    def slopes(folder, **changes):
        run = _opened(folder, **changes)
        found = on_select(run, trained_series(run), {"trajectory": 2}, _silent)["trajectory"]
        return found.projections.gradients, run.objective.passes.forward

    folder = copied("run")
    first, _ = slopes(folder)
    again, work = slopes(folder)
    assert torch.equal(again, first)
    assert work == 0  # read back
    faster = {"training.learning_rate": 1e-3}
    other, _ = slopes(folder, **faster)
    fresh, _ = slopes(tmp_path / "fresh", **faster)
    assert torch.equal(other, fresh)
    assert not torch.equal(other, first)


def test_an_interrupted_measurement_goes_on_where_it_stopped(copied, monkeypatch):
    def opened(folder):
        run = _opened(folder)
        return run, trained_series(run)

    whole = measure_bases(*opened(copied("whole")), SETTINGS, _silent)
    broken = copied("broken")
    run, checkpoints = opened(broken)
    real, calls, limit, places = Objective.directional, [], [0], len(checkpoints)

    def failing(self, *args, **kwargs):
        calls.append(len(args[1]))
        # The plan of the nodes asks along the path alone, bases along several vectors.
        if sum(rows > 1 for rows in calls) == limit[0]:
            raise RuntimeError("switched off")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Objective, "directional", failing)
    # Once among the select checkpoints, of which four are kept, once among the interior nodes of evaluate.
    for limit[0] in (5, places - 4 + places + 2):
        calls.clear()
        with pytest.raises(RuntimeError, match="switched off"):
            measure_bases(run, checkpoints, SETTINGS, _silent)
    run, checkpoints = opened(broken)
    limit[0] = -1
    calls.clear()
    resumed = measure_bases(run, checkpoints, SETTINGS, _silent)
    calls.clear()
    measure_bases(run, checkpoints, SETTINGS, _silent)
    assert calls  # a finished measurement only plans its nodes again, along the path itself
    assert set(calls) == {1}
    for kind, own in whole.items():
        other = resumed[kind]
        torch.testing.assert_close(own.select.gradients, other.select.gradients)
        torch.testing.assert_close(own.evaluate.interior_gradients, other.evaluate.interior_gradients)
        assert own.passes == pytest.approx(other.passes)


def test_bases_alone_with_a_fixed_rule(copied, reproduced):
    """A fixed rule gives nearly the adaptive shares; no table is made besides the bases."""
    said: list[str] = []
    settings = replace(
        SETTINGS, kinds=("trajectory_secant",), rotated=("trajectory_secant",), rule="gauss3", tables=False
    )
    folder = copied("runs/seed0")
    alone = run_reproduction("smoke", [0], None, folder.parent, settings, said.append, **RECORDED)
    intervals = len(_opened(folder).checkpoints()) - 1
    assert any(line.endswith(f", {3 * intervals} places") for line in said)
    assert [(row.basis, row.rotation) for row in alone.rows] == [("trajectory_secant", "none")]
    assert alone.quadrature == alone.features == ()
    adaptive = from_plain(Reproduction, json.loads(reproduced[1].read_text())).rows[0]
    assert (adaptive.basis, adaptive.rotation) == ("trajectory_secant", "none")
    assert alone.rows[0].loss.explained_share == pytest.approx(adaptive.loss.explained_share, abs=0.01)
