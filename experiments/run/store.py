"""The store of a run directory: stages and studies' parts, found again by the content they depend on.

A stage is kept under a name with a key, the hash of everything its result depends on. It counts as
finished only while its key is the wanted one and its files are still what it wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from experiments.run.machine import peak_rss_bytes
from experiments.run.parts import carried_cost
from polca_edit.artifacts import checksum, key_of, load_record, save_record
from polca_edit.checkpoints.files import write_atomically, write_json
from polca_edit.derivatives.objective import PassCount

Record = TypeVar("Record")
#: List of checksums that a verb leaves behind (:mod:`experiments.verbs.guard`).
SEAL = "seal.json"
#: The resolved settings, and their checksum.
CONFIG, CONFIG_SUM = "config.yaml", "config.sha256"


def require_place(path: Path, option: str) -> None:
    """Whether a file or folder can be made there, known before work is done for it.

    Raises:
        ValueError: where something above it is a file, or may not be written into.
    """
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{option} '{path}' cannot be made, '{above}' is a file; choose another place")
    if not path.exists() and not os.access(above, os.W_OK):
        raise ValueError(f"{option} '{path}' cannot be made, '{above}' is read-only; choose another place")


@dataclass(frozen=True)
class StageRecord:
    """What one finished stage did and cost.

    Attributes:
        stage: its name.
        key: hash of its settings, its inputs' contents and the stages it stands on.
        seconds: wall-clock time, summed over interrupted tries where parts were kept.
        passes: sequences through the model by kind.
        peak_rss_bytes: peak memory of the process when it ended.
        files: output path (relative) -> SHA-256.
        digest: hash of all that, by which a damaged record is known.
    """

    stage: str
    key: str
    seconds: float = 0.0
    passes: Mapping[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    files: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""

    def sealed(self) -> StageRecord:
        """With the hash of everything else in it."""
        return replace(self, digest=key_of(replace(self, digest="")))

    @property
    def whole(self) -> bool:
        """Whether it is what was written; records of earlier versions have no hash."""
        return not self.digest or self == self.sealed()


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run, and the stage records that make it resumable."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    # -- paths ----------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        """Recorded weights."""
        return self.path / "checkpoints"

    @property
    def last_weights(self) -> Path | None:
        """File of the last recorded weights, None where the run opened checkpoints of others."""
        found = sorted(self.checkpoints.glob("step-*.safetensors"))
        return found[-1] if found else None

    def basis(self, name: str) -> Path:
        """One basis."""
        return self.path / "basis" / f"{name}.safetensors"

    def projections(self, name: str) -> Path:
        """One basis's projections on the select split."""
        return self.path / "projections" / f"{name}.safetensors"

    def clusters(self, name: str) -> Path:
        """One basis's clusters."""
        return self.path / "clusters" / f"{name}.safetensors"

    def damage(self, name: str) -> Path:
        """One basis's damage rows."""
        return self.path / "damage" / f"{name}.json"

    def token_damage(self, name: str) -> Path:
        """Damage of one basis's vectors on every select token."""
        return self.path / "damage" / f"{name}.safetensors"

    @property
    def damage_matrix(self) -> Path:
        """Folder of the losses under every edit that a test has measured."""
        return self.path / "damage" / "matrix"

    @property
    def evaluated(self) -> Path:
        """The planned table on the evaluate split."""
        return self.path / "damage" / "evaluate.json"

    @property
    def tokenizer(self) -> Path:
        """Tokenizer that was trained on the run's text."""
        return self.path / "tokenizer.json"

    def stage_file(self, stage: str) -> Path:
        """Record of a finished stage."""
        return self.path / "stages" / f"{stage.replace(':', '-').replace('/', '-')}.json"

    # -- what is finished -------------------------------------------------------------------------

    def record(self, stage: str) -> StageRecord | None:
        """Record of a stage, None if it is not finished or its record cannot be read."""
        path = self.stage_file(stage)
        try:
            record = load_record(StageRecord, path) if path.exists() else None
        except ValueError:
            return None
        return record if record is None or record.whole else None

    def stage_records(self) -> list[StageRecord]:
        """Records of all finished stages.

        Raises:
            ValueError: for a record that is damaged.
        """
        found = []
        for path in sorted((self.path / "stages").glob("*.json")):
            record = load_record(StageRecord, path)
            if not record.whole:
                raise ValueError(f"'{path}' is not what was written; delete it and run that stage again")
            found.append(record)
        return found

    def write_config(self, text: str) -> None:
        """``config.yaml``, and its checksum in the form that ``sha256sum -c`` reads."""
        path = self.path / CONFIG
        write_atomically(path, lambda part: part.write_text(text))
        line = f"{checksum(path)}  {CONFIG}\n"
        write_atomically(self.path / CONFIG_SUM, lambda part: part.write_text(line))

    def require_config(self) -> None:
        """Compare the config with its checksum, in runs that have no seal too.

        Raises:
            ValueError: where it was changed by hand, or is damaged.
        """
        path, noted = self.path / CONFIG, self.path / CONFIG_SUM
        if noted.exists() and path.exists() and noted.read_text().split()[:1] != [checksum(path)]:
            raise ValueError(
                f"'{path}' is not what this run was made with (damaged, or edited by hand); put it back, or "
                "give the edited file to 'polca-edit run' with another --out"
            )

    def require_whole(self) -> None:
        """Compare every file of every finished stage with its checksum.

        Raises:
            ValueError: for the first file that is another than its stage wrote.
        """
        for record in self.stage_records():
            for name, value in record.files.items():
                if (self.path / name).exists() and checksum(self.path / name) != value:
                    raise ValueError(
                        f"'{self.path / name}' is not what stage {record.stage} wrote (damaged or edited); "
                        "polca-edit run with the same config repairs it"
                    )

    def forget_damaged(self) -> list[str]:
        """Take away the records of stages whose files, or that themselves, are damaged: they are run again.

        Returns:
            the stages' record files.
        """
        forgotten = []
        for path in sorted((self.path / "stages").glob("*.json")):
            try:
                record = load_record(StageRecord, path)
                whole = record.whole and all(
                    not (self.path / name).exists() or checksum(self.path / name) == value
                    for name, value in record.files.items()
                )
            except ValueError:
                whole = False
            if not whole:
                path.unlink()
                forgotten.append(path.name)
        return forgotten

    def unseal(self) -> None:
        """Take the list of checksums away before anything is written."""
        (self.path / SEAL).unlink(missing_ok=True)

    def finished(self, stage: str, key: str) -> bool:
        """Whether the stage ended with this key and its files are still what it wrote."""
        record = self.record(stage)
        return (
            record is not None
            and record.key == key
            and all(
                (self.path / name).exists() and checksum(self.path / name) == value
                for name, value in record.files.items()
            )
        )

    # -- doing something once ---------------------------------------------------------------------

    def kept(
        self,
        name: str,
        key: str,
        kind: type[Record],
        compute: Callable[[], Record],
        passes: PassCount | None = None,
    ) -> Record:
        """A record computed once: read back while it was made with the same key, else made anew.

        The record lies in ``kept/NAME.safetensors`` (or ``.json`` where the name ends so), and
        ``record(name)`` has the seconds and passes it took when it was made.

        Args:
            name: unique in the run directory, may hold slashes.
            key: hash of everything the result depends on, best ``run.key_for(...)``, which has the
                run's weights, data and code schema in it.
            kind: the record's class, a frozen dataclass (see :mod:`polca_edit.artifacts`).
            compute: makes the record.
            passes: running count of the objective that ``compute`` adds to.

        Example::

            basis = run.directory.kept(
                "reproduce/basis-hessian",
                run.key_for("reproduce/basis-hessian", settings, count),
                Basis,
                lambda: build_basis("hessian", inputs, count),
                run.objective.passes,
            )
            spent = run.directory.record("reproduce/basis-hessian").passes
        """
        path = self.path / "kept" / (name if name.endswith(".json") else f"{name}.safetensors")
        if not self.finished(name, key):
            with self.stage(name, key, [path], passes or PassCount()):
                save_record(path, compute())
        return load_record(kind, path)

    @contextmanager
    def stage(
        self, stage: str, key: str, outputs: Sequence[Path], passes: PassCount, *, parts: Path | None = None
    ) -> Iterator[None]:
        """Run a stage body; its record is written only if the body ends well.

        Outputs and parts left by a run with other settings are removed first. Seconds and passes
        of parts finished before an interruption are added through ``parts/cost.json``.

        Args:
            stage: name.
            key: hash of settings, inputs and upstream stages.
            outputs: files (or folders) the body writes.
            passes: the running count the body adds to.
            parts: folder of partial results that survive an interruption.
        """
        if self._stale(stage, key, parts):
            for path in [*outputs, *([parts] if parts else [])]:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        self.unseal()
        self.stage_file(stage).unlink(missing_ok=True)
        if parts is not None:
            parts.mkdir(parents=True, exist_ok=True)
            write_json(parts / "key.json", {"key": key})
        before, started = passes.as_dict(), time.perf_counter()
        yield
        spent = {kind: value - before[kind] for kind, value in passes.as_dict().items()}
        seconds = time.perf_counter() - started
        if parts is not None and (carried := carried_cost(parts)) is not None:
            spent = {kind: value + carried.passes.get(kind, 0.0) for kind, value in spent.items()}
            seconds += carried.seconds
        self.note(stage, key, outputs, seconds=seconds, passes=spent)
        if parts is not None:
            shutil.rmtree(parts, ignore_errors=True)

    def note(
        self,
        stage: str,
        key: str,
        outputs: Sequence[Path],
        *,
        seconds: float,
        passes: Mapping[str, float],
    ) -> None:
        """Write the record of a stage that has ended, with checksums of what it wrote."""
        files: dict[str, str] = {}
        for path in outputs:
            members = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            files.update({str(p.relative_to(self.path)): checksum(p) for p in members})
        record = StageRecord(stage, key, seconds, dict(passes), peak_rss_bytes(), files)
        self.unseal()
        save_record(self.stage_file(stage), record.sealed())

    def _stale(self, stage: str, key: str, parts: Path | None) -> bool:
        if parts is not None and (parts / "key.json").exists():
            try:
                return bool(json.loads((parts / "key.json").read_text())["key"] != key)
            except (json.JSONDecodeError, KeyError):
                return True
        return self.stage_file(stage).exists() or parts is None
