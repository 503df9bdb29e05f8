"""Training edited weights on: repair without the skill, and relearning with it, in the one training loop.

A batch comes with a mask of the tokens that are trained on. Repair leaves the skill's tokens out; an
attacker who wants the skill back trains on some of them. Both start from weights with no optimiser state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interventions.blocking import BranchPoint, Hold, Retraining, run_arm
from interventions.removal.grouped import GroupRule, Predictor, token_nll
from polca_edit.seeds import generator_for
from polca_edit.tokens import TokenSet
from polca_edit.training import TrainingSettings

#: step -> (tokens, (m,) which of them are trained on); a pure function of the step.
MaskedBatches = Callable[[int], tuple[TokenSet, Bool[Tensor, " m"]]]
#: (module, step) -> mean loss of the step's batch, nats.
StepLoss = Callable[[nn.Module, int], Tensor]


def masked_batches(
    batch: Callable[[int], TokenSet], rule: GroupRule, share: float = 0.0, *, seed: int = 0
) -> MaskedBatches:
    """Batches with the skill masked, but for its tokens in a share of the sequences.

    Args:
        batch: step -> tokens.
        rule: which tokens are the skill.
        share: of the sequences that keep the skill's labels, drawn anew in every batch; 0 for none.
        seed: of that draw.
    """

    def batches(step: int) -> tuple[TokenSet, Tensor]:
        tokens = batch(step)
        skill = rule.is_target(rule.assign(tokens))
        drawn = torch.rand(tokens.sequences, generator=generator_for(seed, "labels given back", step))
        return tokens, ~skill | (drawn < share)[tokens.sequence_of]

    return batches


def label_loss(predictor: Predictor, batches: MaskedBatches) -> StepLoss:
    """Mean cross-entropy over the tokens that are trained on; zero where there are none."""

    def loss(module: nn.Module, step: int) -> Tensor:
        tokens, kept = batches(step)
        predictor.passes += 3 * tokens.sequences
        logits = logits_in(predictor, module, tokens)
        losses = token_nll(logits, tokens.output_of.to(logits.device))
        return losses[kept.to(losses.device)].sum() / kept.sum().clamp_min(1)

    return loss


def logits_in(predictor: Predictor, module: nn.Module, tokens: TokenSet) -> Float[Tensor, "M V"]:
    """Logits of the scored tokens from a module's own weights, differentiable."""
    device = next(module.parameters()).device
    return predictor.logits(module, tokens.inputs.to(device))[tokens.scored.to(device)]


def tuned(
    predictor: Predictor,
    start: Float[Tensor, " N"] | BranchPoint,
    loss: StepLoss,
    settings: TrainingSettings,
    *,
    every: int | None = None,
    watch: Callable[[Float[Tensor, " N"]], Mapping[str, float]] = lambda theta: {},
    hold: Hold | None = None,
) -> Float[Tensor, " N"]:
    """Weights after training on; the caller's module is left alone.

    Args:
        predictor: gives module and parameters.
        start: (N,) weights, with a fresh optimiser, or the state of a recorded run to go on from.
        loss: of each step's batch, steps from 1.
        settings: optimisation to the step ``settings.steps``; nothing is trained where it is reached.
        every: steps between calls of ``watch``, which also sees the start and the end.
        watch: given the weights (N,); what it returns is not used.
        hold: directions that stay where they are.
    """
    space, device = predictor.loss.space, predictor.loss.device
    point = start if isinstance(start, BranchPoint) else BranchPoint(0, start, {})
    theta, last = point.theta, settings.steps
    if last <= point.step:
        watch(theta)
        return theta.clone()
    module = copy.deepcopy(predictor.loss.module).to(device)
    run = Retraining(
        space, loss, settings, lambda trained: watch(space.read(trained).to(theta)), every or last
    )
    run_arm(module, run, point, last, arm="tuned", hold=hold)
    return space.read(module).to(theta)
