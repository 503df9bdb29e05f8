"""The record of an open run, and how a run directory is opened."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from experiments.config import BasisConfig, RunConfig, dump_config, load_config
from experiments.run import keys
from experiments.run.contents import Contents
from experiments.run.memory.allocator import settle_allocator
from experiments.run.store import RunDirectory, require_place
from experiments.tasks import own_task
from experiments.tasks.source import own_source
from experiments.tasks.task import Task, build_task
from polca_edit.artifacts import key_of, load_record, save_record
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
        groups: hash of a file of token groups that was added for one verb; stages never see it.
    """

    directory: RunDirectory
    config: RunConfig
    task: Task
    objective: Objective
    say: Say
    contents: str
    groups: str = ""

    @classmethod
    def from_task(
        cls,
        task: str | Path | Callable[..., object],
        out: Path | str,
        config: str | Path = "own",
        *,
        say: Say = print,
        **settings: object,
    ) -> Run:
        """A run of a task of one's own, opened as ``polca-edit run --task`` opens it.

        Args:
            task: ``"FILE.py:FUNCTION"``, or the function itself, which must stand in a file so that later
                verbs find it.
            out: run directory, new or of an earlier run.
            config: preset or config file for everything else.
            say: where lines for the reader go.
            **settings: config keys with ``__`` for the dot, such as ``training__steps=600``.

        Raises:
            ValueError: for a task that cannot be built, or settings that do not hold.

        Example::

            run = Run.from_task("my_task.py:build", "runs/mine", seed=1)
            run_stages(run), write_summary(run), write_report(run.directory)
        """
        name = str(task) if isinstance(task, (str, Path)) else _file_of(task)
        overrides = {key.replace("__", "."): value for key, value in settings.items()}
        return open_run(load_config(config, {"task": name, **overrides}), Path(out), say)

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
        own = [self.groups] if self.groups else []
        return key_of(keys.SCHEMA, name, keys.data_key(self.config, self.contents), depends, *own)

    def require_bases(self, labels: Sequence[str], option: str = "--basis") -> None:
        """Whether the run has every basis that was asked for, by an option.

        Raises:
            ValueError: for the first it does not have.
        """
        known = [spec.label for spec in self.config.bases]
        missing = next((label for label in labels if label not in known), None)
        if missing is not None:
            raise ValueError(f"{option} must be one of {known} of '{self.directory.path}', got '{missing}'")

    def settings(self) -> ObserveSettings:
        """Allocation and clustering settings."""
        return ObserveSettings(
            self.config.rule,
            ClusterSettings(**self.config.clusters.model_dump()),
            self.config.breakthrough_delta,
        )

    def checkpoints(self) -> Checkpoints:
        """The run's series (recorded or opened)."""
        series = self.task.given_checkpoints(self.config)
        if series is None:
            series = open_checkpoints(self.directory.checkpoints, self.task.space)
        if self.config.precision == "float64":
            series = replace(series, dtype=torch.float64)
        return series.require()

    def observed(self, window: tuple[int, int] | None = None) -> Checkpoints:
        """The checkpoints of a window of training, by default the config's, by default all."""
        return self.checkpoints().within(window or self.config.window)


def _file_of(function: Callable[..., object]) -> str:
    """``FILE.py:FUNCTION`` of a function.

    Raises:
        ValueError: for one that is not at the top of a file.
    """
    name = getattr(function, "__qualname__", "")
    file = inspect.getsourcefile(function) if inspect.isfunction(function) else None
    if file is None or not name.isidentifier() or not Path(file).is_file():
        raise ValueError(
            f"a task must be a function at the top of a Python file, so that a run can be opened again, got "
            f"'{name or function!r}'; move it to a file"
        )
    return f"{file}:{name}"


@dataclass(frozen=True)
class OwnTaskRecord:
    """``task.json``: the user's file a run was made with.

    Attributes:
        task: FILE.py:FUNCTION.
        source: hash of the file and of what it imports beside it.
        seed: it was built with.
        options: it was built with.
        fingerprint: of the data and initial weights it gave.
    """

    task: str
    source: str
    seed: int
    options: dict[str, object]
    fingerprint: str | None


def open_run(config: RunConfig, out: Path, say: Say = print) -> Run:
    """Prepare a run directory; the resolved config is written at once.

    Raises:
        ValueError: if ``out`` is not a directory this tool may write into.
    """
    _require_usable(out)
    return _opened(config, RunDirectory(out), say, write=True)


def _require_usable(out: Path) -> None:
    require_place(out, "--out")
    # Hidden files: the lock, and what a killed process had not finished writing.
    held = [p for p in out.iterdir() if not p.name.startswith(".")] if out.is_dir() else []
    if (out.exists() and not out.is_dir()) or (held and not (out / "config.yaml").exists()):
        raise ValueError(f"'{out}' must be new, empty or an earlier run; choose another --out")


def preview_run(config: RunConfig, out: Path) -> Run:
    """What :func:`open_run` would open; nothing is written.

    Raises:
        ValueError: where :func:`open_run` refuses.
    """
    _require_usable(out)
    return _opened(config, RunDirectory(out), lambda _: None, write=False, compare=False)


def load_run(out: Path, say: Say = print) -> Run:
    """Open an existing run with its own config.

    Raises:
        ValueError: if there is no run, or a file in it is not what was written.
    """
    if not (out / "config.yaml").exists():
        raise ValueError(
            f"'{out}' must be a run directory with a config.yaml; give the --out of an earlier run"
        )
    directory = RunDirectory(out)
    directory.require_config()
    config = load_config(out / "config.yaml")
    directory.require_whole()
    return _opened(config, directory, say, write=False)


def _opened(
    config: RunConfig, directory: RunDirectory, say: Say, *, write: bool, compare: bool = True
) -> Run:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    given = config.checkpoints
    if given is not None and not Path(given.directory).exists():
        raise ValueError(f"checkpoints must exist, '{given.directory}' does not; check the path")
    contents = Contents(directory / "contents.json")
    digest = contents.of_config(config)
    key = key_of(keys.SCHEMA, "tokenizer", keys.data_key(config, digest))
    tokenizer = _kept_tokenizer(directory, key)
    task = build_task(config, tokenizer)
    if task.batch_loss is None and config.checkpoints is None and task.open_checkpoints is None:
        raise ValueError(
            f"task '{task.name}' has no training data, a run needs some or finished checkpoints; give "
            "'training', or pass --checkpoints DIR"
        )
    require_parts(config, task)
    settle_allocator(config, task.space.size)
    if task.fingerprint is not None:
        digest = key_of(digest, task.fingerprint)
    if task.fingerprint is not None and compare:
        _compare_own(config, directory, task, say, write=write)
    if write:
        directory.unseal()
        directory.write_config(dump_config(config))
        if task.fingerprint is not None:
            save_record(directory / "task.json", _own_record(config, task))
        contents.save()
        if task.tokenizer is not None and tokenizer is None:
            _keep_tokenizer(directory, key, task.tokenizer)
        for note in task.notes:
            say(f"  {note}")
    return Run(directory, config, task, task.objective(config), say, digest)


def require_parts(config: RunConfig, task: Task) -> None:
    """Whether every basis may lie in some of the model's parameters (``include``, ``--layers``).

    Raises:
        ValueError: for patterns that no parameter has.
    """
    for spec in config.bases:
        if spec.include != ("*",):
            task.space.count(spec.include)


def _compare_own(config: RunConfig, directory: RunDirectory, task: Task, say: Say, *, write: bool) -> None:
    """Keep what a user's file gave; where it gives something else now, say so, or refuse to go on.

    Raises:
        ValueError: if the run is only read and the file changed since it was made.
    """
    now, path = _own_record(config, task), directory / "task.json"
    before = load_record(OwnTaskRecord, path) if path.exists() else None
    if before is not None and (before.source, before.fingerprint) != (now.source, now.fingerprint):
        same_settings = (before.seed, before.options) == (now.seed, now.options)
        what = (
            "was changed"
            if before.source != now.source
            else "gives other data or initial weights (from files it reads, or unseeded draws)"
        )
        if not write:
            raise ValueError(
                f"the task file of '{config.task}' {what} since run '{directory.path}' was made; put it "
                "back, or go through polca-edit run again"
            )
        if same_settings:
            say(f"  the task file {what} since this run was made: its stages are run again")
    if write:
        for note in task.notes:
            say(f"  {note}")


def _own_record(config: RunConfig, task: Task) -> OwnTaskRecord:
    own = own_task(config.task)
    source = "" if own is None else own_source(own.file)
    return OwnTaskRecord(config.task, source, config.seed, dict(config.options), task.fingerprint)


def _kept_tokenizer(directory: RunDirectory, key: str) -> Tokenizer | None:
    """The tokenizer trained when this run was opened first, None if the text has changed since."""
    if not directory.finished("tokenizer", key):
        return None
    return Tokenizer.from_file(str(directory.tokenizer))


def _keep_tokenizer(directory: RunDirectory, key: str, tokenizer: Tokenizer) -> None:
    write_atomically(directory.tokenizer, lambda part: tokenizer.save(str(part)))
    directory.note("tokenizer", key, [directory.tokenizer], seconds=0.0, passes={})
