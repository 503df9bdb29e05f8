"""Labels of a run's clusters: ``labels/NAME.json``, a chapter of the report, ``polca-edit label``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from markupsafe import escape

from experiments.report.page import Section
from experiments.report.tokens import nearest_to_medoid
from experiments.run.stages import ClusterRecord, Run, load_observation
from experiments.run.store import RunDirectory
from polca_edit.allocation.allocate import Projections, allocate, project
from polca_edit.artifacts import load_record
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.files import write_json
from polca_edit.clusters.comparators import cluster_both
from polca_edit.clusters.density import ClusterSettings, VectorClusters, cluster_trajectories
from polca_edit.clusters.labels import LABEL_AUC, distinct, overlap, rule_label, tag_label, transferred_auc
from polca_edit.features import exact_loss
from polca_edit.tokens import TokenSet

CONTEXTS = 10

#: Name under which the labels of the rival without a basis are kept.
EXACT_LOSS = "exact_loss"


def label_clusters(run: Run, basis: str) -> dict[str, Any]:
    """Labels of every cluster of one basis, and how much clusters overlap."""
    record = load_record(ClusterRecord, run.directory.clusters(basis))
    return _labelled(run, record.vectors(), load_observation(run, basis).allocation.projected_loss())


def label_exact_losses(run: Run) -> dict[str, Any]:
    """The rival without a basis: clusters of the exact losses, by the same settings, labelled alike."""
    projections = load_record(Projections, run.directory.projections(run.config.bases[0].label))
    paths = exact_loss(projections).paths
    return _labelled(
        run, cluster_trajectories(paths, ClusterSettings(**run.config.clusters.model_dump())), paths
    )


def _labelled(run: Run, found_clusters: Sequence[VectorClusters], paths: torch.Tensor) -> dict[str, Any]:
    """Labels of clusters found on the select split; ``paths`` are the (T, K, M) trajectories clustered."""
    tokens, tags = run.task.splits.select, run.task.tags
    clusters, members = [], {}
    for found in found_clusters:
        for number in range(found.count):
            member = found.members(number)
            rule = rule_label(tokens, member, seed=run.config.seed)
            entry: dict[str, Any] = {
                "vector": found.vector,
                "cluster": number,
                "tokens": int(member.sum()),
                "rule": rule.text,
                "auc": rule.auc,
                "auc_shuffled": rule.auc_shuffled,
                "coverage": rule.coverage,
                "precision": rule.precision,
                "support": rule.support,
                "base_rate": rule.base_rate,
                "counts": rule.counts,
                "contexts": _contexts(tokens, member, paths[:, found.vector].T),
            }
            if tags is not None:
                generator = torch.Generator().manual_seed(run.config.seed)
                gold = tag_label(tags, member, generator)
                entry["tags"] = {
                    "text": gold.text,
                    "found": gold.found,
                    "support": gold.support,
                    "coverage": gold.coverage,
                    "lift": gold.lift,
                    "chance": gold.chance,
                }
            clusters.append(entry)
            members[f"{found.vector}:{number}"] = member
    kept = [found.vector for found in found_clusters if found.kept]
    return {
        "threshold": LABEL_AUC,
        "clusters": clusters,
        "overlap": overlap(members).tolist() if members else [],
        "distinct_groups": distinct(members),
        "vectors_kept": len(kept),
        "vectors_with_rule": len({c["vector"] for c in clusters if c["counts"]}),
        "vectors_with_tags": len({c["vector"] for c in clusters if c.get("tags", {}).get("found")}),
        "clusters_with_rule": sum(bool(c["counts"]) for c in clusters),
    }


def transferred_labels(run: Run, basis: str, tokens: TokenSet) -> list[dict[str, Any]]:
    """How well each cluster's rule names the tokens of another text that move like the cluster.

    Those tokens get their cluster from their own projected losses, by the prediction of the clustering
    that was fitted on select; the rule never sees a loss.
    """
    settings = ClusterSettings(**run.config.clusters.model_dump())
    projections = project(
        run.objective, run.checkpoints(), [load_record(Basis, run.directory.basis(basis))], tokens
    )[0]
    both = cluster_both(
        load_observation(run, basis).allocation.projected_loss(),
        allocate(projections, run.config.rule).projected_loss(),
        settings,
        seed=run.config.seed,
    )
    rows = []
    for found in both:
        for number in range(found.select.count):
            rule = rule_label(run.task.splits.select, found.select.members(number), seed=run.config.seed)
            member = found.evaluate.members(number)
            rows.append(
                {
                    "basis": basis,
                    "vector": found.select.vector,
                    "cluster": number,
                    "rule": rule.text,
                    "auc": rule.auc,
                    "auc_transferred": transferred_auc(rule.rule, tokens, member),
                    "tokens": int(member.sum()),
                }
            )
    return rows


def _contexts(tokens: TokenSet, member: torch.Tensor, paths: torch.Tensor) -> list[str]:
    """Contexts of the tokens nearest the medoid of the cluster's trajectories."""
    if not tokens.contexts:
        return []
    rows = member.nonzero()[:, 0]
    nearest = nearest_to_medoid(paths[rows].double().numpy(), CONTEXTS)
    return [tokens.contexts[int(rows[i])] for i in nearest]


def write_labels(run: Run) -> dict[str, dict[str, Any]]:
    """Label the clusters of every basis, and those of the exact losses as a rival; keep all beside them."""
    result = {spec.label: label_clusters(run, spec.label) for spec in run.config.bases}
    result[EXACT_LOSS] = label_exact_losses(run)
    for name, labels in result.items():
        write_json(run.directory.path / "labels" / f"{name}.json", labels)
    return result


def read_labels(directory: Path) -> dict[str, dict[str, Any]]:
    """Basis (or ``exact_loss``) -> labels of a run, empty where none were made."""
    return {
        path.stem: json.loads(path.read_text())
        for path in sorted((directory / "labels").glob("*.json"))
        if path.stem != "transfer"
    }


def label_of(entry: Mapping[str, Any]) -> str | None:
    """What a cluster is called: its feature rule if that counts, else its tag label, else nothing."""
    if entry["counts"]:
        return str(entry["rule"])
    if entry.get("tags", {}).get("found"):
        return str(entry["tags"]["text"])
    return None


def label_sections(directory: RunDirectory) -> list[Section]:
    """The report's chapter on labels, from the records."""
    parts = []
    for basis, found in read_labels(directory.path).items():
        gold = any("tags" in entry for entry in found["clusters"])
        parts.append(
            f"<h3>{_title(basis)}</h3><p>{_count(basis, found)} a feature rule of AUC {found['threshold']} "
            f"or more on held-out documents{_tag_count(found) if gold else ''}; "
            f"{len(found['distinct_groups'])} groups of clusters are left when those that share more than "
            "half of their tokens are taken together.</p>"
        )
        parts.append(_table(found["clusters"], gold))
        parts += [_context_block(entry) for entry in found["clusters"][:12]]
    return [Section("What the tokens of a cluster share", "".join(parts))] if parts else []


def _title(basis: str) -> str:
    return "Clusters of the exact losses (no basis)" if basis == EXACT_LOSS else f"{escape(basis)} basis"


def _count(basis: str, found: Mapping[str, Any]) -> str:
    if basis == EXACT_LOSS:
        return f"{found['clusters_with_rule']} of {len(found['clusters'])} clusters have"
    return f"{found['vectors_with_rule']} of {found['vectors_kept']} kept vectors have a cluster with"


def _tag_count(found: Mapping[str, Any]) -> str:
    return f", {found['vectors_with_tags']} one with a part-of-speech label"


def _table(entries: list[dict[str, Any]], gold: bool) -> str:
    heads = ["vector:cluster", "tokens", "rule", "AUC", "AUC shuffled", "coverage", "precision", "support"]
    heads += ["tags", "tag coverage", "lift", "chance"] if gold else []
    rows = []
    for e in entries:
        cells = [f"{e['vector']}:{e['cluster']}", e["tokens"], e["rule"][:160]]
        cells += [f"{e[key]:.2f}" for key in ("auc", "auc_shuffled", "coverage", "precision")]
        cells.append(e["support"])
        if gold:
            t = e["tags"]
            cells += [t["text"], f"{t['coverage']:.2f}", f"{t['lift']:.1f}", f"{t['chance']:.2f}"]
        mark = ' class="strong"' if e["counts"] else ""
        rows.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _context_block(entry: Mapping[str, Any]) -> str:
    lines = []
    for context in entry["contexts"]:
        left, _, rest = context.partition("[")
        token, _, right = rest.partition("]")
        lines.append(f"<li>{escape(left)}<mark>{escape(token)}</mark>{escape(right)}</li>")
    if not lines:
        return ""
    title = f"{entry['vector']}:{entry['cluster']}"
    items = "".join(lines)
    return f"<details><summary>{title}: tokens nearest the medoid</summary><ol>{items}</ol></details>"


def describe_labels(labels: Mapping[str, Mapping[str, Any]]) -> str:
    """A few lines for the terminal."""
    lines = []
    for basis, found in labels.items():
        lines.append(
            f"{basis}: {_count(basis, found)} a feature rule of AUC {found['threshold']} or more on held-out "
            "documents"
        )
        for e in sorted(found["clusters"], key=lambda entry: -entry["auc"])[:8]:
            tags = f"; tags {e['tags']['text']}" if "tags" in e else ""
            lines.append(
                f"  {e['vector']}:{e['cluster']}  {e['tokens']} tokens, AUC {e['auc']:.2f} "
                f"(shuffled {e['auc_shuffled']:.2f}), coverage {e['coverage']:.2f}: {e['rule'][:90]}{tags}"
            )
    return "\n".join(lines)
