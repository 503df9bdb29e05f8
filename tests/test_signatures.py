"""Interventional clusters on planted skills: found without labels, joined by windows, absent where absent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import orthogonal
from torch import Tensor, nn

from interventions.damage import EvaluatedSplit
from interventions.discovery.partial_undo import (
    EditSettings,
    Signatures,
    halves_agree,
    partial_undo_edits,
    signatures,
    window_changes,
)
from interventions.discovery.signatures import (
    Found,
    SignatureSettings,
    clustered,
    interventional_clusters,
    joined_by_windows,
    name_bases,
)
from interventions.edits import project_out
from polca_edit.basis.record import unlabelled
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet

SKILLS, SEQUENCES, STEPS = 3, 60, 31
SETTINGS = SignatureSettings(EditSettings(most=80, seed=3), least_share=0.05)


class Signed(nn.Module):
    """Skill k lies on direction k; direction SKILLS + k favours one of its two outputs over the other."""

    def __init__(self, frame: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(len(frame), dtype=frame.dtype))
        self.register_buffer("frame", frame)


def signed_loss(module: Signed, inputs: Tensor) -> Tensor:
    """Inputs (B, P, 3): skill, output (0 or 1), strength. Loss softplus(-strength (z_k +- y_k))."""
    z = module.frame.T @ module.theta
    skill, side = inputs[..., 0].long(), 2 * inputs[..., 1] - 1
    return nn.functional.softplus(-inputs[..., 2] * (z[skill] + side * z[SKILLS + skill]))


def planted(generator: torch.Generator) -> EvaluatedSplit:
    """Three skills, each learned at its own time, each with two outputs told apart by a second direction."""
    frame = orthogonal(2 * SKILLS + 2, generator)
    module = Signed(frame)
    skill = torch.arange(SKILLS).repeat(SEQUENCES, 2)
    side = torch.randint(0, 2, skill.shape, generator=generator)
    strength = 1 + 0.3 * torch.rand(skill.shape, generator=generator, dtype=torch.float64)
    flat, output = skill.flatten(), side.flatten()
    tokens = TokenSet(
        torch.stack([skill.double(), side.double(), strength], dim=-1),
        torch.ones(skill.shape, dtype=torch.bool),
        torch.arange(SEQUENCES),
        {f"skill {k}": flat == k for k in range(SKILLS)},
        features={"slot": flat.numpy(), "output": output.numpy()},
    )
    time = torch.arange(STEPS, dtype=torch.float64)
    z = torch.zeros(STEPS, len(frame), dtype=torch.float64)
    for k in range(SKILLS):
        z[:, k] = 5 * torch.sigmoid((time - 5 - 10 * k) / 1.5) - 2
        z[:, SKILLS + k] = 1.5 * torch.sigmoid((time - 5 - 10 * k) / 1.5) - 0.75
    space = ParameterSpace.from_module(module)
    series = open_checkpoints(z @ frame.T, space, steps=[10 * i for i in range(STEPS)])
    return EvaluatedSplit(Objective(module, signed_loss, space, batch_size=32), series, tokens)


def planted_basis(split: EvaluatedSplit):
    """The six planted directions, mixed by a rotation: no vector is a skill."""
    rows = split.loss.module.frame.T[: 2 * SKILLS]
    turn = orthogonal(2 * SKILLS, torch.Generator().manual_seed(11)).to(rows)
    return unlabelled("mixed", turn @ rows)


@pytest.fixture(scope="module")
def split() -> EvaluatedSplit:
    return planted(torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def found(split) -> Found:
    return interventional_clusters(split, planted_basis(split), SETTINGS)


def test_every_skill_is_one_pure_cluster_without_any_label(split, found):
    bare = split.on(replace(split.tokens, skills={}, features={}))
    blind = interventional_clusters(bare, planted_basis(split), SETTINGS)
    assert torch.equal(blind.labels, found.labels)
    assert found.count == SKILLS
    for members in found.clusters.values():
        purity = [float(mask[members].double().mean()) for mask in split.tokens.skills.values()]
        recall = [float(members[mask].double().mean()) for mask in split.tokens.skills.values()]
        assert max(purity) == 1.0
        assert max(recall) > 0.9


def test_a_clusters_parts_are_its_outputs(split, found):
    """Before groups are joined by windows they differ in the output that the second direction favours."""
    output = torch.from_numpy(split.tokens.features["output"])
    for cluster in range(found.count):
        parts = found.parts_of(cluster)
        assert len(parts) >= 2
        assert all(float(output[m].double().std()) == 0 for m in parts.values())
        assert {int(output[m].double().mean()) for m in parts.values()} == {0, 1}


def test_a_cluster_of_one_group_is_split_again_by_its_own_signatures(split):
    """The inner clustering finds the outputs where the first one was given no chance to."""
    signed = signatures(split, {"mixed": planted_basis(split)}, SETTINGS.edits)
    coarse = clustered(signed, "mixed", replace(SETTINGS, method="kmeans", clusters=3, neighbours=0))
    output = split.tokens.features["output"]
    for cluster in range(coarse.count):
        inside = coarse.parts_of(cluster, inner=True)
        assert len(inside) >= 2
        assert all(output[m.numpy()].std() == 0 for m in inside.values())


def test_tokens_whose_damages_were_dealt_anew_in_every_edit_form_no_cluster(split):
    """The shuffled twin: the same numbers in every edit, but no token keeps its own."""
    signed = signatures(split, {"mixed": planted_basis(split)}, SETTINGS.edits)
    generator = np.random.default_rng(0)
    dealt = replace(
        signed,
        changes=generator.permuted(signed.changes, axis=1),
        windows=generator.permuted(signed.windows, axis=1),
    )
    blind = clustered(dealt, "mixed", SETTINGS)
    purity = [
        max(float(mask[members].double().mean()) for mask in split.tokens.skills.values())
        for members in blind.clusters.values()
    ]
    assert blind.outlier_share > 0.8 or max(purity, default=0.0) < 0.6
    assert halves_agree([dealt.changes], SETTINGS.edits) < 0.3


def test_edits_are_added_until_two_halves_agree(split):
    basis = {"mixed": planted_basis(split)}
    loose = signatures(split, basis, EditSettings(batch=10, most=80, stable=0.5, pieces=0))
    never = signatures(split, basis, EditSettings(batch=10, most=30, stable=1.0, pieces=0))
    assert loose.stability[-1][1] >= 0.5
    assert all(value < 0.5 for _, value in loose.stability[:-1])
    assert [count for count, _ in never.stability] == [10, 20, 30]
    assert len(never.changes) == len(never.sources) == 30
    # Halves agree more as edits are added.
    assert never.stability[-1][1] > never.stability[0][1]


def test_an_edit_takes_back_at_most_the_recorded_movement_of_each_vector(split):
    basis = planted_basis(split)
    along = split.movement.along(basis.rows)
    drawn = list(partial_undo_edits(split, basis, 50, torch.Generator().manual_seed(0)))
    share = torch.stack([-edit.coordinates / along for edit in drawn])
    assert float(share.min()) >= 0
    assert float(share.max()) <= 1
    assert 0.35 < float((share > 0).double().mean()) < 0.65
    assert float((share == 0).double().mean()) > 0.35


def test_windows_are_every_contiguous_run_and_the_whole_run_undoes_everything(split):
    spans, changes = window_changes(split, 4)
    assert len(spans) == len(changes) == 10
    whole = next(i for i, s in enumerate(spans) if (s.start, s.end) == (0, 10 * (STEPS - 1)))
    assert np.allclose(changes[whole], split.headroom.numpy(), rtol=0, atol=1e-9)


def test_groups_are_joined_only_where_the_same_windows_take_them(split):
    """Four groups, two skills; a threshold above one joins nothing."""
    signed = signatures(split, {"mixed": planted_basis(split)}, EditSettings(most=10, batch=10))
    output = split.tokens.features["output"]
    skill = split.tokens.features["slot"]
    groups = (2 * skill + output).astype(np.int64)
    joined = joined_by_windows(groups, signed, SETTINGS)
    assert len(np.unique(joined)) == SKILLS
    assert all(len(np.unique(joined[skill == k])) == 1 for k in range(SKILLS))
    apart = joined_by_windows(groups, signed, replace(SETTINGS, same_windows=1.01))
    assert len(np.unique(apart)) == 2 * SKILLS


def test_each_cluster_becomes_a_pair_with_the_vector_that_hurts_it_most(split):
    """Planted directions unmixed: the vector must be the skill's own, the rule the skill's slot."""
    rows = split.loss.module.frame.T[: 2 * SKILLS].contiguous()
    basis = unlabelled("planted", rows)
    found = interventional_clusters(split, basis, SETTINGS)
    pairs = found.hypotheses()
    assert len(pairs) == SKILLS
    for pair in pairs:
        members = pair.group.on(split.tokens)
        skill = split.tokens.features["slot"][members.numpy()]
        assert len(set(skill)) == 1
        assert pair.vectors == (int(skill[0]),)
        assert pair.family == "interventional"
        assert torch.equal(pair.rows, rows[pair.vectors[0]][None])
        shares = [split.damage(project_out(split, rows[v])).share_by({"c": members})["c"] for v in range(6)]
        assert int(np.argmax(shares)) == pair.vectors[0]


def test_two_bases_lie_side_by_side(split):
    one, two = planted_basis(split)[:3], planted_basis(split)[3:]
    assert list(name_bases([one, two])) == ["mixed0", "mixed1"]
    signed = signatures(split, name_bases([one, two]), EditSettings(most=10, batch=10, pieces=0))
    assert signed.sources == ("mixed0",) * 10 + ("mixed1",) * 10
    apart = [signatures(split, {"mixed0": one}, EditSettings(most=10, batch=10, pieces=0))]
    assert np.array_equal(signed.changes[:10], apart[0].changes)


def test_a_basis_without_movement_is_refused(split):
    still = unlabelled("still", split.loss.module.frame.T[2 * SKILLS :].contiguous())
    with pytest.raises(ValueError, match="holds none of the recorded movement"):
        interventional_clusters(split, still, SETTINGS)


def test_clusters_from_a_file_have_no_hypotheses(found):
    stored = replace(found, split=None, bases={})
    with pytest.raises(ValueError, match="read from a file"):
        stored.hypotheses()


def test_signatures_of_two_stages_join(split):
    signed = signatures(split, {"mixed": planted_basis(split)}, EditSettings(most=10, batch=10))
    both = signed.joined(signed)
    assert isinstance(both, Signatures)
    assert both.changes.shape[0] == 20
    assert np.array_equal(both.windows, signed.windows)
