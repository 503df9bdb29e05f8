"""The report against hand-made records: no model is trained, every shown number is known."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from experiments.report import figures
from experiments.report.formats import highlighted, nats, percent
from experiments.report.page import Section, write_report
from experiments.report.records import ClusterView, allocate_only, by_interest, over_headroom, read_run
from experiments.report.tokens import exact_combinations, nearest_to_medoid
from experiments.run.store import RunDirectory
from experiments.run.summary import summary_schema
from polca_edit.allocation.allocate import Projections, allocate
from polca_edit.artifacts import save_record

STEPS = torch.arange(0, 110, 10)
TOKENS, VECTORS = 40, 3
DROP_AT = 50
SKILLS = {"10s": np.arange(TOKENS) % 2 == 0, "carry": np.arange(TOKENS) % 4 == 0}
MEMBERS = {
    (0, 0): np.arange(TOKENS) < 10,
    (0, 1): np.arange(TOKENS) >= 30,
    (2, 0): np.arange(TOKENS) % 2 == 0,
}


def projections(generator: torch.Generator) -> Projections:
    """Vector 0 lowers every token's loss by one nat per interval from step DROP_AT on, others do noise."""
    count = len(STEPS)
    gradients = 0.01 * torch.randn(count, VECTORS, TOKENS, generator=generator, dtype=torch.float64)
    gradients[:, 0] = 1.0
    displacements = 0.1 * torch.ones(count - 1, VECTORS, dtype=torch.float64)
    displacements[:, 0] = torch.where(STEPS[:-1] >= DROP_AT, -1.0, 0.0)
    losses = 6.0 + torch.cat([torch.zeros(1), displacements[:, 0].cumsum(0)])[:, None].repeat(1, TOKENS)
    zeros = torch.zeros(count - 1, TOKENS, dtype=torch.float64)
    ones = torch.ones(count - 1, dtype=torch.float64)
    sides = (zeros, zeros.clone(), ones, ones.clone())
    return Projections(STEPS, losses.double(), gradients, displacements, *sides)


def damage_table() -> np.ndarray:
    """(K, M): vector v costs token i (v + 1) * i / 10 nats."""
    return np.outer(np.arange(1, VECTORS + 1), np.arange(TOKENS) / 10)


def damage_rows(table: np.ndarray, with_clusters: bool, with_skills: bool) -> list[dict]:
    rows = []
    skills = SKILLS if with_skills else {}
    for split in ("select", "evaluate"):
        for vector in range(VECTORS):
            targets = [(None, np.ones(TOKENS, dtype=bool))]
            targets += [(c, mask) for (v, c), mask in MEMBERS.items() if v == vector and with_clusters]
            for cluster, mask in targets:
                for dose in (0.5, 1.0) if split == "select" else (1.0,):
                    rows.append(
                        {
                            "vector": vector,
                            "cluster": cluster,
                            "operator": "project_out" if dose == 1.0 else "reverse",
                            "dose": dose,
                            "split": split,
                            "on_target": float(dose * table[vector, mask].mean()),
                            "off_target": None if mask.all() else float(dose * table[vector, ~mask].mean()),
                            "off_target_worst": None,
                            "headroom": 2.0 if vector == 0 else 0.01,
                            "groups": {k: float(dose * table[vector, m].mean()) for k, m in skills.items()},
                            "group_headroom": {k: 4.0 for k in skills},
                        }
                    )
    return rows


def cluster_entry(vector: int, cluster: int, mask: np.ndarray, with_skills: bool) -> dict:
    skills = SKILLS if with_skills else {}
    homogeneity = {k: float((mask & m).sum() / mask.sum()) for k, m in skills.items()}
    recall = {k: float((mask & m).sum() / m.sum()) for k, m in skills.items()}
    return {
        "vector": vector,
        "cluster": cluster,
        "tokens": int(mask.sum()),
        "hidden_breakthrough": True,
        "label": "10s" if with_skills else None,
        "label_support": 1,
        "homogeneity": homogeneity,
        "recall_all": recall,
        "recall_paper": recall,
        "lift": homogeneity,
    }


def analysis(kind: str, with_clusters: bool, with_skills: bool) -> dict:
    part = {"exact": -5.0, "attributed": -4.2, "residual": -0.9, "quadrature_error": 0.1}
    members = MEMBERS if with_clusters else {}
    return {
        "loss_change": {**part, "per_group": dict.fromkeys(SKILLS, part) if with_skills else {}},
        "basis": {
            "kind": kind,
            "supervised": False,
            "vectors": VECTORS,
            "captured_net": 0.0006,
            "captured_path": 0.25,
            "random_walk_net": 0.9,
            "random_walk_path": 0.3,
            "explained_share": 0.84,
            "rule": "trapezoid",
            "guarded_denominators": 0,
            "hvps": 7,
            "flat_after": 80,
        },
        "vectors": [
            {
                "vector": v,
                "origin": 10 * v,
                "eigenvalue": 12.5,
                "residual": 0.0321 + v,
                "kept": v != 1,
                "dropped_tokens": 17,
                "outlier_share": 0.5,
            }
            for v in range(VECTORS)
        ],
        "clusters": [cluster_entry(v, c, mask, with_skills) for (v, c), mask in members.items()],
        "evaluate_clusters": [
            {
                "vector": 0,
                "cluster": 0,
                "tokens": 9,
                "rule": "place <= 0 & digit > 3",
                "rule_auc": 0.875,
                "homogeneity": {"10s": 0.625} if with_skills else {},
                "recall_all": {"10s": 0.375} if with_skills else {},
                "lift": {"10s": 1.25} if with_skills else {},
            }
        ]
        if with_clusters
        else [],
        "damage": damage_rows(damage_table(), with_clusters, with_skills),
        "controls": [
            {
                "control": "random_direction",
                "vector": v,
                "cluster": None,
                "split": "select",
                "draws": 2,
                "norm": 0.5,
                "on_target_mean": 0.1,
                "on_target_max": 0.2,
            }
            for v in range(VECTORS)
        ],
        "verdicts": [],
    }


def make_run(path: Path, bases: dict[str, bool], *, with_skills: bool = True) -> RunDirectory:
    """A run directory with one analysis per basis (value: whether it has clusters)."""
    directory = RunDirectory(path)
    generator = torch.Generator().manual_seed(1)
    summary = {
        "schema": "polca-edit/summary/1",
        "task": "arithmetic",
        "seed": 7,
        "model": {"parameters": 123456},
        "tokens": {"select": TOKENS, "evaluate": 50, "checkpoints": len(STEPS)},
        "cost": {
            "seconds": 12.5,
            "peak_rss_bytes": 2_000_000_000,
            "passes": {"forward": 3.0, "backward": 1.0, "tangent": 2.0, "hvp": 4.0},
        },
        "evaluate": {"plan": "ab" * 32, "exploratory": False},
        "analyses": {name: analysis(name, found, with_skills) for name, found in bases.items()},
    }
    jsonschema.validate(summary, summary_schema())
    columns: dict[str, object] = {
        "document": np.arange(TOKENS),
        "sequence": np.arange(TOKENS),
        "position": np.zeros(TOKENS, dtype=int),
        "context": [f"<b>{i}&[{i % 10}]" for i in range(TOKENS)],
        "skills": [",".join(k for k, m in SKILLS.items() if m[i] and with_skills) for i in range(TOKENS)],
    }
    for name, found in bases.items():
        save_record(directory.projections(name), projections(generator))
        for vector in range(VECTORS):
            labels = np.full(TOKENS, -1)
            for (v, c), mask in MEMBERS.items():
                labels[mask & (v == vector) & found] = c
            columns[f"cluster:{name}:{vector}"] = labels
            columns[f"damage:{name}:{vector}"] = damage_table()[vector]
    pd.DataFrame(columns).to_parquet(path / "tokens.parquet")
    (path / "summary.json").write_text(json.dumps(summary))
    stage = {"seconds": 3.25, "passes": {"forward": 80.0}, "peak_rss_bytes": 1_500_000_000}
    (path / "run.json").write_text(
        json.dumps({"select_sequences": 40, "stages": {"projections": stage, "train": stage}})
    )
    (path / "config.yaml").write_text(yaml.safe_dump({"breakthrough_delta": 20}))
    return directory


def words(page: str) -> str:
    """The page without pictures and tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r'src="data:[^"]*"', "", page)))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run with one basis that has clusters and one that has none; no torch module may be built."""
    directory = make_run(tmp_path_factory.mktemp("run"), {"hessian": True, "trajectory": False})
    (directory / "figures").mkdir()
    (directory / "figures" / "stale.png").write_bytes(b"old")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a report must not build a model")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__init__", refuse)
        path = write_report(directory, say=lambda _: None)
    return directory, path.read_text(encoding="utf-8")


def test_page_needs_nothing_beside_it(drawn) -> None:
    _, page = drawn
    assert "<script" not in page
    assert "<link" not in page
    sources = re.findall(r'<img src="([^"]*)"', page)
    assert sources
    for source in sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert b"<svg" in base64.b64decode(content)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert "url(" not in page


def test_same_figures_as_png_and_no_stale_ones(drawn) -> None:
    directory, page = drawn
    named = set(re.findall(r"figures/([\w-]+\.png)", page))
    assert {p.name for p in (directory / "figures").iterdir()} == named
    assert len(named) == page.count("<img ")
    for name in named:
        assert (directory / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_numbers_come_from_the_records(drawn) -> None:
    text = words(drawn[1])
    assert "123,456 parameters" in text
    assert "from 6.000 to 1.000 nats per token" in text
    assert "the trajectory basis (3 directions) accounts for 84.0 % of the mean change" in text
    # Cost: 80 sequences over 40 select sequences are two passes.
    assert "projections 3.2 2.0 0.0 0.0 0.0 1.50" in text
    # Cluster v0.c0 holds tokens 0..9: damage 0.45 on it, 2.45 on the others, its headroom 2.
    assert "v0·c0 10 10s 0.50 0.25 0.25 0.50 50 yes +0.450 +2.450 – +2.000" in text
    # Its evaluate row.
    assert "place &lt;= 0 &amp; digit &gt; 3 0.88 9 10s 0.62 0.38 1.25 +0.450 +2.450 +2.000" in text


def test_eigenpairs_come_with_residuals_and_attributions_with_their_share(drawn) -> None:
    text = words(drawn[1])
    assert "0 0 12.5 0.032 yes 17 50.0 % 2" in text
    assert text.count("Explained share: 84.0 %") == 2


def test_words_stay_within_the_evidence(drawn) -> None:
    text = words(drawn[1])
    assert "the trained model depends on the movement along this vector for these tokens" in text
    assert "Membership comes from a rule that never saw a loss." in text
    assert not re.search(r"\bcauses?\b", text)


def test_a_basis_without_clusters_says_so(drawn) -> None:
    directory, page = drawn
    assert page.count("No cluster was found along any vector") == 1
    assert not (directory / "figures" / "trajectory-curves.png").exists()
    assert (directory / "figures" / "trajectory-damage-skills.png").exists()


def test_contexts_are_escaped_and_marked(drawn) -> None:
    page = drawn[1]
    assert "&lt;b&gt;3&amp;<mark>3</mark>" in page
    assert "<b>3&" not in page


def test_second_report_has_the_same_bytes_and_takes_extra_sections(drawn) -> None:
    directory, page = drawn
    figure = figures.new_figure(1.0)
    figure.subplots().plot([0, 1], [0, 1])
    section = Section(
        "Verdicts of a study", "<p>told <em>apart</em></p>", [figures.Drawing("extra", "a line", figure)]
    )
    added = write_report(directory, lambda _: None, [section]).read_text(encoding="utf-8")
    assert "<p>told <em>apart</em></p>" in added
    assert '<a href="#extra-1">Verdicts of a study</a>' in added
    assert (directory / "figures" / "extra.png").exists()
    # All other pictures are the same bytes as before.
    pictures = re.findall(r'<img src="([^"]*)"', page)
    assert [p for p in re.findall(r'<img src="([^"]*)"', added) if p in pictures] == pictures
    twice = replace(section, figures=[*section.figures, *section.figures])
    with pytest.raises(ValueError, match="own name"):
        write_report(directory, lambda _: None, [twice])


def test_without_skills_and_with_more_clusters_than_fit(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("experiments.report.page.MOST_CLUSTERS", 2)
    directory = make_run(tmp_path, {"hessian": True}, with_skills=False)
    told: list[str] = []
    page = write_report(directory, told.append).read_text(encoding="utf-8")
    assert "1 more clusters are not shown" in page
    assert any("1 smaller clusters" in line for line in told)
    assert not (directory / "figures" / "hessian-composition.png").exists()


def test_missing_records_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="summary.json"):
        write_report(RunDirectory(tmp_path))
    directory = make_run(tmp_path, {"hessian": True})
    (tmp_path / "tokens.parquet").unlink()
    with pytest.raises(ValueError, match="tokens.parquet"):
        write_report(directory)
    assert not (tmp_path / "report.html").exists()


# -- the quantities behind the figures --------------------------------------------------------


def test_curves_and_damage_matrix_against_hand_values(tmp_path) -> None:
    view = read_run(make_run(tmp_path, {"hessian": True}))
    shown = [c for c in view.analyses[0].clusters if c.vector == 0]
    assert [c.name for c in shown] == ["v0·c0", "v0·c1"]
    curves = view.curves(shown)[0]
    expected = -np.clip((STEPS.numpy() - DROP_AT) / 10, 0, None)
    np.testing.assert_allclose(curves.projected, np.tile(expected, (10, 1)), atol=1e-12)
    np.testing.assert_allclose(curves.exact, 6 + np.tile(expected, (10, 1)), atol=1e-6)
    assert curves.starts.tolist() == [DROP_AT] * 10
    raw, relative = view.analyses[0].cluster_damage(view.analyses[0].clusters)
    column = [c.name for c in view.analyses[0].clusters].index("v0·c1")
    np.testing.assert_allclose(raw[:, column], np.array([1, 2, 3]) * np.mean(np.arange(30, 40) / 10))
    np.testing.assert_allclose(relative[:, column], raw[:, column] / 2.0)
    # The cluster of vector 2 has a headroom of 0.01 nats, too small to divide by.
    assert np.isnan(relative[:, [c.name for c in view.analyses[0].clusters].index("v2·c0")]).all()


@pytest.mark.parametrize("rule", ["first_order", "trapezoid", "second_order"])
def test_allocating_a_few_vectors_equals_the_columns_of_all(generator, rule) -> None:
    given = projections(generator)
    count = len(STEPS)
    given = replace(
        given,
        mean_gradients=torch.randn(count, VECTORS, generator=generator, dtype=torch.float64),
        curvatures=torch.randn(count - 1, VECTORS, generator=generator, dtype=torch.float64),
    )
    whole, part = allocate(given, rule), allocate_only(given, [2, 0], rule)
    torch.testing.assert_close(part.values, whole.values[:, [2, 0]])


def test_medoid_against_all_pairs(generator) -> None:
    paths = torch.randn(60, 5, generator=generator, dtype=torch.float64).numpy()
    distances = np.sqrt(((paths[:, None] - paths[None]) ** 2).sum(2))
    medoid = distances.sum(1).argmin()
    assert nearest_to_medoid(paths, 7).tolist() == distances[medoid].argsort()[:7].tolist()


def test_exact_sets_are_a_partition_with_the_rare_ones_together() -> None:
    skills = {f"s{i}": np.arange(32) >> i & 1 == 1 for i in range(5)}
    sets = exact_combinations(skills, most=6)
    assert len(sets) == 6
    assert list(sets)[-1] == "other"
    np.testing.assert_array_equal(np.sum(list(sets.values()), axis=0), np.ones(32))
    both = exact_combinations(
        {"carry": np.array([True]), "10s": np.array([True]), "carry@10s": np.array([True])}
    )
    assert list(both) == ["carry@10s"]


def test_best_of_every_label_comes_first() -> None:
    def view(label: str, share: float) -> ClusterView:
        entry = {"label": label, "tokens": 5, "homogeneity": {label: share}, "recall_all": {label: share}}
        return ClusterView("b", 0, 0, np.ones(1, dtype=bool), entry, None, (), None, ())

    order = by_interest([view("a", 0.7), view("a", 0.9), view("b", 0.2), view("a", 0.8)])
    assert [(v.entry["label"], v.interest[0]) for v in order] == [
        ("a", pytest.approx(0.9)),
        ("b", pytest.approx(0.2)),
        ("a", pytest.approx(0.8)),
        ("a", pytest.approx(0.7)),
    ]


def test_small_headroom_is_not_divided_by() -> None:
    found = over_headroom(np.array([[1.0, 1.0, -1.0, 2.0]]), [0.5, 0.049, None, -1.0])
    np.testing.assert_array_equal(found, [[2.0, np.nan, np.nan, np.nan]])


def test_formats() -> None:
    assert nats(-0.0001) == "0.000"
    assert nats(1.5) == "+1.500"
    assert str(highlighted("no mark <i>")) == "no mark &lt;i&gt;"
    assert percent(-0.0002) == "-0.02 %"
