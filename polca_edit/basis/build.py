"""Every basis by name: one table, what each kind needs from a run, and how it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from polca_edit.basis import operators, path
from polca_edit.basis.hessian import EigenSettings, Keeping, hessian_basis
from polca_edit.basis.record import Basis, random_basis
from polca_edit.basis.storage import stored_as
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
        checkpoints: basis checkpoints to choose from, the whole series or every second one.
        tokens: the curvature sample.
        settings: accuracy, seed, mask and vectors per checkpoint.
        outputs: logits of the scored slots, for Gauss-Newton.
        second_moments: step -> Adam's second moments, None where no optimiser state was kept.
        keeping: hooks for resuming and streaming, used by ``hessian``; ``trajectory`` uses ``allocate`` and
            ``displacements``.
    """

    objective: Objective
    checkpoints: Checkpoints
    tokens: TokenSet
    settings: EigenSettings = field(default_factory=EigenSettings)
    outputs: operators.OutputFunction | None = None
    second_moments: Callable[[int], Float[Tensor, " N"]] | None = None
    keeping: Keeping = field(default_factory=Keeping)

    def places(self, count: int) -> int:
        """Basis checkpoints that give ``count`` vectors."""
        return -(-count // self.settings.per_checkpoint)

    def spaced(self, count: int) -> Checkpoints:
        """Equally spaced basis checkpoints that give ``count`` vectors, the last one included."""
        return self.checkpoints.spaced(self.places(count))


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


def _hessian(given: BasisInputs, count: int) -> Basis:
    return hessian_basis(
        given.objective, given.checkpoints, given.tokens, count, given.settings, keeping=given.keeping
    )


def _shuffled(given: BasisInputs, count: int) -> Basis:
    chosen = given.spaced(count)
    return operators.shuffled_hessian_basis(given.objective, chosen, given.tokens, given.settings)


def _final(given: BasisInputs, count: int) -> Basis:
    more = replace(given.settings, max_products=given.settings.max_products * max(1, count // 2))
    return operators.final_hessian_basis(given.objective, given.checkpoints, given.tokens, count, more)


def _sliding(given: BasisInputs, count: int) -> Basis:
    chosen = given.spaced(count)
    return operators.sliding_hessian_basis(given.objective, chosen, given.tokens, given.settings)


def _loss_groups(given: BasisInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Exact losses of the curvature sample at the basis checkpoints, and its tokens grouped by k-means."""
    series = given.checkpoints
    losses = torch.stack([given.objective.losses(series[i], given.tokens) for i in range(len(series))])
    return losses, path.loss_groups(losses, 6, seed=given.settings.seed)


def _adaptive(given: BasisInputs, count: int) -> Basis:
    """Hessian vectors where loss groups of the curvature sample accelerate."""
    series = given.checkpoints
    losses, groups = _loss_groups(given)
    chosen = path.accelerating_checkpoints(losses, torch.tensor(series.steps), groups, given.places(count))
    return hessian_basis(given.objective, series.subset(chosen), given.tokens, count, given.settings)


def _gauss_newton(given: BasisInputs, count: int) -> Basis:
    if given.outputs is None:
        raise ValueError("a Gauss-Newton basis needs the model's logits, this task gives none; use 'fisher'")
    chosen = given.spaced(count)
    return operators.gauss_newton_basis(given.objective, given.outputs, chosen, given.tokens, given.settings)


def _fisher(given: BasisInputs, count: int) -> Basis:
    return operators.fisher_basis(given.objective, given.spaced(count), given.tokens, given.settings)


def _covariance(given: BasisInputs, count: int) -> Basis:
    chosen = given.spaced(count)
    return operators.fisher_basis(given.objective, chosen, given.tokens, given.settings, centred=True)


def _stacked(given: BasisInputs, count: int) -> Basis:
    # Four checkpoints: every product passes over the sample once per stacked checkpoint.
    chosen = given.checkpoints.spaced(min(4, count))
    return operators.stacked_jacobian_basis(given.objective, chosen, given.tokens, count, given.settings)


def _adam(given: BasisInputs, count: int) -> Basis:
    if given.second_moments is None:
        raise ValueError("an Adam-preconditioned basis needs recorded optimiser state; set state_every")
    chosen = given.checkpoints.spaced(count)
    return operators.adam_hessian_basis(
        given.objective, chosen, given.tokens, given.second_moments, given.settings
    )


def _trajectory(given: BasisInputs, count: int) -> Basis:
    keeping, mask = given.keeping, given.settings.mask
    return path.trajectory_basis(
        given.checkpoints, count, mask=mask, allocate=keeping.allocate, held=keeping.displacements
    )


def _gradients(given: BasisInputs) -> Tensor:
    return path.mean_gradients(given.objective, given.checkpoints, given.tokens)


def _secant(given: BasisInputs, count: int) -> Basis:
    return path.trajectory_secant_basis(given.checkpoints, _gradients(given), count, mask=given.settings.mask)


def _loss_weighted(given: BasisInputs, count: int) -> Basis:
    gradients, density = _gradients(given), path.loss_fall_density(*_loss_groups(given))
    return path.loss_weighted_basis(given.checkpoints, gradients, density, count, mask=given.settings.mask)


def _loss_path(given: BasisInputs, count: int) -> Basis:
    return path.loss_path_basis(given.checkpoints, _gradients(given), count, mask=given.settings.mask)


def _trajectory_hessian(given: BasisInputs, count: int) -> Basis:
    first = path.trajectory_basis(given.checkpoints, count - count // 4, mask=given.settings.mask)
    chosen = given.spaced(count // 4)
    return operators.trajectory_and_hessian_basis(
        first, given.objective, chosen, given.tokens, given.settings
    )


def _random(given: BasisInputs, count: int) -> Basis:
    settings = given.settings
    return random_basis(given.objective.space.size, count, settings.generator(), mask=settings.mask)


def _axes(given: BasisInputs, count: int) -> Basis:
    return path.parameter_axes_basis(given.checkpoints[-1], count, mask=given.settings.mask)


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

#: Kinds a run builds from its whole series; it builds the others from every second checkpoint, so that
#: what they explain is tested on checkpoints they have not seen.
FROM_THE_WHOLE_SERIES = frozenset({"hessian", "trajectory", "random"})
#: Of the others, those that take their vectors at equally spaced checkpoints of it.
AT_SPACED_CHECKPOINTS = frozenset(
    {"shuffled_hessian", "sliding_hessian", "gauss_newton", "fisher", "gradient_covariance"}
)


def build_basis(kind: str, inputs: BasisInputs, count: int, *, storage: str = "float32") -> Basis:
    """A basis by name.

    Args:
        kind: one of :data:`KINDS`.
        inputs: what it is built from.
        count: K, how many vectors.
        storage: type of the numbers that rows are kept in; fewer bits than 32 are a rounding, which is
            measured at the last basis checkpoint and kept in the record.

    Raises:
        ValueError: for an unknown name, or inputs the basis cannot do without.
    """
    if kind not in KINDS:
        raise ValueError(f"basis kind must be one of {sorted(KINDS)}, got '{kind}'; correct the name")
    found = replace(KINDS[kind](inputs, count), kind=kind)
    found = found if len(found) <= count else found[:count]
    return stored_as(found, storage, inputs.objective, inputs.checkpoints[-1], inputs.tokens)
