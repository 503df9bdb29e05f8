"""What people use today to unlearn, on the same problem, the same batches and the same passes.

Every rival returns a movement of the weights, so that dose, shares and relearning are judged by the
same code as our edits. Iterative rivals move all weights with Adam. They stop once the batch's target
damage reaches the goal (without that stop gradient ascent destroys the model) or, where the setting
says so, use all steps, which lets a retain term repair what the first steps broke. All losses
are per token, masked to the skill's tokens, and taken from log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interventions.removal.optimise import Batch, Fit, FitSettings, Loss, fit
from interventions.removal.problem import RemovalProblem
from interventions.removal.spans import whole_space


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask].sum() / mask.sum().clamp_min(1)


def gradient_ascent_loss(batch: Batch) -> Tensor:
    """Minus the loss on the skill (K1)."""
    return -_mean(batch.nll_after, batch.target)


def grad_diff_loss(settings: FitSettings) -> Loss:
    """-gamma L_skill + alpha L_others (K1'; open-unlearning's GradDiff has gamma = alpha = 1)."""

    def loss(batch: Batch) -> Tensor:
        others = _mean(batch.nll_after, ~batch.target & (batch.groups >= 0))
        return settings.retain * others - settings.strength * _mean(batch.nll_after, batch.target)

    return loss


def npo_loss(settings: FitSettings) -> Loss:
    """Negative preference optimisation (K2), with an optional retain term.

    (2 / beta) E[log(1 + (pi_theta / pi_ref)^beta)] over the skill's tokens, beta = ``strength``.
    The ratio is one of probabilities: it is taken from log-probabilities, never from logits.
    """

    def loss(batch: Batch) -> Tensor:
        ratio = batch.nll_before - batch.nll_after
        forget = (
            _mean(nn.functional.softplus(settings.strength * ratio), batch.target) * 2 / settings.strength
        )
        return forget + settings.retain * _mean(batch.nll_after, ~batch.target & (batch.groups >= 0))

    return loss


def reached(goal: float) -> Callable[[Batch], bool]:
    """True once the skill's damage on the batch reaches the goal (share of headroom)."""
    return lambda batch: bool(batch.target.any()) and float(batch.target_share().detach()) >= goal


def gradient_ascent(problem: RemovalProblem, settings: FitSettings, steps: int) -> Fit:
    """K1: ascend the skill's loss."""
    return _all_weights(problem, gradient_ascent_loss, settings, steps)


def grad_diff(problem: RemovalProblem, settings: FitSettings, steps: int) -> Fit:
    """K1': ascend the skill's loss, descend the others'."""
    return _all_weights(problem, grad_diff_loss(settings), settings, steps)


def npo(problem: RemovalProblem, settings: FitSettings, steps: int) -> Fit:
    """K2: negative preference optimisation."""
    return _all_weights(problem, npo_loss(settings), settings, steps)


def _all_weights(problem: RemovalProblem, loss: Loss, settings: FitSettings, steps: int) -> Fit:
    span = whole_space(problem.theta.numel())
    stop = reached(problem.limits.target + 0.05) if settings.stop else None
    return fit(problem, span, loss, settings, steps, stop=stop)


def task_vector(problem: RemovalProblem, settings: FitSettings, steps: int) -> Fit:
    """K3: fine-tune on the skill, then move ``strength`` times the other way."""
    tuned = fit(
        problem,
        whole_space(problem.theta.numel()),
        lambda batch: _mean(batch.nll_after, batch.target),
        settings,
        steps,
    )
    back = -settings.strength * tuned.delta
    return Fit(back, back, tuned.steps, tuned.passes, tuned.seconds)


# -- rewinding parts of the weights ------------------------------------------------------------------


@dataclass(frozen=True)
class Importance:
    """Per weight: squared batch gradients on the skill and on the others.

    Attributes:
        target: (N,) mean squared gradient of the skill's mean loss.
        others: (N,) the same for all other tokens.
        slope: (N,) mean gradient on the skill.
    """

    target: Float[Tensor, " N"]
    others: Float[Tensor, " N"]
    slope: Float[Tensor, " N"]


def importance(problem: RemovalProblem, batches: int) -> Importance:
    """Diagonal empirical Fisher from batch gradients (squared before averaging over batches)."""
    size = problem.theta.numel()
    sums = [torch.zeros(size) for _ in range(3)]
    for index in range(batches):
        kept_batch = problem.prepared(index)
        tokens, groups, target = kept_batch.tokens, kept_batch.groups, kept_batch.target
        theta = problem.theta.clone().requires_grad_()
        logits = problem.predictor.at(theta, tokens, differentiable=True)
        losses = nn.functional.cross_entropy(logits, tokens.output_of, reduction="none")
        (wanted,) = torch.autograd.grad(_mean(losses, target), [theta], retain_graph=True)
        (kept,) = torch.autograd.grad(_mean(losses, ~target & (groups >= 0)), [theta])
        for total, value in zip(sums, (wanted.square(), kept.square(), wanted), strict=True):
            total += value / batches
    return Importance(*sums)


RULES = ("fisher ratio", "magnitude", "movement times gradient")


def rewind_weights(
    problem: RemovalProblem, found: Importance, rule: str, share: float
) -> Float[Tensor, " N"]:
    """K5: put the top share of single weights back to the reference.

    Args:
        problem: what is being removed.
        found: gradients.
        rule: ``fisher ratio`` F_skill / (F_others + eps); ``magnitude`` |theta - theta_ref|;
            ``movement times gradient`` |g_skill (theta - theta_ref)|.
        share: of all weights.

    Raises:
        ValueError: for an unknown rule.
    """
    back = problem.select.reference - problem.theta
    if rule == "fisher ratio":
        value = found.target / (found.others + found.others.mean().clamp_min(1e-30))
    elif rule == "magnitude":
        value = back.abs()
    elif rule == "movement times gradient":
        value = (found.slope * back).abs()
    else:
        raise ValueError(f"an importance rule must be one of {RULES}, got '{rule}'")
    count = max(1, round(share * value.numel()))
    chosen = torch.zeros_like(back)
    index = value.topk(count).indices
    chosen[index] = back[index]
    return chosen


def rewind_part(problem: RemovalProblem, include: Sequence[str]) -> Float[Tensor, " N"]:
    """K6: put the parameters that match a pattern back to the reference."""
    mask = problem.predictor.loss.space.mask(include)
    return torch.where(mask, problem.select.reference - problem.theta, torch.zeros_like(problem.theta))


# -- activations -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActivationAblation:
    """Replace an activation by its mean over select; no weight changes, so there is no edit.

    Attributes:
        hook: activation name.
        slots: sequence positions that are replaced.
        head: index on the second-to-last axis, or None for the whole activation.
        values: mean activation at those positions.
    """

    hook: str
    slots: tuple[int, ...]
    head: int | None
    values: Tensor = field(repr=False)

    def function(self, dose: float = 1.0) -> Callable[[Tensor], Tensor]:
        """What the hook does."""
        slots = torch.tensor(self.slots)

        def replace(value: Tensor) -> Tensor:
            result = value.clone()
            if self.head is None:
                result[:, slots] = (1 - dose) * value[:, slots] + dose * self.values
            else:
                part = value[:, slots, self.head]
                result[:, slots, self.head] = (1 - dose) * part + dose * self.values
            return result

        return replace


def mean_activation(
    cached: Mapping[str, Tensor], hook: str, slots: Sequence[int], head: int | None
) -> ActivationAblation:
    """Mean over sequences at each position."""
    mean = cached[hook][:, list(slots)].mean(0)
    return ActivationAblation(hook, tuple(slots), head, mean if head is None else mean[:, head])


# -- training again ----------------------------------------------------------------------------------


def masked_loss(losses: Float[Tensor, " m"], groups: Tensor, targets: Sequence[bool]) -> Tensor:
    """Mean loss over the tokens outside the skill: what a model trained without it sees."""
    skill = torch.tensor([*targets, True])[groups]
    return losses[~skill].sum() / (~skill).sum().clamp_min(1)
