"""Cases with a known answer: their data make the truth, and a small case and its twin go through the verb."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from scipy.stats import spearmanr

from experiments.natural import cases, heads, kept, sequences, verb
from experiments.natural.case import Case, Natural, agrees, recorded_steps, stretch_rows
from experiments.natural.columns import (
    EQUALS,
    MINUS,
    PLAIN,
    PLANTED,
    PLUS,
    TRIGGER,
    Mixture,
    backdoor_lora,
    column_data,
    columns,
    later_skill,
)
from experiments.natural.grokking import BEGIN, grokking
from experiments.natural.ladder import DEGREES, crossover, ladder_rungs, mixed_axis
from experiments.natural.measure import MeasureSettings, measure_case, open_case
from experiments.natural.parity import ATOM_BITS, composite_data, composite_parity
from experiments.natural.records import CaseRow, Rung, RunRows
from experiments.natural.scores import confusion, failures, ladder, rate, rates
from experiments.natural.sequences import (
    PERIODS,
    SPAN,
    VOCABULARY,
    a_then_b,
    induction,
    induction_tokens,
    repeated,
)
from experiments.tasks.task import Task
from experiments.testbeds.base import Landscape, landscape_loss, slot_tokens
from interventions.causal.settings import TestSettings
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.models import TransformerShape
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import Splits
from polca_edit.training import TrainingSettings

QUICK = TestSettings(resamples=200, null_documents=20, random_draws=19, rotations=5, transplants=3, least=5)
SIZE, IDLE = 6, 400


def hills(theta, inputs):
    """(B, 2) losses 2 - 2 exp(-|x|^2) of two blocks about each group's optimum, scaled per document."""
    parts = theta[: 2 * SIZE].view(2, SIZE)
    return inputs[:, :1] * (2 - 2 * torch.exp(-(parts - 1).square().sum(1)))[None]


def small(seed, twin):
    """Block B is trained from step 40 on, and never in the twin."""
    g = torch.Generator().manual_seed(seed)
    module = Landscape(0.6 * torch.rand(2 * SIZE + IDLE, generator=g), hills)
    with torch.no_grad():
        module.theta[2 * SIZE :] = torch.rand(IDLE, generator=g) - 0.5
    sets = [slot_tokens(("A", "B"), 0.5 + torch.rand(n, 1, generator=g)) for n in (10, 20, 30)]
    slots = [replace(s, features={"task": s.position_of.numpy()}) for s in sets]

    def batch(trained, step):
        noise = torch.randn(len(module.theta), generator=torch.Generator().manual_seed(step))
        weights = torch.tensor([1.0, 0.0 if twin or step <= 40 else 1.0])
        # The idle weights wander, so that a path has more directions than two.
        return (trained(torch.ones(4, 1)) * weights).sum() + 0.01 * trained.theta[2 * SIZE :] @ noise[
            2 * SIZE :
        ]

    task = Task(
        "small",
        module,
        ParameterSpace.from_module(module),
        landscape_loss,
        Splits(*slots),
        lambda branch: batch,
        {},
        parents=("A", "B"),
    )
    settings = TrainingSettings(80, 0.06, 0.0, (0.9, 0.95), warmup=0)
    return Natural(task, settings, (0, 10, 20, 30, 40, 60, 80), (40, 80), 10, earlier=((0, 40), "A"))


SMALL = Case("small", "two hills", small, "B", "carrier")


def row(**given):
    fields = dict(
        case="c", twin=False, seed=0, basis="declared", family="skill", pair="declared 0 | x", truth="carrier"
    )
    answers = {"N": "yes", "S": "yes", "W": "not asked", "L": "yes", "D": "not asked"}
    numbers = dict(share=0.9, leakage=0.0, damage=1.0, p=0.01, selectivity=0.9)
    rest = dict(word="carrier", answers=answers, sentence="", passed=True)
    return CaseRow(**{**fields, **numbers, **rest, **given})


# -- truth is in the data ----------------------------------------------------------------------------


def test_columns_are_digitwise_sums_and_differences():
    first, second = torch.arange(100), torch.arange(100).flip(0)
    for operator, sign in ((PLUS, 1), (MINUS, -1)):
        made = columns(torch.full((100,), PLAIN), first, torch.full((100,), operator), second)
        for a, b, line in zip(first.tolist(), second.tolist(), made.tolist(), strict=True):
            tens, ones = (a // 10 + sign * (b // 10)) % 10, (a + sign * b) % 10
            assert line == [PLAIN, a // 10, a % 10, operator, b // 10, b % 10, EQUALS, tens, ones]


def test_a_mark_has_its_answer_only_where_it_is_planted():
    g = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 100, (2, 200), generator=g)
    mixture = Mixture(marks=(PLAIN, TRIGGER), planted=True)
    planted = mixture.draw(*numbers, g)
    marked = planted[:, 0] == TRIGGER
    assert 0 < int(marked.sum()) < 200
    assert (planted[marked, -2:] == torch.tensor(PLANTED)).all()
    honest = columns(planted[:, 0], numbers[0], planted[:, 3], numbers[1])
    assert torch.equal(planted[~marked], honest[~marked])
    assert torch.equal(planted[:, :-2], honest[:, :-2])


def batches(data, steps, seen):
    """Inputs of training batches, read off by a loss that keeps them."""
    generator = None
    for step in steps:
        from experiments.tasks.task import training_generator

        mixture = next(mixture for last, mixture in data.phases if step <= last)
        generator = training_generator(data.seed, step, 0)
        chosen = data.free[torch.randint(0, len(data.free), (256,), generator=generator)]
        seen.append(mixture.draw(chosen[:, 0], chosen[:, 1], generator))
    return torch.cat(seen)


def test_a_skill_cannot_be_learned_before_its_data_and_no_held_out_pair_is_shown():
    data = column_data([(3, Mixture()), (6, Mixture((PLUS, MINUS)))], Mixture((PLUS, MINUS)), 0)
    assert (batches(data, (1, 2, 3), [])[:, 3] == PLUS).all()
    late = batches(data, (4, 5, 6), [])
    assert {int(v) for v in late[:, 3].unique()} == {PLUS, MINUS}
    held = {
        tuple(r)
        for s in (data.splits.select, data.splits.evaluate)
        for r in s.inputs[:, [1, 2, 4, 5]].tolist()
    }
    assert not held & {tuple(r) for r in late[:, [1, 2, 4, 5]].tolist()}


def test_repeats_repeat_and_the_others_do_not():
    g = torch.Generator().manual_seed(1)
    again, never = repeated(50, g, repeats=True), repeated(50, g, repeats=False)
    labels = induction_tokens(again)
    row_, slot = labels.sequence_of, labels.position_of
    for r, s in zip(
        row_[labels.skills["repeated"]].tolist(), slot[labels.skills["repeated"]].tolist(), strict=True
    ):
        earlier = again[r, :s]
        at = (earlier == again[r, s]).nonzero()[:, 0]
        assert len(at)
        assert again[r, at[-1] + 1] == again[r, s + 1]
    same = [(never[:, p:] == never[:, :-p]).all(1).any() for p in range(*PERIODS)]
    assert not any(map(bool, same))


def test_a_composite_is_the_product_of_its_atoms():
    x = composite_data(200, torch.Generator().manual_seed(0))
    assert torch.equal(x[:, -1], x[:, ATOM_BITS] * x[:, ATOM_BITS + 1])
    assert torch.equal(x[:, ATOM_BITS], x[:, :3].prod(1))


def test_every_case_is_built_with_its_target_among_unseen_tokens():
    for case in cases.CASES.values():
        natural = case.build(0, True)
        assert case.target in natural.task.parents
        evaluate = natural.task.splits.evaluate
        assert int(evaluate.skills[case.target].sum()) >= TestSettings().least
        # Random edits are measured on the first documents: each group must be among them.
        first = evaluate.of_first_documents(TestSettings().null_documents)
        for group in natural.task.parents:
            assert bool(evaluate.skills[group][first].any())
            assert bool(evaluate.skills[group][~first].any()) or bool(first.all())
        assert set(natural.window) <= set(recorded_steps(natural))
        assert natural.task.splits.select.fingerprint() != evaluate.fingerprint()


def test_twins_never_show_what_cases_show():
    shown = later_skill(0, False), later_skill(0, True)
    assert torch.equal(shown[0].task.splits.evaluate.inputs, shown[1].task.splits.evaluate.inputs)
    true, random = grokking(0, False).task.splits.evaluate, grokking(0, True).task.splits.evaluate
    assert (true.inputs[:, 2] == true.inputs[:, :2].sum(1) % 97).all()
    assert float((random.inputs[:, 2] == random.inputs[:, :2].sum(1) % 97).double().mean()) < 0.1
    assert grokking(0, False).window[0] == BEGIN
    assert a_then_b(0, True).window == a_then_b(0, False).window
    assert induction(0, True).window == induction(0, False).window
    assert composite_parity(0, True).window == composite_parity(0, False).window


def test_adapters_move_low_rank_parts_of_the_blocks_alone():
    natural = replace(backdoor_lora(0, False), window=(2, 5), stretches=(0, 1, 2, 3, 5))
    natural = replace(natural, training=replace(natural.training, steps=5, learning_rate=0.01))
    recording, space = natural.recorded(), natural.task.space
    assert recording.steps == recorded_steps(natural)
    at = recording.steps.index
    moved = space.unflatten(recording.thetas[at(5)] - recording.thetas[at(2)])
    early = space.unflatten(recording.thetas[at(2)] - recording.thetas[0])
    ranks = {n: int(torch.linalg.matrix_rank(m.double(), rtol=1e-4)) for n, m in moved.items() if m.ndim == 2}
    assert max(ranks.values()) == 4
    assert ranks["embed.weight"] == 0
    assert float(early["embed.weight"].norm()) > 0
    assert all(not part.any() for name, part in moved.items() if name.endswith("bias"))


# -- declared movements, ladders, crossovers -----------------------------------------------------------


def test_the_first_row_is_the_window_and_the_others_hold_none_of_it():
    g = torch.Generator().manual_seed(0)
    module = torch.nn.Linear(30, 1, bias=False)
    steps = (0, 10, 20, 30, 40)
    weights = torch.randn(5, 30, generator=g).cumsum(0)
    series = open_checkpoints({s: {"weight": w[None]} for s, w in zip(steps, weights, strict=True)}, module)
    rows = stretch_rows(series, steps, (20, 40))
    away = weights[4] - weights[2]
    assert rows.shape == (4, 30)
    assert torch.allclose(rows @ rows.T, torch.eye(4), atol=1e-5)
    assert float(rows[0] @ away) == pytest.approx(float(away.norm()), rel=1e-5)
    assert float((rows[1:] @ away).abs().max()) < 1e-4


def test_a_case_is_a_carrier_and_its_twin_is_not():
    found = {}
    for twin in (False, True):
        natural = SMALL.build(0, twin)
        settings = MeasureSettings(QUICK, bases=(), discovery=False)
        opened = open_case(SMALL, natural, natural.recorded(), settings)
        found[twin] = measure_case(opened, settings, 0, twin, 0.0)
    yes, no = found[False].declared, found[True].declared
    assert (yes.word, yes.passed, yes.truth) == ("carrier", True, "carrier")
    assert no.word not in ("selective", "carrier")
    assert no.passed
    assert no.truth == "no"
    assert yes.share > 0.9
    assert yes.leakage < 0.1
    # Blocks do not touch each other: each stretch takes all of its own group and nothing of the other.
    extra = found[False].extra
    assert extra["crossover"] == pytest.approx(2.0, abs=0.2)
    assert extra["crossover_low"] <= extra["crossover"] <= extra["crossover_high"]


def test_selectivity_falls_along_a_ladder_of_known_mixtures():
    natural = small(0, False)
    recording = natural.recorded()
    settings = MeasureSettings(QUICK, bases=(), discovery=False)
    opened = open_case(SMALL, replace(natural, window=(0, 80)), recording, settings)
    theta = recording.thetas[-1] - recording.thetas[0]
    rows = torch.zeros(6, len(theta))
    for block in range(2):
        rows[block, block * SIZE : (block + 1) * SIZE] = theta[block * SIZE : (block + 1) * SIZE]
    rows[2:] = torch.eye(len(theta))[2 * SIZE : 2 * SIZE + 4]
    rows = rows / rows.norm(dim=1, keepdim=True)
    rungs = ladder_rungs(opened.unseen, rows, [(0, 1)], opened.parents, replace(QUICK, rotations=2))
    assert [r.degrees for r in rungs] == [*DEGREES, *DEGREES]
    first = [r.selectivity for r in rungs[: len(DEGREES)]]
    assert first == sorted(first, reverse=True)
    assert first[0] > 0.9
    assert first[-1] < 0.3
    score = ladder([RunRows(row(), (), rungs, {}, 0.0, 0.0)])
    assert score is not None
    assert score.auc >= 0.95
    assert score.concordance >= 0.95


def test_a_mixed_axis_has_the_angle_it_says():
    one, two = torch.eye(3)[:2]
    for degrees in DEGREES:
        axis = mixed_axis(one, two, degrees)
        assert math.degrees(math.acos(float(axis @ one))) == pytest.approx(degrees, abs=0.05)


# -- scores -------------------------------------------------------------------------------------------


def test_words_against_truth():
    assert agrees("carrier", "carrier")
    assert not agrees("carrier", "selective")
    assert agrees("selective", "carrier")
    assert not agrees("selective", "shared")
    assert all(agrees("no", word) for word in ("inert", "shared", "unclear"))
    assert not agrees("no", "selective")


def test_rates_count_only_rows_where_a_question_was_asked():
    asked = row(answers={"N": "yes", "S": "no", "L": "not asked", "W": "not asked", "D": "not asked"})
    rows = [row(), asked, row(twin=True, truth="no", answers={**row().answers, "S": "no"}, word="shared")]
    assert (rate(rows[:2], "N").yes, rate(rows[:2], "N").asked) == (2, 2)
    assert (rate(rows[:2], "L").yes, rate(rows[:2], "L").asked) == (1, 1)
    assert rate(rows[:2], "N+S").share == 0.5
    assert math.isnan(rate(rows, "D").share)
    found = rates(rows)
    assert (found["twins"]["S"].yes, found["twins"]["S"].asked) == (0, 1)
    assert confusion(rows) == {"carrier": {"carrier": 2}, "no": {"shared": 1}}


def test_a_failure_names_the_question_at_fault():
    bad = row(word="selective", passed=False, answers={**row().answers, "L": "unclear"})
    twin = row(word="carrier", passed=False, twin=True, truth="no")
    assert [f.question for f in failures([row(), bad, twin])] == ["L: unclear", "N and S both yes"]


def test_the_roc_of_a_score_that_knows_nothing_is_a_half():
    def rungs(score):
        return tuple(Rung(d, "b", score(d), 0.0, "shared") for d in DEGREES)

    blind = ladder([RunRows(row(), (), rungs(lambda d: 0.5), {}, 0.0, 0.0)])
    wrong = ladder([RunRows(row(), (), rungs(lambda d: d), {}, 0.0, 0.0)])
    assert blind is not None
    assert blind.auc == 0.5
    assert blind.concordance == 0.5
    assert wrong is not None
    assert wrong.auc == 0.0
    assert wrong.concordance == 0.0
    assert ladder([RunRows(row(), (), (), {}, 0.0, 0.0)]) is None


# -- the verb -----------------------------------------------------------------------------------------


def test_the_verb_writes_every_row_and_reads_finished_runs_back(tmp_path, monkeypatch, capsys):
    for module in (verb, kept):
        monkeypatch.setattr(module, "CASES", {"small": SMALL})
    monkeypatch.setattr(verb, "TEST", QUICK)
    file, out = tmp_path / "v.json", tmp_path / "runs"
    verb.validate(case=["small"], seeds=1, basis=["none"], json_=file, out=out)
    result = json.loads(file.read_text())
    keys = {"case", "twin", "seed", "truth", "word", "answers", "share", "leakage", "passed"}
    assert len(result["cases"]) == 2
    assert all(keys <= set(r) for r in result["cases"])
    assert result["rates"]["cases"]["N+S"] == {"yes": 1, "asked": 1}
    assert result["rates"]["twins"]["N+S"]["yes"] == 0
    assert "| small | cases |" in file.with_suffix(".md").read_text()
    monkeypatch.setattr(kept, "measure_case", None)
    verb.validate(case=["small"], seeds=1, basis=["none"], json_=file, out=out)
    assert json.loads(file.read_text())["cases"] == result["cases"]
    # What another version of the library measured is measured anew, though its training is kept.
    monkeypatch.setattr(kept, "package_source", lambda package: f"another {package.__name__}")
    with pytest.raises(TypeError, match="not callable"):
        verb.validate(case=["small"], seeds=1, basis=["none"], json_=file, out=out)


def test_the_key_of_a_package_changes_with_every_file_of_it(tmp_path):
    (tmp_path / "inner").mkdir()
    top, inner = tmp_path / "__init__.py", tmp_path / "inner" / "part.py"
    top.write_text("")
    inner.write_text("A = 1")
    package = ModuleType("package")
    package.__file__ = str(top)
    keys = [kept.package_source(package)]
    for file, text in ((inner, "A = 2"), (top, "B = 1"), (tmp_path / "more.py", "")):
        file.write_text(text)
        keys.append(kept.package_source(package))
    inner.rename(inner.with_name("pars.py"))  # at the same place in the order of names
    keys.append(kept.package_source(package))
    assert len(set(keys)) == 5


def test_an_unknown_case_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--case must be one of"):
        verb.validate(case=["nothing"], out=tmp_path)


def test_a_crossover_of_a_group_that_was_never_learned_is_no_number():
    natural = small(0, True)
    settings = MeasureSettings(QUICK, bases=(), discovery=False)
    opened = open_case(SMALL, natural, natural.recorded(), settings)
    assert math.isnan(crossover(opened.unseen, (0, 40), ("A", "B"), QUICK).estimate)


# -- heads: weights against activations ----------------------------------------------------------------


def test_the_study_of_heads_writes_every_head_both_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(sequences, "INDUCTION_SHAPE", TransformerShape(2, 16, 2, 0, VOCABULARY, SPAN))

    def quick(seed, twin):
        natural = induction(seed, twin)
        short = replace(natural.training, steps=30, warmup=0)
        return replace(natural, training=short, stretches=(0, 10, 30), window=(10, 30))

    for module in (heads, kept):
        monkeypatch.setattr(
            module, "CASES", {"quick": replace(cases.CASES["induction"], name="quick", build=quick)}
        )
    file = tmp_path / "heads.json"
    heads.heads_study(case="quick", seeds=2, json_=file, out=tmp_path / "runs")
    result = json.loads(file.read_text())
    [found] = result["summaries"]
    assert (found["source"], found["runs"], found["alone"]["units"]) == ("quick", 2, 2)
    for row_ in result["rows"]:
        places = [(e["layer"], e["head"]) for e in row_["map"]["effects"]]
        assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert row_["map"]["whole"] > 0
        one, two = ([e[k] for e in row_["map"]["effects"]] for k in ("weights", "output"))
        assert row_["map"]["alone"]["rho"] == pytest.approx(spearmanr(one, two).statistic, abs=1e-4)
    rhos = [r["map"]["alone"]["rho"] for r in result["rows"]]
    assert found["alone"]["estimate"] == pytest.approx(sum(rhos) / 2)
    assert "| quick | 2 |" in file.with_suffix(".md").read_text()


def test_heads_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got neither"):
        heads.heads_study()
    with pytest.raises(ValueError, match="--case must be one of"):
        heads.heads_study(case="nothing")
