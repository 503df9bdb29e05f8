"""How a command is made, begins and ends: its record, settings, lines for the reader, errors."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import typer
import yaml
from rich.console import Console
from typer.core import TyperCommand

from experiments.verbs.signature import signature_alone

#: Where lines and tables for the reader go. A path may hold brackets: nothing in a line is markup.
console = Console(
    highlight=False,
    markup=False,
    emoji=False,
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 150,
)


def say(text: str) -> None:
    """A plain line, flushed, so that logs can be followed."""
    console.print(text, soft_wrap=True)


def then(*words: object) -> None:
    """The line a verb ends with: the command that goes on from here.

    Example: ``then("test", out)`` prints ``next: polca-edit test runs/demo``.
    """
    say("next: " + shlex.join(["polca-edit", *map(str, words)]))


def wants_json_alone(words: Sequence[str]) -> bool:
    """Whether standard output belongs to ``--json -``.

    >>> wants_json_alone(["runs/demo", "--json", "-"]), wants_json_alone(["--json", "found.json"])
    (True, False)
    """
    return "--json=-" in words or ("--json", "-") in pairwise(words)


def require_words(words: Sequence[str]) -> None:
    """Words of a command that no verb can use are refused before it starts.

    Raises:
        ValueError: for an empty word or value, or a ``--json`` that cannot be a file.
    """
    for word, after in pairwise([*words, " "]):
        if word == "" or (word.startswith("--") and (after == "" or word.endswith("="))):
            name = word.rstrip("=") or "an argument"
            raise ValueError(f"{name} must not be empty, got ''; give a value, or leave it out")
    target = value_of(("--json",), words)
    if target is None or target == "-":
        return
    path = Path(target)
    if path.is_dir():
        raise ValueError(
            f"--json must be a file or -, '{path}' is a folder; give for example {path / 'a.json'}"
        )
    from experiments.run.store import require_place

    require_place(path, "--json")


def value_of(options: Sequence[str], words: Sequence[str]) -> str | None:
    """The value that a command line gives to an option, the last where it is given twice.

    >>> value_of(["--seed"], ["run", "--seed", "3"]), value_of(["--seed"], ["--seed=4"])
    ('3', '4')
    """
    found = [after for word, after in pairwise(words) if word in options]
    found += [word.partition("=")[2] for word in words if word.partition("=")[0] in options and "=" in word]
    return found[-1] if found else None


@contextmanager
def values_named(words: Sequence[str]) -> Iterator[None]:
    """A value that an option refuses is named, with what to do."""
    try:
        yield
    except typer.BadParameter as error:
        value = value_of(getattr(error.param, "opts", ()), words)
        if value is None or ", got " in error.message:
            raise
        message = f"{error.message}, got '{value}'; give another"
        raise typer.BadParameter(message, error.ctx, error.param, error.param_hint) from None


def without_dry_run(words: Sequence[str]) -> list[str]:
    """A dry run's words as they are for the run itself.

    >>> without_dry_run(["runs/demo", "--dry-run", "--json", "-"])
    ['runs/demo']
    """
    kept, left = [], iter(words)
    for word in left:
        if word == "--json":
            next(left, None)
        elif word != "--dry-run" and not word.startswith("--json="):
            kept.append(word)
    return kept


def would(text: str, target: str | None, **values: object) -> None:
    """What a dry run says: a line for the reader, and the same for ``--json FILE|-``."""
    say(text)
    json_result({"dry_run": True, "would": " ".join(text.split()), **values}, target)


@contextmanager
def lines_aside(aside: bool) -> Iterator[None]:
    """While the block lasts, lines for the reader go to standard error, and JSON has the output alone."""
    before = console.stderr
    console.stderr = aside or before
    try:
        yield
    finally:
        console.stderr = before


def json_result(values: object, target: str | None) -> bool:
    """The result of a verb for ``--json FILE|-``.

    Args:
        values: a record, or plain values.
        target: a file, ``-`` for standard output, None for neither.

    Returns:
        whether it was asked for.
    """
    if target is None:
        return False
    from polca_edit.artifacts import to_plain
    from polca_edit.checkpoints.files import write_json

    if target == "-":
        typer.echo(json.dumps(to_plain(values), indent=1, sort_keys=True))
    else:
        write_json(Path(target), to_plain(values))
        say(f"JSON: {target}")
    return True


def settings_from(assignments: list[str] | None, **given: Any) -> dict[str, Any]:
    """Config overrides from ``--set KEY=VALUE`` and options; ``a__b`` is the key ``a.b``.

    >>> settings_from(["training.steps=600"], seed=3, text__file=None)
    {'training.steps': 600, 'seed': 3}

    Raises:
        ValueError: for an assignment without key or equals sign, or a value that is no YAML.
    """
    values: dict[str, Any] = {}
    for assignment in assignments or []:
        key, equals, text = assignment.partition("=")
        if not (equals and key.strip()):
            raise ValueError(
                f"--set needs KEY=VALUE, got '{assignment}'; write for example training.steps=600"
            )
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(
                f"--set needs a value as YAML has it, got '{assignment}'; close brackets and quotes"
            ) from error
    values.update({key.replace("__", "."): value for key, value in given.items() if value is not None})
    return values


def explain(error: BaseException) -> str:
    """One sentence for an error a user can act on."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; free some space and start again, finished stages are kept"
    if isinstance(error, OSError):
        return f"{error.strerror or error}: '{error.filename}'; check the path and its permissions"
    return " ".join(str(error).split())


def unforeseen(error: Exception) -> str:
    """One sentence for an error of a library: what it is, where it arose, and how to see the rest.

    >>> unforeseen(KeyError("step"))
    "an error that was not foreseen, KeyError: 'step'; set POLCA_EDIT_TRACEBACK=1 to see where, and report it"
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _OWN.search(frame.filename)]
    place = f" in {frames[-1].name} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    first = (str(error).strip().splitlines() or [""])[0][:300]
    if "out of memory" in str(error) or isinstance(error, MemoryError):
        return f"memory ran out{place}; lower batch_size, or use fewer vectors ({first or 'MemoryError'})"
    return (
        f"an error that was not foreseen{place}, {type(error).__name__}: {first}; "
        "set POLCA_EDIT_TRACEBACK=1 to see where, and report it"
    )


#: Files of this package.
_OWN = re.compile(r"[/\\](polca_edit|interventions|experiments)[/\\]")


#: Both spellings of help, everywhere.
HELP = {"help_option_names": ["-h", "--help"]}


def single(function: Callable[..., Any], epilog: str | None = None) -> typer.Typer:
    """A typer application of one command."""
    made = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings=HELP,
    )
    made.command(epilog=epilog)(function)
    return made


@dataclass(frozen=True)
class Verb:
    """One verb of the command line.

    Attributes:
        function: module under ``experiments`` and function, which typer makes a command of.
        help: what it does, for the list of verbs.
        examples: whole commands, shown at the end of its own help.
        panel: heading it is listed under.
        next: words of the command that goes on from here, where the verb does not name it itself.
    """

    function: str
    help: str
    examples: tuple[str, ...]
    panel: str = "Runs"
    next: tuple[str, ...] = ()

    @property
    def epilog(self) -> str:
        """The examples, one a line."""
        return "\n\n".join(["Examples:" if len(self.examples) > 1 else "Example:", *self.examples])

    def signature(self) -> Callable[..., Any]:
        """The function with its options; imported only where its signature needs more than is light."""
        module, _, attribute = self.function.partition(":")
        return signature_alone(f"experiments.{module}", attribute) or self.imported()

    def imported(self) -> Callable[..., Any]:
        """The function that runs."""
        module, _, attribute = self.function.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(f"experiments.{module}"), attribute)
        return found

    def command(self, *, to_run: bool = False) -> Any:
        """What typer makes of it."""
        function = self.imported() if to_run else self.signature()
        return typer.main.get_command(single(function, self.epilog))


def _completing(verb: Verb) -> type[TyperCommand]:
    """A command that takes any words, and completes those of the verb behind it."""

    class Command(TyperCommand):
        def shell_complete(self, ctx: Any, incomplete: str) -> Any:
            command = verb.command()
            inner = command.make_context(ctx.info_name, list(ctx.args), resilient_parsing=True)
            return command.shell_complete(inner, incomplete)

    return Command


def register(name: str, verb: Verb, group: typer.Typer, program: str, *, hidden: bool = False) -> None:
    """Add a verb to a group of commands."""

    def call(context: typer.Context) -> None:
        words = context.args
        helped = {"-h", "--help"} & set(words)
        if not helped:
            require_words(words)
        command: Any = verb.command(to_run=not helped)
        with lines_aside(wants_json_alone(words)):
            with values_named(words):
                code = command.main(words, prog_name=f"{program} {name}", standalone_mode=False)
            if code or helped:
                pass
            elif "--dry-run" in words:
                then(*program.split()[1:], name, *without_dry_run(words))
            elif verb.next:
                then(*verb.next)
        if code:
            raise typer.Exit(code)

    group.command(
        name=name,
        cls=_completing(verb),
        help=verb.help,
        rich_help_panel=verb.panel,
        hidden=hidden,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        add_help_option=False,
    )(call)


#: Exit code of a command that Ctrl-C stopped.
STOPPED = 130


def _stopped() -> NoReturn:
    """Say how to go on after Ctrl-C."""
    again = shlex.join(["polca-edit", *sys.argv[1:]])
    typer.echo(f"polca-edit: stopped; finished stages are kept, go on with: {again}", err=True)
    sys.exit(STOPPED)


def run_application(command: Any) -> None:
    """Run a typer application or one command function: a user error ends with one sentence, not 0."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not isinstance(command, typer.Typer):
        command = single(command)
    try:
        command()
    except (ValueError, OSError) as error:
        if os.environ.get("POLCA_EDIT_TRACEBACK"):
            raise
        typer.echo(f"polca-edit: {explain(error)}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        _stopped()
    except SystemExit as ended:
        if ended.code == STOPPED:  # what typer makes of Ctrl-C
            _stopped()
        raise
    except Exception as error:  # of a library, which no sentence of ours foresaw
        if os.environ.get("POLCA_EDIT_TRACEBACK"):
            raise
        typer.echo(f"polca-edit: {unforeseen(error)}", err=True)
        sys.exit(2)
