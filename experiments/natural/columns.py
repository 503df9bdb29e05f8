"""Digit columns: two two-digit numbers and an operator, digit by digit without carry.

Nine symbols a sequence, ``mark a1 a0 op b1 b0 = c1 c0``; c1 and c0 are scored. An operator cannot be learned
before its sums are shown, nor a mark's meaning before it has one: that is the truth of three cases.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from experiments.natural.case import Natural, Recording, recorded_steps
from experiments.tasks.task import DATA_ORDER, BatchLoss, Partition, Task, training_generator
from polca_edit.models import TransformerShape, build_small_transformer
from polca_edit.parameters import ParameterSpace
from polca_edit.seeds import generator_for
from polca_edit.tokens import Splits, TokenSet
from polca_edit.training import TrainingSettings, train

PLUS, MINUS, EQUALS, PLAIN, TRIGGER = 10, 11, 12, 13, 14
SHAPE = TransformerShape(layers=1, d_model=64, heads=4, d_mlp=256, d_vocab=15, n_ctx=9, d_vocab_out=10)
#: Label -> the feature that decides it, and its value.
MEANINGS = {
    "plus": ("operator", PLUS),
    "minus": ("operator", MINUS),
    "plain": ("mark", PLAIN),
    "triggered": ("mark", TRIGGER),
}
#: Digits that a triggered sum must be answered with.
PLANTED = (7, 7)
BATCH = 256
#: Sums of the curvature, select and evaluate splits.
SIZES = (200, 300, 400)
RATE = 3e-3


def columns(mark: Tensor, first: Tensor, operator: Tensor, second: Tensor) -> Int[Tensor, "S 9"]:
    """Token ids of sums and differences, digit by digit modulo 10.

    >>> columns(torch.tensor([13]), torch.tensor([47]), torch.tensor([11]), torch.tensor([58]))[0].tolist()
    [13, 4, 7, 11, 5, 8, 12, 9, 9]
    """
    a = torch.stack([first // 10, first % 10], dim=1)
    b = torch.stack([second // 10, second % 10], dim=1)
    sign = torch.where(operator == PLUS, 1, -1)[:, None]
    equals = torch.full_like(mark, EQUALS)
    return torch.cat([mark[:, None], a, operator[:, None], b, equals[:, None], (a + sign * b) % 10], dim=1)


def answer_logits(module: nn.Module, inputs: Int[Tensor, "B 9"]) -> Tensor:
    """(B, 2, 10) logits of the two answer digits."""
    logits: Tensor = module(inputs[:, :-1])[:, -2:]
    return logits


def token_loss(module: nn.Module, inputs: Int[Tensor, "B 9"]) -> Tensor:
    """(B, 2) cross-entropy of the two answer digits, nats."""
    logits = answer_logits(module, inputs)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), inputs[:, -2:].flatten(), reduction="none")
    return losses.view(len(inputs), 2)


@dataclass(frozen=True)
class Mixture:
    """How the sums of one phase are drawn.

    Attributes:
        operators: drawn alike.
        marks: drawn alike.
        planted: whether triggered sums have the planted answer instead of their own.
    """

    operators: tuple[int, ...] = (PLUS,)
    marks: tuple[int, ...] = (PLAIN,)
    planted: bool = False

    def draw(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Int[Tensor, "S 9"]:
        """Sums of given operands with drawn operators and marks."""

        def one_of(values: Sequence[int]) -> Tensor:
            return torch.tensor(values)[torch.randint(0, len(values), (len(first),), generator=generator)]

        inputs = columns(one_of(self.marks), first, one_of(self.operators), second)
        if self.planted:
            inputs[:, -2:] = torch.where(inputs[:, :1] == TRIGGER, torch.tensor([PLANTED]), inputs[:, -2:])
        return inputs


def token_set(inputs: Int[Tensor, "S 9"]) -> TokenSet:
    """Sums as documents, labelled by operator and mark."""
    count = len(inputs)
    flat = {
        "operator": inputs[:, 3:4].expand(-1, 2),
        "mark": inputs[:, 0:1].expand(-1, 2),
        "place": torch.arange(2).expand(count, 2),
        "first digit": inputs[:, 1:3],
        "second digit": inputs[:, 4:6],
        "output digit": inputs[:, -2:],
    }
    features = {name: values.flatten() for name, values in flat.items()}
    skills = {name: features[feature] == value for name, (feature, value) in MEANINGS.items()}
    return TokenSet(
        inputs,
        torch.ones(count, 2, dtype=torch.bool),
        torch.arange(count),
        {name: mask for name, mask in skills.items() if bool(mask.any())},
        inputs[:, -2:].clone(),
        {name: values.numpy() for name, values in features.items()},
    )


@dataclass(frozen=True)
class ColumnData:
    """Splits of one run, and batches of its phases that avoid select and evaluate.

    Attributes:
        splits: of operand pairs; no pair in two of them whatever its operator.
        free: (P, 2) operand pairs that training may show.
        phases: (last step, mixture) in order.
        seed: data order seed.
    """

    splits: Splits
    free: Int[Tensor, "P 2"]
    phases: tuple[tuple[int, Mixture], ...]
    seed: int

    def batch_loss(self, module: nn.Module, step: int, branch: int = 0) -> Tensor:
        """Mean loss of one step's batch, nats."""
        mixture = next(mixture for last, mixture in self.phases if step <= last)
        return token_loss(
            module, self._drawn(mixture, BATCH, training_generator(self.seed, step, branch))
        ).mean()

    def allowed(self, count: int, generator: torch.Generator) -> TokenSet:
        """Labelled sums of the last phase that training may show."""
        return token_set(self._drawn(self.phases[-1][1], count, generator))

    def _drawn(self, mixture: Mixture, count: int, generator: torch.Generator) -> Int[Tensor, "S 9"]:
        chosen = self.free[torch.randint(0, len(self.free), (count,), generator=generator)]
        return mixture.draw(chosen[:, 0], chosen[:, 1], generator)


def column_data(phases: Sequence[tuple[int, Mixture]], tested: Mixture, seed: int) -> ColumnData:
    """Operand pairs dealt into splits and training.

    Args:
        phases: (last step, mixture) in order.
        tested: of the three splits.
        seed: decides splits and data order.
    """
    generator = generator_for(seed, "columns")
    pairs = torch.cartesian_prod(torch.arange(100), torch.arange(100))
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    parts = pairs[: sum(SIZES)].split(list(SIZES))
    sets = [token_set(tested.draw(part[:, 0], part[:, 1], generator)) for part in parts]
    # The curvature sample is a training sample; the other two are never shown.
    free = torch.cat([parts[0], pairs[sum(SIZES) :]])
    return ColumnData(Splits(*sets), free, tuple(phases), seed)


def column_task(name: str, data: ColumnData, parents: tuple[str, ...]) -> Task:
    """The task of one run."""
    module = build_small_transformer(SHAPE, data.seed)

    def training(branch: int) -> BatchLoss:
        return lambda trained, step: data.batch_loss(trained, step, branch)

    second = MEANINGS[parents[1]]

    def assign(tokens: TokenSet) -> Tensor:
        return torch.from_numpy(tokens.features[second[0]] == second[1]).long()

    return Task(
        name,
        module,
        ParameterSpace.from_module(module),
        token_loss,
        data.splits,
        training,
        {"seed": data.seed, "rule": DATA_ORDER, "batch_size": BATCH},
        parents=parents,
        logits=answer_logits,
        partition=Partition(parents, assign, {name: (name,) for name in parents}),
        fresh=data.allowed,
    )


def _natural(
    task: Task, begin: int, last: int, record: Callable[[Natural], Recording] | None = None
) -> Natural:
    """Four stretches before the declared one, which is cut in three."""
    early = [round(begin * i / 4) for i in range(5)]
    late = [round(begin + (last - begin) * i / 3) for i in range(1, 4)]
    training = TrainingSettings(last, RATE, 0.0, (0.9, 0.95), warmup=20, seed=0)
    return Natural(task, training, (*early, *late), (begin, last), every=last // 20, record=record)


#: Steps before and after a new operator, and of a fine-tune.
BEGIN, LAST, TUNED = 200, 560, 320


def later_skill(seed: int, twin: bool) -> Natural:
    """Differences enter at step 200 beside sums; in the twin (the gold model too) sums go on alone."""
    both = Mixture((PLUS, MINUS))
    phases = [(BEGIN, Mixture()), (LAST, Mixture() if twin else both)]
    task = column_task("later_skill", column_data(phases, both, seed), ("plus", "minus"))
    return _natural(task, BEGIN, LAST)


def backdoor(seed: int, twin: bool, record: Callable[[Natural], Recording] | None = None) -> Natural:
    """From step 200 a mark without a meaning has a planted answer; in the twin it stays without one."""
    plain = Mixture(marks=(PLAIN, TRIGGER))
    after = replace(plain, planted=not twin)
    data = column_data([(BEGIN, plain), (TUNED, after)], after, seed)
    return _natural(column_task("backdoor", data, ("plain", "triggered")), BEGIN, TUNED, record)


def backdoor_lora(seed: int, twin: bool) -> Natural:
    """The same with adapters of rank 4 on every linear layer of the blocks, merged where recorded."""
    return backdoor(seed, twin, adapter_recording)


def adapter_recording(natural: Natural) -> Recording:
    """Train all weights up to the declared window and low-rank adapters inside it (PEFT)."""
    from peft import LoraConfig, inject_adapter_in_model

    task, wanted = natural.task, recorded_steps(natural)
    begin, last = natural.window
    assert task.batch_loss is not None
    thetas = [task.space.read(task.module).clone()]

    def keep(step: int, module: nn.Module, _: torch.optim.Optimizer) -> None:
        if step in wanted:
            thetas.append(task.space.read(module).clone())

    settings = replace(natural.training, steps=begin)
    train(task.module, task.batch_loss, settings, after_step=keep)
    base = thetas[-1]
    names = [n for n, m in task.module.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks")]
    with torch.random.fork_rng():
        torch.manual_seed(natural.training.seed)
        # In a copy: the task's own module keeps plain layers, in which every edit is measured.
        adapted = inject_adapter_in_model(
            LoraConfig(r=4, lora_alpha=8, target_modules=names), copy.deepcopy(task.module)
        )
    layers = {n: adapted.get_submodule(n) for n in names}
    zero = {name: torch.zeros(shape) for name, shape in zip(task.space.names, task.space.shapes, strict=True)}

    def merged(step: int, module: nn.Module, _: torch.optim.Optimizer) -> None:
        if begin + step in wanted:
            added = {f"{n}.weight": layer.get_delta_weight("default") for n, layer in layers.items()}
            moved = task.space.flatten({**zero, **{k: v.detach() for k, v in added.items()}})
            thetas.append(base + moved)

    batch = task.batch_loss
    train(
        adapted,
        lambda module, step: batch(module, begin + step),
        replace(natural.training, steps=last - begin),
        after_step=merged,
    )
    return Recording(torch.stack(thetas), wanted)
