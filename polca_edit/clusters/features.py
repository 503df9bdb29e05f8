"""Rival trajectories: what else could be clustered instead of projected loss.

Each is a :class:`Trajectories` record, one trajectory per (feature, token), and goes through the
same clustering. Filters that only make sense for a loss (a rise over the run) are switched off for
those that are not one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polca_edit.allocation.allocate import Projections, allocate
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.models import cached_activations
from polca_edit.parameters import call_with
from polca_edit.tokens import TokenSet


@dataclass(frozen=True)
class Trajectories:
    """Trajectories of one feature family.

    Attributes:
        name: of the family.
        paths: (T, V, M), V trajectories per token.
        falls: whether learning makes them fall, so that the paper's filters apply.
        supervised: True if labels went into them.
    """

    name: str
    paths: Float[Tensor, "T V M"]
    falls: bool
    supervised: bool = False


def exact_loss(projections: Projections) -> Trajectories:
    """The loss itself, nats."""
    return Trajectories("exact_loss", projections.losses[:, None], True)


def loss_change(projections: Projections) -> Trajectories:
    """Change of the loss over each interval, nats; the first entry is zero."""
    change = projections.losses.diff(dim=0)
    return Trajectories("loss_change", torch.cat([torch.zeros_like(change[:1]), change])[:, None], False)


def fisher(projections: Projections) -> Trajectories:
    """<b, g_t(x)>^2 along every vector (arXiv 2506.15872, Table 8)."""
    return Trajectories("fisher", projections.gradients.square(), False)


def first_order(projections: Projections) -> Trajectories:
    """First-order POLCA, the running sum of Eq. 2."""
    return Trajectories("first_order", allocate(projections, "first_order").projected_loss(), True)


def parameter_lca(projections: Projections) -> Trajectories:
    """LCA (Eq. 1) per token: first order along single parameters (projections on axes)."""
    return Trajectories("lca", allocate(projections, "first_order").projected_loss(), True)


def input_saliency(objective: Objective, checkpoints: Checkpoints, tokens: TokenSet) -> Trajectories:
    """Norm of the gradient of a token's loss in the input embeddings, one trajectory per token.

    The embedding is the module's first ``nn.Embedding`` in module order; its output (B, L, D) is
    differentiated, one backward pass per prediction slot, since sequences do not interact.

    Raises:
        ValueError: if the module has no embedding.
    """
    embedding = next((m for m in objective.module.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is None:
        raise ValueError("input saliency needs a module with an nn.Embedding; use another feature")
    paths = [_saliency(objective, checkpoints[i], tokens, embedding) for i in range(len(checkpoints))]
    return Trajectories("saliency", torch.stack(paths)[:, None], False)


def _saliency(
    objective: Objective, theta: Float[Tensor, " N"], tokens: TokenSet, embedding: nn.Embedding
) -> Float[Tensor, " M"]:
    values = objective.space.unflatten(theta)
    result = theta.new_zeros(tokens.scored.shape)
    for rows in tokens.batches(objective.batch_size):
        kept: list[Tensor] = []

        def keep(_: nn.Module, __: object, output: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[-1]

        handle = embedding.register_forward_hook(keep)
        try:
            with torch.enable_grad():
                losses = call_with(
                    objective.module, objective.space, values, objective.token_loss, tokens.inputs[rows]
                )
                for slot in range(losses.shape[1]):
                    (grad,) = torch.autograd.grad(losses[:, slot].sum(), [kept[0]], retain_graph=True)
                    result[rows, slot] = grad.flatten(1).norm(dim=1)
        finally:
            handle.remove()
    return result[tokens.scored]


def gradient_influence(
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    probes: Sequence[TokenSet],
    rates: Sequence[float] | None = None,
) -> Trajectories:
    """TracIn: running sum over checkpoints of rate_t <g_t(x), g_t(Z)> for each probe set Z.

    (Pruthi et al. 2020, with Z the mean over a probe set of training data.) It is the first-order
    loss change of x had the model stepped on Z, so it grows where Z helps x.

    Args:
        objective: the token loss.
        checkpoints: the series.
        tokens: whose loss is influenced.
        probes: sets of training sequences.
        rates: learning rate of each checkpoint; one each where absent.
    """
    total, paths = None, []
    for index in range(len(checkpoints)):
        theta = checkpoints[index]
        rows = torch.stack([objective.mean_gradient(theta, probe)[1].cpu() for probe in probes])
        slopes = objective.directional(theta, rows, tokens, expected=len(probes) * len(checkpoints))[1]
        step = slopes * (1.0 if rates is None else rates[index])
        total = step if total is None else total + step
        paths.append(total)
    return Trajectories("influence", torch.stack(paths), False)


def hidden_activations(
    objective: Objective,
    checkpoints: Checkpoints,
    tokens: TokenSet,
    hook: str,
    count: int,
    *,
    last_positions: bool = True,
) -> Trajectories:
    """Principal components of a hidden activation at the predicting position, over training.

    Components are those of all tokens and checkpoints together, so trajectories share their axes.

    Args:
        objective: the token loss; its module must have TransformerLens hooks.
        checkpoints: the series.
        tokens: where; the token-loss inputs are fed as they are.
        hook: name of the activation, (B, L, D).
        count: V, components kept.
        last_positions: the P prediction slots read the P positions before the last (the arithmetic
            layout, where the input holds its own answer); otherwise slot p reads position p.
    """
    slots = tokens.scored.shape[1]
    stacked = []
    for index in range(len(checkpoints)):
        parts = []
        with objective.space.substituted(objective.module, checkpoints[index]):
            for rows in tokens.batches(objective.batch_size):
                given = tokens.inputs[rows][:, :-1]
                value = cached_activations(objective.module, given, [hook])[hook]
                value = value[:, -slots:] if last_positions else value[:, :slots]
                parts.append(value[tokens.scored[rows]])
        stacked.append(torch.cat(parts))
    values = torch.stack(stacked)
    flat = values.flatten(0, 1).double()
    flat = flat - flat.mean(0)
    _, axes = torch.linalg.eigh(flat.T @ flat)
    components = (flat @ axes.flip(1)[:, :count]).view(*values.shape[:2], count)
    return Trajectories("activations", components.permute(0, 2, 1).to(values.dtype), False)
