"""The models, tokens and checkpoints that are timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.tasks import arithmetic
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.models import TransformerShape, build_small_transformer
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenLossFunction, TokenSet, next_token_loss


@dataclass(frozen=True)
class Problem:
    """A model with its loss, tokens and checkpoints."""

    module: nn.Module
    space: ParameterSpace
    token_loss: TokenLossFunction
    tokens: TokenSet
    curvature: TokenSet
    checkpoints: Checkpoints

    def objective(self, route: str = "auto", batch_size: int = 256) -> Objective:
        """A fresh objective: nothing traced, nothing checked yet."""
        return Objective(self.module, self.token_loss, self.space, batch_size=batch_size, route=route)  # type: ignore[arg-type]

    def rows(self, count: int) -> Tensor:
        """Random orthonormal directions."""
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randn(self.space.size, count, generator=generator)
        rows: Tensor = torch.linalg.qr(drawn)[0].T.contiguous()
        return rows


def trained_arithmetic(
    shape: TransformerShape, *, checkpoints: int, spacing: int, sums: int, curvature: int, seed: int = 0
) -> Problem:
    """The arithmetic task, trained for real for ``checkpoints * spacing`` steps (AdamW, lr 2e-4)."""
    module = build_small_transformer(shape, seed)
    space = ParameterSpace.from_module(module)
    data = arithmetic.make_data(sums, curvature, 8, 64, seed)
    optimiser = torch.optim.AdamW(module.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.1)
    steps, thetas = [], []
    for step in range(checkpoints * spacing):
        data.batch_loss(module, step).backward()
        optimiser.step()
        optimiser.zero_grad()
        if (step + 1) % spacing == 0:
            steps.append(step + 1)
            thetas.append(space.read(module))
    series = open_checkpoints(thetas, space, steps=steps)
    return Problem(module, space, arithmetic.token_loss, data.splits.select, data.splits.curvature, series)


def text_problem(shape: TransformerShape, sequences: int, length: int, *, seed: int = 0) -> Problem:
    """Random token ids with every next token scored: the cost does not depend on what the text says."""
    module = build_small_transformer(shape, seed)
    space = ParameterSpace.from_module(module)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, shape.d_vocab, (sequences, length + 1), generator=generator)
    tokens = TokenSet(inputs, torch.ones(sequences, length, dtype=torch.bool), torch.arange(sequences))
    series = open_checkpoints([space.read(module)], space, steps=[0])
    return Problem(module, space, next_token_loss, tokens, tokens, series)
