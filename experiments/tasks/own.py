"""A task of the user's own, from a function in a Python file: ``polca-edit run --task my_task.py:build``.

The function returns a :class:`TaskDefinition`. Everything that a shipped task has follows from it: splits by
document, training batches that leave the held-out sequences out, branches with data orders of their own.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.config import RunConfig
from experiments.tasks import OwnTask, own_task
from experiments.tasks.own_training import Draws, TrainingDraws, rows_of, with_features
from experiments.tasks.source import own_source
from experiments.tasks.task import DATA_ORDER, Task, Unseen
from interventions.causal.control import Plant
from interventions.damage import named_groups
from interventions.removal.grouped import LogitFunction
from polca_edit.parameters import ParameterSpace
from polca_edit.seeds import generator_for
from polca_edit.tokens import Splits, TokenLossFunction, TokenSet, split_by_document


@dataclass(frozen=True)
class TaskDefinition:
    """What a task file returns. Only the first three are needed.

    Attributes:
        module: any ``nn.Module`` at its initial weights, the same for the same seed.
        token_loss: (module, inputs (B, ...)) -> (B, P) nats, one per slot.
        tokens: what is observed, with documents and labels; dealt out to curvature, select and evaluate by
            document. Or the three splits themselves.
        training: what the model is trained on: labelled sequences, input rows, or a function
            (count, generator) -> either of them, for data without end. None where ``--checkpoints`` opens
            a finished training.
        groups: more labels of ``tokens``, name -> (M,) booleans.
        parents: names of labels of which every token has exactly one.
        logits: (module, inputs) -> (B, P, V), where the loss is their cross-entropy on ``tokens.outputs``;
            removal and Gauss-Newton bases need it.
        plant: changes the targets of some tokens, by a rule or at random, for the positive control.
        shares: of documents that go to curvature, select and evaluate.
    """

    module: nn.Module
    token_loss: TokenLossFunction
    tokens: TokenSet | Splits
    training: TokenSet | Tensor | Draws | None = None
    groups: Mapping[str, Tensor | np.ndarray] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    logits: LogitFunction | None = None
    plant: Plant | None = None
    shares: tuple[float, float, float] = (1.0, 1.0, 1.0)


def build(config: RunConfig, tokenizer: object = None) -> Task:
    """The task that a config's ``FILE.py:FUNCTION`` defines; it needs no tokenizer.

    The function is given ``seed`` and the config's ``options``, whichever of them it has as parameters.

    Raises:
        ValueError: for a file, function or definition that cannot be used.
    """
    own = own_task(config.task)
    assert own is not None
    definition = define(own, config)
    splits, parents = splits_of(definition, config.seed), tuple(definition.parents)
    for name, tokens in vars(splits).items():
        _check_parents(parents, tokens, name)
    _check_loss(own.file, definition, splits.select)
    token_loss, draws = _of_its_precision(definition.token_loss), None
    if definition.training is not None:
        held_out = frozenset({*rows_of(splits.select.inputs), *rows_of(splits.evaluate.inputs)})
        draws = TrainingDraws.of(definition.training, held_out, config, token_loss)
    return Task(
        own.name,
        definition.module,
        ParameterSpace.from_module(definition.module),
        token_loss,
        splits,
        None if draws is None else draws.loss_of_branch,
        {"seed": config.seed, "rule": DATA_ORDER, "batch_size": config.training.batch_size},
        unseen=_unseen(draws, splits, config),
        parents=parents,
        plant=definition.plant,
        logits=None if definition.logits is None else _of_its_precision(definition.logits),
        fresh=None if draws is None or not draws.labelled else draws.labelled_draw,
        fingerprint=_fingerprint(definition.module, splits, draws),
        notes=() if draws is None else draws.notes,
    )


def _of_its_precision(function: Callable[..., Tensor]) -> Any:
    """The same function of (module, inputs, ...), whose inputs are given the precision of the weights."""

    @functools.wraps(function)
    def cast(module: nn.Module, inputs: Tensor, *more: Any, **named: Any) -> Tensor:
        if inputs.is_floating_point():
            inputs = inputs.to(next(module.parameters()).dtype)
        return function(module, inputs, *more, **named)

    return cast


def define(own: OwnTask, config: RunConfig) -> TaskDefinition:
    """Call the user's function.

    Raises:
        ValueError: where the file or the function is missing, the function fails, or it returns
            something else.
    """
    own_source(own.file)  # refuses a missing file, and one that is no Python, in a sentence
    module = _imported(own.file)
    function = getattr(module, own.function, None)
    if not callable(function):
        known = [
            n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__
        ]
        raise ValueError(
            f"'{own.file}' must have a function '{own.function}', it has {known}; name one of them"
        )
    given = {"seed": config.seed, **config.options}
    parameters = inspect.signature(function).parameters
    unknown = sorted(set(config.options) - set(parameters))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            f"options must be parameters of {own.function}, one of {list(parameters)}, got {unknown}; "
            "correct the name"
        )
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        given = {name: value for name, value in given.items() if name in parameters}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        found = _guarded(own.file, lambda: function(**given), f"{own.function}()")
    if isinstance(found, Mapping):
        found = _guarded(own.file, lambda: TaskDefinition(**found), "TaskDefinition")
    if not isinstance(found, TaskDefinition):
        raise ValueError(
            f"{own.function} of '{own.file}' must return a TaskDefinition, got {type(found).__name__}; see "
            "docs/how-to/own-task.md"
        )
    if not isinstance(found.module, nn.Module) or not any(True for _ in found.module.parameters()):
        raise ValueError(
            f"'module' of {own.name} must be an nn.Module with parameters, got {type(found.module).__name__}"
        )
    return found


def _imported(file: Path) -> ModuleType:
    """The file as a module; modules beside it can be imported by it."""
    name = f"polca_edit_task_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    loader, sys.modules[name] = spec.loader, module
    sys.path.insert(0, str(file.parent))
    try:
        _guarded(file, lambda: loader.exec_module(module), "importing it")
    finally:
        sys.path.remove(str(file.parent))
    return module


def _guarded(file: Path, call: Callable[[], Any], doing: str) -> Any:
    """What the user's code returns; its errors become one sentence with the line."""
    try:
        return call()
    except Exception as error:  # the user's code may raise anything
        line, at = error.__traceback__, ""
        while line is not None:
            if line.tb_frame.f_code.co_filename == str(file):
                at = f", line {line.tb_lineno}"
            line = line.tb_next
        raise ValueError(
            f"'{file}'{at}: {doing} failed with {type(error).__name__}: {error}; correct the file"
        ) from error


def splits_of(definition: TaskDefinition, seed: int) -> Splits:
    """The three splits, with the definition's groups among the labels.

    Raises:
        ValueError: for groups that do not fit, or a sequence in both select and evaluate.
    """
    tokens = definition.tokens
    if isinstance(tokens, Splits):
        if definition.groups:
            raise ValueError(
                "'groups' are labels of one token set, got three splits; put labels into 'skills' of each"
            )
        splits = tokens
    elif isinstance(tokens, TokenSet):
        groups = named_groups(definition.groups, tokens.count)
        twice = sorted(set(groups) & set(tokens.skills))
        if twice:
            raise ValueError(f"groups must have names of their own, {twice} are skills already; rename them")
        labelled = replace(tokens, skills={**tokens.skills, **groups})
        splits = split_by_document(labelled, definition.shares, generator_for(seed, "own task splits"))
    else:
        raise ValueError(f"'tokens' must be a TokenSet or Splits, got {type(tokens).__name__}")
    splits = Splits(*(with_features(part) for part in vars(splits).values()))
    for part in vars(splits).values():
        named_groups(part.skills, part.count)
    shared = len(set(rows_of(splits.select.inputs)) & set(rows_of(splits.evaluate.inputs)))
    if shared:
        raise ValueError(
            f"select and evaluate must share no sequence, they share {shared}; give equal sequences one "
            "document"
        )
    return splits


def _check_parents(parents: tuple[str, ...], tokens: TokenSet, split: str) -> None:
    missing = [name for name in parents if name not in tokens.skills]
    if missing:
        raise ValueError(
            f"parents must be labels of the tokens, one of {sorted(tokens.skills)}, got {missing}"
        )
    if parents:
        counts = torch.stack([torch.as_tensor(tokens.skills[name]) for name in parents]).sum(0)
        wrong = int((counts != 1).sum())
        if wrong:
            raise ValueError(
                f"every token must have exactly one of the parents {list(parents)}, {wrong} of "
                f"{tokens.count} in {split} do not; leave parents out or add a label for the rest"
            )


def _check_loss(file: Path, definition: TaskDefinition, tokens: TokenSet) -> None:
    """One loss a slot, finite, at the initial weights."""
    rows = tokens.inputs[:2]
    with torch.no_grad():
        losses = _guarded(file, lambda: definition.token_loss(definition.module, rows), "token_loss")
    wanted = tuple(tokens.scored[:2].shape)
    if not isinstance(losses, Tensor) or tuple(losses.shape) != wanted:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"token_loss must give one loss per sequence and slot, {wanted} for 2 sequences, got {got}; use "
            "reduction='none', and [:, None] where a sequence has one token"
        )
    if not bool(torch.isfinite(losses).all()):
        raise ValueError("token_loss must be finite at the initial weights, it is not; check the loss")


def _unseen(draws: TrainingDraws | None, splits: Splits, config: RunConfig) -> Unseen | None:
    """Fresh draws off everything used; None where data are finite, unlabelled, or training is not ours."""
    if draws is None or not (draws.labelled and draws.endless) or config.checkpoints is not None:
        return None
    used = frozenset(rows_of(splits.curvature.inputs))
    source = draws

    def unseen(sequences: int, seed: int, branches: Mapping[int, range] | None = None) -> TokenSet:
        return source.unseen(
            sequences, seed, used, {0: range(1, config.training.steps + 1), **(branches or {})}
        )

    return unseen


def _fingerprint(module: nn.Module, splits: Splits, draws: TrainingDraws | None) -> str:
    """Hash of initial weights, all tokens with their labels, and finite training data."""
    digest = hashlib.sha256()

    def add(name: str, values: Tensor) -> None:
        plain = values.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)} ".encode())
        digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() and plain.ndim else b"")
        digest.update(repr(plain.item()).encode() if not plain.ndim else b"")

    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            add(name, value)
    for split, tokens in vars(splits).items():
        digest.update(f"{split} {tokens.fingerprint()}".encode())
        for name, mask in sorted(tokens.skills.items()):
            add(name, torch.as_tensor(mask))
    if draws is not None and draws.rows is not None:
        add("training", draws.rows)
    return digest.hexdigest()
