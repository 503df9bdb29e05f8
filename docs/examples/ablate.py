"""A model of your own from its checkpoints to a causal table: what does each movement of training carry?"""
import torch
from torch import nn
import interventions as iv
import polca_edit as pe

torch.manual_seed(0); torch.set_num_threads(1)
model = nn.Sequential(nn.Embedding(20, 16), nn.Flatten(), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 10))
pairs = torch.cartesian_prod(torch.arange(10), torch.arange(10, 20))[torch.randperm(100)]
def digit_loss(module, pairs):  # (B, 2) -> (B, 1) nats: the last digit of a sum
    return nn.functional.cross_entropy(module(pairs), pairs.sum(1) % 10, reduction="none")[:, None]
optimiser, checkpoints = torch.optim.Adam(model.parameters(), lr=3e-3), {}
for step in range(301):
    if step % 10 == 0:
        checkpoints[step] = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser.zero_grad(); digit_loss(model, pairs).mean().backward(); optimiser.step()
def token_set(pairs):  # every pair is a document with one scored token; features and labels never see a loss
    features = {"first": pairs[:, 0].numpy(), "second": (pairs[:, 1] - 10).numpy(), "sum": pairs.sum(1).numpy() - 10}
    return pe.TokenSet(pairs, torch.ones(len(pairs), 1).bool(), torch.arange(len(pairs)), {"wraps": pairs.sum(1) >= 20}, features=features)
series, loss = pe.open_checkpoints(checkpoints, model), pe.Objective(model, digit_loss)
basis, (tokens, unseen) = pe.trajectory_basis(series, 8), (token_set(pairs[:60]), token_set(pairs[60:]))
seen, split = pe.observe(loss, series, basis, tokens), iv.EvaluatedSplit(loss, series, unseen)
print("undoing vector 0, nats:", split.damage(iv.project_out(split, basis[0])).by(unseen.skills))
print(iv.causal_test(split, seen.hypotheses(least=5), iv.TestSettings(least=5, rotations=20)))
