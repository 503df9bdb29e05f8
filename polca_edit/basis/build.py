"""Every basis by name: what it needs from a run, and how it is built from the odd checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polca_edit.basis import operators as bases
from polca_edit.basis import path as path_bases
from polca_edit.basis.record import Basis, hessian_basis, random_basis, trajectory_basis
from polca_edit.checkpoints.files import SeriesFolder, read_weights
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet


@dataclass(frozen=True)
class BasisInputs:
    """What bases are built from; never the select or the evaluate split.

    Attributes:
        objective: the token loss.
        checkpoints: basis checkpoints to choose from (the odd ones of the series).
        tokens: the curvature sample.
        outputs: logits of the scored slots, for Gauss-Newton.
        second_moments: step -> Adam's second moments, None where no optimiser state was kept.
        seed: of start vectors and random draws.
        tolerance: relative eigen-residual.
        max_products: operator products per basis checkpoint at most.
        mask: restrict vectors to these parameters.
    """

    objective: Objective
    checkpoints: Checkpoints
    tokens: TokenSet
    outputs: Callable[[nn.Module, Tensor], Tensor] | None = None
    second_moments: Callable[[int], Float[Tensor, " N"]] | None = None
    seed: int = 0
    tolerance: float = 0.05
    max_products: int = 24
    mask: Bool[Tensor, " N"] | None = None

    def generator(self) -> torch.Generator:
        """A fresh generator, so that a basis does not depend on which were built before it."""
        return torch.Generator().manual_seed(self.seed)

    def spaced(self, count: int) -> Checkpoints:
        """``count`` equally spaced basis checkpoints, the last one included."""
        last = len(self.checkpoints) - 1
        if count > last:
            raise ValueError(
                f"{count} vectors need as many basis checkpoints, only {last} are there; ask for fewer"
            )
        return self.checkpoints.subset([round((i + 1) * last / count) for i in range(count)])


def recorded_second_moments(
    folder: SeriesFolder, space: ParameterSpace, beta: float
) -> Callable[[int], Float[Tensor, " N"]]:
    """Bias-corrected second moments from the recorded optimiser state nearest to a step."""

    def read(step: int) -> Tensor:
        steps = folder.state_steps()
        if not steps:
            raise ValueError("Adam-preconditioned bases need optimiser state; set state_every when training")
        nearest = min(steps, key=lambda s: abs(s - step))
        state = read_weights(folder.state(nearest))
        suffix = "//exp_avg_sq"
        moments = {name.removesuffix(suffix): value for name, value in state.items() if name.endswith(suffix)}
        return space.flatten(moments) / (1 - beta**nearest)

    return read


def output_logits(module: nn.Module, inputs: Tensor) -> Tensor:
    """Logits of the four output digits of a sum, for Gauss-Newton."""
    logits: Tensor = module(inputs[:, :-1])[:, -4:]
    return logits


def _eigen(inputs: BasisInputs) -> dict[str, object]:
    return {
        "generator": inputs.generator(),
        "tolerance": inputs.tolerance,
        "max_products": inputs.max_products,
        "mask": inputs.mask,
    }


def _hessian(inputs: BasisInputs, count: int) -> Basis:
    return hessian_basis(inputs.objective, inputs.spaced(count), inputs.tokens, **_eigen(inputs))  # type: ignore[arg-type]


def _shuffled(inputs: BasisInputs, count: int) -> Basis:
    return bases.shuffled_hessian_basis(
        inputs.objective,
        inputs.spaced(count),
        inputs.tokens,
        **_eigen(inputs),  # type: ignore[arg-type]
    )


def _final(inputs: BasisInputs, count: int) -> Basis:
    options = {**_eigen(inputs), "max_products": inputs.max_products * max(1, count // 2)}
    return bases.final_hessian_basis(
        inputs.objective,
        inputs.checkpoints,
        inputs.tokens,
        count,
        **options,  # type: ignore[arg-type]
    )


def _sliding(inputs: BasisInputs, count: int) -> Basis:
    return bases.sliding_hessian_basis(
        inputs.objective,
        inputs.spaced(count),
        inputs.tokens,
        **_eigen(inputs),  # type: ignore[arg-type]
    )


def _loss_groups(inputs: BasisInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Exact losses of the curvature sample at the basis checkpoints, and its tokens grouped by k-means."""
    series = inputs.checkpoints
    losses = torch.stack([inputs.objective.losses(series[i], inputs.tokens) for i in range(len(series))])
    return losses, path_bases.loss_groups(losses, 6, seed=inputs.seed)


def _adaptive(inputs: BasisInputs, count: int) -> Basis:
    """Hessian vectors where loss groups of the curvature sample accelerate."""
    series = inputs.checkpoints
    losses, groups = _loss_groups(inputs)
    chosen = path_bases.accelerating_checkpoints(losses, torch.tensor(series.steps), groups, count)
    return hessian_basis(
        inputs.objective,
        series.subset(chosen),
        inputs.tokens,
        kind="adaptive_hessian",
        **_eigen(inputs),  # type: ignore[arg-type]
    )


def _gauss_newton(inputs: BasisInputs, count: int) -> Basis:
    if inputs.outputs is None:
        raise ValueError("a Gauss-Newton basis needs the model's logits, this task gives none; use 'fisher'")
    return bases.gauss_newton_basis(
        inputs.objective,
        inputs.outputs,
        inputs.spaced(count),
        inputs.tokens,
        **_eigen(inputs),  # type: ignore[arg-type]
    )


def _fisher(inputs: BasisInputs, count: int) -> Basis:
    return bases.fisher_basis(
        inputs.objective,
        inputs.spaced(count),
        inputs.tokens,
        **_eigen(inputs),  # type: ignore[arg-type]
    )


def _covariance(inputs: BasisInputs, count: int) -> Basis:
    return bases.fisher_basis(
        inputs.objective,
        inputs.spaced(count),
        inputs.tokens,
        centred=True,
        **_eigen(inputs),  # type: ignore[arg-type]
    )


def _stacked(inputs: BasisInputs, count: int) -> Basis:
    # Four checkpoints: every product passes over the sample once per stacked checkpoint.
    return bases.stacked_jacobian_basis(
        inputs.objective,
        inputs.spaced(min(4, count)),
        inputs.tokens,
        count,
        **_eigen(inputs),  # type: ignore[arg-type]
    )


def _adam(inputs: BasisInputs, count: int) -> Basis:
    if inputs.second_moments is None:
        raise ValueError("an Adam-preconditioned basis needs recorded optimiser state; set state_every")
    return bases.adam_hessian_basis(
        inputs.objective,
        inputs.spaced(count),
        inputs.tokens,
        inputs.second_moments,
        **_eigen(inputs),  # type: ignore[arg-type]
    )


def _trajectory(inputs: BasisInputs, count: int) -> Basis:
    return trajectory_basis(inputs.checkpoints, count, mask=inputs.mask)


def _secant(inputs: BasisInputs, count: int) -> Basis:
    gradients = path_bases.mean_gradients(inputs.objective, inputs.checkpoints, inputs.tokens)
    return path_bases.trajectory_secant_basis(inputs.checkpoints, gradients, count, mask=inputs.mask)


def _loss_weighted(inputs: BasisInputs, count: int) -> Basis:
    gradients = path_bases.mean_gradients(inputs.objective, inputs.checkpoints, inputs.tokens)
    density = path_bases.loss_fall_density(*_loss_groups(inputs))
    return path_bases.loss_weighted_basis(inputs.checkpoints, gradients, density, count, mask=inputs.mask)


def _loss_path(inputs: BasisInputs, count: int) -> Basis:
    gradients = path_bases.mean_gradients(inputs.objective, inputs.checkpoints, inputs.tokens)
    return path_bases.loss_path_basis(inputs.checkpoints, gradients, count, mask=inputs.mask)


def _trajectory_hessian(inputs: BasisInputs, count: int) -> Basis:
    first = trajectory_basis(inputs.checkpoints, count - count // 4, mask=inputs.mask)
    return bases.trajectory_and_hessian_basis(
        first,
        inputs.objective,
        inputs.spaced(count // 4),
        inputs.tokens,
        **_eigen(inputs),  # type: ignore[arg-type]
    )


def _random(inputs: BasisInputs, count: int) -> Basis:
    return random_basis(inputs.objective.space.size, count, inputs.generator(), mask=inputs.mask)


def _axes(inputs: BasisInputs, count: int) -> Basis:
    last = inputs.checkpoints[len(inputs.checkpoints) - 1]
    return path_bases.parameter_axes_basis(last, count, mask=inputs.mask)


KINDS: dict[str, Callable[[BasisInputs, int], Basis]] = {
    "hessian": _hessian,
    "shuffled_hessian": _shuffled,
    "adaptive_hessian": _adaptive,
    "final_hessian": _final,
    "sliding_hessian": _sliding,
    "adam_hessian": _adam,
    "gauss_newton": _gauss_newton,
    "fisher": _fisher,
    "gradient_covariance": _covariance,
    "stacked_jacobian": _stacked,
    "loss_path": _loss_path,
    "trajectory": _trajectory,
    "trajectory_hessian": _trajectory_hessian,
    "trajectory_secant": _secant,
    "loss_weighted": _loss_weighted,
    "parameter_axes": _axes,
    "random": _random,
}


def build_basis(kind: str, inputs: BasisInputs, count: int) -> Basis:
    """A basis by name.

    Raises:
        ValueError: for an unknown name, or inputs the basis cannot do without.
    """
    if kind not in KINDS:
        raise ValueError(f"basis kind must be one of {sorted(KINDS)}, got '{kind}'; correct the name")
    return replace(KINDS[kind](inputs, count), kind=kind)
