"""Cases on token sequences: two chains learned one after the other, and induction by attention alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from experiments.natural.case import Natural
from experiments.tasks.task import DATA_ORDER, BatchLoss, Task, training_generator
from polca_edit.models import TransformerShape, build_small_transformer
from polca_edit.parameters import ParameterSpace
from polca_edit.seeds import generator_for
from polca_edit.tokens import Splits, TokenSet, next_token_loss
from polca_edit.training import TrainingSettings

#: (count, generator, step) -> sequences; step 0 draws those of the splits.
Draw = Callable[[int, torch.Generator, int], Int[Tensor, "B L"]]


@dataclass(frozen=True)
class Sequences:
    """Sequences drawn anew for every step and split.

    Attributes:
        draw: see :data:`Draw`.
        label: sequences -> their token set.
        batch: sequences a step.
        sizes: of the curvature, select and evaluate splits.
        seed: of the run.
    """

    draw: Draw
    label: Callable[[Int[Tensor, "S L"]], TokenSet]
    batch: int
    sizes: tuple[int, int, int]
    seed: int

    def batch_loss(self, module: nn.Module, step: int, branch: int = 0) -> Tensor:
        """Mean next-token loss of one step's batch, nats."""
        ids = self.draw(self.batch, training_generator(self.seed, step, branch), step)
        return next_token_loss(module, ids).mean()

    def task(self, name: str, module: nn.Module, parents: tuple[str, ...]) -> Task:
        """The task of one run."""
        parts = ("curvature", "select", "evaluate")
        sets = [
            self.label(self.draw(n, generator_for(self.seed, "split", p), 0))
            for n, p in zip(self.sizes, parts, strict=True)
        ]

        def training(branch: int) -> BatchLoss:
            return lambda trained, step: self.batch_loss(trained, step, branch)

        return Task(
            name,
            module,
            ParameterSpace.from_module(module),
            next_token_loss,
            Splits(*sets),
            training,
            {"seed": self.seed, "rule": DATA_ORDER, "batch_size": self.batch},
            parents=parents,
        )


# -- two chains -------------------------------------------------------------------------------------

SYMBOLS, LENGTH, SURE = 24, 10, 0.9
CHAIN_SHAPE = TransformerShape(1, 64, 4, 256, SYMBOLS + 2, LENGTH)
CHAIN_BEGIN, CHAIN_LAST = 80, 240


def chains(
    count: int, maps: Int[Tensor, "2 V"], languages: Int[Tensor, " S"], generator: torch.Generator
) -> Int[Tensor, "S L"]:
    """Sequences that begin with their language's mark and follow its map nine times in ten."""
    token = torch.randint(0, SYMBOLS, (count,), generator=generator)
    found = [SYMBOLS + languages, token]
    while len(found) < LENGTH:
        other = torch.randint(0, SYMBOLS, (count,), generator=generator)
        follow = torch.rand(count, generator=generator) < SURE
        token = torch.where(follow, maps[languages, token], other)
        found.append(token)
    return torch.stack(found, dim=1)


def chain_tokens(ids: Int[Tensor, "S L"]) -> TokenSet:
    """Sequences with every prediction but that of the first symbol scored, labelled by language."""
    scored = torch.ones(len(ids), LENGTH - 1, dtype=torch.bool)
    scored[:, 0] = False
    tokens = TokenSet.from_ids(ids, scored=scored)
    language = ids[:, 0][tokens.sequence_of] - SYMBOLS
    features = {**tokens.features, "language": language.numpy()}
    return replace(tokens, features=features, skills={"A": language == 0, "B": language == 1})


def a_then_b(seed: int, twin: bool) -> Natural:
    """Chain A alone, then A and B alike; in the twin A goes on alone."""
    g = generator_for(seed, "chains")
    maps = torch.stack([torch.randperm(SYMBOLS, generator=g) for _ in range(2)])

    def draw(count: int, generator: torch.Generator, step: int) -> Tensor:
        languages = torch.randint(0, 2, (count,), generator=generator)
        if 0 < step <= CHAIN_BEGIN or (twin and step > 0):
            languages = torch.zeros_like(languages)
        return chains(count, maps, languages, generator)

    data = Sequences(draw, chain_tokens, 64, (40, 60, 80), seed)
    task = data.task("a_then_b", build_small_transformer(CHAIN_SHAPE, seed), ("A", "B"))
    settings = TrainingSettings(CHAIN_LAST, 3e-3, 0.0, (0.9, 0.95), warmup=20)
    stretches = (0, 20, 40, 60, CHAIN_BEGIN, 130, 180, CHAIN_LAST)
    return Natural(
        task, settings, stretches, (CHAIN_BEGIN, CHAIN_LAST), every=10, earlier=((0, CHAIN_BEGIN), "A")
    )


# -- induction --------------------------------------------------------------------------------------

VOCABULARY, SPAN, PERIODS = 24, 24, (6, 12)
#: At width 64 random edits of the window's norm cost more than undoing the window, so that N cannot be asked;
#: at 128 they cost a third of it. The loss has fallen by step 500; what comes later only adds norm.
INDUCTION_SHAPE = TransformerShape(2, 128, 4, 0, VOCABULARY, SPAN)
INDUCTION_BEGIN, INDUCTION_LAST = 100, 600


def repeated(count: int, generator: torch.Generator, *, repeats: bool) -> Int[Tensor, "S L"]:
    """Segments of 6 to 11 different tokens over and over; or a new segment every time.

    Tokens are drawn by a Zipf law, so that what does not repeat can be learned a little too.
    """
    weights = (1.0 / torch.arange(1, VOCABULARY + 1)).log()
    periods = torch.randint(*PERIODS, (count,), generator=generator)
    pieces = -(-SPAN // PERIODS[0])
    noise = torch.rand(count, 1 if repeats else pieces, VOCABULARY, generator=generator)
    # Gumbel top-k: a draw without replacement for every segment at once.
    drawn = (weights - (-noise.clamp(1e-9, 1 - 1e-7).log()).log()).topk(PERIODS[1] - 1, dim=2).indices
    place = torch.arange(SPAN)
    segment = (place // periods[:, None]) * (not repeats)
    inside = place % periods[:, None]
    return drawn[torch.arange(count)[:, None], segment, inside]


def induction_tokens(ids: Int[Tensor, "S L"]) -> TokenSet:
    """``first``: within the first segment; ``repeated``: this token and its follower came before."""
    tokens = TokenSet.from_ids(ids)
    row, slot = tokens.sequence_of, tokens.position_of
    same = torch.stack(
        [
            (ids[:, p:] == ids[:, :-p]).all(1) if p < SPAN else torch.zeros(len(ids), dtype=torch.bool)
            for p in range(*PERIODS)
        ],
        dim=1,
    )
    # Where nothing repeats, every period is wrong; the middle one keeps the two labels alike in place.
    period = torch.where(same.any(1), PERIODS[0] + same.long().argmax(1), sum(PERIODS) // 2)
    again = slot >= period[row]
    features = {**tokens.features, "repeats": again.long().numpy()}
    return replace(tokens, features=features, skills={"first": slot + 1 < period[row], "repeated": again})


def induction(seed: int, twin: bool) -> Natural:
    """Repeats are shown from step 100 on; in the twin never."""

    def draw(count: int, generator: torch.Generator, step: int) -> Tensor:
        return repeated(count, generator, repeats=step == 0 or (step > INDUCTION_BEGIN and not twin))

    data = Sequences(draw, induction_tokens, 48, (40, 40, 60), seed)
    task = data.task("induction", build_small_transformer(INDUCTION_SHAPE, seed), ("first", "repeated"))
    settings = TrainingSettings(INDUCTION_LAST, 3e-3, 0.0, (0.9, 0.95), warmup=50)
    stretches = (0, 20, 40, 70, INDUCTION_BEGIN, 200, 300, 400, INDUCTION_LAST)
    return Natural(task, settings, stretches, (INDUCTION_BEGIN, INDUCTION_LAST), every=100)
