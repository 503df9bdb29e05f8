"""A model of your own, from its checkpoints to a causal table."""

import torch

import interventions as iv
import polca_edit as pe

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(12, 32), torch.nn.GELU(), torch.nn.Linear(32, 12))
ids = (torch.rand(240, 9).square() * 12).long()  # low ids are common
ids[:, 1::2] = (5 * ids[:, ::2][:, :4] + 1) % 12  # every second id follows from the one before
loss, checkpoints = pe.Objective(model, pe.next_token_loss), {}
optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
for step in range(201):
    if step % 10 == 0:
        checkpoints[step] = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser.zero_grad()
    pe.next_token_loss(model, ids[:80]).mean().backward()
    optimiser.step()
series, unseen = pe.open_checkpoints(checkpoints, model), pe.TokenSet.from_ids(ids[160:])
basis = pe.trajectory_basis(series, 8)
seen = pe.observe(loss, series, basis, pe.TokenSet.from_ids(ids[80:160]))
split = iv.EvaluatedSplit(loss, series, unseen)
print(split.damage(iv.project_out(split, basis[0])).by(seen.members(unseen)))  # nats per cluster
print(iv.causal_test(split, seen.hypotheses(), iv.TestSettings(rotations=20)))
