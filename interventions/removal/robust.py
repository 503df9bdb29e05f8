"""Two published ways to unlearn that aim at resistance to relearning, on the same problem and batches.

*Collapse of irrelevant representations* (CIR; Sondej & Yang, arXiv 2509.11816): principal components that
activations and output gradients share are taken out of the update of every weight matrix, so that only what
is specific to the skill is unlearned. *Unlearn, noise, distil on outputs* (UNDO; Lee et al., arXiv
2506.06278): an unlearned model teaches a noised copy of itself, so that what only hid in the weights is
not handed on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interventions.removal.grouped import token_kl, token_nll
from interventions.removal.optimise import Fit, FitSettings, fit
from interventions.removal.problem import RemovalProblem
from interventions.removal.rivals import gradient_ascent_loss, reached
from interventions.removal.tuning import StepLoss, logits_in
from polca_edit.parameters import ParameterSpace

# -- collapse of irrelevant representations -----------------------------------------------------------


@dataclass(frozen=True)
class Collapsed:
    """Movements of weight matrices with common input and output directions taken out; nothing else moves.

    A movement Z of a matrix (out, in) becomes (I - P_out) Z (I - P_in), which is what gradients are of
    inputs and output gradients with those directions collapsed.

    Attributes:
        space: parameters.
        inputs: matrix -> (k, in) orthonormal common directions of its inputs.
        outputs: matrix -> (k, out) of the gradients at its output.
        kind: for records.
    """

    space: ParameterSpace
    inputs: Mapping[str, Float[Tensor, "k i"]]
    outputs: Mapping[str, Float[Tensor, "k o"]]
    kind: str = "collapsed representations"

    @property
    def rank(self) -> int:
        """Number of coordinates, those without effect included."""
        return self.space.size

    def move(self, z: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The collapsed movement; differentiable."""
        parts = self.space.unflatten(z)
        moved = {}
        for name, part in parts.items():
            if name not in self.inputs:
                moved[name] = torch.zeros_like(part)
                continue
            inside, outside = self.inputs[name].to(z), self.outputs[name].to(z)
            part = part - (part @ inside.T) @ inside
            moved[name] = part - outside.T @ (outside @ part)
        return torch.cat([moved[name].flatten() for name in self.space.names])


def common_directions(values: Float[Tensor, "m n"], count: int) -> Float[Tensor, "k n"]:
    """The mean's direction, then leading principal components of the rest, orthonormal.

    Args:
        values: one row per token and position.
        count: principal components beside the mean; fewer where there are no more.
    """
    mean = values.mean(0)
    rest = values - mean
    _, found, right = torch.linalg.svd(rest, full_matrices=False)
    kept = right[: min(count, int((found > 1e-6 * found.max().clamp_min(1e-30)).sum()))]
    rows = torch.cat([mean[None], kept]) if float(mean.norm()) > 0 else kept
    if not len(rows):
        return rows
    frame, scale = torch.linalg.qr(rows.T)
    independent = scale.diagonal().abs() > 1e-6 * scale.diagonal().abs().max()
    kept_rows: Tensor = frame.T[independent].contiguous()
    return kept_rows


def collapsed_span(problem: RemovalProblem, count: int, batches: int = 2) -> Collapsed:
    """Common directions at the original weights of every linear layer, over all tokens of some fit batches.

    Args:
        problem: weights and batches.
        count: principal components that are collapsed, beside the mean.
        batches: how many.

    Raises:
        ValueError: for a model without a linear layer among its parameters.
    """
    predictor = problem.predictor
    module, space = predictor.loss.module, predictor.loss.space
    layers = {
        f"{name}.weight": layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and f"{name}.weight" in space.names
    }
    if not layers:
        raise ValueError(
            "collapsing representations needs linear layers among the model's parameters, got none; "
            "use another method"
        )
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in layers}
    for index in range(batches):
        tokens = problem.batch(index)
        predictor.passes += 3 * tokens.sequences
        caught: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [layer.register_forward_hook(_catch(caught, name)) for name, layer in layers.items()]
        try:
            with space.substituted(module, problem.theta), torch.enable_grad():
                logits = logits_in(predictor, module, tokens)
                loss = token_nll(logits, tokens.output_of.to(logits.device)).sum()
                outputs = [caught[name][1] for name in layers if name in caught]
                slopes = torch.autograd.grad(loss, outputs)
        finally:
            for hook in hooks:
                hook.remove()
        for name, slope in zip((name for name in layers if name in caught), slopes, strict=True):
            seen[name][0].append(caught[name][0].detach().flatten(0, -2).cpu())
            seen[name][1].append(slope.detach().flatten(0, -2).cpu())
    inputs = {name: common_directions(torch.cat(a), count) for name, (a, _) in seen.items() if a}
    outputs_ = {name: common_directions(torch.cat(g), count) for name, (_, g) in seen.items() if g}
    return Collapsed(space, inputs, outputs_)


def _catch(
    caught: dict[str, tuple[Tensor, Tensor]], name: str
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A hook that keeps a layer's input and output."""

    def hook(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        caught[name] = given[0], output

    return hook


def collapsed_ascent(problem: RemovalProblem, settings: FitSettings, steps: int) -> Fit:
    """K7: ascend the skill's loss with common representations collapsed; ``strength`` is how many."""
    span = collapsed_span(problem, int(settings.strength))
    stop = reached(problem.limits.target + 0.05) if settings.stop else None
    return fit(problem, span, gradient_ascent_loss, settings, steps, stop=stop)


# -- unlearn, noise, distil ---------------------------------------------------------------------------


def noised(
    theta: Float[Tensor, " N"],
    space: ParameterSpace,
    share: float,
    generator: torch.Generator,
    *,
    size: float = 1.0,
) -> Float[Tensor, " N"]:
    """(1 - share) theta + share size noise (UNDO, shrink and perturb).

    The noise of a matrix is Xavier's, uniform within sqrt(6 / (in + out)); other parameters only shrink
    towards zero, but norm scales, which shrink towards one.

    Args:
        theta: (N,) unlearned weights.
        space: shapes.
        share: alpha, 0 leaves the weights as they are, 1 leaves none of them.
        generator: of the noise.
        size: beta.
    """
    parts = []
    for name, part in space.unflatten(theta).items():
        if part.ndim >= 2:
            bound = math.sqrt(6 / (part.shape[0] + part.shape[1:].numel()))
            noise = (2 * torch.rand(part.shape, generator=generator, dtype=part.dtype) - 1) * bound
        else:
            scale = name.endswith("weight") and float(part.mean()) > 0.5
            noise = torch.full_like(part, 1.0 / size if scale else 0.0)
        parts.append(((1 - share) * part + share * size * noise).flatten())
    return torch.cat(parts)


def distillation(problem: RemovalProblem, teacher: Float[Tensor, " N"]) -> StepLoss:
    """Mean KL(teacher || student) over the tokens outside the skill, nats."""
    predictor = problem.predictor

    def loss(module: nn.Module, step: int) -> Tensor:
        tokens = problem.batch(step)
        kept = ~problem.rule.is_target(problem.rule.assign(tokens))
        predictor.passes += 3 * tokens.sequences
        taught = predictor.at(teacher, tokens)
        logits = logits_in(predictor, module, tokens)
        apart = token_kl(taught.to(logits), logits)
        return apart[kept.to(apart.device)].sum() / kept.sum().clamp_min(1)

    return loss
