"""The arithmetic task: ``aaa+bbb=ssss``, four output digits scored, digit and carry labels.

Twelve symbols (0-9, + and =), twelve tokens a sum. The token loss has four slots: the 1000s,
100s, 10s and 1s digit of the sum (arXiv 2506.15872, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from experiments.config import RunConfig
from experiments.tasks.task import DATA_ORDER, BatchLoss, Partition, Task, training_generator
from interventions.causal.control import Planted
from polca_edit.models import TransformerShape, build_native_bridge, build_small_transformer
from polca_edit.parameters import ParameterSpace
from polca_edit.tokens import Splits, TokenSet

PLACES = ("1000s", "100s", "10s", "1s")
SKILLS = (*PLACES, "carry", "carry@100s", "carry@10s")
#: Output digit, split by whether a carry comes in; the 1s place never has one.
GROUPS = tuple(f"{place}{suffix}" for place in PLACES for suffix in ("", "+carry"))[:7]
SKILL_GROUPS = {
    "1000s": ("1000s", "1000s+carry"),
    "100s": ("100s", "100s+carry"),
    "10s": ("10s", "10s+carry"),
    "1s": ("1s",),
    "carry@100s": ("100s+carry",),
    "carry@10s": ("10s+carry",),
}
PLUS, EQUALS = 10, 11
LENGTH = 12
PAPER_SHAPE = TransformerShape(
    layers=3, d_model=512, heads=4, d_mlp=2048, d_vocab=12, n_ctx=12, d_vocab_out=10
)
PAPER_PARAMETERS = 9_475_594


def encode(first: Int[Tensor, " S"], second: Int[Tensor, " S"]) -> Int[Tensor, "S 12"]:
    """Token ids of ``aaa+bbb=ssss``.

    >>> encode(torch.tensor([57]), torch.tensor([968]))[0].tolist()
    [0, 5, 7, 10, 9, 6, 8, 11, 1, 0, 2, 5]
    """

    def digits(value: Tensor, count: int) -> Tensor:
        return torch.stack([value // 10**place % 10 for place in reversed(range(count))], dim=1)

    plus = torch.full((len(first), 1), PLUS)
    equals = torch.full((len(first), 1), EQUALS)
    return torch.cat([digits(first, 3), plus, digits(second, 3), equals, digits(first + second, 4)], dim=1)


def output_logits(module: nn.Module, inputs: Int[Tensor, "B 12"]) -> Float[Tensor, "B 4 V"]:
    """Logits of the four output digits of a sum."""
    logits: Tensor = module(inputs[:, :-1])[:, -4:]
    return logits


def token_loss(module: nn.Module, inputs: Int[Tensor, "B 12"]) -> Float[Tensor, "B 4"]:
    """Cross-entropy of the four output digits, in nats."""
    logits = output_logits(module, inputs)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), inputs[:, -4:].flatten(), reduction="none")
    return losses.view(len(inputs), 4)


def carries(first: Int[Tensor, " S"], second: Int[Tensor, " S"]) -> Tensor:
    """(S, 4) whether the lower places overflow into each output digit (never into the 1s).

    >>> carries(torch.tensor([57]), torch.tensor([968])).tolist()
    [[True, True, True, False]]
    """
    columns = [(first % 10**place + second % 10**place) >= 10**place for place in (3, 2, 1)]
    return torch.stack([*columns, torch.zeros_like(columns[0])], dim=1)


def token_set(first: Int[Tensor, " S"], second: Int[Tensor, " S"]) -> TokenSet:
    """Sums as a token set with skills, features and contexts; each sum is a document."""
    inputs = encode(first, second)
    carry = carries(first, second)
    count = len(first)
    place = torch.arange(4).repeat(count)
    flat_carry = carry.flatten()
    skills = {name: place == index for index, name in enumerate(PLACES)}
    skills["carry"] = flat_carry
    skills["carry@100s"] = flat_carry & skills["100s"]
    skills["carry@10s"] = flat_carry & skills["10s"]
    zero = torch.zeros((count, 1), dtype=torch.long)
    top, bottom = torch.cat([zero, inputs[:, 0:3]], 1), torch.cat([zero, inputs[:, 4:7]], 1)
    features = {
        "place": place,
        "carry in": flat_carry.long(),
        "first digit": top.flatten(),
        "second digit": bottom.flatten(),
        "digit sum": (top + bottom).flatten(),
        "output digit": inputs[:, -4:].flatten(),
    }
    contexts: list[str] = []
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        text = f"{a:03d}+{b:03d}={a + b:04d}"
        contexts.extend(f"{text[: 8 + i]}[{text[8 + i]}]{text[9 + i :]}" for i in range(4))
    return TokenSet(
        inputs,
        torch.ones(count, 4, dtype=torch.bool),
        torch.arange(count),
        skills,
        inputs[:, -4:].clone(),
        {name: values.numpy().astype(np.int64) for name, values in features.items()},
        tuple(contexts),
    )


def plant_rule(tokens: TokenSet) -> Planted:
    """The last digit of sums whose first summand ends in 5 to 9 is one too high.

    Args:
        tokens: sums.
    """
    chosen = tokens.inputs[:, 2] >= 5
    target = torch.where(chosen, (tokens.inputs[:, -1] + 1) % 10, tokens.inputs[:, -1])
    inputs = torch.cat([tokens.inputs[:, :-1], target[:, None]], 1)
    member = torch.zeros_like(tokens.scored)
    member[:, -1] = chosen
    changed = replace(tokens, inputs=inputs, outputs=inputs[:, -4:].clone())
    return Planted(changed, member[tokens.scored])


def assign_groups(tokens: TokenSet) -> Int[Tensor, " M"]:
    """Index into :data:`GROUPS` from place and carry, which are functions of the two summands."""
    place = torch.from_numpy(tokens.features["place"])
    carry = torch.from_numpy(tokens.features["carry in"])
    return 2 * place + carry


@dataclass(frozen=True)
class ArithmeticData:
    """Splits of one run, and training batches that avoid them.

    Attributes:
        splits: curvature, select, evaluate; pairwise disjoint as unordered pairs.
        held_out: (1000, 1000) true where a sum, or its commuted form, is in select or evaluate.
        seed: data order seed.
        batch_size: sums a batch.
    """

    splits: Splits
    held_out: Tensor
    seed: int
    batch_size: int

    def batch(self, step: int, branch: int = 0) -> Int[Tensor, "B 12"]:
        """The batch of one optimiser step, a pure function of (seed, branch, step)."""
        return encode(*self._allowed(self.batch_size, training_generator(self.seed, step, branch)))

    def allowed(self, count: int, generator: torch.Generator) -> TokenSet:
        """Random sums that training may see: in neither order in select or evaluate."""
        return token_set(*self._allowed(count, generator))

    def _allowed(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = torch.zeros(0, 2, dtype=torch.long)
        while len(drawn) < count:  # one round is enough but for a few tiny batches
            first = torch.randint(0, 1000, (2 * count,), generator=generator)
            second = torch.randint(0, 1000, (2 * count,), generator=generator)
            free = ~self.held_out[first, second]
            drawn = torch.cat([drawn, torch.stack([first[free], second[free]], dim=1)])
        return drawn[:count, 0], drawn[:count, 1]

    def unseen(
        self, sums: int, steps: int, seed: int, branches: Mapping[int, range] | None = None
    ) -> TokenSet:
        """Sums that no split holds and no training batch showed, in either order.

        Args:
            sums: how many.
            steps: training steps of the recorded run, counted from 1.
            seed: of the draw.
            branches: branch number -> the steps it trains on.

        Raises:
            ValueError: if fewer than that are left.
        """
        seen = self.held_out.clone()
        known = [first_and_second(self.splits.curvature)]
        for branch, trained in {0: range(1, steps + 1), **(branches or {})}.items():
            known += [first_and_second_of(self.batch(step, branch)) for step in trained]
        for first, second in known:
            seen[first, second] = True
            seen[second, first] = True
        pairs = torch.combinations(torch.arange(1000), with_replacement=True)
        pairs = pairs[~seen[pairs[:, 0], pairs[:, 1]]]
        if len(pairs) < sums:
            raise ValueError(
                f"training and the splits leave {len(pairs)} unseen sums, got {sums} to draw; ask for fewer"
            )
        drawn = _draw(pairs, sums, torch.Generator().manual_seed(seed))
        return token_set(drawn[:, 0], drawn[:, 1])

    def batch_loss(self, module: nn.Module, step: int, branch: int = 0) -> Tensor:
        """Mean loss of one step's batch, all output digits weighted alike."""
        device = next(module.parameters()).device
        return token_loss(module, self.batch(step, branch).to(device)).mean()


def make_data(
    sums: int, curvature_sums: int, evaluate_sums: int, batch_size: int, seed: int
) -> ArithmeticData:
    """Draw disjoint splits of sums; disjoint also under a+b = b+a.

    Args:
        sums: in the select split.
        curvature_sums: in the curvature split (training may see these; it is a training sample).
        evaluate_sums: in the evaluate split.
        batch_size: training batch.
        seed: decides splits and data order.

    Raises:
        ValueError: if more than a fifth of all sums would be held out.
    """
    wanted = sums + curvature_sums + evaluate_sums
    if wanted > 100_000:
        raise ValueError(f"splits must hold at most 100000 sums in all, got {wanted}; ask for fewer")
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.combinations(torch.arange(1000), with_replacement=True)
    parts = _draw(pairs, wanted, generator).split([curvature_sums, sums, evaluate_sums])
    held_out = torch.zeros(1000, 1000, dtype=torch.bool)
    for part in parts[1:]:
        held_out[part[:, 0], part[:, 1]] = True
        held_out[part[:, 1], part[:, 0]] = True
    sets = [token_set(part[:, 0], part[:, 1]) for part in parts]
    return ArithmeticData(Splits(*sets), held_out, seed, batch_size)


def _draw(pairs: Int[Tensor, "P 2"], count: int, generator: torch.Generator) -> Int[Tensor, "S 2"]:
    """Some of the pairs, either order of the operands, so that first and second are alike in distribution."""
    pairs = pairs[torch.randperm(len(pairs), generator=generator)[:count]]
    swap = torch.rand(count, generator=generator) < 0.5
    return torch.where(swap[:, None], pairs.flip(1), pairs)


def first_and_second(tokens: TokenSet) -> tuple[Tensor, Tensor]:
    """The two summands of every sequence."""
    return first_and_second_of(tokens.inputs)


def first_and_second_of(inputs: Int[Tensor, "S 12"]) -> tuple[Tensor, Tensor]:
    """The two summands of encoded sums."""
    scale = torch.tensor([100, 10, 1])
    return (inputs[:, 0:3] * scale).sum(1), (inputs[:, 4:7] * scale).sum(1)


# -- the task ---------------------------------------------------------------------------------------


def arithmetic_shape(config: RunConfig) -> TransformerShape:
    """The small transformer an arithmetic config asks for (12 symbols in, 10 digits out)."""
    m = config.model
    outputs = 10 if m.kind == "plain" else None
    return TransformerShape(m.layers, m.d_model, m.heads, m.d_mlp, 12, LENGTH, outputs, m.init_std)


def data_of(config: RunConfig) -> ArithmeticData:
    """Splits and training batches of a config."""
    sizes = config.arithmetic
    return make_data(
        sizes.select_sums, sizes.curvature_sums, sizes.evaluate_sums, config.training.batch_size, config.seed
    )


def build(config: RunConfig, tokenizer: object = None) -> Task:
    """Model and data of an arithmetic run; it needs no tokenizer.

    Raises:
        ValueError: for a model of another kind, or splits that are too large.
    """
    if config.model.kind == "huggingface":
        raise ValueError("task 'arithmetic' builds its own model, got kind 'huggingface'; use kind plain")
    data = data_of(config)
    make = build_small_transformer if config.model.kind == "plain" else build_native_bridge
    module = make(arithmetic_shape(config), config.seed)
    opened = config.checkpoints is not None

    def unseen(sequences: int, seed: int, branches: Mapping[int, range] | None = None) -> TokenSet:
        return data.unseen(sequences, config.training.steps, seed, branches)

    def training(branch: int) -> BatchLoss:
        return partial(data.batch_loss, branch=branch)

    return Task(
        "arithmetic",
        module,
        ParameterSpace.from_module(module),
        token_loss,
        data.splits,
        training,
        {"seed": config.seed, "rule": DATA_ORDER, "batch_size": data.batch_size},
        unseen=None if opened else unseen,
        parents=PLACES,
        plant=plant_rule,
        logits=output_logits,
        partition=Partition(GROUPS, assign_groups, SKILL_GROUPS),
        fresh=data.allowed,
    )
