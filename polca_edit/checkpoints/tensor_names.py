"""Which stored tensor is which parameter: wrappers stripped, spellings known, everything else refused.

Nothing is guessed: a parameter that no stored name stands for is named in an error, as is a stored
tensor that stands for nothing in the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polca_edit.parameters import ParameterSpace

#: What ``torch.compile``, FSDP, activation checkpointing and Fabric put into names, anywhere.
MARKS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")
#: Attributes under which wrappers (DDP, DataParallel, a LightningModule) keep the whole model.
HOLDERS = ("module.", "model.", "net.", "network.", "lm.", "base_model.model.")
#: Buffers of older releases that no forward pass of today reads.
_OLD_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|position_ids)$")
#: Attention masks of older releases, told from a bias by their four axes.
_OLD_MASKS = re.compile(r"(^|\.)(attn|attention|self_attn)\.bias$")


def is_old_buffer(name: str, shape: Sequence[int]) -> bool:
    """Whether a stored tensor is a buffer of an older release that means nothing today.

    >>> is_old_buffer("h.0.attn.masked_bias", ()), is_old_buffer("h.0.attn.bias", (1, 1, 8, 8))
    (True, True)
    >>> is_old_buffer("h.0.attn.bias", (8,))
    False
    """
    return bool(_OLD_BUFFERS.search(name)) or (len(shape) == 4 and bool(_OLD_MASKS.search(name)))


@dataclass(frozen=True)
class Unwrapped:
    """Stored names without what wrappers added.

    Attributes:
        names: stored name -> name without.
        prefixes: what was taken away, in order.
    """

    names: Mapping[str, str]
    prefixes: tuple[str, ...] = ()


def unwrapped(names: Iterable[str], known: Iterable[str] = ()) -> Unwrapped:
    """Stored names without wrappers' marks and holders.

    A mark goes wherever it stands. A holder goes only where every name has it and more of the names are
    then known, because a model may have an attribute of that name itself.

    >>> unwrapped(["_orig_mod.module.a", "_orig_mod.module.b"], ["a", "b"]).names
    {'_orig_mod.module.a': 'a', '_orig_mod.module.b': 'b'}

    Args:
        names: as stored.
        known: names in the model; without them only marks are taken away.
    """
    wanted = set(known)
    table = {name: name for name in names}
    taken: list[str] = []
    for mark in MARKS:
        for stored, name in table.items():
            if mark in name and name not in wanted:
                table[stored] = name.replace(mark, "")
                if mark not in taken:
                    taken.append(mark)

    def hits(candidate: Mapping[str, str]) -> int:
        return sum(name in wanted for name in candidate.values())

    found = True
    while found and table:
        found = False
        for holder in HOLDERS:
            if all(name.startswith(holder) for name in table.values()):
                shorter = {stored: name.removeprefix(holder) for stored, name in table.items()}
                if hits(shorter) > hits(table):
                    table, found = shorter, True
                    taken.append(holder)
                    break
    return Unwrapped(table, tuple(taken))


def spellings(space: ParameterSpace) -> dict[str, str]:
    """Other names that files use for a parameter -> its slot name.

    Files of base models leave out the first component (``transformer.``, ``gpt_neox.``), adapter
    files leave out the adapter's name (``.default``), and LayerNorm was once saved with ``gamma`` and
    ``beta``. A spelling that two slots share is dropped.
    """
    table: dict[str, str | None] = {}
    for slot, _ in space.aliases:
        others = {slot.partition(".")[2], slot.replace(".default.", "."), slot.replace(".default", "")}
        others.add(slot.replace(".default.weight", "") if "lora_magnitude_vector" in slot else slot)
        others.add(slot.replace(".modules_to_save.default.", "."))
        others |= {slot.removesuffix(new) + old for new, old in _NORMS if slot.endswith(new)}
        for other in others:
            if other and other != slot:
                table[other] = None if other in table and table[other] != slot else slot
    slots = {slot for slot, _ in space.aliases}
    return {other: slot for other, slot in table.items() if slot is not None and other not in slots}


_NORMS = ((".weight", ".gamma"), (".bias", ".beta"))


@dataclass(frozen=True)
class StoredNames:
    """How the tensors of one checkpoint stand for the parameters of a space.

    Attributes:
        slots: slot name -> stored name.
        doubles: (stored name, other stored name) of the same slot, whose values must agree.
        others: stored names of known tensors that are no parameters (buffers, frozen weights) -> their name.
        prefixes: taken away.
        respelled: stored names that differ from their slot otherwise.
        ignored: buffers of older releases.
        missing: parameters that nothing stands for.
        unknown: stored names that stand for nothing.
    """

    slots: Mapping[str, str]
    doubles: tuple[tuple[str, str], ...]
    others: Mapping[str, str]
    prefixes: tuple[str, ...]
    respelled: tuple[str, ...]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every parameter has its tensor and every tensor its place."""
        return not self.missing and not self.unknown

    def renamed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under the names of the space.

        Raises:
            ValueError: for a parameter stored twice with different values.
        """
        for one, other in self.doubles:
            if not torch.equal(tensors[one], tensors[other]):
                raise ValueError(
                    f"a parameter must be stored once, '{one}' and '{other}' are the same one with different "
                    "values; remove the stale one"
                )
        return {slot: tensors[stored] for slot, stored in self.slots.items()}

    def problem(self) -> str | None:
        """What does not fit in one sentence, None where everything does."""
        if self.missing:
            return f"every parameter must be present, '{self.missing[0]}' is missing" + _more(self.missing)
        if self.unknown:
            return f"weights must hold known parameters only, got '{self.unknown[0]}'" + _more(self.unknown)
        return None


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def stored_names(shapes: Mapping[str, Sequence[int]], space: ParameterSpace) -> StoredNames:
    """Match the stored tensors of one checkpoint with a space.

    Args:
        shapes: stored name -> shape.
        space: the model's parameters, and what else its files may hold.
    """
    slots = {**dict(space.aliases), **dict(space.saved_names)}
    spelled, others = spellings(space), set(space.other_names)
    unread = [re.compile(pattern) for pattern in space.unread_patterns]
    bare = unwrapped(shapes, {*slots, *spelled, *others})
    found: dict[str, str] = {}
    doubles: list[tuple[str, str]] = []
    beside: dict[str, str] = {}
    respelled: list[str] = []
    ignored: list[str] = []
    unknown: list[str] = []
    # Names that are slots themselves come first, so that an old spelling beside them is the double.
    for stored, name in sorted(bare.names.items(), key=lambda pair: pair[1] not in slots):
        slot = name if name in slots else spelled.get(name)
        if slot is not None and not (is_old_buffer(name, shapes[stored]) and name not in slots):
            if slot in found:
                doubles.append((found[slot], stored))
                continue
            found[slot] = stored
            if slot != name:
                respelled.append(stored)
        elif name in others:
            beside[stored] = name
        elif is_old_buffer(name, shapes[stored]) or any(r.search(name) for r in unread):
            ignored.append(stored)
        else:
            unknown.append(stored)
    present = {slots[slot] for slot in found}
    missing = tuple(name for name in space.names if name not in present)
    return StoredNames(
        found,
        tuple(doubles),
        beside,
        bare.prefixes,
        tuple(respelled),
        tuple(ignored),
        missing,
        tuple(unknown),
    )
