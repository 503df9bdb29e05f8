"""How the slopes of a checkpoint are cut into tasks, and put together again.

A task is (checkpoint, vector block, parameter block, token shard). A slope is a sum over parameters, so the
slopes of the parameter blocks are added, always in the order of the blocks: whoever computes them, the sum
has the same bytes. Whoever computes one needs the rows of its block of parameters alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.config import RunConfig
from polca_edit.allocation.allocate import CheckpointSlopes, slopes_from
from polca_edit.allocation.directions import directions_at, displacement
from polca_edit.basis.record import Basis
from polca_edit.basis.subsets import Subset, blocks_of
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.derivatives.objective import Objective
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import TokenSet

#: Per basis (2, K): coordinates of the displacement that leads to a checkpoint, and of the one away from it.
Along = tuple[Float[Tensor, "2 _"], ...]


@dataclass(frozen=True)
class Task:
    """One piece of a checkpoint's work, in numbers that travel.

    Attributes:
        vectors: which directions.
        sequences: which sequences.
        block: number of the block of parameters.
    """

    vectors: tuple[int, int]
    sequences: tuple[int, int]
    block: int = 0


@dataclass(frozen=True)
class Blocks:
    """How a checkpoint's work is cut.

    Attributes:
        vectors: directions per task, or None for all.
        sequences: sequences per task, or None for all; a multiple of the batch size keeps batches whole.
        parameters: weights per task, or None for all; cuts lie between tensors.
    """

    vectors: int | None = None
    sequences: int | None = None
    parameters: int | None = None

    def of(self, space: ParameterSpace) -> list[Subset | None]:
        """The blocks of parameters; one None where there is only one."""
        return blocks_of(space, self.parameters)

    def tasks(self, rows: int, sequences: int, blocks: int = 1) -> list[Task]:
        """Every task: token shards outermost, then vectors, then blocks of parameters.

        >>> [(task.vectors, task.block) for task in Blocks(2).tasks(3, 4, 2)]
        [((0, 2), 0), ((0, 2), 1), ((2, 3), 0), ((2, 3), 1)]

        Raises:
            ValueError: for a size below one.
        """
        if any(size is not None and size < 1 for size in (self.vectors, self.sequences)):
            raise ValueError(f"block sizes must be at least 1, got {self.vectors} and {self.sequences}")
        return [
            Task(v, s, b)
            for s in _cut(sequences, self.sequences)
            for v in _cut(rows, self.vectors)
            for b in range(blocks)
        ]


def _cut(total: int, size: int | None) -> list[tuple[int, int]]:
    size = size or total
    return [(first, min(first + size, total)) for first in range(0, total, size)]


@dataclass(frozen=True)
class Piece:
    """Result of one task: losses (m,), slopes (k, m) of its block of parameters and the passes it took."""

    losses: Tensor
    slopes: Tensor
    passes: dict[str, float]


def products_of(config: RunConfig) -> torch.dtype | None:
    """Type of the matrix products of slopes; None: the weights'."""
    return torch.bfloat16 if config.slope_products == "bfloat16" else None


@dataclass(frozen=True)
class Measured:
    """What slopes are taken of: the same wherever a task runs.

    Attributes:
        objective: the token loss.
        checkpoints: the places.
        bases: whose directions; on a worker the rows of one block of parameters.
        tokens: where.
        products: type of the matrix products with directions; None: the weights'.
    """

    objective: Objective
    checkpoints: Checkpoints
    bases: Sequence[Basis]
    tokens: TokenSet
    products: torch.dtype | None = None

    @property
    def rows(self) -> int:
        """R, directions at a checkpoint."""
        return sum(len(basis) + 2 for basis in self.bases)

    def along(self, index: int) -> Along:
        """Coordinates of the two displacements at a checkpoint, zero beyond the ends; reads all rows."""
        moved = [displacement(self.checkpoints, index, side) for side in (0, 1)]
        return tuple(torch.stack([basis.along(each) for each in moved]) for basis in self.bases)


def compute_piece(
    given: Measured, index: int, task: Task, block: Subset | None = None, along: Along | None = None
) -> Piece:
    """Derivatives of one token shard along one block of vectors, cut off by one block of parameters.

    Args:
        given: what slopes are taken of.
        index: of the checkpoint.
        task: which piece.
        block: its parameters; None for all.
        along: coordinates of the displacements, which no block of rows can give; needed with a block.
    """
    objective, tokens = given.objective, given.tokens
    theta, rows = directions_at(
        given.checkpoints, given.bases, index, range(*task.vectors), block=block, along=along
    )
    shard = tokens
    if task.sequences != (0, tokens.sequences):
        shard = tokens.select(torch.arange(*task.sequences))
    before = objective.passes.as_dict()
    planned = given.rows * len(given.checkpoints)
    losses, slopes = objective.directional(theta, rows, shard, expected=planned, products=given.products)
    passes = {kind: value - before[kind] for kind, value in objective.passes.as_dict().items()}
    return Piece(losses, slopes, passes)


def assemble_pieces(
    tasks: Sequence[Task], pieces: Sequence[Piece], bases: Sequence[Basis]
) -> CheckpointSlopes:
    """One checkpoint's record from its tasks, in task order."""
    sums: dict[tuple[int, int], dict[tuple[int, int], Tensor]] = {}
    losses: dict[tuple[int, int], Tensor] = {}
    for task, piece in zip(tasks, pieces, strict=True):
        shard = sums.setdefault(task.sequences, {})
        losses.setdefault(task.sequences, piece.losses)
        held = shard.get(task.vectors)
        shard[task.vectors] = piece.slopes if held is None else held + piece.slopes
    slopes = torch.cat([torch.cat(list(shard.values())) for shard in sums.values()], dim=1)
    return slopes_from(torch.cat(list(losses.values())), slopes, bases)
