"""Closed forms, planted answers and dense references that the tests compare with.

Nothing here calls the code under test for an answer: a copy of a model is made with ``deepcopy``
and in-place writes, a Hessian by differentiating the module's own parameters twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet

# -- random matrices ---------------------------------------------------------------------------


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, float64."""
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def with_spectrum(values: Sequence[float], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(Q diag(values) Q', Q): a symmetric matrix of chosen spectrum and its eigenvectors as columns."""
    frame = orthogonal(len(values), generator)
    return frame @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ frame.T, frame


# -- the quadratic model -----------------------------------------------------------------------


class Quadratic(nn.Module):
    """Token x has loss 1/2 theta'A_x theta + <b_x, theta> + c_x; theta is held in two parameters.

    Gradient A_x theta + b_x and Hessian A_x are known, and so is every derivative of the mean.
    """

    def __init__(self, curvatures: Tensor, slopes: Tensor, offsets: Tensor) -> None:
        super().__init__()
        half, odd = divmod(slopes.shape[1], 2)
        self.weight = nn.Parameter(torch.zeros(2, half, dtype=slopes.dtype))
        self.bias = nn.Parameter(torch.zeros(odd, dtype=slopes.dtype)) if odd else None
        self.register_buffer("curvatures", curvatures)
        self.register_buffer("slopes", slopes)
        self.register_buffer("offsets", offsets)

    def theta(self) -> Tensor:
        parts = [self.weight.reshape(-1)] if self.bias is None else [self.weight.reshape(-1), self.bias]
        return torch.cat(parts)

    def closed_form(self, theta: Tensor) -> Tensor:
        """(M,) losses at any theta, written with plain matrix products."""
        bent = torch.einsum("i,mij,j->m", theta, self.curvatures, theta) / 2
        return bent + self.slopes @ theta + self.offsets

    def gradients(self, theta: Tensor) -> Tensor:
        """(M, N) gradients at any theta."""
        return torch.einsum("mij,j->mi", self.curvatures, theta) + self.slopes


def quadratic_loss(module: Quadratic, inputs: Tensor) -> Tensor:
    """Token losses (B, P); inputs (B, P) are token numbers."""
    theta, flat = module.theta(), inputs.flatten()
    bent = 0.5 * torch.einsum("i,mij,j->m", theta, module.curvatures[flat], theta)
    return (bent + module.slopes[flat] @ theta + module.offsets[flat]).view(inputs.shape)


def numbered_tokens(sequences: int, slots: int, *, skip: Sequence[tuple[int, int]] = ()) -> TokenSet:
    """A token set whose inputs are running numbers 0 .. sequences * slots - 1; ``skip`` is not scored."""
    scored = torch.ones(sequences, slots, dtype=torch.bool)
    for row, slot in skip:
        scored[row, slot] = False
    return TokenSet(torch.arange(sequences * slots).view(sequences, slots), scored, torch.arange(sequences))


@dataclass(frozen=True)
class QuadraticProblem:
    """A quadratic model with everything known about it.

    Attributes:
        module: the model.
        tokens: all its tokens, every slot scored.
        objective: the derivative interface over both.
        hessian: (N, N) mean curvature, of the chosen spectrum.
        frame: (N, N) its eigenvectors as columns, in the order of the spectrum.
    """

    module: Quadratic
    tokens: TokenSet
    objective: Objective
    hessian: Tensor
    frame: Tensor


def quadratic_problem(
    spectrum: Sequence[float],
    generator: torch.Generator,
    *,
    sequences: int = 7,
    slots: int = 3,
    batch_size: int = 3,
    spread: float = 0.5,
    route: str = "double_backward",
) -> QuadraticProblem:
    """A quadratic whose mean Hessian has the given spectrum while each token's own differs.

    The last batch is shorter than the others unless ``batch_size`` divides ``sequences``.
    """
    size, count = len(spectrum), sequences * slots
    mean, frame = with_spectrum(spectrum, generator)
    noise = torch.randn(count, size, size, generator=generator, dtype=torch.float64) * spread
    noise = (noise + noise.transpose(1, 2)) / 2
    curvatures = mean + noise - noise.mean(0)
    slopes = torch.randn(count, size, generator=generator, dtype=torch.float64)
    offsets = torch.randn(count, generator=generator, dtype=torch.float64)
    module = Quadratic(curvatures, slopes, offsets)
    objective = Objective(module, quadratic_loss, batch_size=batch_size, route=route)
    return QuadraticProblem(module, numbered_tokens(sequences, slots), objective, mean, frame)


def walk(space: ParameterSpace, count: int, generator: torch.Generator, *, spacing: int = 10) -> Checkpoints:
    """Checkpoints of a float64 random walk: no property of training is assumed."""
    steps = torch.randn(count, space.size, generator=generator, dtype=torch.float64) * 0.3
    return open_checkpoints(steps.cumsum(0), space, steps=[spacing * i for i in range(count)])


# -- the planted two-skill model ----------------------------------------------------------------


class TwoSkills(nn.Module):
    """Skill ``first`` lives on one direction of weight space, ``second`` on another, nothing elsewhere.

    With z = Q'theta, a token of skill j and strength s has loss log(1 + exp(-s z_j)).
    """

    def __init__(self, frame: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(frame.shape[0], dtype=frame.dtype))
        self.register_buffer("frame", frame)


def two_skill_loss(module: TwoSkills, inputs: Tensor) -> Tensor:
    """Token losses (B, P); inputs (B, P, 2) hold the skill number (0 or 1) and the strength."""
    scores = (module.frame.T @ module.theta)[inputs[..., 0].long()] * inputs[..., 1]
    return nn.functional.softplus(-scores)


@dataclass(frozen=True)
class TwoSkillProblem:
    """The planted model, its training and the planted answer.

    Attributes:
        module: holds the final weights.
        tokens: skills ``first`` and ``second`` label them.
        objective: the derivative interface.
        checkpoints: ``first`` is learnt early, ``second`` late, other directions only drift.
        rows: (N, N) planted directions; row 0 is ``first``, row 1 is ``second``.
    """

    module: TwoSkills
    tokens: TokenSet
    objective: Objective
    checkpoints: Checkpoints
    rows: Tensor


def two_skill_problem(
    generator: torch.Generator, *, size: int = 12, sequences: int = 25, dtype: torch.dtype = torch.float64
) -> TwoSkillProblem:
    """Both skills planted in ``size`` dimensions; 8 slots a sequence, skills dealt at random."""
    frame = orthogonal(size, generator).to(dtype)
    module = TwoSkills(frame)
    skill = torch.randint(0, 2, (sequences, 8), generator=generator)
    strength = 1 + 0.2 * torch.rand(sequences, 8, generator=generator, dtype=dtype)
    tokens = TokenSet(
        torch.stack([skill.to(dtype), strength], dim=-1),
        torch.ones(sequences, 8, dtype=torch.bool),
        torch.arange(sequences),
        {"first": (skill == 0).flatten(), "second": (skill == 1).flatten()},
    )
    time = torch.arange(41, dtype=dtype)
    z = torch.randn(41, size, generator=generator, dtype=dtype).mul(0.05).cumsum(0)
    z[:, 0] = 4 * torch.sigmoid((time - 10) / 2)
    z[:, 1] = 4 * torch.sigmoid((time - 30) / 2)
    space = ParameterSpace.from_module(module)
    thetas = z @ frame.T
    with torch.no_grad():
        module.theta.copy_(thetas[-1])
    checkpoints = open_checkpoints(thetas, space, steps=[10 * i for i in range(41)])
    objective = Objective(module, two_skill_loss, space, batch_size=10, route="double_backward")
    return TwoSkillProblem(module, tokens, objective, checkpoints, frame.T.contiguous())


# -- dense references -----------------------------------------------------------------------------


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Every trainable parameter once, in the module's own order."""
    return [p for p in module.parameters() if p.requires_grad]


def copied_with(module: nn.Module, flat: Tensor) -> nn.Module:
    """A deep copy whose parameters, in the module's own order, were overwritten in place."""
    twin, start = copy.deepcopy(module), 0
    with torch.no_grad():
        for parameter in own_parameters(twin):
            parameter.copy_(flat[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
    assert start == flat.numel()
    return twin


def dense_hessian(module: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """Hessian of a scalar loss in the module's own parameters, at its own weights, entry by entry."""
    parameters = own_parameters(module)
    first = torch.autograd.grad(loss(module), parameters, create_graph=True)
    rows = []
    for entry in torch.cat([g.reshape(-1) for g in first]):
        second = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in second]))
    return torch.stack(rows)


def hessian_product(module: nn.Module, loss: Callable[[nn.Module], Tensor], vector: Tensor) -> Tensor:
    """H v by reverse mode over reverse mode on the module's own parameters."""
    parameters = own_parameters(module)
    first = torch.autograd.grad(loss(module), parameters, create_graph=True)
    along = torch.cat([g.reshape(-1) for g in first]) @ vector
    second = torch.autograd.grad(along, parameters, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in second])


# -- tiny language models --------------------------------------------------------------------------


def tiny_gpt2(*, seed: int = 0, tied: bool = True, layers: int = 1) -> nn.Module:
    """A GPT-2 of a few thousand parameters, from a config: nothing is downloaded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=13,
        n_positions=8,
        n_embd=8,
        n_layer=layers,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=tied,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model.eval()


def tiny_bridge(*, seed: int = 0) -> nn.Module:
    """A native TransformerLens bridge of a few thousand parameters."""
    from polca_edit.models import TransformerShape, build_native_bridge

    return build_native_bridge(TransformerShape(1, 8, 2, 16, 13, 8), seed)


def text_tokens(
    generator: torch.Generator, *, sequences: int = 5, length: int = 6, vocabulary: int = 13
) -> TokenSet:
    """Random token ids; every next-token slot but one is scored."""
    inputs = torch.randint(0, vocabulary, (sequences, length), generator=generator)
    scored = torch.ones(sequences, length - 1, dtype=torch.bool)
    scored[1, 2] = False
    return TokenSet(inputs, scored, torch.arange(sequences), outputs=inputs[:, 1:].clone())


def mean_loss(
    token_loss: Callable[[nn.Module, Tensor], Tensor], tokens: TokenSet
) -> Callable[[nn.Module], Tensor]:
    """The mean over scored tokens in one batch, as a function of the module."""
    return lambda module: token_loss(module, tokens.inputs)[tokens.scored].mean()


# -- rotations -------------------------------------------------------------------------------------


def rotated_allocation(matrices: Tensor, rotation: Tensor) -> Tensor:
    """(M, K) r_j' S_x r_j: nats given to each rotated vector."""
    return torch.einsum("ij,mik,kj->mj", rotation, matrices, rotation)


def orthomax_criterion(table: Tensor, kind: str) -> float:
    """sum of fourth powers, less the columns' squared sums of squares over M for varimax."""
    squares = table.double().square()
    total = squares.square().sum()
    if kind == "varimax":
        total = total - squares.sum(0).square().sum() / len(table)
    return float(total)


# -- a small smooth network --------------------------------------------------------------------------


class Curved(nn.Module):
    """Two layers in float32; ten sequences of three inputs with their targets make its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def curved_series(seed: int = 3) -> tuple[Objective, Checkpoints, TokenSet]:
    """A squared loss, eight places on a walk and ten sequences."""
    torch.manual_seed(seed)
    module, draw = Curved(), torch.Generator().manual_seed(seed)
    inputs = torch.randn(10, 3, 14, generator=draw)
    tokens = TokenSet(inputs, torch.ones(10, 3, dtype=torch.bool), torch.arange(10))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x[..., :8]) - x[..., 8:]).square().mean(-1)

    objective = Objective(module, loss, batch_size=4, route="jvp")
    start = objective.space.read(module)
    steps = 0.05 * torch.randn(8, len(start), generator=draw)
    return objective, open_checkpoints(start + steps.cumsum(0), objective.space, steps=range(8)), tokens
