"""One writer per run directory, and a list of checksums by which a later verb knows that nothing changed.

Stages keep the checksums of what they wrote in their records. Everything else in a run (config, openings of
the evaluate split, verdicts, summary, edits, ...) is listed in ``seal.json`` when a verb ends. The next verb
compares before it reads. A verb that writes takes the seal away first, so that a run that was killed has
none: its stages are checked one by one as they are resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from experiments.application import say
from experiments.run.store import CONFIG, CONFIG_SUM, SEAL, RunDirectory
from polca_edit.artifacts import checksum, key_of, load_record, save_record

LOCK = ".lock"
#: What ``run`` writes anew in any case: where it is damaged, running again is the remedy.
REWRITTEN = (
    CONFIG,
    CONFIG_SUM,
    "summary.json",
    "tokens.parquet",
    "report.html",
    "figures/",
    "labels/",
    "stages/",
)


@dataclass(frozen=True)
class Seal:
    """``seal.json``.

    Attributes:
        files: path in the run -> SHA-256.
        digest: hash of the list itself.
    """

    files: dict[str, str]
    digest: str


@contextmanager
def writing(path: Path, *, repairs: bool = False) -> Iterator[None]:
    """The only writer of a run directory while the block lasts; nested blocks of one process are one.

    Args:
        path: the run directory, which may not exist yet.
        repairs: the block writes anew whatever is damaged in stages and in :data:`REWRITTEN`.

    Raises:
        ValueError: if another process writes, or a file is not what was written.
    """
    directory = RunDirectory(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"'{path}' must be a run directory, it is a file; choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another process is writing into '{path}'; wait until it ends, or choose another --out"
        ) from error
    try:
        if lock.lock_counter == 1:
            check_seal(directory, repairs=repairs)
            for name in directory.forget_damaged() if repairs else []:
                say(f"  {name.removesuffix('.json')}: its files are not what it wrote, it is run again")
            directory.unseal()
        yield
        if lock.lock_counter == 1:
            seal(directory)
    finally:
        lock.release()


@contextmanager
def existing(path: Path) -> Iterator[None]:
    """As :func:`writing`, in a run that is there already.

    Raises:
        ValueError: also where there is no run.
    """
    require_run(path)
    with writing(path):
        yield


def require_run(path: Path) -> None:
    """Whether there is a run.

    Raises:
        ValueError: where there is none, or its config was edited by hand.
    """
    if not (path / "config.yaml").exists():
        raise ValueError(
            f"'{path}' must be a run directory with a config.yaml; give the --out of an earlier run"
        )
    RunDirectory(path).require_config()


def require_different(runs: Sequence[Path]) -> None:
    """Whether every run of a study is another one.

    Raises:
        ValueError: for a directory that is given twice.
    """
    places = [run.resolve() for run in runs]
    twice = next((run for run, place in zip(runs, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ValueError(f"runs of a study must be different ones, got '{twice}' twice; give it once")


def unlisted(directory: RunDirectory) -> Iterator[Path]:
    """Files of a run that no stage record lists, in order."""
    listed = {name for record in directory.stage_records() for name in record.files}
    for path in sorted(directory.path.rglob("*")):
        name = path.relative_to(directory.path).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(directory.path).parts)
        if path.is_file() and not hidden and name not in listed and name != SEAL and ".parts/" not in name:
            yield path


def seal(directory: RunDirectory) -> None:
    """List every file of a run that its stage records do not."""
    if not (directory / "config.yaml").exists():
        return
    files = {p.relative_to(directory.path).as_posix(): checksum(p) for p in unlisted(directory)}
    save_record(directory / SEAL, Seal(files, key_of(files)))


def check_seal(directory: RunDirectory, *, repairs: bool = False) -> None:
    """Compare a run with its seal; a run without one was killed, or is written by Python code.

    Raises:
        ValueError: for the first file that is another than was written.
    """
    if not repairs:
        directory.require_config()
    path = directory / SEAL
    if not path.exists():
        return
    held = load_record(Seal, path)
    if key_of(held.files) != held.digest:
        raise ValueError(f"'{path}' is damaged; if the other files are as they should be, delete it")
    for name, value in held.files.items():
        file = directory / name
        if repairs and name.startswith(REWRITTEN):
            continue
        if file.exists() and checksum(file) != value:
            raise ValueError(
                f"'{file}' is not what was written (damaged, or edited by hand); run the verb that writes it "
                f"again, or delete '{path}' if the change is yours"
            )


def check(path: Path) -> None:
    """Compare everything in a run with what was written, for verbs that only read it.

    Raises:
        ValueError: for the first file that is another.
    """
    directory = RunDirectory(path)
    if path.is_dir():
        check_seal(directory)
        directory.require_whole()
