"""Damaged foreign files: every reader gives a value or one ValueError or OSError, nothing else.

``python -m tests.fuzz_readers --seconds 10`` mutates a valid file of every kind for that long per reader, and
prints how many files were read, refused, and what else was raised. ``tests/test_properties.py``
runs it briefly.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import save

from experiments.config import load_config
from experiments.run.store import StageRecord
from experiments.tasks.corpus import read_documents, read_tagged, read_token_ids
from experiments.tasks.source import own_source
from experiments.verbs.groups import read_groups
from interventions.edit_files import load_edit
from polca_edit.artifacts import load_record
from polca_edit.basis.record import Basis
from polca_edit.checkpoints.files import SeriesFolder, damage_of, read_weights, weight_files

CONLLU = "# text = A dog\n1\tA\ta\tDET\tDT\t_\t2\tdet\t_\t_\n2\tdog\tdog\tNOUN\tNN\t_\t0\troot\t_\t_\n\n"


@dataclass(frozen=True)
class Reader:
    """One reader of foreign files.

    Attributes:
        name: of the file it reads; a folder in it is made.
        valid: bytes it can read.
        read: takes the file.
    """

    name: str
    valid: bytes
    read: Callable[[Path], object]


def _array(values: np.ndarray) -> bytes:
    held = io.BytesIO()
    np.save(held, values)
    return held.getvalue()


def _groups() -> bytes:
    held = io.BytesIO()
    np.savez(held, a=np.array([True, False]))
    return held.getvalue()


def _torch_file() -> bytes:
    held = io.BytesIO()
    torch.save({"model": {"w": torch.arange(6.0)}}, held)
    return held.getvalue()


TENSORS = save({"w": torch.arange(6.0), "v": torch.ones(2, 3)}, {"record": "Basis", "fields": "{}"})
TEXT = json.dumps({"text": "one two three"}).encode() + b"\n" + json.dumps({"text": "four"}).encode() + b"\n"
INDEX = json.dumps({"weight_map": {"w": "a.safetensors"}, "metadata": {}}).encode()
SERIES = json.dumps({"steps": [0, 1], "learning_rates": [0.0, 0.1], "weight_decay": 0.1}).encode()
STAGE = json.dumps({"stage": "x", "key": "k", "seconds": 1.0, "files": {"a": "b"}}).encode()
READERS = (
    Reader("a.safetensors", TENSORS, read_weights),
    Reader("b.safetensors", TENSORS, damage_of),
    Reader("a.pt", _torch_file(), read_weights),
    Reader("m/model.safetensors.index.json", INDEX, lambda path: weight_files(path.parent)),
    Reader("s/series.json", SERIES, lambda path: SeriesFolder(path.parent).read_index()),
    Reader("r.safetensors", TENSORS, lambda path: load_record(Basis, path)),
    Reader("r.json", STAGE, lambda path: load_record(StageRecord, path)),
    Reader("e.json", json.dumps({"operator": "project_out", "space": {}}).encode(), load_edit),
    Reader("t.jsonl", TEXT, read_documents),
    Reader("t.jsonl.gz", gzip.compress(TEXT, mtime=0), read_documents),
    Reader("t.txt", b"One two.\n\nThree four.\n", read_documents),
    Reader("t.npy", _array(np.arange(40).reshape(4, 10)), read_token_ids),
    Reader("t.conllu", CONLLU.encode(), read_tagged),
    Reader("g.npz", _groups(), read_groups),
    Reader("g.json", json.dumps({"a": [True, False]}).encode(), read_groups),
    Reader("c.yaml", b"task: arithmetic\ntraining: {steps: 60, record_every: 6}\n", load_config),
    Reader("task.py", b"import torch\n\ndef build(seed):\n    return 3\n", own_source),
)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A file with a few bytes changed, cut, doubled or put in."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(found) + 1)
        kind = draw.randrange(5)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del found[at : at + draw.choice((1, 8, 1000))]
        elif kind == 2:
            found[at:at] = draw.randbytes(draw.choice((1, 4, 64)))
        elif kind == 3:
            found[at:at] = draw.choice((b"null", b"-1", b"1e999", b"NaN", b"[]", b"{}", b'"', b"\0", b"\xff"))
        else:
            found[at : at + 8] = found[:8]
    return bytes(found)


def fuzzed(reader: Reader, files: int | None = None, seconds: float = 3600, seed: int = 0) -> Counter[str]:
    """Outcomes of one reader on mutated files: ``read``, ``refused``, or the name of another error.

    Ends after so many files or so many seconds; a count gives the same files on every machine.
    """
    draw, counts = random.Random(f"{seed} {reader.name}"), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / reader.name
        path.parent.mkdir(parents=True, exist_ok=True)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until and (files is None or sum(counts.values()) < files):
            data = mutated(reader.valid, draw)
            path.write_bytes(data)
            try:
                reader.read(path)
                counts["read"] += 1
            except Exception as error:  # anything but these is what this looks for
                refused = type(error) in (ValueError, OSError, FileNotFoundError)
                named = f"{type(error).__name__}: {str(error)[:80]} {data[:40]!r}"
                counts["refused" if refused else named] += 1
    return counts


def main(
    seconds: Annotated[float, typer.Option(help="per reader")] = 10.0,
    seed: Annotated[int, typer.Option(help="of the changes")] = 0,
) -> None:
    """Fuzz every reader for a while and print the counts."""
    total: Counter[str] = Counter()
    for reader in READERS:
        counts = fuzzed(reader, seconds=seconds, seed=seed)
        total.update(counts)
        other = {name: n for name, n in counts.items() if name not in ("read", "refused")}
        print(f"{reader.name:<32} read {counts['read']:>6}  refused {counts['refused']:>6}  other {other}")
    print(f"{sum(total.values())} files, {total['read']} read, {total['refused']} refused")
    raise typer.Exit(int(bool(set(total) - {"read", "refused"})))


if __name__ == "__main__":
    typer.run(main)
