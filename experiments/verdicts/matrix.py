"""The damage matrix: losses of tokens under every edit measured so far, kept on disk.

One row is the loss of every token of a split under one edit. Every question of a causal test is a masked
mean of such rows, so a test that is repeated with other settings, stopped halfway, or asked about another
basis of the same span measures only what it has not measured yet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from interventions.edits import Edit
from polca_edit.checkpoints.files import finite_json, require_digest, write_tensors
from polca_edit.tokens import TokenSet

#: Blocks held in memory at once: rows are read in the order in which they were written.
HELD = 4


@dataclass(eq=False)
class DamageMatrix:
    """Rows of losses by edit and tokens, streamed to a folder in blocks; a context manager.

    Several processes may write into one folder: a block is named by what is in it.

    Attributes:
        folder: of the blocks.
        context: hash of the model and of the code that computes losses; rows of another one are not found.
        block: rows a file; what an interruption can lose, and what is held in memory.
        computed: rows measured by this object.
        found: rows read back.

    Example:
        >>> with DamageMatrix(Path("damage"), "model") as matrix:  # doctest: +SKIP
        ...     losses = matrix.row(edit, tokens, lambda: model_losses(edit, tokens))
    """

    folder: Path
    context: str
    block: int = 256
    computed: int = field(default=0, init=False)
    found: int = field(default=0, init=False)
    _where: dict[str, tuple[Path, int]] = field(default_factory=dict, init=False, repr=False)
    _waiting: dict[int, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _held: dict[Path, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            self._where.update({name: (path, i) for i, name in enumerate(_names(path))})

    def __enter__(self) -> DamageMatrix:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What was measured is kept whatever ended the block."""
        self.flush()

    def __len__(self) -> int:
        return len(self._where) + sum(map(len, self._waiting.values()))

    def row(
        self, edit: Edit, tokens: TokenSet, compute: Callable[[], Float[Tensor, " M"]]
    ) -> Float[Tensor, " M"]:
        """Loss of every token under an edit of the weights it was made for, nats; computed once.

        Args:
            edit: its key says which weights it moves, and how.
            tokens: M of them.
            compute: measures the row; called where it is not known.

        Raises:
            ValueError: for a block whose bytes have changed.
        """
        name = hashlib.sha256(f"{self.context} {tokens.fingerprint()} {edit.key}".encode()).hexdigest()
        waiting = self._waiting.setdefault(tokens.count, {})
        if name in waiting or name in self._where:
            self.found += 1
            return waiting[name] if name in waiting else self._read(*self._where[name])
        waiting[name] = compute().detach().cpu()
        self.computed += 1
        kept = waiting[name]
        if len(waiting) >= self.block:
            self.flush()
        return kept

    def flush(self) -> None:
        """Write the rows that wait, one file for each number of tokens."""
        for waiting in self._waiting.values():
            if not waiting:
                continue
            names = list(waiting)
            path = self.folder / f"{hashlib.sha256(' '.join(names).encode()).hexdigest()[:24]}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {"losses": torch.stack(list(waiting.values()))}, {"rows": json.dumps(names)})
            self._where.update({name: (path, i) for i, name in enumerate(names)})
            waiting.clear()

    def _read(self, path: Path, index: int) -> Tensor:
        if path not in self._held:
            try:
                tensors = load_file(path)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"'{path}' must be a block of losses ({error}); delete it") from error
            require_digest(path, tensors)
            while len(self._held) >= HELD:
                self._held.pop(next(iter(self._held)))
            self._held[path] = tensors["losses"]
        row: Tensor = self._held[path][index]
        return row


def _names(path: Path) -> list[str]:
    """Hashes of a block's rows.

    Raises:
        ValueError: for a file that is no such block.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            names = finite_json((handle.metadata() or {})["rows"])
            count = handle.get_slice("losses").get_shape()[0]
        if not isinstance(names, list) or len(names) != count:
            raise ValueError(f"{count} rows")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"'{path}' must be a block of losses ({error}); delete it") from error
    return [str(name) for name in names]
