"""The report against hand-made records: no model is trained, every shown number is known."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from markupsafe import Markup
from rich.console import Console

from experiments.discover.records import (
    AxisRow,
    ClusterFile,
    ClusterRow,
    DiscoverResult,
    TimelineRow,
    cluster_file,
    discovery_file,
)
from experiments.report.answers import Answer, Loss, answers, print_summary
from experiments.report.blocks import Section
from experiments.report.chapters.discovery import discovery_section
from experiments.report.chapters.grouping import Group, best_of_each_first
from experiments.report.figures.damage import damage_map
from experiments.report.figures.removal import RemovalCurves, draw_removal
from experiments.report.figures.studies import Survival, draw_survival
from experiments.report.formats import highlighted, nats, share
from experiments.report.page import write_report
from experiments.report.style import Drawing, new_figure, styled
from experiments.report.tables import Cell, Column, Table, table
from experiments.report.view import (
    ClusterView,
    allocate_only,
    by_interest,
    exact_combinations,
    over_headroom,
    read_run,
)
from experiments.run.run_record import Opening, RunRecord
from experiments.run.store import RunDirectory, StageRecord
from experiments.run.summary.records import ClusterEntry, read_summary
from experiments.run.summary.write import summary_schema
from polca_edit.allocation.allocate import Projections, allocate
from polca_edit.artifacts import from_plain, save_record
from polca_edit.clusters.medoid import nearest_to_medoid

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
        "schema": "polca-edit/summary/2",
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
    stages = {
        name: StageRecord(name, "key", 3.25, {"forward": 80.0}, 1_500_000_000)
        for name in ("projections", "train")
    }
    save_record(path / "run.json", RunRecord(select_sequences=40, stages=stages))
    (path / "config.yaml").write_text(yaml.safe_dump({"breakthrough_delta": 20}))
    return directory


def words(page: str) -> str:
    """The page's body without pictures, style, code and tags."""
    body = page[page.index("<body>") : page.index("<script>")]
    plain = re.sub(r'(src|title)="[^"]*"', "", body)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", plain))


def rows_of(page: str, first: str) -> list[list[str]]:
    """Cells of every table row that begins with a cell."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    cells = [[re.sub(r"<[^>]*>", "", c) for c in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows]
    return [row for row in cells if row and row[0] == first]


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


class TestPage:
    def test_it_needs_nothing_beside_it(self, drawn) -> None:
        _, page = drawn
        assert "<link" not in page
        assert "<script src" not in page
        assert "<img" not in page
        assert len(re.findall(r'<svg [^>]*role="img" aria-label="\w', page)) >= 5
        assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
        assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|https?://", page)
        names = re.findall(r'\sid="([^"]*)"', page)
        assert len(set(names)) == len(names)

    def test_every_link_has_a_target(self, drawn) -> None:
        targets = re.findall(r'href="#([^"]*)"', drawn[1])
        assert len(targets) >= 5
        assert set(targets) <= set(re.findall(r'id="([^"]*)"', drawn[1]))

    def test_figures_follow_the_theme(self, drawn) -> None:
        directory, page = drawn
        for svg in ((directory / "figures" / "training.svg").read_text(), page[page.index("<svg ") :]):
            assert "var(--ink)" in svg
            assert "#222222" not in svg.replace("--ink:#222222", "")
        assert "prefers-color-scheme:dark" in (directory / "figures" / "training.svg").read_text()

    def test_same_figures_as_svg_with_their_numbers_and_no_stale_ones(self, drawn) -> None:
        directory, page = drawn
        named = set(re.findall(r'data-name="([\w-]+)"', page))
        wanted = {f"{name}.{ending}" for name in named for ending in ("svg", "csv")}
        assert {p.name for p in (directory / "figures").iterdir()} == wanted
        training = pd.read_csv(directory / "figures" / "training.csv")
        assert list(training.columns) == ["panel", "series", "x", "value"]
        means = training[training["series"] == "all tokens"]
        assert means["x"].tolist() == STEPS.tolist()
        assert means["value"].tolist() == [6.0] * 6 + [5.0, 4.0, 3.0, 2.0, 1.0]
        mapped = pd.read_csv(directory / "figures" / "damage-overview.csv")
        one = mapped[(mapped["series"] == "hessian v2") & (mapped["x"] == "10s")]["value"]
        assert one.item() == pytest.approx(damage_table()[2, SKILLS["10s"]].mean(), rel=1e-5)

    def test_dose_curves_pass_through_the_known_zero(self, drawn) -> None:
        doses = pd.read_csv(drawn[0] / "figures" / "hessian-doses-vectors.csv")
        for _, line in doses.groupby(["panel", "series"]):
            assert line["x"].tolist() == [0.0, 0.5, 1.0]
            assert line["value"].tolist()[0] == 0.0

    def test_the_report_is_a_stage(self, drawn) -> None:
        record = json.loads((drawn[0] / "stages" / "report.json").read_text())
        assert record["seconds"] > 0
        assert len(rows_of(drawn[1], "report")) == 1

    def test_apart_from_training_is_said_where_it_is_known(self, tmp_path, drawn) -> None:
        assert "kept out of training" in words(drawn[1])
        directory = make_run(tmp_path, {"hessian": True})
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"checkpoints": {"directory": "x"}}))
        page = write_report(directory, lambda _: None).read_text(encoding="utf-8")
        assert "kept out of training" not in page

    def test_numbers_come_from_the_records(self, drawn) -> None:
        page, text = drawn[1], words(drawn[1])
        assert "123,456 parameters" in text
        assert "from 6.000 to 1.000 nats" in text
        assert "(3 hessian and 3 trajectory)" in text
        # Cost: 80 sequences over 40 select sequences are two passes.
        assert rows_of(page, "projections") == [["projections", "3.2", "2.0", "0.0", "0.0", "0.0", "1.50"]]
        assert rows_of(page, "together, without the report") == [
            ["together, without the report", "12.5", "3.0", "1.0", "2.0", "4.0", "2.00"]
        ]
        # Cluster v0.c1 holds tokens 30..39, half of them 10s: damage 3.45 on it, 1.45 on the others.
        plain, judged = [row for row in rows_of(page, "v0·c1") if len(row) > 5]
        assert plain[:10] == ["v0·c1", "unnamed", "10", "–", "0.33", "0.50", "0.25", "0.25", "0.50", "50"]
        assert plain[10:] == ["yes", "+3.450", "+1.450", "–", "+2.000"]
        assert judged[1] == "the rule assigns no evaluate token"
        evaluated = [row for row in rows_of(page, "v0·c0") if len(row) > 5][1]
        assert evaluated[1:4] == ["place &lt;= 0 &amp; digit &gt; 3", "0.88", "9"]
        assert evaluated[-3:] == ["+0.450", "+2.450", "+2.000"]

    def test_maps_hold_the_damage_of_every_vector(self, drawn) -> None:
        damage = damage_table()
        on_skills = next(row for row in rows_of(drawn[1], "v2 (step 20)") if len(row) == 7)
        everything = nats(float(damage[2].mean()))
        assert on_skills[1:5] == [everything, everything, "+0.100", "+0.200"]
        assert on_skills[5:] == [f"{damage[2, mask].mean():.2f}" for mask in SKILLS.values()]
        # In the map of clusters a row is a cluster and a column a vector.
        for vector, cluster in [(2, 0), (0, 0), (0, 1)]:
            row = next(row for row in rows_of(drawn[1], f"v{vector}·c{cluster}") if len(row) == 5)
            own = damage[:, MEMBERS[vector, cluster]].mean(1)
            assert [float(cell) for cell in row[2:]] == pytest.approx([float(x) for x in own], abs=0.0051)

    def test_eigenpairs_come_with_residuals_and_attributions_with_their_share(self, drawn) -> None:
        row = next(row for row in rows_of(drawn[1], "v0") if len(row) == 8)
        assert row == ["v0", "0", "12.5", "0.032", "yes", "17", "50.0\xa0%", "2"]
        # With the clusters and with the attribution of each of two bases.
        assert words(drawn[1]).count("Explained share: 84.0 %") == 4

    def test_a_cluster_carries_a_skill_only_where_it_fits(self, drawn) -> None:
        page = drawn[1]
        # v2.c0 holds exactly the 10s; the others have an F1 of a third.
        assert rows_of(page, "v2·c0")[0][1:6] == ["10s", "20", "10s", "1.00", "1.00"]
        assert rows_of(page, "v0·c0")[0][1:4] == ["unnamed", "10", "–"]
        assert "v2·c0 10s" in page
        assert "v0·c0 10s" not in page
        assert "v0·c0 carry" not in page

    def test_words_stay_within_the_evidence(self, drawn) -> None:
        text = words(drawn[1])
        assert "the trained model depends on the movement along this vector for these tokens" in text
        assert "Membership comes from a rule that never saw a loss." in text
        assert not re.search(r"\bcauses?\b", text)

    def test_a_basis_without_clusters_says_so(self, drawn) -> None:
        directory, page = drawn
        assert page.count("No cluster was found along any vector") == 1
        assert not (directory / "figures" / "trajectory-curves.svg").exists()
        assert (directory / "figures" / "trajectory-loss-change.svg").exists()

    def test_contexts_are_escaped_and_marked(self, drawn) -> None:
        page = drawn[1]
        assert "&lt;b&gt;3&amp;<mark>3</mark>" in page
        assert "<b>3&" not in page

    def test_second_report_has_the_same_bytes_and_takes_added_sections(self, drawn) -> None:
        directory, page = drawn
        figure = new_figure(1.0)
        figure.subplots().plot([0, 1], [0, 1])
        blocks = (Markup("<p>told <em>apart</em></p>"), Drawing("extra", "a line", figure))
        section = Section("A study's own", blocks)
        added = write_report(directory, lambda _: None, [section]).read_text(encoding="utf-8")
        assert "<p>told <em>apart</em></p>" in added
        assert '<a href="#added-2">A study&#39;s own</a>' in added
        assert (directory / "figures" / "extra.svg").exists()
        # All other pictures are the same bytes as before.
        pictures = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
        assert [p for p in re.findall(r"<svg .*?</svg>", added, re.DOTALL) if p in pictures] == pictures
        twice = replace(section, blocks=[*section.blocks, *section.blocks])
        with pytest.raises(ValueError, match="own title"):
            write_report(directory, lambda _: None, [twice])

    def test_without_skills_and_with_more_clusters_than_fit(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr("experiments.report.chapters.chapter.MOST_CLUSTERS", 2)
        directory = make_run(tmp_path, {"hessian": True}, with_skills=False)
        told: list[str] = []
        page = write_report(directory, told.append).read_text(encoding="utf-8")
        assert "showing 2 of 3" in words(page)
        assert any("1 smaller clusters" in line for line in told)
        assert not (directory / "figures" / "hessian-composition.svg").exists()
        # The first table tells of clusters instead; v2.c0 loses 5.7 nats, no headroom to speak of.
        assert rows_of(page, "hessian v2·c0")[0][2:4] == ["+5.700", "–"]

    def test_openings_of_an_older_run_are_read(self, tmp_path) -> None:
        """They did not say which verb had read the split: it was always the run itself."""
        directory = make_run(tmp_path, {"trajectory": False})
        record = json.loads((tmp_path / "run.json").read_text())
        record["evaluate_openings"] = [{"plan": "ab", "exploratory": False}]
        (tmp_path / "run.json").write_text(json.dumps(record))
        assert read_run(directory).run.evaluate_openings == (Opening("ab", False, "run"),)

    def test_missing_records_are_named(self, tmp_path) -> None:
        with pytest.raises(ValueError, match="summary.json"):
            write_report(RunDirectory(tmp_path))
        directory = make_run(tmp_path, {"hessian": True})
        (tmp_path / "tokens.parquet").unlink()
        with pytest.raises(ValueError, match="tokens.parquet"):
            write_report(directory)
        summary = json.loads((tmp_path / "summary.json").read_text())
        del summary["analyses"]["hessian"]["basis"]["explained_share"]
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        with pytest.raises(ValueError, match="explained_share"):
            read_summary(tmp_path)
        assert not (tmp_path / "report.html").exists()


class TestAnswers:
    """Three vectors, two digits and a carry that cuts across both; every loss is set by hand."""

    @pytest.fixture
    def view(self, tmp_path):
        view = read_run(make_run(tmp_path, {"hessian": True}))
        half = np.arange(TOKENS) < 20
        carry = np.arange(TOKENS) % 2 == 0
        skills = {"10s": half, "1s": ~half, "carry": carry}
        # v0 takes the 10s alone, v1 every token, v2 a tenth of the 1s.
        damage = np.stack([4.0 * half, np.full(TOKENS, 4.0), 0.5 * ~half])
        analysis = view.analyses[0]
        rows = tuple(
            replace(
                row,
                groups={k: scale * float(damage[row.vector, m].mean()) for k, m in skills.items()},
                group_headroom=dict.fromkeys(skills, 5.0),
            )
            for row in analysis.entry.damage
            for scale in [2.0 if row.split == "evaluate" else 1.0]
            if row.cluster is None and row.dose == 1.0
        )
        entry = replace(analysis.entry, damage=rows)
        summary = replace(view.summary, analyses={"hessian": entry})
        own = replace(analysis, damage=damage, entry=entry)
        return replace(view, summary=summary, skills=skills, analyses=(own,))

    def test_the_vector_is_chosen_on_select_and_judged_on_evaluate(self, view) -> None:
        found = {answer.skill: answer for answer in answers(view)}
        assert found["10s"].vector == 0
        assert found["10s"].outcome == "alone"
        # Evaluate damage was set to twice the select damage: 8 nats of a headroom of 5.
        assert found["10s"].own == Loss("10s", 8.0, 1.6, "evaluate")
        assert found["10s"].worst.share == 0.0
        assert found["1s"].vector == 1
        assert found["1s"].outcome == "with others"
        assert found["1s"].worst == Loss("10s", 8.0, 1.6, "evaluate")

    def test_a_skill_across_others_is_judged_by_their_rest(self, view) -> None:
        """Undoing v1 takes every carry token, and as much of every digit without a carry."""
        carry = next(answer for answer in answers(view) if answer.skill == "carry")
        assert carry.outcome == "with others"
        assert carry.worst.group in ("rest of 10s", "rest of 1s")
        assert (carry.worst.damage, carry.worst.split) == (4.0, "select")
        assert carry.worst.share == pytest.approx(4.0 / 5.0)

    def test_what_no_vector_takes(self, view) -> None:
        weak = replace(view.analyses[0], damage=0.1 * view.analyses[0].damage)
        for answer in answers(replace(view, analyses=(weak,))):
            own = replace(answer.own, share=0.1)
            assert replace(answer, own=own).outcome == "not taken"
            assert "No vector takes" in replace(answer, own=own).sentence

    def test_clusters_come_best_of_each_skill_first(self) -> None:
        fits = [("a", 0.9), ("a", 0.8), ("b", 0.3), ("c", 0.5), ("b", 0.7)]
        groups = [Group("POLCA", f"{s}{f}", "", 9, {s: f}, s, None) for s, f in fits]
        ordered = [(group.skill, group.fit) for group in best_of_each_first(groups)]
        assert ordered == [("a", 0.9), ("b", 0.7), ("c", 0.5), ("a", 0.8), ("b", 0.3)]

    def test_the_first_screen_says_it(self, tmp_path, view, monkeypatch) -> None:
        monkeypatch.setattr("experiments.report.page.read_run", lambda _: view)
        text = words(write_report(view.directory, lambda _: None).read_text(encoding="utf-8"))
        assert (
            "1 of 3 skills can be taken away alone by undoing one recorded vector: 10s (hessian v0: +8.00"
            in text
        )
        assert "No causal test was run here" in text
        assert (
            "Undoing hessian v0 costs 10s +8.00 nats (160 %), and no other skill loses more than 1s 0.00"
            in text
        )
        # The answer stands before the map, and the map before the clusters.
        assert text.index("Undoing hessian v0") < text.index("What undoing each vector costs")
        assert text.index("What undoing each vector costs") < text.index("Clusters of each basis: tokens")

    def test_no_headroom_no_answer(self, view) -> None:
        assert answers(replace(view, headroom=np.full(TOKENS, 0.01))) == []

    def test_a_lonely_skill(self) -> None:
        alone = Answer("hessian", 1, Loss("10s", 1.0, 0.9, "evaluate"), None)
        assert alone.outcome == "alone"


class TestSections:
    def test_verdicts_and_discovery_come_from_records(self, tmp_path) -> None:
        directory = make_run(tmp_path, {"hessian": True})
        summary = json.loads((tmp_path / "summary.json").read_text())
        verdict = {
            "name": "hessian 2:0", "vector": 2, "cluster": 0, "group": "10s digit", "family": "polca",
            "word": "selective", "answers": {"N": "yes", "S": "yes", "W": "not asked", "L": "no"},
            "damage": 1.25, "share": 0.5, "leakage": 0.08, "worst": "1s",
            "intervals": {"damage": [1.0, 1.5]}, "p_values": {"S": 0.01},
            "sentence": "Undoing <v2> costs the 10s.", "seeds": [0, 1, 2],
        }  # fmt: skip
        summary["analyses"]["hessian"]["verdicts"] = [verdict]
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        cluster = ClusterRow("a+b", 0, 77, "place = 2", {"10s": 0.75}, {"10s": 0.51}, {"10s": 0.607})
        found = DiscoverResult(
            clusters=(cluster,),
            timeline=(TimelineRow(0, 120, 1.9, {"10s": 0.58}, {"10s": 0.1}),),
            axes=(AxisRow("hessian", "10s", 1, 0.9, 0.05, None, 0.025, 0.3, 0.95, 0.2, 12.0),),
            learned={"10s": 60},
            depends=(),
            alignment=(0.1, 0.01),
            outliers={"a+b": 0.2},
            skipped={},
            exploratory=False,
            seconds=1.0,
        )
        save_record(discovery_file(tmp_path), found)
        save_record(cluster_file(tmp_path, "a+b"), ClusterFile("a+b", (cluster,), 0.2, 20, ((20, 0.9),)))
        page = write_report(directory, lambda _: None).read_text(encoding="utf-8")
        assert rows_of(page, "hessian 2")[0] == [
            "hessian 2", "10s digit", "+1.25", "50.0\xa0%", "1s (0.08)", "yes", "yes", "–", "no", "selective",
            "POLCA&#39;s own cluster",
        ]  # fmt: skip
        assert "Undoing &lt;v2&gt; costs the 10s." in page
        # The records do not say which tokens these are, so there is nothing to open.
        assert rows_of(page, "a+b i0") == [["a+b i0", "interventional", "place = 2", "77", "10s", "0.61"]]
        assert ["10s", "hessian v2·c0", "10s", "1.00", "a+b i0", "place = 2", "0.61"] in rows_of(page, "10s")
        # No vector was put to the test for the whole skill; the axis takes it alone and beats its null.
        first = next(row for row in rows_of(page, "10s") if len(row) == 8)
        assert first[1:7] == [
            "hessian axis", "–", "90.0\xa0%", "5.0\xa0%", "random sets 30.0\xa0%; p = 0.025", "axis",
        ]  # fmt: skip
        assert [
            "hessian", "10s", "90.0\xa0%", "5.0\xa0%", "–", "0.025", "30.0\xa0%", "95.0\xa0%", "20.0\xa0%",
            "–", "–",
        ] in rows_of(page, "hessian")  # fmt: skip
        assert "on tokens that nothing had used" in page
        # A light run searches no null: the axis stands, and both say so.
        [row] = found.axes
        light = replace(found, axes=(replace(row, null_p=None, null_p95=None),))
        save_record(discovery_file(tmp_path), light)
        (tmp_path / "verdicts.json").write_text(json.dumps({"fresh": False, "exploratory": True}))
        page = write_report(directory, lambda _: None).read_text(encoding="utf-8")
        first = next(row for row in rows_of(page, "10s") if len(row) == 8)
        assert first[5:7] == ["not searched (polca-edit discover)", "axis"]
        assert "for any set of tokens was not asked" in page
        assert "The test was a light one" in page
        assert "the rows are exploratory" not in page

    def test_what_was_not_found_is_left_out(self, tmp_path) -> None:
        assert discovery_section(make_run(tmp_path, {"hessian": False})) is None

    def test_removals_of_a_run(self, tmp_path) -> None:
        directory = make_run(tmp_path, {"hessian": False})
        removal = {
            "skill": "10s", "target_share": 0.995, "worst_off_share": -0.0012, "worst_positive_share": 0.004,
            "kl": 0.0314, "accuracy": 0.12, "norm": 3.5, "rank": 7, "refit": {"chance": 0.1, "kept": 0.98},
            "groups": {"1s": -0.002, "never": None}, "passes": {"ignored": 1},
        }  # fmt: skip
        (tmp_path / "edits").mkdir()
        (tmp_path / "edits" / "10s.result.json").write_text(json.dumps({"removals": [removal]}))
        page = write_report(directory, lambda _: None).read_text(encoding="utf-8")
        row = next(row for row in rows_of(page, "10s") if len(row) == 10)
        assert row[2:] == [
            "99.5\xa0%", "−0.12\xa0%", "0.4\xa0%", "0.031", "12.0\xa0% (10.0\xa0%)", "98.0\xa0%", "3.50 / 7",
            "1s −0.2\xa0%",
        ]  # fmt: skip

    def test_what_was_undone_stands_beside_what_was_said_first(self, tmp_path) -> None:
        """Numbers of one edit by hand, in words, table, figure and CSV; edits that were fitted have none."""
        directory = make_run(tmp_path, {"hessian": False})
        fitted = {
            "skill": "1s", "target_share": 1.0, "worst_off_share": 0.0, "worst_positive_share": 0.0,
            "kl": 0.0, "accuracy": 0.1, "norm": 1.0, "rank": 1, "refit": {"chance": 0.1, "kept": 1.0},
            "groups": {},
        }  # fmt: skip
        forecast = {
            "skill": "10s", "window": {"start": 40, "end": 60, "kind": "10s"}, "share": 0.93,
            "falls": {"1s": 0.02, "100s": 0.41, "never": None}, "descendants": ["100s"], "fraction": 0.6,
            "windows": [{"start": 30, "end": 60, "kind": "earlier"}], "method": "rollback", "rank": 0,
        }  # fmt: skip
        undone = {
            "forecast": forecast, "windows": forecast["windows"], "repair_steps": 12, "undone_norm": 3.25,
            "repair_norm": 1.5, "seconds": 7.0, "tried": [],
        }  # fmt: skip
        returned = {
            "given_back": 0.1,
            "steps": [0, 20, 40],
            "loss": [2.5, 2.2, 1.9],
            "chance": 2.3,
            "before": 0.1,
        }
        removal = {
            **fitted, "skill": "10s", "groups": {"10s": 0.97, "1s": -0.01, "100s": 0.05},
            "target_share": 0.97, "undone": undone, "returned": returned,
        }  # fmt: skip
        (tmp_path / "edits").mkdir()
        for name, one in (("1s", fitted), ("ten", removal)):
            (tmp_path / "edits" / f"{name}.result.json").write_text(json.dumps({"removals": [one]}))
        page = write_report(directory, lambda _: None).read_text(encoding="utf-8")
        assert "What was undone: ten" in page
        assert "What was undone: 1s" not in page
        words = "10s was learned in steps 40:60. 100s built on it. What was done: undoing steps 30:60"
        assert f"{words} (the weights moved by 3.25). Repair: 12 training steps on everything" in page
        said = [
            row for row in rows_of(page, "10s") + rows_of(page, "100s") + rows_of(page, "1s") if len(row) == 3
        ]
        assert said == [
            ["10s", "93.0\xa0%", "97.0\xa0%"],
            ["100s", "41.0\xa0%", "5.0\xa0%"],
            ["1s", "2.0\xa0%", "−1.0\xa0%"],
        ]
        (numbers,) = (tmp_path / "figures").glob("relearning-ten*.csv")
        lines = numbers.read_text().splitlines()
        panel = "exact loss (nats per token)"
        assert lines[1:] == [
            *(f'{panel},"10s, relearned",{x},{y}' for x, y in ((0.0, 2.5), (20.0, 2.2), (40.0, 1.9))),
            *(f"{panel},best constant answer,{x},2.3" for x in (0.0, 40.0)),
            *(f"{panel},before the edit,{x},0.1" for x in (0.0, 40.0)),
        ]


class TestTables:
    made = table(
        [Column("name", left=True, note="who"), "size"],
        [["a|b", Cell("1,200", sort=1200.0)], [Cell("<c>", colour="#0072B2"), Cell("−3", sort=-3.0)]],
        "Things",
    )

    def test_page_terminal_and_document_share_the_cells(self) -> None:
        html, text = self.made.__html__(), Console(width=60)
        with text.capture() as shown:
            text.print(self.made.terminal())
        for cell in ("1,200", "−3"):
            assert cell in html
            assert cell in shown.get()
            assert cell in self.made.markdown()
        assert "&lt;c&gt;" in html
        assert "<c>" in shown.get()
        assert 'data-sort="1200.0"' in html
        assert "a\\|b" in self.made.markdown()

    def test_words_are_never_cut(self) -> None:
        rule = "token is ',' and previous shape is 'piece' and distance >= 7 " * 4
        console = Console(width=40)
        with console.capture() as shown:
            console.print(table(["rule"], [[rule]]).terminal())
        letters = re.sub(r"[^\w'>=,]", "", shown.get())
        assert re.sub(r"[^\w'>=,]", "", rule) in letters

    def test_a_row_must_fit(self) -> None:
        with pytest.raises(ValueError, match="one cell for each of 1 columns"):
            Table((Column("a"),), ((Cell("1"), Cell("2")),))


class TestFigures:
    def test_drawing_leaves_the_callers_settings(self, tmp_path) -> None:
        """A caller with a backend and a style of its own finds both unchanged."""
        with matplotlib.rc_context({"font.size": 17.0, "svg.fonttype": "none"}):
            before = {key: matplotlib.rcParams._get(key) for key in matplotlib.rcParams}
            write_report(make_run(tmp_path, {"hessian": True}), lambda _: None)
            draw_survival({"a": Survival(0.5, 2, {"rule": {"x": 1.0, "y": 0.0}})}, tmp_path / "s.png")
            assert {key: matplotlib.rcParams._get(key) for key in matplotlib.rcParams} == before

    def test_importing_changes_no_setting_and_brings_no_backend_and_no_model(self) -> None:
        import subprocess
        import sys

        code = (
            "import matplotlib as m; before = {k: m.rcParams._get(k) for k in m.rcParams}\n"
            "import experiments.report.page, experiments.report.figures.removal\n"
            "import experiments.report.figures.studies, sys\n"
            "assert {k: m.rcParams._get(k) for k in m.rcParams} == before\n"
            "absent = 'matplotlib.pyplot', 'transformer_lens', 'experiments.run.run'\n"
            "absent += ('experiments.tasks.task',)\n"
            "assert not {*absent} & {*sys.modules}, {*absent} & {*sys.modules}\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_every_title_has_its_own_file(self, tmp_path) -> None:
        titles = ["x" * 70 + "1", "x" * 70 + "2", "a/b", "a b", "a-b"]
        for number, title in enumerate(titles, 1):
            figure = new_figure(1.0, number)
            figure.subplots()
            drawing = Drawing(title, "", figure)
            drawing.write_png(tmp_path / f"{drawing.name}.png")
        assert len(list(tmp_path.iterdir())) == len(titles)
        assert all(len(path.stem) <= 60 for path in tmp_path.iterdir())

    def test_one_colour_a_skill(self, drawn) -> None:
        """Curves, column heads and dots use the same colour for a skill."""
        _, page = drawn
        dots = set(re.findall(r'background:(#\w+)"></span>10s', page))
        assert dots == {"#0072B2"}
        training, overview = re.findall(r"<svg .*?</svg>", page, re.DOTALL)[:2]
        for svg in (training, overview):
            assert "#0072b2" in svg
            assert "#e69f00" in svg

    def test_the_map_is_white_at_zero_in_both_signs(self) -> None:
        figure = damage_map(np.array([[2.0, -1.0, np.nan]]), ["v0"], ["a", "b", "c"], {"a": "#0072B2"})
        image = figure.axes[0].collections[0]
        assert image.norm(0.0) == 0.5
        assert image.get_clim() == (-2.0, 2.0)
        assert [t.get_text() for t in figure.axes[0].texts] == ["2.00", "−1.00", "–"]

    def test_removal_figures_from_a_result_file(self, tmp_path) -> None:
        points = [{"target_share": 0.5, "worst_positive_share": 0.01, "dose": 1.0}]
        result = {
            "pareto": [{"skill": "10s", "method": f"m{i}", "points": points, "seed": 0} for i in range(12)],
            "required": {"10s": {"target": 0.99, "off": 0.005}},
            "relearning": [
                {"skill": "10s", "method": "m0", "data": "all", "points": [{"step": 0, "accuracy": None}]}
            ],
            "rows": [],
        }
        paths = draw_removal(from_plain(RemovalCurves, result), tmp_path)
        assert [path.name for path in paths] == ["pareto.png", "relearning.png"]
        digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
        assert len(digests) == 2

    def test_a_style_ends_with_its_function(self) -> None:
        before = matplotlib.rcParams["font.size"]
        with pytest.raises(RuntimeError), styled():
            raise RuntimeError
        assert matplotlib.rcParams["font.size"] == before


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
        agreement = {label: share}
        entry = ClusterEntry(0, 0, 5, agreement, agreement, {}, False, label, 1)
        return ClusterView("b", np.ones(1, dtype=bool), entry)

    order = by_interest([view("a", 0.7), view("a", 0.9), view("b", 0.2), view("a", 0.8)])
    assert [(v.entry.label, v.f1) for v in order] == [
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
    assert share(-0.0002) == "−0.02\xa0%"


# -- a real run ---------------------------------------------------------------------------------


class TestSmoke:
    """The page of a real run says what the run's records say."""

    @pytest.fixture
    def page(self, smoke_copy) -> tuple[Path, str]:
        path = write_report(RunDirectory(smoke_copy), lambda _: None)
        return smoke_copy, path.read_text(encoding="utf-8")

    def test_every_number_is_that_of_the_summary(self, page) -> None:
        run, text = page
        summary = json.loads((run / "summary.json").read_text())
        for name, analysis in summary["analyses"].items():
            parts = [nats(analysis["loss_change"][key]) for key in ("exact", "attributed", "residual")]
            assert [row[2:5] for row in rows_of(text, name) if len(row) == 11] == [parts]
            damage = {
                r["vector"]: r
                for r in analysis["damage"]
                if r["cluster"] is None and r["split"] == "evaluate" and r["dose"] == 1.0
            }
            for vector in analysis["vectors"]:
                title = f"v{vector['vector']}"
                title += "" if vector["origin"] is None else f" (step {vector['origin']})"
                wanted = nats(damage[vector["vector"]]["on_target"])
                assert wanted in [row[2] for row in rows_of(text, title) if len(row) > 5]

    def test_the_first_table_quotes_evaluate_rows(self, page) -> None:
        run, text = page
        summary = json.loads((run / "summary.json").read_text())
        skills = {skill for r in summary["analyses"]["hessian"]["damage"] for skill in r["groups"]}
        shown = [row for skill in skills for row in rows_of(text, skill) if len(row) == 7]
        shown = [row for row in shown if re.fullmatch(r"\w+ v\d+", row[1])]
        assert len(shown) >= 4
        for skill, place, damage, of_headroom, *_ in shown:
            basis, _, vector = place.partition(" v")
            row = next(
                r
                for r in summary["analyses"][basis]["damage"]
                if (r["vector"], r["cluster"], r["split"], r["dose"]) == (int(vector), None, "evaluate", 1.0)
            )
            assert damage == nats(row["groups"][skill], 2)
            assert of_headroom == share(row["groups"][skill] / row["group_headroom"][skill])

    def test_every_cluster_is_counted(self, page) -> None:
        run, text = page
        summary = json.loads((run / "summary.json").read_text())
        for analysis in summary["analyses"].values():
            found = len(analysis["clusters"])
            assert f"showing {min(found, 24)} of {found}" in words(text)

    def test_the_terminal_shows_the_same_cells(self, page) -> None:
        run, text = page
        console = Console(width=400)
        with console.capture() as shown:
            print_summary(RunDirectory(run), console)
        for row in (r for name in ("hessian", "trajectory") for r in rows_of(text, name) if len(r) == 11):
            for cell in row:
                assert cell in shown.get()
