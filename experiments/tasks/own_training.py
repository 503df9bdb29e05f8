"""Training batches of a user's task: drawn from finite or endless data, never a held-out sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from experiments.config import RunConfig
from experiments.tasks.task import BatchLoss, training_generator
from polca_edit.tokens import TokenLossFunction, TokenSet

#: Sequences with their labels, or their input rows alone.
Rows = TokenSet | Tensor
#: (count, generator) -> that many sequences.
Draws = Callable[[int, torch.Generator], Rows]
#: Rounds of drawing after which data are taken to hold nothing else.
ROUNDS = 100
#: Input columns that become features of tokens that have none.
FEATURE_COLUMNS = 32


def rows_of(inputs: Tensor) -> list[bytes]:
    """The bytes of every row, by which sequences are known again.

    >>> rows_of(torch.tensor([[1], [1]]))[0] == rows_of(torch.tensor([[1]]))[0]
    True
    """
    plain = inputs.detach().cpu().contiguous().numpy()
    return [row.tobytes() for row in plain]


def with_features(tokens: TokenSet) -> TokenSet:
    """Tokens with input features: their own, or the first input columns and the slot.

    A cluster is found again on other tokens by a rule on input features.

    >>> scored = torch.ones(2, 1, dtype=torch.bool)
    >>> made = with_features(TokenSet(torch.tensor([[3, 4], [5, 6]]), scored, torch.arange(2)))
    >>> {name: values.tolist() for name, values in made.features.items()}
    {'input 0': [3, 5], 'input 1': [4, 6], 'slot': [0, 0]}
    """
    if tokens.features:
        return tokens
    columns = tokens.inputs.flatten(1)[:, :FEATURE_COLUMNS][tokens.sequence_of].numpy()
    features = {f"input {index}": columns[:, index] for index in range(columns.shape[1])}
    return replace(tokens, features={**features, "slot": tokens.position_of.numpy()})


def inputs_of(drawn: Rows) -> Tensor:
    """The input rows of either form of data."""
    return drawn.inputs if isinstance(drawn, TokenSet) else drawn


@dataclass(frozen=True)
class TrainingDraws:
    """Where training sequences come from.

    Attributes:
        draw: (count, generator) -> sequences, none of them held out.
        token_loss: of the task.
        seed: of the data order.
        batch_size: sequences a batch.
        labelled: whether draws are token sets.
        endless: whether new sequences can always be drawn.
        rows: all inputs of finite data, None for endless ones.
        notes: what was left out, in sentences.
    """

    draw: Draws
    token_loss: TokenLossFunction
    seed: int
    batch_size: int
    labelled: bool
    endless: bool
    rows: Tensor | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        given: Rows | Draws,
        held_out: frozenset[bytes],
        config: RunConfig,
        token_loss: TokenLossFunction,
    ) -> TrainingDraws:
        """From what a definition gives; held-out sequences are taken out.

        Raises:
            ValueError: for data of another form, or of which nothing is left.
        """
        seed, batch = config.seed, config.training.batch_size
        if isinstance(given, (TokenSet, Tensor)):
            kept, notes = _without(given, held_out)
            rows = inputs_of(kept)
            labelled = isinstance(given, TokenSet)
            return cls(partial(_resampled, kept), token_loss, seed, batch, labelled, False, rows, notes)
        if not callable(given):
            raise ValueError(
                f"'training' must be a TokenSet, a tensor of rows or a function (count, generator), got "
                f"{type(given).__name__}"
            )
        first = given(1, torch.Generator().manual_seed(seed))
        if not isinstance(first, (TokenSet, Tensor)):
            raise ValueError(
                f"'training' must draw a TokenSet or a tensor of rows, it drew {type(first).__name__}"
            )
        draw = partial(_drawn, given, held_out)
        return cls(draw, token_loss, seed, batch, isinstance(first, TokenSet), True)

    def batch(self, step: int, branch: int = 0) -> Rows:
        """The batch of one optimiser step, a pure function of (seed, branch, step)."""
        return self.draw(self.batch_size, training_generator(self.seed, step, branch))

    def batch_loss(self, module: nn.Module, step: int, branch: int = 0) -> Tensor:
        """Mean loss of one step's batch over its scored tokens, nats."""
        drawn = self.batch(step, branch)
        device = next(module.parameters()).device
        losses = self.token_loss(module, inputs_of(drawn).to(device))
        return losses[drawn.scored.to(device)].mean() if isinstance(drawn, TokenSet) else losses.mean()

    def loss_of_branch(self, branch: int) -> BatchLoss:
        """Loss of one data order's batches."""
        return partial(self.batch_loss, branch=branch)

    def labelled_draw(self, count: int, generator: torch.Generator) -> TokenSet:
        """Labelled sequences that training may see."""
        drawn = self.draw(count, generator)
        assert isinstance(drawn, TokenSet)
        return with_features(drawn)

    def unseen(
        self, sequences: int, seed: int, used: frozenset[bytes], branches: Mapping[int, range]
    ) -> TokenSet:
        """Different labelled sequences that neither a split holds nor a batch showed.

        Args:
            sequences: how many.
            seed: of the draw.
            used: further rows that are left out.
            branches: data order -> the steps it trains on.

        Raises:
            ValueError: where so many are not found.
        """
        known = set(used)
        for branch, steps in branches.items():
            for step in steps:
                known.update(rows_of(inputs_of(self.batch(step, branch))))
        generator, found = torch.Generator().manual_seed(seed), 0
        for factor in (2, 8, 32):
            drawn = self.labelled_draw(factor * sequences, generator)
            taken: set[bytes] = set()
            new = []
            for index, row in enumerate(rows_of(drawn.inputs)):
                if row not in known and row not in taken:
                    taken.add(row)
                    new.append(index)
            found = len(new)
            if found >= sequences:
                return drawn.select(torch.tensor(new[:sequences]))
        raise ValueError(
            f"{sequences} unseen sequences were asked for, {32 * sequences} draws hold {found} that training "
            "did not show; ask for fewer with --unseen"
        )


def _without(
    data: TokenSet | Tensor, held_out: frozenset[bytes]
) -> tuple[TokenSet | Tensor, tuple[str, ...]]:
    """Finite data without the held-out sequences, and a sentence about them."""
    rows = rows_of(inputs_of(data))
    free = torch.tensor([row not in held_out for row in rows], dtype=torch.bool)
    left = int(free.sum())
    if left == 0:
        raise ValueError(
            f"training must hold sequences that are neither in select nor in evaluate, all {len(rows)} are; "
            "add training data"
        )
    if left == len(rows):
        return data, ()
    note = f"{len(rows) - left} of {len(rows)} training sequences are in select or evaluate and are left out"
    return (data.select(free) if isinstance(data, TokenSet) else data[free]), (note,)


def _resampled(data: Rows, count: int, generator: torch.Generator) -> Rows:
    """Different sequences of finite data, all of them where there are no more."""
    rows = torch.randperm(len(inputs_of(data)), generator=generator)[:count]
    return data.select(rows) if isinstance(data, TokenSet) else data[rows]


def _drawn(
    draw: Draws, held_out: frozenset[bytes], count: int, generator: torch.Generator
) -> TokenSet | Tensor:
    """Sequences of endless data that are not held out; more are drawn until there are enough.

    Raises:
        ValueError: where nothing else comes.
    """
    more = count
    for _ in range(ROUNDS):
        drawn = draw(more, generator)
        free = torch.tensor([row not in held_out for row in rows_of(inputs_of(drawn))], dtype=torch.bool)
        if int(free.sum()) >= count:
            rows = free.nonzero()[:count, 0]
            return drawn.select(rows) if isinstance(drawn, TokenSet) else drawn[rows]
        more *= 2 if more < 64 * count else 1
    raise ValueError(
        f"training must draw {count} sequences that are neither in select nor in evaluate, {ROUNDS} rounds "
        "did not; draw from more data"
    )
