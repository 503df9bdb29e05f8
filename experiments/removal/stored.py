"""Which stored tensors an edit is of, and the edited model read back as its user will load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from polca_edit.checkpoints.files import read_weights
from polca_edit.checkpoints.huggingface import is_adapter
from polca_edit.checkpoints.huggingface_models import load_causal_lm
from polca_edit.checkpoints.tensor_names import stored_names
from polca_edit.parameters import ParameterSpace, parameter_slots


@dataclass(frozen=True)
class Survival:
    """How much of an edit is left after rounding to the stored dtype.

    Attributes:
        share: <kept, planned> / |planned|^2 over all weights.
        error: |kept - planned| / |planned|.
        dtypes: dtypes that were cast to.
    """

    share: float
    error: float
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Applied:
    """What ``apply`` did, read back from the files it wrote.

    Attributes:
        survival: share of the edit left after rounding.
        tensors: stored tensors that changed.
        largest: change of a weight.
        norm: length of the change.
        reader: what read it back.
    """

    survival: Survival
    tensors: int
    largest: float
    norm: float
    reader: str


def parameter_names(space: ParameterSpace, tensors: Mapping[str, Tensor], model: Path) -> dict[str, str]:
    """Stored name -> slot of every parameter of an edit, doubles and aliases included.

    Wrappers' prefixes and older spellings are those that every reader knows. A name that transformers alone
    translates is found by its value in the model that transformers loads.

    Raises:
        ValueError: for a parameter that nothing in the file stands for.
    """
    found = stored_names({name: tuple(tensor.shape) for name, tensor in tensors.items()}, space)
    names = {stored: slot for slot, stored in found.slots.items()}
    found.renamed(tensors)  # doubles must agree
    names.update({other: names[stored] for stored, other in found.doubles})
    missing = set(found.missing)
    if missing and model.is_dir() and (model / "config.json").exists() and not is_adapter(model):
        loaded = dict(parameter_slots(load_causal_lm(model)))
        for slot, name in space.aliases:
            own = loaded.get(slot)
            same = [
                stored
                for stored in found.unknown
                if own is not None and tensors[stored].shape == own.shape and _equal(tensors[stored], own)
            ]
            if name in missing and len(same) == 1:
                names[same[0]] = slot
                missing.discard(name)
    if missing:
        raise ValueError(
            f"every parameter of the edit must be in the file, '{sorted(missing)[0]}' is missing; give the "
            "model that the edit was made for"
        )
    return names


def _equal(stored: Tensor, loaded: Tensor) -> bool:
    return stored.is_floating_point() and torch.equal(stored.to(loaded.dtype), loaded)


def read_back(
    space: ParameterSpace,
    target: Path,
    planned: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    survival: Survival,
) -> Applied:
    """The edited model as its user will load it.

    Args:
        space: of the edit.
        target: folder or file that was written.
        planned: slot -> tensor that must be there.
        before: slot -> tensor of the original.
        survival: passed on.

    Raises:
        ValueError: if anything else is there.
    """
    slots = {slot for slot, _ in space.aliases}
    if target.is_dir() and (target / "config.json").exists() and not is_adapter(target):
        found: Mapping[str, Tensor] = dict(parameter_slots(load_causal_lm(target)))
        reader = "transformers"
    else:
        stored = read_weights(target)
        found = {slot: stored[name] for name, slot in parameter_names(space, stored, target).items()}
        reader = "the reader of checkpoints"
    kept = {name: tensor for name, tensor in found.items() if name in slots}
    theta = space.flatten(kept, dtype=torch.float32)
    if not torch.equal(theta, space.flatten(planned, dtype=torch.float32)):
        raise ValueError(
            f"the edited model must hold the edit when {reader} loads it, '{target}' does not; "
            "report this model"
        )
    change = (theta - space.flatten(before, dtype=torch.float32)).double()
    return Applied(survival, 0, float(change.abs().max()), float(change.norm()), reader)
