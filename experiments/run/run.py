"""The record of an open run, and how a run directory is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from experiments.config import BasisConfig, RunConfig, dump_config, load_config
from experiments.run import keys
from experiments.run.contents import Contents
from experiments.run.store import RunDirectory
from experiments.tasks.task import Task, build_task
from polca_edit.artifacts import key_of
from polca_edit.checkpoints.files import write_atomically
from polca_edit.checkpoints.opening import open_checkpoints
from polca_edit.checkpoints.series import Checkpoints
from polca_edit.clusters.density import ClusterSettings
from polca_edit.derivatives.objective import Objective
from polca_edit.observation import ObserveSettings

Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """An open run: where it is, what it is about, and the derivatives of its loss.

    Attributes:
        directory: its files.
        config: its settings.
        task: model, data and loss.
        objective: derivatives of the loss.
        say: where lines for the reader go.
        contents: hash of every file the config names and of the task's source.
    """

    directory: RunDirectory
    config: RunConfig
    task: Task
    objective: Objective
    say: Say
    contents: str

    def key(self, stage: str) -> str:
        """Hash of everything a stage's result depends on: settings, contents and earlier stages."""
        return keys.stage_key(self.config, self.contents, stage)

    def basis_key(self, spec: BasisConfig) -> str:
        """Hash of everything a basis depends on; it need not be one of the config's."""
        return keys.basis_key(self.config, self.contents, spec)

    def key_for(self, name: str, *depends: object) -> str:
        """Key of something that is no stage: of the run's weights and data, and of what else it takes.

        Args:
            name: under which it is kept.
            *depends: records and plain values, such as settings and the fingerprints of inputs.
        """
        return key_of(keys.SCHEMA, name, keys.data_key(self.config, self.contents), depends)

    def settings(self) -> ObserveSettings:
        """Allocation and clustering settings."""
        return ObserveSettings(
            self.config.rule,
            ClusterSettings(**self.config.clusters.model_dump()),
            self.config.breakthrough_delta,
        )

    def checkpoints(self) -> Checkpoints:
        """The run's series (recorded or opened)."""
        given = self.task.given_checkpoints(self.config)
        if given is not None:
            return given.require()
        return open_checkpoints(self.directory.checkpoints, self.task.space).require()


def open_run(config: RunConfig, out: Path, say: Say = print) -> Run:
    """Prepare a run directory; the resolved config is written at once.

    Raises:
        ValueError: if ``out`` is not a directory this tool may write into.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "config.yaml").exists())):
        raise ValueError(f"'{out}' must be new, empty or an earlier run; choose another --out")
    return _opened(config, RunDirectory(out), say, write=True)


def load_run(out: Path, say: Say = print) -> Run:
    """Open an existing run with its own config.

    Raises:
        ValueError: if there is no run.
    """
    if not (out / "config.yaml").exists():
        raise ValueError(
            f"'{out}' must be a run directory with a config.yaml; give the --out of an earlier run"
        )
    return _opened(load_config(out / "config.yaml"), RunDirectory(out), say, write=False)


def _opened(config: RunConfig, directory: RunDirectory, say: Say, *, write: bool) -> Run:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    contents = Contents(directory / "contents.json")
    digest = contents.of_config(config)
    key = key_of(keys.SCHEMA, "tokenizer", keys.data_key(config, digest))
    tokenizer = _kept_tokenizer(directory, key)
    task = build_task(config, tokenizer)
    if write:
        write_atomically(directory / "config.yaml", lambda part: part.write_text(dump_config(config)))
        contents.save()
        if task.tokenizer is not None and tokenizer is None:
            _keep_tokenizer(directory, key, task.tokenizer)
        for note in task.notes:
            say(f"  {note}")
    return Run(directory, config, task, task.objective(config), say, digest)


def _kept_tokenizer(directory: RunDirectory, key: str) -> Tokenizer | None:
    """The tokenizer trained when this run was opened first, None if the text has changed since."""
    if not directory.finished("tokenizer", key):
        return None
    return Tokenizer.from_file(str(directory.tokenizer))


def _keep_tokenizer(directory: RunDirectory, key: str, tokenizer: Tokenizer) -> None:
    write_atomically(directory.tokenizer, lambda part: tokenizer.save(str(part)))
    directory.note("tokenizer", key, [directory.tokenizer], seconds=0.0, passes={})
